//! A check's result: a table for people, Markdown for a job's summary, JUnit's XML for machines.

use std::fmt::Write as _;

use super::{CheckReport, RefusedFunction, short};
use crate::output::{Align, Paint, Table, thousands};

/// How many functions are listed by name.
const LISTED: usize = 10;

/// A share as people read it.
fn per_cent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}

/// A compared figure: shares as per cent, numbers of pages as they are.
fn figure(name: &str, value: f64) -> String {
    if name.starts_with("hot pages") { thousands(value as u64) } else { per_cent(value) }
}

/// By how much a figure is worse, with the sign of the change for the worse.
fn worse(by: f64) -> String {
    if by.abs() < 0.005 { "0.00 %".to_owned() } else { format!("{by:+.2} %") }
}

fn layouts(report: &CheckReport) -> [(&'static str, String, String); 5] {
    let (b, p) = (&report.facts.built, &report.facts.planned);
    [
        ("taken branches, of edges", per_cent(b.taken_branches), per_cent(p.taken_branches)),
        ("ext-TSP score, of edges", per_cent(b.ext_tsp), per_cent(p.ext_tsp)),
        ("4 KiB pages with hot code", thousands(b.pages), thousands(p.pages)),
        ("pages for 99.9 % of time", thousands(b.pages_999), thousands(p.pages_999)),
        ("hot bytes", thousands(b.hot_bytes), thousands(p.hot_bytes)),
    ]
}

fn matched(report: &CheckReport) -> String {
    let exact = || "the profile is of this build".to_owned();
    report.facts.matched.as_ref().map_or_else(exact, crate::rebuilt::Matched::text)
}

fn named(f: &RefusedFunction) -> &str {
    f.name.as_deref().unwrap_or(&f.start)
}

/// For people.
pub fn text(report: &CheckReport, paint: Paint) -> String {
    let facts = &report.facts;
    let mut text = format!("{}: {} functions\n", paint.bold(&facts.module), thousands(facts.functions));
    let _ = writeln!(text, "  profile {} ({}), build {}", short(&facts.profile), report.method, short(&facts.build_id));
    let _ = writeln!(text, "  {}\n", matched(report));
    let mut table = Table::new(&[("", Align::Left), ("as built", Align::Right), ("planned", Align::Right)]);
    for (name, built, planned) in layouts(report) {
        table.row([name.to_owned(), built, planned]);
    }
    text.push_str(&table.render("  ", paint));
    if !facts.refused.is_empty() {
        let share: f64 = facts.refused.iter().map(|r| r.share).sum();
        let _ =
            writeln!(text, "  left out: {} hot functions, {}", thousands(facts.refused.len() as u64), per_cent(share));
    }
    let Some(baseline) = &report.baseline else { return text };
    let _ = writeln!(text, "\n  against {baseline}, at most {} % worse", report.max_regress);
    let heads = ["", "baseline", "now", "worse by", ""];
    let mut table = Table::new(&heads.map(|h| (h, if h.is_empty() { Align::Left } else { Align::Right })));
    for c in &report.comparisons {
        let mark = if c.regressed { paint.bad("regressed") } else { String::new() };
        table.row([c.figure.clone(), figure(&c.figure, c.baseline), figure(&c.figure, c.now), worse(c.worse), mark]);
    }
    text.push_str(&table.render("  ", paint));
    for f in report.newly_refused.iter().take(LISTED) {
        let _ = writeln!(text, "  newly left out: {} ({}) {}", named(f), per_cent(f.share), f.reason);
    }
    if report.newly_refused.len() > LISTED {
        let _ = writeln!(text, "  and {} more (--json lists them)", report.newly_refused.len() - LISTED);
    }
    text.push_str(&if report.regressed { paint.bad("regressed\n") } else { paint.good("no worse than it may be\n") });
    text
}

/// Text in a cell of a Markdown table: nothing of it is markup.
fn cell(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => clean.push_str("&amp;"),
            '<' => clean.push_str("&lt;"),
            '>' => clean.push_str("&gt;"),
            '|' | '`' | '*' | '_' | '[' | ']' | '\\' | '#' | '!' | '~' | '@' => {
                clean.push('\\');
                clean.push(c);
            }
            c if c.is_control() => clean.push(' '),
            c => clean.push(c),
        }
    }
    clean
}

/// For the summary of a job on GitHub.
pub fn markdown(report: &CheckReport) -> String {
    let facts = &report.facts;
    let verdict = match (&report.baseline, report.regressed) {
        (None, _) => "no baseline",
        (Some(_), true) => "regressed",
        (Some(_), false) => "no worse than it may be",
    };
    let mut text = format!("### dyni check: {}, {verdict}\n\n{}.\n\n", cell(&facts.module), cell(&matched(report)));
    text.push_str("| | as built | planned |\n|---|---:|---:|\n");
    for (name, built, planned) in layouts(report) {
        let _ = writeln!(text, "| {name} | {built} | {planned} |");
    }
    if report.baseline.is_some() {
        let _ = write!(text, "\nAgainst the baseline, at most {} % worse:\n\n", report.max_regress);
        text.push_str("| | baseline | now | worse by | |\n|---|---:|---:|---:|---|\n");
        for c in &report.comparisons {
            let mark = if c.regressed { "**regressed**" } else { "" };
            let (was, now) = (figure(&c.figure, c.baseline), figure(&c.figure, c.now));
            let _ = writeln!(text, "| {} | {was} | {now} | {} | {mark} |", cell(&c.figure), worse(c.worse));
        }
    }
    for f in report.newly_refused.iter().take(LISTED) {
        let _ = writeln!(text, "\nNewly left out: {} ({}) {}.", cell(named(f)), per_cent(f.share), cell(&f.reason));
    }
    text.push('\n');
    text
}

/// Text in an XML attribute. What XML can't hold is left out.
fn attribute(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => clean.push_str("&amp;"),
            '<' => clean.push_str("&lt;"),
            '>' => clean.push_str("&gt;"),
            '"' => clean.push_str("&quot;"),
            '\n' | '\t' => clean.push(' '),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => clean.push(c),
        }
    }
    clean
}

/// For whatever reads test results: a case for each figure.
pub fn junit(report: &CheckReport) -> String {
    let failures = report.comparisons.iter().filter(|c| c.regressed).count();
    let class = attribute(&format!("dyni.check.{}", report.facts.module));
    let cases = report.comparisons.len() + 1;
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let counts = format!("tests=\"{cases}\" failures=\"{failures}\" errors=\"0\" skipped=\"0\"");
    let _ = writeln!(xml, "<testsuites {counts}>\n  <testsuite name=\"dyni check\" {counts}>");
    // What needs no baseline: that the profile says anything of this build.
    let _ = writeln!(xml, "    <testcase classname=\"{class}\" name=\"the profile fits\"/>");
    for c in &report.comparisons {
        let name = attribute(&c.figure);
        if !c.regressed {
            let _ = writeln!(xml, "    <testcase classname=\"{class}\" name=\"{name}\"/>");
            continue;
        }
        let (was, now) = (figure(&c.figure, c.baseline), figure(&c.figure, c.now));
        let message = format!(
            "{was} in the baseline, {now} now: worse by {}, at most {} % are allowed",
            worse(c.worse),
            report.max_regress
        );
        let _ = writeln!(xml, "    <testcase classname=\"{class}\" name=\"{name}\">");
        let _ = writeln!(xml, "      <failure message=\"{}\"/>\n    </testcase>", attribute(&message));
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}
