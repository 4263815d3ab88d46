//! Pass `entries`: the blocks whose originals are patched to jump to their copy, besides the entry.
//!
//! *Loop headers*, so that a thread that is in a loop when the copy is installed, and may never leave it, still gets there.
//! *Targets of indirect jumps*, so that an indirect jump that the copy leaves to the original comes back at once. Only
//! blocks that ran: every patch is a place that can be refused. The applier drops those that can't be patched safely.

use super::{FunctionLayout, Pass, PassStats};
use crate::cfg::Terminator;

/// Fills `layout.entries`.
pub fn run(layout: &mut FunctionLayout) -> PassStats {
    let headers = loop_headers(layout);
    let targets = indirect_targets(layout);
    let mut copied = layout.order[..layout.hot].to_vec();
    copied.sort_unstable();
    let ran = |b: &u32| *b != 0 && layout.flow.nodes[*b as usize] > 0;
    let wanted = |b: &u32| headers[*b as usize] || targets[*b as usize];
    layout.entries = copied.into_iter().filter(ran).filter(wanted).collect();
    let count = |set: &[bool]| layout.entries.iter().filter(|&&b| set[b as usize]).count() as u64;
    PassStats {
        pass: Pass::Entries,
        numbers: [
            ("blocks to patch", layout.entries.len() as u64),
            ("loop headers", count(&headers)),
            ("indirect targets", count(&targets)),
            ("", 0),
        ],
    }
}

/// The copied blocks besides the entry by which execution may come back to a copy, or get into it while it is in the
/// middle of the function, whether they ran or not; ascending.
#[must_use]
pub fn all(layout: &FunctionLayout) -> Vec<u32> {
    let (headers, targets) = (loop_headers(layout), indirect_targets(layout));
    let mut wanted: Vec<u32> = layout.order.iter().copied().filter(|&b| b != 0).collect();
    wanted.retain(|&b| headers[b as usize] || targets[b as usize]);
    wanted.sort_unstable();
    wanted
}

fn indirect_targets(layout: &FunctionLayout) -> Vec<bool> {
    let mut targets: Vec<bool> = layout.cfg.blocks.iter().map(|b| b.address_taken).collect();
    for block in layout.cfg.blocks.iter().filter(|b| matches!(b.terminator, Terminator::Indirect { .. })) {
        block.successors.iter().for_each(|&to| targets[to as usize] = true);
    }
    targets
}

/// Blocks that a depth-first walk finds an edge back to: in a reducible graph exactly the loop headers, in any graph at
/// least one block of every cycle that the walk reaches.
fn loop_headers(layout: &FunctionLayout) -> Vec<bool> {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Open,
        Done,
    }
    let blocks = &layout.cfg.blocks;
    let mut mark = vec![Mark::New; blocks.len()];
    let mut header = vec![false; blocks.len()];
    let mut stack: Vec<(u32, usize)> = Vec::new();
    // The entry first, then whatever it does not reach, by address.
    for root in 0..blocks.len() as u32 {
        if mark[root as usize] != Mark::New {
            continue;
        }
        mark[root as usize] = Mark::Open;
        stack.push((root, 0));
        while let Some((b, at)) = stack.last_mut() {
            let Some(&to) = blocks[*b as usize].successors.get(*at) else {
                mark[*b as usize] = Mark::Done;
                stack.pop();
                continue;
            };
            *at += 1;
            match mark[to as usize] {
                Mark::New => {
                    mark[to as usize] = Mark::Open;
                    stack.push((to, 0));
                }
                Mark::Open => header[to as usize] = true,
                Mark::Done => {}
            }
        }
    }
    header
}
