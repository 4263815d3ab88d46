//! A live C++ server whose threads compute, throw and are interrupted by a timer, told of copies of all its functions.

use super::*;
use crate::check::{Originals, check};
use crate::lower::{Emission, Source, lower};
use crate::patch::{self, Edit};
use crate::place::AddressSpace;
use crate::remote::{Caller, Stopped, in_own_thread};
use crate::unwind::unwinder::Unwinders;
use crate::unwind::{self, UnwindSection};
use crate::{room, unwind::register};
use dyni_analyzer::cfg;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::targets::TargetIndex;
use dyni_collector::maps;
use dyni_schema::{FunctionHash, FunctionPlan, LinkAddr};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// For the code, and for the unwind data: together a hole that a program at a fixed address has below it.
const ROOM: u64 = 1 << 20;
/// One at a time: fuses are the whole process's.
static TURN: Mutex<()> = Mutex::new(());

struct File<'a>(&'a Image);

impl Originals for File<'_> {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        self.0.bytes(at, len)
    }
}

fn compile(dir: &Path, flags: &[&str]) -> Option<PathBuf> {
    let text = [
        ("throws.cc", include_str!("../../../tests/unwinding/throws.cc")),
        ("server.cc", include_str!("../../../tests/unwinding/server.cc")),
        ("other.cc", include_str!("../../../tests/unwinding/other.cc")),
        ("cleanup.c", include_str!("../../../tests/unwinding/cleanup.c")),
    ];
    for (name, text) in text {
        std::fs::write(dir.join(name), text).unwrap();
    }
    let run = |command: &mut Command| {
        let done = command.current_dir(dir).args(flags).arg("-w").status();
        assert!(done.expect("the compiler runs").success(), "{command:?}");
    };
    if Command::new("g++").arg("--version").output().is_err() {
        println!("SKIPPED: g++ is not installed");
        return None;
    }
    run(Command::new("g++").args(["-x", "c", "-fexceptions", "-c", "cleanup.c", "-o", "cleanup.o"]));
    run(Command::new("g++").args(["-DFAULTS=1", "-fnon-call-exceptions", "-std=c++14", "-pthread"]).args([
        "throws.cc",
        "server.cc",
        "other.cc",
        "cleanup.o",
        "-o",
        "server",
    ]));
    Some(dir.join("server"))
}

struct Server {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Server {
    fn start(exe: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(exe);
        let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut server = Self { child, input, output };
        server.ask("hello");
        server
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn ask(&mut self, request: &str) -> String {
        writeln!(self.input, "{request}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "it died at {request:?}: {:?}", self.child.wait());
        line
    }

    fn play(&mut self) -> Vec<String> {
        (0..13).flat_map(|s| (0..12).map(move |k| format!("{s} {k}"))).map(|request| self.ask(&request)).collect()
    }

    /// Both workers go on: many rounds are made.
    fn goes_on(&mut self) {
        let rounds = |s: &mut Self| s.ask("hello").trim().parse::<u64>().unwrap();
        let (before, start) = (rounds(self), Instant::now());
        while rounds(self) < before + 20 {
            assert!(start.elapsed() < Duration::from_secs(60), "the threads stand still");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(mut self) {
        drop(self.input);
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut self.output, &mut rest).unwrap();
        assert!(self.child.wait().unwrap().success());
        assert_eq!(rest, "right\n");
    }
}

/// Copies of all its functions, mapped in the server; nothing leads into them yet.
struct Copied {
    emission: Emission,
    section: UnwindSection,
    place: Place,
    edits: Vec<Edit>,
    unwinder: Unwinder,
}

fn copy_all(pid: i32, exe: &Path, memory: &Memory) -> Copied {
    let image = Image::parse(std::fs::read(exe).unwrap(), "server").unwrap();
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    let good = functions.all().iter().filter(|f| unwind::examine(&image, &functions, f).is_ok());
    let graphs: Vec<_> = good.filter_map(|f| cfg::build(&image, &functions, &targets, f).ok()).collect();
    let plans: Vec<FunctionPlan> = graphs
        .iter()
        .map(|cfg| {
            let mut blocks: Vec<u32> = cfg.blocks.iter().map(|b| b.start.distance(cfg.start) as u32).collect();
            blocks[1..].sort_by_key(|o| o.wrapping_mul(2_654_435_761));
            FunctionPlan {
                start: cfg.start.0,
                size: cfg.end.distance(cfg.start) as u32,
                hash: FunctionHash::default(),
                hot: blocks.len().div_ceil(2) as u32,
                blocks,
                entries: Vec::new(),
                probes: Vec::new(),
                calls: Vec::new(),
                weight: 1,
            }
        })
        .collect();
    let bytes = |p: &FunctionPlan| image.bytes(p.start(), p.size as usize).unwrap().to_vec();
    let sources: Vec<Source<'_>> = graphs
        .iter()
        .zip(&plans)
        .map(|(cfg, plan)| Source {
            code: bytes(plan),
            cfg: cfg.clone(),
            plan,
            stubs: Vec::new(),
            table_loads: Vec::new(),
        })
        .collect();

    let mapped = maps::mappings(pid).unwrap();
    let modules = maps::modules(pid).unwrap();
    let module = modules.iter().find(|m| m.build_id == *image.build_id()).unwrap();
    let unwinder = Unwinders::default().find(pid, &modules).unwrap();
    let hole = AddressSpace::of(&mapped).holes(&(module.span.start.0..module.span.end.0), 2 * ROOM, 0, 1)[0];
    let section_at = hole.plus(ROOM);
    let (cache, at) = (hole.link(module.bias), section_at.link(module.bias));
    let (emission, _) = lower(&sources, cache, ROOM - 2 * CODE_LEN, cache.plus(ROOM));
    check(&emission, cache, &File(&image)).unwrap();
    let section = unwind::build(&image, &functions, &emission, &File(&image), cache, at).unwrap();
    unwind::check(&image, &functions, &emission, &File(&image), &section, cache, at).unwrap();

    let map = |caller: &Caller<'_>, at: u64, size: u64, protection: i32| {
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        if at != 0 {
            flags |= libc::MAP_FIXED_NOREPLACE;
        }
        let arguments = [at, size, protection as u64, flags as u64, u64::MAX, 0];
        RunAddr(caller.call("mmap", libc::SYS_mmap, arguments).unwrap())
    };
    let (code, data) = in_own_thread(|| {
        let caller = Caller::new(pid, memory, room::find(pid, memory).unwrap().at);
        let code = map(&caller, hole.0, ROOM, libc::PROT_READ | libc::PROT_EXEC);
        map(&caller, section_at.0, (section.bytes.len() as u64).next_multiple_of(4096), libc::PROT_READ);
        (code, map(&caller, 0, data_len(), libc::PROT_READ | libc::PROT_WRITE))
    });
    memory.write(code, &emission.code).unwrap();
    memory.write(section_at, &section.bytes).unwrap();

    let mut edits = Vec::new();
    for cfg in &graphs {
        let Some(block) = emission.block_at(cfg.start) else { continue };
        let inside = cfg.start.plus(1)..cfg.start.plus(5);
        if targets.patchable(&image, cfg, cfg.start).is_ok() && !emission.escapes.iter().any(|e| inside.contains(e)) {
            let distance = cache.plus(block.copy.0).distance(cfg.start.plus(5)) as i32;
            let [a, b, c, d] = distance.to_le_bytes();
            let from = image.bytes(cfg.start, 5).unwrap().try_into().unwrap();
            edits.push(Edit { at: cfg.start.run(module.bias), from, to: [0xe9, a, b, c, d] });
        }
    }
    let place = Place { code: code.plus(ROOM - CODE_LEN), data, section: section_at };
    Copied { emission, section, place, edits, unwinder }
}

/// Writes the patches; how many.
fn patch_all(pid: i32, memory: &Memory, edits: &[Edit]) -> usize {
    in_own_thread(|| {
        let maps = maps::mappings(pid).unwrap();
        let places: Vec<_> = edits.iter().map(|e| e.at).collect();
        let mut done = 0;
        for _ in 0..20 {
            let stopped = Stopped::all(pid, Duration::from_secs(5)).unwrap();
            let mut refused = patch::pointed_into(&stopped, memory, &maps, &places);
            for thread in &stopped.threads {
                refused.extend(places.iter().filter(|p| (1..5).contains(&thread.rip().distance(**p))));
            }
            let now: Vec<_> = edits.iter().filter(|e| !refused.contains(&e.at)).copied().collect();
            done += patch::write(&stopped, memory, &now, "apply:half-patched").unwrap().iter().filter(|d| **d).count();
        }
        done
    })
}

fn throw_through_copies(flags: &[&str], arguments: &[&str]) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let Some(exe) = compile(dir.path(), flags) else { return };
    let mut server = Server::start(&exe, arguments);
    let pid = server.pid();
    let expected = server.play();
    let memory = Memory::open(pid).unwrap();
    let copied = copy_all(pid, &exe, &memory);
    assert!(!is_registered(&memory, &copied.place).unwrap());
    let start = Instant::now();
    for _ in 0..10 {
        register::register(pid, &memory, &copied.unwinder, &copied.place).unwrap();
        assert!(is_registered(&memory, &copied.place).unwrap());
        register::register(pid, &memory, &copied.unwinder, &copied.place).unwrap();
        register::deregister(pid, &memory, &copied.unwinder, &copied.place).unwrap();
        assert!(!is_registered(&memory, &copied.place).unwrap());
        server.goes_on();
    }
    register::register(pid, &memory, &copied.unwinder, &copied.place).unwrap();
    let took = start.elapsed();
    let patched = patch_all(pid, &memory, &copied.edits);
    server.goes_on();
    for (i, (got, expected)) in server.play().iter().zip(&expected).enumerate() {
        assert_eq!(got, expected, "{flags:?} scenario {} kind {}", i / 12, i % 12);
    }
    server.goes_on();
    println!(
        "{flags:?}: {} blocks, {} entries, {} tables, {patched} of {} patched; 21 calls in {took:?}",
        copied.emission.blocks.len(),
        copied.section.entries,
        copied.section.tables,
        copied.edits.len()
    );
    server.end();
}

#[test]
fn a_server_throws_through_copies() {
    throw_through_copies(&["-O2"], &["1000"]);
}

#[test]
fn a_server_at_a_fixed_address_throws_through_copies() {
    throw_through_copies(&["-O1", "-no-pie", "-fno-pic"], &["3000", "poll-with-timeout"]);
}

#[test]
fn whoever_dies_at_any_step_leaves_the_server_whole() {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let Some(exe) = compile(dir.path(), &["-O2"]) else { return };
    let mut server = Server::start(&exe, &["700"]);
    let pid = server.pid();
    let expected = server.play();
    let memory = Memory::open(pid).unwrap();
    let copied = copy_all(pid, &exe, &memory);
    let steps = [
        "remote:stopped",
        "remote:trampoline-written",
        "remote:registers-set",
        "remote:syscall-left",
        "remote:registers-restored",
    ];
    for step in steps.iter().cycle().take(15) {
        function::fuse::arm(step);
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            register::register(pid, &memory, &copied.unwinder, &copied.place)
        }));
        assert!(died.is_err(), "{step}");
        // It comes home alone, with the call made if it had begun.
        server.goes_on();
        let known = is_registered(&memory, &copied.place).unwrap();
        assert_eq!(known, !matches!(*step, "remote:stopped" | "remote:trampoline-written"), "{step}");
        memory.write(copied.place.code, &[0; CODE_LEN as usize]).unwrap();
        register::register(pid, &memory, &copied.unwinder, &copied.place).unwrap();
        register::deregister(pid, &memory, &copied.unwinder, &copied.place).unwrap();
    }
    register::register(pid, &memory, &copied.unwinder, &copied.place).unwrap();
    patch_all(pid, &memory, &copied.edits);
    assert_eq!(server.play(), expected);
    server.end();
}

#[test]
fn a_program_that_never_waits_is_left_alone() {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
    let pid = child.id() as i32;
    std::thread::sleep(Duration::from_millis(50));
    let modules = maps::modules(pid).unwrap();
    assert_eq!(Unwinders::default().find(pid, &modules), Err(NoUnwinder::NotThere));
    let memory = Memory::open(pid).unwrap();
    let room = Room { code: RunAddr(0), data: RunAddr(0) };
    let error = function::call(pid, &memory, room, RunAddr(0), [0; 2], false).unwrap_err();
    assert!(matches!(error, CallError::NoSafePoint(_)), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
}
