//! Pass `split`: which blocks lie in front, and which at the far end of the cache.
//!
//! A block with an inferred count is hot. One without is cold *if there is evidence*: under sparse samples most blocks of a
//! lukewarm function were never hit, and a short block beside a branch that ran often may have run often too. So an unseen
//! block stays in front until, had it and the unseen blocks before it run half as often as the block they were reached
//! from, at least one sample would have been expected in them. Exact counts need no such doubt, nor does a block that ends where
//! a program fails.
//!
//! Blocks that stay in front for want of evidence have no count, so ordering puts them behind the ones that have.

use super::{FunctionLayout, Pass, PassStats, infer};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Divides the blocks of `order` into hot ones, in front, and cold ones, both in their original order.
pub fn run(layout: &mut FunctionLayout) -> PassStats {
    let doubtful = doubtful(layout);
    let hot = |b: u32| b == 0 || layout.flow.nodes[b as usize] > 0;
    let in_front = |b: u32| hot(b) || doubtful[b as usize];
    layout.order.sort_by_key(|&b| (!in_front(b), b));
    layout.hot = layout.order.iter().take_while(|&&b| in_front(b)).count();
    let bytes = |blocks: &[u32]| blocks.iter().map(|&b| u64::from(layout.size(b))).sum();
    let (front, cold) = layout.order.split_at(layout.hot);
    let doubted: Vec<u32> = front.iter().copied().filter(|&b| !hot(b)).collect();
    PassStats {
        pass: Pass::Split,
        numbers: [
            ("hot blocks", (front.len() - doubted.len()) as u64),
            ("bytes in front", bytes(front)),
            ("of them without evidence", bytes(&doubted)),
            ("cold bytes", bytes(cold)),
        ],
    }
}

/// Blocks without a count whose silence proves nothing.
fn doubtful(layout: &FunctionLayout) -> Vec<bool> {
    let n = layout.cfg.blocks.len();
    let mut doubtful = vec![false; n];
    let unit = u128::from(layout.units_per_sample);
    if unit == 0 {
        return doubtful;
    }
    let mut successors = vec![Vec::new(); n];
    for e in &layout.edges {
        successors[e.from as usize].push(e.to);
    }
    // Twice the samples to be expected, in units: least first, so that each block is settled by its most doubtful path.
    // Along a path the notional count stays what it was where the path left the counted blocks.
    let mut queue: BinaryHeap<Reverse<(u128, u64, u32)>> = BinaryHeap::new();
    let step = |queue: &mut BinaryHeap<_>, before: u128, count: u64, to: u32| {
        let cost = if unit == 1 { 1 } else { infer::cost(layout, to as usize) };
        queue.push(Reverse((before + u128::from(count) * u128::from(cost), count, to)));
    };
    for (b, next) in successors.iter().enumerate().filter(|(b, _)| layout.flow.nodes[*b] > 0) {
        for &to in next.iter().filter(|&&to| layout.flow.nodes[to as usize] == 0) {
            step(&mut queue, 0, layout.flow.nodes[b], to);
        }
    }
    while let Some(Reverse((expected, count, b))) = queue.pop() {
        let unlikely = layout.info[b as usize].fails;
        if unlikely || expected >= 2 * unit || std::mem::replace(&mut doubtful[b as usize], true) {
            continue;
        }
        for &to in successors[b as usize].iter().filter(|&&to| layout.flow.nodes[to as usize] == 0) {
            step(&mut queue, expected, count, to);
        }
    }
    doubtful
}
