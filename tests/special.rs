//! Circumstances instead of behaviours: a program whose file is gone, a stopped target, two dynis at once, a target
//! without a file system in common, a target that is already optimised.

mod common;

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::build::{self, variant};
use common::cycles::{self, Effort, Expect};
use common::dyni::{self, Dyni};
use common::memory::Text;
use common::process::{Victim, stopped_threads, verify};
use nix::sys::signal::Signal;

/// A victim of the main list, built by gcc.
fn start(name: &str) -> Result<Victim, String> {
    Victim::start(&build::victim(name, &variant::gcc_o2)?)
}

/// An upgrade replaces the file under a running server. Its code is still there, and so is its build-id.
#[test]
fn a_replaced_executable_is_no_obstacle() {
    let exe = match build::victim("switches", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let dir = tempfile::tempdir().expect("create a folder");
    let copy = dir.path().join("switches-gcc-O2");
    fs::copy(&exe, &copy).expect("copy the program");
    let victim = Victim::start(&copy).expect("switches needs nothing special");
    // Another program of the same name must not hide it, either.
    let namesake = Victim::start(&exe).expect("switches needs nothing special");
    let fresh = dir.path().join("fresh");
    fs::copy("/bin/true", &fresh).expect("copy another program");
    fs::rename(&fresh, &copy).expect("replace the program");
    let text = Text::new(victim.pid());
    let d = Dyni::new();
    d.make_plan(victim.pid(), "300ms");
    for _ in 0..10 {
        let out = d.apply(victim.pid());
        out.expect_done();
        assert!(out.functions(None) > 0, "nothing was patched: {out:#?}");
        d.undo(victim.pid()).expect_done();
        text.assert_pristine(victim.pid(), "after undo");
    }
    for victim in [victim, namesake] {
        let tally = victim.finish();
        assert_eq!(tally, verify(&exe, tally.rounds));
    }
}

/// The same with the file deleted.
#[test]
fn a_deleted_executable_is_no_obstacle() {
    let exe = match build::victim("gotos", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let dir = tempfile::tempdir().expect("create a folder");
    let copy = dir.path().join("gotos-gcc-O2");
    fs::copy(&exe, &copy).expect("copy the program");
    let mut victim = Victim::start(&copy).expect("gotos needs nothing special");
    fs::remove_file(&copy).expect("delete the program");
    victim.exe = exe.clone();
    cycles::Run::new("gotos, deleted".into(), victim, Expect::Served, Effort { cycles: 10, ..Effort::SHORT }).run();
}

/// A process stopped by its shell stays stopped, is patched all the same, and goes on with SIGCONT.
#[test]
fn a_stopped_target_stays_stopped() {
    let mut victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    let text = Text::new(pid);
    d.make_plan(pid, "300ms");
    for cycle in 0..10 {
        victim.signal(Signal::SIGSTOP);
        while stopped_threads(pid).is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
        // Refusing with the reason is as good as doing it; what counts is that the stop lasts.
        let out = d.apply(pid);
        out.expect(&[0, 3]);
        thread::sleep(Duration::from_millis(20));
        assert!(!stopped_threads(pid).is_empty(), "cycle {cycle}: apply has woken a stopped process");
        if cycle % 2 == 0 {
            victim.signal(Signal::SIGCONT);
            victim.assert_serving("after SIGCONT");
        }
        if out.code() == Some(0) {
            d.undo(pid).expect_done();
        }
        text.assert_pristine(pid, "after undo");
        if cycle % 2 == 1 {
            assert!(!stopped_threads(pid).is_empty(), "cycle {cycle}: undo has woken a stopped process");
        }
        victim.signal(Signal::SIGCONT);
        victim.assert_serving("after SIGCONT");
    }
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// One writer: of several dynis at the same process, each does its work wholly or says why not.
#[test]
fn two_writers_do_not_mix() {
    let mut victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    let text = Text::new(pid);
    d.make_plan(pid, "300ms");
    let target = pid.to_string();
    for _ in 0..10 {
        thread::scope(|s| {
            for verb in ["apply", "undo", "apply", "undo"] {
                let (d, target) = (&d, &target);
                s.spawn(move || {
                    let out = d.run(&[verb, "-p", target, "--json"]);
                    out.expect(&[0, 1, 3]);
                });
            }
        });
        victim.assert_serving("with two writers");
        let changed = !text.patches(pid).is_empty();
        let claims = d.state(pid) != "undynimized";
        assert_eq!(changed, claims, "status and text disagree after two writers");
        d.undo(pid).expect(&[0, 3]);
        text.assert_pristine(pid, "after the last undo");
    }
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// Applying twice leaves one generation, and one undo is enough.
#[test]
fn applying_twice_is_undone_once() {
    let victim = match start("gotos") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    let text = Text::new(pid);
    d.make_plan(pid, "300ms");
    for _ in 0..10 {
        d.apply(pid).expect_done();
        d.apply(pid).expect(&[0, 3]);
        d.undo(pid).expect_done();
        text.assert_pristine(pid, "after one undo");
        assert_eq!(d.state(pid), "undynimized");
    }
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// A dry run says what it would do and writes nothing.
#[test]
fn a_dry_run_changes_nothing() {
    let victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, d) = (victim.pid(), Dyni::new());
    let text = Text::new(pid);
    d.make_plan(pid, "300ms");
    let before = common::memory::maps(pid).len();
    d.run(&["apply", "-p", &pid.to_string(), "--dry-run", "--json"]).expect_done();
    text.assert_pristine(pid, "after a dry run");
    assert_eq!(d.state(pid), "undynimized");
    assert_eq!(common::memory::maps(pid).len(), before, "a dry run has mapped something");
}

/// One host's plan serves every process of the program, whatever its addresses.
#[test]
fn one_plan_serves_other_processes() {
    let first = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let d = Dyni::new();
    d.make_plan(first.pid(), "300ms");
    for _ in 0..5 {
        let other = start("switches").expect("it started once");
        let text = Text::new(other.pid());
        let out = d.apply(other.pid());
        out.expect_done();
        assert!(out.functions(None) > 0, "nothing was patched: {out:#?}");
        assert!(!text.patches(other.pid()).is_empty(), "the text of the other process is untouched");
        let exe = other.exe.clone();
        let tally = other.finish();
        assert_eq!(tally, verify(&exe, tally.rounds));
    }
}

/// The main command, with nothing prepared.
#[test]
fn optimize_does_it_all() {
    let victim = match start("switches") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    let text = Text::new(pid);
    // What does not pay is taken out again, and on a busy machine that may be measured: both ends are right.
    d.run(&["optimize", "-p", &pid.to_string(), "--duration", "500ms", "--json"]).expect_done();
    let changed = !text.patches(pid).is_empty();
    assert_eq!(changed, d.state(pid) != "undynimized", "status and text disagree");
    dyni::run(Command::new(dyni::BINARY).args(["undo", "-p", &pid.to_string()]).arg("--archive").arg(d.archive()))
        .expect(if changed { &[0] } else { &[0, 3] });
    text.assert_pristine(pid, "after undo");
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// The detours of the victim `usual` are seen, and its copies go past them.
#[test]
fn calls_through_pointers_and_tables_go_straight_to_copies() {
    let victim = match start("usual") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    d.make_plan(pid, "2s");
    let did = |function: &str, pass: &str| {
        let out = d.run(&["analyze", "--explain", function]);
        out.expect_done();
        let line = out.stdout.lines().find(|l| l.trim_start().starts_with(&format!("{pass}: "))).map(str::to_owned);
        line.unwrap_or_else(|| panic!("no pass {pass} in {}", out.stdout))
    };
    for function in ["by_memory", "by_register", "by_jump", "by_turns"] {
        let line = did(function, "promote");
        assert!(!line.contains(" 0 of them promoted"), "{function}: {line}");
    }
    assert!(
        did("by_table", "tables").contains("1 of them through tables of the copies"),
        "{}",
        did("by_table", "tables")
    );
    assert!(!did("by_stub", "plt").contains(" 0 calls past"), "{}", did("by_stub", "plt"));
    d.apply(pid).expect_done();
    thread::sleep(Duration::from_millis(300));
    d.undo(pid).expect_done();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// Where the time goes in a program that runs in its copies, by the addresses of the file.
#[test]
fn a_recording_of_a_dynimized_program_names_the_originals() {
    let victim = match start("endless") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    let plain = d.make_plan(pid, "500ms");
    assert_eq!(plain["in_cache"], 0, "{plain:#}");
    d.apply(pid).expect_done();
    let through = d.record(pid, "500ms");
    let of = |report: &serde_json::Value, field: &str| report[field].as_u64().unwrap_or_default();
    assert!(of(&through, "in_cache") * 2 > of(&through, "samples"), "{through:#}");
    assert!(of(&through, "outside") * 20 < of(&through, "samples"), "{through:#}");
    assert_eq!(through["modules"][0]["build_id"], plain["modules"][0]["build_id"], "{through:#}");
    d.undo(pid).expect_done();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}
