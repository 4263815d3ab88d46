//! The operand of an instruction, and other instructions with the same one.

use iced_x86::{Decoder, DecoderOptions};

/// `call x`, `jmp x`, or a load from a jump table, taken apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    /// Prefixes that choose a segment (`notrack` is one by its byte).
    segment: &'a [u8],
    rex: u8,
    opcode: u8,
    modrm: u8,
    /// The index byte, if any, and the displacement.
    rest: &'a [u8],
}

impl<'a> Operand<'a> {
    /// Of the bytes of `call x` or `jmp x`; `None` if it has other prefixes or is another instruction.
    pub fn of(bytes: &'a [u8]) -> Option<Self> {
        Self::parse(bytes).filter(|o| o.opcode == 0xff && matches!(o.modrm >> 3 & 7, 2 | 4))
    }

    /// Of the first of these instructions, if it is `jmp x`, `mov r, x` or `movsxd r, x`.
    pub fn of_load(bytes: &'a [u8]) -> Option<Self> {
        let length = Decoder::new(64, bytes, DecoderOptions::NONE).decode().len();
        let jumps = |o: &Self| o.opcode == 0xff && o.modrm >> 3 & 7 == 4;
        Self::parse(&bytes[..length]).filter(|o| matches!(o.opcode, 0x63 | 0x8b) || jumps(o))
    }

    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let segments = bytes.iter().take_while(|b| matches!(b, 0x3e | 0x64 | 0x65)).count();
        let (segment, bytes) = bytes.split_at(segments);
        let (rex, bytes) = match bytes {
            [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
            rest => (0x40, rest),
        };
        let [opcode, modrm, rest @ ..] = bytes else { return None };
        Some(Self { segment, rex, opcode: *opcode, modrm: *modrm, rest })
    }

    /// Whether it is a register.
    pub fn is_register(self) -> bool {
        self.modrm >> 6 == 3
    }

    /// `opcode` with a 64-bit register, given by its number, and this operand.
    pub fn with(self, opcode: u8, register: u8) -> Vec<u8> {
        let rex = 0x48 | self.rex & 3 | register >> 3 << 2;
        let modrm = self.modrm & 0xc7 | (register & 7) << 3;
        [self.segment, &[rex, opcode, modrm], self.rest].concat()
    }

    /// The number of the register that it is.
    pub fn register(self) -> u8 {
        self.modrm & 7 | (self.rex & 1) << 3
    }

    /// The same instruction with a displacement of four bytes, its last ones, and what that was; `None` if it is counted from
    /// the next instruction, or the operand is a register.
    pub fn wide(self) -> Option<(Vec<u8>, i32)> {
        let (mode, rm) = (self.modrm >> 6, self.modrm & 7);
        let (index, displacement) = self.rest.split_at_checked(usize::from(rm == 4))?;
        let no_base = mode == 0 && index.first().is_some_and(|sib| sib & 7 == 5);
        if mode == 3 || (mode == 0 && rm == 5) {
            return None;
        }
        let old = match displacement {
            [] => 0,
            [byte] => i32::from(*byte as i8),
            four => i32::from_le_bytes(four.try_into().ok()?),
        };
        let modrm = self.modrm & 0x3f | if no_base { 0 } else { 0x80 };
        let rex: &[u8] = if self.rex == 0x40 { &[] } else { &[self.rex] };
        Some(([self.segment, rex, &[self.opcode, modrm], index, &[0; 4]].concat(), old))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn text(bytes: &[u8]) -> String {
        let mut out = String::new();
        let mut decoder = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
        let instruction = decoder.decode();
        assert_eq!(decoder.position(), bytes.len(), "{bytes:02x?}");
        IntelFormatter::new().format(&instruction, &mut out);
        out
    }

    #[test]
    fn every_operand_stays_what_it_is() {
        for rex in [None, Some(0x41), Some(0x42), Some(0x43)] {
            for modrm in (0x10..=0x17).chain(0x50..=0x57).chain(0x90..=0x97).chain(0xd0..=0xd7) {
                let mut call: Vec<u8> = rex.into_iter().chain([0xff, modrm]).collect();
                call.extend([0x8d; 5]);
                let mut decoder = Decoder::with_ip(64, &call, 0, DecoderOptions::NONE);
                let _ = decoder.decode();
                call.truncate(decoder.position());
                let operand = Operand::of(&call).unwrap();
                let x = text(&call).replace("call ", "").replace("qword ptr ", "");
                if modrm != 0x15 {
                    assert_eq!(text(&operand.with(0x39, 11)).replace("qword ptr ", ""), format!("cmp {x},r11"));
                    assert_eq!(text(&operand.with(0x8b, 11)).replace("qword ptr ", ""), format!("mov r11,{x}"));
                }
                if operand.is_register() {
                    assert!(operand.wide().is_none());
                    continue;
                }
                let mut jump = call.clone();
                let at = usize::from(rex.is_some()) + 1;
                jump[at] = jump[at] & 0xc7 | 0x20;
                let Some((mut wide, old)) = Operand::of_load(&jump).unwrap().wide() else {
                    assert_eq!(modrm, 0x15);
                    continue;
                };
                let n = wide.len();
                wide[n - 4..].copy_from_slice(&old.to_le_bytes());
                assert_eq!(text(&wide), text(&jump));
            }
        }
    }
}
