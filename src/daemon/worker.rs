//! The work itself: each job is a process of its own that runs this same executable (`dyni optimize …`).
//!
//! Not a thread, for three reasons. What goes wrong in it, a bug or the end of memory, ends it and not the daemon, and dyni
//! may end at any instant by design. The hundreds of megabytes that reading a large program takes are given back at its
//! end, so that the daemon stays small. And it can be ended at any moment by whoever wants an undo now.
//!
//! It says what it does by JSON documents on its stdout: `{"phase": …}` on the way, its report at the end. It does not
//! outlive the daemon, for then nobody would put right what it has left.

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::drift::Watch;
use super::machine::{Job, Outcome, Report, State};
use crate::store::NO_PLAN;

/// No report is longer; what comes beyond is read and dropped.
const MAX_OUTPUT: usize = 16 << 20;
/// There is no archive at all yet.
const NO_ARCHIVE: &str = "there is no archive";

/// A job under way.
pub struct Worker {
    child: Child,
    stdout: Pipe<ChildStdout>,
    stderr: Pipe<ChildStderr>,
    /// How many documents of its output were looked at.
    phases: usize,
    killed: bool,
}

/// What a worker has left.
#[derive(Debug)]
pub struct Ended {
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained about.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub status: ExitStatus,
    killed: bool,
}

/// One end of a pipe that is read without waiting.
struct Pipe<R> {
    from: R,
    bytes: Vec<u8>,
    open: bool,
}

impl Worker {
    /// Begins a job on the program of process `pid`; a watch takes so long.
    ///
    /// # Errors
    /// The process can't be made.
    pub fn job(job: Job, pid: i32, watch: Duration, archive: &Path) -> io::Result<Self> {
        let pid = pid.to_string();
        let mut command = dyni(archive);
        let ms = |time: Duration| format!("{}ms", time.as_millis().max(1));
        match job {
            Job::Reuse => command.args(["apply", "-p", &pid, "--json"]),
            Job::Optimize { window } => {
                command.args(["optimize", "-p", &pid, "--duration", &ms(window), "--phases", "--json"])
            }
            Job::Undo => command.args(["undo", "-p", &pid, "--json"]),
            Job::Watch => command.args(["drift", "-p", &pid, "--duration", &ms(watch), "--json"]),
        };
        Self::start(command)
    }

    /// Begins an undo whose output a user is to see; of all programs if `pid` is `None`.
    ///
    /// # Errors
    /// The process can't be made.
    pub fn undo(pid: Option<i32>, json: bool, archive: &Path) -> io::Result<Self> {
        let mut command = dyni(archive);
        match pid {
            Some(pid) => command.args(["undo", "-p", &pid.to_string()]),
            None => command.args(["undo", "--all"]),
        };
        command.args(json.then_some("--json"));
        Self::start(command)
    }

    fn start(mut command: Command) -> io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: what runs between fork and exec is one system call, which is allowed there.
        unsafe {
            command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
        }
        let mut child = command.spawn()?;
        let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let worker = Self { stdout: Pipe::of(out), stderr: Pipe::of(err), child, phases: 0, killed: false };
        for fd in worker.fds() {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(worker)
    }

    /// What is to be waited for.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.stdout.from.as_fd(), self.stderr.from.as_fd()]
    }

    /// Whether it may still say something.
    pub const fn is_open(&self) -> bool {
        self.stdout.open || self.stderr.open
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        self.killed = true;
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    /// Reads what it has said; the state that it says the program is in, if that is new.
    pub fn read(&mut self) -> Option<State> {
        self.stdout.read();
        self.stderr.read();
        let documents = documents(&self.stdout.bytes);
        let known = std::mem::replace(&mut self.phases, documents.len());
        let phase = documents.get(known..)?.iter().rev().find_map(|d| d.get("phase").cloned())?;
        serde_json::from_value(phase).ok()
    }

    /// What it has left, once it has ended.
    ///
    /// # Errors
    /// Its end can't be learnt.
    pub fn ended(&mut self) -> io::Result<Option<Ended>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        // What it said last may still be in the pipes.
        self.stdout.read();
        self.stderr.read();
        let (stdout, stderr) = (std::mem::take(&mut self.stdout.bytes), std::mem::take(&mut self.stderr.bytes));
        Ok(Some(Ended { stdout, stderr, status, killed: self.killed }))
    }
}

/// A command that runs this executable, even where its file was replaced meanwhile, without the daemon's surroundings.
fn dyni(archive: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--direct").arg("--archive").arg(archive);
    for variable in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "DYNI_SOCKET", "DYNI_CONFIG"] {
        command.env_remove(variable);
    }
    command
}

impl<R: Read> Pipe<R> {
    const fn of(from: R) -> Self {
        Self { from, bytes: Vec::new(), open: true }
    }

    fn read(&mut self) {
        let mut buffer = [0; 16 << 10];
        while self.open {
            match self.from.read(&mut buffer) {
                Ok(0) => self.open = false,
                Ok(n) if self.bytes.len() + n <= MAX_OUTPUT => self.bytes.extend_from_slice(&buffer[..n]),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.open = false,
            }
        }
    }
}

/// The whole JSON documents in an output, in order.
fn documents(bytes: &[u8]) -> Vec<Value> {
    serde_json::Deserializer::from_slice(bytes).into_iter::<Value>().map_while(Result::ok).collect()
}

impl Ended {
    /// What that means for the program.
    pub fn outcome(&self) -> Outcome {
        if self.killed {
            return Outcome::Killed;
        }
        let documents = documents(&self.stdout);
        let last = documents.last();
        match self.status.code() {
            Some(0) => Outcome::Done(last.map(report).unwrap_or_default()),
            Some(code) => {
                let message = last.and_then(|d| d["error"]["message"].as_str()).unwrap_or("it ended without a word");
                match code {
                    _ if message.ends_with(NO_PLAN) || message.contains(NO_ARCHIVE) => Outcome::NoPlan,
                    3 => Outcome::Refused(message.to_owned()),
                    _ => Outcome::Failed(message.to_owned()),
                }
            }
            // By a signal that we have not sent: the end of memory, or somebody else.
            None => Outcome::Killed,
        }
    }
}

/// What a worker's last document says.
fn report(document: &Value) -> Report {
    let processes = document["processes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let sum_of_modules = |process: &Value| -> u64 {
        let modules = process["modules"].as_array().map(Vec::as_slice).unwrap_or_default();
        let refused = modules.iter().filter_map(|m| m["refused"].as_array()).flatten();
        refused.filter_map(|r| r["count"].as_u64()).sum()
    };
    Report {
        partly: document["state"] == "partly dynimized",
        taken_out: document["state"] == "undynimized" && document["gain"].is_object(),
        gain: document["gain"]["ratio"].as_f64(),
        stop_ns: processes.iter().filter_map(|p| p["stop_ns"].as_u64()).max().unwrap_or(0),
        // The processes of a program have the same code.
        refused: processes.first().map_or(0, sum_of_modules),
        watch: serde_json::from_value::<Watch>(document["watch"].clone()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn ended(code: i32, stdout: &str) -> Ended {
        let status = ExitStatus::from_raw(code << 8);
        Ended { stdout: stdout.into(), stderr: Vec::new(), status, killed: false }
    }

    #[test]
    fn the_report_of_an_optimisation_is_understood() {
        let text = r#"{"phase":"profiling"} {"phase":"dynimizing"}
            {"state":"dynimized","gain":{"ratio":1.07,"low":1.05,"high":1.09},"processes":[
              {"stop_ns":5,"modules":[{"refused":[{"reason":"a","count":2},{"reason":"b","count":1}]}]},{"stop_ns":9}]}"#;
        let report = Report { gain: Some(1.07), stop_ns: 9, refused: 3, ..Report::default() };
        assert_eq!(ended(0, text).outcome(), Outcome::Done(report));
        let text = r#"{"state":"undynimized","gain":{"ratio":0.97},"processes":[]}"#;
        let Outcome::Done(report) = ended(0, text).outcome() else { panic!() };
        assert!(report.taken_out && !report.partly);
        // An undo has that state too, and no gain.
        let Outcome::Done(report) = ended(0, r#"{"state":"undynimized","processes":[]}"#).outcome() else { panic!() };
        assert!(!report.taken_out);
    }

    #[test]
    fn failures_refusals_and_no_plan_are_told_apart() {
        let error = |text: &str| format!(r#"{{"error":{{"message":"{text}","help":null,"status":1}}}}"#);
        assert_eq!(ended(1, &error("no samples")).outcome(), Outcome::Failed("no samples".into()));
        assert_eq!(ended(3, &error("traced")).outcome(), Outcome::Refused("traced".into()));
        assert_eq!(ended(1, &error(&format!("find a plan for x: {NO_PLAN}"))).outcome(), Outcome::NoPlan);
        assert_eq!(Ended { killed: true, ..ended(0, "") }.outcome(), Outcome::Killed);
        let by_signal = ExitStatus::from_raw(9);
        assert_eq!(Ended { status: by_signal, ..ended(0, "") }.outcome(), Outcome::Killed);
    }

    #[test]
    fn half_a_document_is_none() {
        assert_eq!(documents(br#"{"phase":"profiling"}{"phase":"dy"#).len(), 1);
        assert_eq!(documents(b"nonsense"), Vec::<Value>::new());
    }
}
