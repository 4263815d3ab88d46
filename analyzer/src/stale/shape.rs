//! What a function looks like inside: what a profile keeps of it ([`FunctionShape`]), made from its code.
//!
//! Nothing of it depends on where the function lies, nor where that which it refers to does. The hash of a block has its
//! instructions' mnemonics, but neither unconditional jumps and no-ops nor the sense of a condition, which another order of
//! the same blocks changes, nor operands, which another choice of registers does.

use crate::cfg::{self, Block, Cfg, Terminator};
use crate::functions::{Function, function_hash};
use crate::image::Image;
use crate::passes::infer::may_enter_or_leave;
use crate::plan::Module;
use dyni_schema::{BlockShape, FunctionHash, FunctionShape, LinkAddr};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The tails that linkers and compilers add to a name, each with a number that changes from build to build.
const VOLATILE: [&str; 2] = [".lto_priv.", ".llvm."];

/// Where in [`BlockShape::ends`] the kind of the last instruction stands: above the bits that have names.
const KIND: u32 = 3;

/// What stands in a block's hash for any conditional branch.
const CONDITIONAL: u16 = u16::MAX;

/// A function with its graph, and what it calls before that is a matter of hashes.
pub(crate) struct Shaped {
    /// Its graph.
    pub cfg: Cfg,
    /// Its blocks in the order of the graph's.
    pub blocks: Vec<BlockShape>,
    /// What it calls directly, in the order in which it does.
    pub callees: Vec<Callee>,
}

/// Who is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Callee {
    /// A function of the module, by its start.
    Own(LinkAddr),
    /// A function of another module, by its name's hash.
    Named(u16),
}

/// A hash of a name; never 0.
pub(crate) fn name_hash(name: &str) -> u64 {
    let cut = VOLATILE.iter().filter_map(|tail| name.find(tail)).min().unwrap_or(name.len());
    let hash = blake3::hash(&name.as_bytes()[..cut]);
    hash.as_bytes().iter().take(8).fold(0, |n, &b| n << 8 | u64::from(b)).max(1)
}

/// The hash of the name of the function at this address; 0 if it has none.
pub(crate) fn name_at(image: &Image, start: LinkAddr) -> u64 {
    image.symbol_at(start).filter(|s| s.1 == start).map_or(0, |s| name_hash(s.0))
}

/// What stands for a function of the module among those that are called.
pub(crate) const fn identity(hash: FunctionHash) -> u16 {
    u16::from_be_bytes([hash.0[0], hash.0[1]])
}

/// The shapes of these functions, in their order. What they call is hashed with them, each callee once.
pub(crate) fn shapes(module: &Module<'_>, functions: &[&Function], with_blocks: &[bool]) -> Vec<FunctionShape> {
    let shaped: Vec<Option<Shaped>> = functions
        .par_iter()
        .zip(with_blocks)
        .with_max_len(16)
        .map(|(f, &wanted)| if wanted { shape(module, f) } else { None })
        .collect();
    let own = |s: &Shaped| {
        s.callees.iter().filter_map(|c| if let Callee::Own(at) = c { Some(*at) } else { None }).collect::<Vec<_>>()
    };
    let mut called: Vec<LinkAddr> = shaped.iter().flatten().flat_map(own).collect();
    called.sort_unstable();
    called.dedup();
    let hash =
        |&at: &LinkAddr| module.functions.starting_at(at).map(|f| (at, identity(function_hash(module.image, f))));
    let known: BTreeMap<LinkAddr, u16> = called.par_iter().filter_map(hash).collect();
    let shape_of = |(f, shaped): (&&Function, Option<Shaped>)| {
        let Some(shaped) = shaped else { return FunctionShape::default() };
        let name = name_at(module.image, f.start);
        let callees = shaped.callees.iter().filter_map(|c| match c {
            Callee::Own(at) => known.get(at).copied(),
            Callee::Named(hash) => Some(*hash),
        });
        FunctionShape { name, callees: callees.collect(), blocks: shaped.blocks }
    };
    functions.iter().zip(shaped).map(shape_of).collect()
}

/// What a function looks like; `None` if its code is not understood or has blocks of a length that shapes can't tell.
pub(crate) fn shape(module: &Module<'_>, function: &Function) -> Option<Shaped> {
    let cfg = cfg::build(module.image, module.functions, module.targets, function).ok()?;
    let (mut blocks, mut callees) = (Vec::with_capacity(cfg.blocks.len()), Vec::new());
    let mut at = function.start;
    for (block, (enters, leaves)) in cfg.blocks.iter().zip(may_enter_or_leave(&cfg)) {
        let hash = hash(module, function, block, &mut callees)?;
        let here = blocks.len() as i64;
        let distance = |&to: &u32| i16::try_from(i64::from(to) - here).ok();
        let mut successors = block.successors.iter().map(distance).collect::<Option<Vec<i16>>>()?;
        let runs_on = successors.last() == Some(&1);
        successors.truncate(successors.len() - usize::from(runs_on));
        let bits = [(enters, BlockShape::ENTERED), (leaves, BlockShape::LEFT), (runs_on, BlockShape::RUNS_ON)];
        let bits = bits.iter().filter(|b| b.0).fold(0, |all, b| all | b.1);
        blocks.push(BlockShape {
            skipped: u16::try_from(block.start.distance(at)).ok()?,
            length: u16::try_from(block.end.distance(block.start)).ok()?,
            hash,
            ends: bits | kind(block.terminator) << KIND,
            successors,
        });
        at = block.end;
    }
    Some(Shaped { cfg, blocks, callees })
}

/// The kind of a block's last instruction, as [`BlockShape::ends`] has it. Whether a block falls into the next one or
/// jumps to it is a matter of order, not of kind.
const fn kind(terminator: Terminator) -> u8 {
    match terminator {
        Terminator::FallThrough | Terminator::Jump { .. } => 0,
        Terminator::Conditional { .. } => 1,
        Terminator::Indirect { .. } => 2,
        Terminator::Stop => 3,
    }
}

/// The hash of a block. Its calls, and its jump if that leaves the function, are added to `callees`.
fn hash(module: &Module<'_>, function: &Function, block: &Block, callees: &mut Vec<Callee>) -> Option<u8> {
    let bytes = module.image.bytes(block.start, block.end.distance(block.start) as usize)?;
    let mut decoder = Decoder::with_ip(64, bytes, block.start.0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut text = Vec::with_capacity(32);
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        callees.extend(callee(module, function, &instruction));
        let mnemonic = match instruction.flow_control() {
            FlowControl::UnconditionalBranch => continue,
            FlowControl::ConditionalBranch => CONDITIONAL,
            _ if matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Endbr64) => continue,
            _ => instruction.mnemonic() as u16,
        };
        text.extend(mnemonic.to_le_bytes());
    }
    Some(blake3::hash(&text).as_bytes()[0])
}

/// Whom an instruction calls, or jumps to at the function's end.
fn callee(module: &Module<'_>, function: &Function, instruction: &Instruction) -> Option<Callee> {
    let image = module.image;
    let named = |name: &str| (!name.is_empty()).then(|| Callee::Named(name_hash(name) as u16));
    match instruction.flow_control() {
        FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
            let at = LinkAddr(instruction.near_branch_target());
            if at.0 == 0 || function.contains(at) {
                return None;
            }
            let own = module.functions.starting_at(at).map(|f| Callee::Own(f.start));
            own.or_else(|| image.plt_name(at).and_then(named))
        }
        FlowControl::IndirectCall | FlowControl::IndirectBranch if instruction.is_ip_rel_memory_operand() => {
            image.got_name(LinkAddr(instruction.ip_rel_memory_address())).and_then(named)
        }
        _ => None,
    }
}
