//! A running victim: started, watched with deadlines, ended at a round's end and asked for its checksum.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything may take before it counts as hanging. The machine may be busy with something else.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A victim started with `--forever`.
pub struct Victim {
    child: Child,
    lines: Receiver<String>,
    stderr: Arc<Mutex<String>>,
    /// The program, or the script that an interpreter runs.
    pub exe: PathBuf,
    /// The name of the module that does the work.
    pub module: String,
    /// Lines printed before `ready`.
    pub preamble: Vec<String>,
}

/// What a victim says at its end: how many rounds it did and what they gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Rounds done.
    pub rounds: u64,
    /// The checksum, as printed.
    pub checksum: String,
}

fn parse_result(line: &str) -> Option<Tally> {
    let mut words = line.split_whitespace();
    let (Some("rounds"), Some(rounds), Some("checksum"), Some(sum)) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return None;
    };
    Some(Tally { rounds: rounds.parse().ok()?, checksum: sum.to_owned() })
}

impl Victim {
    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// The reason why this machine can't run it (exit status 77).
    pub fn start(exe: &Path) -> Result<Self, String> {
        Self::start_with(exe, Command::new(exe).arg("--forever"))
    }

    /// The same with a command of one's own, which must follow the protocol.
    ///
    /// # Errors
    /// As [`Victim::start`].
    pub fn start_with(exe: &Path, command: &mut Command) -> Result<Self, String> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("start {}: {e}", exe.display()));
        let (send, lines) = channel();
        let out = BufReader::new(child.stdout.take().expect("piped"));
        thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| send.send(l)));
        let stderr = Arc::new(Mutex::new(String::new()));
        let (sink, mut err) = (stderr.clone(), child.stderr.take().expect("piped"));
        thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = err.read(&mut buf) {
                sink.lock().expect("no panic here").push_str(&String::from_utf8_lossy(&buf[..n]));
            }
        });
        let module = exe.file_name().and_then(|n| n.to_str()).expect("programs have names").to_owned();
        let mut victim = Self { child, lines, stderr, exe: exe.to_owned(), module, preamble: Vec::new() };
        loop {
            match victim.lines.recv_timeout(PATIENCE) {
                Ok(l) if l == format!("ready {}", victim.pid()) => return Ok(victim),
                Ok(l) => victim.preamble.push(l),
                Err(_) => {
                    let status = victim.child.try_wait().ok().flatten();
                    if status.and_then(|s| s.code()) == Some(77) {
                        return Err(victim.stderr().trim().to_owned());
                    }
                    panic!("{} does not get ready ({status:?}): {}", exe.display(), victim.trouble());
                }
            }
        }
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().expect("no panic here").clone()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("signal the victim");
    }

    /// Panics with everything known unless it is still running.
    pub fn assert_alive(&mut self, when: &str) {
        if let Some(status) = self.child.try_wait().expect("wait") {
            // The reader may be a moment behind.
            thread::sleep(Duration::from_millis(100));
            panic!("{}: the victim has ended {when} ({status}): {}", self.exe.display(), self.stderr());
        }
    }

    /// Waits until it prints this line; others before it are lost.
    pub fn wait_for_line(&mut self, want: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line == want => return,
                Ok(_) => {}
                Err(_) => panic!("{} does not say {want:?}: {}", self.exe.display(), self.trouble()),
            }
        }
    }

    /// Waits for its end, whatever it is.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("wait for the victim")
    }

    /// Whether it does work: its CPU time grows and no thread is stopped.
    pub fn assert_serving(&mut self, when: &str) {
        self.assert_alive(when);
        let (deadline, before) = (Instant::now() + PATIENCE, cpu_ticks(self.pid()));
        while cpu_ticks(self.pid()) == before {
            self.assert_alive(when);
            assert!(Instant::now() < deadline, "the victim stands still {when}: {}", self.trouble());
            thread::sleep(Duration::from_millis(5));
        }
        let stopped = stopped_threads(self.pid());
        assert!(stopped.is_empty(), "threads {stopped:?} are stopped {when}: {}", self.trouble());
    }

    /// Ends it at a round's end and returns what it says.
    pub fn finish(mut self) -> Tally {
        self.assert_alive("before SIGTERM");
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        let mut found = None;
        while found.is_none() {
            let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                let status = self.child.try_wait().ok().flatten();
                panic!("{}: no checksum after SIGTERM ({status:?}): {}", self.exe.display(), self.trouble());
            };
            found = parse_result(&line);
        }
        let status = self.wait();
        assert!(status.success(), "{}: {status}: {}", self.exe.display(), self.stderr());
        found.expect("the loop ends with one")
    }

    /// What somebody who looks for the cause of a hang wants to see.
    fn trouble(&self) -> String {
        let pid = self.pid();
        let mut text = self.stderr();
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let read = |f: &str| fs::read_to_string(task.path().join(f)).unwrap_or_default();
            let state = read("status")
                .lines()
                .filter(|l| l.starts_with("State") || l.starts_with("Tracer"))
                .collect::<Vec<_>>()
                .join(" ");
            text += &format!(
                "\n  thread {:?}: {state} wchan {} syscall {}",
                task.file_name(),
                read("wchan"),
                read("syscall").trim()
            );
        }
        text
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // A failed test must not leave it running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The checksum that so many rounds must give: computed by the same program, untouched.
pub fn verify(exe: &Path, rounds: u64) -> Tally {
    let out = Command::new(exe).arg("--verify").arg(rounds.to_string()).stdin(Stdio::null()).output().expect("verify");
    let text = String::from_utf8_lossy(&out.stdout);
    text.lines().find_map(parse_result).unwrap_or_else(|| panic!("{}: {text}: {:?}", exe.display(), out))
}

/// User and system time of a process and its reaped children, in ticks.
pub fn cpu_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or_default();
    after.split_whitespace().skip(11).take(4).filter_map(|w| w.parse::<u64>().ok()).sum()
}

/// Threads in state `T` or `t`.
pub fn stopped_threads(pid: i32) -> Vec<String> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        if matches!(stat.rsplit(')').next().unwrap_or_default().split_whitespace().next(), Some("T" | "t")) {
            found.push(task.file_name().to_string_lossy().into_owned());
        }
    }
    found
}

/// Every live descendant.
pub fn descendants(pid: i32) -> Vec<i32> {
    let (mut found, mut todo) = (Vec::new(), vec![pid]);
    while let Some(p) = todo.pop() {
        for task in fs::read_dir(format!("/proc/{p}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let children: Vec<i32> = children.split_whitespace().filter_map(|w| w.parse().ok()).collect();
            found.extend(&children);
            todo.extend(children);
        }
    }
    found
}
