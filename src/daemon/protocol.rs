//! What is said on the control socket: one line of JSON each way, then it is closed.
//!
//! Both sides bound what they read. The daemon believes nothing that a peer says about itself: who it is comes from the
//! kernel (`SO_PEERCRED`).

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use super::machine::State;
use crate::errors::Failure;

/// The longest request, bytes.
pub const MAX_REQUEST: usize = 8 << 10;
/// The longest reply, bytes: a status of thousands of programs.
const MAX_REPLY: u64 = 16 << 20;
/// Nothing that the daemon does before it replies takes longer; an undo waits for its program.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where root's daemon listens.
const SYSTEM: &str = "/run/dyni/control.sock";

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// What is what. Anyone may ask.
    Status {},
    /// End; the programs stay as they are. Root and the daemon's own user only.
    Stop {},
    /// Take it out of a program (a PID or a name), or of all, and leave them alone. Root and the program's owner.
    Undo {
        /// Which; all if null.
        program: Option<String>,
        /// Whether the report is wanted as JSON.
        json: bool,
    },
    /// Do a program anew, or all. Root and the program's owner.
    Redo {
        /// Which; all if null.
        program: Option<String>,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "lowercase")]
pub enum Reply {
    /// To `Status`.
    Status(DaemonStatus),
    /// It is done, or will be: a line for each program.
    Done {
        /// For people.
        lines: Vec<String>,
    },
    /// What a dyni that did it has printed, and its exit status.
    Ran {
        /// Its output.
        stdout: String,
        /// Its complaints.
        stderr: String,
        /// Its exit status.
        status: u8,
    },
    /// That program is none that the daemon follows: whoever asks may do it without it.
    Unknown {},
    /// It is not done.
    Error {
        /// What and why.
        message: String,
        /// What to do about it.
        help: Option<String>,
        /// The exit status: 1 failed, 2 makes no sense, 3 refused.
        status: u8,
    },
}

/// What a daemon says about itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its process.
    pub pid: i32,
    /// Its version.
    pub version: String,
    /// For how long it has been running, ns.
    pub uptime_ns: u64,
    /// How much processor time it has used itself, ns.
    pub cpu_ns: u64,
    /// The configuration; null if there is no file.
    pub config: Option<String>,
    /// Whether programs are optimised anew when their work has changed.
    pub reoptimize: bool,
    /// How many programs are worked on at once.
    pub n_programs: usize,
    /// The programs that may be chosen and run now, by PID.
    pub programs: Vec<ProgramStatus>,
    /// What was read ahead for programs that started; null where the daemon is not told of them.
    #[serde(default)]
    pub read_ahead: Option<ReadAheadStatus>,
}

/// What a daemon says of its reading ahead.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadAheadStatus {
    /// Starts of programs whose working set is known.
    pub starts: u64,
    /// Pages of 4096 bytes that were not in memory and were read.
    pub pages: u64,
    /// Starts that were let go, as too many came at once.
    pub missed: u64,
    /// Programs for which nothing is read any more, as it did not help them.
    pub stopped: Vec<String>,
}

/// What a daemon says about a program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Its first process.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// Its owner.
    pub uid: u32,
    /// How many processes it has.
    pub processes: usize,
    /// What it is.
    pub state: State,
    /// For how long, ns.
    pub for_ns: u64,
    /// Why, where that is not plain; else empty.
    pub reason: String,
    /// How much of one processor it uses, percent; null until that is known.
    pub cpu_percent: Option<f64>,
    /// Work per CPU time, divided by that without; null if it was not measured.
    pub gain: Option<f64>,
    /// The longest stop of its newest change, ns.
    pub stop_ns: u64,
    /// Functions that were left out.
    pub refused: u64,
    /// How far its work has moved from what it was optimised for, 0 to 1; null until that is known.
    pub drift: Option<f64>,
    /// The share of its time in copies; null until that is known.
    pub in_cache: Option<f64>,
}

/// Where the control socket may be, by the command line: of `--socket` or `DYNI_SOCKET`, else the usual place.
#[derive(Clone, Debug)]
pub struct Contact {
    flag: Option<PathBuf>,
}

impl Contact {
    /// The socket at this path, else at the usual place.
    pub fn at(flag: Option<&Path>) -> Self {
        Self { flag: flag.filter(|p| !p.as_os_str().is_empty()).map(Path::to_owned) }
    }

    /// Where a daemon of this user listens.
    ///
    /// # Errors
    /// The environment names no place.
    pub fn own(&self) -> Result<PathBuf, Failure> {
        if let Some(path) = &self.flag {
            return Ok(path.clone());
        }
        if nix::unistd::geteuid().is_root() {
            return Ok(SYSTEM.into());
        }
        let of = |variable: &str| std::env::var_os(variable).map(PathBuf::from).filter(|p| p.is_absolute());
        of("XDG_RUNTIME_DIR")
            .map(|dir| dir.join("dyni/control.sock"))
            .or_else(|| of("HOME").map(|home| home.join(".local/state/dyni/control.sock")))
            .ok_or_else(|| {
                Failure::failed("find a place for the daemon's socket", "neither XDG_RUNTIME_DIR nor HOME is set")
                    .help("name one with --socket")
            })
    }

    /// Whether root's daemon serves this host, where a user's own is asked for at the usual place.
    pub fn roots_runs(&self) -> bool {
        let usual = self.flag.is_none() && !nix::unistd::geteuid().is_root();
        usual && UnixStream::connect(SYSTEM).is_ok()
    }

    /// Asks the daemon that runs; `None` if none does. One of this user comes before root's.
    ///
    /// # Errors
    /// It does not answer, or what it answers makes no sense.
    pub fn ask(&self, request: &Request) -> Result<Option<Reply>, Failure> {
        let own = self.own().ok();
        let system = Some(PathBuf::from(SYSTEM)).filter(|s| self.flag.is_none() && own.as_ref() != Some(s));
        for path in own.into_iter().chain(system) {
            match UnixStream::connect(&path) {
                Ok(stream) => return exchange(stream, request).map(Some).map_err(|e| unanswered(&path, &e)),
                // Nobody listens there.
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
                Err(e) => return Err(unanswered(&path, &e)),
            }
        }
        Ok(None)
    }

    /// What the daemon knows; `None` if none runs.
    ///
    /// # Errors
    /// As [`Contact::ask`].
    pub fn status(&self) -> Result<Option<DaemonStatus>, Failure> {
        match self.ask(&Request::Status {})? {
            Some(Reply::Status(status)) => Ok(Some(status)),
            None => Ok(None),
            Some(other) => Err(other.into_failure()),
        }
    }
}

impl Reply {
    /// A refusal or failure as this command's own; any other reply was not expected.
    pub fn into_failure(self) -> Failure {
        match self {
            Self::Error { message, help, status } => {
                let failure = match status {
                    2 => Failure::usage(message, ""),
                    3 => Failure::refused(message, ""),
                    _ => Failure::failed(message, ""),
                };
                help.into_iter().fold(failure, Failure::help)
            }
            _ => Failure::failed("ask the daemon", "it answered something else").help("is it another version of dyni?"),
        }
    }

    /// What a failure is on the wire.
    pub fn of_failure(failure: &Failure) -> Self {
        Self::Error {
            message: failure.to_string(),
            help: failure.helps().map(str::to_owned),
            status: failure.status() as u8,
        }
    }
}

fn exchange(mut stream: UnixStream, request: &Request) -> std::io::Result<Reply> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = Vec::new();
    BufReader::new(stream.take(MAX_REPLY)).read_until(b'\n', &mut reply)?;
    Ok(serde_json::from_slice(&reply)?)
}

fn unanswered(path: &Path, e: &std::io::Error) -> Failure {
    Failure::failed(format!("ask the daemon at {}", path.display()), e)
        .help("is it another user's, or another version? `--direct` does without it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn requests_are_what_docs_json_says() {
        let text = |r: &Request| serde_json::to_string(r).unwrap();
        assert_eq!(text(&Request::Status {}), r#"{"ask":"status"}"#);
        let undo = Request::Undo { program: Some("nginx".into()), json: true };
        assert_eq!(text(&undo), r#"{"ask":"undo","program":"nginx","json":true}"#);
        for wrong in
            [r#"{"ask":"dance"}"#, r#"{"ask":"stop","now":true}"#, r#"{"ask":"undo","program":7,"json":false}"#]
        {
            assert!(serde_json::from_str::<Request>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn no_daemon_is_no_error_and_nonsense_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let contact = Contact::at(Some(&path));
        assert!(contact.status().unwrap().is_none());
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            for answer in ["", "{\"reply\":\"dance\"}\n", "{\"reply\":\"done\",\"lines\":[]}\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        for _ in 0..3 {
            assert!(contact.status().is_err());
        }
        server.join().unwrap();
        // The file is still there, and nobody listens any more.
        assert!(contact.status().unwrap().is_none());
    }

    #[test]
    fn failures_cross_the_socket_with_help_and_status() {
        let failure = Failure::refused("undo nginx", "it is not yours").help("ask its owner");
        assert_eq!(Reply::of_failure(&failure).into_failure().to_string(), "undo nginx: it is not yours");
        let Reply::Error { help, status, .. } = Reply::of_failure(&failure) else { panic!() };
        assert_eq!((help.as_deref(), status), (Some("ask its owner"), 3));
    }
}
