//! Where a jump through a table reads it, so that a copy can read another one.
//!
//! A copy's jump goes through a table of copies if the instruction that reads the table gets another displacement. What it
//! reads is then another number than in the original, up to the jump: the address of a copy, or its distance. That is
//! another value of the instruction pointer and nothing else, if nobody sees the number:
//!
//! - the jump reads the table itself, or a register is loaded in the same block and used by nothing but the addition of the
//!   table's address and the jump;
//! - that register is overwritten before it is read wherever the jump leads ([`is_dead`]).

use crate::cfg::{Block, Cfg, Terminator};
use crate::image::Image;
use dyni_schema::LinkAddr;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};
use std::collections::BTreeSet;

/// How many instructions are followed to see what becomes of a register.
const MAX_STEPS: usize = 512;

/// Those of a function, by rising address, each with the table, an index into [`Cfg::jump_tables`].
#[must_use]
pub fn all(image: &Image, cfg: &Cfg) -> Vec<(LinkAddr, u32)> {
    let of = |b: &Block| match b.terminator {
        Terminator::Indirect { table: Some(t) } if b.keep_original.is_none() => Some((load(image, cfg, b)?, t)),
        _ => None,
    };
    cfg.blocks.iter().filter_map(of).collect()
}

/// The instruction that reads the table of the jump at the end of a block, if it may read another one.
#[must_use]
pub fn load(image: &Image, cfg: &Cfg, block: &Block) -> Option<LinkAddr> {
    let Terminator::Indirect { table: Some(t) } = block.terminator else { return None };
    let table = &cfg.jump_tables[t as usize];
    let bytes = image.bytes(block.start, block.end.distance(block.start) as usize)?;
    let all: Vec<Instruction> = Decoder::with_ip(64, bytes, block.start.0, DecoderOptions::NONE).into_iter().collect();
    let (jump, before) = all.split_last()?;
    if !table.exact || jump.code() != Code::Jmp_rm64 {
        return None;
    }
    if jump.op0_kind() == OpKind::Memory {
        return (table.absolute && reads_table(jump, true)).then_some(block.last);
    }
    let register = jump.op0_register();
    let mut factory = InstructionInfoFactory::new();
    let mut touches =
        |i: &Instruction| factory.info(i).used_registers().iter().any(|u| u.register().full_register() == register);
    // Backwards: the addition, if the entries are distances, then the load.
    let mut added = table.absolute;
    for i in before.iter().rev() {
        if !touches(i) {
            continue;
        }
        let adds = matches!(i.code(), Code::Add_r64_rm64 | Code::Add_rm64_r64)
            && i.op0_kind() == OpKind::Register
            && i.op0_register() == register
            && i.op1_kind() == OpKind::Register
            && i.op1_register() != register;
        if adds && !added {
            added = true;
            continue;
        }
        let loads = i.code() == if table.absolute { Code::Mov_r64_rm64 } else { Code::Movsxd_r64_rm32 };
        let is_load = added && loads && i.op0_register() == register && reads_table(i, table.absolute);
        let dead = || table.targets.iter().all(|&t| is_dead(image, t, register));
        return (is_load && dead()).then_some(LinkAddr(i.ip()));
    }
    None
}

/// A memory operand with an index, as wide as a table's entry, that a displacement can be added to.
fn reads_table(i: &Instruction, absolute: bool) -> bool {
    let operand = if i.op0_kind() == OpKind::Memory { i.op0_kind() } else { i.op1_kind() };
    let scale = if absolute { 8 } else { 4 };
    let wide = |r: Register| r == Register::None || r.is_gpr64();
    operand == OpKind::Memory
        && i.memory_index().is_gpr64()
        && i.memory_index_scale() == scale
        && wide(i.memory_base())
        && i.segment_prefix() == Register::None
}

/// Whether a register is overwritten before it is read on every way from here, as far as code can be followed. A call reads
/// the registers that carry arguments (not rax, which carries only how many a variadic function has); so does a return
/// what it gives back.
#[must_use]
pub fn is_dead(image: &Image, from: LinkAddr, register: Register) -> bool {
    use Register::{R8, R9, R10, R11, RAX, RCX, RDI, RDX, RSI};
    let mut factory = InstructionInfoFactory::new();
    let mut seen = BTreeSet::new();
    let mut todo = vec![from];
    let mut steps = 0;
    while let Some(at) = todo.pop() {
        if !seen.insert(at) {
            continue;
        }
        let Some(bytes) = (1..=15).rev().find_map(|n| image.bytes(at, n)) else { return false };
        let i = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).decode();
        steps += 1;
        if i.is_invalid() || steps > MAX_STEPS {
            return false;
        }
        let mut overwritten = false;
        // `xor r, r` reads nothing.
        let zeroes = matches!(i.mnemonic(), Mnemonic::Xor | Mnemonic::Sub)
            && i.op0_kind() == OpKind::Register
            && i.op1_kind() == OpKind::Register
            && i.op0_register() == i.op1_register()
            && i.op0_register().size() >= 4;
        for used in factory.info(&i).used_registers().iter().filter(|u| u.register().full_register() == register) {
            match used.access() {
                OpAccess::Write if used.register().size() >= 4 => overwritten = true,
                OpAccess::ReadWrite | OpAccess::Read if zeroes => overwritten = true,
                _ => return false,
            }
        }
        if overwritten {
            continue;
        }
        let next = LinkAddr(i.next_ip());
        let target = || LinkAddr(i.near_branch_target());
        match i.flow_control() {
            FlowControl::Next => todo.push(next),
            FlowControl::UnconditionalBranch if i.near_branch_target() != 0 => todo.push(target()),
            FlowControl::ConditionalBranch => todo.extend([next, target()]),
            FlowControl::Call | FlowControl::IndirectCall => match register {
                RDI | RSI | RDX | RCX | R8 | R9 | R10 => return false,
                // What a call leaves in these is its own.
                RAX | R11 => {}
                _ => todo.push(next),
            },
            FlowControl::Return => match register {
                RCX | RSI | RDI | R8 | R9 | R10 | R11 => {}
                _ => return false,
            },
            // `ud2` and its like.
            FlowControl::Exception => {}
            _ => return false,
        }
    }
    true
}
