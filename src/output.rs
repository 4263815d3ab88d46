//! Everything that is printed: a report as text or as JSON on stdout, notes and progress on stderr.
//!
//! A subcommand makes one [`Report`]; how it is shown is decided here. Colours and progress bars appear on a terminal
//! only; `NO_COLOR` switches colours off, `-q` everything but errors.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::cli::Global;

/// The result of a subcommand. Its JSON is its serde form, documented in docs/json.md; field names are stable.
pub trait Report: Serialize {
    /// The same for people; ends with a line feed.
    fn text(&self, paint: Paint) -> String;
}

/// Colours, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paint {
    /// Whether escape sequences are wanted.
    pub on: bool,
}

impl Paint {
    /// No colours.
    pub const PLAIN: Self = Self { on: false };

    fn code(self, code: &str, text: &str) -> String {
        if self.on && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// For headings and figures that matter.
    pub fn bold(self, text: &str) -> String {
        self.code("1", text)
    }

    /// For what is fine.
    pub fn good(self, text: &str) -> String {
        self.code("32", text)
    }

    /// For what is half well.
    pub fn warn(self, text: &str) -> String {
        self.code("33", text)
    }

    /// For what is not well.
    pub fn bad(self, text: &str) -> String {
        self.code("31", text)
    }

    /// For what may be skipped.
    pub fn dim(self, text: &str) -> String {
        self.code("2", text)
    }
}

/// Where and how to print.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
    quiet: bool,
    verbose: u8,
    paint: Paint,
    bars: bool,
}

impl Output {
    /// As the command line and the terminal say.
    pub fn new(global: &Global) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
            || std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        Self {
            json: global.json,
            quiet: global.quiet,
            verbose: global.verbose,
            paint: Paint { on: io::stdout().is_terminal() && !plain },
            bars: io::stderr().is_terminal() && !global.quiet,
        }
    }

    /// For a step that is part of another: what went wrong is told by its result, and nothing else is.
    pub const fn silent(self) -> Self {
        Self { bars: false, verbose: 0, ..self }
    }

    /// Colours or none on stdout.
    pub const fn paint(self) -> Paint {
        self.paint
    }

    /// How many times `-v` was given.
    pub const fn verbose(self) -> u8 {
        self.verbose
    }

    /// Whether `--json` was given.
    pub const fn json(self) -> bool {
        self.json
    }

    /// Prints the result. A reader that has gone away is no error: the work is done.
    pub fn report(self, report: &impl Report) {
        let text = match (self.json, self.quiet) {
            (true, _) => serde_json::to_string_pretty(report).unwrap_or_default() + "\n",
            (false, true) => return,
            (false, false) => clean(&report.text(self.paint)),
        };
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    /// Prints what another dyni has made of a report.
    pub fn raw(self, text: &str) {
        if self.json || !self.quiet {
            let mut out = io::stdout().lock();
            let _ = out.write_all(clean(text).as_bytes()).and_then(|()| out.flush());
        }
    }

    /// One line on stderr about what is being done.
    pub fn note(self, text: &str) {
        if !self.quiet && !self.json {
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// One line on stderr with `-v`.
    pub fn detail(self, text: &str) {
        if self.verbose > 0 {
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// Says on stderr what is being done until the result is dropped: a moving bar on a terminal, else nothing, or with
    /// `-v` a line. (Scripts read the first line of stderr as the error.)
    pub fn progress(self, text: &str) -> Progress {
        if !self.bars {
            self.detail(text);
            return Progress(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("{spinner} {msg}"));
        bar.set_message(text.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        Progress(bar)
    }

    /// The same with a known length.
    pub fn progress_of(self, text: &str, length: u64) -> Progress {
        let progress = self.progress(text);
        if self.bars {
            progress.0.set_length(length);
            progress.0.set_style(style("{spinner} {msg} [{bar:30}] {percent}%"));
        }
        progress
    }
}

/// Without what could take over a terminal: names come from binaries, archives and other processes. Line feeds and
/// colours stay.
pub fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let colour = rest.strip_prefix("\x1b[").and_then(|r| {
            let code = r.trim_start_matches(|c: char| c.is_ascii_digit());
            code.starts_with('m').then(|| rest.len() - code.len() + 1)
        });
        let length = colour.unwrap_or(c.len_utf8());
        if colour.is_some() || c == '\n' || !c.is_control() {
            clean.push_str(&rest[..length]);
        } else {
            clean.push('?');
        }
        rest = &rest[length..];
    }
    clean
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// A progress bar that is cleared when dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// How much of the length is done.
    pub fn set(&self, position: u64) {
        self.0.set_position(position);
    }

    /// What is being done now.
    pub fn say(&self, text: &str) {
        self.0.set_message(text.to_owned());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Figures.
    Right,
}

/// A table of text: columns as wide as their widest cell, two spaces between them, no lines.
pub struct Table {
    heads: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns. Without any text in a head, no head line is printed.
    pub fn new(heads: &[(&str, Align)]) -> Self {
        Self { heads: heads.iter().map(|&(text, align)| (text.to_owned(), align)).collect(), rows: Vec::new() }
    }

    /// Adds a row; cells may hold colours.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.heads.len(), "as many cells as columns");
        self.rows.push(cells.into());
    }

    /// Whether it has no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table, each line after `indent`.
    pub fn render(&self, indent: &str, paint: Paint) -> String {
        let mut widths: Vec<usize> = self.heads.iter().map(|(text, _)| width(text)).collect();
        for row in &self.rows {
            for (column, cell) in row.iter().enumerate() {
                widths[column] = widths[column].max(width(cell));
            }
        }
        let mut text = String::new();
        let mut line = |cells: &mut dyn Iterator<Item = String>| {
            let mut one = indent.to_owned();
            for (column, cell) in cells.enumerate() {
                let pad = " ".repeat(widths[column] - width(&cell).min(widths[column]));
                match self.heads[column].1 {
                    Align::Left => write!(one, "{cell}{pad}  "),
                    Align::Right => write!(one, "{pad}{cell}  "),
                }
                .expect("a string takes everything");
            }
            text.push_str(one.trim_end());
            text.push('\n');
        };
        if self.heads.iter().any(|(head, _)| !head.is_empty()) {
            line(&mut self.heads.iter().map(|(head, _)| paint.dim(head)));
        }
        for row in &self.rows {
            line(&mut row.iter().cloned());
        }
        text
    }
}

/// How many columns of a terminal a cell takes, colours not counted.
fn width(text: &str) -> usize {
    let mut inside = false;
    let visible = text.chars().filter(|&c| {
        let escape = inside || c == '\x1b';
        inside = escape && c != 'm';
        !escape
    });
    visible.count()
}

/// A count with its thousands apart: `35,491`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A size: `512 B`, `630 KB`, `2.0 MB` (of 1024).
pub fn human_bytes(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.0} KB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MB", bytes as f64 / 1_048_576.0),
    }
}

/// `1 thread`, `2 threads`.
pub fn plural(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", thousands(number), if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_with_and_without_colours() {
        let mut table = Table::new(&[("module", Align::Left), ("functions", Align::Right)]);
        table.row(["mariadbd".into(), "1,076".into()]);
        table.row(["libc.so.6".into(), "9".into()]);
        let plain = table.render("  ", Paint::PLAIN);
        assert_eq!(plain, "  module     functions\n  mariadbd       1,076\n  libc.so.6          9\n");

        let mut coloured = Table::new(&[("module", Align::Left), ("functions", Align::Right)]);
        let paint = Paint { on: true };
        coloured.row([paint.good("mariadbd"), "1,076".into()]);
        coloured.row(["libc.so.6".into(), paint.bold("9")]);
        let widths = |text: &str| text.lines().map(width).collect::<Vec<_>>();
        assert_eq!(widths(&coloured.render("  ", paint)), widths(&plain));
    }

    #[test]
    fn a_table_without_heads_has_no_head_line() {
        let mut table = Table::new(&[("", Align::Left), ("", Align::Right)]);
        table.row(["a".into(), "1".into()]);
        assert_eq!(table.render("", Paint::PLAIN), "a  1\n");
    }

    #[test]
    fn no_colour_means_no_escape() {
        assert_eq!(Paint::PLAIN.bad("x"), "x");
        assert_eq!(Paint { on: true }.bad("x"), "\x1b[31mx\x1b[0m");
    }

    #[test]
    fn no_name_takes_over_the_terminal() {
        assert_eq!(clean("a\x1b]0;title\x07b\r\n"), "a?]0;title?b?\n");
        assert_eq!(clean("\x1b[2J\x1b[1mübel\x1b[0m"), "?[2J\x1b[1mübel\x1b[0m");
    }

    #[test]
    fn figures_read_well() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(35_491), "35,491");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(human_bytes(512), "512 B");
        assert_eq!(human_bytes(645_120), "630 KB");
        assert_eq!(human_bytes(2 << 20), "2.0 MB");
        assert_eq!(plural(1, "thread", "threads"), "1 thread");
        assert_eq!(plural(2000, "thread", "threads"), "2,000 threads");
    }
}
