//! Dynimize's own command line, `dyni -start -exe=mariadbd -window=60`, as the one that clap reads.
//!
//! A line is Dynimize's if its first word is one of Dynimize's; then every word must be, but for options with two dashes,
//! which are passed on. What it means:
//!
//! | Dynimize | here |
//! |---|---|
//! | `-start …`, `-stop`, `-status`, `-undo …`, `-redo …` | the subcommand of that name |
//! | `-pid=P` or `-exe=N`, maybe with `-window=S`, alone | `dyni optimize`: in the foreground, now |
//! | the same with `-reoptimize` | `dyni daemon`: it stays |
//! | `-nPrograms=N -delay=S -cpu-usage=P` without `-start` | `dyni daemon --once`: it ends when that many are done |
//! | `-help`, `-version`, `-about` | |
//! | words about licences and updates | a line that says that there is nothing to do |

use std::ffi::OsString;

use crate::config::Settings;
use crate::errors::Failure;

/// What a command line is.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// For clap: as it was, or translated. The program's name comes first.
    Words(Vec<OsString>),
    /// Answered by this.
    Answer(&'static str),
}

const ABOUT: &str = "dyni makes running programs faster without rebuilding, relinking, reconfiguring or restarting them.
It is free software under the MIT or Apache-2.0 licence. `dyni --help` lists its commands, `dyni demo` shows what it does.";
const FREE: &str = "dyni is free software: it needs no licence, and the package manager updates it.";

/// Words about licences and updates; with a value or without.
const NOT_NEEDED: [&str; 12] = [
    "license",
    "token",
    "promo",
    "info",
    "name",
    "offline",
    "licenseServer",
    "licensePort",
    "licenseHost",
    "skipPrompt",
    "update",
    "checkForUpdates",
];
const VERBS: [&str; 5] = ["start", "stop", "status", "undo", "redo"];
/// Options with a value, and what they are called here.
const VALUES: [(&str, &str); 7] = [
    ("log", "--log"),
    ("exe", "--exe"),
    ("pid", "--pid"),
    ("nPrograms", "--n-programs"),
    ("delay", "--delay"),
    ("window", "--window"),
    ("cpu-usage", "--cpu-usage"),
];

/// A line of Dynimize, taken apart.
#[derive(Default)]
struct Told {
    verb: Option<&'static str>,
    values: Vec<(&'static str, String)>,
    reoptimize: bool,
    passed_on: Vec<OsString>,
    not_needed: bool,
    answer: Option<&'static str>,
}

/// Translates a command line if it is Dynimize's.
///
/// # Errors
/// It begins like one and has a word that is none, or words that make no sense together (exit status 2).
pub fn translate(words: Vec<OsString>) -> Result<Line, Failure> {
    if words.get(1).and_then(|w| w.to_str()).and_then(known).is_none() {
        return Ok(Line::Words(words));
    }
    let mut told = Told::default();
    for word in &words[1..] {
        told.take(word)?;
    }
    let program = words.into_iter().next().unwrap_or_default();
    if let Some(answer) = told.answer {
        return Ok(Line::Answer(answer));
    }
    if told.not_needed && told.verb.is_none() && told.values.is_empty() && !told.reoptimize {
        return Ok(Line::Answer(FREE));
    }
    let mut line = vec![program];
    line.extend(told.line()?);
    Ok(Line::Words(line))
}

/// A word of Dynimize without its dash, and its value.
fn known(word: &str) -> Option<(&'static str, Option<&str>)> {
    let bare = word.strip_prefix('-').filter(|w| !w.starts_with('-'))?;
    let (name, value) = bare.split_once('=').map_or((bare, None), |(n, v)| (n, Some(v)));
    let plain = ["help", "version", "about", "reoptimize"];
    let names = plain.iter().chain(&VERBS).chain(&NOT_NEEDED).chain(VALUES.iter().map(|(n, _)| n));
    names.copied().find(|n| *n == name).map(|n| (n, value))
}

impl Told {
    fn take(&mut self, word: &OsString) -> Result<(), Failure> {
        let text = word.to_str().unwrap_or_default();
        if text.starts_with("--") {
            self.passed_on.push(word.clone());
            return Ok(());
        }
        let wrong =
            |why: &str| Failure::usage(format!("`{}`", word.display()), why).help("`dyni -help` lists what there is");
        let (name, value) = known(text).ok_or_else(|| wrong("is no option of Dynimize's command line"))?;
        if NOT_NEEDED.contains(&name) {
            self.not_needed = true;
        } else if VALUES.iter().any(|(n, _)| *n == name) {
            let value = value.filter(|v| !v.is_empty()).ok_or_else(|| wrong("needs a value, after ="))?;
            self.values.push((name, value.to_owned()));
        } else if value.is_some() {
            return Err(wrong("takes no value"));
        } else if VERBS.contains(&name) {
            if self.verb.is_some_and(|v| v != name) {
                return Err(wrong("does not go together with what was asked for before it"));
            }
            self.verb = Some(name);
        } else {
            match name {
                "reoptimize" => self.reoptimize = true,
                "about" => self.answer = Some(ABOUT),
                // Both are clap's.
                other => self.passed_on.push(format!("--{other}").into()),
            }
        }
        Ok(())
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.values.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str())
    }

    fn line(self) -> Result<Vec<OsString>, Failure> {
        let asks = |word: &str| self.passed_on.iter().any(|w| w == word);
        if asks("--help") || asks("--version") {
            return Ok(self.passed_on);
        }
        let conditions = ["nPrograms", "delay", "cpu-usage"].iter().any(|n| self.value(n).is_some());
        let target = self.value("pid").or(self.value("exe"));
        let mut line: Vec<OsString> = Vec::new();
        match (self.verb, target) {
            (Some("stop"), _) => line.push("stop".into()),
            (Some(verb @ ("status" | "undo" | "redo")), target) => {
                line.push(verb.into());
                match target {
                    Some(target) => line.extend(["-p".into(), target.into()]),
                    None if verb == "undo" => line.push("--all".into()),
                    None => {}
                }
            }
            (None, Some(target)) if !conditions && !self.reoptimize => {
                let window = match self.value("window") {
                    Some(window) => window.to_owned(),
                    None => format!("{}ms", Settings::DEFAULT_WINDOW.as_millis()),
                };
                line.extend(["optimize", "-p", target, "--duration", &window].map(OsString::from));
            }
            (verb, _) => {
                line.push(if verb == Some("start") { "start" } else { "daemon" }.into());
                if verb.is_none() && !self.reoptimize {
                    line.push("--once".into());
                }
                for (name, value) in &self.values {
                    let option = VALUES.iter().find(|(n, _)| n == name).map_or("", |(_, option)| option);
                    line.push(format!("{option}={value}").into());
                }
                line.extend(self.reoptimize.then(|| "--reoptimize".into()));
            }
        }
        line.extend(self.passed_on);
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    fn translated(line: &str) -> Result<Line, Failure> {
        translate(std::iter::once("dyni").chain(line.split_whitespace()).map(OsString::from).collect())
    }

    #[test]
    fn every_line_of_the_manual_is_one_of_ours() {
        let lines = [
            ("-start", "start"),
            ("-start -exe=mariadbd -window=60", "start --exe=mariadbd --window=60"),
            ("-start -pid=9618 -reoptimize -log=/x", "start --pid=9618 --log=/x --reoptimize"),
            ("-start -nPrograms=2 -delay=5 -cpu-usage=20", "start --n-programs=2 --delay=5 --cpu-usage=20"),
            ("-stop", "stop"),
            ("-status", "status"),
            ("-status --json", "status --json"),
            ("-undo", "undo --all"),
            ("-undo -pid=9618", "undo -p 9618"),
            ("-redo", "redo"),
            ("-redo -exe=nginx", "redo -p nginx"),
            ("-pid=9618", "optimize -p 9618 --duration 90000ms"),
            ("-exe=nginx -window=60", "optimize -p nginx --duration 60"),
            ("-pid=9618 -reoptimize", "daemon --pid=9618 --reoptimize"),
            ("-reoptimize", "daemon --reoptimize"),
            ("-nPrograms=2", "daemon --once --n-programs=2"),
            ("-delay=5 -exe=nginx", "daemon --once --delay=5 --exe=nginx"),
            ("-start -license=abc -token=d -skipPrompt", "start"),
            ("-help", "--help"),
            ("-version", "--version"),
        ];
        for (line, ours) in lines {
            let wanted: Vec<OsString> = format!("dyni {ours}").split_whitespace().map(OsString::from).collect();
            assert_eq!(translated(line).unwrap(), Line::Words(wanted.clone()), "{line}");
            let parsed = Cli::try_parse_from(wanted);
            assert!(parsed.is_ok() || parsed.is_err_and(|e| !e.use_stderr()), "{ours}");
        }
    }

    #[test]
    fn licences_and_updates_are_answered_in_one_line() {
        for word in NOT_NEEDED {
            for line in [format!("-{word}"), format!("-{word}=x")] {
                assert_eq!(translated(&line).unwrap(), Line::Answer(FREE), "{line}");
            }
        }
        assert_eq!(FREE.lines().count(), 1);
        assert_eq!(translated("-about").unwrap(), Line::Answer(ABOUT));
    }

    #[test]
    fn what_is_no_word_of_dynimize_is_said() {
        for line in ["-start -foo", "-pid", "-pid=", "-start -stop", "-start=1", "-status nginx", "-reoptimize=yes"] {
            assert!(translated(line).is_err(), "{line}");
        }
    }

    #[test]
    fn our_own_lines_are_left_as_they_are() {
        for line in ["", "status -p 7", "-v status", "-p 7", "--json status", "-x", "undo -pid=7"] {
            let words = std::iter::once("dyni").chain(line.split_whitespace()).map(OsString::from).collect();
            assert_eq!(translated(line).unwrap(), Line::Words(words), "{line}");
        }
    }
}
