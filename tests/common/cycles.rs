//! The main end-to-end test: apply and undo at random moments while the victim works, and look at everything from
//! outside each time.

use std::thread;
use std::time::{Duration, Instant};

use super::build::{self, Variant};
use super::dyni::{Dyni, Outcome};
use super::memory::{RwxGuard, Text, program_counters};
use super::process::{PATIENCE, Victim, descendants, verify};
use super::rng::Rng;

/// What is expected of dyni on a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It patches the program's functions.
    Served,
    /// The same, and the harness may stop the threads to see where they are: no system call minds.
    Watched,
    /// The same, and the work is one endless loop that must be found in the copy.
    InCopy,
    /// It patches something, in a library if most of the time is spent there.
    Somewhere,
    /// It may refuse all of it, with the reason; what it does patch must be right.
    Maybe,
    /// The process changes its image or its children come and go, so a try may fail, cleanly.
    Racing,
}

impl Expect {
    /// Whether functions of the program itself must be patched.
    fn is_own_code(self) -> bool {
        matches!(self, Self::Served | Self::Watched | Self::InCopy)
    }
}

/// How hard to try.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Applies and undos.
    pub cycles: u32,
    /// The longest wait before each.
    pub pause: Duration,
    /// How long to record.
    pub record: &'static str,
    /// How long to record for an `optimize` at the end, which lets two generations take turns for twice as long.
    pub optimize: Option<&'static str>,
}

impl Effort {
    /// For the compiler and level that stands for all.
    pub const FULL: Self =
        Self { cycles: 50, pause: Duration::from_millis(30), record: "500ms", optimize: Some("300ms") };
    /// For the others: as many cycles, closer together.
    pub const SHORT: Self = Self { cycles: 50, pause: Duration::from_millis(6), record: "250ms", optimize: None };

    /// `DYNI_TEST_CYCLES` overrides the count, for a soak or a quick look.
    fn cycles(self) -> u32 {
        std::env::var("DYNI_TEST_CYCLES").ok().and_then(|v| v.parse().ok()).unwrap_or(self.cycles)
    }
}

/// Builds a victim and puts it through the cycles; says so where the machine can't.
pub fn run(name: &str, variant: &Variant, expect: Expect, effort: Effort) {
    let label = format!("{name} {} {}", variant.compiler, variant.tag);
    let exe = match build::victim(name, variant) {
        Ok(exe) => exe,
        Err(reason) => crate::skip!("{label}: {reason}"),
    };
    let victim = match Victim::start(&exe) {
        Ok(v) => v,
        Err(reason) => crate::skip!("{label}: {reason}"),
    };
    Run::new(label, victim, expect, effort).run();
}

/// One victim's cycles.
pub struct Run {
    label: String,
    victim: Victim,
    expect: Expect,
    effort: Effort,
    text: Text,
    dyni: Dyni,
    rng: Rng,
    rewrites: bool,
    functions: u64,
    applied: u32,
    stops: Vec<u64>,
    seen: (usize, usize),
    times: (Duration, Duration),
    gain: String,
}

impl Run {
    /// For a victim that is ready.
    pub fn new(label: String, victim: Victim, expect: Expect, effort: Effort) -> Self {
        let mut text = Text::new(victim.pid());
        let own = victim.preamble.iter().find_map(|l| l.strip_prefix("rewrites "));
        if let Some(words) = own {
            let at: Vec<u64> = words.split(' ').filter_map(|w| u64::from_str_radix(w, 16).ok()).collect();
            text = text.ignoring(at[2]..at[2] + 4);
        }
        let rewrites = own.is_some();
        let rng = Rng::new(&label);
        let (dyni, zero) = (Dyni::new(), Duration::ZERO);
        let (stops, seen, times, gain) = (Vec::new(), (0, 0), (zero, zero), String::new());
        Self {
            label,
            victim,
            expect,
            effort,
            text,
            dyni,
            rng,
            rewrites,
            functions: 0,
            applied: 0,
            stops,
            seen,
            times,
            gain,
        }
    }

    /// All cycles, and the checksum at the end.
    pub fn run(mut self) {
        let pid = self.victim.pid();
        // A program that makes its own text rwx would be found instead of dyni.
        let guard = (!self.rewrites).then(|| RwxGuard::start(pid));
        self.make_plan();
        for cycle in 0..self.effort.cycles() {
            self.cycle(cycle);
        }
        if let Some(duration) = self.effort.optimize {
            self.optimize(duration);
        }
        if let Some(guard) = guard {
            guard.assert_none();
        }
        self.finish();
    }

    /// Records until there is a plan that can be applied: on a crowded machine a recording may see too little, and a
    /// victim with a storm of threads or processes may show one of them, in a library.
    fn make_plan(&mut self) {
        let pid = self.victim.pid().to_string();
        let (codes, attempts): (&[i32], _) = if self.expect == Expect::Maybe { (&[0, 3], 4) } else { (&[0], 10) };
        for attempt in 1..=attempts {
            let last = attempt == attempts;
            let recorded = self.dyni.run(&["record", "-p", &pid, "--duration", self.effort.record]);
            if !last && (recorded.starved() || self.expect == Expect::Racing) && recorded.code() != Some(0) {
                continue;
            }
            recorded.expect(codes);
            // Functions that are not worth a copy must be right as copies, too.
            self.dyni
                .run(&["analyze", "--passes", "infer,split,exttsp,entries,plt,tables,promote,cdsort"])
                .expect(codes);
            // A victim that sleeps most of the time may have been seen in a library alone.
            let would = self.dyni.run(&["apply", "-p", &pid, "--dry-run", "--json"]);
            let own = self.expect.is_own_code().then_some(self.victim.module.as_str());
            if would.code() == Some(0) && (would.functions(own) > 0 || own.is_none()) {
                break;
            }
        }
        self.victim.assert_alive("after recording");
    }

    fn cycle(&mut self, cycle: u32) {
        let pid = self.victim.pid();
        let label = self.label.clone();
        let when = |what: &str| format!("{label}, cycle {cycle}, {what}");
        let look = cycle.is_multiple_of(5);
        self.rng.sleep(self.effort.pause);
        let out = self.dyni.apply(pid);
        self.victim.assert_alive(&when("after apply"));
        self.times.0 += out.took;
        if !self.judge_apply(&out) {
            self.text.assert_pristine(pid, &when(&format!("after {out:?}")));
            return;
        }
        self.rng.sleep(self.effort.pause);
        if look && self.expect != Expect::Racing {
            self.look_while_applied(&out, &when("applied"));
        }
        let out = self.dyni.undo(pid);
        self.times.1 += out.took;
        self.victim.assert_alive(&when("after undo"));
        out.expect(if self.expect == Expect::Racing { &[0, 1, 3] } else { &[0] });
        if self.expect == Expect::Racing {
            self.assert_settles(&when("after undo"));
            return;
        }
        self.text.assert_pristine(pid, &when("after undo"));
        self.text.assert_protections(pid, &when("after undo"));
        if look {
            assert_eq!(self.dyni.state(pid), "undynimized", "{}", when("after undo"));
        }
    }

    /// The main command, on a program that has been through it all. Whatever it finds that the plan gains, nothing of it
    /// may be left after an undo.
    fn optimize(&mut self, duration: &str) {
        let pid = self.victim.pid();
        let label = self.label.clone();
        let out = self.dyni.run(&["optimize", "-p", &pid.to_string(), "--duration", duration, "--json"]);
        self.victim.assert_alive(&format!("{label}, after optimize"));
        let racing = self.expect == Expect::Racing || out.starved();
        match self.expect {
            _ if racing => out.expect(&[0, 1, 3]),
            // Unlike the cycles before, it leaves out what is not worth a copy, and that may be all there is.
            _ if out.stderr.contains("jump tables more often") => out.expect(&[3]),
            // Its unwinder could not be told: on a busy machine no thread was met at a safe point in time.
            _ if out.stderr.contains("unwind data not registered") => out.expect(&[3]),
            Expect::Maybe => out.expect(&[0, 3]),
            _ => out.expect_done(),
        }
        if out.code() == Some(0) && !racing {
            let json = out.json();
            let changed = !self.text.patches(pid).is_empty();
            assert_eq!(changed, json["state"] != "undynimized", "{label}: {out:#?}");
            assert!(json["gain"].is_object() != json["not_measured"].is_string(), "{label}: {out:#?}");
            assert!(changed || json["gain"]["ratio"].as_f64() < Some(1.0), "{label}: taken out for nothing: {out:#?}");
            self.gain = format!("{} {}", json["gain"], json["not_measured"]);
        }
        self.dyni.undo(pid).expect(if racing { &[0, 1, 3] } else { &[0, 3] });
        if self.expect == Expect::Racing {
            self.assert_settles(&format!("{label}, after optimize and undo"));
        }
    }

    /// Whether anything was patched. Panics where it had to be and wasn't.
    fn judge_apply(&mut self, out: &Outcome) -> bool {
        match self.expect {
            Expect::Racing => out.expect(&[0, 1, 3]),
            // Nothing of it may have been worth a plan.
            Expect::Maybe if out.stderr.contains("the archive has none") => out.expect(&[1]),
            Expect::Maybe => out.expect(&[0, 3]),
            _ => out.expect_done(),
        }
        if out.code() != Some(0) {
            return false;
        }
        self.applied += 1;
        self.functions = self.functions.max(out.functions(None));
        self.stops.push(out.stop_ns());
        if self.expect.is_own_code() {
            let name = self.victim.module.as_str();
            assert!(out.functions(Some(name)) > 0, "nothing of {name} was patched: {out:#?}");
        }
        out.functions(None) > 0
    }

    fn look_while_applied(&mut self, out: &Outcome, when: &str) {
        let pid = self.victim.pid();
        let changed = !self.text.patches(pid).is_empty();
        assert_eq!(changed, out.functions(None) > 0, "{when}: apply's count and the text disagree: {out:#?}");
        let state = self.dyni.state(pid);
        assert!(state == "dynimized" || state == "partly dynimized", "{when}: the state is {state:?}");
        if matches!(self.expect, Expect::Watched | Expect::InCopy) {
            for _ in 0..4 {
                let at = program_counters(pid);
                self.seen.1 += at.len();
                self.seen.0 += at.iter().filter(|a| self.text.is_copy(pid, **a)).count();
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// A child that was forked while the undo ran may still end with patches; one that is born later may not have any.
    fn assert_settles(&self, when: &str) {
        let pid = self.victim.pid();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let dirty = |p: &i32| !self.text.patches(*p).is_empty();
            if !dirty(&pid) && !descendants(pid).iter().any(dirty) {
                return;
            }
            assert!(Instant::now() < deadline, "{when}: patched text remains in {pid} or a child of it");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn finish(mut self) {
        let pid = self.victim.pid();
        self.victim.assert_serving("after the last cycle");
        self.text.assert_pristine(pid, "at the end");
        let cycles = self.effort.cycles();
        if self.expect != Expect::Maybe {
            assert!(self.applied > 0 && self.functions > 0, "{}: never patched in {cycles} cycles", self.label);
        }
        if self.expect == Expect::InCopy {
            let (inside, all) = self.seen;
            assert!(inside * 2 > all, "{}: the loop was seen in the copy {inside} times of {all}", self.label);
        }
        let exe = self.victim.exe.clone();
        let Self { victim, label, gain, .. } = self;
        let tally = victim.finish();
        assert_eq!(tally, verify(&exe, tally.rounds), "{label}: wrong checksum");
        self.stops.sort_unstable();
        let at = |i: usize| self.stops.get(i).copied().unwrap_or(0) as f64 / 1e6;
        let last = self.stops.len().saturating_sub(1);
        let each = |d: Duration| d.as_secs_f64() * 1e3 / f64::from(cycles.max(1));
        println!(
            "{label}: {}/{cycles} applied, {} functions, stop median {:.2} ms max {:.2} ms, apply {:.0} ms undo {:.0} ms, \
             {}/{} in copies, {} rounds, gain {}",
            self.applied,
            self.functions,
            at(last / 2),
            at(last),
            each(self.times.0),
            each(self.times.1),
            self.seen.0,
            self.seen.1,
            tally.rounds,
            gain
        );
    }
}
