//! A daemon under test: its place, its commands, what it says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::common::dyni::{BINARY, Outcome, run};
use crate::service;

/// Longer than a profile, a plan and its check take on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A place for a daemon: socket, archive, configuration and log in a folder of its own.
pub struct Place {
    /// Where all of it lies.
    pub folder: TempDir,
}

/// A daemon in the foreground, ended when dropped.
pub struct Daemon(pub Child);

impl Place {
    /// A folder that any user can look into.
    pub fn new() -> Self {
        Self { folder: service::folder("daemon") }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn configure(&self, text: &str) {
        fs::write(self.file("dyni.conf"), text).expect("write the configuration");
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(BINARY);
        c.args(args);
        // With `=`, as Dynimize's own lines need it.
        for (option, file) in [("socket", "control.sock"), ("archive", "archive.db"), ("config", "dyni.conf")] {
            c.arg(format!("--{option}={}", self.file(file).display()));
        }
        for variable in ["DYNI_ARCHIVE", "DYNI_SOCKET", "DYNI_CONFIG", "DYNI_FAILPOINT", "NOTIFY_SOCKET"] {
            c.env_remove(variable);
        }
        c
    }

    pub fn run(&self, args: &[&str]) -> Outcome {
        run(&mut self.command(args))
    }

    /// The daemon with short times; its log is the file `log`.
    pub fn daemon_command(&self) -> Command {
        let mut c = self.command(&["daemon", "--cpu-window", "500ms", "--watch-every", "1s"]);
        c.arg("--log").arg(self.file("log"));
        c
    }

    pub fn daemon(&self) -> Daemon {
        self.daemon_with(&mut self.daemon_command())
    }

    pub fn daemon_with(&self, command: &mut Command) -> Daemon {
        let mut daemon = Daemon(command.stdin(Stdio::null()).spawn().expect("start the daemon"));
        let pid = daemon.pid();
        self.until("the daemon answers", || {
            let ended = daemon.0.try_wait().expect("wait");
            assert!(ended.is_none(), "the daemon has ended: {ended:?}");
            self.status()["daemon"]["pid"] == pid
        });
        daemon
    }

    pub fn status(&self) -> Value {
        let out = self.run(&["status", "--json"]);
        out.expect_done();
        out.json()
    }

    /// What the daemon says of the program of this process.
    pub fn program(&self, pid: i32) -> Value {
        let status = self.status();
        let programs = status["daemon"]["programs"].as_array().cloned().unwrap_or_default();
        programs.into_iter().find(|p| p["pid"] == pid).unwrap_or(Value::Null)
    }

    pub fn state(&self, pid: i32) -> String {
        self.program(pid)["state"].as_str().unwrap_or("unknown").to_owned()
    }

    /// The state without a daemon: what the ledgers say.
    pub fn ledger(&self, pid: i32) -> String {
        let out = run(Command::new(BINARY).args(["status", "--direct", "--json", "-p", &pid.to_string()]));
        out.expect_done();
        out.json()["processes"][0]["state"].as_str().unwrap_or_default().to_owned()
    }

    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "never: {what}\n{}\n{}", self.status(), self.log());
            thread::sleep(Duration::from_millis(30));
        }
    }

    /// Waits for one of these states; which one came.
    pub fn until_state(&self, pid: i32, states: &[&str]) -> String {
        let mut now = String::new();
        self.until(&format!("{pid} is one of {states:?}"), || {
            now = self.state(pid);
            states.contains(&now.as_str())
        });
        now
    }

    /// Waits until the daemon has decided on a program: whether it stays dynimized. It does not where it did not pay, and
    /// that is the machine's to say; any other reason is a failure.
    pub fn until_decided(&self, pid: i32) -> bool {
        if self.until_state(pid, &["dynimized", "undynimized"]) == "dynimized" {
            return true;
        }
        let reason = self.program(pid)["reason"].as_str().unwrap_or_default().to_owned();
        assert!(reason.contains("did not pay"), "{reason}\n{}", self.log());
        false
    }

    /// Waits until a program is dynimized that is known to pay. That it does not may be measured on a busy machine: then
    /// it is done anew.
    pub fn until_dynimized(&self, pid: i32) {
        for _ in 0..6 {
            if self.until_decided(pid) {
                return;
            }
            self.run(&["redo", "-p", &pid.to_string()]).expect_done();
            self.until_state(pid, &["profiling", "dynimizing", "dynimized"]);
        }
        panic!("it never paid\n{}", self.log());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    /// Whether these words appear in the log in this order.
    pub fn assert_logged(&self, words: &[&str]) {
        let log = self.log();
        let mut rest = log.as_str();
        for word in words {
            let at = rest.find(word).unwrap_or_else(|| panic!("`{word}` of {words:?} is not in:\n{log}"));
            rest = &rest[at + word.len()..];
        }
    }
}

impl Daemon {
    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("signal the daemon");
    }

    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        assert!(self.0.wait().expect("wait").success(), "the daemon did not end well");
    }

    /// As by the end of memory: without a chance to do anything.
    pub fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.0.wait().expect("wait");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A failed test must not leave it running.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A copy of a program under a name that nobody else runs; and that name.
pub fn copy(program: &Path, to: &Path, tag: &str) -> (PathBuf, String) {
    let name = format!("dt{}-{tag}", std::process::id());
    let copy = to.join(&name);
    copy_to(program, &copy);
    (copy, name)
}

/// Copies a program by a process of its own: what this one has open for writing, a child of another test would inherit for a
/// moment, and a file that is open for writing can't be run.
pub fn copy_to(program: &Path, to: &Path) {
    let done = Command::new("cp").arg(program).arg(to).status().expect("run cp");
    assert!(done.success(), "copy {}: {done}", program.display());
}
