//! Moving what was seen from the addresses of the old build to those of the new one.
//!
//! In a function whose code is what it was everything keeps its distance from the start. In one that was edited it goes by
//! blocks: samples stay in their block; a taken branch stays the branch at its block's end; a straight stretch is cut where
//! the blocks that it runs through no longer follow on each other. Counted blocks are only as many as it takes to tell the
//! others, which an edit may break: so first all counts of the old function are told, by the shape that the profile has of
//! it, and then each block takes its own along.

use super::Rule;
use super::blocks::{self, Found};
use super::shape::shape;
use crate::calls;
use crate::functions::Function;
use crate::infer::{FlowEdge, FlowGraph, FlowNode, MAX_STRENGTH, infer};
use crate::plan::Module;
use dyni_schema::{BlockShape, Branches, FunctionShape, Method, ModuleProfile, Ranges, Samples, Shapes};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// How much was seen in each function of a module's index, in the unit that plans weigh functions in.
pub(crate) fn weights(seen: &ModuleProfile, method: Method) -> Vec<u64> {
    let mut weights = vec![0u64; seen.functions.start.len()];
    let mut add = |at: u64, weight: u64| {
        if let Some(f) = holding(seen, at) {
            weights[f] = weights[f].saturating_add(weight);
        }
    };
    if method == Method::Count {
        rows(&seen.ranges).for_each(|(start, end, count)| add(start, count.saturating_mul(length(start, end))));
        let all: u128 = weights.iter().map(|&w| u128::from(w)).sum();
        let samples = u128::from(seen.samples.total().max(1));
        let mut sampled = vec![0u64; weights.len()];
        for (at, count) in seen.samples.iter() {
            if let Some(f) = holding(seen, at.0).filter(|&f| weights[f] == 0) {
                sampled[f] = sampled[f].saturating_add(count);
            }
        }
        for (weight, count) in weights.iter_mut().zip(sampled).filter(|(w, _)| **w == 0) {
            *weight = u64::try_from(u128::from(count) * all / samples).unwrap_or(u64::MAX).max(count);
        }
    } else if seen.samples.addr.is_empty() {
        seen.branches.from.iter().zip(&seen.branches.count).for_each(|(&at, &count)| add(at, count));
    } else {
        seen.samples.iter().for_each(|(at, count)| add(at.0, count));
    }
    weights
}

fn rows(ranges: &Ranges) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
    ranges.start.iter().zip(&ranges.end).zip(&ranges.count).map(|((&start, &end), &count)| (start, end, count))
}

const fn length(start: u64, end: u64) -> u64 {
    (end - start).saturating_add(1)
}

/// The function of the index that holds an address.
fn holding(seen: &ModuleProfile, at: u64) -> Option<usize> {
    let f = &seen.functions;
    let i = f.start.partition_point(|&s| s <= at).checked_sub(1)?;
    (at - f.start[i] < u64::from(f.size[i])).then_some(i)
}

/// A block of the old function and its own in the new one. Addresses are link addresses of the builds.
#[derive(Clone, Copy, Debug)]
struct BlockMove {
    was: u64,
    length: u64,
    now: Option<NewBlock>,
}

#[derive(Clone, Copy, Debug)]
struct NewBlock {
    index: u32,
    start: u64,
    last: u64,
    end: u64,
    found: Found,
}

/// Where a function's parts are now.
enum Parts {
    /// All at the distance from its start that they had.
    Same,
    /// Block by block, and where the new one has calls through pointers, with the blocks that they are in.
    Blocks { blocks: Vec<BlockMove>, sites: Vec<(u32, u64)> },
}

struct FunctionMove {
    was: u64,
    now: Function,
    parts: Parts,
}

impl FunctionMove {
    fn new(was: u64, now: Function, rule: Rule, old: &FunctionShape, module: &Module<'_>) -> Self {
        if rule == Rule::Hash {
            return Self { was, now, parts: Parts::Same };
        }
        let Some(shaped) = shape(module, &now) else {
            return Self { was, now, parts: Parts::Blocks { blocks: Vec::new(), sites: Vec::new() } };
        };
        let pairs = blocks::pair(&old.blocks, &shaped.blocks);
        let mut at = was;
        let moved = old.blocks.iter().zip(pairs).map(|(b, found)| {
            let start = at + u64::from(b.skipped);
            at = start + u64::from(b.length);
            let now = found.map(|(index, found)| {
                let new = &shaped.cfg.blocks[index as usize];
                NewBlock { index, start: new.start.0, last: new.last.0, end: new.end.0, found }
            });
            BlockMove { was: start, length: u64::from(b.length), now }
        });
        let code = module.image.bytes(now.start, now.size as usize).unwrap_or(&[]);
        let sites = calls::sites(&shaped.cfg, code).into_iter().map(|s| (s.block as u32, s.at.0)).collect();
        Self { was, now, parts: Parts::Blocks { blocks: moved.collect(), sites } }
    }

    fn shifted(&self, at: u64) -> u64 {
        self.now.start.0.wrapping_add(at.wrapping_sub(self.was))
    }

    /// The index of the old block that holds an address of the old function.
    fn block(blocks: &[BlockMove], at: u64) -> Option<usize> {
        let i = blocks.partition_point(|b| b.was <= at).checked_sub(1)?;
        (at - blocks[i].was < blocks[i].length).then_some(i)
    }

    /// Where a sample belongs.
    fn place(&self, at: u64) -> Option<u64> {
        match &self.parts {
            Parts::Same => Some(self.shifted(at)),
            Parts::Blocks { blocks, .. } => {
                let block = blocks[Self::block(blocks, at)?];
                let now = block.now?;
                Some((now.start + (at - block.was)).min(now.end - 1))
            }
        }
    }

    /// Where a branch to an address goes now: to the start of the function or of a block.
    fn target(&self, at: u64) -> Option<u64> {
        match &self.parts {
            Parts::Same => Some(self.shifted(at)),
            Parts::Blocks { .. } if at == self.was => Some(self.now.start.0),
            Parts::Blocks { blocks, .. } => {
                let i = blocks.binary_search_by_key(&at, |b| b.was).ok()?;
                blocks[i].now.map(|n| n.start)
            }
        }
    }

    /// The branch at the end of the block that held an address, or, if it does not end the block, whatever is there now.
    fn branch(&self, from: u64, ends_block: bool) -> Option<u64> {
        match &self.parts {
            Parts::Same => Some(self.shifted(from)),
            Parts::Blocks { blocks, .. } => {
                let block = blocks[Self::block(blocks, from)?];
                let now = block.now?;
                Some(if ends_block { now.last } else { (now.start + (from - block.was)).min(now.last) })
            }
        }
    }

    /// The call through a pointer that was the one at an address; `others` are all that were seen in its block.
    fn site(&self, at: u64, others: &[u64]) -> Option<u64> {
        let Parts::Blocks { blocks, sites } = &self.parts else { return Some(self.shifted(at)) };
        let block = blocks[Self::block(blocks, at)?];
        let now = block.now?;
        let there: Vec<u64> = sites.iter().filter(|s| s.0 == now.index).map(|s| s.1).collect();
        let same = now.start + (at - block.was);
        if now.found == Found::Hash && block.length == now.end - now.start && there.contains(&same) {
            return Some(same);
        }
        let inside: Vec<u64> =
            others.iter().copied().filter(|&o| o >= block.was && o - block.was < block.length).collect();
        let which = inside.iter().position(|&o| o == at)?;
        (inside.len() == there.len()).then(|| there[which])
    }

    /// Whether a branch between two addresses of the function is one of its edges that ends a block.
    fn is_edge(&self, from: u64, to: u64, shape: &FunctionShape) -> bool {
        let Parts::Blocks { blocks, .. } = &self.parts else { return false };
        let (Some(i), Ok(j)) = (Self::block(blocks, from), blocks.binary_search_by_key(&to, |b| b.was)) else {
            return false;
        };
        shape.blocks.get(i).is_some_and(|b| b.leads_to(i as u32).any(|t| t as usize == j))
    }

    /// The pieces of a straight stretch that are still straight: start and last instruction.
    fn stretch(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let Parts::Blocks { blocks, .. } = &self.parts else {
            return vec![(self.shifted(start), self.shifted(end))];
        };
        let (Some(first), Some(last)) = (Self::block(blocks, start), Self::block(blocks, end)) else {
            return Vec::new();
        };
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        let mut end_of_piece = None;
        for block in &blocks[first..=last.max(first)] {
            let Some(now) = block.now else {
                end_of_piece = None;
                continue;
            };
            match pieces.last_mut().filter(|_| end_of_piece == Some(now.start)) {
                Some(piece) => piece.1 = now.last,
                None => pieces.push((now.start, now.last)),
            }
            end_of_piece = Some(now.end);
        }
        pieces
    }
}

/// What is on the way from one build to another.
pub(crate) struct Transfer<'a> {
    seen: &'a ModuleProfile,
    shapes: &'a [FunctionShape],
    moves: Vec<Option<FunctionMove>>,
    module: &'a Module<'a>,
    /// By function of the index: how much has found its place, and of how much.
    placed: Vec<(u64, u64)>,
}

impl<'a> Transfer<'a> {
    /// Finds the blocks of the functions that were found.
    pub fn new(
        seen: &'a ModuleProfile,
        shapes: &'a [FunctionShape],
        found: &[Option<(usize, Rule)>],
        module: &'a Module<'a>,
    ) -> Self {
        static NONE: FunctionShape = FunctionShape { name: 0, callees: Vec::new(), blocks: Vec::new() };
        let moves = found.par_iter().enumerate().map(|(i, found)| {
            let (new, rule) = (*found)?;
            let shape = shapes.get(i).unwrap_or(&NONE);
            Some(FunctionMove::new(seen.functions.start[i], module.functions.all()[new], rule, shape, module))
        });
        Self { seen, shapes, moves: moves.collect(), module, placed: vec![(0, 0); found.len()] }
    }

    /// The module's part of the profile for the new build; and by function of the index how much has found its place, of
    /// how much.
    pub fn run(mut self, method: Method) -> (ModuleProfile, Vec<(u64, u64)>) {
        let counted = method == Method::Count;
        let ranges = if counted { self.counts() } else { self.stretches() };
        let by_branches = !counted && self.seen.samples.addr.is_empty();
        let samples = self.samples();
        let branches = self.branches(counted, by_branches);
        let moved = ModuleProfile {
            build_id: self.module.image.build_id().clone(),
            name: self.seen.name.clone(),
            path: self.seen.path.clone(),
            samples,
            branches,
            ranges,
            functions: Default::default(),
            shapes: Shapes::default(),
        };
        (moved, self.placed)
    }

    fn tally(&mut self, function: usize, placed: bool, weight: u64) {
        let (have, all) = &mut self.placed[function];
        *all = all.saturating_add(weight);
        *have = have.saturating_add(if placed { weight } else { 0 });
    }

    fn samples(&mut self) -> Samples {
        // Functions that were counted are measured by their counts.
        let measured: Vec<bool> = self.placed.iter().map(|p| p.1 > 0).collect();
        let mut rows: BTreeMap<u64, u64> = BTreeMap::new();
        for (at, count) in self.seen.samples.iter() {
            let Some(f) = holding(self.seen, at.0) else { continue };
            let now = self.moves[f].as_ref().and_then(|m| m.place(at.0));
            if !measured[f] {
                self.tally(f, now.is_some(), count);
            }
            if let Some(now) = now {
                let sum = rows.entry(now).or_default();
                *sum = sum.saturating_add(count);
            }
        }
        Samples { addr: rows.keys().copied().collect(), count: rows.into_values().collect() }
    }

    fn branches(&mut self, counted: bool, measure: bool) -> Branches {
        let b = &self.seen.branches;
        let mut sites = b.from.clone();
        sites.dedup();
        let mut table: BTreeMap<(u64, u64), (u64, u64)> = BTreeMap::new();
        for row in 0..b.from.len() {
            let (from, to, count) = (b.from[row], b.to[row], b.count[row]);
            let Some(f) = holding(self.seen, from) else { continue };
            let now = self.moves[f].as_ref().and_then(|m| {
                let from_now = if counted {
                    let near = sites.partition_point(|&s| s < m.was)
                        ..sites.partition_point(|&s| s < m.was.saturating_add(u64::from(self.seen.functions.size[f])));
                    m.site(from, &sites[near])?
                } else {
                    m.branch(from, self.shapes.get(f).is_some_and(|shape| m.is_edge(from, to, shape)))?
                };
                // Callee 0 of a counted profile is whatever lies outside.
                let to_now = match (counted, to) {
                    (true, 0) => 0,
                    _ => self.moves[holding(self.seen, to)?].as_ref()?.target(to)?,
                };
                Some((from_now, to_now))
            });
            if measure {
                self.tally(f, now.is_some(), count);
            }
            if let Some(key) = now {
                let sum = table.entry(key).or_default();
                *sum = (sum.0.saturating_add(count), sum.1.saturating_add(b.mispredicted[row]));
            }
        }
        Branches {
            from: table.keys().map(|k| k.0).collect(),
            to: table.keys().map(|k| k.1).collect(),
            count: table.values().map(|v| v.0).collect(),
            mispredicted: table.values().map(|v| v.1).collect(),
        }
    }

    fn stretches(&self) -> Ranges {
        let mut table: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for (start, end, count) in rows(&self.seen.ranges) {
            let inside = holding(self.seen, start).filter(|&f| holding(self.seen, end) == Some(f));
            let Some(m) = inside.and_then(|f| self.moves[f].as_ref()) else { continue };
            for (start, end) in m.stretch(start, end) {
                let sum = table.entry((start, end)).or_default();
                *sum = sum.saturating_add(count);
            }
        }
        ranges(table)
    }

    fn counts(&mut self) -> Ranges {
        let mut table: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        let mut of: BTreeMap<usize, BTreeMap<u64, u64>> = BTreeMap::new();
        for (start, end, count) in rows(&self.seen.ranges) {
            let Some(f) = holding(self.seen, start).filter(|&f| holding(self.seen, end) == Some(f)) else { continue };
            let bytes = count.saturating_mul(length(start, end));
            let Some(m) = &self.moves[f] else {
                self.tally(f, false, bytes);
                continue;
            };
            let placed = match &m.parts {
                Parts::Same => {
                    table.insert((m.shifted(start), m.shifted(end)), count);
                    true
                }
                Parts::Blocks { blocks, .. } => {
                    of.entry(f).or_default().insert(start, count);
                    FunctionMove::block(blocks, start).is_some_and(|b| blocks[b].now.is_some())
                }
            };
            self.tally(f, placed, bytes);
        }
        for (f, counted) in of {
            let (Some(shape), Some(m)) = (self.shapes.get(f), &self.moves[f]) else { continue };
            let Parts::Blocks { blocks, .. } = &m.parts else { continue };
            for (block, count) in blocks.iter().zip(all_counts(&shape.blocks, blocks, &counted)) {
                if let Some(now) = block.now {
                    table.insert((now.start, now.end - 1), count);
                }
            }
        }
        ranges(table)
    }
}

fn ranges(table: BTreeMap<(u64, u64), u64>) -> Ranges {
    Ranges {
        start: table.keys().map(|k| k.0).collect(),
        end: table.keys().map(|k| k.1).collect(),
        count: table.into_values().collect(),
    }
}

/// How often each block of a function ran of which some were counted, by their start.
fn all_counts(shapes: &[BlockShape], blocks: &[BlockMove], counted: &BTreeMap<u64, u64>) -> Vec<u64> {
    let nodes = shapes.iter().zip(blocks).map(|(shape, block)| FlowNode {
        weight: counted.get(&block.was).copied(),
        strength: MAX_STRENGTH,
        enters: shape.ends & BlockShape::ENTERED != 0,
        leaves: shape.ends & BlockShape::LEFT != 0,
        entered: None,
    });
    let inside = |&to: &u32| (to as usize) < shapes.len();
    let edges = shapes.iter().enumerate().flat_map(|(i, shape)| {
        let mut to: Vec<u32> = shape.leads_to(i as u32).filter(inside).collect();
        to.sort_unstable();
        to.dedup();
        let edge = move |to: u32| FlowEdge { from: i as u32, to, weight: None, fall_through: to as usize == i + 1 };
        to.into_iter().map(edge)
    });
    infer(&FlowGraph { nodes: nodes.collect(), edges: edges.collect(), doubt: 0 }).nodes
}
