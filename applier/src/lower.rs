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
//!   ([`dyni_analyzer::probes`]);
//! - shortcuts past what only leads on ([`crate::shortcuts`]).
//!
//! Layout of the cache: the hot part of every function in the plan's order, then the cold part of every function, then jump
//! tables. Nothing is aligned: of a PostgreSQL backend, hot parts that begin on 16 bytes make the first-level instruction
//! cache miss 4 % more often, by simulation, than parts that lie close. Branches are short where they reach: starting from
//! all short, those out of reach grow until none does (each growth is final, so this ends; see the header of Cranelift's `MachBuffer` for the alternatives).

mod operand;
mod piece;
mod tables;

use crate::shortcuts::{Shortcuts, Stub};
use dyni_analyzer::calls::{self, Site};
use dyni_analyzer::cfg::{Block, Cfg};
use dyni_analyzer::probes::{self, Place};
use dyni_schema::{CacheAddr, CallSite, FunctionPlan, LinkAddr};
use iced_x86::{Code, Decoder, DecoderOptions, OpKind};
use operand::Operand;
use piece::{Around, Fix, Piece, Target, branch_kind, piece, plain_call, settle};
use std::collections::HashMap;
use std::ops::Range;
use tables::{Clone, Tables};

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
    /// The stubs that it calls or jumps to, if its copy is to go past them.
    pub stubs: Vec<Stub>,
    /// The instructions that read jump tables of which its copy gets others, rising, and which those are.
    pub table_loads: Vec<(LinkAddr, u32)>,
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
    /// Where copies go past what only leads on.
    pub shortcuts: Shortcuts,
}

/// The counters of a generation: [`COUNTER`] bytes each, behind the cache, in the order of the blocks that they count.
/// Behind them, as long each, what was called last by the sites that are recorded.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CounterMap {
    /// Where the first one lies.
    pub at: LinkAddr,
    /// The block that each counts, rising.
    pub blocks: Vec<LinkAddr>,
    /// The sites that are recorded, rising.
    pub sites: Vec<LinkAddr>,
}

impl CounterMap {
    /// Where the last callee of a site lies, if it is recorded.
    #[must_use]
    pub fn of_site(&self, site: LinkAddr) -> Option<LinkAddr> {
        let before = self.blocks.len() as u64;
        self.sites.binary_search(&site).ok().map(|i| self.at.plus((before + i as u64) * COUNTER))
    }

    /// How many bytes all of it takes.
    #[must_use]
    pub fn len(&self) -> u64 {
        (self.blocks.len() + self.sites.len()) as u64 * COUNTER
    }

    /// Whether nothing is counted or recorded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

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
        // A promoted call at a block's start has a copy of its own behind that of the block.
        let block = self.blocks.get(self.blocks.partition_point(|b| b.original < original))?;
        (block.original == original).then_some(block)
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
    let mut chosen: Vec<(usize, Admitted<'_>)> = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        match admit(source, cache, room) {
            Ok(admitted) => chosen.push((index, admitted)),
            Err(reason) => refused.push((index, reason)),
        }
    }
    loop {
        let taken: Vec<&Admitted<'_>> = chosen.iter().map(|(_, admitted)| admitted).collect();
        let emission = emit(&taken, cache, room, counters_at);
        if emission.code.len() as u64 <= room {
            refused.sort_unstable();
            return (emission, refused);
        }
        // Too much: the coldest functions go, as many as make up for the excess and a little.
        let mut excess = emission.code.len() as u64 - room;
        excess += excess / 16;
        let mut by_weight: Vec<usize> = chosen.iter().map(|c| c.0).collect();
        by_weight.sort_by_key(|&i| (sources[i].plan.weight, i));
        let mut dropped = Vec::new();
        for index in by_weight {
            dropped.push(index);
            excess = excess.saturating_sub(u64::from(sources[index].plan.size));
            if excess == 0 {
                break;
            }
        }
        chosen.retain(|(i, _)| !dropped.contains(i));
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
fn probe_places(source: &Source<'_>, copied: &[usize]) -> Result<Vec<(usize, Place)>, Unlowered> {
    let place_of = |&offset: &u32| {
        let index = source.cfg.block_at(source.cfg.start.plus(u64::from(offset)))?;
        let block = &source.cfg.blocks[index];
        let bytes = &source.code[offset as usize..block.end.distance(source.cfg.start) as usize];
        copied.contains(&index).then_some(())?;
        Some((index, probes::place(bytes, block.start)?))
    };
    source.plan.probes.iter().map(place_of).collect::<Option<_>>().ok_or(Unlowered::PlanMismatch)
}

/// The calls of a function's plan, in its order.
fn call_sites(source: &Source<'_>) -> Result<Vec<Site>, Unlowered> {
    if source.plan.calls.is_empty() {
        return Ok(Vec::new());
    }
    let sites = calls::sites(&source.cfg, &source.code);
    let site_of = |call: &CallSite| {
        let at = source.cfg.start.plus(u64::from(call.at));
        let site = sites[sites.binary_search_by_key(&at, |s| s.at).ok()?];
        let from = call.at as usize;
        Operand::of(&source.code[from..from + site.len as usize]).map(|_| site)
    };
    source.plan.calls.iter().map(site_of).collect::<Option<_>>().ok_or(Unlowered::PlanMismatch)
}

fn instructions<'a>(source: &'a Source<'_>, block: &Block) -> Decoder<'a> {
    let from = block.start.distance(source.cfg.start) as usize;
    let to = block.end.distance(source.cfg.start) as usize;
    Decoder::with_ip(64, &source.code[from..to], block.start.0, DecoderOptions::NONE)
}

/// A function that can be emitted.
struct Admitted<'s> {
    source: &'s Source<'s>,
    /// The blocks that are copied, in order.
    blocks: Vec<usize>,
    /// How many of them are hot.
    hot: usize,
    /// Where counters are raised.
    places: Vec<(usize, Place)>,
    /// The calls of the plan.
    sites: Vec<Site>,
}

/// Checks all that could fail later, so that emission can't.
fn admit<'s>(source: &'s Source<'s>, cache: LinkAddr, room: u64) -> Result<Admitted<'s>, Unlowered> {
    let (blocks, hot) = order(source)?;
    let places = probe_places(source, &blocks)?;
    let sites = call_sites(source)?;
    let copied = |site: &Site| blocks.contains(&site.block);
    if !sites.iter().all(copied) {
        return Err(Unlowered::PlanMismatch);
    }
    let callees = source.plan.calls.iter().filter(|c| c.callee != 0).map(|c| c.callee);
    let slots = source.stubs.iter().map(|s| s.slot.0);
    if !callees.chain(slots).all(|address| in_reach(cache, room, LinkAddr(address))) {
        return Err(Unlowered::OutOfReach);
    }
    for &index in &blocks {
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
    Ok(Admitted { source, blocks, hot, places, sites })
}

/// What a piece is made from: a block of a function, or a promoted call in it as it is.
#[derive(Clone, Copy)]
enum Item {
    Block(usize, usize),
    Plain(usize, Site),
}

/// The promoted calls of the functions, by function: those whose callee is copied too, and reads nothing that the
/// comparison changes.
fn promoted(admitted: &[&Admitted<'_>]) -> Vec<Vec<(Site, LinkAddr)>> {
    let by_start: HashMap<LinkAddr, &Source<'_>> = admitted.iter().map(|a| (a.source.cfg.start, a.source)).collect();
    let mut takes: HashMap<LinkAddr, bool> = HashMap::new();
    let mut takes = |callee: LinkAddr| {
        *takes
            .entry(callee)
            .or_insert_with(|| by_start.get(&callee).is_some_and(|s| !calls::reads_scratch_at_entry(&s.cfg, &s.code)))
    };
    let mut of = |a: &Admitted<'_>| {
        let promoted = a.sites.iter().zip(&a.source.plan.calls).map(|(site, call)| (*site, LinkAddr(call.callee)));
        promoted.filter(|(_, callee)| callee.0 != 0 && takes(*callee)).collect()
    };
    admitted.iter().map(|a| of(a)).collect()
}

/// What the blocks of these functions are to go past.
fn shortcuts(sources: &[&Source<'_>], promoted: &[Vec<(Site, LinkAddr)>], tables: &Tables) -> Shortcuts {
    let mut stubs: Vec<_> = sources.iter().flat_map(|s| &s.stubs).map(|s| (s.at.0, s.slot.0)).collect();
    stubs.sort_unstable();
    stubs.dedup();
    let mut calls: Vec<_> = promoted.iter().flatten().map(|(site, callee)| (site.at.0, callee.0)).collect();
    calls.sort_unstable();
    Shortcuts { stubs, calls, tables: tables.loads.iter().map(|l| l.0).collect(), pointers: Vec::new() }
}

/// The counters of these functions, and where they are raised, by block.
fn counters(admitted: &[&Admitted<'_>], at: LinkAddr) -> (CounterMap, HashMap<LinkAddr, Place>) {
    let places =
        admitted.iter().flat_map(|a| a.places.iter().map(|&(block, place)| (a.source.cfg.blocks[block].start, place)));
    let places: HashMap<LinkAddr, Place> = places.collect();
    let recorded = |a: &&Admitted<'_>| {
        let calls = a.sites.iter().zip(&a.source.plan.calls).filter(|(_, c)| c.callee == 0);
        calls.map(|(site, _)| site.at).collect::<Vec<_>>()
    };
    let sites = admitted.iter().flat_map(recorded);
    let mut counters = CounterMap { at, blocks: places.keys().copied().collect(), sites: sites.collect() };
    counters.blocks.sort_unstable();
    counters.sites.sort_unstable();
    (counters, places)
}

/// Emits functions that were all found admissible.
fn emit(admitted: &[&Admitted<'_>], cache: LinkAddr, room: u64, counters_at: LinkAddr) -> Emission {
    let sources: Vec<&Source<'_>> = admitted.iter().map(|a| a.source).collect();
    let promoted = promoted(admitted);
    // Parts in layout order: hot ones, then cold ones.
    let part =
        |f: usize, range: Range<usize>| admitted[f].blocks[range].iter().map(move |&b| Item::Block(f, b)).collect();
    let hot = (0..sources.len()).map(|f| part(f, 0..admitted[f].hot));
    let cold = (0..sources.len()).map(|f| {
        let mut cold: Vec<Item> = part(f, admitted[f].hot..admitted[f].blocks.len());
        cold.extend(promoted[f].iter().map(|(site, _)| Item::Plain(f, *site)));
        cold
    });
    let hot_parts = sources.len();
    let parts: Vec<Vec<Item>> = hot.chain(cold).collect();

    let (mut blocks, mut plain) = (HashMap::new(), HashMap::new());
    for (id, item) in parts.iter().flatten().enumerate() {
        match *item {
            Item::Block(f, b) => blocks.insert(sources[f].cfg.blocks[b].start, id as u32),
            Item::Plain(_, site) => plain.insert(site.at, id as u32),
        };
    }
    let copied = (0..sources.len()).flat_map(|f| admitted[f].blocks.iter().map(move |&b| (f, b)));
    let tables = Tables::of(&sources, copied, &(cache..cache.plus(room)));
    let mut shortcuts = shortcuts(&sources, &promoted, &tables);
    let (counters, places) = counters(admitted, counters_at);
    let around = Around { blocks: &blocks, plain: &plain, places: &places, counters: &counters, shortcuts: &shortcuts };
    let mut escapes = Vec::new();
    let mut pieces: Vec<Piece> = Vec::with_capacity(blocks.len());
    let mut part_ranges = Vec::with_capacity(parts.len());
    for part in &parts {
        let first = pieces.len();
        for (position, item) in part.iter().enumerate() {
            let next = part.get(position + 1).map(|_| Target::Block((first + position + 1) as u32));
            pieces.push(match *item {
                Item::Block(f, b) => piece(sources[f], &sources[f].cfg.blocks[b], next, &around, &mut escapes),
                Item::Plain(f, site) => plain_call(sources[f], &site, &around, &mut escapes),
            });
        }
        part_ranges.push(first..pieces.len());
        settle(&mut pieces[first..], first as u32);
    }

    let mut at = 0u64;
    let mut hot_size = 0;
    for (number, range) in part_ranges.into_iter().enumerate() {
        if number == hot_parts {
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
    let tables_at = if tables.len > 0 { at.next_multiple_of(COLD_START_ALIGN) } else { at };

    let starts: Vec<u64> = pieces.iter().map(|p| p.at).collect();
    let address = |target: Target| match target {
        Target::Block(id) => cache.plus(starts[id as usize]),
        Target::Original(address) => address,
    };
    let reached = |distance: i64| i32::try_from(distance).expect("reach was checked for the whole cache").to_le_bytes();
    let mut code = Vec::with_capacity((tables_at + tables.len) as usize);
    let mut copied = Vec::with_capacity(pieces.len());
    for piece in &mut pieces {
        code.resize(piece.at as usize, FILL);
        for fix in &piece.fixes {
            let from = |next: u32| cache.plus(piece.at + u64::from(next));
            let (field, displacement) = match *fix {
                Fix::Address { at, next, address } => (at, address.distance(from(next))),
                Fix::Branch { at, next, target } => (at, address(target).distance(from(next))),
                Fix::Table { at, load, original } => {
                    let moved = tables.moved(load, cache.plus(tables_at)).expect("it has a table");
                    (at, i64::from(original) + moved)
                }
            };
            piece.body[field as usize..field as usize + 4].copy_from_slice(&reached(displacement));
        }
        code.extend_from_slice(&piece.body);
        for jump in &piece.jumps {
            let end = cache.plus(code.len() as u64 + jump.len());
            jump.write(&mut code, address(jump.target).distance(end));
        }
        copied.push(CopiedBlock {
            original: piece.original,
            size: piece.size,
            copy: CacheAddr(piece.at),
            copy_size: piece.len() as u32,
        });
    }
    for Clone { at, original, absolute, targets } in &tables.clones {
        code.resize((tables_at + at) as usize, FILL);
        for &target in targets {
            let to = blocks.get(&target).map_or(target, |&id| address(Target::Block(id)));
            if to == target {
                escapes.push(target);
            }
            // A distance is added to the address of the original's table.
            if *absolute {
                shortcuts.pointers.push(code.len() as u32);
                code.extend(to.0.to_le_bytes());
            } else {
                code.extend(reached(to.distance(*original)));
            }
        }
    }
    copied.sort_unstable_by_key(|b| (b.original, b.copy));
    escapes.sort_unstable();
    escapes.dedup();
    Emission { code, hot_size, blocks: copied, escapes, counters, shortcuts }
}
