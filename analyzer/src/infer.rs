//! Profile inference: from noisy, incomplete evidence to block and edge counts that obey flow conservation.
//!
//! The method is that of Levin, Newman and Haber, "Complementing missing and inaccurate profiling using a minimum cost
//! circulation algorithm" (2008) and of He, Mestre, Pupyrev, Wang and Yu, "Profile inference revisited" (POPL 2022):
//! of all circulations through the function, take the one that contradicts the evidence least. Every block is split into
//! an in-node and an out-node; running a block as often as its weight says earns a reward per unit, running it more often
//! costs, and a weight of zero is evidence too. Unlike there, what a unit costs grows with [`FlowNode::strength`], the
//! samples that a unit would have left behind: that a block of 40 instructions was never sampled says much, that a block
//! of two was not says little.
//!
//! Everything outside the function is one node, which every entry comes from and every exit goes to. Blocks that no exit
//! can be reached from (a server's main loop) or that nothing reaches get one of their own, at a price.
//!
//! Counts are integers in the caller's unit; the result depends on nothing but the arguments.

use crate::simplex::{Network, Outcome, UNBOUNDED};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A block as evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowNode {
    /// How often it seems to have run; `None` if nothing is known, which is not the same as zero.
    pub weight: Option<u64>,
    /// How strong the evidence is: how many samples one unit of weight stands for, relative to the other blocks (for
    /// sampled profiles the instruction count). Values are clamped to 1..=[`MAX_STRENGTH`].
    pub strength: u32,
    /// May be entered from outside (the function's entry, a label whose address is taken).
    pub enters: bool,
    /// May leave the function (return, tail call, indirect jump to an unknown place).
    pub leaves: bool,
    /// How often it seems to have been entered from outside, if known. Ignored unless `enters`.
    pub entered: Option<u64>,
}

impl FlowNode {
    /// A block in the middle of a function with this weight and strength.
    #[must_use]
    pub const fn inner(weight: Option<u64>, strength: u32) -> Self {
        Self { weight, strength, enters: false, leaves: false, entered: None }
    }
}

/// An edge as evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEdge {
    /// The source, an index into [`FlowGraph::nodes`].
    pub from: u32,
    /// The destination, an index into [`FlowGraph::nodes`].
    pub to: u32,
    /// How often it seems to have been taken, if known.
    pub weight: Option<u64>,
    /// Whether it needs no branch; preferred where the evidence does not decide.
    pub fall_through: bool,
}

/// A control-flow graph with evidence. The graph may be irreducible, disconnected, and have self-loops.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FlowGraph {
    /// The blocks.
    pub nodes: Vec<FlowNode>,
    /// The edges; parallel ones are allowed.
    pub edges: Vec<FlowEdge>,
    /// How many units of flow times strength may well leave no trace: a loop that was seen without the way to it being
    /// seen is entered as often as that allows. 0 or 1 if every execution leaves a trace.
    pub doubt: u64,
}

/// How good a [`Flow`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quality {
    /// Conserved, and of least cost.
    Optimal,
    /// Conserved; the step limit was reached before the least cost was.
    Feasible,
    /// The graph was too large: block counts are the weights, edge counts are shares of them. Not conserved.
    Heuristic,
}

/// Counts for every block and edge. Unless heuristic: `nodes[b]` = `entered[b]` + edges in = `left[b]` + edges out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// By block.
    pub nodes: Vec<u64>,
    /// By edge.
    pub edges: Vec<u64>,
    /// Entries from outside, by block.
    pub entered: Vec<u64>,
    /// Exits to outside, by block.
    pub left: Vec<u64>,
    /// How good it is.
    pub quality: Quality,
}

/// Cost of one unit more than the weight says, per strength. The ratios are those of LLVM's and BOLT's inference.
const INCREASE: i64 = 10;
/// Cost of one unit on what was never seen, per strength.
const INCREASE_FROM_ZERO: i64 = 11;
/// Reward for one unit up to the weight, per strength: a sample that was taken outweighs one that is missing.
const REWARD: i64 = 20;
/// Cost of one unit over an edge that needs a branch.
const BRANCH: i64 = 1;
/// Cost of one unit that appears or vanishes where the graph has no entry or exit.
const STUCK: i64 = 100_000;
/// The greatest [`FlowNode::strength`].
pub const MAX_STRENGTH: u32 = 64;
/// The largest weight; larger ones are cut, so that no sum overflows.
pub const MAX_WEIGHT: u64 = 1 << 40;
/// Graphs with more blocks plus edges than this get [`Quality::Heuristic`].
pub const MAX_GRAPH: usize = 1 << 18;
/// Steps of the solver per block: what bounds its time. Typical functions need three to ten.
const PIVOTS_PER_NODE: usize = 60;

/// Counts that obey conservation and contradict the evidence least.
#[must_use]
pub fn infer(graph: &FlowGraph) -> Flow {
    infer_within(graph, MAX_GRAPH)
}

/// [`infer`] with another limit on blocks plus edges.
#[must_use]
pub fn infer_within(graph: &FlowGraph, limit: usize) -> Flow {
    let silent = |weight: Option<u64>| weight.is_none_or(|w| w == 0);
    if graph.nodes.iter().all(|n| silent(n.weight) && silent(n.entered)) && graph.edges.iter().all(|e| silent(e.weight))
    {
        return Flow::zero(graph, Quality::Optimal);
    }
    if graph.nodes.len() + graph.edges.len() > limit {
        return shares(graph);
    }
    let ends = Ends::of(graph);
    let mut flow = circulation(graph, &ends);
    join_islands(graph, &ends, &mut flow);
    flow
}

impl Flow {
    fn zero(graph: &FlowGraph, quality: Quality) -> Self {
        let n = graph.nodes.len();
        Self { nodes: vec![0; n], edges: vec![0; graph.edges.len()], entered: vec![0; n], left: vec![0; n], quality }
    }
}

/// What it costs to come from and go to the outside, by block; `None` where that is impossible.
struct Ends {
    enter: Vec<Option<i64>>,
    leave: Vec<Option<i64>>,
}

impl Ends {
    fn of(graph: &FlowGraph) -> Self {
        let enters: Vec<bool> = graph.nodes.iter().map(|n| n.enters).collect();
        let leaves: Vec<bool> = graph.nodes.iter().map(|n| n.leaves).collect();
        let reached = reach(&enters, &graph.edges, |e| (e.from, e.to));
        let finishes = reach(&leaves, &graph.edges, |e| (e.to, e.from));
        let price = |natural: bool, possible: bool, cost: i64| match (natural, possible) {
            (true, _) => Some(cost),
            (false, true) => None,
            (false, false) => Some(STUCK),
        };
        Self {
            // The first block is the entry proper; others are entered by address, which is rarer.
            enter: (0..enters.len()).map(|b| price(enters[b], reached[b], if b == 0 { 0 } else { BRANCH })).collect(),
            leave: (0..leaves.len()).map(|b| price(leaves[b], finishes[b], 0)).collect(),
        }
    }
}

/// Which nodes are reached from `from`, edges being seen through `ends`.
fn reach(from: &[bool], edges: &[FlowEdge], ends: impl Fn(&FlowEdge) -> (u32, u32)) -> Vec<bool> {
    let adjacency = Adjacency::new(from.len(), edges, &ends);
    let mut seen = from.to_vec();
    let mut stack: Vec<u32> = (0..from.len() as u32).filter(|&b| from[b as usize]).collect();
    while let Some(u) = stack.pop() {
        for &e in adjacency.of(u) {
            let v = ends(&edges[e as usize]).1;
            if !std::mem::replace(&mut seen[v as usize], true) {
                stack.push(v);
            }
        }
    }
    seen
}

/// Edge numbers by source, in one allocation.
struct Adjacency {
    start: Vec<u32>,
    edges: Vec<u32>,
}

impl Adjacency {
    fn new(nodes: usize, edges: &[FlowEdge], ends: impl Fn(&FlowEdge) -> (u32, u32)) -> Self {
        let mut start = vec![0; nodes + 1];
        for e in edges {
            start[ends(e).0 as usize + 1] += 1;
        }
        for i in 0..nodes {
            start[i + 1] += start[i];
        }
        let mut at = start.clone();
        let mut sorted = vec![0; edges.len()];
        for (i, e) in edges.iter().enumerate() {
            let slot = &mut at[ends(e).0 as usize];
            sorted[*slot as usize] = i as u32;
            *slot += 1;
        }
        Self { start, edges: sorted }
    }

    fn of(&self, node: u32) -> &[u32] {
        &self.edges[self.start[node as usize] as usize..self.start[node as usize + 1] as usize]
    }
}

/// The parallel arcs that stand for one piece of evidence: a reward up to the weight, a price beyond.
fn evidence(net: &mut Network, from: u32, to: u32, weight: Option<u64>, strength: u32, base: i64) -> (usize, usize) {
    let strength = i64::from(strength.clamp(1, MAX_STRENGTH));
    let first = net.arc_count();
    match weight.map(|w| w.min(MAX_WEIGHT) as i64) {
        None => net.arc(from, to, UNBOUNDED, base),
        Some(0) => net.arc(from, to, UNBOUNDED, base + INCREASE_FROM_ZERO * strength),
        Some(w) => {
            net.arc(from, to, w, base - REWARD * strength);
            net.arc(from, to, UNBOUNDED, base + INCREASE * strength)
        }
    };
    (first, net.arc_count())
}

fn circulation(graph: &FlowGraph, ends: &Ends) -> Flow {
    let n = graph.nodes.len();
    let (incoming, outgoing, outside) = (|b: usize| 2 * b as u32, |b: usize| 2 * b as u32 + 1, 2 * n as u32);
    let mut net = Network::new(2 * n + 1);
    let mut nodes = Vec::with_capacity(n);
    let mut entered = vec![(0, 0); n];
    let mut left = vec![(0, 0); n];
    for (b, node) in graph.nodes.iter().enumerate() {
        nodes.push(evidence(&mut net, incoming(b), outgoing(b), node.weight, node.strength, 0));
        if let Some(cost) = ends.enter[b] {
            let known = node.entered.filter(|_| node.enters);
            entered[b] = evidence(&mut net, outside, incoming(b), known, node.strength, cost);
        }
        if let Some(cost) = ends.leave[b] {
            left[b] = evidence(&mut net, outgoing(b), outside, None, 1, cost);
        }
    }
    let mut edges = Vec::with_capacity(graph.edges.len());
    for e in &graph.edges {
        let (from, to) = (e.from as usize, e.to as usize);
        let base = if e.fall_through { 0 } else { BRANCH };
        edges.push(evidence(&mut net, outgoing(from), incoming(to), e.weight, graph.nodes[from].strength, base));
    }
    let quality = match net.solve(PIVOTS_PER_NODE * (2 * n + 1) + 1000) {
        Outcome::Optimal => Quality::Optimal,
        Outcome::Feasible => Quality::Feasible,
    };
    let read = |arcs: &Vec<(usize, usize)>| -> Vec<u64> {
        arcs.iter().map(|&(a, b)| (a..b).map(|i| net.flow(i) as u64).sum()).collect()
    };
    Flow { nodes: read(&nodes), edges: read(&edges), entered: read(&entered), left: read(&left), quality }
}

/// A hot loop in a function that was sampled nowhere else is cheapest as a circulation of its own. But something entered
/// it: send flow from an entry through every such island to an exit, over the ground that is least improbable, as much as
/// would still have gone unseen there ([`FlowGraph::doubt`]), and at least one unit.
fn join_islands(graph: &FlowGraph, ends: &Ends, flow: &mut Flow) {
    let n = graph.nodes.len();
    let adjacency = Adjacency::new(n, &graph.edges, |e| (e.from, e.to));
    let mut connected: Vec<bool> = flow.entered.iter().map(|&c| c > 0).collect();
    let spread = |mut stack: Vec<u32>, connected: &mut Vec<bool>, flow: &Flow| {
        stack.iter().for_each(|&b| connected[b as usize] = true);
        while let Some(u) = stack.pop() {
            for &e in adjacency.of(u).iter().filter(|&&e| flow.edges[e as usize] > 0) {
                let v = graph.edges[e as usize].to;
                if !std::mem::replace(&mut connected[v as usize], true) {
                    stack.push(v);
                }
            }
        }
    };
    let entered = (0..n as u32).filter(|&b| connected[b as usize]).collect();
    spread(entered, &mut connected, flow);
    if (0..n).all(|b| connected[b] || flow.nodes[b] == 0) {
        return;
    }
    let there = cheapest_paths(graph, flow, &ends.enter, |e| (e.from, e.to));
    let back = cheapest_paths(graph, flow, &ends.leave, |e| (e.to, e.from));
    for b in 0..n as u32 {
        if connected[b as usize] || flow.nodes[b as usize] == 0 {
            continue;
        }
        let (mut path, mut blocks) = (Vec::new(), vec![b]);
        let mut first = b;
        while let Some(e) = there[first as usize] {
            path.push(e);
            first = graph.edges[e as usize].from;
            blocks.push(first);
        }
        let mut last = b;
        while let Some(e) = back[last as usize] {
            path.push(e);
            last = graph.edges[e as usize].to;
            blocks.push(last);
        }
        let unseen = blocks.iter().filter(|&&b| flow.nodes[b as usize] == 0);
        let strength: u64 = unseen.map(|&b| u64::from(graph.nodes[b as usize].strength.max(1))).sum();
        let amount = (graph.doubt / strength.max(1)).min(flow.nodes[b as usize]).max(1);
        path.iter().for_each(|&e| flow.edges[e as usize] += amount);
        blocks.iter().for_each(|&b| flow.nodes[b as usize] += amount);
        flow.entered[first as usize] += amount;
        flow.left[last as usize] += amount;
        spread(blocks, &mut connected, flow);
    }
}

/// For every block the last edge of the path to it from any block that `ends` prices; `None` where such a path starts.
/// An edge that has flow is free, another costs what its blocks' strength says.
fn cheapest_paths(
    graph: &FlowGraph,
    flow: &Flow,
    ends: &[Option<i64>],
    direction: impl Fn(&FlowEdge) -> (u32, u32),
) -> Vec<Option<u32>> {
    let n = graph.nodes.len();
    let adjacency = Adjacency::new(n, &graph.edges, &direction);
    let mut distance = vec![i64::MAX; n];
    let mut by = vec![None; n];
    let mut heap = BinaryHeap::new();
    for b in 0..n {
        if let Some(cost) = ends[b] {
            distance[b] = cost;
            heap.push(Reverse((cost, b as u32)));
        }
    }
    while let Some(Reverse((d, u))) = heap.pop() {
        if d > distance[u as usize] {
            continue;
        }
        for &e in adjacency.of(u) {
            let v = direction(&graph.edges[e as usize]).1;
            let cold = flow.edges[e as usize] == 0;
            let step = if cold { 1 + i64::from(graph.nodes[v as usize].strength.min(MAX_STRENGTH)) } else { 0 };
            if d + step < distance[v as usize] {
                distance[v as usize] = d + step;
                by[v as usize] = Some(e);
                heap.push(Reverse((d + step, v)));
            }
        }
    }
    by
}

/// The linear-time way out for graphs beyond the limit: weights as they are, each block's count shared among its
/// successors in proportion to theirs.
fn shares(graph: &FlowGraph) -> Flow {
    let mut flow = Flow::zero(graph, Quality::Heuristic);
    let weight = |b: u32| graph.nodes[b as usize].weight.unwrap_or(0).min(MAX_WEIGHT);
    let mut total = vec![0u128; graph.nodes.len()];
    for e in &graph.edges {
        total[e.from as usize] += u128::from(weight(e.to));
    }
    let (mut sum_in, mut sum_out) = (vec![0u64; graph.nodes.len()], vec![0u64; graph.nodes.len()]);
    for (i, e) in graph.edges.iter().enumerate() {
        let share = match total[e.from as usize] {
            0 => 0,
            t => (u128::from(weight(e.from)) * u128::from(weight(e.to)) / t) as u64,
        };
        flow.edges[i] = e.weight.map_or(share, |w| w.min(MAX_WEIGHT));
        sum_in[e.to as usize] += flow.edges[i];
        sum_out[e.from as usize] += flow.edges[i];
    }
    for (b, node) in graph.nodes.iter().enumerate() {
        let count = weight(b as u32).max(sum_in[b]).max(sum_out[b]);
        flow.nodes[b] = count;
        flow.entered[b] = if node.enters { count - sum_in[b] } else { 0 };
        flow.left[b] = if node.leaves { count - sum_out[b] } else { 0 };
    }
    flow
}

#[cfg(test)]
mod tests;
