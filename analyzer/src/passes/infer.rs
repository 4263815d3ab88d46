//! Pass `infer`: from what a profile saw in a function to counts of its blocks and edges.
//!
//! Three kinds of evidence. *Samples* of the instruction pointer: a block's share is proportional to how often it ran
//! times how long it takes, so its weight is samples per instruction, and the instruction count is also how strong the
//! evidence is. *Branch stacks* (LBR): taken branches are edges, straight-line ranges are block counts and fall-through
//! edges. *Exact counts*: of some blocks; those that were not counted, and all edges, follow from conservation.

use super::{FunctionLayout, Pass, PassStats};
use crate::cfg::{Cfg, Terminator};
use crate::infer::{FlowEdge, FlowGraph, FlowNode, MAX_STRENGTH, Quality, infer, infer_within};
use dyni_schema::{LinkAddr, Method, ModuleProfile};

/// The weight of one sample in a block of one instruction.
pub const UNITS_PER_SAMPLE: u64 = 1024;
/// The fewest instructions that a block is taken to have: a sample in a block of one instruction is as likely to be its
/// neighbour's (skid, a stall that began before), so very short blocks would get absurd weights.
pub const MIN_COST: u32 = 3;

/// A module's profile with what makes it quick to look things up in.
pub struct Evidence<'a> {
    profile: &'a ModuleProfile,
    method: Method,
    /// Rows of the branch table by destination.
    by_target: Vec<u32>,
    /// Where the number of straight-line ranges that cover an address changes, and what it is from there on.
    cover: Vec<(u64, i128)>,
    /// How many ranges start at an address, sorted.
    starts: Vec<(u64, u64)>,
}

impl<'a> Evidence<'a> {
    /// Prepares a module's profile; `method` is the recording's.
    #[must_use]
    pub fn new(profile: &'a ModuleProfile, method: Method) -> Self {
        let b = &profile.branches;
        let mut by_target: Vec<u32> = (0..b.to.len() as u32).collect();
        by_target.sort_unstable_by_key(|&row| (b.to[row as usize], b.from[row as usize]));
        let r = &profile.ranges;
        let mut changes: Vec<(u64, i128)> = Vec::with_capacity(2 * r.start.len());
        let mut starts: Vec<(u64, u64)> = Vec::new();
        for ((&start, &end), &count) in r.start.iter().zip(&r.end).zip(&r.count) {
            changes.push((start, i128::from(count)));
            changes.push((end.saturating_add(1), -i128::from(count)));
            match starts.last_mut().filter(|s| s.0 == start) {
                Some(same) => same.1 = same.1.saturating_add(count),
                None => starts.push((start, count)),
            }
        }
        changes.sort_unstable_by_key(|c| c.0);
        let mut cover: Vec<(u64, i128)> = Vec::new();
        let mut now = 0;
        for (at, change) in changes {
            now += change;
            match cover.last_mut().filter(|c| c.0 == at) {
                Some(same) => same.1 = now,
                None => cover.push((at, now)),
            }
        }
        Self { profile, method, by_target, cover, starts }
    }

    /// The module's profile.
    #[must_use]
    pub fn profile(&self) -> &'a ModuleProfile {
        self.profile
    }

    /// Whether the profile was counted.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        self.method == Method::Count
    }

    /// How often a block ran, if it was counted.
    fn counted(&self, start: LinkAddr) -> Option<u64> {
        self.starts.binary_search_by_key(&start.0, |s| s.0).ok().map(|i| self.starts[i].1)
    }

    /// Whether any block between two addresses, the second not included, was counted.
    fn counts_any(&self, start: LinkAddr, end: LinkAddr) -> bool {
        let i = self.starts.partition_point(|s| s.0 < start.0);
        self.starts.get(i).is_some_and(|s| s.0 < end.0)
    }

    /// Whether taken branches are there, so that counts need not be guessed from time. (Those of a counted profile are the
    /// recorded targets of calls through pointers, and nothing else.)
    #[must_use]
    pub fn has_branches(&self) -> bool {
        self.method != Method::Count && !self.profile.branches.from.is_empty()
    }

    /// Samples between two addresses, the second not included.
    pub fn samples(&self, start: LinkAddr, end: LinkAddr) -> impl Iterator<Item = (LinkAddr, u64)> + '_ {
        let s = &self.profile.samples;
        let rows = s.addr.partition_point(|&a| a < start.0)..s.addr.partition_point(|&a| a < end.0);
        rows.map(|i| (LinkAddr(s.addr[i]), s.count[i]))
    }

    /// Branches whose instruction lies between two addresses, the second not included: source, destination, count.
    pub fn branches_from(
        &self,
        start: LinkAddr,
        end: LinkAddr,
    ) -> impl Iterator<Item = (LinkAddr, LinkAddr, u64)> + '_ {
        let b = &self.profile.branches;
        let rows = b.from.partition_point(|&a| a < start.0)..b.from.partition_point(|&a| a < end.0);
        rows.map(|i| (LinkAddr(b.from[i]), LinkAddr(b.to[i]), b.count[i]))
    }

    /// Branches to one address: source and count.
    pub(crate) fn branches_to(&self, to: LinkAddr) -> impl Iterator<Item = (LinkAddr, u64)> + '_ {
        let b = &self.profile.branches;
        let target = |&row: &u32| b.to[row as usize];
        let first = self.by_target.partition_point(|r| target(r) < to.0);
        let rows = self.by_target[first..].iter().take_while(move |r| target(r) == to.0);
        rows.map(|&r| (LinkAddr(b.from[r as usize]), b.count[r as usize]))
    }

    /// How many straight-line ranges run over the instruction at an address.
    pub(crate) fn covered(&self, at: LinkAddr) -> u64 {
        let i = self.cover.partition_point(|c| c.0 <= at.0);
        i.checked_sub(1).map_or(0, |i| u64::try_from(self.cover[i].1).unwrap_or(0))
    }

    /// The most ranges that run over any instruction from one address to another, both included.
    fn most_covered(&self, start: LinkAddr, last: LinkAddr) -> u64 {
        let inside = self.cover.partition_point(|c| c.0 <= start.0)..self.cover.partition_point(|c| c.0 <= last.0);
        let inner = self.cover[inside].iter().map(|c| u64::try_from(c.1).unwrap_or(0)).max().unwrap_or(0);
        inner.max(self.covered(start))
    }

    /// How many ranges run on from the instruction before an address into the one at it.
    pub(crate) fn run_on(&self, at: LinkAddr) -> u64 {
        let begin = self.starts.binary_search_by_key(&at.0, |s| s.0).map_or(0, |i| self.starts[i].1);
        self.covered(at).saturating_sub(begin)
    }
}

/// Fills in samples, weight, flow and the unit of counts. With `full` unset the counts are the raw weights and shares of
/// them.
pub fn run(layout: &mut FunctionLayout, evidence: &Evidence<'_>, full: bool) -> PassStats {
    let mut outside = 0;
    for (at, count) in evidence.samples(layout.cfg.start, layout.cfg.end) {
        match layout.cfg.block_holding(at) {
            Some(b) => layout.samples[b] = layout.samples[b].saturating_add(count),
            None => outside += count,
        }
    }
    let sampled: u64 = layout.samples.iter().fold(0, |sum, &s| sum.saturating_add(s));
    // A function that was sampled and could not be instrumented has samples alone.
    let graph = if evidence.method == Method::Count && evidence.counts_any(layout.cfg.start, layout.cfg.end) {
        layout.units_per_sample = 0;
        counted_graph(layout, evidence)
    } else if evidence.has_branches() {
        layout.units_per_sample = 1;
        branch_graph(layout, evidence)
    } else {
        layout.units_per_sample = UNITS_PER_SAMPLE;
        sampled_graph(layout)
    };
    layout.flow = if full { infer(&graph) } else { infer_within(&graph, 0) };
    let filled =
        (0..graph.nodes.len()).filter(|&b| layout.flow.nodes[b] > 0 && graph.nodes[b].weight == Some(0)).count();
    PassStats {
        pass: Pass::Infer,
        numbers: [
            ("samples in blocks", sampled),
            ("samples outside blocks", outside),
            ("unseen blocks that must have run", filled as u64),
            ("functions not solved to the optimum", u64::from(full && layout.flow.quality != Quality::Optimal)),
        ],
    }
}

/// The cost of a block, instructions with a floor: what its samples are divided by.
#[must_use]
pub fn cost(layout: &FunctionLayout, block: usize) -> u32 {
    layout.info[block].instructions.max(MIN_COST)
}

/// By block: whether it may be entered from outside the function, and whether execution may leave the function from it.
pub(crate) fn may_enter_or_leave(cfg: &Cfg) -> Vec<(bool, bool)> {
    let inside = |at: LinkAddr| cfg.block_at(at).is_some();
    // A block that only known jump tables lead to is not entered from outside, unless unknown jumps are about.
    let unknown = cfg.blocks.iter().any(|b| b.terminator == Terminator::Indirect { table: None });
    let mut in_table = vec![false; cfg.blocks.len()];
    for b in cfg.blocks.iter().filter(|b| matches!(b.terminator, Terminator::Indirect { .. })) {
        b.successors.iter().for_each(|&to| in_table[to as usize] = true);
    }
    let ends = cfg.blocks.iter().enumerate().map(|(i, b)| {
        let leaves = match b.terminator {
            Terminator::Stop | Terminator::Indirect { table: None } => true,
            Terminator::Jump { target } => !inside(target),
            Terminator::Conditional { taken } => !inside(taken) || !inside(b.end),
            Terminator::FallThrough | Terminator::Indirect { table: Some(_) } => false,
        };
        (i == 0 || (b.address_taken && (unknown || !in_table[i])), leaves || b.successors.is_empty())
    });
    ends.collect()
}

/// The graph without evidence: where it is entered and left.
fn bare_graph(layout: &FunctionLayout) -> FlowGraph {
    let node = |(enters, leaves)| FlowNode { weight: None, strength: 1, enters, leaves, entered: None };
    let nodes = may_enter_or_leave(&layout.cfg).into_iter().map(node);
    let edge = |e: &super::Edge| FlowEdge { from: e.from, to: e.to, weight: None, fall_through: e.fall_through };
    FlowGraph { nodes: nodes.collect(), edges: layout.edges.iter().map(edge).collect(), doubt: 0 }
}

fn sampled_graph(layout: &FunctionLayout) -> FlowGraph {
    let mut graph = bare_graph(layout);
    // Half a sample.
    graph.doubt = UNITS_PER_SAMPLE / 2;
    for (b, node) in graph.nodes.iter_mut().enumerate() {
        let (cost, samples) = (cost(layout, b), layout.samples[b]);
        let weight = u128::from(samples) * u128::from(UNITS_PER_SAMPLE) / u128::from(cost);
        // A block that was sampled ran, however long it is.
        node.weight = Some(u64::try_from(weight).unwrap_or(u64::MAX).max(u64::from(samples > 0)));
        // Programs do not fail as a rule.
        node.strength = if samples == 0 && layout.info[b].fails { MAX_STRENGTH } else { cost };
    }
    graph
}

fn branch_graph(layout: &FunctionLayout, evidence: &Evidence<'_>) -> FlowGraph {
    let mut graph = bare_graph(layout);
    for (e, edge) in layout.edges.iter().zip(&mut graph.edges) {
        let (from, to) = (&layout.cfg.blocks[e.from as usize], &layout.cfg.blocks[e.to as usize]);
        let taken: u64 = evidence
            .branches_from(from.last, from.end)
            .filter(|b| b.1 == to.start)
            .fold(0, |sum, b| sum.saturating_add(b.2));
        edge.weight = match from.terminator {
            // After a call that ends a block the range begins anew; the blocks themselves tell.
            Terminator::FallThrough => None,
            _ if e.fall_through => Some(taken.saturating_add(evidence.run_on(to.start))),
            _ => Some(taken),
        };
    }
    for (b, node) in graph.nodes.iter_mut().enumerate() {
        let block = &layout.cfg.blocks[b];
        node.weight = Some(evidence.most_covered(block.start, block.last));
        if node.enters {
            let is_edge = |from: LinkAddr| {
                let source = layout.cfg.block_holding(from);
                source.is_some_and(|s| layout.cfg.blocks[s].successors.contains(&(b as u32)))
            };
            let came = evidence.branches_to(block.start).filter(|&(from, _)| !is_edge(from));
            node.entered = Some(came.fold(0, |sum, (_, count)| sum.saturating_add(count)));
        }
    }
    graph
}

/// Blocks that were counted are known, the others and all edges follow by conservation ([`crate::probes`]).
fn counted_graph(layout: &FunctionLayout, evidence: &Evidence<'_>) -> FlowGraph {
    let mut graph = bare_graph(layout);
    for (node, block) in graph.nodes.iter_mut().zip(&layout.cfg.blocks) {
        node.weight = evidence.counted(block.start);
        node.strength = MAX_STRENGTH;
    }
    graph
}

#[cfg(test)]
#[path = "infer_tests.rs"]
mod tests;
