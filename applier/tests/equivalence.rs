//! Generated functions, run as original and as copy on the same inputs, agree; and the checker catches every seeded fault.

use dyni_analyzer::calls;
use dyni_analyzer::cfg::{Block, Cfg, JumpTable, Terminator};
use dyni_analyzer::probes::place;
use dyni_applier::check::{Originals, check};
use dyni_applier::lower::{CopiedBlock, Emission, Source, lower};
use dyni_applier::shortcuts::{Stub, TableLoad};
use dyni_schema::{CallSite, FunctionHash, FunctionPlan, LinkAddr};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Instructions that read and write only rax, rcx, rdx, rsi, rdi, r8, r9, r10 and the flags, none of them able to fault.
const BODY: &[&[u8]] = &[
    &[0x48, 0x01, 0xc8],                   // add rax, rcx
    &[0x48, 0x11, 0xd0],                   // adc rax, rdx
    &[0x4c, 0x29, 0xc1],                   // sub rcx, r8
    &[0x48, 0x19, 0xf2],                   // sbb rdx, rsi
    &[0x49, 0x31, 0xc0],                   // xor r8, rax
    &[0x48, 0xc1, 0xc0, 0x07],             // rol rax, 7
    &[0x48, 0x0f, 0xaf, 0xf7],             // imul rsi, rdi
    &[0x0f, 0x94, 0xc1],                   // sete cl
    &[0x4c, 0x0f, 0x42, 0xc8],             // cmovb r9, rax
    &[0x48, 0x39, 0xc8],                   // cmp rax, rcx
    &[0x48, 0x85, 0xd2],                   // test rdx, rdx
    &[0x48, 0x8d, 0x74, 0x3e, 0x11],       // lea rsi, [rsi+rdi+17]
    &[0xf5],                               // cmc
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],       // nop dword [rax+rax]
    &[0x90],                               // nop
    &[0x50, 0x5a],                         // push rax; pop rdx
    &[0x48, 0x89, 0x44, 0x24, 0xe0],       // mov [rsp-32], rax
    &[0x48, 0x03, 0x4c, 0x24, 0xe0],       // add rcx, [rsp-32]
    &[0x66, 0x41, 0x81, 0xc2, 0x34, 0x12], // add r10w, 0x1234
];
/// Where each function finds a constant by a RIP-relative operand.
const CONSTANT: u64 = 0x0123_4567_89ab_cdef;

#[derive(Debug, Clone)]
enum End {
    Fall,
    Jump(usize),
    If(u8, usize),
    /// `loop` or `jrcxz`, by the opcode's low bits; only to the block after the next, as it has no long form.
    Counter(u8),
    Call(usize),
    /// A call of a helper by way of its stub, which lies as far behind it as helpers lie apart.
    Stub(usize),
    /// A call of one of two helpers through a register or through memory, whichever a bit of rax says; the plan promotes
    /// the first.
    Pointer(usize, usize, bool),
    /// A jump through a table of four blocks, by a register or by memory.
    Switch([usize; 4], bool),
}

#[derive(Debug, Clone)]
struct Shape {
    blocks: Vec<(Vec<usize>, bool, End)>,
    /// Sort keys of the new order, and how many blocks are hot or left out.
    keys: Vec<u32>,
    left_out: Vec<bool>,
    hot: usize,
    /// Whether the copy counts its blocks, and records what it calls instead of promoting it.
    counts: bool,
}

fn shape() -> impl Strategy<Value = Shape> {
    (2..30usize).prop_flat_map(|n| {
        let end = prop_oneof![
            1 => Just(End::Fall),
            2 => (0..n).prop_map(End::Jump),
            5 => (0..16u8, 0..n).prop_map(|(cc, to)| End::If(cc, to)),
            1 => (1..4u8).prop_map(End::Counter),
            1 => (0..3usize).prop_map(End::Call),
            1 => (0..3usize).prop_map(End::Stub),
            2 => (0..3usize, 0..3usize, any::<bool>()).prop_map(|(a, b, m)| End::Pointer(a, b, m)),
            2 => ([0..n, 0..n, 0..n, 0..n], any::<bool>()).prop_map(|(to, m)| End::Switch(to, m)),
        ];
        let body = prop::collection::vec(0..BODY.len(), 0..8);
        (
            prop::collection::vec((body, any::<bool>(), end), n),
            prop::collection::vec(any::<u32>(), n),
            prop::collection::vec(prop::bool::weighted(0.15), n),
            1..=n,
            any::<bool>(),
        )
            .prop_map(|(blocks, keys, left_out, hot, counts)| Shape { blocks, keys, left_out, hot, counts })
    })
}

/// Where the helpers lie, how far apart, their stubs, those's slots, and the jump tables.
const HELPERS: usize = 16;
const HELPER: usize = 16;
const STUBS: usize = 128;
const SLOTS: usize = 256;
const TABLES: usize = 1024;
/// Where the function lies.
const ORIGINAL: usize = 8192;

/// Executable memory: [constant, helpers, stubs, slots, tables, original … | cache … | counters].
struct Arena {
    base: *mut u8,
    used: AtomicUsize,
}

const ARENA: usize = 1 << 20;
const CACHE_AT: usize = ARENA / 2;
const COUNTERS_AT: usize = ARENA - (64 << 10);

impl Arena {
    fn new() -> Self {
        // SAFETY: a new private mapping at an address of the kernel's choice; nothing else refers to it.
        let base = unsafe {
            let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            libc::mmap(std::ptr::null_mut(), ARENA, rwx, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        let arena = Self { base: base.cast(), used: AtomicUsize::new(0) };
        arena.write(0, &CONSTANT.to_le_bytes());
        arena
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= ARENA);
        self.used.fetch_max(at + bytes.len(), Ordering::Relaxed);
        // SAFETY: the range was just checked to lie in our mapping, which no running code of this thread is in.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    fn read(&self, at: usize) -> u64 {
        assert!(at + 8 <= ARENA && at.is_multiple_of(8));
        // SAFETY: the range was just checked to lie in our mapping, which is aligned to pages.
        unsafe { self.base.add(at).cast::<u64>().read() }
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        assert!(len <= ARENA);
        // SAFETY: the range was just checked to lie in our mapping, to which nobody else writes.
        unsafe { std::slice::from_raw_parts(self.base, len) }.to_vec()
    }

    fn address(&self, at: usize) -> u64 {
        self.base as u64 + at as u64
    }

    /// Runs the function at `at` with seven registers set, at most `fuel` blocks long; folds all registers at the end.
    fn run(&self, at: usize, input: [u64; 7], fuel: u64) -> [u64; 8] {
        let mut out = [0u64; 8];
        // SAFETY: the code there was made by `build` or lowered from it: it clobbers only the registers declared here and
        // memory below the stack pointer (which `call` has moved past our red zone), ends by `ret`, and runs at most
        // `fuel` blocks.
        unsafe {
            std::arch::asm!(
                "sub rsp, 512",
                // What the red-zone instructions of the body find there before they have written it.
                "mov qword ptr [rsp - 40], 0",
                "call r15",
                "add rsp, 512",
                in("r15") self.address(at),
                inout("r12") fuel => _,
                inout("rax") input[0] => out[0],
                inout("rcx") input[1] => out[1],
                inout("rdx") input[2] => out[2],
                inout("rsi") input[3] => out[3],
                inout("rdi") input[4] => out[4],
                inout("r8") input[5] => out[5],
                inout("r9") input[6] => out[6],
                inout("r10") 5u64 => out[7],
                clobber_abi("sysv64"),
            );
        }
        out
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: our own mapping; nothing refers to it after this.
        unsafe { libc::munmap(self.base.cast(), ARENA) };
    }
}

/// A function at `at` in the arena as code, control-flow graph, and what reads its jump tables. Every block begins with `dec r12; js out`.
fn build(shape: &Shape, arena: &Arena, at: usize) -> (Cfg, Vec<u8>, Vec<(LinkAddr, u32)>) {
    let n = shape.blocks.len();
    let mut starts = vec![0usize; n + 1];
    let long = |end: &End| match end {
        End::Fall => 0,
        End::Jump(_) | End::Call(_) => 5,
        End::If(..) => 6,
        End::Counter(_) => 2,
        End::Stub(_) => 5,
        // lea r10, [a]; lea r9, [b]; test al, 1; cmovz r10, r9; then perhaps mov [rsp-64], r10; call; cmp eax, ecx
        End::Pointer(_, _, by_memory) => 7 + 7 + 2 + 4 + if *by_memory { 5 + 4 } else { 3 } + 2,
        // and eax, 3; lea r10, [table]; then jmp [r10+rax*8], or movsxd r11, [r10+rax*4]; add r11, r10; jmp r11, and nobody reads r11
        End::Switch(_, by_memory) => 3 + 7 + if *by_memory { 4 } else { 4 + 3 + 3 },
    };
    // dec r12 (3 bytes), js out (6), body, perhaps add rax,[rip+constant] (7), the end
    for (i, (body, constant, end)) in shape.blocks.iter().enumerate() {
        let body: usize = body.iter().map(|&b| BODY[b].len()).sum();
        starts[i + 1] = starts[i] + 9 + body + 7 * usize::from(*constant) + long(end);
    }
    let out = starts[n];
    let mut code: Vec<u8> = Vec::new();
    let base = arena.address(at);
    let link = |offset: usize| LinkAddr(base + offset as u64);
    let mut blocks = Vec::new();
    let block = |range: Range<usize>, last: usize, terminator| Block {
        start: link(range.start),
        end: link(range.end),
        last: link(last),
        terminator,
        successors: Vec::new(),
        keep_original: None,
        calls: false,
        address_taken: false,
    };
    let (mut jump_tables, mut loads) = (Vec::new(), Vec::new());
    let mut table_at = TABLES;
    let rel = |code: &Vec<u8>, to: usize| (to as i64 - code.len() as i64 - 4) as i32;
    for (i, (body, constant, end)) in shape.blocks.iter().enumerate() {
        code.extend([0x49, 0xff, 0xcc, 0x0f, 0x88]);
        let r = rel(&code, out);
        code.extend(r.to_le_bytes());
        blocks.push(block(starts[i]..code.len(), starts[i] + 3, Terminator::Conditional { taken: link(out) }));
        let start = code.len();
        let mut last = start;
        for &b in body {
            last = code.len();
            code.extend(BODY[b]);
            // "push rax; pop rdx" is two instructions.
            last += usize::from(BODY[b].len() == 2);
        }
        if *constant {
            last = code.len();
            code.extend([0x48, 0x03, 0x05]);
            let r = rel(&code, 0) - at as i32;
            code.extend(r.to_le_bytes());
        }
        let after_body = code.len();
        let terminator = match *end {
            End::Fall => Terminator::FallThrough,
            End::Jump(to) => {
                code.push(0xe9);
                let r = rel(&code, starts[to]);
                code.extend(r.to_le_bytes());
                Terminator::Jump { target: link(starts[to]) }
            }
            End::If(cc, to) => {
                code.extend([0x0f, 0x80 | cc]);
                let r = rel(&code, starts[to]);
                code.extend(r.to_le_bytes());
                Terminator::Conditional { taken: link(starts[to]) }
            }
            End::Counter(low) => {
                let to = (i + 2).min(n);
                let distance = starts[to] as i64 - starts[i + 1] as i64;
                code.extend([0xe0 | low, i8::try_from(distance).expect("one block is short") as u8]);
                Terminator::Conditional { taken: link(starts[to]) }
            }
            End::Call(helper) => {
                code.push(0xe8);
                let r = rel(&code, 0) - at as i32 + (HELPERS + HELPER * helper) as i32;
                code.extend(r.to_le_bytes());
                Terminator::FallThrough
            }
            End::Stub(helper) => {
                code.push(0xe8);
                let r = rel(&code, 0) - at as i32 + (STUBS + HELPER * helper) as i32;
                code.extend(r.to_le_bytes());
                Terminator::FallThrough
            }
            End::Pointer(usual, other, by_memory) => {
                for (helper, lea) in [(usual, [0x4c, 0x8d, 0x15]), (other, [0x4c, 0x8d, 0x0d])] {
                    code.extend(lea);
                    let r = rel(&code, 0) - at as i32 + (HELPERS + HELPER * helper) as i32;
                    code.extend(r.to_le_bytes());
                }
                code.extend([0xa8, 0x01, 0x4d, 0x0f, 0x44, 0xd1]);
                if by_memory {
                    code.extend([0x4c, 0x89, 0x54, 0x24, 0xc0, 0xff, 0x54, 0x24, 0xc0]);
                } else {
                    code.extend([0x41, 0xff, 0xd2]);
                }
                last = code.len();
                code.extend([0x39, 0xc8]);
                Terminator::FallThrough
            }
            End::Switch(to, by_memory) => {
                code.extend([0x83, 0xe0, 0x03, 0x4c, 0x8d, 0x15]);
                let r = rel(&code, 0) - at as i32 + table_at as i32;
                code.extend(r.to_le_bytes());
                loads.push((link(code.len()), jump_tables.len() as u32));
                if !by_memory {
                    code.extend([0x4d, 0x63, 0x1c, 0x82, 0x4d, 0x01, 0xd3]);
                }
                last = code.len();
                code.extend(if by_memory { &[0x41, 0xff, 0x24, 0xc2][..] } else { &[0x41, 0xff, 0xe3] });
                let targets: Vec<LinkAddr> = to.iter().map(|&b| link(starts[b])).collect();
                let address = LinkAddr(arena.address(table_at));
                for (i, target) in targets.iter().enumerate() {
                    if by_memory {
                        arena.write(table_at + 8 * i, &target.0.to_le_bytes());
                    } else {
                        arena.write(table_at + 4 * i, &(target.distance(address) as i32).to_le_bytes());
                    }
                }
                table_at += 32;
                jump_tables.push(JumpTable { address, absolute: by_memory, targets, exact: true });
                Terminator::Indirect { table: Some(jump_tables.len() as u32 - 1) }
            }
        };
        if code.len() > after_body && !matches!(end, End::Pointer(..) | End::Switch(..)) {
            last = after_body;
        }
        if code.len() > start {
            blocks.push(block(start..code.len(), last, terminator));
        }
        assert_eq!(code.len(), starts[i + 1]);
    }
    code.push(0xc3);
    blocks.push(block(out..out + 1, out, Terminator::Stop));
    // Which blocks a call's flags may be seen from.
    let starts_of: Vec<LinkAddr> = blocks.iter().map(|b| b.start).collect();
    let index = |at: &LinkAddr| starts_of.binary_search(at).ok().map(|i| i as u32);
    for block in &mut blocks {
        block.successors = match block.terminator {
            Terminator::FallThrough => index(&block.end).into_iter().collect(),
            Terminator::Conditional { taken } => [taken, block.end].iter().filter_map(index).collect(),
            Terminator::Jump { target } => index(&target).into_iter().collect(),
            Terminator::Indirect { table: Some(t) } => {
                jump_tables[t as usize].targets.iter().filter_map(index).collect()
            }
            _ => Vec::new(),
        };
    }
    let cfg = Cfg { start: link(0), end: link(code.len()), blocks, jump_tables };
    (cfg, code, loads)
}

/// Every copied block that has a place for a counter, as offsets, rising.
fn probes(cfg: &Cfg, code: &[u8], copied: &[usize]) -> Vec<u32> {
    let offset = |at: LinkAddr| at.distance(cfg.start) as usize;
    let blocks = cfg.blocks.iter().enumerate().filter(|(i, _)| copied.contains(i)).map(|(_, b)| b);
    let placed = blocks.filter(|b| place(&code[offset(b.start)..offset(b.end)], b.start).is_some());
    placed.map(|b| offset(b.start) as u32).collect()
}

/// The calls through pointers, each with the helper that the `lea` three instructions before it, or four, names.
fn calls_of(shape: &Shape, cfg: &mut Cfg, code: &[u8], arena: &Arena) -> Vec<CallSite> {
    let sites = calls::sites(cfg, code);
    let helper_of = |at: LinkAddr| {
        let helper = |h: usize| LinkAddr(arena.address(HELPERS + HELPER * h));
        let back = |n: u64| {
            let from = at.distance(cfg.start) as usize - n as usize;
            let displacement = i32::from_le_bytes(code[from + 3..from + 7].try_into().unwrap());
            (code[from..from + 3] == [0x4c, 0x8d, 0x15])
                .then(|| cfg.start.plus(from as u64 + 7).offset(i64::from(displacement)))
        };
        // Behind lea, lea, test, cmov, and perhaps a store.
        let usual = back(20).or_else(|| back(25)).expect("a pointer was loaded");
        assert!((0..3).any(|h| helper(h) == usual));
        usual.0
    };
    let calls = sites.iter().map(|s| CallSite {
        at: s.at.distance(cfg.start) as u32,
        callee: if shape.counts { 0 } else { helper_of(s.at) },
    });
    let calls: Vec<_> = calls.collect();
    if !shape.counts {
        sites.iter().for_each(|s| cfg.part(s.at.plus(u64::from(s.len)), s.at));
    }
    calls
}

fn plan(shape: &Shape, cfg: &mut Cfg, code: &[u8], arena: &Arena) -> FunctionPlan {
    let mut calls = calls_of(shape, cfg, code, arena);
    let mut order: Vec<usize> = (1..cfg.blocks.len()).collect();
    order.retain(|i| !shape.left_out[i % shape.left_out.len()]);
    order.sort_by_key(|i| (shape.keys[i % shape.keys.len()].rotate_left(*i as u32), *i));
    order.insert(0, 0);
    let blocks: Vec<u32> = order.iter().map(|&i| cfg.blocks[i].start.distance(cfg.start) as u32).collect();
    calls.retain(|c| {
        let block = cfg.block_holding(cfg.start.plus(u64::from(c.at)));
        order.contains(&block.expect("a call is in a block"))
    });
    FunctionPlan {
        start: cfg.start.0,
        size: cfg.end.distance(cfg.start) as u32,
        hash: FunctionHash::default(),
        hot: shape.hot.min(blocks.len()) as u32,
        blocks,
        entries: Vec::new(),
        calls,
        probes: if shape.counts { probes(cfg, code, &order) } else { Vec::new() },
        weight: 1,
    }
}

/// What lies in the arena is what it was made from: the constant, helpers, stubs, tables and the function.
struct Bytes(LinkAddr, Vec<u8>);

impl Originals for Bytes {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(at.distance(self.0)).ok()?;
        self.1.get(from..from + len)
    }
}

struct Case {
    arena: Arena,
    emission: Emission,
    cache: LinkAddr,
    bytes: Bytes,
}

/// A function that does one thing and returns.
fn helper(arena: &Arena, at: usize, code: &[u8]) -> (Cfg, FunctionPlan) {
    let (start, end) = (LinkAddr(arena.address(at)), LinkAddr(arena.address(at + code.len())));
    let block = Block {
        start,
        end,
        last: end.offset(-1),
        terminator: Terminator::Stop,
        successors: Vec::new(),
        keep_original: None,
        calls: false,
        address_taken: false,
    };
    let plan = FunctionPlan {
        start: start.0,
        size: code.len() as u32,
        hash: FunctionHash::default(),
        blocks: vec![0],
        hot: 1,
        entries: Vec::new(),
        probes: Vec::new(),
        calls: Vec::new(),
        weight: 1,
    };
    (Cfg { start, end, blocks: vec![block], jump_tables: Vec::new() }, plan)
}

fn make(shape: &Shape) -> Case {
    let arena = Arena::new();
    // Three helpers that a call may go to: lea rax,[rax+rcx]; ret and the like.
    let helpers = [[0x48, 0x8d, 0x04, 0x08, 0xc3], [0x48, 0x31, 0xd0, 0xf9, 0xc3], [0x48, 0x89, 0xf9, 0xf5, 0xc3]];
    let mut parts = Vec::new();
    let mut stubs = Vec::new();
    for (i, code) in helpers.iter().enumerate() {
        let (at, stub, slot) = (HELPERS + HELPER * i, STUBS + HELPER * i, SLOTS + 8 * i);
        arena.write(at, code);
        let distance = (slot as i32 - (stub as i32 + 6)).to_le_bytes();
        arena.write(stub, &[&[0xff, 0x25][..], &distance].concat());
        arena.write(slot, &arena.address(at).to_le_bytes());
        let bytes = [&[0xff, 0x25][..], &distance].concat();
        stubs.push(Stub { at: LinkAddr(arena.address(stub)), slot: LinkAddr(arena.address(slot)), bytes });
        parts.push((helper(&arena, at, code), code.to_vec()));
    }
    let (mut cfg, code, table_loads) = build(shape, &arena, ORIGINAL);
    arena.write(ORIGINAL, &code);
    let plan = plan(shape, &mut cfg, &code, &arena);
    let counters = LinkAddr(arena.address(COUNTERS_AT));
    let cache = LinkAddr(arena.address(CACHE_AT));
    let bytes = Bytes(LinkAddr(arena.address(0)), arena.bytes(CACHE_AT));
    let mut sources = vec![Source { cfg, plan: &plan, code, stubs, table_loads }];
    for ((cfg, plan), code) in &parts {
        let (cfg, code) = (cfg.clone(), code.clone());
        sources.push(Source { cfg, plan, code, stubs: Vec::new(), table_loads: Vec::new() });
    }
    let (emission, refused) = lower(&sources, cache, (COUNTERS_AT - CACHE_AT) as u64, counters);
    assert_eq!(refused, []);
    Case { arena, emission, cache, bytes }
}

/// Whether the lowest bit of this byte of a copy is the sense of a branch both ways of which lead to the same place: then
/// it may be either.
fn means_nothing(case: &Case, block: &CopiedBlock, byte: usize) -> bool {
    let bytes = case.bytes.bytes(block.original, block.size as usize).expect("the block is the original's");
    let last = iced_x86::Decoder::with_ip(64, bytes, block.original.0, 0).into_iter().last();
    let one_way = last.is_some_and(|i| i.is_jcc_short_or_near() && i.near_branch_target() == i.next_ip());
    let copy = block.copy.0 as usize..block.copy.0 as usize + block.copy_size as usize;
    let copies = iced_x86::Decoder::with_ip(64, &case.emission.code[copy.clone()], copy.start as u64, 0);
    let opcode = |i: &iced_x86::Instruction| i.ip() as usize + usize::from(i.is_jcc_near());
    one_way && copies.into_iter().any(|i| i.is_jcc_short_or_near() && opcode(&i) == byte)
}

/// Where in the cache the table lies that the copy of this instruction reads.
fn moved(case: &Case, table: &TableLoad) -> u64 {
    let at = LinkAddr(table.at);
    let block =
        case.emission.blocks.iter().find(|b| b.original <= at && at < b.original.plus(u64::from(b.size))).unwrap();
    let copy = block.copy.0 as usize..(block.copy.0 + u64::from(block.copy_size)) as usize;
    // and eax, 3; lea r10, [table]; then what reads it.
    let is_load = |i: &iced_x86::Instruction| {
        i.memory_base() == iced_x86::Register::R10 && i.memory_index() != iced_x86::Register::None
    };
    let load = iced_x86::Decoder::with_ip(64, &case.emission.code[copy], 0, 0).into_iter().find(is_load).unwrap();
    LinkAddr(table.table.wrapping_add(load.memory_displacement64())).distance(case.cache) as u64
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_copy_computes_what_its_original_does(shape in shape(), inputs in prop::collection::vec(any::<[u64; 7]>(), 4)) {
        let case = make(&shape);
        check(&case.emission, case.cache, &case.bytes).expect("lowering is right");
        case.arena.write(CACHE_AT, &case.emission.code);
        let mut runs = 0;
        for input in inputs {
            for fuel in [0, 1, 7, 300] {
                let original = case.arena.run(ORIGINAL, input, fuel);
                let copy = case.arena.run(CACHE_AT, input, fuel);
                prop_assert_eq!(original, copy, "fuel {}", fuel);
                if let Some(counter) = case.emission.counters.of(LinkAddr(case.arena.address(ORIGINAL))) {
                    runs += 1;
                    let at = (counter.0 - case.arena.address(0)) as usize;
                    prop_assert!(case.arena.read(at) >= runs, "the entry ran {} times and more", runs);
                }
            }
        }
    }

    /// Every single flipped bit in a copy is seen, wherever it is: there is no part of a copy that may be anything.
    #[test]
    fn the_checker_sees_every_flipped_bit(shape in shape(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut case = make(&shape);
        let block = case.emission.blocks[at.index(case.emission.blocks.len())];
        prop_assume!(block.copy_size > 0);
        let byte = block.copy.0 as usize + at.index(block.copy_size as usize);
        prop_assume!(bit != 0 || !means_nothing(&case, &block, byte));
        case.emission.code[byte] ^= 1 << bit;
        prop_assert!(check(&case.emission, case.cache, &case.bytes).is_err(), "byte {byte:#x} of {block:?}");
    }

    /// A dropped instruction, with everything behind it moved up, is seen.
    #[test]
    fn the_checker_sees_a_dropped_instruction(shape in shape(), at in any::<prop::sample::Index>()) {
        let mut case = make(&shape);
        let block = case.emission.blocks[at.index(case.emission.blocks.len())];
        let range = block.copy.0 as usize..(block.copy.0 + u64::from(block.copy_size)) as usize;
        let mut decoder = iced_x86::Decoder::with_ip(64, &case.emission.code[range.clone()], 0, 0);
        let boundaries: Vec<_> = decoder.iter().map(|i| (i.ip() as usize, i.len())).collect();
        prop_assume!(!boundaries.is_empty());
        let (from, len) = boundaries[at.index(boundaries.len())];
        let dropped = case.emission.code[range.start + from..range.start + from + len].to_vec();
        case.emission.code.copy_within(range.start + from + len..range.end, range.start + from);
        let end = range.end;
        case.emission.code[end - len..end].fill(0x90);
        // The same instruction twice in a row: dropping one of a pair and padding is still a change, unless it is a nop.
        prop_assert!(check(&case.emission, case.cache, &case.bytes).is_err(), "dropped {dropped:02x?} of {block:?}");
    }

    /// A flipped bit in a table of the cache is seen.
    #[test]
    fn the_checker_sees_a_wrong_table(shape in shape(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut case = make(&shape);
        prop_assume!(!case.emission.shortcuts.tables.is_empty());
        let behind_copies = case.emission.blocks.iter().map(|b| b.copy.0 + u64::from(b.copy_size)).max().unwrap();
        let tables = (behind_copies as usize).next_multiple_of(64)..case.emission.code.len();
        let byte = tables.start + at.index(tables.len());
        // Between a table of distances and one of addresses there may be four bytes that nobody reads.
        let read = |t: &TableLoad| {
            let width = if t.absolute { 8 } else { 4 };
            let clone = moved(&case, t) as usize;
            (clone..clone + t.count as usize * width).contains(&byte)
        };
        prop_assume!(case.emission.shortcuts.tables.iter().any(read));
        case.emission.code[byte] ^= 1 << bit;
        prop_assert!(check(&case.emission, case.cache, &case.bytes).is_err());
    }

    /// A shortcut of which the emission says something else than what is so is seen.
    #[test]
    fn the_checker_sees_a_wrong_shortcut(shape in shape(), at in any::<prop::sample::Index>(), which in 0..4u8) {
        let mut case = make(&shape);
        let shortcuts = &mut case.emission.shortcuts;
        let counts = [shortcuts.stubs.len(), shortcuts.tables.len(), shortcuts.calls.len(), shortcuts.pointers.len()];
        prop_assume!(counts[which as usize] > 0);
        let i = at.index(counts[which as usize]);
        match which {
            0 => shortcuts.stubs[i].1 += 8,
            1 => shortcuts.tables[i].table += 4,
            2 => shortcuts.calls[i].1 += 16,
            _ => { shortcuts.pointers.remove(i); }
        }
        prop_assert!(check(&case.emission, case.cache, &case.bytes).is_err());
    }

    /// A block map that names a wrong place is seen: the map is what threads are moved by.
    #[test]
    fn the_checker_sees_a_wrong_block_map(shape in shape(), at in any::<prop::sample::Index>(), by in 1..5u64) {
        let mut case = make(&shape);
        let i = at.index(case.emission.blocks.len());
        prop_assume!(case.emission.blocks[i].copy_size > by as u32);
        case.emission.blocks[i].copy.0 += by;
        prop_assert!(check(&case.emission, case.cache, &case.bytes).is_err());
    }
}
