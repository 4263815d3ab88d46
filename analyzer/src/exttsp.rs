//! ext-TSP: an order of basic blocks in which jumps are short and most edges fall through.
//!
//! The objective and the greedy chain merging are those of Newell and Pupyrev, "Improved Basic Block Reordering"
//! (arXiv 1809.04676), with the parameters that LLVM and BOLT use: an edge that falls through earns 1.0 per execution
//! (1.05 if it would otherwise need an unconditional jump), a forward jump 0.1 falling linearly to nothing at 1024 bytes,
//! a backward jump 0.1 falling to nothing at 640 bytes; the distance counts from the end of the source block. Two chains
//! merge as X_Y, X1_Y_X2, Y_X2_X1 or X2_X1_Y, whichever gains most, X being split at every offset if it has at most 128
//! blocks. An indirect jump stays a jump wherever its target lies, so it earns only the jump's part.
//!
//! All of it is exact integer arithmetic: 1/51200 is the least common unit of those weights.

use crate::chains::Chains;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The reach of a forward jump, bytes.
pub const FORWARD: i64 = 1024;
/// The reach of a backward jump, bytes.
pub const BACKWARD: i64 = 640;
/// The longest chain that is split, blocks.
pub const MAX_SPLIT: usize = 128;
/// The longest chain that merging makes, blocks, as in LLVM: bounds the time for huge functions and costs little, since a
/// jump over so many blocks earns nothing.
pub const MAX_CHAIN: usize = 512;
/// The most blocks for which every order is tried: 120 orders of six blocks take about 20 us.
pub const MAX_EXHAUSTIVE: usize = 6;
/// Units in one fall-through of a conditional branch.
const UNIT: i64 = 51_200;
/// Units in one fall-through that saves an unconditional jump: 1.05.
const UNIT_UNCONDITIONAL: i64 = 53_760;
/// Counts are scaled down until they sum to less than this, so that no gain overflows.
const MAX_TOTAL: u64 = 1 << 44;

/// A block to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutBlock {
    /// Length in bytes.
    pub size: u32,
    /// How often it runs.
    pub count: u64,
}

/// What kind of transfer an edge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JumpKind {
    /// One of two ways out of a conditional branch.
    Conditional,
    /// The only way out of its block.
    Unconditional,
    /// By an indirect jump: can't become a fall-through.
    Indirect,
}

/// An edge between two blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutJump {
    /// The source, an index into the blocks.
    pub from: u32,
    /// The destination, an index into the blocks.
    pub to: u32,
    /// How often it is taken.
    pub count: u64,
    /// What it is.
    pub kind: JumpKind,
}

/// What one jump earns, in units of 1/51200 execution, its source ending at `end` and its destination starting at `start`.
fn earns(end: i64, start: i64, count: i64, kind: JumpKind) -> i64 {
    let distance = start - end;
    let each = match distance {
        0 => match kind {
            JumpKind::Conditional => UNIT,
            JumpKind::Unconditional => UNIT_UNCONDITIONAL,
            JumpKind::Indirect => UNIT / 10,
        },
        1..FORWARD => UNIT / 10 / FORWARD * (FORWARD - distance),
        _ if distance < 0 && -distance < BACKWARD => UNIT / 10 / BACKWARD * (BACKWARD + distance),
        _ => 0,
    };
    each * count
}

/// The ext-TSP score of an order (indices of all or some blocks, each once): executions, weighted.
/// Jumps from or to blocks that are not in `order` earn nothing.
#[must_use]
pub fn score(blocks: &[LayoutBlock], jumps: &[LayoutJump], order: &[u32]) -> f64 {
    units(blocks, jumps, order) as f64 / UNIT as f64
}

/// [`score`] in units of 1/51200.
fn units(blocks: &[LayoutBlock], jumps: &[LayoutJump], order: &[u32]) -> i128 {
    let mut start = vec![None; blocks.len()];
    let mut at = 0;
    for &b in order {
        start[b as usize] = Some(at);
        at += i64::from(blocks[b as usize].size);
    }
    let of = |j: &LayoutJump| {
        let (from, to) = (start[j.from as usize]?, start[j.to as usize]?);
        Some(i128::from(earns(from + i64::from(blocks[j.from as usize].size), to, 1, j.kind)) * i128::from(j.count))
    };
    jumps.iter().filter_map(of).sum()
}

/// An order of all blocks, the entry (block 0) first, that scores at least as much as the order as given; the best one
/// there is for up to [`MAX_EXHAUSTIVE`] blocks.
#[must_use]
pub fn order(blocks: &[LayoutBlock], jumps: &[LayoutJump]) -> Vec<u32> {
    let given: Vec<u32> = (0..blocks.len() as u32).collect();
    let found = match blocks.len() {
        0..3 => return given,
        3..=MAX_EXHAUSTIVE => best_of_all(blocks, jumps),
        _ => greedy(blocks, jumps),
    };
    if units(blocks, jumps, &found) > units(blocks, jumps, &given) { found } else { given }
}

/// Every order is tried: greedy merging can miss half of the score, and most functions have few hot blocks.
fn best_of_all(blocks: &[LayoutBlock], jumps: &[LayoutJump]) -> Vec<u32> {
    let rest: Vec<u32> = (1..blocks.len() as u32).collect();
    let (mut best, mut most) = (Vec::new(), -1);
    let mut order = vec![0];
    permute(&mut order, &rest, &mut |order| {
        let earned = units(blocks, jumps, order);
        if earned > most {
            (best, most) = (order.to_vec(), earned);
        }
    });
    best
}

/// Calls `each` with `order` followed by every permutation of `rest`, in lexicographic order.
fn permute(order: &mut Vec<u32>, rest: &[u32], each: &mut impl FnMut(&[u32])) {
    if rest.is_empty() {
        return each(order);
    }
    for (i, &next) in rest.iter().enumerate() {
        order.push(next);
        let others = [&rest[..i], &rest[i + 1..]].concat();
        permute(order, &others, each);
        order.pop();
    }
}

fn greedy(blocks: &[LayoutBlock], jumps: &[LayoutJump]) -> Vec<u32> {
    let mut merging = Merging::new(blocks, jumps);
    merging.join_forced_pairs(jumps);
    merging.run();
    merging.finish()
}

/// How two chains are put together; X is split at an offset, Y stays whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shape {
    XY,
    X1YX2,
    YX2X1,
    X2X1Y,
}

/// The best way to merge the chains of one link.
#[derive(Clone, Copy, Debug)]
struct Merge {
    gain: i64,
    shape: Shape,
    x: u32,
    y: u32,
    /// How many nodes of X are X1.
    offset: usize,
}

/// What the queue holds: gain, then the chains and the link with its stamp.
type Candidate = (i64, Reverse<(u32, u32)>, u32, u32);

/// Keeps the merge that gains more, if it gains anything.
fn keep(best: &mut Option<Merge>, merge: Merge) {
    if merge.gain > best.map_or(0, |m| m.gain) {
        *best = Some(merge);
    }
}

/// What it does to a chain's own jumps to split it at one offset.
#[derive(Clone, Debug, Default)]
struct Split {
    /// The jumps with an end on either side: only their distances change.
    crossing: Vec<u32>,
    /// The least that is lost by putting anything between the parts (a negative gain).
    parted: i64,
    /// What is gained by exchanging the parts.
    exchanged: i64,
}

struct Merging<'a> {
    blocks: &'a [LayoutBlock],
    jumps: Vec<LayoutJump>,
    chains: Chains,
    /// Whether the next block of the chain must stay the next.
    glued: Vec<bool>,
    /// For each chain of at most [`MAX_SPLIT`] blocks what its splits do; empty until needed.
    splits: Vec<Vec<Split>>,
    best: Vec<Option<Merge>>,
    queue: BinaryHeap<Candidate>,
}

impl<'a> Merging<'a> {
    fn new(blocks: &'a [LayoutBlock], jumps: &[LayoutJump]) -> Self {
        let total: u128 = jumps.iter().map(|j| u128::from(j.count)).sum();
        let shift = (128 - (total / u128::from(MAX_TOTAL)).leading_zeros()).min(63);
        let jumps: Vec<LayoutJump> = jumps
            .iter()
            .map(|j| LayoutJump { count: if j.count == 0 { 0 } else { (j.count >> shift).max(1) }, ..*j })
            .filter(|j| j.count > 0 && j.from != j.to)
            .collect();
        let chains =
            Chains::new(blocks.iter().map(|b| (u64::from(b.size), b.count)), jumps.iter().map(|j| (j.from, j.to)));
        let (n, links) = (blocks.len(), chains.link.len());
        Self {
            blocks,
            jumps,
            chains,
            glued: vec![false; n],
            splits: vec![Vec::new(); n],
            best: vec![None; links],
            queue: BinaryHeap::new(),
        }
    }

    /// A block with one way out, to a block with one way in, is followed by it: no order is better, and it saves most of
    /// the work.
    fn join_forced_pairs(&mut self, all: &[LayoutJump]) {
        let n = self.blocks.len();
        let (mut out, mut into) = (vec![0u32; n], vec![0u32; n]);
        for j in all {
            out[j.from as usize] += 1;
            into[j.to as usize] += 1;
        }
        for j in all {
            let alone = out[j.from as usize] == 1 && into[j.to as usize] == 1;
            if !alone || j.kind != JumpKind::Unconditional || j.count == 0 || j.to == 0 {
                continue;
            }
            let (x, y) = (self.chains.of[j.from as usize], self.chains.of[j.to as usize]);
            // The second is a cycle of such pairs that closes; one of its edges has to jump.
            if x != y {
                self.glued[j.from as usize] = true;
                let order = [&self.chains.nodes[x as usize][..], &self.chains.nodes[y as usize]].concat();
                self.chains.merge(x, y, order);
            }
        }
    }

    fn run(&mut self) {
        for l in 0..self.chains.link.len() as u32 {
            if !self.chains.link[l as usize].jumps.is_empty() {
                self.consider(l);
            }
        }
        while let Some((_, _, l, stamp)) = self.queue.pop() {
            if self.chains.link[l as usize].stamp != stamp {
                continue;
            }
            let Some(merge) = self.best[l as usize] else { continue };
            let (x, y) = (&self.chains.nodes[merge.x as usize], &self.chains.nodes[merge.y as usize]);
            let (x1, x2) = x.split_at(merge.offset);
            let order = match merge.shape {
                Shape::XY | Shape::X1YX2 => [x1, y, x2].concat(),
                Shape::YX2X1 => [y, x2, x1].concat(),
                Shape::X2X1Y => [x2, x1, y].concat(),
            };
            self.chains.merge(merge.x, merge.y, order);
            self.splits[merge.x as usize] = Vec::new();
            self.splits[merge.y as usize] = Vec::new();
            for i in 0..self.chains.links[merge.x as usize].len() {
                self.consider(self.chains.links[merge.x as usize][i].1);
            }
        }
    }

    /// Finds the best merge of a link's two chains and queues it if it gains anything.
    fn consider(&mut self, l: u32) {
        let (a, b) = (self.chains.link[l as usize].a, self.chains.link[l as usize].b);
        if self.chains.nodes[a as usize].len() + self.chains.nodes[b as usize].len() > MAX_CHAIN {
            self.best[l as usize] = None;
            return;
        }
        let jumps = &self.chains.link[l as usize].jumps;
        // No merge lets the jumps between the chains earn more than this: what decides early which splits are hopeless.
        let most: i64 =
            jumps.iter().map(|&j| self.jumps[j as usize]).map(|j| earns(0, 0, j.count as i64, j.kind)).sum();
        let mut best: Option<Merge> = None;
        for (x, y) in [(a, b), (b, a)] {
            if self.chains.nodes[y as usize][0] != 0 {
                let offset = self.chains.nodes[x as usize].len();
                keep(&mut best, self.gain(l, Merge { gain: 0, shape: Shape::XY, x, y, offset }));
            }
        }
        for (x, y) in [(a, b), (b, a)] {
            self.split_merges(l, x, y, most, &mut best);
        }
        self.best[l as usize] = best;
        if let Some(merge) = best {
            let order = Reverse((a.min(b), a.max(b)));
            self.queue.push((merge.gain, order, l, self.chains.link[l as usize].stamp));
        }
    }

    fn split_merges(&mut self, l: u32, x: u32, y: u32, most: i64, best: &mut Option<Merge>) {
        let (x_entry, y_entry) = (self.chains.nodes[x as usize][0] == 0, self.chains.nodes[y as usize][0] == 0);
        let blocks = self.chains.nodes[x as usize].len();
        if !(2..=MAX_SPLIT).contains(&blocks) {
            return;
        }
        self.find_splits(x);
        for offset in 1..blocks {
            if self.glued[self.chains.nodes[x as usize][offset - 1] as usize] {
                continue;
            }
            let Split { parted, exchanged, .. } = self.splits[x as usize][offset];
            for (shape, own) in [(Shape::X1YX2, parted), (Shape::YX2X1, exchanged), (Shape::X2X1Y, exchanged)] {
                let entry_stays = match shape {
                    Shape::X1YX2 | Shape::XY => !y_entry,
                    Shape::YX2X1 => !x_entry,
                    Shape::X2X1Y => !x_entry && !y_entry,
                };
                if entry_stays && most + own > best.map_or(0, |m| m.gain) {
                    keep(best, self.gain(l, Merge { gain: 0, shape, x, y, offset }));
                }
            }
        }
    }

    /// What each split of a chain does to its own jumps.
    fn find_splits(&mut self, chain: u32) {
        if !self.splits[chain as usize].is_empty() {
            return;
        }
        let c = &self.chains;
        let blocks = c.nodes[chain as usize].len();
        let mut splits = vec![Split::default(); blocks];
        for &j in &c.own[chain as usize] {
            let jump = &self.jumps[j as usize];
            let (p, q) = (c.position[jump.from as usize], c.position[jump.to as usize]);
            let end = c.offset[jump.from as usize] + i64::from(self.blocks[jump.from as usize].size);
            let start = c.offset[jump.to as usize];
            let earns = |end, start| earns(end, start, jump.count as i64, jump.kind);
            let now = earns(end, start);
            let parted = earns(end, if p < q { start + 1 } else { start - 1 }) - now;
            for (split, offset) in splits[p.min(q) as usize + 1..=p.max(q) as usize].iter_mut().zip(p.min(q) + 1..) {
                // The first part moves behind the second, the second to the front.
                let first = c.offset[c.nodes[chain as usize][offset as usize] as usize];
                let behind = c.size[chain as usize] - first;
                let exchanged =
                    if p < q { earns(end + behind, start - first) } else { earns(end - first, start + behind) };
                split.crossing.push(j);
                split.parted += parted;
                split.exchanged += exchanged - now;
            }
        }
        self.splits[chain as usize] = splits;
    }

    /// The same merge with its gain: what the link's jumps earn then, and what X's own jumps across the split gain or lose.
    fn gain(&self, l: u32, merge: Merge) -> Merge {
        let Merge { shape, x, y, offset, .. } = merge;
        let c = &self.chains;
        let (x_size, y_size) = (c.size[x as usize], c.size[y as usize]);
        let x1_size = c.nodes[x as usize].get(offset).map_or(x_size, |&n| c.offset[n as usize]);
        // How far each piece moves from where it lies in its own chain.
        let (x1, x2, y_at) = match shape {
            Shape::XY | Shape::X1YX2 => (0, y_size, x1_size),
            Shape::YX2X1 => (y_size + x_size - x1_size, y_size - x1_size, 0),
            Shape::X2X1Y => (x_size - x1_size, -x1_size, x_size),
        };
        let place = |node: u32| {
            let n = node as usize;
            let moved = match c.of[n] {
                chain if chain == y => y_at,
                _ if (c.position[n] as usize) < offset => x1,
                _ => x2,
            };
            c.offset[n] + moved
        };
        let end = |node: u32| i64::from(self.blocks[node as usize].size);
        let mut gain = 0;
        for &j in &c.link[l as usize].jumps {
            let j = &self.jumps[j as usize];
            gain += earns(place(j.from) + end(j.from), place(j.to), j.count as i64, j.kind);
        }
        match shape {
            Shape::XY => {}
            Shape::YX2X1 | Shape::X2X1Y => gain += self.splits[x as usize][offset].exchanged,
            Shape::X1YX2 => {
                for &j in &self.splits[x as usize][offset].crossing {
                    let j = &self.jumps[j as usize];
                    let (from, to) = (c.offset[j.from as usize], c.offset[j.to as usize]);
                    gain += earns(place(j.from) + end(j.from), place(j.to), j.count as i64, j.kind);
                    gain -= earns(from + end(j.from), to, j.count as i64, j.kind);
                }
            }
        }
        Merge { gain, ..merge }
    }

    fn finish(self) -> Vec<u32> {
        let chains = self.chains.by_density(|nodes| nodes[0] == 0);
        chains.into_iter().flat_map(|c| self.chains.nodes[c as usize].clone()).collect()
    }
}

#[cfg(test)]
mod tests;
