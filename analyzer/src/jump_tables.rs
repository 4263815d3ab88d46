//! Jump tables: what a `switch` or a table of labels becomes.
//!
//! An indirect jump is followed backwards to where its target comes from, through copies, additions and the one load from
//! the table, in whatever registers and order the compiler chose. Two shapes are understood:
//!
//! - *absolute*: the 8 bytes at `table + 8 * index` are the target (non-PIE code, tables of labels);
//! - *relative*: the target is `table +` the signed 4 bytes at `table + 4 * index` (PIC).
//!
//! The length comes from the check of the index before it (`cmp`/`ja`). Otherwise the table is read until an entry makes no
//! sense or another table starts, at most as far as the index's type or a mask allows (a zero-extended byte: 256 entries).

mod flow;

use crate::cfg::JumpTable;
use dyni_schema::LinkAddr;
pub(crate) use flow::Code;
use flow::{Atom, Sum, Term};

/// The most entries of a table.
const MAX_ENTRIES: u64 = 1 << 16;

/// The table that the indirect jump at `jump` reads, if it is understood.
///
/// `plausible` says whether a block of the function may start at an address; `elsewhere` whether it lies in another
/// function.
pub(crate) fn recognise(
    code: &Code<'_>,
    jump: LinkAddr,
    plausible: &dyn Fn(LinkAddr) -> bool,
    elsewhere: &dyn Fn(LinkAddr) -> bool,
) -> Option<JumpTable> {
    let target = code.jump_target(jump)?;
    let (address, absolute, index) = shape(&target)?;
    let bound = code.bound(index).filter(|b| b.count > 0 && b.count <= MAX_ENTRIES);
    let checked = bound.is_some_and(|b| b.checked);
    let width = if absolute { 8 } else { 4 };
    let end = code.targets.next_base(address).filter(|_| !checked);
    let mut targets = Vec::new();
    let mut exact = bound.is_some() && !code.has_assumed() && !may_be_rewritten(code, address);
    for i in 0..bound.map_or(MAX_ENTRIES, |b| b.count) {
        let slot = address.plus(i * width);
        let entry = if end.is_some_and(|e| slot >= e) {
            None
        } else if absolute {
            code.image.pointer_at(slot)
        } else {
            code.image.u32_at(slot).map(|d| address.offset(i64::from(d as i32)))
        };
        // A checked length may count entries of the function's cold part, and an 8-byte text address is hardly anything else
        // than an entry; otherwise only those in the function itself are sure.
        let sure = checked || (absolute && bound.is_some());
        let Some(entry) = entry.filter(|&e| plausible(e) || (sure && elsewhere(e))) else {
            exact = false;
            break;
        };
        targets.push(entry);
    }
    targets.iter().any(|&t| plausible(t)).then_some(JumpTable { address, absolute, targets, exact })
}

/// Whether the program may write into its table: one in `.data`, not in what the loader makes read-only.
fn may_be_rewritten(code: &Code<'_>, table: LinkAddr) -> bool {
    let holds = |start: LinkAddr, size: u64| table >= start && table.0 - start.0 < size;
    let writable = code.image.segments().iter().any(|s| s.writable && holds(s.address, s.mem_size));
    let relocated =
        code.image.sections().iter().any(|s| s.name.starts_with(".data.rel.ro") && holds(s.address, s.size));
    writable && !relocated
}

/// Table address, whether it is absolute, and the index, if the target has one of the two shapes.
fn shape(target: &Sum) -> Option<(LinkAddr, bool, flow::Place)> {
    let [Term { scale: 1, atom: Atom::Load { address, size } }] = &target.terms[..] else { return None };
    let [Term { scale, atom: Atom::Value(index) }] = &address.terms[..] else { return None };
    let table = LinkAddr(address.constant);
    match (size, scale) {
        (8, 8) if target.constant == 0 && table.0 != 0 => Some((table, true, *index)),
        (4, 4) if target.constant == table.0 && table.0 != 0 => Some((table, false, *index)),
        _ => None,
    }
}
