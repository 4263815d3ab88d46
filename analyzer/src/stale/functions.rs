//! Which function of the new build is which of the old one.
//!
//! 1. By hash: the same code. Of several with the same code, by name, else whichever lies nearest to where it should.
//! 2. By name, where the file has names.
//! 3. By the call graph: a function that one found already calls now, and that nobody has been found to be, is the one that
//!    it called before if the two are alike enough, inside and in what they call.
//! 4. By place: compilers and linkers keep the order of sources. What lies between two neighbours that were found is what
//!    lay between them before, if it is alike enough.
//!
//! The last two go in rounds, best matches first, as each match says something of others. Everything depends on the
//! profile and the new file alone.

use super::Rule;
use super::blocks::likeness;
use super::shape::{Callee, Shaped, identity, name_at, shape};
use crate::functions::{Function, function_hash};
use crate::plan::Module;
use dyni_schema::{FunctionHash, FunctionShape, LinkAddr, ModuleProfile};
use rayon::prelude::*;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// A function that a known one calls is taken if it is at least so much alike, in parts per thousand.
const ALIKE_IF_CALLED: u32 = 350;
/// The same for one that only lies in the right place.
const ALIKE_IF_BETWEEN: u32 = 450;
/// Between two neighbours at most so many functions are looked at.
const MAX_BETWEEN: usize = 48;
/// The most rounds of the last two rules.
const MAX_ROUNDS: usize = 12;
/// At most so many functions, the hottest, are looked for by the last two rules: a profile may come from anybody.
const MAX_MISSING: usize = 4096;
/// Of a function at most so many callers are looked into.
const MAX_CALLERS: usize = 64;
/// The same for what they call.
const MAX_CALLED: usize = 512;
/// How far a neighbour may be that was found, in functions of the profile.
const REACH: usize = 1 << 12;
/// How much more alike the best candidate has to be than one that is nearer to where it should be, in parts per thousand.
const CLEARLY: u32 = 30;

/// For each function of the profile's index the index into the new build's functions, and by which rule.
pub(crate) fn pair(
    seen: &ModuleProfile,
    shapes: &[FunctionShape],
    weights: &[u64],
    module: &Module<'_>,
) -> Vec<Option<(usize, Rule)>> {
    let mut search = Search::new(seen, shapes, weights, module);
    search.by_hash();
    search.by_name();
    search.by_neighbours();
    search.found
}

struct Search<'a> {
    seen: &'a ModuleProfile,
    shapes: &'a [FunctionShape],
    weights: &'a [u64],
    module: &'a Module<'a>,
    found: Vec<Option<(usize, Rule)>>,
    taken: BTreeSet<usize>,
    /// What was found out about functions of the new build.
    shaped: BTreeMap<usize, Option<Known>>,
    hashes: BTreeMap<usize, u16>,
}

/// What is known of a function of the new build.
struct Known {
    shaped: Shaped,
    /// Indices of the functions of the module that it calls.
    calls: BTreeSet<usize>,
    /// Hashes of all that it calls, sorted.
    callees: Vec<u16>,
}

impl<'a> Search<'a> {
    fn new(seen: &'a ModuleProfile, shapes: &'a [FunctionShape], weights: &'a [u64], module: &'a Module<'a>) -> Self {
        let found = vec![None; seen.functions.start.len()];
        let (taken, shaped, hashes) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        Self { seen, shapes, weights, module, found, taken, shaped, hashes }
    }

    fn set(&mut self, old: usize, new: usize, rule: Rule) {
        debug_assert!(self.found[old].is_none());
        self.found[old] = Some((new, rule));
        self.taken.insert(new);
    }

    fn all(&self) -> &'a [Function] {
        self.module.functions.all()
    }

    fn name(&self, old: usize) -> u64 {
        self.shapes.get(old).map_or(0, |s| s.name)
    }

    /// Where a function should be now, by how far the nearest one below it has moved that was found, or else the nearest
    /// above.
    fn expected(&self, old: usize) -> LinkAddr {
        let start = self.seen.functions.start[old];
        let shift = |i: usize| {
            let (new, _) = self.found[i]?;
            Some(self.all()[new].start.0.wrapping_sub(self.seen.functions.start[i]))
        };
        let shift = self.below(old).find_map(shift).or_else(|| self.above(old).find_map(shift));
        LinkAddr(start.wrapping_add(shift.unwrap_or(0)))
    }

    /// The functions of the profile below one, the nearest first.
    fn below(&self, old: usize) -> impl Iterator<Item = usize> + use<> {
        (0..old).rev().take(REACH)
    }

    /// Those above it, the nearest first.
    fn above(&self, old: usize) -> impl Iterator<Item = usize> + use<> {
        (old + 1..self.found.len()).take(REACH)
    }

    /// Of these the one that is free and the nearest to where it should be.
    fn nearest(&self, old: usize, candidates: &[usize]) -> Option<usize> {
        let expected = self.expected(old);
        let free = candidates.iter().copied().filter(|c| !self.taken.contains(c));
        free.min_by_key(|&c| (self.all()[c].start.distance(expected).unsigned_abs(), c))
    }

    fn by_hash(&mut self) {
        let index = &self.seen.functions;
        let sizes: BTreeSet<u32> = index.size.iter().copied().collect();
        let all = self.all();
        let hashed: Vec<(FunctionHash, usize)> = (0..all.len())
            .into_par_iter()
            .filter(|&i| sizes.contains(&all[i].size))
            .map(|i| (function_hash(self.module.image, &all[i]), i))
            .collect();
        // The size is a part of what is hashed; a profile that lies about it must not lead out of a function.
        let mut there: BTreeMap<(FunctionHash, u32), Vec<usize>> = BTreeMap::new();
        hashed.into_iter().for_each(|(hash, i)| there.entry((hash, all[i].size)).or_default().push(i));
        let mut here: BTreeMap<(FunctionHash, u32), u32> = BTreeMap::new();
        let keys = || index.hash.iter().copied().zip(index.size.iter().copied());
        keys().for_each(|k| *here.entry(k).or_default() += 1);
        let mut several = Vec::new();
        for (old, key) in keys().enumerate() {
            let Some(candidates) = there.get(&key) else { continue };
            if candidates.len() == 1 && here[&key] == 1 {
                self.set(old, candidates[0], Rule::Hash);
            } else {
                several.push((old, candidates));
            }
        }
        let (named, rest): (Vec<_>, Vec<_>) = several.into_iter().partition(|&(old, candidates)| {
            let name = self.name(old);
            name != 0 && candidates.iter().any(|&c| name_at(self.module.image, all[c].start) == name)
        });
        for (old, candidates) in named {
            let name = self.name(old);
            let same: Vec<usize> =
                candidates.iter().copied().filter(|&c| name_at(self.module.image, all[c].start) == name).collect();
            if let Some(new) = self.nearest(old, &same) {
                self.set(old, new, Rule::Hash);
            }
        }
        for (old, candidates) in rest {
            if let Some(new) = self.nearest(old, candidates) {
                self.set(old, new, Rule::Hash);
            }
        }
    }

    fn by_name(&mut self) {
        let missing: BTreeSet<u64> = (0..self.found.len())
            .filter(|&i| self.found[i].is_none())
            .map(|i| self.name(i))
            .filter(|&n| n != 0)
            .collect();
        if missing.is_empty() {
            return;
        }
        let mut there: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (i, function) in self.all().iter().enumerate().filter(|(i, _)| !self.taken.contains(i)) {
            let name = name_at(self.module.image, function.start);
            if missing.contains(&name) {
                there.entry(name).or_default().push(i);
            }
        }
        for old in 0..self.found.len() {
            let Some(candidates) = there.get(&self.name(old)).filter(|_| self.found[old].is_none()) else { continue };
            if let Some(new) = self.nearest(old, candidates) {
                self.set(old, new, Rule::Name);
            }
        }
    }

    /// Finds out about a function of the new build, once.
    fn learn(&mut self, new: usize) {
        if self.shaped.contains_key(&new) {
            return;
        }
        let module = self.module;
        let known = shape(module, &self.all()[new]).map(|shaped| {
            let own = |c: &Callee| if let Callee::Own(at) = c { module.functions.index_at(*at) } else { None };
            let calls: BTreeSet<usize> = shaped.callees.iter().filter_map(own).collect();
            for &callee in &calls {
                let hash = || identity(function_hash(module.image, &module.functions.all()[callee]));
                self.hashes.entry(callee).or_insert_with(hash);
            }
            let hash = |c: &Callee| match c {
                Callee::Named(hash) => Some(*hash),
                Callee::Own(_) => own(c).and_then(|i| self.hashes.get(&i).copied()),
            };
            let mut callees: Vec<u16> = shaped.callees.iter().filter_map(hash).collect();
            callees.sort_unstable();
            Known { shaped, calls, callees }
        });
        self.shaped.insert(new, known);
    }

    fn by_neighbours(&mut self) {
        for _ in 0..MAX_ROUNDS {
            let mut proposals = self.proposals();
            proposals.sort_unstable();
            let before = self.taken.len();
            for (_, old, new, rule) in proposals {
                if self.found[old].is_none() && !self.taken.contains(&new) {
                    self.set(old, new, rule);
                }
            }
            if self.taken.len() == before {
                return;
            }
        }
    }

    /// For each function that is still missing the best that there is; the most alike sorts first.
    fn proposals(&mut self) -> Vec<(Reverse<u32>, usize, usize, Rule)> {
        let mut missing: Vec<usize> = (0..self.found.len())
            .filter(|&i| self.found[i].is_none() && self.weights[i] > 0)
            .filter(|&i| self.shapes.get(i).is_some_and(|s| !s.blocks.is_empty()))
            .collect();
        missing.sort_by_key(|&i| (Reverse(self.weights[i]), i));
        missing.truncate(MAX_MISSING);
        let callers = self.callers();
        let renamed = self.renamed();
        let mut proposals = Vec::new();
        for old in missing {
            let between: Vec<usize> = self.between(old);
            let called = self.called_by_known_callers(old, &callers);
            let candidates: BTreeSet<usize> =
                between.iter().chain(&called).copied().filter(|c| !self.taken.contains(c)).collect();
            candidates.iter().for_each(|&c| self.learn(c));
            let expected = self.expected(old);
            let mut best: Option<(u32, u64, usize, Rule)> = None;
            for &new in &candidates {
                let rule = if called.contains(&new) { Rule::Calls } else { Rule::Place };
                let least = if rule == Rule::Calls { ALIKE_IF_CALLED } else { ALIKE_IF_BETWEEN };
                let alike = self.alike(old, new, &renamed);
                let far = self.all()[new].start.distance(expected).unsigned_abs();
                let better = best.is_none_or(|(most, near, ..)| {
                    alike > most.saturating_add(CLEARLY) || (alike.saturating_add(CLEARLY) >= most && far < near)
                });
                if alike >= least && better {
                    best = Some((alike, far, new, rule));
                }
            }
            proposals.extend(best.map(|(alike, _, new, rule)| (Reverse(alike), old, new, rule)));
        }
        proposals
    }

    /// What stands now for functions that were found and whose code has changed.
    fn renamed(&mut self) -> BTreeMap<u16, u16> {
        let mut renamed = BTreeMap::new();
        for (old, found) in self.found.iter().enumerate() {
            let Some((new, rule)) = *found else { continue };
            if rule != Rule::Hash {
                let hash = || identity(function_hash(self.module.image, &self.module.functions.all()[new]));
                let now = *self.hashes.entry(new).or_insert_with(hash);
                renamed.insert(identity(self.seen.functions.hash[old]), now);
            }
        }
        renamed
    }

    /// For what stands for a function the functions of the new build whose old selves called it.
    fn callers(&self) -> BTreeMap<u16, Vec<usize>> {
        let mut callers: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
        for (shape, found) in self.shapes.iter().zip(&self.found) {
            let Some((new, _)) = *found else { continue };
            for &callee in &shape.callees {
                let of = callers.entry(callee).or_default();
                if of.last() != Some(&new) && of.len() < MAX_CALLERS {
                    of.push(new);
                }
            }
        }
        callers
    }

    /// What the functions call now that called this one before.
    fn called_by_known_callers(&mut self, old: usize, callers: &BTreeMap<u16, Vec<usize>>) -> BTreeSet<usize> {
        let me = identity(self.seen.functions.hash[old]);
        let mut called = BTreeSet::new();
        for &caller in callers.get(&me).into_iter().flatten() {
            self.learn(caller);
            let calls = self.shaped.get(&caller).into_iter().flatten().flat_map(|k| k.calls.iter().copied());
            called.extend(calls.take(MAX_CALLED.saturating_sub(called.len())));
        }
        called
    }

    /// What lies now between the nearest neighbours that were found; nothing if that is too much.
    fn between(&self, old: usize) -> Vec<usize> {
        let below = self.below(old).find_map(|i| self.found[i]).map_or(0, |f| f.0 + 1);
        let above = self.above(old).find_map(|i| self.found[i]).map_or(self.all().len(), |f| f.0);
        let free: Vec<usize> = (below..above.max(below)).filter(|i| !self.taken.contains(i)).collect();
        if free.len() <= MAX_BETWEEN {
            return free;
        }
        let expected = self.expected(old);
        let at = free.partition_point(|&i| self.all()[i].start < expected);
        let from = at.saturating_sub(MAX_BETWEEN / 2);
        free[from..free.len().min(from + MAX_BETWEEN)].to_vec()
    }

    /// How much alike two functions are, in parts per thousand: three parts their blocks, one what they call.
    fn alike(&self, old: usize, new: usize, renamed: &BTreeMap<u16, u16>) -> u32 {
        let Some(Some(known)) = self.shaped.get(&new) else { return 0 };
        let shape = &self.shapes[old];
        let inside = likeness(&shape.blocks, &known.shaped.blocks);
        let mut callees: Vec<u16> = shape.callees.iter().map(|c| *renamed.get(c).unwrap_or(c)).collect();
        callees.sort_unstable();
        let all = callees.len() + known.callees.len();
        if all == 0 {
            return inside;
        }
        let calls = 2000 * common(&callees, &known.callees) / all;
        (inside * 3 + calls as u32) / 4
    }
}

/// How many two sorted lists have in common.
fn common(a: &[u16], b: &[u16]) -> usize {
    let (mut i, mut j, mut both) = (0, 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        both += usize::from(x == y);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    both
}
