//! Counts against the truth: a program that counts its own blocks, counted from outside.

use dyni_analyzer::cfg;
use dyni_analyzer::counting::counting_plan;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::passes::FunctionLayout;
use dyni_analyzer::passes::infer::{self, Evidence};
use dyni_analyzer::plan::{Module, Options};
use dyni_analyzer::targets::TargetIndex;
use dyni_applier::{Applier, State, Tally, counters, status, undo};
use dyni_collector::maps::{MappedModule, modules};
use dyni_schema::{Host, LinkAddr, Method, ModuleProfile, Profile, Ranges, RunAddr, Samples};
use iced_x86::{Decoder, DecoderOptions};
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// One counter of its own for each place where the way through `work` parts.
const COUNTERS: usize = 14;
const PROGRAM: &str = r#"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
volatile uint64_t c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13;
static volatile uint64_t *const all[] = {&c0,&c1,&c2,&c3,&c4,&c5,&c6,&c7,&c8,&c9,&c10,&c11,&c12,&c13};
__attribute__((noinline)) uint64_t help(uint64_t x) { c11++; return x * 0x9e3779b97f4a7c15ULL ^ x >> 31; }
__attribute__((noinline)) uint64_t work(uint64_t n, uint64_t s) {
    uint64_t h = 1;
    c0++;
    for (uint64_t i = 0; i < n; i++) {
        c1++;
        s = s * 6364136223846793005ULL + 1442695040888963407ULL;
        switch (s >> 61) {
            case 0: c2++; h += s; break;
            case 1: c3++; h ^= s >> 7; break;
            case 2: c4++; h *= 31; break;
            case 3: c5++; h -= i; break;
            case 4: c6++; h += help(s); break;
            case 5: c7++; h = h << 9 | h >> 55; break;
            default: c8++; break;
        }
        if ((s >> 20 & 3) == 0 && (h & 7) != 3) { c9++; h += 5; }
        for (uint64_t j = s >> 40 & 3; j; j--) { c10++; h = h * 3 + j; }
        if (h == 0xdeadbeef) { c12++; abort(); }
    }
    c13++;
    return h;
}
int main(void) {
    char line[64];
    setvbuf(stdout, 0, _IOLBF, 0);
    printf("%p", (void *)work);
    for (int i = 0; i < 14; i++) printf(" %p", (void *)all[i]);
    puts("");
    while (fgets(line, sizeof line, stdin)) {
        printf("%llu", (unsigned long long)work(strtoull(line, 0, 0), 7));
        for (int i = 0; i < 14; i++) printf(" %llu", (unsigned long long)*all[i]);
        puts("");
    }
    return 0;
}
"#;

/// How many rounds the program does while it is counted, how often, and each time a few more.
const LONG: u64 = 500;
const SHORT: u64 = 1000;
const TIMES: u64 = 3;

/// Ends with the test, however that ends.
struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn start(exe: &Path) -> Self {
        let mut child =
            Command::new(exe).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it was just built");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, lines }
    }

    fn line(&mut self, radix: u32) -> Vec<u64> {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("it answers");
        let number = |w: &str| u64::from_str_radix(w.trim_start_matches("0x"), radix).expect("a number");
        line.split_whitespace().map(number).collect()
    }

    fn work(&mut self, n: u64) -> Vec<u64> {
        writeln!(self.child.stdin.as_mut().expect("piped"), "{n}").expect("it listens");
        self.line(10)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn compile(dir: &Path, compiler: &str, flags: &[&str]) -> Option<PathBuf> {
    let source = dir.join("program.c");
    std::fs::write(&source, PROGRAM).expect("write the source");
    let exe = dir.join("program");
    let built = Command::new(compiler).args(flags).arg(&source).arg("-o").arg(&exe).status().ok()?;
    assert!(built.success());
    Some(exe)
}

fn profile(module: &MappedModule, image: &Image, method: Method, samples: Samples, ranges: Ranges) -> Profile {
    let module = ModuleProfile {
        build_id: image.build_id().clone(),
        name: module.name.clone(),
        samples,
        ranges,
        ..ModuleProfile::default()
    };
    Profile {
        program: "program".into(),
        label: String::new(),
        method,
        method_note: String::new(),
        host: Host::default(),
        start_s: 0,
        duration_ns: 1,
        frequency_hz: 1,
        processes: 1,
        threads: 1,
        samples: 1,
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![module],
    }
}

/// Whether the counts of all blocks tell an edge's: unless other edges lead from what it leaves, there and back between
/// branches and their targets, to what it enters. (Two branches that share both their targets are the usual case.) The way
/// goes through blocks too in which there is no place to count.
fn is_determined(image: &Image, layout: &FunctionLayout, edge: usize) -> bool {
    let mut reached = BTreeSet::from([layout.edges[edge].from]);
    let mut entered = BTreeSet::new();
    loop {
        let others = || layout.edges.iter().enumerate().filter(|(i, _)| *i != edge).map(|(_, e)| e);
        let known = (reached.len(), entered.len());
        entered.extend(others().filter(|e| reached.contains(&e.from)).map(|e| e.to));
        reached.extend(others().filter(|e| entered.contains(&e.to)).map(|e| e.from));
        let uncounted = |b: &&u32| !layout.can_count(image, **b);
        let (through, back): (Vec<u32>, Vec<u32>) =
            (entered.iter().filter(uncounted).copied().collect(), reached.iter().filter(uncounted).copied().collect());
        reached.extend(through);
        entered.extend(back);
        if entered.contains(&layout.edges[edge].to) {
            return false;
        }
        if known == (reached.len(), entered.len()) {
            return true;
        }
    }
}

/// The truth: how often each edge between blocks of a function of the program runs in all the rounds that are counted, an
/// instruction at a time.
fn stepped(exe: &Path, image: &Image) -> BTreeMap<(LinkAddr, LinkAddr), u64> {
    let functions = Functions::find(image);
    let targets = TargetIndex::build(image, &functions);
    // By the last byte of each block's last instruction: its start, and the starts of all blocks.
    let (mut ends, mut starts) = (BTreeMap::new(), BTreeSet::new());
    for function in functions.all() {
        let Ok(graph) = cfg::build(image, &functions, &targets, function) else { continue };
        for block in graph.blocks {
            ends.insert(block.last, block.start);
            starts.insert(block.start);
        }
    }
    let mut running = Running::start(exe);
    running.line(16);
    let pid = Pid::from_raw(running.child.id() as i32);
    let bias = modules(pid.as_raw()).expect("our child").iter().find(|m| m.name == "program").expect("mapped").bias;
    ptrace::seize(pid, ptrace::Options::empty()).expect("our child");
    ptrace::interrupt(pid).expect("our child");
    let mut stdin = running.child.stdin.take().expect("piped");
    for n in (0..TIMES).flat_map(|round| [0, LONG + round, SHORT]) {
        writeln!(stdin, "{n}").expect("it listens");
    }
    drop(stdin);
    let mut edges = BTreeMap::new();
    let mut left: Option<LinkAddr> = None;
    loop {
        match waitpid(pid, None).expect("our child") {
            WaitStatus::Exited(_, 0) => return edges,
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {}
            other => panic!("{other:?}"),
        }
        let at = RunAddr(ptrace::getregs(pid).expect("it is stopped").rip).link(bias);
        // Over a call the way is broken, and goes on behind it: blocks do not end at calls.
        if let Some(from) = left.take().filter(|_| starts.contains(&at)) {
            *edges.entry((from, at)).or_default() += 1;
        }
        left = ends.get(&at).copied();
        ptrace::step(pid, None).expect("it is stopped");
    }
}

fn every_block_is_counted_right(compiler: &str, flags: &[&str]) {
    let dir = tempfile::tempdir().expect("a folder");
    let Some(exe) = compile(dir.path(), compiler, flags) else {
        println!("SKIPPED: {compiler} is not installed");
        return;
    };
    let mut running = Running::start(&exe);
    let addresses = running.line(16);
    let pid = running.child.id() as i32;
    let module = modules(pid).expect("our child").into_iter().find(|m| m.name == "program").expect("it is mapped");
    let image = Image::parse(std::fs::read(&exe).expect("it was just built"), "program").expect("an ELF file");
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    let work = RunAddr(addresses[0]).link(module.bias);
    let sampled = Samples { addr: vec![work.0], count: vec![1] };
    let seen = profile(&module, &image, Method::Clock, sampled, Ranges::default());
    let analyzed = [Module { image: &image, functions: &functions, targets: &targets }];
    let plan = counting_plan(&seen, &analyzed, &Options::default()).expect("a plan");
    let named = |at: LinkAddr| plan.modules[0].functions.iter().find(|f| f.start() == at);
    let probes = named(work).expect("what was sampled is counted").probes.len();

    let before = running.work(SHORT);
    let mut applier = Applier::new(&plan, None).expect("a sound plan");
    let mut tally = Tally::default();
    let mut all = Vec::new();
    for round in 0..TIMES {
        let applied = applier.apply(pid).expect("it can be applied");
        assert!(applied.modules[0].functions >= 2, "work and what it calls: {applied:?}");
        assert_eq!(status(pid).expect("our child").state, State::Profiling);
        let (nothing, _, again) = (running.work(0), running.work(LONG + round), running.work(SHORT));
        assert_eq!((again[0], nothing[0]), (before[0], 1), "the same results as before");
        tally.end(counters(pid).expect("our child"));
        undo(pid).expect("it can be undone");
        assert_eq!(status(pid).expect("our child").state, State::Undynimized);
        // What runs while nothing is applied must not show.
        let still = counters(pid).expect("our child");
        all = running.work(777);
        assert_eq!(still, counters(pid).expect("our child"));
    }
    // The program's own counters, less what it did while nothing was applied.
    let mut alone = Running::start(&exe);
    alone.line(16);
    let idle = [SHORT, 777, 777, 777].map(|n| alone.work(n));
    let counted: Vec<u64> = all[1..].iter().zip(&idle[3][1..]).map(|(all, idle)| all - idle).collect();

    let blocks = &tally.blocks()[image.build_id()];
    let ranges = Ranges {
        start: blocks.keys().map(|b| b.0).collect(),
        end: blocks.iter().map(|(b, (size, _))| b.0 + u64::from(*size) - 1).collect(),
        count: blocks.values().map(|b| b.1).collect(),
    };
    let exact = profile(&module, &image, Method::Count, Samples::default(), ranges);
    assert_eq!(exact.validate(), Ok(()));
    let evidence = Evidence::new(&exact.modules[0], Method::Count);
    let truth = stepped(&exe, &image);
    let mut edges = (0, 0);
    let mut met = vec![0; COUNTERS];
    for planned in &plan.modules[0].functions {
        let function = *functions.starting_at(planned.start()).expect("it is in the plan");
        let graph = cfg::build(&image, &functions, &targets, &function).expect("it is in the plan");
        let mut layout = FunctionLayout::new(&image, function, graph);
        infer::run(&mut layout, &evidence, true);
        let start = |b: u32| layout.cfg.blocks[b as usize].start;
        for (i, (e, &count)) in layout.edges.iter().zip(&layout.flow.edges).enumerate() {
            let ran = truth.get(&(start(e.from), start(e.to))).copied().unwrap_or(0);
            if is_determined(&image, &layout, i) {
                assert_eq!(count, ran, "{compiler} {flags:?}: the edge from {} to {}", start(e.from), start(e.to));
                edges.0 += usize::from(ran > 0);
            } else {
                edges.1 += 1;
            }
        }
        for (b, block) in layout.cfg.blocks.iter().enumerate() {
            let bytes = image.bytes(block.start, (block.end.0 - block.start.0) as usize).expect("code");
            let touches = |at: LinkAddr| {
                Decoder::with_ip(64, bytes, block.start.0, DecoderOptions::NONE)
                    .into_iter()
                    .any(|i| i.is_ip_rel_memory_operand() && i.ip_rel_memory_address() == at.0)
            };
            for (i, &address) in addresses[1..].iter().enumerate() {
                if touches(RunAddr(address).link(module.bias)) {
                    met[i] += layout.flow.nodes[b];
                }
            }
        }
    }
    assert!(edges.0 > 20 && edges.0 > edges.1, "{edges:?}: edges that ran, and edges that no count tells");
    assert_eq!(met, counted, "{compiler} {flags:?}, {probes} probes");
    assert!(probes > 5 && counted.iter().filter(|&&c| c > 0).count() > 11);
}

#[test]
fn gcc_o0() {
    every_block_is_counted_right("gcc", &["-O0"]);
}

#[test]
fn gcc_o2() {
    // With it the table's address stays in a register over the call to `help`, and the table is not recognised.
    every_block_is_counted_right("gcc", &["-O2", "-fno-ipa-ra"]);
}

#[test]
fn gcc_o3_no_pie() {
    every_block_is_counted_right("gcc", &["-O3", "-no-pie", "-fno-pie"]);
}

#[test]
fn clang_o2() {
    every_block_is_counted_right("clang", &["-O2"]);
}
