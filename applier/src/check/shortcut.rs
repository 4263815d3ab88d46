//! What of a copy may be a shortcut. See [`crate::shortcuts`] for why each means what the original means.

use super::{Copies, Originals, is_jump};
use crate::shortcuts::TableLoad;
use dyni_schema::LinkAddr;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};

impl Copies<'_> {
    /// Whether `c` goes through the slot of the stub at `stub`: `call [slot]` or `jmp [slot]`, which has this first byte of
    /// an operand.
    pub(super) fn passes_stub(&self, c: &Instruction, opcode: [u8; 2], stub: u64) -> bool {
        let slot = self.shortcuts.slot(stub);
        slot.is_some()
            && c.is_ip_rel_memory_operand()
            && Some(c.ip_rel_memory_address()) == slot
            && self.begins(c, &opcode)
    }

    /// Whether `c` is `o`, which reads a jump table, but for its displacement, and how far it reads from there.
    pub(super) fn reads_table(&self, o: &Instruction, o_bytes: &[u8], c: &Instruction) -> Option<u64> {
        self.shortcuts.table(o.ip())?;
        let Operand { segment, rex, opcode, modrm, rest } = Operand::of(o_bytes)?;
        let (bytes, displacement) = self.bytes(c).split_last_chunk::<4>()?;
        // With an index, so never counted from here; without a base the displacement has four bytes already.
        let index = rest.first().filter(|_| modrm & 7 == 4 && modrm >> 6 != 3)?;
        let no_base = modrm >> 6 == 0 && index & 7 == 5;
        let modrm = if no_base { modrm } else { modrm & 0x3f | 0x80 };
        let same = [segment, rex, &[opcode, modrm, *index]].concat() == bytes;
        let moved = i64::from(i32::from_le_bytes(*displacement)) as u64;
        same.then(|| moved.wrapping_sub(o.memory_displacement64()))
    }

    /// Whether every entry of the table that lies so far from the original's means what that means.
    pub(super) fn has_table(&self, table: TableLoad, moved: u64, originals: &dyn Originals) -> bool {
        let width = if table.absolute { 8 } else { 4 };
        let entries = originals.bytes(LinkAddr(table.table), table.count as usize * width);
        let clone = table.table.wrapping_add(moved);
        let first = usize::try_from(LinkAddr(clone).distance(self.cache)).ok();
        let means = |(i, entry): (usize, &[u8])| {
            let at = first.and_then(|first| first.checked_add(i * width));
            match *entry {
                [a, b, c, d] => {
                    let target = table.table.wrapping_add(i64::from(i32::from_le_bytes([a, b, c, d])) as u64);
                    let copy = at.and_then(|at| self.code.get(at..at.checked_add(4)?));
                    let distance = |copy: &[u8]| i32::from_le_bytes(copy.try_into().expect("four bytes"));
                    // What is added to it is the address of the original's table.
                    copy.is_some_and(|c| self.means(table.table.wrapping_add(i64::from(distance(c)) as u64), target))
                }
                _ => {
                    let target = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
                    at.and_then(|at| self.pointer(at)).is_some_and(|to| self.means(to, target))
                }
            }
        };
        entries.is_some_and(|entries| entries.chunks_exact(width).enumerate().all(means))
    }

    /// The address that lies at an offset in the cache.
    fn pointer(&self, at: usize) -> Option<u64> {
        self.shortcuts.pointers.binary_search(&u32::try_from(at).ok()?).ok()?;
        let bytes = self.code.get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    }

    /// The call or jump at the end of a promoted `o` whose copy begins with `lea`.
    pub(super) fn promoted(&self, o: &Instruction, o_bytes: &[u8], lea: &Instruction) -> Option<Instruction> {
        let callee = self.shortcuts.callee(o.ip())?;
        let to_callee = lea.is_ip_rel_memory_operand() && lea.ip_rel_memory_address() == callee;
        let compare = self.decode(lea.next_ip())?;
        let leave = self.decode(compare.next_ip())?;
        let plain = self.decode(leave.near_branch_target())?;
        let go = self.decode(leave.next_ip())?;
        let compares = Operand::of_call(o_bytes)?.with(0x39, 11);
        // The same bytes, not another promoted copy: that would go round for ever.
        let is_plain = self.begins(&plain, o_bytes) && plain.len() == o.len() && self.means(plain.ip(), o.ip());
        let goes = match o.flow_control() {
            FlowControl::IndirectCall => self.begins(&go, &[0xe8]),
            _ => is_jump(&go),
        };
        (self.begins(lea, &[0x4c, 0x8d, 0x1d])
            && to_callee
            && self.bytes(&compare) == compares
            && self.begins(&leave, &[0x0f, 0x85])
            && is_plain
            && goes
            && self.means(go.near_branch_target(), callee))
        .then_some(go)
    }

    /// Whether the copy stores at `at` what `o` calls, and what comes after that.
    pub(super) fn records(&self, slot: LinkAddr, o: &Instruction, o_bytes: &[u8], at: u64) -> Option<u64> {
        let mut store = self.decode(at)?;
        let mut number = o.op0_register().number() as u8;
        if o.op0_kind() == OpKind::Memory {
            let operand = Operand::of_call(o_bytes)?;
            if self.bytes(&store) != operand.with(0x8b, 11) || store.is_ip_rel_memory_operand() {
                return None;
            }
            number = 11;
            store = self.decode(store.next_ip())?;
        }
        let stores = store.is_ip_rel_memory_operand()
            && store.ip_rel_memory_address() == slot.0
            && self.begins(&store, &[0x48 | number >> 3 << 2, 0x89, (number & 7) << 3 | 5]);
        stores.then_some(store.next_ip())
    }

    /// The bytes of an instruction of the copy.
    fn bytes(&self, i: &Instruction) -> &[u8] {
        let offset = i.ip().wrapping_sub(self.cache.0) as usize;
        self.code.get(offset..offset + i.len()).unwrap_or(&[])
    }
}

/// An instruction with an operand in a register or memory, byte for byte.
struct Operand<'a> {
    segment: &'a [u8],
    rex: &'a [u8],
    opcode: u8,
    modrm: u8,
    rest: &'a [u8],
}

impl<'a> Operand<'a> {
    fn of(bytes: &'a [u8]) -> Option<Self> {
        let segments = bytes.iter().position(|b| ![0x3e, 0x64, 0x65].contains(b))?;
        let (segment, bytes) = bytes.split_at(segments);
        let (rex, bytes) = bytes.split_at(usize::from(matches!(*bytes.first()?, 0x40..=0x4f)));
        let [opcode, modrm, rest @ ..] = bytes else { return None };
        Some(Self { segment, rex, opcode: *opcode, modrm: *modrm, rest })
    }

    /// Of a call or jump through a pointer.
    fn of_call(bytes: &'a [u8]) -> Option<Self> {
        Self::of(bytes).filter(|o| o.opcode == 0xff && matches!(o.modrm >> 3 & 7, 2 | 4))
    }

    /// An instruction with this opcode, a 64-bit register and this operand.
    fn with(&self, opcode: u8, register: u8) -> Vec<u8> {
        let rex = 0x48 | register >> 3 << 2 | self.rex.first().unwrap_or(&0) & 3;
        [self.segment, &[rex, opcode, self.modrm & 0xc7 | (register & 7) << 3], self.rest].concat()
    }
}

/// Whether a stub of the original does nothing but jump through its slot.
pub(super) fn is_stub(stub: u64, slot: u64, originals: &dyn Originals) -> bool {
    let jumps = |bytes: &[u8]| {
        let mut decoder = Decoder::with_ip(64, bytes, stub, DecoderOptions::NONE);
        let mut i = decoder.decode();
        if i.mnemonic() == Mnemonic::Endbr64 {
            i = decoder.decode();
        }
        let whole = decoder.position() == bytes.len() && i.mnemonic() == Mnemonic::Jmp;
        whole && i.is_ip_rel_memory_operand() && i.ip_rel_memory_address() == slot
    };
    [6, 7, 10, 11].iter().any(|&n| originals.bytes(LinkAddr(stub), n).is_some_and(jumps))
}
