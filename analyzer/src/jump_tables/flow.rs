//! Where a register's value comes from: backwards over the blocks that are known so far.

use crate::cfg::{Block, Terminator};
use crate::image::Image;
use crate::targets::TargetIndex;
use dyni_schema::LinkAddr;
use iced_x86::{
    Code as Op, ConditionCode, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

/// How deep an expression is followed.
const MAX_DEPTH: u32 = 12;
/// How many blocks are looked at for one definition.
const MAX_VISITS: usize = 1 << 14;
/// How many steps the search for the index's check may take over blocks with several predecessors.
const MAX_BOUND_DEPTH: u32 = 6;

/// Registers that a call may change (System V ABI): rax, rcx, rdx, rsi, rdi, r8 to r11.
const CLOBBERED: u16 = 0b0000_1111_1100_0111;

/// A register's value just before an instruction: (block, number of the instruction in it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    register: Register,
    block: u32,
    index: u32,
}

/// `constant + Σ scale * atom`, modulo 2^64.
#[derive(Clone, Debug, Default)]
pub(super) struct Sum {
    pub constant: u64,
    pub terms: Vec<Term>,
}

#[derive(Clone, Debug)]
pub(super) struct Term {
    pub scale: u64,
    pub atom: Atom,
}

#[derive(Clone, Debug)]
pub(super) enum Atom {
    /// A value that is not followed further.
    Value(Place),
    /// `size` bytes of memory.
    Load { address: Box<Sum>, size: u32 },
}

impl Sum {
    fn constant(constant: u64) -> Self {
        Self { constant, terms: Vec::new() }
    }

    fn value(place: Place, scale: u64) -> Self {
        Self { constant: 0, terms: vec![Term { scale, atom: Atom::Value(place) }] }
    }

    fn plus(mut self, other: Self) -> Self {
        self.constant = self.constant.wrapping_add(other.constant);
        self.terms.extend(other.terms);
        self
    }
}

/// A memory operand, to tell two uses of the same one.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Operand(Register, Register, u32, u64);

/// A block's instructions, and the registers that each writes as a mask.
type Decoded = Rc<Vec<(Instruction, u16)>>;

/// A function's blocks, to be searched backwards.
pub(crate) struct Code<'a> {
    pub(super) image: &'a Image,
    pub(super) targets: &'a TargetIndex,
    blocks: &'a [Block],
    predecessors: Vec<Vec<u32>>,
    decoded: RefCell<HashMap<u32, Decoded>>,
    written: RefCell<Vec<Option<u16>>>,
    info: RefCell<InstructionInfoFactory>,
    assumed: Cell<bool>,
}

impl<'a> Code<'a> {
    pub(crate) fn new(image: &'a Image, targets: &'a TargetIndex, blocks: &'a [Block]) -> Self {
        let mut predecessors = vec![Vec::new(); blocks.len()];
        for (i, block) in blocks.iter().enumerate() {
            for &s in &block.successors {
                predecessors[s as usize].push(i as u32);
            }
        }
        Self {
            image,
            targets,
            blocks,
            predecessors,
            decoded: RefCell::default(),
            written: RefCell::new(vec![None; blocks.len()]),
            info: RefCell::new(InstructionInfoFactory::new()),
            assumed: Cell::new(false),
        }
    }

    /// Whether the last [`Code::jump_target`] had to take for granted that a path that begins at a label (or a landing
    /// pad) comes with the same value as the others.
    pub(super) fn has_assumed(&self) -> bool {
        self.assumed.get()
    }

    /// What the indirect jump at this address jumps to.
    pub(super) fn jump_target(&self, jump: LinkAddr) -> Option<Sum> {
        self.assumed.set(false);
        let block = self.blocks.iter().position(|b| b.last == jump)? as u32;
        let instructions = self.instructions(block);
        let index = instructions.len().checked_sub(1)? as u32;
        let instr = instructions[index as usize].0;
        match instr.op0_kind() {
            OpKind::Register => Some(self.value(instr.op0_register(), block, index, 0)),
            OpKind::Memory => Some(self.load(&instr, block, index, 8, 0)),
            _ => None,
        }
    }

    /// The instructions of a block and the registers that each writes.
    fn instructions(&self, block: u32) -> Decoded {
        if let Some(known) = self.decoded.borrow().get(&block) {
            return Rc::clone(known);
        }
        let b = &self.blocks[block as usize];
        let bytes = self.image.bytes(b.start, (b.end.0 - b.start.0) as usize).unwrap_or(&[]);
        let decoder = Decoder::with_ip(64, bytes, b.start.0, DecoderOptions::NONE);
        let mut info = self.info.borrow_mut();
        let all: Vec<_> = decoder.into_iter().map(|i| (i, writes(&mut info, &i))).collect();
        self.written.borrow_mut()[block as usize] = Some(all.iter().fold(0, |mask, i| mask | i.1));
        let all = Rc::new(all);
        self.decoded.borrow_mut().insert(block, Rc::clone(&all));
        all
    }

    fn block_writes(&self, block: u32) -> u16 {
        if let Some(mask) = self.written.borrow()[block as usize] {
            return mask;
        }
        self.instructions(block);
        self.written.borrow()[block as usize].unwrap_or(u16::MAX)
    }

    /// The one instruction that gives `register` the value it has before instruction `index` of `block`. Several that
    /// load the same constant count as one.
    fn definition(&self, register: Register, block: u32, index: u32) -> Option<(u32, u32)> {
        let bit = mask(register);
        let last_in = |block: u32, before: u32| {
            let all = self.instructions(block);
            (0..before).rev().find(|&i| all[i as usize].1 & bit != 0)
        };
        if let Some(i) = last_in(block, index) {
            return Some((block, i));
        }
        let mut seen = vec![false; self.blocks.len()];
        let mut work = vec![block];
        let mut found: Option<(u32, u32)> = None;
        let mut visits = 0;
        while let Some(at) = work.pop() {
            if at == 0 {
                return None;
            }
            if self.predecessors[at as usize].is_empty() {
                self.assumed.set(true);
            }
            for &p in &self.predecessors[at as usize] {
                if std::mem::replace(&mut seen[p as usize], true) {
                    continue;
                }
                visits += 1;
                if visits > MAX_VISITS {
                    return None;
                }
                if self.block_writes(p) & bit == 0 {
                    work.push(p);
                    continue;
                }
                let definition = (p, last_in(p, self.instructions(p).len() as u32)?);
                match found {
                    None => found = Some(definition),
                    Some(other) if self.same_constant(other, definition) => {}
                    Some(_) => return None,
                }
            }
        }
        found
    }

    fn same_constant(&self, a: (u32, u32), b: (u32, u32)) -> bool {
        let constant = |(block, index): (u32, u32)| constant(&self.instructions(block)[index as usize].0);
        constant(a).is_some() && constant(a) == constant(b)
    }

    fn value(&self, register: Register, block: u32, index: u32, depth: u32) -> Sum {
        let register = register.full_register();
        let opaque = Sum::value(Place { register, block, index }, 1);
        if depth > MAX_DEPTH {
            return opaque;
        }
        let Some((block, at)) = self.definition(register, block, index) else { return opaque };
        let instr = self.instructions(block)[at as usize].0;
        if let Some(value) = constant(&instr) {
            return Sum::constant(value);
        }
        let of = |r: Register| self.value(r, block, at, depth + 1);
        let memory = |size| self.load(&instr, block, at, size, depth + 1);
        match instr.code() {
            Op::Lea_r64_m | Op::Lea_r32_m => self.address(&instr, block, at, depth + 1),
            Op::Mov_r64_rm64 | Op::Mov_rm64_r64 | Op::Mov_r32_rm32 | Op::Mov_rm32_r32 | Op::Movsxd_r64_rm32 => {
                match instr.op1_kind() {
                    OpKind::Register => of(instr.op1_register()),
                    OpKind::Memory => memory(if instr.code() == Op::Mov_r64_rm64 { 8 } else { 4 }),
                    _ => opaque,
                }
            }
            Op::Cdqe => of(Register::RAX),
            Op::Add_r64_rm64 | Op::Add_rm64_r64 => match instr.op1_kind() {
                OpKind::Register if instr.op0_kind() == OpKind::Register => {
                    of(instr.op0_register()).plus(of(instr.op1_register()))
                }
                OpKind::Memory => of(instr.op0_register()).plus(memory(8)),
                _ => opaque,
            },
            Op::Shl_rm64_imm8 | Op::Shl_rm32_imm8 if instr.op0_kind() == OpKind::Register && instr.immediate8() < 4 => {
                Sum::value(Place { register, block, index: at }, 1 << instr.immediate8())
            }
            _ => opaque,
        }
    }

    fn load(&self, instr: &Instruction, block: u32, index: u32, size: u32, depth: u32) -> Sum {
        let address = Box::new(self.address(instr, block, index, depth + 1));
        Sum { constant: 0, terms: vec![Term { scale: 1, atom: Atom::Load { address, size } }] }
    }

    fn address(&self, instr: &Instruction, block: u32, index: u32, depth: u32) -> Sum {
        if instr.is_ip_rel_memory_operand() {
            return Sum::constant(instr.ip_rel_memory_address());
        }
        let mut sum = Sum::constant(instr.memory_displacement64());
        if instr.memory_base() != Register::None {
            sum = sum.plus(self.value(instr.memory_base(), block, index, depth));
        }
        if instr.memory_index() != Register::None {
            let scale = u64::from(instr.memory_index_scale());
            let register = instr.memory_index().full_register();
            sum = sum.plus(if scale == 1 {
                self.value(register, block, index, depth)
            } else {
                Sum::value(Place { register, block, index }, scale)
            });
        }
        sum
    }

    /// How many values the index can have, if the code before it says.
    pub(super) fn bound(&self, index: Place) -> Option<Bound> {
        let search = Search { registers: mask(index.register), operand: None, limit: None, offset: 0, other: None };
        self.bound_before(search, index.block, index.index, None, 0)
    }

    /// Goes backwards from instruction `index` of `block`; `condition` is what must have held for the way it came.
    fn bound_before(
        &self,
        mut search: Search,
        block: u32,
        index: u32,
        mut condition: Option<ConditionCode>,
        depth: u32,
    ) -> Option<Bound> {
        let instructions = self.instructions(block);
        for (instr, written) in instructions[..index as usize].iter().rev() {
            if let Some((other, n)) = search.other {
                if search.copies(instr, other) {
                    return Some(search.checked_limit(n));
                }
                if written & other != 0 {
                    search.other = None;
                }
            }
            if let Some(holds) = condition
                && instr.rflags_modified() != 0
            {
                condition = None;
                if let Some(n) = search.checked(instr, holds) {
                    return Some(search.checked_limit(n));
                }
            }
            // The operand was spilled from a register: from here on backwards that has the value.
            if instr.mnemonic() == Mnemonic::Mov
                && instr.op0_kind() == OpKind::Memory
                && instr.op1_kind() == OpKind::Register
                && search.operand == Some(operand(instr))
            {
                search.operand = None;
                search.registers |= mask(instr.op1_register());
                continue;
            }
            if written & search.registers != 0 && !search.step(instr, *written) {
                return search.type_limit();
            }
        }
        let predecessors = &self.predecessors[block as usize];
        if block == 0 || predecessors.is_empty() || depth >= MAX_BOUND_DEPTH || predecessors.len() > 8 {
            return search.type_limit();
        }
        let mut most = Some(Bound { count: 0, checked: true });
        for &p in predecessors {
            let b = &self.blocks[p as usize];
            let all = self.instructions(p);
            let Some((last, _)) = all.last() else { return search.type_limit() };
            let holds = match b.terminator {
                Terminator::Conditional { taken } if taken == b.end => None,
                Terminator::Conditional { taken } => {
                    let code = last.condition_code();
                    if taken == self.blocks[block as usize].start { Some(code) } else { negate(code) }
                }
                _ => None,
            };
            let one = self.bound_before(search, p, all.len() as u32, holds, depth + 1);
            most = most.zip(one).map(|(a, b)| Bound { count: a.count.max(b.count), checked: a.checked && b.checked });
        }
        most.or(search.type_limit())
    }
}

/// How many values an index can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    pub count: u64,
    /// The code compares it; otherwise its type or a mask allows so many, and the table may well be shorter.
    pub checked: bool,
}

/// What still equals the index, going backwards.
#[derive(Clone, Copy)]
struct Search {
    /// Registers, as a mask.
    registers: u16,
    /// A memory operand.
    operand: Option<Operand>,
    /// How many values it can have, as its type says.
    limit: Option<u64>,
    /// The index is this much more than the registers and the operand, in 32-bit arithmetic.
    offset: i32,
    /// Another register that was checked, as a mask, and the number of values that it can have: the compiler may check the
    /// original of what it copied earlier.
    other: Option<(u16, u64)>,
}

impl Search {
    /// The number of values that `instr`, a comparison, leaves if the condition holds after it.
    fn checked(&mut self, instr: &Instruction, holds: ConditionCode) -> Option<u64> {
        // `sub` compares too, with what its register held before.
        let compares = instr.mnemonic() == Mnemonic::Cmp;
        if !compares && instr.mnemonic() != Mnemonic::Sub {
            return None;
        }
        let same = match instr.op0_kind() {
            _ if !compares => false,
            OpKind::Register => mask(instr.op0_register()) & self.registers != 0,
            OpKind::Memory => self.operand == Some(operand(instr)),
            _ => false,
        };
        // Narrow comparisons are of the low byte or word, which the code then zero-extends: never of negative numbers.
        let value = instr.try_immediate(1).ok()? & 0xffff_ffff;
        let offset = if same { self.offset } else { 0 };
        let count = match holds {
            ConditionCode::be => value as i64 + 1 + i64::from(offset),
            ConditionCode::b => value as i64 + i64::from(offset),
            // `cmp eax, -6; jb …; lea edx, [eax + 6]`: from 2^32 - 6 on, so that the sum wraps to 0..6.
            ConditionCode::ae if value as u32 == (offset as u32).wrapping_neg() => i64::from(offset),
            _ => return None,
        };
        let count = u64::try_from(count).ok().filter(|&n| n > 0)?;
        if !same && self.offset == 0 && instr.op0_kind() == OpKind::Register {
            self.other = Some((mask(instr.op0_register()), count));
        }
        same.then_some(count)
    }

    /// Whether an instruction makes one of the registers and `other` equal.
    fn copies(&self, instr: &Instruction, other: u16) -> bool {
        if instr.mnemonic() == Mnemonic::Mov
            && instr.op0_kind() == OpKind::Memory
            && instr.op1_kind() == OpKind::Register
        {
            return self.offset == 0 && self.operand == Some(operand(instr)) && mask(instr.op1_register()) == other;
        }
        let plain = matches!(instr.code(), Op::Mov_r32_rm32 | Op::Mov_rm32_r32 | Op::Mov_r64_rm64 | Op::Mov_rm64_r64);
        if !plain || instr.op0_kind() != OpKind::Register || instr.op1_kind() != OpKind::Register {
            return false;
        }
        let (to, from) = (mask(instr.op0_register()), mask(instr.op1_register()));
        self.offset == 0 && ((to & self.registers != 0 && from == other) || (to == other && from & self.registers != 0))
    }

    /// Steps over an instruction that writes one of the registers; `false` if the search ends there.
    fn step(&mut self, instr: &Instruction, written: u16) -> bool {
        let lost = written & self.registers;
        self.registers &= !written;
        let copied = matches!(instr.mnemonic(), Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsxd | Mnemonic::Cdqe);
        if instr.mnemonic() == Mnemonic::And
            && instr.op0_kind() == OpKind::Register
            && let Ok(bits) = instr.try_immediate(1)
            && bits < 1 << 16
        {
            self.tighten(bits + 1);
            return false;
        }
        if copied && lost.count_ones() == 1 && instr.op_count() == 2 && instr.op0_kind() == OpKind::Register {
            let narrow = match instr.code() {
                Op::Movzx_r16_rm8 | Op::Movzx_r32_rm8 | Op::Movzx_r64_rm8 => Some(1 << 8),
                Op::Movzx_r32_rm16 | Op::Movzx_r64_rm16 => Some(1 << 16),
                _ => None,
            };
            if let Some(n) = narrow {
                self.tighten(n);
            }
            match instr.op1_kind() {
                OpKind::Register => self.registers |= mask(instr.op1_register()),
                OpKind::Memory => self.operand = Some(operand(instr)),
                _ => {}
            }
        } else if instr.mnemonic() == Mnemonic::Cdqe {
            self.registers |= mask(Register::RAX);
        } else if let Some((register, distance)) = moved(instr)
            && self.registers == 0
            && self.operand.is_none()
        {
            self.registers = mask(register);
            self.offset = self.offset.wrapping_add(distance);
        }
        self.registers != 0 || self.operand.is_some()
    }

    fn checked_limit(&self, n: u64) -> Bound {
        Bound { count: self.limit.map_or(n, |l| l.min(n)), checked: true }
    }

    fn type_limit(&self) -> Option<Bound> {
        self.limit.map(|count| Bound { count, checked: false })
    }

    fn tighten(&mut self, n: u64) {
        self.limit = Some(self.limit.map_or(n, |l| l.min(n)));
    }
}

/// The register, and the number added to it, that `lea`, `add` or `sub` put into a register.
fn moved(instr: &Instruction) -> Option<(Register, i32)> {
    match instr.mnemonic() {
        Mnemonic::Lea if instr.memory_index() == Register::None && instr.memory_base().is_gpr() => {
            Some((instr.memory_base(), instr.memory_displacement64() as i32))
        }
        Mnemonic::Add | Mnemonic::Sub if instr.op0_kind() == OpKind::Register => {
            let value = instr.try_immediate(1).ok()? as i32;
            let value = if instr.mnemonic() == Mnemonic::Sub { value.wrapping_neg() } else { value };
            Some((instr.op0_register(), value))
        }
        _ => None,
    }
}

fn operand(instr: &Instruction) -> Operand {
    let scale = instr.memory_index_scale();
    Operand(instr.memory_base(), instr.memory_index(), scale, instr.memory_displacement64())
}

fn negate(code: ConditionCode) -> Option<ConditionCode> {
    match code {
        ConditionCode::a => Some(ConditionCode::be),
        ConditionCode::ae => Some(ConditionCode::b),
        ConditionCode::b => Some(ConditionCode::ae),
        ConditionCode::be => Some(ConditionCode::a),
        _ => None,
    }
}

/// The bit of a general-purpose register; 0 for others.
fn mask(register: Register) -> u16 {
    let full = register.full_register();
    if full.is_gpr64() { 1 << full.number() } else { 0 }
}

/// The address or number that an instruction loads, if it does nothing else.
fn constant(instr: &Instruction) -> Option<u64> {
    match instr.code() {
        Op::Lea_r64_m if instr.is_ip_rel_memory_operand() => Some(instr.ip_rel_memory_address()),
        Op::Mov_r64_imm64 | Op::Mov_rm64_imm32 | Op::Mov_r32_imm32 if instr.op0_kind() == OpKind::Register => {
            Some(instr.immediate(1))
        }
        _ => None,
    }
}

fn writes(info: &mut InstructionInfoFactory, instr: &Instruction) -> u16 {
    let mut written = 0;
    for r in info.info(instr).used_registers() {
        if !matches!(r.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess) {
            written |= mask(r.register());
        }
    }
    if instr.is_call_near() || instr.is_call_near_indirect() || instr.is_call_far() || instr.is_call_far_indirect() {
        written |= CLOBBERED;
    }
    written
}
