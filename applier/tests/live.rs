//! A live C program, all of its functions copied with their blocks in a scrambled order, many times in and out.

use dyni_analyzer::cfg;
use dyni_analyzer::functions::{Functions, function_hash};
use dyni_analyzer::image::Image;
use dyni_analyzer::targets::TargetIndex;
use dyni_applier::{Applier, ApplyError, State, status, undo};
use dyni_schema::{FunctionPlan, ModulePlan, Plan, PlanKind};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PROGRAM: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <stdint.h>
#include <signal.h>
#include <pthread.h>
static volatile sig_atomic_t stop;
static void on_term(int s) { stop = 1; }
static uint64_t mix(uint64_t x) { x ^= x >> 33; x *= 0xff51afd7ed558ccdULL; return x ^ x >> 29; }
__attribute__((noinline)) static uint64_t pick(uint64_t x) {
    switch (x % 11) {
        case 0: return x + 1; case 1: return x * 3; case 2: return x ^ 0x55; case 3: return x >> 3;
        case 4: return x - 9; case 5: return mix(x); case 6: return ~x; case 7: return x * x;
        case 8: return x << 7 | x >> 57; case 9: return x + (x & 0xff); default: return x / 3;
    }
}
__attribute__((noinline)) static uint64_t deep(uint64_t x, int n) { return n ? mix(deep(pick(x), n - 1) + n) : x; }
__attribute__((noinline)) static int cmp(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}
static uint64_t round_of(uint64_t seed) {
    uint64_t a[64], sum = 0;
    for (int i = 0; i < 64; i++) a[i] = deep(seed + i, 20);
    qsort(a, 64, 8, cmp);
    for (int i = 0; i < 64; i++) sum = mix(sum + a[i] * i);
    return sum;
}
static void *work(void *p) {
    uint64_t *out = p, n = 0, sum = 0, expect = round_of(42);
    while (!stop) { sum = round_of(42); if (sum != expect) { puts("WRONG"); exit(9); } n++; }
    out[0] = n; out[1] = sum;
    return 0;
}
int main(int argc, char **argv) {
    int n = atoi(argv[1]);
    signal(SIGTERM, on_term);
    pthread_t t[16];
    uint64_t r[16][2];
    for (int i = 0; i < n; i++) pthread_create(&t[i], 0, work, r[i]);
    puts("ready"); fflush(stdout);
    for (int i = 0; i < n; i++) pthread_join(t[i], 0);
    for (int i = 0; i < n; i++) if (r[i][0] == 0 || r[i][1] != r[0][1]) { puts("WRONG"); return 9; }
    puts("right");
    return 0;
}
"#;

fn compile(dir: &Path, flags: &[&str]) -> PathBuf {
    let source = dir.join("program.c");
    std::fs::write(&source, PROGRAM).unwrap();
    let exe = dir.join("program");
    let status =
        Command::new("cc").args(flags).arg(&source).args(["-pthread", "-o"]).arg(&exe).status().expect("cc runs");
    assert!(status.success());
    exe
}

/// A plan for every function of the file that has a graph, blocks in a scrambled order.
fn scrambled_plan(exe: &Path) -> Plan {
    let image = Image::parse(std::fs::read(exe).unwrap(), "program").unwrap();
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    let mut plans = Vec::new();
    for f in functions.all() {
        let Ok(cfg) = cfg::build(&image, &functions, &targets, f) else { continue };
        let mut offsets: Vec<u32> = cfg.blocks.iter().map(|b| b.start.distance(cfg.start) as u32).collect();
        offsets[1..].sort_by_key(|o| o.wrapping_mul(2_654_435_761));
        let mut entries: Vec<u32> = offsets.clone();
        entries.sort_unstable();
        plans.push(FunctionPlan {
            start: f.start.0,
            size: f.size,
            hash: function_hash(&image, f),
            hot: offsets.len().div_ceil(2) as u32,
            blocks: offsets,
            entries,
            probes: Vec::new(),
            calls: Vec::new(),
            weight: 1,
        });
    }
    assert!(plans.len() > 5);
    let module = ModulePlan { build_id: image.build_id().clone(), name: "program".into(), functions: plans };
    Plan {
        program: "program".into(),
        kind: PlanKind::Layout,
        passes: Vec::new(),
        profile: [0; 32],
        modules: vec![module],
    }
}

/// Every executable mapping of the process that belongs to its own file, as bytes.
fn text(pid: i32, exe: &Path) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut text = Vec::new();
    for map in dyni_collector::maps::mappings(pid).unwrap() {
        if map.executable && map.path == exe {
            assert!(!map.writable);
            let mut bytes = vec![0; (map.range.end - map.range.start) as usize];
            memory.read_exact_at(&mut bytes, map.range.start).unwrap();
            text.extend(bytes);
        }
    }
    assert!(!text.is_empty());
    text
}

/// Ends with the test, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(exe: &Path, threads: u32) -> Running {
    let mut child = Command::new(exe).arg(threads.to_string()).stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");
    Running(child)
}

fn cycles(flags: &[&str], threads: u32, count: u64) {
    let dir = tempfile::tempdir().unwrap();
    let exe = compile(dir.path(), flags);
    let plan = scrambled_plan(&exe);
    let mut child = start(&exe, threads);
    let pid = child.0.id() as i32;
    let before = text(pid, &exe);
    let mut worst = Duration::ZERO;
    let mut moved = 0;
    for i in 0..count {
        let mut applier = Applier::new(&plan, None).unwrap();
        let applied = match applier.apply(pid) {
            Ok(applied) => applied,
            Err(e) => panic!("cycle {i}: {e}"),
        };
        assert!(applied.modules[0].patches > 3, "{applied:?}");
        worst = worst.max(applied.stop);
        moved += applied.moved;
        assert_eq!(status(pid).unwrap().state, State::Dynimized);
        assert_ne!(text(pid, &exe), before);
        std::thread::sleep(Duration::from_micros(i * 7919 % 9000));
        let undone = undo(pid).unwrap();
        assert_eq!(undone.patches, applied.modules[0].patches);
        assert_eq!(status(pid).unwrap().state, State::Undynimized);
        assert_eq!(text(pid, &exe), before, "cycle {i}");
        std::thread::sleep(Duration::from_micros(i * 104_729 % 5000));
    }
    println!("worst stop {worst:?}, threads moved {moved}");
    assert_eq!(status(pid).unwrap().modules.len(), 1, "the same plan uses its cache again");
    // SAFETY: our own child, by its PID; it was not waited for yet.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let mut out = String::new();
    child.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert!(child.0.wait().unwrap().success(), "{out}");
    assert_eq!(out, "right\n");
}

#[test]
fn optimised_code_goes_in_and_out() {
    cycles(&["-O2"], 3, 60);
}

#[test]
fn unoptimised_code_goes_in_and_out() {
    cycles(&["-O0"], 2, 60);
}

#[test]
fn position_dependent_code_goes_in_and_out() {
    cycles(&["-O3", "-no-pie"], 1, 60);
}

#[test]
fn another_plan_is_refused_until_undone_and_other_builds_always() {
    let dir = tempfile::tempdir().unwrap();
    let exe = compile(dir.path(), &["-O2"]);
    let plan = scrambled_plan(&exe);
    let mut other = plan.clone();
    other.program = "another".into();
    let child = start(&exe, 1);
    let pid = child.0.id() as i32;
    Applier::new(&plan, None).unwrap().apply(pid).unwrap();
    let refused = Applier::new(&other, None).unwrap().apply(pid).unwrap_err();
    assert!(matches!(refused, ApplyError::OtherPlan(_)) && refused.is_refusal(), "{refused}");
    undo(pid).unwrap();
    Applier::new(&other, None).unwrap().apply(pid).unwrap();
    undo(pid).unwrap();
    other.modules[0].build_id.0[0] ^= 1;
    let refused = Applier::new(&other, None).unwrap().apply(pid).unwrap_err();
    assert!(matches!(refused, ApplyError::OtherBuild { .. }), "{refused}");
    drop(child);
    assert!(matches!(status(pid), Err(ApplyError::Remote(_) | ApplyError::Target(_))));
}
