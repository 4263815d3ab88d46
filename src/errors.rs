//! The one error of the command: what happened, why, what to do, and the exit status that says which kind it is.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed; the target is as it was |
//! | 2 | wrong usage |
//! | 3 | refused, for a reason that is printed |

use std::any::Any;
use std::fmt;
use std::io::{self, Write};
use std::panic::PanicHookInfo;
use std::process::ExitCode;

use serde::Serialize;

use crate::output::clean;

/// Why the command ends with something else than 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It did not work; the target is as it was.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// It could be tried, but dyni does not, for a reason.
    Refused = 3,
}

/// An error that a user reads.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    status: Status,
    what: String,
    why: String,
    help: Option<String>,
    /// The result that was printed says it already.
    reported: bool,
}

/// `{"error": …}` as printed by every command with `--json`.
#[derive(Serialize)]
struct ErrorJson<'a> {
    error: ErrorBody<'a>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    message: String,
    help: Option<&'a str>,
    status: u8,
}

impl Failure {
    fn new(status: Status, what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { status, what: what.into(), why: why.to_string(), help: None, reported: false }
    }

    /// Exit status 1: `what` was to be done and did not work because of `why`.
    pub fn failed(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::new(Status::Failed, what, why)
    }

    /// Exit status 2.
    pub fn usage(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::new(Status::Usage, what, why)
    }

    /// Exit status 3.
    pub fn refused(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::new(Status::Refused, what, why)
    }

    /// Adds what the reader can do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The command has printed its result, which says so too: no second document follows on stdout.
    #[must_use]
    pub fn reported(mut self) -> Self {
        self.reported = true;
        self
    }

    /// What the reader can do about it, if that is known.
    pub fn helps(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// Which kind it is.
    pub const fn status(&self) -> Status {
        self.status
    }

    /// The process's exit status.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status as u8)
    }

    /// Prints it on stderr and, for a program that reads stdout as JSON, there too.
    pub fn print(&self, json: bool) {
        // Nobody is left to tell if stderr or stdout is closed.
        let mut err = io::stderr().lock();
        let _ = writeln!(err, "dyni: {}", clean(&self.to_string()).replace('\n', " "));
        if let Some(help) = &self.help {
            let _ = writeln!(err, "  help: {help}");
        }
        if json && !self.reported {
            let _ = writeln!(io::stdout().lock(), "{}", self.json());
        }
    }

    fn json(&self) -> String {
        let body = ErrorBody { message: self.to_string(), help: self.help.as_deref(), status: self.status as u8 };
        serde_json::to_string(&ErrorJson { error: body }).unwrap_or_default()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.why.is_empty() { Ok(()) } else { write!(f, ": {}", self.why) }
    }
}

impl std::error::Error for Failure {}

impl From<anyhow::Error> for Failure {
    /// A [`Failure`] inside keeps its status and help; anything else is a plain failure with its chain of causes.
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(other) => {
                let causes: Vec<_> = other.chain().skip(1).map(ToString::to_string).collect();
                Self::failed(other.to_string(), causes.join(": "))
            }
        }
    }
}

const REPORT_HELP: &str = "this is a bug in dyni: please report this line, with what you ran";

/// Turns the text of a panic into one clear line. The stack is still unwound, so that guards put a stopped target right.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let _ = writeln!(io::stderr().lock(), "{}", panic_line(info));
    }));
}

fn panic_line(info: &PanicHookInfo<'_>) -> String {
    let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
    format!("dyni: internal error: {}{place}\n  help: {REPORT_HELP}", panic_text(info.payload()))
}

/// The message of a caught panic.
pub fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("unknown").lines().next().unwrap_or_default().to_owned()
}

/// The failure that stands for a panic whose line the hook has printed; only its JSON and its status are still needed.
pub fn from_panic(payload: &(dyn Any + Send)) -> Failure {
    Failure::failed("internal error", panic_text(payload)).help(REPORT_HELP)
}

/// Prints the JSON of a failure whose text was already printed.
pub fn print_json_only(failure: &Failure) {
    let _ = writeln!(io::stdout().lock(), "{}", failure.json());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_exit_status() {
        assert_eq!(Failure::failed("a", "b").exit_code(), ExitCode::from(1));
        assert_eq!(Failure::usage("a", "b").exit_code(), ExitCode::from(2));
        assert_eq!(Failure::refused("a", "b").exit_code(), ExitCode::from(3));
    }

    #[test]
    fn says_what_why_and_what_to_do() {
        let failure = Failure::refused("apply to 7", "it is dyni itself").help("give another PID");
        assert_eq!(failure.to_string(), "apply to 7: it is dyni itself");
        assert_eq!(
            failure.json(),
            r#"{"error":{"message":"apply to 7: it is dyni itself","help":"give another PID","status":3}}"#
        );
    }

    #[test]
    fn a_failure_survives_anyhow_and_other_errors_become_one() {
        let refused = Failure::from(anyhow::Error::new(Failure::refused("a", "b")));
        assert_eq!(refused.status(), Status::Refused);
        let other = Failure::from(anyhow::anyhow!("disk full").context("write the archive"));
        assert_eq!(other, Failure::failed("write the archive", "disk full"));
    }

    #[test]
    fn a_panic_is_one_line_without_the_word() {
        let payload: Box<dyn Any + Send> = Box::new("index out of range\nmore".to_owned());
        assert_eq!(panic_text(payload.as_ref()), "index out of range");
        assert_eq!(from_panic(payload.as_ref()).exit_code(), ExitCode::from(1));
    }
}
