//! Lowering: from a plan's block order to machine code for a module's cache.
//!
//! The input is, for each function, its control-flow graph, its bytes and the order of its blocks; the output is the
//! image of the code cache and the map from original blocks to their copies. Nothing here is trusted: `check` proves
//! every copy against its original before anything is installed.
//!
//! What may differ between an original and its copy, and nothing else:
//! - where a block lies, and so the displacement of RIP-relative operands and direct branches (the addresses that they
//!   denote are the same, or a copy of the same);
//! - the sense of a conditional branch whose two ways are swapped; direct jumps that come or go at a block's end;
//! - the length of a branch's encoding (`loop` and `jrcxz`, which have no long form, get a jump beside them);
//! - no-operations (`nop`), which are left out;
//! - in a counting plan, the instructions that raise a counter, at places where what they change is dead
//!   ([`dyni_analyzer::probes`]).
//!
//! Layout of the cache: the hot part of every function in the plan's order, then the cold part of every function. Hot
//! parts begin on 16 bytes. Branches are short where they reach: starting from all short, those out of reach grow until
//! none does (each growth is final, so this ends; see the header of Cranelift's `MachBuffer` for the alternatives).

use dyni_analyzer::cfg::{Block, Cfg, Terminator};
use dyni_analyzer::probes::{self, How, Place};
use dyni_schema::{CacheAddr, FunctionPlan, LinkAddr};
use iced_x86::{Code, ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};
use std::collections::HashMap;
use std::ops::Range;

/// Alignment in bytes of a function's hot part.
const HOT_ALIGN: u64 = 16;
/// Alignment in bytes of the first cold part, so that the two never share a cache line.
const COLD_START_ALIGN: u64 = 64;
/// The length of a counter in bytes.
pub const COUNTER: u64 = 8;
/// What lies between the parts: a trap, should anything ever go there.
const FILL: u8 = 0xcc;

/// One function to copy.
#[derive(Debug)]
pub struct Source<'a> {
    /// Its control-flow graph.
    pub cfg: Cfg,
    /// The decisions about it.
    pub plan: &'a FunctionPlan,
    /// Its bytes, from the live process.
    pub code: Vec<u8>,
}

/// A copied block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopiedBlock {
    /// The original's first byte.
    pub original: LinkAddr,
    /// The original's length in bytes.
    pub size: u32,
    /// Where the copy is.
    pub copy: CacheAddr,
    /// The copy's length in bytes, jumps at its end included.
    pub copy_size: u32,
}

/// A module's code cache, not yet anywhere.
#[derive(Debug, Default)]
pub struct Emission {
    /// The image, from the first byte of the cache.
    pub code: Vec<u8>,
    /// How many bytes of `code`, from the front, are hot.
    pub hot_size: u64,
    /// Every copied block, by rising original address.
    pub blocks: Vec<CopiedBlock>,
    /// The places in original code to which copies may jump, rising, each once: nothing may be patched so that one of
    /// them lies inside a patch.
    pub escapes: Vec<LinkAddr>,
    /// What is counted, and where.
    pub counters: CounterMap,
}

/// The counters of a generation: [`COUNTER`] bytes each, behind the cache, in the order of the blocks that they count.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CounterMap {
    /// Where the first one lies.
    pub at: LinkAddr,
    /// The block that each counts, rising.
    pub blocks: Vec<LinkAddr>,
}

impl CounterMap {
    /// Where the counter of a block lies, if it has one.
    #[must_use]
    pub fn of(&self, block: LinkAddr) -> Option<LinkAddr> {
        self.blocks.binary_search(&block).ok().map(|i| self.at.plus(i as u64 * COUNTER))
    }
}

impl Emission {
    /// The copied block that starts at this original address.
    #[must_use]
    pub fn block_at(&self, original: LinkAddr) -> Option<&CopiedBlock> {
        self.blocks.binary_search_by_key(&original, |b| b.original).ok().map(|i| &self.blocks[i])
    }
}

/// Why a function could not be lowered; shown to users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unlowered {
    /// The plan names a block that the function does not have: it was made for other code.
    PlanMismatch,
    /// The entry block must stay in the original, so there is nothing to go to.
    EntryStays,
    /// An operand or target is more than 2 GB away from the cache.
    OutOfReach,
    /// An instruction that has no copy.
    Instruction,
    /// The cache has no room left; hotter functions went first.
    NoRoom,
}

impl Unlowered {
    /// One line for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::PlanMismatch => "does not have the blocks that the plan names",
            Self::EntryStays => "must keep its entry in the original",
            Self::OutOfReach => "refers to something more than 2 GB away from the code cache",
            Self::Instruction => "has an instruction that can't be moved",
            Self::NoRoom => "did not fit into the code cache",
        }
    }
}

/// Where a branch goes: the start of a copied block, or original code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Block(u32),
    Original(LinkAddr),
}

#[derive(Debug, Clone, Copy)]
enum Fix {
    /// A 4-byte displacement at this offset of the body, counted from the end of its instruction, to an address.
    Address { at: u32, next: u32, address: LinkAddr },
    /// The same, to a branch target.
    Branch { at: u32, next: u32, target: Target },
}

/// A direct branch at the end of a block.
#[derive(Debug, Clone, Copy)]
struct Jump {
    kind: Kind,
    target: Target,
    long: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Always,
    /// The condition as the low four bits of the opcode.
    If(u8),
    /// `loop`, `loope`, `loopne`, `jrcxz` (opcodes E0 to E3), `jecxz` and its like with a 67 prefix.
    Counter {
        opcode: u8,
        prefix: bool,
    },
}

impl Jump {
    fn new(kind: Kind, target: Target) -> Self {
        Self { kind, target, long: matches!(kind, Kind::Counter { .. }) }
    }

    fn len(self) -> u64 {
        match (self.kind, self.long) {
            (Kind::Always | Kind::If(_), false) => 2,
            (Kind::Always, true) => 5,
            (Kind::If(_), true) => 6,
            // opcode rel8; jmp short over; jmp rel32
            (Kind::Counter { prefix, .. }, _) => 9 + u64::from(prefix),
        }
    }

    /// Writes it so that it ends `len` bytes further on, `distance` being counted from that end.
    fn write(self, out: &mut Vec<u8>, distance: i64) {
        let rel32 = |d: i64| i32::try_from(d).expect("reach was checked for the whole cache").to_le_bytes();
        let rel8 = |d: i64| i8::try_from(d).expect("short branches were grown until they reach").to_le_bytes();
        match (self.kind, self.long) {
            (Kind::Always, false) => {
                out.push(0xeb);
                out.extend(rel8(distance));
            }
            (Kind::Always, true) => {
                out.push(0xe9);
                out.extend(rel32(distance));
            }
            (Kind::If(cc), false) => {
                out.push(0x70 | cc);
                out.extend(rel8(distance));
            }
            (Kind::If(cc), true) => {
                out.extend([0x0f, 0x80 | cc]);
                out.extend(rel32(distance));
            }
            (Kind::Counter { opcode, prefix }, _) => {
                if prefix {
                    out.push(0x67);
                }
                out.extend([opcode, 2, 0xeb, 5, 0xe9]);
                out.extend(rel32(distance));
            }
        }
    }
}

/// A block on its way into the cache.
struct Piece {
    original: LinkAddr,
    size: u32,
    body: Vec<u8>,
    fixes: Vec<Fix>,
    jumps: Vec<Jump>,
    /// Where it comes to lie.
    at: u64,
}

impl Piece {
    fn len(&self) -> u64 {
        self.body.len() as u64 + self.jumps.iter().map(|j| j.len()).sum::<u64>()
    }
}

/// Whether every byte of a cache of `size` bytes at `cache` can reach `address` with a 32-bit displacement, with room
/// to spare for the length of an instruction.
fn in_reach(cache: LinkAddr, size: u64, address: LinkAddr) -> bool {
    let limit = i64::from(i32::MAX) - 64;
    let (low, high) = (address.distance(cache), address.distance(cache.plus(size)));
    (-limit..=limit).contains(&low) && (-limit..=limit).contains(&high)
}

/// Lowers a module's functions into a cache at `cache` (its link address, fixed relative to the module) of at most
/// `room` bytes, with counters, if the plan has probes, from `counters_at` on. Functions that can't be lowered are left
/// out, with the index into `sources` and the reason; a branch to
/// one of them goes to its original.
#[must_use]
pub fn lower(
    sources: &[Source<'_>],
    cache: LinkAddr,
    room: u64,
    counters_at: LinkAddr,
) -> (Emission, Vec<(usize, Unlowered)>) {
    let mut refused = Vec::new();
    let mut chosen: Vec<usize> = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        match admissible(source, cache, room) {
            Ok(()) => chosen.push(index),
            Err(reason) => refused.push((index, reason)),
        }
    }
    loop {
        let taken: Vec<&Source<'_>> = chosen.iter().map(|&i| &sources[i]).collect();
        let emission = emit(&taken, cache, counters_at);
        if emission.code.len() as u64 <= room {
            refused.sort_unstable();
            return (emission, refused);
        }
        // Too much: the coldest functions go, as many as make up for the excess and a little.
        let mut excess = emission.code.len() as u64 - room;
        excess += excess / 16;
        let mut by_weight = chosen.clone();
        by_weight.sort_by_key(|&i| (sources[i].plan.weight, i));
        let mut dropped = Vec::new();
        for index in by_weight {
            dropped.push(index);
            excess = excess.saturating_sub(u64::from(sources[index].plan.size));
            if excess == 0 {
                break;
            }
        }
        chosen.retain(|i| !dropped.contains(i));
        refused.extend(dropped.into_iter().map(|i| (i, Unlowered::NoRoom)));
    }
}

/// The blocks of a function that are copied, in order, as indices into its graph, and how many of them are hot.
fn order(source: &Source<'_>) -> Result<(Vec<usize>, usize), Unlowered> {
    let mut blocks = Vec::with_capacity(source.plan.blocks.len());
    let mut hot = 0;
    for (position, &offset) in source.plan.blocks.iter().enumerate() {
        let index = source.cfg.block_at(source.cfg.start.plus(u64::from(offset))).ok_or(Unlowered::PlanMismatch)?;
        if source.cfg.blocks[index].keep_original.is_some() {
            continue;
        }
        hot += usize::from(position < source.plan.hot as usize);
        blocks.push(index);
    }
    match blocks.first() {
        Some(0) if source.plan.blocks[0] == 0 => Ok((blocks, hot)),
        _ => Err(Unlowered::EntryStays),
    }
}

/// Where the counters of a function are raised: for each block with a probe, in the plan's order, its index and place.
fn probe_places(source: &Source<'_>) -> Result<Vec<(usize, Place)>, Unlowered> {
    let (copied, _) = order(source)?;
    let place_of = |&offset: &u32| {
        let index = source.cfg.block_at(source.cfg.start.plus(u64::from(offset)))?;
        let block = &source.cfg.blocks[index];
        let bytes = &source.code[offset as usize..block.end.distance(source.cfg.start) as usize];
        copied.contains(&index).then_some(())?;
        Some((index, probes::place(bytes, block.start)?))
    };
    source.plan.probes.iter().map(place_of).collect::<Option<_>>().ok_or(Unlowered::PlanMismatch)
}

fn instructions<'a>(source: &'a Source<'_>, block: &Block) -> Decoder<'a> {
    let from = block.start.distance(source.cfg.start) as usize;
    let to = block.end.distance(source.cfg.start) as usize;
    Decoder::with_ip(64, &source.code[from..to], block.start.0, DecoderOptions::NONE)
}

/// Checks all that could fail later, so that emission can't.
fn admissible(source: &Source<'_>, cache: LinkAddr, room: u64) -> Result<(), Unlowered> {
    let (blocks, _) = order(source)?;
    probe_places(source)?;
    for index in blocks {
        let block = &source.cfg.blocks[index];
        let reach = |address: u64| {
            if in_reach(cache, room, LinkAddr(address)) { Ok(()) } else { Err(Unlowered::OutOfReach) }
        };
        reach(block.end.0)?;
        for instruction in instructions(source, block) {
            let is_last = instruction.ip() == block.last.0;
            if instruction.is_invalid() {
                return Err(Unlowered::Instruction);
            }
            if instruction.is_ip_rel_memory_operand() {
                reach(instruction.ip_rel_memory_address())?;
            }
            if matches!(instruction.op0_kind(), OpKind::NearBranch64) && instruction.op_count() > 0 {
                reach(instruction.near_branch_target())?;
                let branch = branch_kind(&instruction);
                if !(instruction.code() == Code::Call_rel32_64 || (is_last && branch.is_some())) {
                    return Err(Unlowered::Instruction);
                }
            } else if matches!(
                instruction.op0_kind(),
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::FarBranch16
            ) && instruction.op_count() > 0
            {
                return Err(Unlowered::Instruction);
            }
        }
    }
    Ok(())
}

/// What kind of direct jump this is; `None` if it is none that ends a block.
fn branch_kind(instruction: &Instruction) -> Option<Kind> {
    match instruction.mnemonic() {
        Mnemonic::Jmp => Some(Kind::Always),
        Mnemonic::Loopne => Some(counter(instruction, 0xe0)),
        Mnemonic::Loope => Some(counter(instruction, 0xe1)),
        Mnemonic::Loop => Some(counter(instruction, 0xe2)),
        Mnemonic::Jrcxz | Mnemonic::Jecxz => Some(counter(instruction, 0xe3)),
        _ => match instruction.condition_code() {
            ConditionCode::None => None,
            // iced numbers conditions as the processor does, from 1.
            condition => Some(Kind::If(condition as u8 - 1)),
        },
    }
}

fn counter(instruction: &Instruction, opcode: u8) -> Kind {
    use Code::{Jecxz_rel8_64, Loop_rel8_64_ECX, Loope_rel8_64_ECX, Loopne_rel8_64_ECX};
    let narrow = [Jecxz_rel8_64, Loop_rel8_64_ECX, Loope_rel8_64_ECX, Loopne_rel8_64_ECX];
    Kind::Counter { opcode, prefix: narrow.contains(&instruction.code()) }
}

/// Emits functions that were all found admissible.
fn emit(sources: &[&Source<'_>], cache: LinkAddr, counters_at: LinkAddr) -> Emission {
    // Parts in layout order: hot ones, then cold ones; each a list of (function, block).
    let orders: Vec<_> = sources.iter().map(|s| order(s).expect("it was found admissible")).collect();
    let part = |f: usize, range: Range<usize>| orders[f].0[range].iter().map(move |&b| (f, b)).collect::<Vec<_>>();
    let hot = (0..sources.len()).map(|f| part(f, 0..orders[f].1));
    let cold = (0..sources.len()).map(|f| part(f, orders[f].1..orders[f].0.len()));
    let hot_parts = sources.len();
    let parts: Vec<_> = hot.chain(cold).collect();

    let mut ids = HashMap::new();
    for (id, &(f, b)) in parts.iter().flatten().enumerate() {
        ids.insert(sources[f].cfg.blocks[b].start, id as u32);
    }
    let places = sources.iter().flat_map(|s| {
        let places = probe_places(s).expect("it was found admissible");
        places.into_iter().map(|(block, place)| (s.cfg.blocks[block].start, place))
    });
    let places: HashMap<LinkAddr, Place> = places.collect();
    let mut counters = CounterMap { at: counters_at, blocks: places.keys().copied().collect() };
    counters.blocks.sort_unstable();
    let resolve = |address: LinkAddr| match ids.get(&address) {
        Some(&id) => Target::Block(id),
        None => Target::Original(address),
    };
    let mut escapes = Vec::new();
    let mut pieces: Vec<Piece> = Vec::with_capacity(ids.len());
    let mut part_ranges = Vec::with_capacity(parts.len());
    for part in &parts {
        let first = pieces.len();
        for (position, &(f, b)) in part.iter().enumerate() {
            let next = part.get(position + 1).map(|_| Target::Block((first + position + 1) as u32));
            let block = &sources[f].cfg.blocks[b];
            let counter = places.get(&block.start).copied().zip(counters.of(block.start));
            pieces.push(piece(sources[f], block, next, counter, &resolve, &mut escapes));
        }
        part_ranges.push(first..pieces.len());
        settle(&mut pieces[first..], first as u32);
    }

    let mut at = 0u64;
    let mut hot_size = 0;
    for (number, range) in part_ranges.into_iter().enumerate() {
        if number < hot_parts {
            at = at.next_multiple_of(HOT_ALIGN);
        } else if number == hot_parts {
            at = at.next_multiple_of(COLD_START_ALIGN);
        }
        for piece in &mut pieces[range] {
            piece.at = at;
            at += piece.len();
        }
        if number + 1 == hot_parts {
            hot_size = at;
        }
    }

    let starts: Vec<u64> = pieces.iter().map(|p| p.at).collect();
    let address = |target: Target| match target {
        Target::Block(id) => cache.plus(starts[id as usize]),
        Target::Original(address) => address,
    };
    let mut code = Vec::with_capacity(at as usize);
    let mut blocks = Vec::with_capacity(pieces.len());
    for piece in &mut pieces {
        code.resize(piece.at as usize, FILL);
        for fix in &piece.fixes {
            let (field, next, to) = match *fix {
                Fix::Address { at, next, address } => (at, next, address),
                Fix::Branch { at, next, target } => (at, next, address(target)),
            };
            let from = cache.plus(piece.at + u64::from(next));
            let displacement = i32::try_from(to.distance(from)).expect("reach was checked for the whole cache");
            piece.body[field as usize..field as usize + 4].copy_from_slice(&displacement.to_le_bytes());
        }
        code.extend_from_slice(&piece.body);
        for jump in &piece.jumps {
            let end = cache.plus(code.len() as u64 + jump.len());
            jump.write(&mut code, address(jump.target).distance(end));
        }
        blocks.push(CopiedBlock {
            original: piece.original,
            size: piece.size,
            copy: CacheAddr(piece.at),
            copy_size: piece.len() as u32,
        });
    }
    blocks.sort_unstable_by_key(|b| b.original);
    escapes.sort_unstable();
    escapes.dedup();
    Emission { code, hot_size, blocks, escapes, counters }
}

/// Raises the counter at `counter`.
fn raise(how: How, counter: LinkAddr, body: &mut Vec<u8>, fixes: &mut Vec<Fix>) {
    // A RIP-relative operand with its displacement at the end of the instruction.
    let mut operand = |body: &mut Vec<u8>, opcode: [u8; 3]| {
        body.extend(opcode);
        body.extend([0; 4]);
        let next = body.len() as u32;
        fixes.push(Fix::Address { at: next - 4, next, address: counter });
    };
    match how {
        How::Flags => operand(body, [0x48, 0xff, 0x05]),
        How::Register(r) => {
            let (high, low) = (r >> 3, r & 7);
            operand(body, [0x48 | high << 2, 0x8b, low << 3 | 5]);
            body.extend([0x48 | high << 2 | high, 0x8d, 0x40 | low << 3 | low, 1]);
            operand(body, [0x48 | high << 2, 0x89, low << 3 | 5]);
        }
    }
}

/// One block's body and the jumps at its end, given the block that lies behind it.
fn piece(
    source: &Source<'_>,
    block: &Block,
    next: Option<Target>,
    counter: Option<(Place, LinkAddr)>,
    resolve: &dyn Fn(LinkAddr) -> Target,
    escapes: &mut Vec<LinkAddr>,
) -> Piece {
    let mut body = Vec::with_capacity((block.end.distance(block.start) + 8) as usize);
    let mut fixes = Vec::new();
    let mut jumps = Vec::new();
    let base = source.cfg.start;
    let mut go = |kind: Kind, to: Target| {
        if let Target::Original(address) = to {
            escapes.push(address);
        }
        jumps.push(Jump::new(kind, to));
    };
    let mut decoder = instructions(source, block);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let is_last = instruction.ip() == block.last.0;
        if let Some((place, counter)) = counter.filter(|(place, _)| place.at.0 == instruction.ip()) {
            raise(place.how, counter, &mut body, &mut fixes);
        }
        let fall = resolve(block.end);
        match block.terminator {
            Terminator::Jump { target } if is_last => {
                let to = resolve(target);
                if Some(to) != next {
                    go(Kind::Always, to);
                }
                continue;
            }
            Terminator::Conditional { taken } if is_last => {
                let kind = branch_kind(&instruction).expect("it was found admissible");
                let to = resolve(taken);
                match kind {
                    Kind::If(cc) if Some(to) == next => go(Kind::If(cc ^ 1), fall),
                    _ => {
                        go(kind, to);
                        if Some(fall) != next {
                            go(Kind::Always, fall);
                        }
                    }
                }
                continue;
            }
            _ => {}
        }
        if instruction.mnemonic() != Mnemonic::Nop {
            let from = (instruction.ip() - base.0) as usize;
            let at = body.len() as u32;
            if instruction.code() == Code::Call_rel32_64 {
                // Whatever prefixes it had (padding for the linker) mean nothing to a call.
                body.extend([0xe8, 0, 0, 0, 0]);
                let target = resolve(LinkAddr(instruction.near_branch_target()));
                fixes.push(Fix::Branch { at: at + 1, next: at + 5, target });
            } else {
                body.extend_from_slice(&source.code[from..from + instruction.len()]);
                if instruction.is_ip_rel_memory_operand() {
                    let offsets = decoder.get_constant_offsets(&instruction);
                    fixes.push(Fix::Address {
                        at: at + offsets.displacement_offset() as u32,
                        next: at + instruction.len() as u32,
                        address: LinkAddr(instruction.ip_rel_memory_address()),
                    });
                }
            }
        }
        // A signal handler may step over an instruction that faults, `ud2` too: what follows it must be what follows it.
        let goes_on = match block.terminator {
            Terminator::FallThrough => true,
            Terminator::Stop => instruction.flow_control() != FlowControl::Return,
            _ => false,
        };
        if is_last && goes_on && Some(fall) != next {
            go(Kind::Always, fall);
        }
    }
    let size = block.end.distance(block.start) as u32;
    Piece { original: block.start, size, body, fixes, jumps, at: 0 }
}

/// Grows the branches of one part that do not reach with one byte. `first` is the id of its first piece.
fn settle(pieces: &mut [Piece], first: u32) {
    let inside = |target: Target, count: usize| match target {
        Target::Block(id) => (id as usize).checked_sub(first as usize).filter(|&i| i < count),
        Target::Original(_) => None,
    };
    let count = pieces.len();
    for piece in pieces.iter_mut() {
        for jump in &mut piece.jumps {
            jump.long |= inside(jump.target, count).is_none();
        }
    }
    loop {
        let mut starts = Vec::with_capacity(count);
        let mut at = 0;
        for piece in pieces.iter() {
            starts.push(at);
            at += piece.len();
        }
        let mut grew = false;
        for (index, piece) in pieces.iter_mut().enumerate() {
            let mut end = starts[index] + piece.body.len() as u64;
            for jump in &mut piece.jumps {
                end += jump.len();
                if let (false, Some(target)) = (jump.long, inside(jump.target, count)) {
                    let distance = starts[target] as i64 - end as i64;
                    jump.long = i8::try_from(distance).is_err();
                    grew |= jump.long;
                }
            }
        }
        if !grew {
            return;
        }
    }
}
