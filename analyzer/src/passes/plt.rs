//! Pass `plt`: calls of other modules' functions go past the procedure linkage table.
//!
//! The stub there only jumps on through a slot that the dynamic linker fills; the copy calls through that slot itself. The
//! work is the applier's, for every copied call; this says how many there are.

use super::{FunctionLayout, Pass, PassStats};
use crate::cfg::Terminator;
use crate::image::Image;

/// Counts them.
pub fn run(layout: &FunctionLayout, image: &Image) -> PassStats {
    let (mut sites, mut calls) = (0u64, 0u64);
    for &b in &layout.order[..layout.hot] {
        let jump = match layout.cfg.blocks[b as usize].terminator {
            Terminator::Jump { target } => Some(target),
            _ => None,
        };
        let callees = layout.info[b as usize].calls.iter().map(|c| c.1).chain(jump);
        let stubs = callees.filter(|&to| image.plt_slot(to).is_some()).count() as u64;
        sites += stubs;
        calls = calls.saturating_add(stubs.saturating_mul(layout.flow.nodes[b as usize]));
    }
    let numbers = [("calls past the linkage table", sites), ("times made", calls), ("", 0), ("", 0)];
    PassStats { pass: Pass::Plt, numbers }
}
