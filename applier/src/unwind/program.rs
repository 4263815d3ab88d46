//! Call frame instructions (DWARF 5, 6.4.2) for a stretch of copied code, and the bytes of the section in general.

use super::UnwindRefusal;
use super::origin::Origin;
use super::rows::{Cfa, Row, Rows, Rule};
use dyni_schema::LinkAddr;

/// The factor of stored offsets, as every compiler for x86-64 has it.
pub(super) const DATA_ALIGN: i64 = -8;
/// The column of the return address (System V ABI, figure 3.36).
pub(super) const RETURN_ADDRESS: u16 = 16;
/// The column of the stack pointer.
const STACK_POINTER: u16 = 7;
/// The instructions of every common entry: at a function's entry the frame ends 8 bytes above the stack pointer, and
/// the return address lies there.
pub(super) const INITIAL: [u8; 5] = [DEF_CFA, 7, 8, OFFSET | 16, 1];

/// The longest program of one entry, in bytes. One of 100 KB of code takes about as many.
const MAX_PROGRAM: usize = 1 << 24;

// DWARF 5, table 7.29; the last is GNU's.
const ADVANCE_LOC: u8 = 0x40;
const OFFSET: u8 = 0x80;
const RESTORE: u8 = 0xc0;
const ADVANCE_LOC1: u8 = 0x02;
const ADVANCE_LOC2: u8 = 0x03;
const ADVANCE_LOC4: u8 = 0x04;
const RESTORE_EXTENDED: u8 = 0x06;
const UNDEFINED: u8 = 0x07;
const SAME_VALUE: u8 = 0x08;
const REGISTER: u8 = 0x09;
const DEF_CFA: u8 = 0x0c;
const DEF_CFA_REGISTER: u8 = 0x0d;
const DEF_CFA_OFFSET: u8 = 0x0e;
const DEF_CFA_EXPRESSION: u8 = 0x0f;
const EXPRESSION: u8 = 0x10;
const OFFSET_EXTENDED_SF: u8 = 0x11;
const DEF_CFA_SF: u8 = 0x12;
const VAL_OFFSET_SF: u8 = 0x15;
const VAL_EXPRESSION: u8 = 0x16;
const GNU_ARGS_SIZE: u8 = 0x2e;

/// Bytes that will lie at a known link address.
#[derive(Debug)]
pub(super) struct Bytes {
    pub bytes: Vec<u8>,
    start: LinkAddr,
}

impl Bytes {
    pub fn at(start: LinkAddr) -> Self {
        Self { bytes: Vec::new(), start }
    }

    /// Where the next byte will lie.
    pub fn here(&self) -> LinkAddr {
        self.start.plus(self.bytes.len() as u64)
    }

    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes.extend(value.to_le_bytes());
    }

    pub fn uleb(&mut self, value: u64) {
        uleb(&mut self.bytes, value);
    }

    pub fn sleb(&mut self, value: i64) {
        sleb(&mut self.bytes, value);
    }

    /// The distance from here to `address` in 4 bytes. Zero would be read as no address at all.
    pub fn pcrel4(&mut self, address: LinkAddr) -> Result<(), ()> {
        let distance = i32::try_from(address.distance(self.here())).map_err(drop)?;
        if distance == 0 && self.start != LinkAddr(0) {
            return Err(());
        }
        self.bytes.extend(distance.to_le_bytes());
        Ok(())
    }

    /// Pads the entry that began at offset `start` with no-operations to 4 bytes and fills in its length.
    pub fn end_entry(&mut self, start: usize) {
        while !(self.bytes.len() - start).is_multiple_of(4) {
            self.bytes.push(0);
        }
        let len = u32::try_from(self.bytes.len() - start - 4).expect("an entry is not longer than its function's rows");
        self.bytes[start..start + 4].copy_from_slice(&len.to_le_bytes());
    }
}

pub(super) fn uleb(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn sleb(out: &mut Vec<u8>, mut value: i64) {
    loop {
        let low = value as u8 & 0x7f;
        value >>= 7;
        if (value == 0 && low & 0x40 == 0) || (value == -1 && low & 0x40 != 0) {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

/// The program for a stretch that starts at offset `start` of the cache: at each place where the original's row is
/// another one, what changes.
pub(super) fn of(origins: &[Origin], start: u64, rows: &Rows) -> Result<Vec<u8>, UnwindRefusal> {
    let initial = Row {
        cfa: Cfa::Offset { register: STACK_POINTER, offset: 8 },
        rules: vec![(RETURN_ADDRESS, Rule::Offset(-8))],
        args_size: 0,
    };
    let mut out = Vec::new();
    let mut now = &initial;
    let mut at = start;
    for origin in origins {
        // A place outside its function's entry: the original has no row there, nothing that runs can need one.
        let Some(row) = rows.at(origin.original) else { return Err(UnwindRefusal::Frame) };
        if row != now {
            // A block map that anybody may have written can lead backwards: too far for any advance.
            advance(&mut out, origin.copy.wrapping_sub(at))?;
            change(&mut out, now, row)?;
            if out.len() > MAX_PROGRAM {
                return Err(UnwindRefusal::Frame);
            }
            (now, at) = (row, origin.copy);
        }
    }
    Ok(out)
}

fn advance(out: &mut Vec<u8>, delta: u64) -> Result<(), UnwindRefusal> {
    match delta {
        0 => {}
        1..=0x3f => out.push(ADVANCE_LOC | delta as u8),
        0x40..=0xff => out.extend([ADVANCE_LOC1, delta as u8]),
        0x100..=0xffff => {
            out.push(ADVANCE_LOC2);
            out.extend((delta as u16).to_le_bytes());
        }
        _ => {
            out.push(ADVANCE_LOC4);
            out.extend(u32::try_from(delta).map_err(|_| UnwindRefusal::OutOfReach)?.to_le_bytes());
        }
    }
    Ok(())
}

/// From one row to another, without a stack of remembered ones: rows of a copy follow no such discipline.
fn change(out: &mut Vec<u8>, from: &Row, to: &Row) -> Result<(), UnwindRefusal> {
    if from.cfa != to.cfa {
        change_cfa(out, &from.cfa, &to.cfa)?;
    }
    for (register, _) in from.rules.iter().filter(|(r, _)| to.rule(*r).is_none()) {
        // To "restore" a register that the common entry says nothing of is to say nothing of it.
        match *register {
            RETURN_ADDRESS => return Err(UnwindRefusal::Rule),
            r @ 0..=0x3f => out.push(RESTORE | r as u8),
            r => {
                out.push(RESTORE_EXTENDED);
                uleb(out, u64::from(r));
            }
        }
    }
    for (register, rule) in to.rules.iter().filter(|(r, rule)| from.rule(*r) != Some(rule)) {
        set(out, *register, rule)?;
    }
    if from.args_size != to.args_size {
        out.push(GNU_ARGS_SIZE);
        uleb(out, to.args_size);
    }
    Ok(())
}

fn change_cfa(out: &mut Vec<u8>, from: &Cfa, to: &Cfa) -> Result<(), UnwindRefusal> {
    match (from, to) {
        (_, Cfa::Expression(code)) => {
            out.push(DEF_CFA_EXPRESSION);
            block(out, code);
        }
        (_, &Cfa::Offset { register, offset: offset @ ..0 }) => {
            out.push(DEF_CFA_SF);
            uleb(out, u64::from(register));
            sleb(out, factored(offset)?);
        }
        (&Cfa::Offset { register: r, .. }, &Cfa::Offset { register, offset }) if r == register => {
            out.push(DEF_CFA_OFFSET);
            uleb(out, offset as u64);
        }
        (&Cfa::Offset { offset: o, .. }, &Cfa::Offset { register, offset }) if o == offset => {
            out.push(DEF_CFA_REGISTER);
            uleb(out, u64::from(register));
        }
        (_, &Cfa::Offset { register, offset }) => {
            out.push(DEF_CFA);
            uleb(out, u64::from(register));
            uleb(out, offset as u64);
        }
    }
    Ok(())
}

fn set(out: &mut Vec<u8>, register: u16, rule: &Rule) -> Result<(), UnwindRefusal> {
    let mut op = |code: u8| {
        out.push(code);
        uleb(out, u64::from(register));
    };
    match rule {
        Rule::Undefined => op(UNDEFINED),
        Rule::SameValue => op(SAME_VALUE),
        Rule::Offset(offset) => match (register, factored(*offset)?) {
            (0..=0x3f, n @ 0..) => {
                out.push(OFFSET | register as u8);
                uleb(out, n as u64);
            }
            (_, n) => {
                op(OFFSET_EXTENDED_SF);
                sleb(out, n);
            }
        },
        Rule::ValOffset(offset) => {
            let n = factored(*offset)?;
            op(VAL_OFFSET_SF);
            sleb(out, n);
        }
        Rule::Register(other) => {
            op(REGISTER);
            uleb(out, u64::from(*other));
        }
        Rule::Expression(code) => {
            op(EXPRESSION);
            block(out, code);
        }
        Rule::ValExpression(code) => {
            op(VAL_EXPRESSION);
            block(out, code);
        }
    }
    Ok(())
}

fn block(out: &mut Vec<u8>, code: &[u8]) {
    uleb(out, code.len() as u64);
    out.extend_from_slice(code);
}

fn factored(offset: i64) -> Result<i64, UnwindRefusal> {
    if offset % DATA_ALIGN == 0 { Ok(offset / DATA_ALIGN) } else { Err(UnwindRefusal::Rule) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_length() {
        // DWARF 5, tables 7.8 and 7.7.
        for (value, bytes) in [(2u64, vec![2u8]), (127, vec![127]), (128, vec![0x80, 1]), (12857, vec![0xb9, 0x64])] {
            let mut out = Vec::new();
            uleb(&mut out, value);
            assert_eq!(out, bytes);
        }
        for (value, bytes) in [
            (2i64, vec![2u8]),
            (-2, vec![0x7e]),
            (127, vec![0xff, 0]),
            (-128, vec![0x80, 0x7f]),
            (-129, vec![0xff, 0x7e]),
        ] {
            let mut out = Vec::new();
            sleb(&mut out, value);
            assert_eq!(out, bytes);
        }
    }
}
