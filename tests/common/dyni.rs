//! Runs the `dyni` command with an archive of its own and reads what it says.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything that dyni does to a test's target.
const DEADLINE: Duration = Duration::from_secs(120);

/// The command under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_dyni");

/// dyni with an archive in a temporary folder.
pub struct Dyni {
    folder: TempDir,
    archive: PathBuf,
}

/// How one run of dyni ended.
#[derive(Debug)]
pub struct Outcome {
    /// What was run.
    pub line: String,
    /// The exit status.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Default for Dyni {
    fn default() -> Self {
        let folder = TempDir::with_prefix("dyni-test-").expect("create a temporary folder");
        let archive = folder.path().join("archive.db");
        Self { folder, archive }
    }
}

impl Dyni {
    /// With a fresh archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// The temporary folder, for a test's own files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The archive.
    pub fn archive(&self) -> &Path {
        &self.archive
    }

    /// The command with the archive set and nothing else of the environment that would change what it does.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(BINARY);
        c.args(args).arg("--archive").arg(&self.archive);
        c.env_remove("DYNI_ARCHIVE").env_remove("DYNI_FAILPOINT");
        c
    }

    /// Runs it.
    pub fn run(&self, args: &[&str]) -> Outcome {
        run(&mut self.command(args))
    }

    /// Runs it with a failpoint set.
    pub fn run_failing(&self, failpoint: &str, args: &[&str]) -> Outcome {
        run(self.command(args).env("DYNI_FAILPOINT", failpoint))
    }

    /// Records and analyzes a process, so that there is a plan for it; the recording's report. On a crowded machine one
    /// recording may see too little for a plan.
    pub fn make_plan(&self, pid: i32, duration: &str) -> Value {
        for attempt in 1.. {
            let recorded = self.record(pid, duration);
            self.run(&["analyze"]).expect_done();
            let would = self.run(&["apply", "-p", &pid.to_string(), "--dry-run"]);
            if attempt == 5 || !would.stderr.contains("the archive has none") {
                return recorded;
            }
        }
        unreachable!("the loop ends by itself")
    }

    /// `dyni apply --json`
    pub fn apply(&self, pid: i32) -> Outcome {
        self.run(&["apply", "-p", &pid.to_string(), "--json"])
    }

    /// `dyni undo --json`
    pub fn undo(&self, pid: i32) -> Outcome {
        self.run(&["undo", "-p", &pid.to_string(), "--json"])
    }

    /// The state that `dyni status` gives for a process; a process that it doesn't list is undynimized.
    pub fn state(&self, pid: i32) -> String {
        let out = self.run(&["status", "-p", &pid.to_string(), "--json"]);
        out.expect_done();
        let json = out.json();
        let processes = json["processes"].as_array().cloned().unwrap_or_default();
        let of = |p: &Value| p["pid"].as_i64() == Some(pid.into());
        let found = processes.iter().find(|p| of(p)).and_then(|p| p["state"].as_str());
        found.unwrap_or("undynimized").to_owned()
    }

    /// Records the process until a time in which it was sampled; the report.
    pub fn record(&self, pid: i32, duration: &str) -> Value {
        let record = || self.run(&["record", "-p", &pid.to_string(), "--duration", duration, "--json"]);
        let found = (0..10).map(|_| record()).find(|out| !out.starved());
        let out = found.unwrap_or_else(|| panic!("process {pid} was never sampled"));
        out.expect_done();
        out.json()
    }

    /// The names of the places at which dyni can be made to fail.
    pub fn failpoints(&self) -> Vec<String> {
        let out = run(Command::new(BINARY).arg("--list-failpoints"));
        if out.code() != Some(0) {
            return Vec::new();
        }
        out.stdout.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect()
    }
}

/// Runs a command to its end and gives up when it takes too long.
pub fn run(command: &mut Command) -> Outcome {
    let line = format!("{command:?}");
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("run {line}: {e}"));
    let read = |mut from: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What came before an error is still worth reading.
            let _ = from.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(Box::new(child.stdout.take().expect("piped")));
    let err = read(Box::new(child.stderr.take().expect("piped")));
    let status = loop {
        match child.try_wait().expect("wait") {
            Some(status) => break status,
            None if began.elapsed() > DEADLINE => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{line} did not end in {DEADLINE:?}: {}", err.join().unwrap_or_default());
            }
            None => thread::sleep(Duration::from_micros(500)),
        }
    };
    let took = began.elapsed();
    let (stdout, stderr) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    let outcome = Outcome { line, status, stdout, stderr, took };
    let bug = outcome.stderr.contains("internal error") || outcome.stderr.contains("panicked");
    assert!(!bug, "dyni has found a bug in itself: {outcome:#?}");
    outcome
}

impl Outcome {
    /// The exit status, if it ended by itself.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Whether somebody killed it.
    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(9)
    }

    /// Whether it recorded a program that did not get the processor once in that time, as on a crowded machine.
    pub fn starved(&self) -> bool {
        self.stderr.contains("no samples")
    }

    /// Panics unless it did what it was asked.
    pub fn expect_done(&self) {
        self.expect(&[0]);
    }

    /// Panics unless it ended with one of these.
    pub fn expect(&self, codes: &[i32]) {
        assert!(self.code().is_some_and(|c| codes.contains(&c)), "wanted exit status {codes:?}: {self:#?}");
    }

    /// Panics unless it ended so, with one line that says what and why and one that says what to do.
    pub fn expect_clear_error(&self, codes: &[i32], words: &[&str]) {
        self.expect(codes);
        // Before it may stand what was being done.
        let notes = |l: &&str| l.trim().is_empty() || !l.starts_with("dyni: ");
        let lines: Vec<_> = self.stderr.lines().skip_while(notes).filter(|l| !l.trim().is_empty()).collect();
        assert!(!lines.is_empty(), "no error line: {self:#?}");
        let helped = lines.len() == 2 && lines[1].trim_start().starts_with("help: ");
        assert!(lines.len() == 1 || helped, "more than one line of error: {self:#?}");
        let text = self.stderr.to_lowercase();
        let said = words.is_empty() || words.iter().any(|w| text.contains(&w.to_lowercase()));
        assert!(said, "the error names none of {words:?}: {self:#?}");
    }

    /// What it printed with `--json`.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}): {self:#?}"))
    }

    fn modules(&self) -> Vec<Value> {
        let json = self.json();
        let processes = json["processes"].as_array().cloned().unwrap_or_default();
        processes.iter().flat_map(|p| p["modules"].as_array().cloned().unwrap_or_default()).collect()
    }

    /// Functions patched, in all modules of all processes, or in the module of one name.
    pub fn functions(&self, module: Option<&str>) -> u64 {
        let name = |m: &Value| m["name"].as_str().map(|n| n.trim_end_matches(" (deleted)").to_owned());
        let named = |m: &&Value| module.is_none_or(|want| name(m).is_some_and(|n| n.ends_with(want)));
        self.modules().iter().filter(named).filter_map(|m| m["functions"].as_u64()).sum()
    }

    /// The longest stop of any process, in ns.
    pub fn stop_ns(&self) -> u64 {
        let json = self.json();
        let processes = json["processes"].as_array().cloned().unwrap_or_default();
        processes.iter().filter_map(|p| p["stop_ns"].as_u64()).max().unwrap_or(0)
    }

    /// Reasons for which functions were refused, with how many.
    pub fn refused(&self) -> String {
        let all = self.modules();
        let each = all.iter().flat_map(|m| m["refused"].as_array().cloned().unwrap_or_default());
        each.map(|r| format!("{} {}", r["count"], r["reason"].as_str().unwrap_or("?"))).collect::<Vec<_>>().join(", ")
    }
}
