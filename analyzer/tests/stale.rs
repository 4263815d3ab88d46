//! A profile of one build serves the next: two versions of one program, made from source, each run to see what is true.
//!
//! The program is generated; so are its edits, of a given share of its functions. Both builds are stripped. What is true is
//! found out by single steps, which the program takes itself (the trap flag): every instruction of a run is counted. Then
//! three layouts of the new build are compared under what is true of it: the compiler's, the one made from its own profile,
//! and the one made from the old build's.

mod common;

use common::{Module, compile_with, has};
use dyni_analyzer::evaluate::{Worth, evaluate};
use dyni_analyzer::image::Image;
use dyni_analyzer::plan::{self, Options};
use dyni_analyzer::stale::{Carried, Rule, carry_over};
use dyni_schema::{Host, Method, ModuleProfile, Profile, Ranges, Samples};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::{Command, Stdio};

/// How many functions the program has.
const FUNCTIONS: u64 = 320;
/// They call each other in so many tiers, downwards.
const TIERS: u64 = 5;
/// How often the program calls one of its topmost functions.
const ROUNDS: u64 = 500;

/// What every version of the program begins with. Functions draw what decides their branches, so that an edit of one does
/// not change what others do.
const HEAD: &str = r#"
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <ucontext.h>
extern char __executable_start;
static unsigned ran[1 << 20];
static unsigned drawn;
static inline unsigned draw(void) { unsigned x = ++drawn * 2654435769u; x ^= x >> 15; x *= 2246822519u; return x ^ x >> 13; }
static void trap(int s, siginfo_t *i, void *u) {
  unsigned long at = ((ucontext_t *)u)->uc_mcontext.gregs[REG_RIP] - (unsigned long)&__executable_start;
  if (at < sizeof ran / sizeof *ran) ran[at]++;
}
"#;
/// The trap flag, on and off.
const STEP: &str =
    r#"__asm__ volatile("sub $128, %%rsp; pushf; xorl $256, (%%rsp); popf; add $128, %%rsp" ::: "cc", "memory");"#;

/// Numbers that look random, always the same ones for a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// One function's text; `edit` changes it somewhere.
fn function(i: u64, edit: Option<u64>) -> String {
    let mut r = Random(i * 7919 + 17);
    let statements = 3 + r.below(6);
    let edited = edit.map(|seed| (Random(seed ^ i).below(statements), Random(seed.wrapping_mul(31) ^ i).below(4)));
    // Some are small enough to be inlined: an edit of them is one of their callers, too.
    let attribute = if r.below(5) == 0 { "" } else { "__attribute__((noinline)) " };
    let mut text = format!(
        "static {attribute}unsigned f{i}(unsigned x, unsigned *m) {{\n  unsigned y = draw();\n  m[{}] += x;\n",
        r.below(64)
    );
    for s in 0..statements {
        let mut statement = statement(i, &mut r);
        match edited {
            Some((at, kind)) if at == s => match kind {
                0 => {
                    statement = format!(
                        "  if (__builtin_expect((y & 1023) == 77, 0)) {{ y = y * 33u + m[5]; m[6]++; }}\n{statement}"
                    )
                }
                1 => statement = format!("  y += m[(y >> 9) & 63] * 5u;\n{statement}"),
                2 => statement = format!("  for (unsigned k = 0; k < (y & 3); k++) m[k] ^= y + k;\n{statement}"),
                _ => statement = "  y = (y << 3) ^ (y >> 7) ^ m[9];\n".into(),
            },
            _ => {}
        }
        text.push_str(&statement);
    }
    text.push_str("  return y;\n}\n");
    text
}

fn statement(i: u64, r: &mut Random) -> String {
    let per_tier = FUNCTIONS / TIERS;
    let callee = |r: &mut Random| (i / per_tier + 1) * per_tier + r.below(per_tier);
    let (a, b, c) = (r.below(64), 1 + r.below(1 << 16), [1, 3, 7, 15, 31][r.below(5) as usize]);
    match r.below(7) {
        0 => format!(
            "  if ((y >> {}) & {c}) {{ y += m[{a}] + {b}u; }} else {{ y = y * {b}u + 7u; m[{a}] ^= y; }}\n",
            r.below(9)
        ),
        1 => format!(
            "  for (unsigned k = 0; k < ((y >> 5) & {c}); k++) {{ if ((k ^ y) & 4) m[k & 63] += y; else y += m[{a}]; }}\n"
        ),
        2 => format!(
            "  switch ((y >> {}) & 7) {{ case 0: y += {b}u; break; case 1: m[{a}] += y; break; case 2: case 5: y ^= m[{a}]; break; case 3: y = ~y; break; case 6: m[1]--; y -= 9; break; default: y *= 3u; }}\n",
            r.below(9)
        ),
        3 => format!("  if ((y & 255) == {}) {{ m[{a}] = y; y = y / 3u + {b}u; m[{a}] += y >> 3; }}\n", r.below(256)),
        4 => format!("  y ^= m[{a}] + (y >> 11) + {b}u;\n"),
        _ if i / per_tier + 1 < TIERS => {
            format!("  if ((y >> {}) & {c}) y += f{}(y + {b}u, m);\n", r.below(7), callee(r))
        }
        _ => format!("  m[{a}] += y; y = (y << 5) - y + {b}u;\n"),
    }
}

/// The program; the given share of its functions is edited, in per cent.
fn program(percent: u64) -> String {
    let mut mixed: Vec<u64> = (0..FUNCTIONS).collect();
    mixed.sort_by_key(|&i| Random(i + 2024).below(1 << 31) ^ Random((i + 1) * 77_777).below(1 << 31));
    let edited = &mixed[..(FUNCTIONS * percent).div_ceil(100) as usize];
    let mut text = String::from(HEAD);
    for i in (0..FUNCTIONS).rev() {
        text.push_str(&function(i, edited.contains(&i).then_some(percent * 1009 + 5)));
    }
    let top = FUNCTIONS / TIERS;
    text.push_str("static unsigned (*volatile tops[])(unsigned, unsigned *) = {");
    (0..top).for_each(|i| write!(text, "f{i},").expect("a string takes everything"));
    // The first ones are called more often than the last.
    let main = format!(
        "}};\nint main(void) {{ static unsigned m[64];
  struct sigaction a = {{ .sa_sigaction = trap, .sa_flags = SA_SIGINFO }}; sigaction(SIGTRAP, &a, 0);
  {STEP}
  for (unsigned n = 0; n < {ROUNDS}; n++) {{ unsigned t = n * 7 % {top}u; tops[t * (n % 61) / 61](n, m); }}
  {STEP}
  for (unsigned i = 0; i < sizeof ran / sizeof *ran; i++) if (ran[i]) printf(\"%u %u\\n\", i, ran[i]);
  return 0; }}\n"
    );
    text + &main
}

fn build(percent: u64, options: &[&str]) -> Vec<u8> {
    compile_with("gcc", &program(percent), "c", &[&["-O2", "-g0", "-w"], options].concat())
}

/// Runs a program: how often each of its instructions ran, by link address.
fn run(bytes: &[u8], module: &Module) -> BTreeMap<u64, u64> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("p");
    std::fs::write(&path, bytes).expect("it can be written");
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("it may be run");
    let out = Command::new(&path).stdin(Stdio::null()).output().expect("it runs");
    assert!(out.status.success(), "{out:?}");
    let text = String::from_utf8(out.stdout).expect("it prints numbers");
    let row = |l: &str| -> Option<(u64, u64)> {
        let (at, count) = l.split_once(' ')?;
        Some((at.parse::<u64>().ok()? + module.image.base().0, count.parse().ok()?))
    };
    text.lines().map(|l| row(l).expect("two numbers in a line")).collect()
}

/// What is true of a build, as a profile that was counted.
fn truth(bytes: &[u8], module: &Module) -> Profile {
    let ran = run(bytes, module);
    let mut ranges = Ranges::default();
    for f in module.functions.all() {
        if ran.range(f.start.0..f.end().0).next().is_none() {
            continue;
        }
        let Ok(graph) = dyni_analyzer::cfg::build(&module.image, &module.functions, &module.targets, f) else {
            continue;
        };
        for b in &graph.blocks {
            ranges.start.push(b.start.0);
            ranges.end.push(b.end.0 - 1);
            ranges.count.push(ran.get(&b.start.0).copied().unwrap_or(0));
        }
    }
    let seen = ModuleProfile { ranges, ..ModuleProfile::default() };
    profile(module, Method::Count, seen)
}

fn profile(module: &Module, method: Method, seen: ModuleProfile) -> Profile {
    let mut profile = Profile {
        program: "p".into(),
        label: String::new(),
        method,
        method_note: String::new(),
        host: Host::default(),
        start_s: 0,
        duration_ns: 0,
        frequency_hz: 0,
        processes: 1,
        threads: 1,
        samples: seen.samples.total(),
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![ModuleProfile { build_id: module.image.build_id().clone(), name: "p".into(), ..seen }],
    };
    plan::annotate(&mut profile, &[of(module)]);
    assert_eq!(profile.validate(), Ok(()));
    profile
}

fn of(module: &Module) -> plan::Module<'_> {
    plan::Module { image: &module.image, functions: &module.functions, targets: &module.targets }
}

fn parse(bytes: &[u8]) -> Module {
    Module::of(Image::parse(bytes.to_vec(), "p").expect("a good file"))
}

/// What comes of a profile of `old` for `new`, and what layouts of `new` are worth under what is true of it.
struct Outcome {
    carried: Carried,
    original: f64,
    best: f64,
    kept: f64,
}

impl Outcome {
    fn new(old: &Profile, new: &Module, truth: &Profile) -> Self {
        let (stale, mut carried) = carry_over(old, &[(old.modules[0].build_id.clone(), of(new))]);
        assert_eq!(stale.validate(), Ok(()));
        let options = Options::default();
        let layout = |p: &Profile| plan::analyze(p, &[of(new)], &options).expect("it can be analysed").plan;
        let worth = |p: &Profile| -> Worth { evaluate(&layout(p), truth, &[of(new)], &options).expect("it is sound") };
        let (own, theirs) = (worth(truth), worth(&stale));
        let carried = carried.pop().expect("one module");
        Self { carried, original: own.original.ext_tsp, best: own.planned.ext_tsp, kept: theirs.planned.ext_tsp }
    }

    fn score_kept(&self) -> f64 {
        self.kept / self.best
    }

    fn gain_kept(&self) -> f64 {
        (self.kept - self.original) / (self.best - self.original)
    }

    fn print(&self, what: &str) {
        let by: Vec<String> = Rule::ALL.iter().map(|&r| format!("{} {}", self.carried.found_by(r), r.name())).collect();
        println!(
            "{what}: {} of {} functions found ({}), counts carried over {:.3}, layout score kept {:.3}, of the gain {:.3}",
            self.carried.functions.iter().filter(|f| f.now.is_some()).count(),
            self.carried.functions.len(),
            by.join(", "),
            self.carried.share(),
            self.score_kept(),
            self.gain_kept()
        );
    }
}

#[test]
fn a_profile_of_the_old_build_serves_the_new_one() {
    if !has("gcc") {
        return;
    }
    let strip = ["-s"];
    let bytes = build(0, &strip);
    let old = parse(&bytes);
    let before = truth(&bytes, &old);
    for (percent, least_carried, least_kept) in [(1, 0.95, 0.97), (5, 0.9, 0.9), (20, 0.75, 0.8)] {
        let bytes = build(percent, &strip);
        let new = parse(&bytes);
        assert_ne!(new.image.build_id(), old.image.build_id());
        let after = truth(&bytes, &new);
        let outcome = Outcome::new(&before, &new, &after);
        outcome.print(&format!("{percent} % of the functions edited"));
        assert!(outcome.best > outcome.original * 1.02, "a layout of its own must be worth something");
        assert!(outcome.carried.share() >= least_carried, "carried over: {}", outcome.carried.share());
        assert!(outcome.score_kept() >= least_kept, "score kept: {}", outcome.score_kept());
        // A profile without any matching would leave everything as it was.
        assert!(outcome.gain_kept() > 0.5, "gain kept: {}", outcome.gain_kept());

        // As it would be after two years of clock samples: no counts, addresses only.
        let sampled = |p: &Profile, m: &Module| {
            let r = &p.modules[0].ranges;
            let rows: Vec<(u64, u64)> =
                r.start.iter().copied().zip(r.count.iter().copied()).filter(|c| c.1 > 0).collect();
            let samples =
                Samples { addr: rows.iter().map(|s| s.0).collect(), count: rows.iter().map(|s| s.1).collect() };
            profile(m, Method::Clock, ModuleProfile { samples, ..ModuleProfile::default() })
        };
        let outcome = Outcome::new(&sampled(&before, &old), &new, &sampled(&after, &new));
        outcome.print(&format!("{percent} %, by samples"));
        assert!(outcome.carried.share() >= least_carried, "carried over: {}", outcome.carried.share());
        assert!(outcome.score_kept() >= least_kept - 0.05, "score kept: {}", outcome.score_kept());
    }
}
