//! The format of `/etc/dyni.conf`, which is Dynimize's: sections in brackets, a line a thing, `#` begins a comment.
//!
//! ```text
//!     [options]
//!     reoptimize
//!     maxLogSize=1MB
//!     [exeList]
//!     mariadbd -window=60 -cpu-usage=25
//!     [users]
//!     mysql
//! ```
//!
//! Words are read as Dynimize writes them, in any case, with or without the dash that they have on its command line. A
//! line that means nothing is an error with its number: what was misspelt must not be silently left out.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::duration;

/// What a file says, as it says it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    /// For programs without options of their own.
    pub limits: Limits,
    /// The programs of `[exeList]`, in order.
    pub exes: Vec<Exe>,
    /// The users of `[users]`, in order.
    pub users: Vec<String>,
    /// `nPrograms`.
    pub n_programs: Option<usize>,
    /// `reoptimize`.
    pub reoptimize: Option<bool>,
    /// `log`.
    pub log: Option<PathBuf>,
    /// `maxLogSize`, bytes.
    pub max_log_size: Option<u64>,
    /// Lines that are right and mean nothing here, with their numbers.
    pub notes: Vec<String>,
}

/// `-window`, `-delay` and `-cpu-usage`, as far as they are given.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// For how long a program is profiled.
    pub window: Option<Duration>,
    /// How old it must be.
    pub delay: Option<Duration>,
    /// How much of one processor it must use, percent.
    pub cpu_usage: Option<f64>,
}

/// A line of `[exeList]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Exe {
    /// The executable's base name or whole path.
    pub name: String,
    /// Its own options.
    pub limits: Limits,
}

/// A line that means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    /// Its number, from 1.
    pub line: usize,
    /// Why.
    pub why: String,
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

/// Words of `[options]` that have no meaning for free software.
const LICENCE: [&str; 9] =
    ["license", "token", "promo", "info", "name", "offline", "licenseserver", "licenseport", "licensehost"];

#[derive(Clone, Copy)]
enum Section {
    None,
    Options,
    ExeList,
    Users,
}

impl Parsed {
    /// Reads a file's text.
    ///
    /// # Errors
    /// Every line that means nothing, at least one.
    pub fn of(text: &str) -> Result<Self, Vec<LineError>> {
        let (mut parsed, mut errors, mut section) = (Self::default(), Vec::new(), Section::None);
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let done = match line.strip_prefix('[') {
                Some(rest) => heading(rest).map(|found| section = found),
                None => parsed.line(section, number, line),
            };
            errors.extend(done.err().map(|why| LineError { line: number, why }));
        }
        if errors.is_empty() { Ok(parsed) } else { Err(errors) }
    }

    fn line(&mut self, section: Section, number: usize, line: &str) -> Result<(), String> {
        match section {
            Section::None => Err(format!("`{}` stands before the first section", short(line))),
            Section::Options => self.option(number, line),
            Section::ExeList => self.exe(line),
            Section::Users => self.user(line),
        }
    }

    fn option(&mut self, number: usize, line: &str) -> Result<(), String> {
        let (key, value) = key_value(line);
        let wanted = || value.filter(|v| !v.is_empty()).ok_or_else(|| format!("`{key}` needs a value: {key}=…"));
        match key.to_ascii_lowercase().as_str() {
            "reoptimize" => self.reoptimize = Some(value.map_or(Ok(true), switch)?),
            "log" => self.log = Some(absolute(wanted()?)?),
            "maxlogsize" => self.max_log_size = Some(size(wanted()?)?),
            "nprograms" => self.n_programs = Some(count(wanted()?)?),
            "initdservice" => {
                self.notes.push(format!("line {number}: initdService: dyni runs under systemd, see dyni.service"));
            }
            word if LICENCE.contains(&word) => {
                self.notes.push(format!("line {number}: {key}: dyni is free software and needs no licence"));
            }
            _ if self.limits.set(&key, value)? => {}
            _ => return Err(format!("unknown option `{}`", short(&key))),
        }
        Ok(())
    }

    fn exe(&mut self, line: &str) -> Result<(), String> {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        if name.starts_with('-') {
            return Err(format!("the name of an executable must come before `{}`", short(name)));
        }
        if name.contains('/') && !name.starts_with('/') || name.len() > 4096 {
            return Err(format!("`{}` is neither the name of an executable nor a whole path", short(name)));
        }
        if self.exes.iter().any(|e| e.name == name) {
            return Err(format!("`{}` is listed already", short(name)));
        }
        let mut limits = Limits::default();
        for word in words {
            let (key, value) = key_value(word);
            if !word.starts_with('-') || !limits.set(&key, value)? {
                return Err(format!("unknown option `{}`: -window=S, -delay=S or -cpu-usage=P", short(word)));
            }
        }
        self.exes.push(Exe { name: name.to_owned(), limits });
        Ok(())
    }

    fn user(&mut self, line: &str) -> Result<(), String> {
        if line.contains(char::is_whitespace) {
            return Err(format!("`{}` is no user: one a line", short(line)));
        }
        self.users.push(line.to_owned());
        Ok(())
    }
}

impl Limits {
    /// Takes an option if it is one of these three.
    fn set(&mut self, key: &str, value: Option<&str>) -> Result<bool, String> {
        let value = || value.filter(|v| !v.is_empty()).ok_or_else(|| format!("`{key}` needs a value: {key}=…"));
        match key.to_ascii_lowercase().as_str() {
            "window" => self.window = Some(window(value()?)?),
            "delay" => self.delay = Some(delay(value()?)?),
            "cpu-usage" => self.cpu_usage = Some(cpu_usage(value()?)?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn heading(rest: &str) -> Result<Section, String> {
    match rest.strip_suffix(']').map(|name| name.trim().to_ascii_lowercase()).as_deref() {
        Some("options") => Ok(Section::Options),
        Some("exelist") => Ok(Section::ExeList),
        Some("users") => Ok(Section::Users),
        _ => Err(format!("unknown section `[{}`: [options], [exeList] or [users]", short(rest))),
    }
}

/// `-key = value` without dashes and spaces.
fn key_value(text: &str) -> (String, Option<&str>) {
    let (key, value) = text.split_once('=').map_or((text, None), |(k, v)| (k, Some(v.trim())));
    (key.trim().trim_start_matches('-').to_owned(), value)
}

/// The beginning of what somebody wrote, fit for an error line.
fn short(text: &str) -> String {
    text.chars().take(60).flat_map(char::escape_debug).collect()
}

fn switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "on" | "yes" | "true" => Ok(true),
        "0" | "off" | "no" | "false" => Ok(false),
        _ => Err(format!("`{}` is neither on nor off", short(text))),
    }
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("`{}` is no whole path (from /)", short(text))) }
}

/// A time to profile for: seconds, or with a unit as on dyni's own command line.
///
/// # Errors
/// What is wrong with it.
pub fn window(text: &str) -> Result<Duration, String> {
    duration::parse(text).map_err(|why| format!("`{}`: {why}", short(text)))
}

/// An age: the same, and 0 is one.
///
/// # Errors
/// What is wrong with it.
pub fn delay(text: &str) -> Result<Duration, String> {
    if matches!(text, "0" | "0s") { Ok(Duration::ZERO) } else { window(text) }
}

/// A share of one processor in percent: a program on many may use more than 100.
///
/// # Errors
/// What is wrong with it.
pub fn cpu_usage(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>();
    number
        .ok()
        .filter(|p| (0.0..=100_000.0).contains(p))
        .ok_or_else(|| format!("`{}` is no percentage of a processor, as in 10", short(text)))
}

/// How many programs: from 1.
///
/// # Errors
/// What is wrong with it.
pub fn count(text: &str) -> Result<usize, String> {
    let number = text.parse::<usize>().ok().filter(|n| (1..=1024).contains(n));
    number.ok_or_else(|| format!("`{}` is no number of programs (from 1 to 1024)", short(text)))
}

/// A size in bytes: K, KB, M, MB, G, GB (of 1024) or none.
///
/// # Errors
/// What is wrong with it.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{}` is no size, as in 512KB, 1MB or 1G", short(text));
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" => 10,
        "M" | "MB" => 20,
        "G" | "GB" => 30,
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(wrong)?;
    match bytes {
        4096..=0x100_0000_0000 => Ok(bytes),
        _ => Err(format!("`{}`: a log may be from 4KB to 1024GB", short(text))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_word_of_the_manual() {
        let text = "\
# a comment
[options]
reoptimize            # at the end of a line, too
log = /var/log/other.log
maxLogSize=2M
initdService=1
license=abc
-token=def
nPrograms=3
-cpu-usage=5

[exeList]
mysqld
/opt/db/bin/mariadbd -window=60 -delay=0 -cpu-usage=25%

[users]
mysql
1000
";
        let p = Parsed::of(text).unwrap();
        assert_eq!((p.reoptimize, p.max_log_size, p.n_programs), (Some(true), Some(2 << 20), Some(3)));
        assert_eq!(p.log.as_deref(), Some(std::path::Path::new("/var/log/other.log")));
        assert_eq!(p.limits, Limits { cpu_usage: Some(5.0), ..Limits::default() });
        let own = Limits { window: Some(Duration::from_secs(60)), delay: Some(Duration::ZERO), cpu_usage: Some(25.0) };
        assert_eq!(p.exes[0], Exe { name: "mysqld".into(), limits: Limits::default() });
        assert_eq!(p.exes[1], Exe { name: "/opt/db/bin/mariadbd".into(), limits: own });
        assert_eq!(p.users, ["mysql", "1000"]);
        assert_eq!(p.notes.len(), 3, "{:?}", p.notes);
        assert!(p.notes[1].starts_with("line 7: license: "), "{:?}", p.notes);
    }

    #[test]
    fn every_wrong_line_is_named_by_its_number() {
        let wrong = [
            ("mysqld", 1),
            ("[option]", 1),
            ("[options", 1),
            ("[options]\nreoptimise", 2),
            ("[options]\nlog", 2),
            ("[options]\nlog=relative.log", 2),
            ("[options]\nmaxLogSize=1TB", 2),
            ("[options]\nmaxLogSize=1", 2),
            ("[options]\nreoptimize=maybe", 2),
            ("[options]\nnPrograms=0", 2),
            ("[options]\nwindow=0", 2),
            ("[options]\ndelay=-1", 2),
            ("[exeList]\n\n-window=60", 3),
            ("[exeList]\nmysqld -windows=60", 2),
            ("[exeList]\nmysqld window=60", 2),
            ("[exeList]\nmysqld -cpu-usage=NaN", 2),
            ("[exeList]\nbin/mysqld", 2),
            ("[exeList]\nmysqld\nmysqld", 3),
            ("[users]\nmysql postgres", 2),
        ];
        for (text, line) in wrong {
            let errors = Parsed::of(text).expect_err(text);
            assert_eq!(errors.len(), 1, "{text}: {errors:?}");
            assert_eq!(errors[0].line, line, "{text}: {errors:?}");
        }
        assert_eq!(Parsed::of("x\n[users]\na b\n").unwrap_err().len(), 2);
    }

    #[test]
    fn sizes_have_all_their_units() {
        let sizes = [
            ("4096", 4096),
            ("8K", 8192),
            ("8KB", 8192),
            ("1M", 1 << 20),
            ("1mb", 1 << 20),
            ("2G", 2 << 30),
            ("2GB", 2 << 30),
        ];
        for (text, bytes) in sizes {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MB", "1.5MB", "-1", "1", "99999999999999999999G"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
