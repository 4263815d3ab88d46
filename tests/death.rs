//! dyni killed at every step, and its target killed at every step.
//!
//! `DYNI_FAILPOINT=name` makes dyni kill itself there with SIGKILL, `name:kill-target` its target; `--list-failpoints`
//! names them all. Whatever is left, a later dyni must know it and undo it, and the target must have noticed nothing.

mod common;

use std::process::Stdio;
use std::time::{Duration, Instant};

use common::build::{self, variant};
use common::dyni::{Dyni, Outcome};
use common::memory::Text;
use common::process::{Victim, verify};
use common::rng::Rng;

/// A plan for a victim, made once.
fn plan(name: &str) -> Result<Dyni, String> {
    let victim = start(name)?;
    let dyni = Dyni::new();
    dyni.make_plan(victim.pid(), "300ms");
    Ok(dyni)
}

/// A fresh victim that nobody has touched: the first apply to a process takes steps that later ones don't need.
struct Case<'a> {
    victim: Victim,
    text: Text,
    dyni: &'a Dyni,
    name: &'static str,
}

impl<'a> Case<'a> {
    fn new(name: &'static str, dyni: &'a Dyni) -> Result<Self, String> {
        let victim = start(name)?;
        let text = Text::new(victim.pid());
        Ok(Self { victim, text, dyni, name })
    }

    /// dyni has died: the target serves, status tells the truth, undo puts everything back, and apply works again.
    fn assert_recovers(&mut self, when: &str) {
        let pid = self.victim.pid();
        self.victim.assert_serving(when);
        let changed = self.text.patches(pid);
        let state = self.dyni.state(pid);
        let says = ["dynimized", "partly dynimized", "profiling"].contains(&&*state);
        assert_eq!(says, !changed.is_empty(), "{when}: status says {state:?}, the text differs at {changed:x?}");
        // Nothing to undo may be said with 3.
        self.dyni.undo(pid).expect(if says { &[0] } else { &[0, 3] });
        self.text.assert_pristine(pid, when);
        self.text.assert_protections(pid, when);
        assert_eq!(self.dyni.state(pid), "undynimized", "{when}, after undo");
        let again = self.dyni.apply(pid);
        again.expect_done();
        assert!(again.functions(None) > 0, "{when}: nothing was patched the next time: {again:#?}");
        self.victim.assert_serving(when);
        self.dyni.undo(pid).expect_done();
        self.text.assert_pristine(pid, when);
    }

    fn finish(self) {
        let exe = self.victim.exe.clone();
        let tally = self.victim.finish();
        assert_eq!(tally, verify(&exe, tally.rounds), "{}: wrong checksum", self.name);
    }
}

fn start(name: &str) -> Result<Victim, String> {
    Victim::start(&build::victim(name, &variant::gcc_o2)?)
}

/// The names of all failpoints, or the reason for which there are none.
fn failpoints(dyni: &Dyni) -> Result<Vec<String>, String> {
    let points = dyni.failpoints();
    if points.is_empty() { Err("dyni lists no failpoints".into()) } else { Ok(points) }
}

/// The commands on whose way a failpoint may be.
fn verbs(point: &str) -> &'static [&'static str] {
    match point.split(':').next() {
        Some("swap") => &["optimize"],
        Some("free") => &["undo"],
        _ => &["apply", "undo"],
    }
}

/// How often a command is run until it passes a point: what a stack holds from calls that have returned keeps a generation
/// for a while.
fn tries(point: &str) -> usize {
    if point.starts_with("free:") { 200 } else { 1 }
}

fn run_failing(dyni: &Dyni, point: &str, verb: &str, pid: i32) -> Outcome {
    let pid = pid.to_string();
    let options: &[&str] = match verb {
        "optimize" => &["--duration", "300ms"],
        "undo" if point.starts_with("free:") => &["--free"],
        _ => &[],
    };
    dyni.run_failing(point, &[&[verb, "-p", &pid], options].concat())
}

/// Walks all failpoints of `apply` and `undo` and returns how many were on the way.
fn walk(name: &'static str) -> Result<usize, String> {
    let dyni = plan(name)?;
    let points = failpoints(&dyni)?;
    let mut reached = Vec::new();
    for point in &points {
        for verb in verbs(point) {
            let mut case = Case::new(name, &dyni)?;
            let pid = case.victim.pid();
            if *verb == "undo" {
                dyni.apply(pid).expect_done();
            }
            let mut out = run_failing(&dyni, point, verb, pid);
            for _ in 1..tries(point) {
                if out.was_killed() {
                    break;
                }
                out.expect_done();
                dyni.apply(pid).expect_done();
                out = run_failing(&dyni, point, verb, pid);
            }
            if out.was_killed() {
                reached.push(format!("{verb}:{point}"));
                case.assert_recovers(&format!("{name}: dyni killed at {point} of {verb}"));
            } else {
                // Not on this command's way: then it has done what it was asked.
                out.expect_done();
                case.victim.assert_serving(point);
                dyni.undo(pid).expect(&[0, 3]);
                case.text.assert_pristine(pid, point);
            }
            case.finish();
        }
    }
    let missed: Vec<_> = points.iter().filter(|p| !reached.iter().any(|r| r.ends_with(&format!(":{p}")))).collect();
    println!(
        "{name}: {} of {} failpoints reached; not on the way: {missed:?}",
        points.len() - missed.len(),
        points.len()
    );
    assert!(missed.is_empty(), "{name}: failpoints that nothing reaches: {missed:?}");
    Ok(reached.len())
}

macro_rules! walks {
    ($($name:ident)*) => {
        $(
            mod $name {
                use super::*;

                #[test]
                fn dyni_killed_at_every_step() {
                    match walk(stringify!($name)) {
                        Ok(n) => assert!(n > 0, "no failpoint is on the way of apply or undo"),
                        Err(reason) => skip!("{}: {reason}", stringify!($name)),
                    }
                }

                #[test]
                fn target_killed_at_every_step() {
                    if let Err(reason) = kill_target(stringify!($name)) {
                        skip!("{}: {reason}", stringify!($name));
                    }
                }

                #[test]
                fn dyni_killed_at_random_moments() {
                    if let Err(reason) = kill_at_random(stringify!($name)) {
                        skip!("{}: {reason}", stringify!($name));
                    }
                }
            }
        )*
    };
}

// One thread; threads asleep in the kernel; a handler on an alternate stack at any moment; one that computes and throws, so
// that the unwinder is told of copies by a thread that does not wait.
walks! { switches blocked signals exceptions }

/// The target dies at each step: dyni says so and ends with 1, and does not hang, crash or claim success.
fn kill_target(name: &'static str) -> Result<(), String> {
    let dyni = plan(name)?;
    let mut reached = 0;
    for point in &failpoints(&dyni)? {
        for verb in verbs(point) {
            let mut victim = start(name)?;
            let pid = victim.pid();
            if *verb == "undo" {
                dyni.apply(pid).expect_done();
                victim.assert_alive("after apply");
            }
            let out = run_failing(&dyni, &format!("{point}:kill-target"), verb, pid);
            if out.code() == Some(0) {
                // Not on the way, or after the last look at the target: then it was done before the target died.
                continue;
            }
            reached += 1;
            out.expect_clear_error(&[1], &["exit", "gone", "ended", "died", "killed", "no such process", "no longer"]);
            victim.wait();
        }
    }
    println!("{name}: the target died at {reached} steps");
    assert!(reached > 0, "no failpoint killed a target");
    Ok(())
}

/// SIGKILL at moments that nobody has chosen as failpoints, on a process that has been through it and on fresh ones.
fn kill_at_random(name: &'static str) -> Result<(), String> {
    let dyni = plan(name)?;
    let mut rng = Rng::new(name);
    let mut case = Case::new(name, &dyni)?;
    let (mut killed, mut typical) = (0, Duration::from_millis(50));
    for n in 0..40 {
        if n % 2 == 1 {
            std::mem::replace(&mut case, Case::new(name, &dyni)?).finish();
        }
        let pid = case.victim.pid();
        let verb = if n % 5 == 4 { "undo" } else { "apply" };
        if verb == "undo" {
            dyni.apply(pid).expect_done();
        }
        let mut command = dyni.command(&[verb, "-p", &pid.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let began = Instant::now();
        let mut child = command.spawn().expect("run dyni");
        rng.sleep(typical);
        // It may be done already.
        let _ = child.kill();
        if child.wait().expect("wait for dyni").code().is_none() {
            killed += 1;
        } else {
            typical = began.elapsed();
        }
        case.assert_recovers(&format!("{name}: dyni killed at a random moment of {verb} {n}"));
    }
    println!("{name}: killed in {killed} of 40 runs");
    case.finish();
    Ok(())
}
