//! Pass `exttsp`: the order of a function's hot blocks; see [`crate::exttsp`]. The cold tail keeps its original order.

use super::{FunctionLayout, Pass, PassStats};
use crate::exttsp::{JumpKind, LayoutBlock, LayoutJump, order, score};

/// Orders `layout.order[..layout.hot]`.
pub fn run(layout: &mut FunctionLayout) -> PassStats {
    let hot = &layout.order[..layout.hot];
    let mut local = vec![u32::MAX; layout.cfg.blocks.len()];
    for (i, &b) in hot.iter().enumerate() {
        local[b as usize] = i as u32;
    }
    let block = |&b: &u32| LayoutBlock { size: layout.size(b), count: layout.flow.nodes[b as usize] };
    let blocks: Vec<LayoutBlock> = hot.iter().map(block).collect();
    let jump = |(i, e): (usize, &super::Edge)| {
        let (from, to) = (local[e.from as usize], local[e.to as usize]);
        let count = layout.flow.edges[i];
        (from != u32::MAX && to != u32::MAX).then_some(LayoutJump { from, to, count, kind: e.kind })
    };
    let jumps: Vec<LayoutJump> = layout.edges.iter().enumerate().filter_map(jump).collect();
    let found = order(&blocks, &jumps);
    let given: Vec<u32> = (0..blocks.len() as u32).collect();
    let moved = found.iter().zip(&given).filter(|(a, b)| a != b).count();
    let numbers = [
        ("blocks moved", moved as u64),
        ("fall-throughs before", fall_throughs(&jumps, &given)),
        ("after", fall_throughs(&jumps, &found)),
        ("score gained", (score(&blocks, &jumps, &found) - score(&blocks, &jumps, &given)) as u64),
    ];
    let new: Vec<u32> = found.iter().map(|&i| hot[i as usize]).collect();
    layout.order[..new.len()].copy_from_slice(&new);
    PassStats { pass: Pass::ExtTsp, numbers }
}

/// Executions that run on into the next block.
fn fall_throughs(jumps: &[LayoutJump], order: &[u32]) -> u64 {
    let mut next = vec![u32::MAX; order.len()];
    for pair in order.windows(2) {
        next[pair[0] as usize] = pair[1];
    }
    let falls = jumps.iter().filter(|j| j.kind != JumpKind::Indirect && next[j.from as usize] == j.to);
    falls.fold(0, |sum, j| sum.saturating_add(j.count))
}
