//! What two plans decide otherwise for one module: pure, from the plans alone.

use std::collections::{BTreeMap, BTreeSet};

use dyni_schema::{FunctionPlan, LinkAddr, ModulePlan};

/// A function that both plans have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Both {
    /// Its index in the first plan.
    pub a: usize,
    /// Its index in the second.
    pub b: usize,
    /// Its code differs between the builds.
    pub edited: bool,
    /// Blocks that were cold, or not copied, and are hot now; known if the code is the same.
    pub newly_hot: usize,
    /// Blocks that were hot and no longer are.
    pub newly_cold: usize,
    /// The blocks that are hot in both lie in another order.
    pub reordered: bool,
    /// Call sites that are compared with a callee in the second plan only, or with another one, as offsets.
    pub promoted: Vec<u32>,
    /// Call sites that are in the first plan only.
    pub demoted: Vec<u32>,
}

impl Both {
    /// Whether anything is decided otherwise.
    pub fn differs(&self) -> bool {
        self.edited
            || self.newly_hot + self.newly_cold > 0
            || self.reordered
            || !self.promoted.is_empty()
            || !self.demoted.is_empty()
    }
}

/// How two plans for a module differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Functions of both, in the order of the first.
    pub both: Vec<Both>,
    /// Indices into the first plan of what only that has, in its order.
    pub only_a: Vec<usize>,
    /// The same of the second.
    pub only_b: Vec<usize>,
    /// Functions of both that lie elsewhere among the others: the fewest that have to be moved to make the one order the
    /// other.
    pub moved: usize,
}

/// Compares two plans of a module. `now` says where in the second build a function of the first is, as far as anybody knows;
/// what is not there is known by its hash.
pub fn compare(a: &ModulePlan, b: &ModulePlan, now: &BTreeMap<LinkAddr, LinkAddr>) -> Difference {
    let same_build = a.build_id == b.build_id;
    let by_start: BTreeMap<u64, usize> = b.functions.iter().enumerate().map(|(i, f)| (f.start, i)).collect();
    let mut by_hash = BTreeMap::new();
    for (i, f) in b.functions.iter().enumerate() {
        by_hash.entry(f.hash).and_modify(|at| *at = None).or_insert(Some(i));
    }
    let pair = |f: &FunctionPlan| {
        if same_build {
            return by_start.get(&f.start).copied();
        }
        now.get(&f.start()).map_or_else(|| by_hash.get(&f.hash).copied().flatten(), |at| by_start.get(&at.0).copied())
    };
    let mut difference = Difference::default();
    let mut taken = BTreeSet::new();
    for (i, f) in a.functions.iter().enumerate() {
        match pair(f).filter(|j| taken.insert(*j)) {
            Some(j) => difference.both.push(both((i, f), (j, &b.functions[j]))),
            None => difference.only_a.push(i),
        }
    }
    difference.only_b = (0..b.functions.len()).filter(|j| !taken.contains(j)).collect();
    let order: Vec<usize> = difference.both.iter().map(|p| p.b).collect();
    difference.moved = order.len() - longest_rising(&order);
    difference
}

fn both((i, a): (usize, &FunctionPlan), (j, b): (usize, &FunctionPlan)) -> Both {
    let edited = a.hash != b.hash;
    let hot = |f: &FunctionPlan| f.blocks[..f.hot as usize].to_vec();
    let (hot_a, hot_b) = (hot(a), hot(b));
    let (set_a, set_b): (BTreeSet<u32>, BTreeSet<u32>) =
        (hot_a.iter().copied().collect(), hot_b.iter().copied().collect());
    let kept = |blocks: &[u32], other: &BTreeSet<u32>| -> Vec<u32> {
        blocks.iter().copied().filter(|b| other.contains(b)).collect()
    };
    let calls = |f: &FunctionPlan| -> BTreeMap<u32, u64> { f.calls.iter().map(|c| (c.at, c.callee)).collect() };
    let (calls_a, calls_b) = (calls(a), calls(b));
    // In another build callees and offsets are others anyway.
    let promoted = calls_b.iter().filter(|c| !edited && (calls_a.get(c.0) != Some(c.1))).map(|c| *c.0);
    let demoted = calls_a.keys().filter(|at| !edited && !calls_b.contains_key(at)).copied();
    let moved_module = a.start != b.start;
    Both {
        a: i,
        b: j,
        edited,
        newly_hot: if edited { 0 } else { set_b.difference(&set_a).count() },
        newly_cold: if edited { 0 } else { set_a.difference(&set_b).count() },
        reordered: !edited && kept(&hot_a, &set_b) != kept(&hot_b, &set_a),
        promoted: promoted.filter(|at| !moved_module || !calls_a.contains_key(at)).collect(),
        demoted: demoted.collect(),
    }
}

/// The length of the longest part of a list, in its order, that rises. All are different.
fn longest_rising(list: &[usize]) -> usize {
    let mut ends: Vec<usize> = Vec::new();
    for &n in list {
        let at = ends.partition_point(|&e| e < n);
        match ends.get_mut(at) {
            Some(end) => *end = n,
            None => ends.push(n),
        }
    }
    ends.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_schema::{BuildId, CallSite, FunctionHash};

    fn function(start: u64, hash: u8, blocks: &[u32], hot: u32) -> FunctionPlan {
        FunctionPlan {
            start,
            size: 0x100,
            hash: FunctionHash([hash; 16]),
            blocks: blocks.to_vec(),
            hot,
            entries: vec![],
            probes: vec![],
            calls: vec![],
            weight: 10,
        }
    }

    fn plan(build: u8, functions: Vec<FunctionPlan>) -> ModulePlan {
        ModulePlan { build_id: BuildId(vec![build]), name: "app".into(), functions }
    }

    #[test]
    fn a_plan_does_not_differ_from_itself() {
        let p = plan(1, vec![function(0x100, 1, &[0, 8, 4], 2), function(0x900, 1, &[0], 1)]);
        let d = compare(&p, &p, &BTreeMap::new());
        assert!(d.both.iter().all(|b| !b.differs()) && d.both.len() == 2);
        assert_eq!((d.only_a.len(), d.only_b.len(), d.moved), (0, 0, 0));
    }

    #[test]
    fn what_is_decided_otherwise_is_seen() {
        let a = plan(1, vec![function(0x100, 1, &[0, 8, 4, 12], 3), function(0x300, 2, &[0], 1)]);
        let mut changed = function(0x100, 1, &[0, 4, 8, 12], 4);
        changed.calls = vec![CallSite { at: 9, callee: 0x300 }];
        let b = plan(1, vec![function(0x500, 3, &[0], 1), changed]);
        let d = compare(&a, &b, &BTreeMap::new());
        assert_eq!((d.only_a, d.only_b), (vec![1], vec![0]));
        let both = &d.both[0];
        assert!(both.reordered && !both.edited);
        assert_eq!((both.newly_hot, both.newly_cold), (1, 0));
        assert_eq!((both.promoted.as_slice(), both.demoted.as_slice()), (&[9][..], &[][..]));
        let back = compare(&b, &a, &BTreeMap::new());
        assert_eq!((back.both[0].newly_hot, back.both[0].newly_cold), (0, 1));
        assert_eq!(back.both[0].demoted, [9]);
    }

    #[test]
    fn functions_of_another_build_are_known_by_hash_or_by_what_is_known_of_them() {
        let a = plan(1, vec![function(0x100, 1, &[0], 1), function(0x300, 2, &[0], 1), function(0x500, 9, &[0], 1)]);
        let b = plan(2, vec![function(0x140, 1, &[0], 1), function(0x340, 5, &[0], 1)]);
        let d = compare(&a, &b, &BTreeMap::from([(LinkAddr(0x300), LinkAddr(0x340))]));
        assert_eq!(d.both.iter().map(|p| (p.a, p.b, p.edited)).collect::<Vec<_>>(), [(0, 0, false), (1, 1, true)]);
        assert_eq!((d.only_a, d.only_b), (vec![2], vec![]));
    }

    #[test]
    fn only_what_has_to_move_has_moved() {
        assert_eq!(longest_rising(&[3, 0, 1, 2]), 3);
        assert_eq!(longest_rising(&[]), 0);
        let (f, g, h) = (function(0, 1, &[0], 1), function(0x200, 2, &[0], 1), function(0x400, 3, &[0], 1));
        let d = compare(&plan(1, vec![f.clone(), g.clone(), h.clone()]), &plan(1, vec![h, f, g]), &BTreeMap::new());
        assert_eq!(d.moved, 1);
    }
}
