//! Text on huge pages: a program's own code moved to other memory and back while it runs, dyni killed at every step, and
//! a plan on top of it.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::build::{self, variant};
use common::dyni::{Dyni, Outcome};
use common::memory::{RwxGuard, Text, maps};
use common::process::{Victim, verify};
use common::rng::Rng;
use dyni_applier::TEXT_FAILPOINTS;
use procfs::process::MMPermissions;

/// The victim, what its text was before anybody touched it, and a dyni.
struct Case {
    victim: Victim,
    text: Text,
    code: Vec<(u64, Vec<u8>)>,
    dyni: Dyni,
}

impl Case {
    fn new(name: &str) -> Result<Self, String> {
        let victim = Victim::start(&build::victim(name, &variant::gcc_o2)?)?;
        let (text, code) = (Text::new(victim.pid()), code(victim.pid()));
        Ok(Self { victim, text, code, dyni: Dyni::new() })
    }

    fn huge_text(&self) -> Outcome {
        self.dyni.run(&["apply", "-p", &self.victim.pid().to_string(), "--only", "huge-text", "--json"])
    }

    /// Bytes of the executable's text on huge pages, as `status` has it.
    fn moved(&self) -> u64 {
        let out = self.dyni.run(&["status", "-p", &self.victim.pid().to_string(), "--json"]);
        out.expect_done();
        let modules = &out.json()["processes"][0]["huge_text"];
        let bytes = modules.as_array().into_iter().flatten().filter_map(|m| m["bytes"].as_u64());
        bytes.sum()
    }

    /// The code reads as it did, whatever lies behind it.
    fn assert_same_code(&self, when: &str) {
        let mem = File::open(format!("/proc/{}/mem", self.victim.pid())).expect("open its memory");
        for (start, bytes) in &self.code {
            let mut now = vec![0; bytes.len()];
            mem.read_exact_at(&mut now, *start).unwrap_or_else(|e| panic!("{when}: text at {start:#x}: {e}"));
            assert!(now == *bytes, "{when}: the text at {start:#x} differs from its files");
        }
    }

    fn assert_pristine(&self, when: &str) {
        let pid = self.victim.pid();
        assert_eq!(self.moved(), 0, "{when}");
        self.assert_same_code(when);
        self.text.assert_pristine(pid, when);
        self.text.assert_protections(pid, when);
    }

    fn finish(self) {
        let exe = self.victim.exe.clone();
        let tally = self.victim.finish();
        assert_eq!(tally, verify(&exe, tally.rounds), "wrong checksum");
    }
}

/// The text of the modules that are large enough to be moved, from memory.
fn code(pid: i32) -> Vec<(u64, Vec<u8>)> {
    let mem = File::open(format!("/proc/{pid}/mem")).expect("open its memory");
    let is_text = |m: &&procfs::process::MemoryMap| {
        m.inode != 0 && m.perms.contains(MMPermissions::EXECUTE) && m.address.1 - m.address.0 >= 4 << 20
    };
    let read = |m: &procfs::process::MemoryMap| {
        let mut bytes = vec![0; (m.address.1 - m.address.0) as usize];
        mem.read_exact_at(&mut bytes, m.address.0).expect("text can be read");
        (m.address.0, bytes)
    };
    maps(pid).iter().filter(is_text).map(read).collect()
}

/// Bytes of executable memory without a file. (The kernel's own pages are named in brackets.)
fn anonymous_code(pid: i32) -> u64 {
    let all = maps(pid);
    let ours = all.iter().filter(|m| {
        m.inode == 0
            && m.perms.contains(MMPermissions::EXECUTE)
            && matches!(m.pathname, procfs::process::MMapPath::Anonymous)
    });
    ours.map(|m| m.address.1 - m.address.0).sum()
}

macro_rules! case {
    ($name:literal) => {
        match Case::new($name) {
            Ok(case) => case,
            Err(reason) => skip!("{reason}"),
        }
    };
}

/// Whether this kernel gives huge pages at all; every other refusal is a failure.
fn refused_by_kernel(out: &Outcome) -> Option<String> {
    let kernels = out.stderr.contains("gives no huge pages") || out.stderr.contains("can't move the mapping of a file");
    (out.code() == Some(3) && kernels).then(|| out.stderr.trim().to_owned())
}

#[test]
fn there_and_back_while_it_runs() {
    let mut case = case!("bigtext");
    let pid = case.victim.pid();
    let guard = RwxGuard::start(pid);
    let mut rng = Rng::new("there_and_back");
    for cycle in 0..40 {
        let when = format!("cycle {cycle}");
        rng.sleep(Duration::from_millis(20));
        let out = case.huge_text();
        if let Some(reason) = refused_by_kernel(&out) {
            skip!("{reason}");
        }
        out.expect_done();
        let moved = case.moved();
        assert!(moved >= 8 << 20, "{when}: {moved} bytes were moved: {out:#?}");
        assert_eq!(anonymous_code(pid), moved, "{when}");
        case.assert_same_code(&when);
        case.victim.assert_serving(&when);
        if cycle % 4 == 0 {
            // What lies there already stays.
            case.huge_text().expect_done();
            assert_eq!(case.moved(), moved, "{when}");
        }
        rng.sleep(Duration::from_millis(20));
        case.dyni.undo(pid).expect_done();
        case.assert_pristine(&when);
        assert_eq!(anonymous_code(pid), 0, "{when}");
    }
    guard.assert_none();
    case.finish();
}

/// A plan finds its functions where they were, and its patches are refused nothing.
#[test]
fn a_plan_on_top_of_it() {
    let mut case = case!("bigtext");
    let pid = case.victim.pid();
    case.dyni.make_plan(pid, "300ms");
    for cycle in 0..20 {
        let when = format!("cycle {cycle}");
        let out = case.huge_text();
        if let Some(reason) = refused_by_kernel(&out) {
            skip!("{reason}");
        }
        out.expect_done();
        // Only what the plan's functions lie in.
        assert!((2 << 20..=4 << 20).contains(&case.moved()), "{when}: {out:#?}");
        let out = case.dyni.apply(pid);
        out.expect_done();
        assert!(out.functions(None) > 0, "{when}: nothing was patched: {out:#?}");
        case.victim.assert_serving(&when);
        assert!(case.moved() > 0, "{when}");
        case.dyni.undo(pid).expect_done();
        assert_eq!(case.moved(), 0, "{when}");
        case.text.assert_pristine(pid, &when);
        case.text.assert_protections(pid, &when);
    }
    case.finish();
}

/// Text that is patched is not moved: the patches would stay behind in what is put back.
#[test]
fn not_under_a_plan_that_is_in_force() {
    let case = case!("bigtext");
    let pid = case.victim.pid();
    case.dyni.make_plan(pid, "300ms");
    case.dyni.apply(pid).expect_done();
    case.huge_text().expect_clear_error(&[3], &["a plan is in force"]);
    assert_eq!(case.dyni.state(pid), "dynimized");
    case.dyni.undo(pid).expect_done();
    // What the patches left is private memory with the file's bytes; it is no obstacle.
    let out = case.huge_text();
    if let Some(reason) = refused_by_kernel(&out) {
        skip!("{reason}");
    }
    out.expect_done();
    case.dyni.undo(pid).expect_done();
    case.assert_pristine("after both");
    case.finish();
}

#[test]
fn a_small_program_is_refused_with_the_reason() {
    let case = case!("switches");
    let out = case.huge_text();
    // A large library would be moved on its own.
    if out.code() != Some(0) {
        out.expect_clear_error(&[3], &["2 MB"]);
    }
    case.dyni.undo(case.victim.pid()).expect(&[0, 3]);
    case.assert_pristine("after undo");
    case.finish();
}

fn killed_at(point: &str, verb: &str) -> Option<bool> {
    let mut case = Case::new("bigtext").ok()?;
    let pid = case.victim.pid();
    let id = pid.to_string();
    let when = format!("dyni killed at {point} of {verb}");
    let args: &[&str] =
        if verb == "undo" { &["undo", "-p", &id] } else { &["apply", "-p", &id, "--only", "huge-text"] };
    if verb == "undo" {
        case.huge_text().expect(&[0, 3]);
    }
    let out = case.dyni.run_failing(point, args);
    let killed = out.was_killed();
    case.victim.assert_serving(&when);
    case.assert_same_code(&when);
    case.dyni.undo(pid).expect(&[0, 3]);
    case.assert_pristine(&when);
    // Where the range for the copy was mapped and that was not written down, it stays, empty.
    assert!(point == "remote:syscall-left" || anonymous_code(pid) == 0, "{when}");
    case.huge_text().expect(&[0, 3]);
    case.victim.assert_serving(&when);
    case.dyni.undo(pid).expect(&[0, 3]);
    case.assert_pristine(&when);
    case.finish();
    Some(killed)
}

#[test]
fn dyni_killed_at_every_step() {
    let probe = case!("bigtext");
    if let Some(reason) = refused_by_kernel(&probe.huge_text()) {
        skip!("{reason}");
    }
    probe.finish();
    let remote = ["remote:trampoline-written", "remote:registers-set", "remote:syscall-left"];
    for point in TEXT_FAILPOINTS.iter().chain(&remote) {
        let reached = ["apply", "undo"].into_iter().filter_map(|verb| killed_at(point, verb)).filter(|k| *k).count();
        assert!(reached > 0, "{point} is on nobody's way");
    }
}

#[test]
fn target_killed_at_every_step() {
    let mut died = 0;
    for point in TEXT_FAILPOINTS {
        for verb in ["apply", "undo"] {
            let case = case!("bigtext");
            let id = case.victim.pid().to_string();
            if verb == "undo" {
                case.huge_text().expect(&[0, 3]);
            }
            let args: &[&str] =
                if verb == "undo" { &["undo", "-p", &id] } else { &["apply", "-p", &id, "--only", "huge-text"] };
            let out = case.dyni.run_failing(&format!("{point}:kill-target"), args);
            // Whether it was in time or not, dyni ends by itself, and says so if the process is gone.
            out.expect(&[0, 1, 3]);
            died += usize::from(out.code() == Some(1));
        }
    }
    assert!(died > 0, "no target died");
}
