//! `dyni exec`: a program that is started through it can't tell, and nobody else either; and what is stored is used.
//!
//! What a program sees at its start is shown by a victim; each test runs it with and without dyni and compares.

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::build::{self, variant};
use common::dyni::{BINARY, Dyni};
use common::memory::Text;
use common::process::{PATIENCE, Victim, descendants, verify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How dyni is to start something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The archive knows nothing.
    Unknown,
    /// There is a plan: a helper traces the program at its start.
    Planned,
    /// It is recorded to its end.
    Learning,
}

const WAYS: [Way; 3] = [Way::Unknown, Way::Planned, Way::Learning];

impl Way {
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Unknown => &[],
            Self::Planned => &["--wait", "20s"],
            Self::Learning => &["--learn"],
        }
    }
}

/// `dyni exec … -- command`
fn through(d: &Dyni, options: &[&str], command: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(BINARY);
    c.env("DYNI_ARCHIVE", d.archive()).arg("exec").args(options).arg("--").arg(command).args(args);
    c
}

/// The same command without dyni, in the same environment.
fn plain(d: &Dyni, command: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(command);
    c.env("DYNI_ARCHIVE", d.archive()).args(args);
    c
}

/// A victim, and an archive with a plan for it.
fn with_plan(name: &str) -> Result<(Dyni, PathBuf), String> {
    let exe = build::victim(name, &variant::gcc_o2)?;
    let victim = Victim::start(&exe)?;
    let d = Dyni::new();
    d.make_plan(victim.pid(), "500ms");
    victim.signal(Signal::SIGKILL);
    Ok((d, exe))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What the victim `shows` printed, which must be the same for both.
/// A program that is being learned may ask whether it is traced, and is.
fn assert_same(one: &Output, other: &Output, way: &str) {
    let lines = |out: &Output| -> Vec<String> {
        let shown = text(&out.stdout);
        let counts = |l: &&str| !way.contains("learn") || !l.starts_with("TracerPid");
        shown.lines().filter(counts).map(str::to_owned).collect()
    };
    let (one_lines, other_lines) = (lines(one), lines(other));
    let differ = one_lines.iter().zip(&other_lines).find(|(a, b)| a != b);
    assert!(differ.is_none() && one_lines.len() == other_lines.len(), "{way}: {differ:?}");
    assert_eq!(text(&one.stderr), text(&other.stderr), "{way}");
    assert_eq!(one.status, other.status, "{way}");
}

fn shows() -> Result<PathBuf, String> {
    build::victim("shows", &variant::gcc_o2)
}

/// A program sees the same environment, arguments, descriptors, signals, limits and IDs, and its end is seen the same.
#[test]
fn a_program_sees_what_it_would_see() {
    let exe = match shows() {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let d = Dyni::new();
    let lines: [&[&str]; 4] =
        [&["a b", "", "--", "-v", "\u{e9}"], &["--exit", "37"], &["--die", "15"], &["--die", "6"]];
    for args in lines {
        let before = plain(&d, &exe, args).output().expect("run");
        for options in [&[][..], &["--learn"], &["--early"]] {
            let after = through(&d, options, &exe, args).output().expect("run");
            assert_same(&before, &after, &format!("{options:?} {args:?}"));
        }
    }
}

/// What Rust's start-up code changes is put back: SIGPIPE, and descriptors that are closed.
#[test]
fn odd_beginnings_are_passed_on() {
    let exe = match shows() {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let d = Dyni::new();
    let odd = |mut command: Command, ignored: bool, closed: bool, blocked: bool| {
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(move || {
                libc::signal(libc::SIGPIPE, if ignored { libc::SIG_IGN } else { libc::SIG_DFL });
                libc::signal(libc::SIGCHLD, if ignored { libc::SIG_IGN } else { libc::SIG_DFL });
                if closed {
                    libc::close(0);
                }
                if blocked {
                    let mut set = std::mem::zeroed();
                    libc::sigemptyset(&raw mut set);
                    libc::sigaddset(&raw mut set, libc::SIGCHLD);
                    libc::sigaddset(&raw mut set, libc::SIGUSR1);
                    libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
                }
                Ok(())
            })
        };
        command.output().expect("run")
    };
    for n in 0..8 {
        let flags = (n & 1 != 0, n & 2 != 0, n & 4 != 0);
        let before = odd(plain(&d, &exe, &[]), flags.0, flags.1, flags.2);
        for options in [&[][..], &["--learn"]] {
            let after = odd(through(&d, options, &exe, &[]), flags.0, flags.1, flags.2);
            assert_same(&before, &after, &format!("{options:?} {flags:?}"));
        }
    }
}

/// The process that the user has started becomes the program, has no children, and stdin and stdout are its own.
#[test]
fn the_process_becomes_the_program() {
    let (d, exe) = match with_plan("recursion") {
        Ok(found) => found,
        Err(reason) => skip!("{reason}"),
    };
    for way in WAYS {
        let d = if way == Way::Unknown { &Dyni::new() } else { &d };
        // `start_with` waits for the victim to say that it is ready under the PID of the process that was started.
        let mut command = through(d, way.options(), &exe, &["--forever"]);
        let victim = Victim::start_with(&exe, &mut command).expect("the machine runs it");
        assert_eq!(descendants(victim.pid()), [] as [i32; 0], "{way:?}");
        let tally = victim.finish();
        assert_eq!(tally, verify(&exe, tally.rounds), "{way:?}");
    }
    let mut cat = through(&d, &["--learn"], Path::new("cat"), &[]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("run");
    std::io::Write::write_all(&mut cat.stdin.take().expect("piped"), b"through and through").expect("write");
    let mut read = String::new();
    cat.stdout.take().expect("piped").read_to_string(&mut read).expect("read");
    assert_eq!(read, "through and through");
    assert!(cat.wait().expect("wait").success());
}

/// A reader of the program's output sees its end when the program ends, though the helper may still be at work.
#[test]
fn nobody_waits_for_the_helper() {
    let d = Dyni::new();
    // It is learned until its end, or for an hour; and what it leaves behind runs on.
    let mut command =
        through(&d, &["--learn", "--duration", "1h"], Path::new("sh"), &["-c", "echo done; sleep 3 >&- 2>&- & "]);
    let out = command.output().expect("run");
    assert_eq!(text(&out.stdout), "done\n");
    assert!(out.status.success());
}

/// With a terminal: it is the controlling one, and the program is its foreground job.
#[test]
fn the_terminal_is_the_programs() {
    let Some(script) = common::find_program("script") else { skip!("script is not installed") };
    let d = Dyni::new();
    let inner = "tty; ps -o stat= -p $$ | tr -d 'R ' ; stty size; exit 5";
    let line = |prefix: &str| {
        let whole = format!("{prefix} sh -c '{}'", inner.replace('\'', "'\\''"));
        let mut c = Command::new(&script);
        c.args(["-qec", &whole, "/dev/null"]).env("DYNI_ARCHIVE", d.archive()).stdin(Stdio::null());
        let out = c.output().expect("run script");
        // Each run has a terminal of its own number.
        let lines: Vec<String> = text(&out.stdout).lines().skip(1).map(str::to_owned).collect();
        assert!(text(&out.stdout).starts_with("/dev/pts/"), "{out:?}");
        (lines, out.status.code())
    };
    let before = line("exec");
    assert_eq!(before.1, Some(5), "{before:?}");
    for options in ["", "--learn"] {
        assert_eq!(line(&format!("exec {BINARY} exec {options} --")), before, "{options}");
    }
}

/// A stop and a continuation of the job reach the program, also while the helper traces it.
#[test]
fn a_job_that_is_stopped_stays_stopped() {
    let d = Dyni::new();
    let mut child = through(&d, &["--learn"], Path::new("sleep"), &["600"]).spawn().expect("run");
    let pid = child.id() as i32;
    let state = |wanted: &str| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let now = stat.rsplit(')').next().unwrap_or_default().trim().chars().next();
            if comm.trim() == "sleep" && now.is_some_and(|c| wanted.contains(c)) {
                return;
            }
            assert!(Instant::now() < deadline, "{comm} is {now:?}, not {wanted}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    state("S");
    for _ in 0..3 {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("our child");
        state("Tt");
        thread::sleep(Duration::from_millis(50));
        state("Tt");
        kill(Pid::from_raw(pid), Signal::SIGCONT).expect("our child");
        state("S");
    }
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("our child");
    assert_eq!(child.wait().expect("wait").signal(), Some(15));
}

/// Commands that can't be run end as they do with `env`.
#[test]
fn what_is_not_there_is_127_and_what_is_no_program_126() {
    let d = Dyni::new();
    let file = d.folder().join("file");
    fs::write(&file, "no program").expect("write");
    for (command, code) in [("no-program-has-this-name", 127), ("/nonexistent/x", 127), (file.to_str().unwrap(), 126)] {
        let out = through(&d, &[], Path::new(command), &[]).output().expect("run");
        assert_eq!(out.status.code(), Some(code), "{command}");
        assert_eq!(text(&out.stdout), "");
        assert!(text(&out.stderr).starts_with(&format!("dyni: run {command}: ")), "{out:?}");
    }
}

/// Scripts run in their interpreters, with or without its line; what has rights of its own or no loader is left alone.
#[test]
fn scripts_and_what_is_left_alone() {
    let d = Dyni::new();
    let write = |name: &str, what: &str, mode: u32| {
        let path = d.folder().join(name);
        fs::write(&path, what).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        path
    };
    let script = write("script", "#!/bin/sh -u\necho \"$0 $1\"; exit 3\n", 0o755);
    let bare = write("bare", "echo \"$1\"; exit 4\n", 0o755);
    for options in [&[][..], &["--learn"]] {
        let out = through(&d, options, &script, &["x y"]).output().expect("run");
        assert_eq!((text(&out.stdout), out.status.code()), (format!("{} x y\n", script.display()), Some(3)));
        let out = through(&d, options, &bare, &["x y"]).output().expect("run");
        assert_eq!((text(&out.stdout), out.status.code()), ("x y\n".to_owned(), Some(4)));
    }
    let setuid = d.folder().join("setuid");
    fs::copy("/bin/echo", &setuid).expect("copy");
    fs::set_permissions(&setuid, fs::Permissions::from_mode(0o4755)).expect("chmod");
    let out = through(&d, &["-v", "--learn"], &setuid, &["hi"]).output().expect("run");
    assert_eq!(text(&out.stdout), "hi\n");
    assert!(text(&out.stderr).contains("rights of its own"), "{out:?}");
    if let Ok(fixed) = build::victim("recursion", &variant::gcc_static) {
        let out = through(&d, &["-v", "--learn"], &fixed, &["--rounds", "3"]).output().expect("run");
        assert!(text(&out.stdout).contains("rounds 3 checksum"), "{out:?}");
        assert!(text(&out.stderr).contains("statically linked"), "{out:?}");
    }
}

/// The plan is in force at the program's first instruction, what it computes is right, and undo puts everything back.
#[test]
fn a_stored_plan_is_in_force_at_the_start() {
    // The last one throws, and its plan is for a library alone.
    for name in ["recursion", "indirect", "switches", "exceptions"] {
        let (d, exe) = match with_plan(name) {
            Ok(found) => found,
            Err(reason) => skip!("{reason}"),
        };
        let mut command = through(&d, &["--wait", "20s"], &exe, &["--forever"]);
        let mut victim = Victim::start_with(&exe, &mut command).expect("the machine runs it");
        // The program has said that it is ready: so it is past its first instruction.
        assert_eq!(d.state(victim.pid()), "dynimized", "{name}");
        victim.assert_serving("with its plan");
        let pristine = Text::new(victim.pid());
        d.undo(victim.pid()).expect_done();
        pristine.assert_pristine(victim.pid(), "after undo");
        let tally = victim.finish();
        assert_eq!(tally, verify(&exe, tally.rounds), "{name}");
    }
}

/// A plan that takes longer than the program waits is applied while it runs.
#[test]
fn a_slow_plan_comes_later() {
    let (d, exe) = match with_plan("indirect") {
        Ok(found) => found,
        Err(reason) => skip!("{reason}"),
    };
    let mut command = through(&d, &["--wait", "1ms"], &exe, &["--forever"]);
    let victim = Victim::start_with(&exe, &mut command).expect("the machine runs it");
    let deadline = Instant::now() + PATIENCE;
    // While the helper is at work on it, `status` says that it is traced.
    let state = || d.run(&["status", "-p", &victim.pid().to_string()]).stdout;
    while !state().contains(", dynimized\n") {
        assert!(Instant::now() < deadline, "it never got its plan");
        thread::sleep(Duration::from_millis(20));
    }
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// Killed at every step of an apply, the helper leaves a program that runs and computes the right thing.
#[test]
fn the_helper_may_die_at_any_step() {
    let (d, exe) = match with_plan("indirect") {
        Ok(found) => found,
        Err(reason) => skip!("{reason}"),
    };
    let mut killed = 0;
    for failpoint in d.failpoints().iter().filter(|f| !f.starts_with("undo:") && !f.starts_with("swap:")) {
        // A second is what the program then loses, once.
        let mut command = through(&d, &["--wait", "1s"], &exe, &["--rounds", "40"]);
        let out = command.env("DYNI_FAILPOINT", failpoint).output().expect("run");
        assert!(out.status.success(), "{failpoint}: {out:?}");
        let said = text(&out.stdout);
        assert!(said.contains(&verify(&exe, 40).checksum), "{failpoint}: {said}");
        killed += 1;
    }
    assert!(killed > 20, "only {killed} steps");
}

fn working_set(d: &Dyni, program: &str) -> Option<Value> {
    let out = d.run(&["archive", "ls", "--program", program, "--json"]);
    out.expect_done();
    let entries = out.json()["entries"].as_array().cloned().unwrap_or_default();
    let id = entries.iter().find(|e| e["kind"] == "working set")?["id"].as_str()?.to_owned();
    let out = d.run(&["archive", "show", &id, "--json"]);
    out.expect_done();
    Some(out.json())
}

/// The working set of a program once it has been recorded so often.
fn await_recordings(d: &Dyni, program: &str, recordings: u64) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(set) = working_set(d, program).filter(|s| s["recordings"].as_u64() >= Some(recordings)) {
            return set;
        }
        assert!(Instant::now() < deadline, "nothing of {program} is learned");
        thread::sleep(Duration::from_millis(20));
    }
}

fn file_of<'a>(set: &'a Value, path: &Path) -> Option<&'a Value> {
    set["files"].as_array()?.iter().find(|f| f["path"].as_str() == path.to_str())
}

/// A file of so many pages, and the victim that touches some of them.
fn pages_victim(d: &Dyni, pages: usize) -> Result<(PathBuf, PathBuf), String> {
    let exe = build::victim("pages", &variant::gcc_o2)?;
    let data = d.folder().join("data");
    fs::write(&data, vec![1; pages * 4096]).expect("write");
    Ok((exe, data))
}

/// What a working set says was touched is what was touched, as exactly as it says.
#[test]
fn a_working_set_has_the_pages_that_were_touched_and_no_others() {
    let d = Dyni::new();
    let (exe, data) = match pages_victim(&d, 4096) {
        Ok(found) => found,
        Err(reason) => skip!("{reason}"),
    };
    let touched = [3000, 40, 1000];
    let mut args = vec![data.to_str().unwrap().to_owned(), "0".to_owned()];
    args.extend(touched.iter().map(ToString::to_string));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // The program ends at once: what was touched is seen at its end.
    assert!(through(&d, &["--learn"], &exe, &args).status().expect("run").success());
    let set = await_recordings(&d, "pages-gcc-O2", 1);
    let granule = set["granule_pages"].as_u64().expect("a number");
    let file = file_of(&set, &data).unwrap_or_else(|| panic!("the file is not there: {set:#}"));
    assert_eq!(file["file_bytes"], 4096 * 4096);
    let pages = file["pages"].as_u64().expect("a number");
    assert!((3..=3 * granule).contains(&pages), "{pages} pages, granule {granule}");
    // 48 parts of 85.3 pages: those of the three pages are marked, parts that are far from them are not.
    let strip: Vec<char> = file["strip"].as_str().expect("a strip").chars().collect();
    for page in touched {
        assert_ne!(strip[page * strip.len() / 4096], '·', "page {page}: {strip:?}");
    }
    let cells = (granule as usize * strip.len()).div_ceil(4096) + 2;
    assert!(strip.iter().filter(|&&c| c == '·').count() >= strip.len() - 3 * cells, "{strip:?}");
    assert!(file_of(&set, &exe).is_some_and(|f| f["pages"].as_u64() > Some(0)), "{set:#}");
    // The same from outside, while it runs.
    let mut running = Command::new(&exe).arg(&data).args(["600", "2000"]).stdout(Stdio::null()).spawn().expect("run");
    thread::sleep(Duration::from_millis(200));
    let pid = running.id().to_string();
    let out = d.run(&["record", "--working-set", "-p", &pid, "--duration", "300ms", "--json"]);
    running.kill().expect("our child");
    running.wait().expect("our child");
    out.expect_done();
    assert_eq!(out.json()["recordings"], 2);
    let strip: Vec<char> =
        file_of(&out.json(), &data).expect("still there")["strip"].as_str().unwrap().chars().collect();
    assert_ne!(strip[2000 * strip.len() / 4096], '·');
}

/// What the next start finds is not what was learned: nothing is read of it, and the program is right.
#[test]
fn files_that_have_changed_are_not_read_ahead() {
    let d = Dyni::new();
    let (exe, data) = match pages_victim(&d, 512) {
        Ok(found) => found,
        Err(reason) => skip!("{reason}"),
    };
    let path = data.to_str().unwrap().to_owned();
    let run = |options: &[&str], page: &str| through(&d, options, &exe, &[&path, "0", page]).output().expect("run");
    assert_eq!(text(&run(&["--learn"], "500").stdout), "sum 1\n");
    let set = await_recordings(&d, "pages-gcc-O2", 1);
    assert!(file_of(&set, &data).is_some());
    // Shorter than what was learned: who reads behind the end of a mapped file is killed, so nobody may.
    fs::write(&data, vec![2; 4 * 4096]).expect("write");
    for options in [&["-v", "--early"][..], &["-v"]] {
        let out = run(options, "3");
        assert_eq!((text(&out.stdout), out.status.code()), ("sum 2\n".to_owned(), Some(0)), "{out:?}");
        assert!(text(&out.stderr).contains("1 file changed since"), "{out:?}");
    }
    fs::remove_file(&data).expect("remove");
    fs::create_dir(&data).expect("make a folder of that name");
    let out = run(&["-v", "--early"], "3");
    assert_eq!(out.status.code(), Some(2), "{out:?}");
    assert!(text(&out.stderr).contains("1 file changed since"), "{out:?}");
}

/// Another build of the program is another program.
#[test]
fn a_working_set_is_of_one_build() {
    let d = Dyni::new();
    let (Ok((exe, data)), Ok(other)) = (pages_victim(&d, 64), build::victim("pages", &variant::gcc_other)) else {
        skip!("gcc is not installed")
    };
    // Under the name that the first had.
    let place = d.folder().join("program");
    fs::copy(&exe, &place).expect("copy");
    let args = [data.to_str().unwrap(), "0", "7"];
    assert!(through(&d, &["--learn"], &place, &args).status().expect("run").success());
    await_recordings(&d, "program", 1);
    fs::remove_file(&place).expect("remove");
    fs::copy(&other, &place).expect("copy");
    let out = through(&d, &["-v"], &place, &args).output().expect("run");
    assert_eq!(text(&out.stdout), "sum 1\n");
    assert!(text(&out.stderr).contains("the archive knows nothing of program"), "{out:?}");
}

/// A program that another has become is what is learned.
#[test]
fn a_wrapper_is_looked_through() {
    let d = Dyni::new();
    let (exe, data) = match pages_victim(&d, 64) {
        Ok(found) => found,
        Err(reason) => skip!("{reason}"),
    };
    let args = [exe.to_str().unwrap(), data.to_str().unwrap(), "0", "7"];
    assert!(through(&d, &["--learn"], Path::new("env"), &args).status().expect("run").success());
    assert!(file_of(&await_recordings(&d, "pages-gcc-O2", 1), &data).is_some());
    assert!(working_set(&d, "env").is_none());
}

/// The helpers of this test's dyni: they run dyni itself, with this archive in their environment.
fn helpers(d: &Dyni) -> Vec<i32> {
    let mark = format!("DYNI_ARCHIVE={}", d.archive().display());
    let pids = fs::read_dir("/proc").expect("list processes").flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let is_ours = |pid: &i32| {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == Path::new(BINARY));
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        // The parent of a helper has ended; what has not become the command yet is our own child.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(1)?.parse::<u32>().ok());
        exe && environ.split(|&b| b == 0).any(|var| var == mark.as_bytes()) && parent != Some(std::process::id())
    };
    pids.filter(is_ours).collect()
}

/// Whenever the helper is killed, the program starts, runs and computes the right thing.
#[test]
fn the_helper_may_be_killed_at_any_moment() {
    let (d, exe) = match with_plan("indirect") {
        Ok(found) => found,
        Err(reason) => skip!("{reason}"),
    };
    let mut rng = common::rng::Rng::new("helper");
    let wanted = verify(&exe, 40).checksum;
    let mut killed = 0;
    for n in 0..40 {
        let options: &[&str] = if n % 4 == 0 { &["--learn"] } else { &["--wait", "1s"] };
        let mut command = through(&d, options, &exe, &["--rounds", "40"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run");
        // A helper is born after some milliseconds, and is done some tens later.
        let deadline = Instant::now() + Duration::from_millis(200);
        let mut found = helpers(&d);
        while found.is_empty() && Instant::now() < deadline {
            found = helpers(&d);
        }
        rng.sleep(Duration::from_millis(30));
        for pid in found {
            killed += usize::from(kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok());
        }
        let out = child.wait_with_output().expect("wait");
        assert!(out.status.success(), "run {n}: {out:?}");
        assert!(text(&out.stdout).contains(&wanted), "run {n}: {out:?}");
    }
    println!("{killed} helpers killed");
    assert!(killed > 0, "no helper was ever met");
    // One that was not met in time ends soon after its program.
    let deadline = Instant::now() + PATIENCE;
    while !helpers(&d).is_empty() {
        assert!(Instant::now() < deadline, "a helper is left");
        thread::sleep(Duration::from_millis(20));
    }
}
