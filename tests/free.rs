//! Generations that are out of force are freed when nothing refers to them any more, and not before.

mod common;

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::build::{self, variant};
use common::dyni::{Dyni, Outcome};
use common::memory::{Text, maps};
use common::process::{PATIENCE, Victim, verify};
use dyni_applier::WATCH_FAILPOINTS;
use nix::sys::signal::Signal;
use procfs::process::MMPermissions;
use serde_json::Value;

fn start(name: &str) -> Result<Victim, String> {
    Victim::start(&build::victim(name, &variant::gcc_o2)?)
}

/// How many mappings a process has that may hold copies, and how many bytes: executable ones of no file.
fn copies(pid: i32) -> (usize, u64) {
    let is_copy = |m: &&procfs::process::MemoryMap| {
        m.perms.contains(MMPermissions::EXECUTE) && m.pathname == procfs::process::MMapPath::Anonymous
    };
    let all = maps(pid);
    let copies: Vec<_> = all.iter().filter(is_copy).collect();
    (copies.len(), copies.iter().map(|m| m.address.1 - m.address.0).sum())
}

/// All that a process has mapped: how many mappings, how many bytes.
fn mapped(pid: i32) -> (usize, u64) {
    let all = maps(pid);
    (all.len(), all.iter().map(|m| m.address.1 - m.address.0).sum())
}

/// What an undo has freed, bytes.
fn freed(out: &Outcome) -> u64 {
    let json = out.json();
    let processes = json["processes"].as_array().cloned().unwrap_or_default();
    processes.iter().filter_map(|p| p["freed_bytes"].as_u64()).sum()
}

/// Why generations were kept by an undo.
fn kept(out: &Outcome) -> Vec<String> {
    let json = out.json();
    let processes = json["processes"].as_array().cloned().unwrap_or_default();
    let all = processes.iter().flat_map(|p| p["kept"].as_array().cloned().unwrap_or_default());
    all.map(|k| k["reason"].as_str().unwrap_or("?").to_owned()).collect()
}

fn undo_and_free(d: &Dyni, pid: i32) -> Outcome {
    d.run(&["undo", "-p", &pid.to_string(), "--free", "--json"])
}

/// Undoes until nothing is left to be freed: what a stack holds from calls that have returned takes its time to go, and on
/// a busy machine a look may be broken off.
fn undo_until_freed(d: &Dyni, victim: &mut Victim) {
    let (pid, deadline) = (victim.pid(), Instant::now() + PATIENCE);
    let mut last = Vec::new();
    while copies(pid).0 > 0 {
        assert!(Instant::now() < deadline, "copies of {} are never freed: {last:?}", victim.exe.display());
        let out = undo_and_free(d, pid);
        out.expect_done();
        last = kept(&out);
        victim.assert_serving("between two undos");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A context that was saved in a copy keeps it, for as long as it is there, and goes on in it.
#[test]
fn what_a_saved_context_refers_to_is_kept_until_it_is_gone() {
    let mut victim = match start("holds") {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    let text = Text::new(pid);
    make_plan_alone(&d, &mut victim, &text);
    for round in 0..4 {
        apply_and_hold(&d, &mut victim);
        for _ in 0..5 {
            assert_is_kept(&undo_and_free(&d, pid), &text, &mut victim);
        }
        let status = d.run(&["status", "-p", &pid.to_string(), "--json"]).json();
        let modules = status["processes"][0]["modules"].as_array().cloned().unwrap_or_default();
        let told = |m: &Value| m["kept"].as_str().is_some_and(|k| k.contains("refers to it"));
        assert!(modules.iter().any(told), "round {round}: status does not say why it is kept: {status:#}");
        if round % 2 == 1 {
            // It is in use again, and nobody minds the context.
            d.apply(pid).expect_done();
        }
        let_go_and_free(&d, &mut victim, &text);
    }
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// In a process with more memory than can be looked through in a stop, most of it is looked through before. What comes to
/// be in memory that was looked through already is found in the stop: a context that is nowhere to be seen until the very
/// last moment keeps the copy. And where a dyni dies that watches, the next one does all.
#[test]
fn what_is_written_after_it_was_looked_through_is_found() {
    if !watches() {
        skip!("this kernel does not tell what a process has written (Linux 6.7 does)");
    }
    let exe = match build::victim("holds", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let victim = Victim::start_with(&exe, Command::new(&exe).arg("--forever").env("HOARD", "192"));
    let (mut victim, d) = (victim.expect("a victim of which one is built"), Dyni::new());
    let (pid, undo) = (victim.pid(), ["undo", "-p", &victim.pid().to_string(), "--free", "--json"]);
    let text = Text::new(pid);
    make_plan_alone(&d, &mut victim, &text);
    for _ in 0..4 {
        apply_and_hold(&d, &mut victim);
        assert_is_kept(&undo_and_free(&d, pid), &text, &mut victim);
        for _ in 0..3 {
            victim.signal(Signal::SIGUSR1);
            victim.wait_for_line("hidden");
            let out = d.run_failing("free:looked:hang-up-target", &undo);
            assert_is_kept(&out, &text, &mut victim);
            victim.wait_for_line("disclosed");
        }
        let_go_and_free(&d, &mut victim, &text);
    }
    for point in WATCH_FAILPOINTS {
        d.apply(pid).expect_done();
        let out = d.run_failing(point, &undo);
        assert_eq!(out.code(), None, "{point} was not passed: {out:?}");
        victim.assert_serving(point);
        undo_until_freed(&d, &mut victim);
        text.assert_pristine(pid, point);
    }
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

/// A plan, and nothing left of the counting for it.
fn make_plan_alone(d: &Dyni, victim: &mut Victim, text: &Text) {
    d.make_plan(victim.pid(), "300ms");
    victim.signal(Signal::SIGUSR1);
    victim.wait_for_line("held");
    let_go_and_free(d, victim, text);
}

fn apply_and_hold(d: &Dyni, victim: &mut Victim) {
    let pid = victim.pid();
    d.apply(pid).expect_done();
    assert_eq!(copies(pid).0, 1, "one generation was applied");
    victim.signal(Signal::SIGUSR1);
    victim.wait_for_line("held");
}

fn assert_is_kept(out: &Outcome, text: &Text, victim: &mut Victim) {
    let pid = victim.pid();
    out.expect_done();
    text.assert_pristine(pid, "while a context is held");
    assert!(copies(pid).0 > 0, "the copies that a context refers to were unmapped: {out:#?}");
    victim.assert_serving("while a context is held");
}

fn let_go_and_free(d: &Dyni, victim: &mut Victim, text: &Text) {
    let pid = victim.pid();
    victim.signal(Signal::SIGUSR2);
    victim.wait_for_line("let go");
    undo_until_freed(d, victim);
    text.assert_pristine(pid, "when it was freed");
    let status = d.run(&["status", "-p", &pid.to_string(), "--json"]).json();
    assert_eq!(status["processes"][0]["modules"].as_array().map(Vec::len), Some(0), "{status:#}");
}

/// Whether the kernel knows userfaultfd's asynchronous write protection.
fn watches() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(7))
}

/// Generations, each of another plan, leave nothing behind that grows. A few may be there yet at the end: a loop that never
/// returns stays where it is, and a stack may hold for long what calls have left there that have returned.
fn many_generations(name: &str, count: u32) {
    const GENERATION: u64 = (2 << 20) + (256 << 10);
    const LEFT: usize = 6;
    let mut victim = match start(name) {
        Ok(v) => v,
        Err(reason) => skip!("{reason}"),
    };
    let (pid, exe, d) = (victim.pid(), victim.exe.clone(), Dyni::new());
    let text = Text::new(pid);
    let before = mapped(pid);
    let (mut plans, mut bytes) = (std::collections::BTreeSet::new(), 0);
    for generation in 0..count {
        d.make_plan(pid, "40ms");
        let out = d.apply(pid);
        // A recording that saw next to nothing makes no plan that can be applied.
        out.expect(if generation == 0 { &[0] } else { &[0, 3] });
        if out.code() == Some(0) {
            plans.insert(out.json()["plan"].as_str().expect("a plan has an id").to_owned());
        }
        let out = d.undo(pid);
        out.expect_done();
        bytes += freed(&out);
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while copies(pid).0 > 0 && Instant::now() < deadline {
        bytes += freed(&undo_and_free(&d, pid));
    }
    let (after, left) = (mapped(pid), copies(pid));
    text.assert_pristine(pid, "after the last generation");
    println!("{name}: {} plans, {bytes} bytes freed by undo, mapped {before:?} before, {after:?} after", plans.len());
    assert!(plans.len() as u32 > count / 2, "only {} different plans", plans.len());
    assert!(left.0 <= LEFT, "{left:?} copies are left");
    assert!(
        after.0 <= before.0 + 4 * LEFT && after.1 <= before.1 + LEFT as u64 * GENERATION,
        "{before:?} has become {after:?}"
    );
    victim.assert_serving("after the last generation");
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));
}

#[test]
fn a_hundred_generations_leave_nothing() {
    many_generations("switches", 100);
}

/// The same where the unwinder is told of each and has to forget it.
#[test]
fn generations_leave_nothing_in_the_unwinder() {
    many_generations("exceptions", 40);
}
