//! Which block of a function of the new build is which of the old one.
//!
//! First the two sequences of blocks are aligned by their hashes, as two texts are by their lines (Needleman and Wunsch
//! 1970): what an edit leaves alone it mostly leaves in order. Then blocks that have moved, if there is but one like them;
//! then, from what is matched, along the edges: an edited block between two that are not is known by its neighbours. BOLT
//! takes for each block the nearest by hash instead, several for one if need be; here a block is matched once at most, so
//! that no count is carried over twice.

use dyni_schema::BlockShape;
use std::collections::BTreeMap;

/// How a block was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Found {
    /// By its hash.
    Hash,
    /// By what leads to it, or where it leads.
    Flow,
}

/// The most pairs of blocks that are compared; functions whose differing parts are larger are matched at both ends only,
/// and by what is unique in them.
const MAX_PAIRS: usize = 1 << 22;
/// A block has moved only if it is at least so long, in bytes: shorter ones are like others by chance.
const MOVED_LENGTH: u16 = 10;

/// What two blocks that have the same hash have in common, in points; more if the rest agrees, too.
fn alike(a: &BlockShape, b: &BlockShape) -> Option<u32> {
    let same = |agree: bool, points| if agree { points } else { 0 };
    (a.hash == b.hash).then(|| {
        4 + same(a.length == b.length, 4)
            + same(a.ends == b.ends, 2)
            + same(a.successors.len() == b.successors.len(), 1)
    })
}

/// For each block of the old function its own in the new one, if there is any.
pub(crate) fn pair(old: &[BlockShape], new: &[BlockShape]) -> Vec<Option<(u32, Found)>> {
    let mut pairs = Pairs::new(old, new);
    pairs.align();
    pairs.find_moved();
    pairs.follow_edges();
    pairs.fill_gaps();
    pairs.follow_edges();
    pairs.to
}

/// How much of two functions is alike, in parts per thousand: blocks with the same hash, wherever they lie.
pub(crate) fn likeness(old: &[BlockShape], new: &[BlockShape]) -> u32 {
    let mut there: BTreeMap<u8, i64> = BTreeMap::new();
    new.iter().for_each(|b| *there.entry(b.hash).or_default() += 1);
    let taken = |b: &&BlockShape| {
        let left = there.entry(b.hash).or_default();
        *left -= 1;
        *left >= 0
    };
    let common = old.iter().filter(taken).count();
    (2000 * common as u64 / (old.len() + new.len()).max(1) as u64) as u32
}

struct Pairs<'a> {
    old: &'a [BlockShape],
    new: &'a [BlockShape],
    to: Vec<Option<(u32, Found)>>,
    from: Vec<Option<u32>>,
}

impl<'a> Pairs<'a> {
    fn new(old: &'a [BlockShape], new: &'a [BlockShape]) -> Self {
        let mut pairs = Self { old, new, to: vec![None; old.len()], from: vec![None; new.len()] };
        // Functions begin where they begin, whatever is in their first block.
        if !old.is_empty() && !new.is_empty() {
            let found = if alike(&old[0], &new[0]).is_some() { Found::Hash } else { Found::Flow };
            pairs.set(0, 0, found);
        }
        pairs
    }

    fn set(&mut self, old: usize, new: usize, found: Found) {
        debug_assert!(self.to[old].is_none() && self.from[new].is_none());
        self.to[old] = Some((new as u32, found));
        self.from[new] = Some(old as u32);
    }

    fn is_free(&self, old: usize, new: usize) -> bool {
        self.to[old].is_none() && self.from[new].is_none()
    }

    fn align(&mut self) {
        let (old, new) = (self.old, self.new);
        let same = |(a, b): &(&BlockShape, &BlockShape)| a == b;
        let most = old.len().min(new.len());
        let front = old.iter().zip(new).take_while(same).count();
        let back = old.iter().rev().zip(new.iter().rev()).take_while(same).count().min(most - front);
        let middle = (front..old.len() - back, front..new.len() - back);
        for i in (0..front).chain(old.len() - back..old.len()) {
            let j = if i < front { i } else { i + new.len() - old.len() };
            if self.is_free(i, j) {
                self.set(i, j, Found::Hash);
            }
        }
        if middle.0.len().saturating_mul(middle.1.len()) > MAX_PAIRS {
            return;
        }
        for (i, j) in aligned(&old[middle.0.clone()], &new[middle.1.clone()]) {
            let (i, j) = (i + middle.0.start, j + middle.1.start);
            if self.is_free(i, j) {
                self.set(i, j, Found::Hash);
            }
        }
    }

    /// Blocks of which there is but one, in other places.
    fn find_moved(&mut self) {
        fn singles(blocks: &[BlockShape], free: impl Fn(usize) -> bool) -> BTreeMap<&BlockShape, Option<usize>> {
            let mut seen = BTreeMap::new();
            for (i, b) in blocks.iter().enumerate().filter(|(i, b)| b.length >= MOVED_LENGTH && free(*i)) {
                seen.entry(b).and_modify(|at| *at = None).or_insert(Some(i));
            }
            seen
        }
        // Where a block leads, in blocks, changes when it moves.
        let still = |blocks: &[BlockShape]| -> Vec<BlockShape> {
            blocks.iter().map(|b| BlockShape { skipped: 0, ends: 0, successors: Vec::new(), ..b.clone() }).collect()
        };
        let (old, new) = (still(self.old), still(self.new));
        let here = singles(&old, |i| self.to[i].is_none());
        let there = singles(&new, |j| self.from[j].is_none());
        let both = here.iter().filter_map(|(shape, i)| Some(((*i)?, (*there.get(shape)?)?)));
        let both: Vec<(usize, usize)> = both.collect();
        both.into_iter().for_each(|(i, j)| self.set(i, j, Found::Hash));
    }

    /// From each matched block to what it leads to, and to what leads to it, until nothing more is found.
    fn follow_edges(&mut self) {
        let (ahead, ahead_new) = (edges(self.old), edges(self.new));
        let (behind, behind_new) = (reversed(&ahead), reversed(&ahead_new));
        let mut work: Vec<usize> = (0..self.old.len()).filter(|&i| self.to[i].is_some()).rev().collect();
        while let Some(i) = work.pop() {
            let Some((j, _)) = self.to[i] else { continue };
            for (mine, theirs) in [(&ahead[i], &ahead_new[j as usize]), (&behind[i], &behind_new[j as usize])] {
                self.along(mine, theirs, &mut work);
            }
        }
    }

    /// Pairs what is left of two matched blocks' neighbours on one side, if there are as many of them.
    fn along(&mut self, mine: &[u32], theirs: &[u32], work: &mut Vec<usize>) {
        let left: Vec<usize> = mine.iter().map(|&i| i as usize).filter(|&i| self.to[i].is_none()).collect();
        let left_new: Vec<usize> = theirs.iter().map(|&j| j as usize).filter(|&j| self.from[j].is_none()).collect();
        if mine.len() != theirs.len() || left.len() != left_new.len() {
            return;
        }
        for (i, j) in left.into_iter().zip(left_new) {
            // The same block twice, by two edges.
            if self.is_free(i, j) && self.alike_in_place(i, j) {
                self.set(i, j, Found::Flow);
                work.push(i);
            }
        }
    }

    /// Whether two blocks in the same place end alike.
    fn alike_in_place(&self, i: usize, j: usize) -> bool {
        let kind = |b: &BlockShape| b.ends & !(BlockShape::RUNS_ON | BlockShape::ENTERED | BlockShape::LEFT);
        kind(&self.old[i]) == kind(&self.new[j])
    }

    /// Between two pairs that are neighbours in the order, as many blocks on one side as on the other.
    fn fill_gaps(&mut self) {
        let pairs: Vec<(usize, usize)> =
            self.to.iter().enumerate().filter_map(|(i, p)| p.map(|(j, _)| (i, j as usize))).collect();
        let ends = std::iter::once((self.old.len(), self.new.len()));
        for (&(i, j), (i2, j2)) in pairs.iter().zip(pairs.iter().copied().skip(1).chain(ends)) {
            if j2 <= j || i2 - i != j2 - j {
                continue;
            }
            for (a, b) in (i + 1..i2).zip(j + 1..j2) {
                if self.is_free(a, b) && self.alike_in_place(a, b) {
                    self.set(a, b, Found::Flow);
                }
            }
        }
    }
}

fn edges(blocks: &[BlockShape]) -> Vec<Vec<u32>> {
    let inside = |&to: &u32| (to as usize) < blocks.len();
    blocks.iter().enumerate().map(|(i, b)| b.leads_to(i as u32).filter(inside).collect()).collect()
}

fn reversed(ahead: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut behind = vec![Vec::new(); ahead.len()];
    for (from, to) in ahead.iter().enumerate().flat_map(|(i, to)| to.iter().map(move |&t| (i as u32, t as usize))) {
        behind[to].push(from);
    }
    behind
}

/// The alignment of two sequences of blocks with the most points, as pairs of indices.
fn aligned(old: &[BlockShape], new: &[BlockShape]) -> Vec<(usize, usize)> {
    let width = new.len() + 1;
    // best[i][j]: the points of old[i..] and new[j..].
    let mut best = vec![0u32; (old.len() + 1) * width];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            let skip = best[(i + 1) * width + j].max(best[i * width + j + 1]);
            let both = alike(&old[i], &new[j]).map_or(0, |points| points + best[(i + 1) * width + j + 1]);
            best[i * width + j] = skip.max(both);
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut pairs = Vec::new();
    while i < old.len() && j < new.len() {
        let here = best[i * width + j];
        if alike(&old[i], &new[j]).is_some_and(|points| points + best[(i + 1) * width + j + 1] == here) {
            pairs.push((i, j));
            (i, j) = (i + 1, j + 1);
        } else if best[(i + 1) * width + j] == here {
            i += 1;
        } else {
            j += 1;
        }
    }
    pairs
}

#[cfg(test)]
mod tests;
