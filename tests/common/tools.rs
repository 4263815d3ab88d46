//! The tools that people look at programs with, run on a process and read: gdb's backtraces, perf's reports.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use procfs::process::MMPermissions;

use super::dyni::{BINARY, Outcome, run};
use super::find_program;
use super::memory::maps;

/// gdb with dyni's script, as a line in ~/.gdbinit would load it.
pub struct Gdb(PathBuf);

/// perf with the kernel's clock, which every machine has.
pub struct Perf(PathBuf);

/// A frame of a backtrace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The address in it; gdb says none of a frame of a function that was inlined.
    pub at: Option<u64>,
    /// What gdb calls the function; `??` if it does not know.
    pub name: String,
}

/// The lines of a report: whose code, which function, how many samples.
#[derive(Clone, Debug)]
pub struct Line {
    /// The file, or what perf calls memory without one.
    pub object: String,
    /// The function's name, or an address in hexadecimal.
    pub symbol: String,
    /// Samples in it.
    pub samples: u64,
}

/// The code caches of a process: executable memory without a file.
pub fn caches(pid: i32) -> Vec<Range<u64>> {
    let is_cache = |m: &&procfs::process::MemoryMap| {
        m.perms.contains(MMPermissions::EXECUTE) && m.inode == 0 && m.address.1 - m.address.0 >= 2 << 20
    };
    maps(pid).iter().filter(is_cache).map(|m| m.address.0..m.address.1).collect()
}

impl Gdb {
    /// Looks for it.
    ///
    /// # Errors
    /// The reason why it can't be used here.
    pub fn find() -> Result<Self, String> {
        let gdb = find_program("gdb").ok_or("gdb is not installed")?;
        let out = run(Command::new(&gdb).args(["-nx", "-batch", "-ex", "python print(6 * 7)"]));
        if out.stdout.trim() == "42" { Ok(Self(gdb)) } else { Err("this gdb has no Python".into()) }
    }

    /// Runs commands after it has loaded dyni's script and then attached.
    pub fn attach(&self, pid: i32, commands: &[&str]) -> Outcome {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("share/gdb/dyni.py");
        let mut gdb = Command::new(&self.0);
        gdb.env("DYNI", BINARY).env_remove("DEBUGINFOD_URLS").args(["-nx", "-batch", "-iex"]);
        gdb.arg(format!("source {}", script.display())).args(["-p", &pid.to_string()]);
        for command in commands {
            gdb.args(["-ex", command]);
        }
        run(&mut gdb)
    }

    /// The backtrace of a process's first thread.
    pub fn backtrace(&self, pid: i32) -> Vec<Frame> {
        let out = self.attach(pid, &["thread 1", "bt"]);
        out.expect_done();
        backtrace(&out)
    }

    /// The backtrace in a core, with a file of symbols.
    pub fn backtrace_of_core(&self, exe: &Path, core: &Path, symbols: &Path) -> Vec<Frame> {
        let add = format!("add-symbol-file {}", symbols.display());
        let mut gdb = Command::new(&self.0);
        gdb.env_remove("DEBUGINFOD_URLS").args(["-nx", "-batch", "-ex", &add, "-ex", "echo begin\\n", "-ex", "bt"]);
        let out = run(gdb.arg(exe).arg(core));
        out.expect_done();
        let from = out.stdout.find("begin").expect("gdb prints what it is told to");
        backtrace(&Outcome { stdout: out.stdout[from..].to_owned(), ..out })
    }
}

/// The last backtrace that gdb printed, innermost frame first.
fn backtrace(out: &Outcome) -> Vec<Frame> {
    let mut frames = Vec::new();
    for line in out.stdout.lines() {
        let Some((number, rest)) = line.strip_prefix('#').and_then(|l| l.split_once(' ')) else { continue };
        if number == "0" {
            frames.clear();
        }
        let rest = rest.trim_start();
        let (at, rest) = match rest.strip_prefix("0x").and_then(|r| r.split_once(" in ")) {
            Some((at, rest)) => (u64::from_str_radix(at, 16).ok(), rest),
            None => (None, rest),
        };
        let name = rest.split(" (").next().unwrap_or_default().to_owned();
        frames.push(Frame { at, name });
    }
    frames
}

/// Whether a backtrace of a process's first thread is one: it ends in `main`, copies have names, and what has none (a
/// function of a stripped library) is at least code.
pub fn is_whole(frames: &[Frame], pid: i32) -> bool {
    let of_file = |m: &procfs::process::MemoryMap| m.perms.contains(MMPermissions::EXECUTE) && m.inode != 0;
    let code: Vec<_> = maps(pid).iter().filter(|m| of_file(m)).map(|m| m.address.0..m.address.1).collect();
    let is_code = |f: &Frame| f.at.is_some_and(|at| code.iter().any(|c| c.contains(&at)));
    frames.iter().any(|f| f.name == "main") && frames.iter().all(|f| f.name != "??" || is_code(f))
}

/// How many of these frames are in the process's caches.
pub fn in_caches(frames: &[Frame], caches: &[Range<u64>]) -> usize {
    frames.iter().filter(|f| f.at.is_some_and(|at| caches.iter().any(|c| c.contains(&at)))).count()
}

impl Perf {
    /// Looks for it and tries it out.
    ///
    /// # Errors
    /// The reason why it can't be used here.
    pub fn find() -> Result<Self, String> {
        let perf = find_program("perf").ok_or("perf is not installed")?;
        let out = run(Command::new(&perf).args(["record", "-q", "-e", "cpu-clock:u", "-o", "/dev/null", "true"]));
        match out.code() {
            Some(0) => Ok(Self(perf)),
            _ => Err(format!("perf can't record here: {}", out.stderr.lines().next().unwrap_or_default())),
        }
    }

    /// Begins to record a process for so many seconds, or, without one, all of the host.
    pub fn begin(&self, pid: Option<i32>, seconds: u32, data: &Path) -> Child {
        let mut perf = Command::new(&self.0);
        perf.args(["record", "-q", "-e", "cpu-clock:u", "-F", "1999", "-o"]).arg(data);
        match pid {
            Some(pid) => perf.args(["-p", &pid.to_string()]),
            None => perf.arg("-a"),
        };
        perf.args(["--", "sleep", &seconds.to_string()]).stdin(Stdio::null());
        perf.spawn().expect("run perf")
    }

    /// Records to the end and reports, on processes of one name where there is one.
    pub fn record(&self, pid: Option<i32>, seconds: u32, data: &Path, name: Option<&str>) -> Vec<Line> {
        let status = self.begin(pid, seconds, data).wait().expect("wait for perf");
        assert!(status.success(), "perf record: {status}");
        self.report(data, name)
    }

    /// What `perf report` says of a recording.
    pub fn report(&self, data: &Path, name: Option<&str>) -> Vec<Line> {
        let mut perf = Command::new(&self.0);
        perf.args(["report", "--stdio", "-n", "-t", "|", "-s", "dso,sym", "-i"]).arg(data);
        if let Some(name) = name {
            perf.args(["--comm", name]);
        }
        let out = run(&mut perf);
        out.expect_done();
        let line = |line: &str| {
            let words: Vec<_> = line.splitn(4, '|').map(str::trim).collect();
            let &[_, samples, object, symbol] = &words[..] else { return None };
            let symbol = symbol.split_once("] ").map_or(symbol, |(_, name)| name);
            Some(Line { object: object.to_owned(), symbol: symbol.to_owned(), samples: samples.parse().ok()? })
        };
        out.stdout.lines().filter(|l| !l.starts_with('#')).filter_map(line).collect()
    }
}

/// Samples in memory without a file, and how many of them have a name.
pub fn in_copies(report: &[Line]) -> (u64, u64) {
    let copies = || report.iter().filter(|l| l.object.starts_with("[JIT]") || l.object.starts_with("[anon"));
    let named = copies().filter(|l| !l.symbol.starts_with("0x") && l.symbol != "[unknown]");
    (copies().map(|l| l.samples).sum(), named.map(|l| l.samples).sum())
}

/// Panics unless the program was met in its copies that often and `perf report` names 95 % of the samples there.
pub fn assert_named(report: &[Line], at_least: u64) {
    let (samples, named) = in_copies(report);
    let all: u64 = report.iter().map(|l| l.samples).sum();
    assert!(samples >= at_least, "the program hardly ran in its copies: {report:#?}");
    assert!(named * 100 >= samples * 95, "{named} of {samples} samples in copies are named: {report:#?}");
    println!("{named} of {samples} samples in copies are named, of {all} in all");
}
