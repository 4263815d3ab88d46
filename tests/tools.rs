//! Tools that look at a program see through its copies: gdb's backtraces are whole, perf's reports have names.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::build::{self, variant};
use common::dyni::{Dyni, run};
use common::memory::maps;
use common::process::{PATIENCE, Victim, descendants, verify};
use common::tools::{Gdb, Perf, assert_named, caches, in_caches, in_copies, is_whole};
use common::{find_program, is_root};
use nix::sys::signal::Signal;
use procfs::process::MMapPath;
use serde_json::Value;

/// How often a program is looked at, until enough of its frames were in copies.
const LOOKS: usize = 40;

/// A victim that runs in its copies.
fn dynimized(name: &str) -> Result<(Victim, Dyni), String> {
    let victim = Victim::start(&build::victim(name, &variant::gcc_o2)?)?;
    let d = Dyni::new();
    d.make_plan(victim.pid(), "500ms");
    d.apply(victim.pid()).expect_done();
    Ok((victim, d))
}

/// The end of a victim whose every round has to be right, whoever looked on.
fn assert_unharmed(victim: Victim) {
    let exe = victim.exe.clone();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

fn perf_map(pid: i32) -> PathBuf {
    PathBuf::from(format!("/tmp/perf-{pid}.map"))
}

/// Looks at a victim with gdb until `wanted` was in a copy above another frame in a copy. Every backtrace must be whole.
fn gdb_sees_through(name: &str, wanted: &str) {
    let gdb = match Gdb::find() {
        Ok(gdb) => gdb,
        Err(reason) => skip!("{reason}"),
    };
    let (victim, _dyni) = match dynimized(name) {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    let caches = caches(pid);
    let mut most = 0;
    for look in 0..LOOKS {
        let frames = gdb.backtrace(pid);
        let innermost = &frames[..frames.len().min(20)];
        assert!(
            is_whole(&frames, pid),
            "look {look}: the backtrace is not whole: {innermost:x?} … {:x?}",
            frames.last()
        );
        let of_copies: Vec<_> = frames.iter().filter(|f| in_caches(std::slice::from_ref(f), &caches) > 0).collect();
        if of_copies.iter().any(|f| f.name.starts_with(wanted)) {
            most = most.max(of_copies.len());
        }
        if most >= 2 && look >= 4 {
            break;
        }
        // Another moment of the program.
        thread::sleep(Duration::from_millis(7));
    }
    println!("{most} frames in copies");
    assert!(most >= 2, "{wanted} was never seen in a copy with another one below it");
    assert_unharmed(victim);
}

/// Without frame pointers, and without an unwinder in the process that could have been told of copies.
#[test]
fn gdb_sees_through_copies_of_c() {
    gdb_sees_through("recursion", "deep");
}

/// Not the victim that throws: while the unwinder enters a landing pad it writes over its own frame, and nobody's backtrace
/// is whole then.
#[test]
fn gdb_sees_through_copies_of_cpp() {
    gdb_sees_through("vtables", "(anonymous namespace)::total(");
}

/// What was undone stays mapped, and frames of it on the stack.
#[test]
fn a_core_is_whole_with_a_symbol_file_of_any_time_since_the_apply() {
    let gdb = match Gdb::find() {
        Ok(gdb) => gdb,
        Err(reason) => skip!("{reason}"),
    };
    let Some(gcore) = find_program("gcore") else { skip!("gcore is not installed") };
    let (victim, d) = match dynimized("recursion") {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    let symbols = d.folder().join("symbols");
    let target = pid.to_string();
    let path = symbols.display().to_string();
    let out = d.run(&["symbols", "-p", &target, "-o", &path, "--json"]);
    out.expect_done();
    assert_eq!(out.json()["file"], path.as_str());
    assert_eq!(out.json()["processes"][0]["without_frames"], 0, "{out:#?}");
    let caches = caches(pid);
    let stem = d.folder().join("core");
    let core = d.folder().join(format!("core.{pid}"));
    let looked = (0..LOOKS).any(|_| {
        let dumped = run(Command::new(&gcore).arg("-o").arg(&stem).arg(&target));
        assert!(core.is_file(), "no core: {dumped:#?}");
        let frames = gdb.backtrace_of_core(&victim.exe, &core, &symbols);
        fs::remove_file(&core).expect("remove the core");
        assert!(is_whole(&frames, pid), "{:x?} … {:x?}", frames.first(), frames.last());
        in_caches(&frames, &caches) >= 2
    });
    assert!(looked, "no core had two frames in copies");
    assert_unharmed(victim);
}

#[test]
fn gdb_says_nothing_of_a_program_without_copies() {
    let gdb = match Gdb::find() {
        Ok(gdb) => gdb,
        Err(reason) => skip!("{reason}"),
    };
    let victim = match build::victim("recursion", &variant::gcc_o2).and_then(|exe| Victim::start(&exe)) {
        Ok(victim) => victim,
        Err(reason) => skip!("{reason}"),
    };
    let out = gdb.attach(victim.pid(), &["dyni"]);
    out.expect_done();
    assert!(out.stdout.contains("the program holds no copies"), "{out:#?}");
    assert!(!out.stdout.contains("dyni:") && !out.stderr.contains("dyni:"), "{out:#?}");
    assert_unharmed(victim);
}

#[test]
fn perf_names_copies() {
    let perf = match Perf::find() {
        Ok(perf) => perf,
        Err(reason) => skip!("{reason}"),
    };
    let (victim, d) = match dynimized("recursion") {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    let report = perf.record(Some(pid), 2, &d.folder().join("data"), None);
    assert_named(&report, 300);
    let deep = report.iter().filter(|l| l.symbol == "deep").map(|l| l.samples).sum::<u64>();
    assert!(deep > 0, "the hottest function is not there: {report:#?}");
    // perf takes a named mapping for a file; kernels without names for memory can't show it by the report.
    for m in maps(pid).iter().filter(|m| caches(pid).iter().any(|c| c.start == m.address.0)) {
        assert!(matches!(m.pathname, MMapPath::Anonymous), "{m:x?}");
    }
    // A thread may still be in what was taken out.
    d.undo(pid).expect_done();
    let (_, named) = in_copies(&perf.report(&d.folder().join("data"), None));
    assert!(named > 0, "the undo has taken the names away");
    assert_unharmed(victim);
}

/// perf is told of the cache by the kernel when it is mapped, not by a look at what was there before.
#[test]
fn perf_names_copies_that_are_made_while_it_records() {
    let perf = match Perf::find() {
        Ok(perf) => perf,
        Err(reason) => skip!("{reason}"),
    };
    let victim = match build::victim("recursion", &variant::gcc_o2).and_then(|exe| Victim::start(&exe)) {
        Ok(victim) => victim,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, d) = (victim.pid(), Dyni::new());
    d.make_plan(pid, "500ms");
    let data = d.folder().join("data");
    let mut recording = perf.begin(Some(pid), 4, &data);
    thread::sleep(Duration::from_millis(500));
    d.apply(pid).expect_done();
    assert!(recording.wait().expect("wait for perf").success());
    assert_named(&perf.report(&data, None), 300);
    assert_unharmed(victim);
}

/// Children that are forked while perf records need no map of their own: perf knows them by their parent's.
#[test]
fn perf_names_copies_in_children() {
    if !is_root() {
        skip!("only root may record all processes");
    }
    let perf = match Perf::find() {
        Ok(perf) => perf,
        Err(reason) => skip!("{reason}"),
    };
    let victim = match build::victim("forks", &variant::gcc_o2).and_then(|exe| Victim::start(&exe)) {
        Ok(victim) => victim,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, d) = (victim.pid(), Dyni::new());
    // Its processes are short, and sampled now and then.
    let applied = (0..8).any(|_| {
        d.make_plan(pid, "1s");
        let out = d.apply(pid);
        out.expect(&[0, 3]);
        let done = out.code() == Some(0) && out.functions(Some("forks-gcc-O2")) > 0;
        if !done {
            d.undo(pid).expect(&[0, 3]);
        }
        done
    });
    assert!(applied, "nothing of the program was ever in a plan");
    assert_named(&perf.record(None, 3, &d.folder().join("data"), Some("forks-gcc-O2")), 10);
    assert_unharmed(victim);
}

/// A child that was forked after the apply and before perf came has copies by inheritance, and names by `dyni symbols`.
#[test]
fn symbols_are_for_children_that_were_forked_since() {
    let perf = match Perf::find() {
        Ok(perf) => perf,
        Err(reason) => skip!("{reason}"),
    };
    let (victim, d) = match dynimized("heirs") {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    victim.signal(Signal::SIGUSR1);
    let deadline = Instant::now() + PATIENCE;
    let child = loop {
        if let Some(&child) = descendants(pid).first() {
            break child;
        }
        assert!(Instant::now() < deadline, "no child is born");
        thread::sleep(Duration::from_millis(5));
    };
    let data = d.folder().join("data");
    let (samples, named) = in_copies(&perf.record(Some(child), 2, &data, None));
    assert!(samples > 0 && named == 0, "{named} of {samples} samples are named without a map");
    let out = d.run(&["symbols", "-p", &pid.to_string(), "--json"]);
    out.expect_done();
    let json = out.json();
    let of = |process: &Value| (process["pid"].clone(), process["perf_map"].clone());
    let written: Vec<_> = json["processes"].as_array().expect("a list").iter().map(of).collect();
    let wanted = [pid, child].map(|pid| (pid.into(), perf_map(pid).display().to_string().into()));
    assert_eq!(written, wanted);
    assert_named(&perf.report(&data, None), 300);
    assert_unharmed(victim);
}

/// What lies where a perf map belongs and is not dyni's stays as it is, and the user is told.
#[test]
fn a_perf_map_of_somebody_else_is_left_alone() {
    let exe = match build::victim("recursion", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let victim = Victim::start(&exe).expect("recursion needs nothing special");
    let (pid, d) = (victim.pid(), Dyni::new());
    d.make_plan(pid, "300ms");
    // The recording has counted in copies, which have names already.
    let _ = fs::remove_file(perf_map(pid));
    let precious = d.folder().join("precious");
    fs::write(&precious, "1000 10 jitted\n").expect("write a file");
    let assert_told = || {
        let out = d.apply(pid);
        out.expect_done();
        let notes = out.json()["notes"].to_string();
        assert!(notes.contains(&format!("perf-{pid}.map")), "nobody is told: {out:#?}");
        assert_eq!(fs::read_to_string(&precious).expect("it is still there"), "1000 10 jitted\n");
        d.undo(pid).expect_done();
    };
    fs::copy(&precious, perf_map(pid)).expect("write a map");
    assert_told();
    assert_eq!(fs::read_to_string(perf_map(pid)).expect("it is still there"), "1000 10 jitted\n");
    fs::remove_file(perf_map(pid)).expect("remove the map");
    symlink(&precious, perf_map(pid)).expect("make a link");
    assert_told();
    assert!(perf_map(pid).is_symlink(), "the link was replaced");
    fs::remove_file(perf_map(pid)).expect("remove the link");
    // The same without any: dyni's own, for all to read.
    let out = d.apply(pid);
    out.expect_done();
    assert_eq!(out.json()["notes"], serde_json::json!([]));
    let facts = fs::symlink_metadata(perf_map(pid)).expect("it was written");
    assert!(facts.is_file() && facts.permissions().mode() & 0o777 == 0o644, "{facts:?}");
    // The next apply may replace it: the same names, wherever the copies lie now.
    let names = || {
        let map = fs::read_to_string(perf_map(pid)).expect("readable");
        let lines = map.lines().map(|l| l.split_once(' ').expect("an address, then more").1.to_owned());
        lines.collect::<Vec<_>>()
    };
    let before = names();
    assert!(before.first().is_some_and(|l| l.ends_with("[dyni code cache]")), "{before:?}");
    d.undo(pid).expect_done();
    d.apply(pid).expect_done();
    assert_eq!(names(), before);
    assert_unharmed(victim);
}

/// Maps of processes that are gone go a day later, others' never.
#[test]
fn stale_perf_maps_are_removed() {
    let victim = match build::victim("recursion", &variant::gcc_o2).and_then(|exe| Victim::start(&exe)) {
        Ok(victim) => victim,
        Err(reason) => skip!("{reason}"),
    };
    let d = Dyni::new();
    // Beyond the kernel's highest PID, one for each test that runs at once.
    let nobody = |n: i32| perf_map(2_000_000_000 + 10 * (victim.pid() % 10_000_000) + n);
    let make = |n: i32, text: &str, days: u64| {
        let file =
            File::create(nobody(n)).and_then(|mut f| std::io::Write::write_all(&mut f, text.as_bytes()).map(|()| f));
        let at = SystemTime::now() - Duration::from_secs(days * 86_400 + 60);
        file.and_then(|f| f.set_modified(at)).expect("write a map");
    };
    let ours = "2000 1 [dyni code cache]\n1000 10 main\n";
    make(0, ours, 1);
    make(1, ours, 0);
    make(2, "1000 10 jitted\n", 1);
    let there = || [0, 1, 2].map(|n| nobody(n).exists());
    d.make_plan(victim.pid(), "300ms");
    d.apply(victim.pid()).expect_done();
    let left = there();
    (0..3).for_each(|n| drop(fs::remove_file(nobody(n))));
    assert_eq!(left, [false, true, true], "stale, young, somebody else's");
    victim.signal(Signal::SIGTERM);
}
