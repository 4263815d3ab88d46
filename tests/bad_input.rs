//! What nobody should ask for, and what a host should not be like: each ends with one line that names the cause and one
//! that says what to do, the right exit status, and a target that has noticed nothing.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::build::{self, variant};
use common::dyni::{self, BINARY, Dyni, Outcome};
use common::memory::Text;
use common::process::{Victim, verify};
use common::rng::Rng;
use common::{find_program, is_root};
use nix::pty::openpty;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Failed or refused: for most of what is wrong with a target, either word fits.
const NO: [i32; 2] = [1, 3];

fn start(name: &str) -> Result<Victim, String> {
    Victim::start(&build::victim(name, &variant::gcc_o2)?)
}

/// A child that is ended and waited for, whatever the test does.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Every verb that takes a process, against one.
fn every_verb(d: &Dyni, pid: &str, check: impl Fn(&str, &Outcome)) {
    for verb in ["record", "apply", "optimize", "undo", "status", "doctor"] {
        let mut args = vec![verb, "-p", pid];
        if matches!(verb, "record" | "optimize") {
            args.extend(["--duration", "300ms"]);
        }
        check(verb, &d.run(&args));
    }
}

#[test]
fn no_such_process() {
    // The largest PID there can be; nobody counts that far.
    let pid = "4194303";
    assert!(!Path::new("/proc").join(pid).exists());
    every_verb(&Dyni::new(), pid, |_, out| out.expect_clear_error(&[1, 2, 3], &["no such process", "no process"]));
}

#[test]
fn no_such_name() {
    every_verb(&Dyni::new(), "no-program-is-called-so", |_, out| {
        out.expect_clear_error(&[1, 2, 3], &["no-program-is-called-so"]);
    });
}

#[test]
fn nonsense_for_a_pid() {
    let d = Dyni::new();
    for pid in ["0", "-1", "99999999999999999999", "", "12x", "../1"] {
        let given = format!("--pid={pid}");
        for verb in ["apply", "undo", "status"] {
            d.run(&[verb, &given]).expect(&[1, 2, 3]);
        }
    }
    d.run(&["apply"]).expect(&[2]);
    d.run(&["undo"]).expect(&[2]);
    d.run(&["no-such-verb"]).expect(&[2]);
    d.run(&["record", "-p", "1", "--duration", "long"]).expect(&[2]);
}

#[test]
fn nothing_recorded_yet() {
    let victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, d) = (victim.pid(), Dyni::new());
    let text = Text::new(pid);
    d.run(&["analyze"]).expect_clear_error(&NO, &["record", "no profile"]);
    d.apply(pid).expect(&NO);
    d.run(&["apply", "-p", &pid.to_string()]).expect_clear_error(&NO, &["plan", "record"]);
    text.assert_pristine(pid, "without a plan");
    let exe = victim.exe.clone();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

#[test]
fn undo_of_what_was_never_done() {
    let victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let d = Dyni::new();
    let text = Text::new(victim.pid());
    d.undo(victim.pid()).expect(&[0, 3]);
    assert_eq!(d.state(victim.pid()), "undynimized");
    text.assert_pristine(victim.pid(), "after an undo of nothing");
}

#[test]
fn not_permitted() {
    if !is_root() {
        skip!("only root can become somebody else");
    }
    let (Some(setpriv), Ok(victim)) = (find_program("setpriv"), start("switches")) else {
        skip!("setpriv or a compiler is not installed");
    };
    let d = Dyni::new();
    d.make_plan(victim.pid(), "300ms");
    let text = Text::new(victim.pid());
    // The other user must be stopped by the target's owner, not by the build folder or the archive.
    let copy = d.folder().join("dyni");
    fs::copy(BINARY, &copy).expect("copy the command");
    for (path, mode) in [(d.folder(), 0o777), (&copy, 0o755), (d.archive(), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }
    for verb in ["record", "apply", "optimize", "undo", "status", "doctor"] {
        let mut c = Command::new(&setpriv);
        c.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy).args([verb, "-p"]);
        c.arg(victim.pid().to_string()).arg("--archive").arg(d.archive()).current_dir("/");
        let out = dyni::run(&mut c);
        // What can be said without touching it may be said.
        if matches!(verb, "status" | "doctor") && out.code() == Some(0) {
            continue;
        }
        out.expect_clear_error(&NO, &["permi", "allowed", "owner", "root", "user"]);
    }
    text.assert_pristine(victim.pid(), "after somebody else's tries");
    let exe = victim.exe.clone();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// A whole 32-bit program by hand: one page, one segment, `jmp .`.
fn elf32() -> Vec<u8> {
    let mut b = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let (base, entry) = (0x0804_8000_u32, 0x0804_8054_u32);
    for half in [2_u16, 3] {
        b.extend(half.to_le_bytes());
    }
    for word in [1, entry, 52, 0, 0] {
        b.extend(word.to_le_bytes());
    }
    for half in [52_u16, 32, 1, 0, 0, 0] {
        b.extend(half.to_le_bytes());
    }
    for word in [1, 0, base, base, 0x56, 0x56, 5, 0x1000] {
        b.extend(word.to_le_bytes());
    }
    b.extend([0xeb, 0xfe]);
    b
}

#[test]
fn a_32_bit_program() {
    let d = Dyni::new();
    let path = d.folder().join("loop32");
    fs::write(&path, elf32()).expect("write the program");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    let child = match Command::new(&path).stdin(Stdio::null()).spawn() {
        Ok(child) => Reaped(child),
        Err(e) => skip!("this kernel runs no 32-bit programs: {e}"),
    };
    let pid = child.0.id().to_string();
    for verb in ["record", "apply", "optimize"] {
        let mut args = vec![verb, "-p", &pid];
        if verb != "apply" {
            args.extend(["--duration", "300ms"]);
        }
        d.run(&args).expect_clear_error(&NO, &["32-bit", "x86-64", "32 bit", "64-bit"]);
    }
    d.run(&["doctor", "--exe", path.to_str().expect("a plain name")]).expect(&[0, 1, 3]);
    // On a crowded machine its turn may be long in coming.
    let deadline = Instant::now() + common::process::PATIENCE;
    while common::process::cpu_ticks(child.0.id() as i32) == 0 {
        assert!(Instant::now() < deadline, "the 32-bit program does not run");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_kernel_thread() {
    if fs::read_to_string("/proc/2/comm").unwrap_or_default().trim() != "kthreadd" {
        skip!("no kernel thread is visible from here");
    }
    let d = Dyni::new();
    for verb in ["record", "apply"] {
        d.run(&[verb, "-p", "2"]).expect_clear_error(&NO, &["kernel"]);
    }
}

#[test]
fn a_zombie() {
    let child = Reaped(Command::new("/bin/true").stdin(Stdio::null()).spawn().expect("run true"));
    let pid = child.0.id().to_string();
    let is_zombie = || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") Z "));
    while !is_zombie() {
        thread::sleep(Duration::from_millis(1));
    }
    let d = Dyni::new();
    for verb in ["record", "apply", "undo"] {
        let out = d.run(&[verb, "-p", &pid]);
        out.expect_clear_error(&NO, &["zombie", "ended", "exited", "no longer", "defunct", "gone", "dead"]);
    }
}

#[test]
fn dyni_itself() {
    let d = Dyni::new();
    let mut c = Command::new("/bin/sh");
    c.arg("-c").arg(format!("exec {BINARY} apply -p $$ --archive {}", d.archive().display()));
    dyni::run(&mut c).expect_clear_error(&[1, 2, 3], &["itself", "own"]);
}

#[test]
fn a_target_with_another_tracer() {
    let mut victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, d) = (victim.pid(), Dyni::new());
    d.make_plan(pid, "300ms");
    let text = Text::new(pid);
    ptrace::seize(Pid::from_raw(pid), ptrace::Options::empty()).expect("trace the victim");
    let out = d.run(&["apply", "-p", &pid.to_string()]);
    out.expect_clear_error(&NO, &["traced", "tracer", "debugger"]);
    text.assert_pristine(pid, "while traced by somebody else");
    victim.assert_serving("while traced by somebody else");
}

#[test]
fn a_target_that_ends_while_recorded() {
    let victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let d = Dyni::new();
    let began = Instant::now();
    let pid = victim.pid().to_string();
    let out = thread::scope(|s| {
        let recording = s.spawn(|| d.run(&["record", "-p", &pid, "--duration", "20s"]));
        thread::sleep(Duration::from_millis(800));
        victim.signal(Signal::SIGKILL);
        recording.join().expect("recording does not panic")
    });
    // What was seen until then is a profile; none is a failure. Neither waits for the rest of the time.
    if out.code() != Some(0) {
        out.expect_clear_error(&[1], &["exit", "ended", "gone", "died", "no longer", "no such process"]);
    }
    assert!(began.elapsed() < Duration::from_secs(15), "record went on without its target: {out:#?}");
}

#[test]
fn a_target_that_ends_while_it_is_changed() {
    let Ok(first) = start("threads") else {
        skip!("no compiler is installed");
    };
    let d = Dyni::new();
    d.make_plan(first.pid(), "300ms");
    let typical = d.apply(first.pid()).took;
    let mut rng = Rng::new("ends");
    for n in 0..30 {
        let victim = start("threads").expect("it started once");
        let pid = victim.pid().to_string();
        let verb = if n % 3 == 2 { "undo" } else { "apply" };
        if verb == "undo" {
            d.apply(victim.pid()).expect_done();
        }
        let out = thread::scope(|s| {
            let changing = s.spawn(|| d.run(&[verb, "-p", &pid]));
            rng.sleep(typical);
            victim.signal(Signal::SIGKILL);
            changing.join().expect("apply does not panic")
        });
        // Done before it died, failed because it did, or nothing there any more.
        if out.code() != Some(0) {
            let words = ["exit", "gone", "ended", "died", "no such process", "no process", "zombie", "no longer"];
            out.expect_clear_error(&NO, &words);
        }
    }
}

#[test]
fn files_that_are_no_programs() {
    let d = Dyni::new();
    let whole = fs::read(BINARY).expect("read the command");
    let write = |name: &str, bytes: &[u8]| {
        let path = d.folder().join(name);
        fs::write(&path, bytes).expect("write a file");
        path
    };
    let mut lies = whole[..4096].to_vec();
    lies[0x20..0x28].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut wrong = whole[..4096].to_vec();
    wrong[18] = 0xb7;
    let cases = [
        (write("text", b"#!/bin/sh\nexit 0\n"), "not ELF"),
        (write("empty", b""), "empty"),
        (write("ident", &whole[..16]), "16 bytes"),
        (write("header", &whole[..64]), "header only"),
        (write("page", &whole[..4096]), "one page"),
        (write("half", &whole[..whole.len() / 2]), "half"),
        (write("lies", &lies), "a header that lies"),
        (write("arm", &wrong), "another machine"),
        (d.folder().join("absent"), "absent"),
        (d.folder().to_owned(), "a folder"),
    ];
    for (path, what) in &cases {
        let out = d.run(&["doctor", "--exe", path.to_str().expect("a plain name")]);
        // Half a program is still one as far as it goes: doctor may report what it finds.
        if *what == "half" && out.code() == Some(0) {
            continue;
        }
        out.expect(&NO);
        out.expect_clear_error(&NO, &[]);
    }
}

/// The id that `dyni analyze --json` gives its plan, wherever it puts it.
fn plan_id(out: &Outcome) -> Option<String> {
    let json = out.json();
    ["plan", "id", "plan_id"].iter().find_map(|k| json[k].as_str().or(json[k]["id"].as_str()).map(str::to_owned))
}

#[test]
fn a_plan_for_another_build() {
    let other = build::victim("switches", &variant::gcc_other).and_then(|exe| Victim::start(&exe));
    let (Ok(one), Ok(other)) = (start("switches"), other) else {
        skip!("no compiler is installed");
    };
    let d = Dyni::new();
    d.run(&["record", "-p", &one.pid().to_string(), "--duration", "300ms"]).expect_done();
    let plan = d.run(&["analyze", "--json"]);
    plan.expect_done();
    let text = Text::new(other.pid());
    let pid = other.pid().to_string();
    // libc is the same in both and may be served by the plan; the program may not.
    let mut tries = vec![vec!["apply", "-p", &pid, "--json"]];
    let id = plan_id(&plan);
    if let Some(id) = &id {
        tries.push(vec!["apply", "-p", &pid, "--plan", id, "--json"]);
    }
    for args in tries {
        let out = d.run(&args);
        out.expect(&[0, 1, 3]);
        if out.code() == Some(0) {
            assert_eq!(out.functions(Some(&other.module)), 0, "a plan of another build was applied: {out:#?}");
            d.undo(other.pid()).expect(&[0, 3]);
        }
        text.assert_pristine(other.pid(), "after a plan of another build");
    }
    let exe = other.exe.clone();
    let tally = other.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
    // A plan that does not exist.
    let out = d.run(&["apply", "-p", &one.pid().to_string(), "--plan", "ffffffffffff"]);
    out.expect_clear_error(&[1, 2, 3], &["ffffffffffff", "no plan"]);
}

/// Runs a script in a mount namespace of its own, so that what it mounts is gone with it.
fn in_own_mounts(script: &str) -> Option<Outcome> {
    let unshare = find_program("unshare")?;
    Some(dyni::run(Command::new(unshare).args(["-m", "--propagation", "private", "sh", "-ec", script])))
}

#[test]
fn a_full_disk() {
    if !is_root() {
        skip!("only root can mount a small disk");
    }
    let Ok(victim) = start("switches") else {
        skip!("no compiler is installed");
    };
    let d = Dyni::new();
    let dir = d.folder().join("disk");
    fs::create_dir(&dir).expect("create a folder");
    let (dir, pid) = (dir.display(), victim.pid());
    for size in ["4k", "16k", "40k"] {
        let script = format!(
            "mount -t tmpfs -o size={size} none {dir} || exit 77\n\
             exec {BINARY} record -p {pid} --duration 300ms --archive {dir}/archive.db"
        );
        let Some(out) = in_own_mounts(&script) else {
            skip!("unshare is not installed");
        };
        if out.code() == Some(77) {
            skip!("mounting is not allowed here: {}", out.stderr.trim());
        }
        out.expect_clear_error(&[1], &["full", "space"]);
    }
    let text = Text::new(victim.pid());
    text.assert_pristine(victim.pid(), "after a full disk");
    let exe = victim.exe.clone();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

#[test]
fn a_read_only_archive() {
    if !is_root() {
        skip!("only root can mount a read-only disk");
    }
    let Ok(victim) = start("switches") else {
        skip!("no compiler is installed");
    };
    let d = Dyni::new();
    d.make_plan(victim.pid(), "300ms");
    let (dir, pid) = (d.folder().display(), victim.pid());
    let mount = format!("mount --bind {dir} {dir} && mount -o remount,bind,ro {dir} || exit 77\n");
    let archive = d.archive().display();
    let script = |verb: &str| format!("{mount}exec {BINARY} {verb} -p {pid} --archive {archive}");
    let Some(out) = in_own_mounts(&script("record --duration 300ms")) else {
        skip!("unshare is not installed");
    };
    if out.code() == Some(77) {
        skip!("mounting is not allowed here: {}", out.stderr.trim());
    }
    out.expect_clear_error(&[1], &["read-only", "readonly", "read only", "written"]);
    // Reading is enough to apply; saying why not is as good, half done is not.
    let text = Text::new(pid);
    let out = in_own_mounts(&script("apply")).expect("it was there before");
    if out.code() != Some(0) {
        out.expect_clear_error(&NO, &["read-only", "readonly", "read only", "written"]);
        text.assert_pristine(pid, "after an apply that was refused");
    }
    d.undo(pid).expect(&[0, 3]);
    text.assert_pristine(pid, "after undo");
    let exe = victim.exe.clone();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

#[test]
fn archives_that_are_none() {
    let Ok(victim) = start("switches") else {
        skip!("no compiler is installed");
    };
    let d = Dyni::new();
    let pid = victim.pid().to_string();
    let junk = d.folder().join("junk.db");
    fs::write(&junk, [0x5a; 20_000]).expect("write a file");
    let deep = d.folder().join("missing/deep/archive.db");
    for (path, codes) in [(junk.as_path(), &[1, 3][..]), (d.folder(), &[1, 3]), (&deep, &[0, 1, 3])] {
        let mut c = Command::new(BINARY);
        c.args(["record", "-p", &pid, "--duration", "200ms", "--archive"]).arg(path);
        let out = dyni::run(&mut c);
        out.expect(codes);
        if out.code() != Some(0) {
            out.expect_clear_error(codes, &["archive", "database", "folder", "directory", "file"]);
        }
    }
    // A good archive, damaged in the middle: found before anything is written to the target.
    d.make_plan(victim.pid(), "200ms");
    let text = Text::new(victim.pid());
    let good = fs::read(d.archive()).expect("read the archive");
    let mut rng = Rng::new("damage");
    for _ in 0..20 {
        let mut bad = good.clone();
        for _ in 0..40 {
            let at = rng.below(bad.len() as u64) as usize;
            bad[at] ^= 1 << rng.below(8);
        }
        let path = d.folder().join("damaged.db");
        fs::write(&path, &bad).expect("write a file");
        let mut c = Command::new(BINARY);
        c.args(["apply", "-p", &pid, "--archive"]).arg(&path);
        let out = dyni::run(&mut c);
        out.expect(&[0, 1, 3]);
        d.undo(victim.pid()).expect(&[0, 3]);
        text.assert_pristine(victim.pid(), "after a damaged archive");
    }
    let exe = victim.exe.clone();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// dyni with a plan in its archive, and all of that archive as a file.
fn exported(victim: &Victim) -> (Dyni, PathBuf) {
    let d = Dyni::new();
    d.make_plan(victim.pid(), "200ms");
    let file = d.folder().join("all.dyni");
    d.run(&["archive", "export", "--all", text_of(&file)]).expect_done();
    (d, file)
}

fn text_of(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

#[test]
fn files_that_are_no_exports() {
    let Ok(victim) = start("switches") else {
        skip!("no compiler is installed");
    };
    let (d, file) = exported(&victim);
    let whole = fs::read(&file).expect("read the file");
    let other = Dyni::new();
    let bad = other.folder().join("bad.dyni");
    let import = |bytes: &[u8]| {
        fs::write(&bad, bytes).expect("write a file");
        other.run(&["archive", "import", text_of(&file), text_of(&bad)])
    };
    let mut rng = Rng::new("bundle");
    for _ in 0..20 {
        let cut = &whole[..rng.below(whole.len() as u64) as usize];
        import(cut).expect_clear_error(&[1], &["cut off"]);
        let mut flipped = whole.clone();
        flipped[rng.below(whole.len() as u64) as usize] ^= 1 << rng.below(8);
        import(&flipped).expect_clear_error(&NO, &["damaged", "cut off", "newer", "has written"]);
    }
    import(&[&whole[..], &whole[..]].concat()).expect_clear_error(&[1], &["follows its end"]);
    import(b"a shopping list").expect_clear_error(&[3], &["dyni archive export"]);
    import(&fs::read(d.archive()).expect("read the archive")).expect_clear_error(&[3], &["database"]);
    other.run(&["archive", "import", "/nowhere"]).expect_clear_error(&[1], &["no such file"]);
    other.run(&["archive", "import", "/"]).expect_clear_error(&[1], &["directory"]);
    other.run(&["archive", "import"]).expect(&[2]);
    assert!(!other.archive().exists(), "something of it was imported");
    // The whole one, by its other name.
    other.run(&["archive", "merge", text_of(&file)]).expect_done();
    let ids = |d: &Dyni| d.run(&["archive", "ls", "--json"]).json()["entries"].as_array().map(Vec::len);
    assert_eq!(ids(&other), ids(&d));
}

#[test]
fn exports_of_nothing_and_to_nowhere() {
    let Ok(victim) = start("switches") else {
        skip!("no compiler is installed");
    };
    let (d, file) = exported(&victim);
    let none = d.folder().join("none.dyni");
    d.run(&["archive", "export", text_of(&none)]).expect(&[2]);
    d.run(&["archive", "export", "--all", "--program", "x", text_of(&none)]).expect(&[2]);
    d.run(&["archive", "export", "--build-id", "xyz", text_of(&none)]).expect(&[2]);
    d.run(&["archive", "export", "--all", "--json", "-"]).expect_clear_error(&[2], &["--json"]);
    for which in [["--build-id", "00ff"], ["--program", "no-such-program"]] {
        let nothing = d.run(&[&["archive", "export"], &which[..], &[text_of(&none)]].concat());
        nothing.expect_clear_error(&[1], &["nothing of that"]);
        assert!(!none.exists());
        let nothing = d.run(&[&["archive", "export"], &which[..], &["-"]].concat());
        nothing.expect_clear_error(&[1], &["nothing of that"]);
        assert_eq!(nothing.stdout, "");
    }
    Dyni::new().run(&["archive", "export", "--all", text_of(&none)]).expect_clear_error(&[1], &["no archive"]);
    let archive = fs::read(d.archive()).expect("read the archive");
    d.run(&["archive", "export", "--all", text_of(d.archive())]).expect_clear_error(&[3], &["no export"]);
    assert_eq!(fs::read(d.archive()).expect("read the archive"), archive);
    d.run(&["archive", "export", "--all", "/nowhere/x.dyni"]).expect_clear_error(&[1], &["no such file"]);
    assert!(!none.exists());

    let terminal = openpty(None, None).expect("a terminal");
    let mut to_terminal = d.command(&["archive", "export", "--all", "-"]);
    let status = to_terminal.stdout(terminal.slave.try_clone().expect("clone")).stderr(Stdio::null()).status();
    assert_eq!(status.expect("run").code(), Some(3));
    let mut from_terminal = d.command(&["archive", "import", "-"]);
    let status = from_terminal.stdin(terminal.slave).stderr(Stdio::null()).stdout(Stdio::null()).status();
    assert_eq!(status.expect("run").code(), Some(3));

    // Through a pipe it is the same file, and a reader that goes away is no error of anybody.
    let piped = d.command(&["archive", "export", "--all", "-"]).output().expect("run");
    assert_eq!(piped.stdout, fs::read(&file).expect("read the file"));
    let other = Dyni::new();
    let mut reader = other.command(&["archive", "import", "-", "--json"]);
    let mut reader = reader.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("run");
    let mut writer = d.command(&["archive", "export", "--all", "-"]);
    writer.stdout(reader.stdin.take().expect("piped")).stderr(Stdio::null());
    assert!(writer.status().expect("run").success());
    drop(writer);
    assert!(reader.wait().expect("wait").success());
    assert!(other.archive().exists());
}
