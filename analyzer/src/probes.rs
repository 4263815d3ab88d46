//! Probes: which blocks of a function have to be counted, and where in a block a counter can be raised unseen.
//!
//! **Which.** Executions flow: what enters a block leaves it. So with a spanning tree over the edges of the graph only
//! what is off the tree needs a counter (Knuth and Stevenson, "Optimal measurement points for program frequency counts",
//! 1973). Here the edges that can be counted are the blocks themselves, each split into an in-node and an out-node;
//! control-flow edges, and everything that comes from outside the function or goes there, can't be, and are in the tree
//! first. Then blocks follow, the most frequent first, as far as they close no circle: those need no probe.
//!
//! **Where.** A counter is raised before an instruction at which *by the block alone* either the arithmetic flags are dead
//! (the instruction, or one after it, sets all of them and none before reads any), so that `inc [counter]` does, or a
//! general register is (it is wholly overwritten before it is read), so that load, `lea`, store through it does. Nothing
//! is saved, nothing is pushed, and no byte of the stack is touched, so the red zone and the unwinder never notice. The
//! place is before the block's first call, which may not come back.

use crate::cfg::{Block, Cfg, Terminator};
use dyni_schema::LinkAddr;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits,
};

/// What `inc` changes: all arithmetic flags but the carry.
const COUNTED_FLAGS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::PF;

/// How a counter is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// `inc qword [counter]`: the flags are dead.
    Flags,
    /// `mov r, [counter]; lea r, [r + 1]; mov [counter], r`: this register is dead, given by its number in an encoding.
    Register(u8),
}

/// Where in a block its counter is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Before this instruction.
    pub at: LinkAddr,
    /// How.
    pub how: How,
}

/// Registers that may carry a count: not the stack pointer, nor the one that `lea` encodes in its own way.
const CARRIERS: [Register; 14] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::RBX,
    Register::RBP,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// Where the block whose bytes these are can be counted; `None` if nothing is dead anywhere before its first call.
#[must_use]
pub fn place(bytes: &[u8], start: LinkAddr) -> Option<Place> {
    let instructions: Vec<Instruction> =
        Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE).into_iter().collect();
    // Before the first call is in time, and so is before the branch at the end.
    let leaves = instructions.iter().position(|i| i.flow_control() != FlowControl::Next);
    let reach = &instructions[..leaves.map_or(instructions.len(), |i| i + 1)];
    let places = || (0..reach.len()).map(|i| (&reach[i..], LinkAddr(reach[i].ip())));
    let by_flags = places().find(|(rest, _)| flags_are_dead(rest)).map(|(_, at)| Place { at, how: How::Flags });
    by_flags.or_else(|| {
        let mut factory = InstructionInfoFactory::new();
        places().find_map(|(rest, at)| {
            let dead = CARRIERS.iter().find(|r| register_is_dead(&mut factory, rest, **r))?;
            Some(Place { at, how: How::Register(dead.number() as u8) })
        })
    })
}

/// Whether the flags that `inc` changes are set anew by these instructions before any of them reads one.
fn flags_are_dead(instructions: &[Instruction]) -> bool {
    for i in instructions {
        if i.rflags_read() & COUNTED_FLAGS != 0 {
            return false;
        }
        if sets_all_flags(i) {
            return true;
        }
        if i.flow_control() != FlowControl::Next {
            return false;
        }
    }
    false
}

/// Only what always sets all of what `inc` changes: a shift by zero, for one, leaves them as they are.
fn sets_all_flags(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Cmp
            | Mnemonic::Test
            | Mnemonic::Inc
            | Mnemonic::Dec
            | Mnemonic::Add
            | Mnemonic::Sub
            | Mnemonic::And
            | Mnemonic::Or
            | Mnemonic::Xor
            | Mnemonic::Neg
            | Mnemonic::Adc
            | Mnemonic::Sbb
    )
}

/// Whether a register is wholly overwritten by these instructions before any of them reads a part of it.
fn register_is_dead(factory: &mut InstructionInfoFactory, instructions: &[Instruction], register: Register) -> bool {
    for i in instructions {
        if i.flow_control() != FlowControl::Next || i.code() == Code::INVALID {
            return false;
        }
        let mut written = false;
        for used in factory.info(i).used_registers().iter().filter(|u| u.register().full_register() == register) {
            // A write of the low half clears the high one; one of 8 or 16 bits leaves the rest.
            match used.access() {
                OpAccess::Write if used.register().size() >= 4 => written = true,
                _ => return false,
            }
        }
        // A store that faults, or a string instruction, would show the register half-way; only plain moves are taken.
        if written {
            return i.op0_kind() == OpKind::Register;
        }
    }
    false
}

/// The blocks of a function that need a probe, as indices, ascending. `countable` says which blocks have a place for one,
/// `weight` how often a block seems to run (only for which are spared).
#[must_use]
pub fn choose(cfg: &Cfg, countable: &dyn Fn(usize) -> bool, weight: &dyn Fn(usize) -> u64) -> Vec<usize> {
    let n = cfg.blocks.len();
    let outside = 2 * n;
    let mut sets = Sets::new(2 * n + 1);
    let unknown = cfg.blocks.iter().any(|b| b.terminator == Terminator::Indirect { table: None });
    for (b, block) in cfg.blocks.iter().enumerate() {
        if b == 0 || block.address_taken && unknown {
            sets.join(outside, 2 * b);
        }
        if leaves(cfg, block) {
            sets.join(2 * b + 1, outside);
        }
        for &to in &block.successors {
            sets.join(2 * b + 1, 2 * to as usize);
        }
    }
    let mut rest = Vec::new();
    for b in 0..n {
        if countable(b) {
            rest.push(b);
        } else {
            sets.join(2 * b, 2 * b + 1);
        }
    }
    let depth = depths(cfg);
    rest.sort_by_key(|&b| (std::cmp::Reverse((weight(b), depth[b])), b));
    rest.retain(|&b| !sets.join(2 * b, 2 * b + 1));
    rest.sort_unstable();
    rest
}

/// Whether executions may leave the function at the end of this block.
fn leaves(cfg: &Cfg, block: &Block) -> bool {
    let outside = |at: LinkAddr| cfg.block_at(at).is_none();
    match block.terminator {
        Terminator::Stop | Terminator::Indirect { table: None } => true,
        Terminator::Jump { target } => outside(target),
        Terminator::Conditional { taken } => outside(taken) || outside(block.end),
        Terminator::FallThrough | Terminator::Indirect { table: Some(_) } => block.successors.is_empty(),
    }
}

/// A guess at how deep each block is in loops: how many backward branches span it.
fn depths(cfg: &Cfg) -> Vec<u32> {
    let n = cfg.blocks.len();
    let mut change = vec![0i64; n + 1];
    for (b, block) in cfg.blocks.iter().enumerate() {
        for &to in block.successors.iter().filter(|&&to| to as usize <= b) {
            change[to as usize] += 1;
            change[b + 1] -= 1;
        }
    }
    let mut now = 0;
    change[..n]
        .iter()
        .map(|c| {
            now += c;
            u32::try_from(now).unwrap_or(0)
        })
        .collect()
}

/// Disjoint sets.
struct Sets(Vec<u32>);

impl Sets {
    fn new(n: usize) -> Self {
        Self((0..n as u32).collect())
    }

    fn root(&mut self, mut x: usize) -> usize {
        while self.0[x] as usize != x {
            self.0[x] = self.0[self.0[x] as usize];
            x = self.0[x] as usize;
        }
        x
    }

    /// Makes one set of two; `false` if they were one.
    fn join(&mut self, a: usize, b: usize) -> bool {
        let (a, b) = (self.root(a), self.root(b));
        self.0[a.max(b)] = a.min(b) as u32;
        a != b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn how(bytes: &[u8]) -> Option<(u64, How)> {
        place(bytes, LinkAddr(0x1000)).map(|p| (p.at.0 - 0x1000, p.how))
    }

    #[test]
    fn flags_first_then_a_register() {
        // mov eax, [rdi]; cmp eax, 1; jne
        assert_eq!(how(&[0x8b, 0x07, 0x83, 0xf8, 0x01, 0x75, 0x00]), Some((0, How::Flags)));
        // jne alone reads them
        assert_eq!(how(&[0x75, 0x00]), None);
        // setne al; test al, al: dead only behind the reader
        assert_eq!(how(&[0x0f, 0x95, 0xc0, 0x84, 0xc0, 0x75, 0x00]), Some((3, How::Flags)));
        // mov rdi, rbx; call: rdi is dead
        assert_eq!(how(&[0x48, 0x89, 0xdf, 0xe8, 0, 0, 0, 0]), Some((0, How::Register(7))));
        // mov rdi, [rdi]; ret: it reads what it writes
        assert_eq!(how(&[0x48, 0x8b, 0x3f, 0xc3]), None);
        // mov dil, 1; ret: the rest of rdi stays
        assert_eq!(how(&[0x40, 0xb7, 0x01, 0xc3]), None);
        // call; xor eax, eax; ret: behind a call it is too late
        assert_eq!(how(&[0xe8, 0, 0, 0, 0, 0x31, 0xc0, 0xc3]), None);
        // shl edi, cl; cmp: a shift sets flags, or not, but reads none
        assert_eq!(how(&[0xd3, 0xe7, 0x39, 0xd1, 0xc3]), Some((0, How::Flags)));
        // shl edi, cl; jne: so it does not kill them
        assert_eq!(how(&[0xd3, 0xe7, 0x75, 0x00]), None);
        // cmovne rax, rbx: may leave rax
        assert_eq!(how(&[0x48, 0x0f, 0x45, 0xc3, 0xc3]), None);
    }
}
