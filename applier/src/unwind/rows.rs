//! What the unwinder is told of a function: for each instruction, where the caller's registers are.
//!
//! Read by gimli and kept in a form that can be compared and written again.

use super::UnwindRefusal;
use super::program::RETURN_ADDRESS;
use dyni_analyzer::functions::Bytes;
use dyni_schema::LinkAddr;
use gimli::{
    BaseAddresses, CallFrameInstruction, CfaRule, EhFrame, Encoding, Format, FrameDescriptionEntry, Operation,
    RegisterRule, UnwindContext, UnwindExpression,
};

/// The longest DWARF expression that is looked at, in bytes. Compilers make about a dozen.
const MAX_EXPRESSION: usize = 1024;
/// The most rules and bytes of expressions that all rows of one function may have. A function of 100 KB has about 50,000.
const MAX_RULES: usize = 1 << 22;

/// Where a frame ends (its canonical frame address).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cfa {
    /// A register's value and so many bytes.
    Offset { register: u16, offset: i64 },
    /// What a DWARF expression computes.
    Expression(Vec<u8>),
}

/// Where the caller's value of a register is (DWARF 5, 6.4.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rule {
    Undefined,
    SameValue,
    Offset(i64),
    ValOffset(i64),
    Register(u16),
    Expression(Vec<u8>),
    ValExpression(Vec<u8>),
}

/// What holds at one instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub cfa: Cfa,
    /// By rising register; those that are not there have no rule, which differs from every rule.
    pub rules: Vec<(u16, Rule)>,
    /// Bytes of arguments on the stack, by which a landing pad's stack pointer is moved.
    pub args_size: u64,
}

impl Row {
    /// How much it takes to keep.
    fn weight(&self) -> usize {
        let cfa = if let Cfa::Expression(code) = &self.cfa { code.len() } else { 0 };
        let rules = self.rules.iter().map(|(_, rule)| match rule {
            Rule::Expression(code) | Rule::ValExpression(code) => 1 + code.len(),
            _ => 1,
        });
        1 + cfa + rules.sum::<usize>()
    }

    pub fn rule(&self, register: u16) -> Option<&Rule> {
        self.rules.binary_search_by_key(&register, |r| r.0).ok().map(|i| &self.rules[i].1)
    }
}

/// All rows of one entry.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows {
    /// Where each begins, rising.
    rows: Vec<(LinkAddr, Row)>,
    end: LinkAddr,
}

impl Rows {
    /// The row that holds at an instruction.
    pub fn at(&self, at: LinkAddr) -> Option<&Row> {
        let i = self.rows.partition_point(|(start, _)| *start <= at).checked_sub(1)?;
        (at < self.end).then(|| &self.rows[i].1)
    }

    /// Reads an entry's rows.
    pub fn read(
        section: &EhFrame<Bytes<'_>>,
        bases: &BaseAddresses,
        fde: &FrameDescriptionEntry<Bytes<'_>>,
        context: &mut UnwindContext<usize>,
    ) -> Result<Self, UnwindRefusal> {
        let cie = fde.cie();
        if cie.return_address_register().0 != RETURN_ADDRESS || cie.address_size() != 8 {
            return Err(UnwindRefusal::Frame);
        }
        let mut args = ArgsSize::read(section, bases, fde).map_err(|_| UnwindRefusal::Frame)?;
        let mut table = fde.rows(section, bases, context).map_err(|_| UnwindRefusal::Frame)?;
        let mut rows: Vec<(LinkAddr, Row)> = Vec::new();
        let start = fde.initial_address();
        let mut next = start;
        let mut weight = 0;
        while let Some(row) = table.next_row().map_err(|_| UnwindRefusal::Frame)? {
            // Empty rows (two advances by nothing) hold nowhere; a gap would be the parser's.
            if row.start_address() >= row.end_address() {
                continue;
            }
            if row.start_address() != next || weight > MAX_RULES {
                return Err(UnwindRefusal::Frame);
            }
            next = row.end_address();
            let cfa = match row.cfa() {
                CfaRule::RegisterAndOffset { register, offset } if register.0 != RETURN_ADDRESS => {
                    Cfa::Offset { register: register.0, offset: *offset }
                }
                CfaRule::RegisterAndOffset { .. } => return Err(UnwindRefusal::Rule),
                CfaRule::Expression(e) => Cfa::Expression(expression(section, e)?),
            };
            let mut rules = Vec::new();
            for (register, rule) in row.registers() {
                let rule = match rule {
                    RegisterRule::Undefined => Rule::Undefined,
                    RegisterRule::SameValue => Rule::SameValue,
                    RegisterRule::Offset(offset) => Rule::Offset(*offset),
                    RegisterRule::ValOffset(offset) => Rule::ValOffset(*offset),
                    RegisterRule::Register(other) if other.0 != RETURN_ADDRESS => Rule::Register(other.0),
                    RegisterRule::Expression(e) => Rule::Expression(expression(section, e)?),
                    RegisterRule::ValExpression(e) => Rule::ValExpression(expression(section, e)?),
                    _ => return Err(UnwindRefusal::Rule),
                };
                // "The same" as here is another address in the copy.
                if register.0 == RETURN_ADDRESS && rule == Rule::SameValue {
                    return Err(UnwindRefusal::Rule);
                }
                rules.push((register.0, rule));
            }
            rules.sort_unstable_by_key(|r| r.0);
            for (from, args_size) in args.pieces(row.start_address(), row.end_address()) {
                let row = Row { cfa: cfa.clone(), rules: rules.clone(), args_size };
                weight += row.weight();
                if rows.last().is_none_or(|(_, last)| *last != row) {
                    rows.push((LinkAddr(from), row));
                }
            }
        }
        if next != fde.end_address() || rows.is_empty() {
            return Err(UnwindRefusal::Frame);
        }
        Ok(Self { rows, end: LinkAddr(next) })
    }
}

/// The argument sizes of an entry as libgcc and GCC see them: the last one stated, in the order of the program. gimli
/// makes them part of what is remembered and restored, which for GCC's entries gives another number.
struct ArgsSize(Vec<(u64, u64)>);

impl ArgsSize {
    fn read(
        section: &EhFrame<Bytes<'_>>,
        bases: &BaseAddresses,
        fde: &FrameDescriptionEntry<Bytes<'_>>,
    ) -> gimli::Result<Self> {
        let factor = fde.cie().code_alignment_factor();
        let mut at = fde.initial_address();
        let mut sizes = vec![(at, 0)];
        let mut instructions = fde.cie().instructions(section, bases);
        while let Some(instruction) = instructions.next()? {
            if let CallFrameInstruction::ArgsSize { size } = instruction {
                sizes[0].1 = size;
            }
        }
        let mut instructions = fde.instructions(section, bases);
        while let Some(instruction) = instructions.next()? {
            match instruction {
                CallFrameInstruction::SetLoc { address } => at = address,
                CallFrameInstruction::AdvanceLoc { delta } => {
                    at = at.wrapping_add(u64::from(delta).wrapping_mul(factor));
                }
                CallFrameInstruction::ArgsSize { size } => match sizes.last_mut() {
                    Some(last) if last.0 == at => last.1 = size,
                    _ => sizes.push((at, size)),
                },
                _ => {}
            }
        }
        Ok(Self(sizes))
    }

    /// Where in a range the size changes, and to what: its start first.
    fn pieces(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let before = self.0.partition_point(|(at, _)| *at <= start);
        let mut pieces = vec![(start, self.0[..before].last().map_or(0, |last| last.1))];
        pieces.extend(self.0[before..].iter().take_while(|(at, _)| *at < end));
        pieces
    }
}

/// An expression's bytes, if they mean the same for a copy: it may look at registers and memory, but not at the
/// instruction pointer, and it may not name addresses, which would need a relocation.
fn expression(section: &EhFrame<Bytes<'_>>, at: &UnwindExpression<usize>) -> Result<Vec<u8>, UnwindRefusal> {
    let code = at.get(section).map_err(|_| UnwindRefusal::Frame)?;
    if code.0.len() > MAX_EXPRESSION {
        return Err(UnwindRefusal::Rule);
    }
    let mut operations = code.operations(Encoding { address_size: 8, format: Format::Dwarf32, version: 4 });
    while let Some(operation) = operations.next().map_err(|_| UnwindRefusal::Rule)? {
        match operation {
            Operation::RegisterOffset { register, .. } if register.0 != RETURN_ADDRESS => {}
            Operation::Deref { .. }
            | Operation::Drop
            | Operation::Pick { .. }
            | Operation::Swap
            | Operation::Rot
            | Operation::Abs
            | Operation::And
            | Operation::Div
            | Operation::Minus
            | Operation::Mod
            | Operation::Mul
            | Operation::Neg
            | Operation::Not
            | Operation::Or
            | Operation::Plus
            | Operation::PlusConstant { .. }
            | Operation::Shl
            | Operation::Shr
            | Operation::Shra
            | Operation::Xor
            | Operation::Bra { .. }
            | Operation::Eq
            | Operation::Ge
            | Operation::Gt
            | Operation::Le
            | Operation::Lt
            | Operation::Ne
            | Operation::Skip { .. }
            | Operation::UnsignedConstant { .. }
            | Operation::SignedConstant { .. }
            | Operation::Nop => {}
            _ => return Err(UnwindRefusal::Rule),
        }
    }
    Ok(code.0.slice().to_vec())
}
