//! cdsort: an order of functions in which callers lie near callees and hot code shares cache lines and pages.
//!
//! Cache-directed sort, as LLVM's CodeLayout describes it. Chains of functions merge greedily by what a merge gains:
//! *distance locality*, the calls between them times their distance to the power of -0.25, and, at a quarter of the
//! weight, *frequency locality*, the misses saved in a cache of 16 entries of 2048 bytes when entries are touched with the
//! chain's density. The gain is divided by the size of the smaller chain, so that small ones merge first.
//!
//! Floating point, but only operations that IEEE 754 rounds exactly (the powers are square roots and products), so the
//! order is the same on every host.

use crate::chains::Chains;
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Entries of the modelled cache.
pub const CACHE_ENTRIES: u32 = 16;
/// Bytes of an entry.
pub const CACHE_ENTRY_BYTES: f64 = 2048.0;
/// The weight of frequency locality.
pub const FREQUENCY_SCALE: f64 = 0.25;
/// Gains below this are noise.
const EPSILON: f64 = 1e-8;

/// A function to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SortFunction {
    /// Bytes that lie in the order: its hot part.
    pub size: u32,
    /// How often it runs.
    pub count: u64,
}

/// A call or tail jump from one function to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SortCall {
    /// The caller, an index into the functions.
    pub from: u32,
    /// The callee, an index into the functions.
    pub to: u32,
    /// How often.
    pub count: u64,
    /// Distance in bytes of the call from the caller's start, as it will lie.
    pub offset: u32,
}

/// An order of all functions. Functions without any count come last, in the order given.
#[must_use]
pub fn sort(functions: &[SortFunction], calls: &[SortCall]) -> Vec<u32> {
    let calls: Vec<SortCall> = calls.iter().filter(|c| c.from != c.to && c.count > 0).copied().collect();
    let (mut made, mut got) = (vec![0u64; functions.len()], vec![0u64; functions.len()]);
    for c in &calls {
        made[c.from as usize] = made[c.from as usize].saturating_add(c.count);
        got[c.to as usize] = got[c.to as usize].saturating_add(c.count);
    }
    let count = |i: usize| functions[i].count.max(made[i]).max(got[i]);
    let size = |i: usize| u64::from(functions[i].size.max(1));
    let nodes = (0..functions.len()).map(|i| (size(i), count(i)));
    let chains = Chains::new(nodes, calls.iter().map(|c| (c.from, c.to)));
    let total_size = (0..functions.len()).filter(|&i| functions[i].count > 0).map(size).sum::<u64>();
    let total_count = functions.iter().map(|f| f.count as f64).sum();
    let mut sorting = Sorting {
        best: vec![(0.0, false); chains.link.len()],
        apart: closeness(total_size as i64),
        queue: BinaryHeap::new(),
        calls,
        chains,
        total_count,
    };
    sorting.run();
    let order = sorting.chains.by_density(|_| false);
    order.into_iter().flat_map(|c| sorting.chains.nodes[c as usize].clone()).collect()
}

/// A distance in bytes to the power of -0.25.
fn closeness(distance: i64) -> f64 {
    let d = if distance == 0 { 0.1 } else { distance.unsigned_abs() as f64 };
    1.0 / d.sqrt().sqrt()
}

/// A queued merge; ordered by gain, ties by the chains' numbers, lower ones first.
struct Candidate {
    gain: f64,
    chains: Reverse<(u32, u32)>,
    link: u32,
    stamp: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |c: &Self| (c.chains, c.link, c.stamp);
        self.gain.total_cmp(&other.gain).then_with(|| key(self).cmp(&key(other)))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

struct Sorting {
    calls: Vec<SortCall>,
    chains: Chains,
    /// By link: the gain of its best merge, and whether the link's second chain comes first in it.
    best: Vec<(f64, bool)>,
    /// What a call earns while its ends are in different chains: as if the whole program lay between them.
    apart: f64,
    total_count: f64,
    queue: BinaryHeap<Candidate>,
}

impl Sorting {
    fn run(&mut self) {
        for l in 0..self.chains.link.len() as u32 {
            self.consider(l);
        }
        while let Some(Candidate { link: l, stamp, .. }) = self.queue.pop() {
            let link = &self.chains.link[l as usize];
            if link.stamp != stamp {
                continue;
            }
            let (a, b) = (link.a, link.b);
            let (first, second) = if self.best[l as usize].1 { (b, a) } else { (a, b) };
            let order = [&self.chains.nodes[first as usize][..], &self.chains.nodes[second as usize]].concat();
            // The chain with more neighbours takes the other in: less to move.
            let more = self.chains.links[a as usize].len() >= self.chains.links[b as usize].len();
            let (into, from) = if more { (a, b) } else { (b, a) };
            self.chains.merge(into, from, order);
            for i in 0..self.chains.links[into as usize].len() {
                self.consider(self.chains.links[into as usize][i].1);
            }
        }
    }

    /// Finds the better of the two orders of a link's chains and queues it if it gains anything.
    fn consider(&mut self, l: u32) {
        let link = &self.chains.link[l as usize];
        let (a, b, stamp) = (link.a, link.b, link.stamp);
        let frequency = FREQUENCY_SCALE * self.frequency_gain(a, b);
        let smaller = self.chains.size[a as usize].min(self.chains.size[b as usize]) as f64;
        let gain = |first: u32, second: u32| {
            let gain = self.distance_gain(l, first, second) + frequency;
            if gain > 0.0 { gain / smaller } else { gain }
        };
        let (forward, backward) = (gain(a, b), gain(b, a));
        // Of equals take the one that keeps the given order.
        let keeps = self.chains.nodes[a as usize][0] < self.chains.nodes[b as usize][0];
        let swapped = if (forward - backward).abs() < EPSILON { !keeps } else { backward > forward };
        let best = if swapped { backward } else { forward };
        self.best[l as usize] = (best, swapped);
        if best > EPSILON {
            self.queue.push(Candidate { gain: best, chains: Reverse((a.min(b), a.max(b))), link: l, stamp });
        }
    }

    /// What the calls between two chains gain when `second` follows `first`.
    fn distance_gain(&self, l: u32, first: u32, second: u32) -> f64 {
        let c = &self.chains;
        let place = |node: u32| {
            let before = if c.of[node as usize] == second { c.size[first as usize] } else { 0 };
            before + c.offset[node as usize]
        };
        let mut gain = 0.0;
        for &j in &c.link[l as usize].jumps {
            let call = &self.calls[j as usize];
            let distance = place(call.from) + i64::from(call.offset) - place(call.to);
            gain += call.count as f64 * (closeness(distance) - self.apart);
        }
        gain
    }

    /// The expected misses that merging saves.
    fn frequency_gain(&self, a: u32, b: u32) -> f64 {
        let of = |c: u32| (self.chains.count[c as usize] as f64, self.chains.size[c as usize] as f64);
        let ((ac, asz), (bc, bsz)) = (of(a), of(b));
        let misses = |count: f64, size: f64| count * self.miss_probability(count / size);
        misses(ac, asz) + misses(bc, bsz) - misses(ac + bc, asz + bsz)
    }

    /// The probability that an entry of this density (counts per byte) is not in the cache.
    fn miss_probability(&self, density: f64) -> f64 {
        let samples = density * CACHE_ENTRY_BYTES;
        if samples >= self.total_count {
            return 0.0;
        }
        let mut p = 1.0 - samples / self.total_count;
        for _ in 0..CACHE_ENTRIES.ilog2() {
            p *= p;
        }
        p
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn function(size: u32, count: u64) -> SortFunction {
        SortFunction { size, count }
    }

    fn call(from: u32, to: u32, count: u64) -> SortCall {
        SortCall { from, to, count, offset: 0 }
    }

    #[test]
    fn a_hot_pair_lies_together_and_cold_functions_last() {
        let functions = [function(64, 10), function(64, 0), function(64, 1000), function(4096, 5), function(64, 1000)];
        let order = sort(&functions, &[call(2, 4, 1000), call(0, 2, 1), call(3, 0, 1)]);
        let at = |f: u32| order.iter().position(|&o| o == f).unwrap() as i64;
        assert_eq!((at(2) - at(4)).abs(), 1, "{order:?}");
        assert_eq!(at(1), 4, "{order:?}");
    }

    #[test]
    fn the_fourth_root_is_exact_where_it_can_be() {
        assert_eq!(closeness(16), 0.5);
        assert_eq!(closeness(-256), 0.25);
        assert_eq!(CACHE_ENTRIES, 1 << CACHE_ENTRIES.ilog2());
    }

    proptest! {
        #[test]
        fn an_order_is_a_permutation(
            functions in prop::collection::vec((0u32..9000, prop_oneof![Just(0u64), 0..100_000u64, Just(u64::MAX)]), 0..60),
            calls in prop::collection::vec((any::<u16>(), any::<u16>(), 0u64..10_000, 0u32..500), 0..200),
        ) {
            let n = functions.len().max(1) as u32;
            let functions: Vec<_> = functions.into_iter().map(|(s, c)| function(s, c)).collect();
            let calls: Vec<_> = calls.into_iter()
                .filter(|_| !functions.is_empty())
                .map(|(from, to, count, offset)| SortCall { from: u32::from(from) % n, to: u32::from(to) % n, count, offset })
                .collect();
            let mut order = sort(&functions, &calls);
            prop_assert_eq!(&order, &sort(&functions, &calls));
            order.sort_unstable();
            prop_assert_eq!(order, (0..functions.len() as u32).collect::<Vec<_>>());
        }
    }
}
