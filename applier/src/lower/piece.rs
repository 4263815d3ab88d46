//! Pieces: blocks on their way into the cache, with the branches between them.

use super::operand::Operand;
use super::{CounterMap, Source, instructions};
use crate::shortcuts::Shortcuts;
use dyni_analyzer::calls::Site;
use dyni_analyzer::cfg::{Block, Terminator};
use dyni_analyzer::probes::{How, Place};
use dyni_schema::LinkAddr;
use iced_x86::{Code, ConditionCode, FlowControl, Instruction, Mnemonic};
use std::collections::HashMap;

/// The number of the register that promoted and recorded calls change.
const R11: u8 = 11;
/// The condition "not equal".
const NOT_EQUAL: u8 = 5;

/// Where a branch goes: the start of a copied block, or original code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Block(u32),
    Original(LinkAddr),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Fix {
    /// A 4-byte displacement at this offset of the body, counted from the end of its instruction, to an address.
    Address { at: u32, next: u32, address: LinkAddr },
    /// The same, to a branch target.
    Branch { at: u32, next: u32, target: Target },
    /// A displacement of four bytes at this offset, which is this number in the original: that of an instruction that reads
    /// a jump table.
    Table { at: u32, load: LinkAddr, original: i32 },
}

/// A direct branch at the end of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Jump {
    kind: Kind,
    pub target: Target,
    long: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
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

    pub fn len(self) -> u64 {
        match (self.kind, self.long) {
            (Kind::Always | Kind::If(_), false) => 2,
            (Kind::Always, true) => 5,
            (Kind::If(_), true) => 6,
            // opcode rel8; jmp short over; jmp rel32
            (Kind::Counter { prefix, .. }, _) => 9 + u64::from(prefix),
        }
    }

    /// Writes it so that it ends `len` bytes further on, `distance` being counted from that end.
    pub fn write(self, out: &mut Vec<u8>, distance: i64) {
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
pub(super) struct Piece {
    pub original: LinkAddr,
    pub size: u32,
    pub body: Vec<u8>,
    pub fixes: Vec<Fix>,
    pub jumps: Vec<Jump>,
    /// Where it comes to lie.
    pub at: u64,
}

impl Piece {
    pub fn len(&self) -> u64 {
        self.body.len() as u64 + self.jumps.iter().map(|j| j.len()).sum::<u64>()
    }
}

/// What kind of direct jump this is; `None` if it is none that ends a block.
pub(super) fn branch_kind(instruction: &Instruction) -> Option<Kind> {
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

/// What the blocks of an emission refer to.
pub(super) struct Around<'a> {
    /// The pieces by the original's first byte.
    pub blocks: &'a HashMap<LinkAddr, u32>,
    /// For promoted calls, the piece with the plain call.
    pub plain: &'a HashMap<LinkAddr, u32>,
    /// Where counters are raised, by block.
    pub places: &'a HashMap<LinkAddr, Place>,
    pub counters: &'a CounterMap,
    pub shortcuts: &'a Shortcuts,
}

impl Around<'_> {
    fn resolve(&self, address: LinkAddr) -> Target {
        self.blocks.get(&address).map_or(Target::Original(address), |&id| Target::Block(id))
    }

    /// The instruction at an address with a wide displacement, and what that was, if it is to read a table of the cache.
    fn table_load(&self, at: LinkAddr, bytes: &[u8]) -> Option<(Vec<u8>, i32)> {
        self.shortcuts.table(at.0)?;
        Operand::of_load(bytes)?.wide()
    }
}

impl Piece {
    fn new(original: LinkAddr, size: u32) -> Self {
        Self {
            original,
            size,
            body: Vec::with_capacity(size as usize + 8),
            fixes: Vec::new(),
            jumps: Vec::new(),
            at: 0,
        }
    }

    /// Appends an instruction that ends with a displacement of four bytes, counted from its end.
    fn reach(&mut self, instruction: &[u8], to: Reach) {
        self.body.extend_from_slice(instruction);
        let next = self.body.len() as u32;
        self.fixes.push(match to {
            Reach::Address(address) => Fix::Address { at: next - 4, next, address },
            Reach::Branch(target) => Fix::Branch { at: next - 4, next, target },
        });
    }

    fn go(&mut self, kind: Kind, to: Target, escapes: &mut Vec<LinkAddr>) {
        if let Target::Original(address) = to {
            escapes.push(address);
        }
        self.jumps.push(Jump::new(kind, to));
    }

    /// Raises the counter at `counter`.
    fn raise(&mut self, how: How, counter: LinkAddr) {
        match how {
            How::Flags => self.reach(&[0x48, 0xff, 0x05, 0, 0, 0, 0], Reach::Address(counter)),
            How::Register(r) => {
                let (high, low) = (r >> 3, r & 7);
                self.reach(&[0x48 | high << 2, 0x8b, low << 3 | 5, 0, 0, 0, 0], Reach::Address(counter));
                self.body.extend([0x48 | high << 2 | high, 0x8d, 0x40 | low << 3 | low, 1]);
                self.reach(&[0x48 | high << 2, 0x89, low << 3 | 5, 0, 0, 0, 0], Reach::Address(counter));
            }
        }
    }

    /// Stores what a call calls.
    fn record(&mut self, operand: Operand<'_>, slot: LinkAddr) {
        let mut register = R11;
        if operand.is_register() {
            register = operand.register();
        } else {
            self.body.extend(operand.with(0x8b, R11));
        }
        let (high, low) = (register >> 3, register & 7);
        self.reach(&[0x48 | high << 2, 0x89, low << 3 | 5, 0, 0, 0, 0], Reach::Address(slot));
    }

    /// Compares what a call calls with a function, and goes to the plain call if it is another one.
    fn compare(&mut self, operand: Operand<'_>, callee: LinkAddr, plain: u32) {
        self.reach(&[0x4c, 0x8d, 0x1d, 0, 0, 0, 0], Reach::Address(callee));
        self.body.extend(operand.with(0x39, R11));
        self.reach(&[0x0f, 0x80 | NOT_EQUAL, 0, 0, 0, 0], Reach::Branch(Target::Block(plain)));
    }
}

#[derive(Clone, Copy)]
enum Reach {
    Address(LinkAddr),
    Branch(Target),
}

/// A promoted call as it is, for when it is not the expected function that is called.
pub(super) fn plain_call(source: &Source<'_>, site: &Site, around: &Around<'_>, escapes: &mut Vec<LinkAddr>) -> Piece {
    let mut piece = Piece::new(site.at, site.len);
    let from = site.at.distance(source.cfg.start) as usize;
    piece.body.extend_from_slice(&source.code[from..from + site.len as usize]);
    if !site.is_jump {
        let after = around.resolve(site.at.plus(u64::from(site.len)));
        piece.go(Kind::Always, after, escapes);
    }
    piece
}

/// One block's body and the jumps at its end, given the block that lies behind it.
pub(super) fn piece(
    source: &Source<'_>,
    block: &Block,
    next: Option<Target>,
    around: &Around<'_>,
    escapes: &mut Vec<LinkAddr>,
) -> Piece {
    let mut piece = Piece::new(block.start, block.end.distance(block.start) as u32);
    let counter = around.places.get(&block.start).zip(around.counters.of(block.start));
    let mut decoder = instructions(source, block);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let here = LinkAddr(instruction.ip());
        let from = here.distance(source.cfg.start) as usize;
        let bytes = &source.code[from..from + instruction.len()];
        let is_last = here == block.last;
        if let Some((place, counter)) = counter.filter(|(place, _)| place.at == here) {
            piece.raise(place.how, counter);
        }
        if let Some((slot, operand)) = around.counters.of_site(here).zip(Operand::of(bytes)) {
            piece.record(operand, slot);
        }
        let fall = around.resolve(block.end);
        match block.terminator {
            Terminator::Jump { target } if is_last => {
                if let Some(slot) = around.shortcuts.slot(target.0) {
                    piece.reach(&[0xff, 0x25, 0, 0, 0, 0], Reach::Address(LinkAddr(slot)));
                    continue;
                }
                let to = around.resolve(target);
                if Some(to) != next {
                    piece.go(Kind::Always, to, escapes);
                }
                continue;
            }
            Terminator::Conditional { taken } if is_last => {
                let kind = branch_kind(&instruction).expect("it was found admissible");
                let to = around.resolve(taken);
                match kind {
                    Kind::If(cc) if Some(to) == next => piece.go(Kind::If(cc ^ 1), fall, escapes),
                    _ => {
                        piece.go(kind, to, escapes);
                        if Some(fall) != next {
                            piece.go(Kind::Always, fall, escapes);
                        }
                    }
                }
                continue;
            }
            _ => {}
        }
        if let (Some(&plain), Some(callee)) = (around.plain.get(&here), around.shortcuts.callee(here.0)) {
            let callee = LinkAddr(callee);
            piece.compare(Operand::of(bytes).expect("it is a site"), callee, plain);
            let copy = around.resolve(callee);
            if instruction.flow_control() == FlowControl::IndirectBranch {
                piece.go(Kind::Always, copy, escapes);
                continue;
            }
            piece.reach(&[0xe8, 0, 0, 0, 0], Reach::Branch(copy));
        } else if let Some((wide, original)) = around.table_load(here, bytes) {
            piece.body.extend(wide);
            piece.fixes.push(Fix::Table { at: piece.body.len() as u32 - 4, load: here, original });
        } else if instruction.code() == Code::Call_rel32_64 {
            // Whatever prefixes it had (padding for the linker) mean nothing to a call.
            match around.shortcuts.slot(instruction.near_branch_target()) {
                Some(slot) => piece.reach(&[0xff, 0x15, 0, 0, 0, 0], Reach::Address(LinkAddr(slot))),
                None => {
                    let target = around.resolve(LinkAddr(instruction.near_branch_target()));
                    piece.reach(&[0xe8, 0, 0, 0, 0], Reach::Branch(target));
                }
            }
        } else if instruction.mnemonic() != Mnemonic::Nop {
            let at = piece.body.len() as u32;
            piece.body.extend_from_slice(bytes);
            if instruction.is_ip_rel_memory_operand() {
                let offsets = decoder.get_constant_offsets(&instruction);
                piece.fixes.push(Fix::Address {
                    at: at + offsets.displacement_offset() as u32,
                    next: at + instruction.len() as u32,
                    address: LinkAddr(instruction.ip_rel_memory_address()),
                });
            }
        }
        // A signal handler may step over an instruction that faults, `ud2` too: what follows it must be what follows it.
        let goes_on = match block.terminator {
            Terminator::FallThrough => true,
            Terminator::Stop => instruction.flow_control() != FlowControl::Return,
            _ => false,
        };
        if is_last && goes_on && Some(fall) != next {
            piece.go(Kind::Always, fall, escapes);
        }
    }
    piece
}

/// Grows the branches of one part that do not reach with one byte. `first` is the id of its first piece.
pub(super) fn settle(pieces: &mut [Piece], first: u32) {
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
