//! From a profile to counts of the ways between basic blocks, as BOLT's profiles have them, and back.
//!
//! BOLT's profiles know one thing only: how often execution went from the last instruction of a block to the first of
//! another, whether it jumped there or ran on. Profiles here know branches and straight stretches ([`Ranges`]), or counts
//! of blocks. Out: stretches become fall-throughs where BOLT has a block's end; of counted blocks the edges are inferred, as
//! for a layout. In: fall-throughs are put together to stretches, so that every block is covered as often as it ran and every
//! boundary is crossed as often as execution ran on. Which of several stretches ended at a place is not known and not asked.

use crate::cfg::{self, Block, Cfg, Terminator};
use crate::functions::Function;
use crate::image::Image;
use crate::passes::FunctionLayout;
use crate::passes::infer::{self, Evidence as Seen};
use crate::plan::Module;
use dyni_schema::profile::MAX_ROWS;
use dyni_schema::{Branches, LinkAddr, Method, ModuleProfile, Ranges};
use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use rayon::prelude::*;
use std::collections::{BTreeMap, VecDeque};

/// What stands in [`Branches::to`] for a place outside the module.
const OUTSIDE: LinkAddr = LinkAddr(0);

/// How often execution went one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    /// The last instruction before; `None` if that is not known, or lies in another module.
    pub from: Option<LinkAddr>,
    /// The first instruction after; `None` likewise.
    pub to: Option<LinkAddr>,
    /// How often.
    pub count: u64,
    /// How often the processor had predicted it wrongly.
    pub mispredicted: u64,
}

impl Edge {
    const fn new(from: Option<LinkAddr>, to: Option<LinkAddr>, count: u64) -> Self {
        Self { from, to, count, mispredicted: 0 }
    }
}

/// A row of [`Ranges`]: the first instruction, the last, and how often.
type Stretch = (LinkAddr, LinkAddr, u64);

/// What a set of edges says of a module, in the terms of a profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Branches that were taken.
    pub branches: Branches,
    /// Straight stretches.
    pub ranges: Ranges,
}

/// The ways that a profile of branches ([`Method::Lbr`]) or of counts ([`Method::Count`]) saw in a module, sorted; none if
/// it has samples alone.
#[must_use]
pub fn edges(module: &Module<'_>, profile: &ModuleProfile, method: Method) -> Vec<Edge> {
    let seen = Seen::new(profile, method);
    let mut edges: Vec<Edge> = match method {
        Method::Count => counted(module, &seen),
        _ if seen.has_branches() => branched(module, &seen),
        _ => Vec::new(),
    };
    edges.retain(|e| e.count > 0);
    edges.sort_unstable();
    edges
}

fn graph(module: &Module<'_>, function: &Function) -> Option<Cfg> {
    cfg::build(module.image, module.functions, module.targets, function).ok()
}

/// The functions in which any of these addresses lies, by rising address.
fn functions_of<'m>(module: &Module<'m>, addresses: impl IntoIterator<Item = u64>) -> Vec<&'m Function> {
    let mut hit: Vec<usize> = Vec::new();
    for at in addresses {
        hit.extend(module.functions.index_at(LinkAddr(at)).filter(|i| hit.last() != Some(i)));
    }
    hit.sort_unstable();
    hit.dedup();
    hit.into_iter().map(|i| &module.functions.all()[i]).collect()
}

fn runs_on(block: &Block) -> bool {
    matches!(block.terminator, Terminator::FallThrough | Terminator::Conditional { .. })
}

/// The last instruction between two addresses that does anything.
fn last_but_padding(image: &Image, from: LinkAddr, to: LinkAddr) -> Option<LinkAddr> {
    let bytes = image.bytes(from, to.0.saturating_sub(from.0) as usize)?;
    let instructions = Decoder::with_ip(64, bytes, from.0, DecoderOptions::NONE).into_iter();
    instructions.filter(|i| i.mnemonic() != Mnemonic::Nop).last().map(|i| LinkAddr(i.ip()))
}

/// A block, as BOLT sees where it ends: padding in front of the next one is part of neither.
#[derive(Clone, Copy, Debug)]
struct RunsOn {
    /// Its last instruction.
    last: LinkAddr,
    /// The block that it runs on into.
    to: usize,
}

/// By block: into which one BOLT sees it run on, if it may at all and BOLT has a boundary there.
///
/// That is where there is a branch, or a way in from elsewhere. Here a block also ends behind a call that stays in the
/// original; and one that is padding, to which nobody jumps, is none to BOLT.
fn fall_throughs(image: &Image, cfg: &Cfg) -> Vec<Option<RunsOn>> {
    let blocks = &cfg.blocks;
    let mut other_way_in: Vec<bool> = blocks.iter().map(|b| b.address_taken).collect();
    for (i, block) in blocks.iter().enumerate() {
        block.successors.iter().filter(|&&to| to as usize != i + 1).for_each(|&to| other_way_in[to as usize] = true);
    }
    let leads_on = |i: usize| {
        let next = blocks.get(i + 1)?;
        (runs_on(&blocks[i]) && blocks[i].end == next.start).then_some(i + 1)
    };
    let is_nothing = |i: usize| {
        let b = &blocks[i];
        let padding = || last_but_padding(image, b.start, b.end).is_none();
        i > 0 && b.terminator == Terminator::FallThrough && !other_way_in[i] && padding()
    };
    let way = |i: usize| {
        let mut to = leads_on(i).filter(|_| !is_nothing(i))?;
        if blocks[i].terminator == Terminator::FallThrough && !other_way_in[to] {
            return None;
        }
        while is_nothing(to) {
            to = leads_on(to)?;
        }
        let b = &blocks[i];
        Some(RunsOn { last: last_but_padding(image, b.start, b.end).unwrap_or(b.last), to })
    };
    (0..blocks.len()).map(way).collect()
}

/// Branches as they are, and what ran on over the end of a block.
fn branched(module: &Module<'_>, seen: &Seen<'_>) -> Vec<Edge> {
    let (b, r) = (&seen.profile().branches, &seen.profile().ranges);
    let rows = b.from.iter().zip(&b.to).zip(b.count.iter().zip(&b.mispredicted));
    let mut edges: Vec<Edge> = rows
        .map(|((&from, &to), (&count, &mispredicted))| {
            let known = |at| Some(LinkAddr(at)).filter(|&at| module.functions.at(at).is_some());
            Edge { from: known(from), to: known(to), count, mispredicted }
        })
        .collect();
    let functions = functions_of(module, r.start.iter().chain(&r.end).copied());
    let run_on: Vec<Vec<Edge>> = functions
        .par_iter()
        .map(|function| {
            let Some(cfg) = graph(module, function) else { return Vec::new() };
            let ways = fall_throughs(module.image, &cfg).into_iter().enumerate();
            let edge = |(i, way): (usize, Option<RunsOn>)| {
                let RunsOn { last, to } = way?;
                Some(Edge::new(Some(last), Some(cfg.blocks[to].start), seen.run_on(cfg.blocks[i + 1].start)))
            };
            // What began at the entry and came by no branch of this module came from another one.
            let began = seen.covered(function.start);
            let known = seen.branches_to(function.start).fold(0, |sum: u64, b| sum.saturating_add(b.1));
            let entered = Edge::new(None, Some(function.start), began.saturating_sub(known));
            ways.filter_map(edge).chain([entered]).collect()
        })
        .collect();
    edges.extend(run_on.into_iter().flatten());
    edges
}

/// What inference makes of counted blocks. A function that was sampled and not counted has counts of time: they are
/// brought to the scale of the others by what a sample means in those.
fn counted(module: &Module<'_>, seen: &Seen<'_>) -> Vec<Edge> {
    let profile = seen.profile();
    let rows = profile.ranges.start.iter().chain(&profile.samples.addr);
    let layouts: Vec<FunctionLayout> = functions_of(module, rows.copied())
        .par_iter()
        .filter_map(|&function| {
            let mut layout = FunctionLayout::new(module.image, *function, graph(module, function)?);
            infer::run(&mut layout, seen, true);
            Some(layout)
        })
        .collect();
    let (mut instructions, mut samples) = (0u128, 0u128);
    for layout in layouts.iter().filter(|l| l.units_per_sample == 0) {
        let ran = layout.flow.nodes.iter().zip(&layout.info).map(|(&n, i)| u128::from(n) * u128::from(i.instructions));
        instructions += ran.sum::<u128>();
        samples += layout.samples.iter().map(|&s| u128::from(s)).sum::<u128>();
    }
    let scale = |layout: &FunctionLayout, count: u64| match layout.units_per_sample {
        0 => count,
        units => {
            let per_sample = instructions.checked_div(samples).unwrap_or(u128::from(units));
            let exact = u128::from(count).saturating_mul(per_sample) / u128::from(units);
            u64::try_from(exact).unwrap_or(u64::MAX).max(u64::from(count > 0))
        }
    };
    let mut edges = Vec::new();
    // By function: how often it was entered by calls and jumps that are known.
    let mut arrived: BTreeMap<LinkAddr, u64> = BTreeMap::new();
    for layout in &layouts {
        for edge in leaving(layout, seen).map(|e| Edge { count: scale(layout, e.count), ..e }) {
            let to = edge.to.filter(|&to| module.functions.at(to).is_some());
            if let Some(to) = to {
                let row = arrived.entry(to).or_default();
                *row = row.saturating_add(edge.count);
            }
            edges.push(Edge { to, ..edge });
        }
    }
    for layout in &layouts {
        let count = |n| scale(layout, n);
        let blocks = &layout.cfg.blocks;
        let ways = fall_throughs(module.image, &layout.cfg);
        edges.extend(layout.edges.iter().zip(&layout.flow.edges).filter_map(|(e, &n)| {
            let (mut from, mut to) = (blocks[e.from as usize].last, e.to as usize);
            if e.fall_through {
                RunsOn { last: from, to } = ways[e.from as usize]?;
            }
            Some(Edge::new(Some(from), Some(blocks[to].start), count(n)))
        }));
        let start = layout.function.start;
        let known = arrived.get(&start).copied().unwrap_or(0);
        edges.push(Edge::new(None, Some(start), count(layout.flow.entered[0]).saturating_sub(known)));
    }
    edges
}

/// Ways out of a function: calls, jumps to others, returns.
fn leaving<'a>(layout: &'a FunctionLayout, seen: &'a Seen<'_>) -> impl Iterator<Item = Edge> + 'a {
    let inside = |at: &LinkAddr| layout.cfg.block_at(*at).is_some();
    (0..layout.cfg.blocks.len()).flat_map(move |i| {
        let (block, info, ran, left) =
            (&layout.cfg.blocks[i], &layout.info[i], layout.flow.nodes[i], layout.flow.left[i]);
        let call = |&(offset, callee): &(u32, LinkAddr)| {
            Edge::new(Some(block.start.plus(u64::from(offset))), Some(callee), ran)
        };
        let out = match block.terminator {
            Terminator::Jump { target } | Terminator::Conditional { taken: target } => {
                (!inside(&target)).then_some(Some(target))
            }
            Terminator::Stop => (!info.fails).then_some(None),
            Terminator::Indirect { .. } => Some(None),
            Terminator::FallThrough => None,
        };
        let through = calls(block, ran, seen);
        // A jump through a pointer, of which the callees tell already.
        let told =
            through.iter().filter(|e| e.from == Some(block.last)).fold(0, |sum: u64, e| sum.saturating_add(e.count));
        let out = out.map(|to| Edge::new(Some(block.last), to, left.saturating_sub(told)));
        info.calls.iter().map(call).chain(through).chain(out).collect::<Vec<_>>()
    })
}

/// Calls through pointers, by the callees that were found at them: each its share of how often the block ran.
fn calls(block: &Block, ran: u64, seen: &Seen<'_>) -> Vec<Edge> {
    let rows: Vec<_> = seen.branches_from(block.start, block.end).collect();
    let looks = |at: LinkAddr| rows.iter().filter(|r| r.0 == at).map(|r| u128::from(r.2)).sum::<u128>().max(1);
    let edge = |&(from, to, n): &(LinkAddr, LinkAddr, u64)| {
        let count = u64::try_from(u128::from(ran) * u128::from(n) / looks(from)).unwrap_or(u64::MAX);
        Edge::new(Some(from), Some(to).filter(|&to| to != OUTSIDE), count)
    };
    rows.iter().map(edge).collect()
}

/// What edges, in any order, say of a module. `to_the_block`: a source is any instruction of its block, as after profiling
/// BOLT's own output.
#[must_use]
pub fn evidence(module: &Module<'_>, edges: &[Edge], to_the_block: bool) -> Evidence {
    let mut within: BTreeMap<LinkAddr, Vec<Edge>> = BTreeMap::new();
    let mut taken: BTreeMap<(LinkAddr, LinkAddr), (u64, u64)> = BTreeMap::new();
    let mut take = |from, edge: &Edge| {
        let row = taken.entry((from, edge.to.unwrap_or(OUTSIDE))).or_default();
        *row = (row.0.saturating_add(edge.count), row.1.saturating_add(edge.mispredicted));
    };
    for edge in edges.iter().filter(|e| e.count > 0) {
        let functions = [edge.from, edge.to].map(|at| module.functions.at(at?));
        // Each function needs all ways into it and out of it.
        let mut starts: Vec<_> = functions.into_iter().flatten().map(|f| f.start).collect();
        starts.dedup();
        starts.into_iter().for_each(|start| within.entry(start).or_default().push(*edge));
    }
    let within: Vec<(LinkAddr, Vec<Edge>)> = within.into_iter().collect();
    let stretches: Vec<(Vec<Edge>, Vec<Stretch>)> = within
        .par_iter()
        .map(|(start, edges)| {
            let function = module.functions.starting_at(*start);
            let cfg = function.and_then(|f| graph(module, f));
            let Some((function, cfg)) = function.zip(cfg) else {
                let jumps = |e: &&Edge| !e.from.zip(e.to).is_some_and(|(from, to)| is_next(module, from, to));
                return (edges.iter().filter(jumps).copied().collect(), Vec::new());
            };
            Ways::new(module, function, &cfg, edges, to_the_block).put_together()
        })
        .collect();
    let mut out = Evidence::default();
    for ((start, _), (jumps, ranges)) in within.iter().zip(stretches) {
        for edge in jumps {
            // Of a way between two functions the one that it leaves tells.
            let Some(from) = edge.from.filter(|&from| module.functions.at(from).is_none_or(|f| f.start == *start))
            else {
                continue;
            };
            take(from, &edge);
        }
        for (first, last, count) in ranges {
            out.ranges.start.push(first.0);
            out.ranges.end.push(last.0);
            out.ranges.count.push(count);
        }
    }
    for ((from, to), (count, mispredicted)) in taken.into_iter().take(MAX_ROWS) {
        out.branches.from.push(from.0);
        out.branches.to.push(to.0);
        out.branches.count.push(count);
        out.branches.mispredicted.push(mispredicted);
    }
    out
}

/// Whether the second address is that of the next instruction.
fn is_next(module: &Module<'_>, from: LinkAddr, to: LinkAddr) -> bool {
    let Some(bytes) = module.image.bytes_from(from) else { return false };
    let instruction = Decoder::with_ip(64, bytes, from.0, DecoderOptions::NONE).decode();
    !instruction.is_invalid() && instruction.next_ip() == to.0
}

/// One function, block by block: what came in from elsewhere and what ran on from the block before.
struct Ways<'a> {
    cfg: &'a Cfg,
    jumps: Vec<Edge>,
    /// By block: came in by a branch.
    came: Vec<u64>,
    /// By block: left by a branch at its end.
    left: Vec<u64>,
    /// By block: ran on into the next; `None` where nobody tells, as there is no boundary to BOLT: who came so far runs on.
    ran_on: Vec<Option<u64>>,
}

impl<'a> Ways<'a> {
    fn new(module: &Module<'_>, function: &Function, cfg: &'a Cfg, edges: &[Edge], to_the_block: bool) -> Self {
        let n = cfg.blocks.len();
        let ways = fall_throughs(module.image, cfg);
        let silent = |i: usize| runs_on(&cfg.blocks[i]) && ways[i].is_none();
        let ran_on = (0..n).map(|i| if silent(i) { None } else { Some(0) }).collect();
        let mut out = Self { cfg, jumps: Vec::new(), came: vec![0; n], left: vec![0; n], ran_on };
        let holding = |at: LinkAddr| cfg.block_holding(at).filter(|_| function.contains(at));
        for edge in edges {
            let mut edge = *edge;
            let (source, target) = (edge.from.and_then(holding), edge.to.and_then(holding));
            if let (Some(s), Some(from)) = (source, edge.from) {
                let (block, jumps) = (&cfg.blocks[s], ends_with_jump(&cfg.blocks[s]));
                let taken = matches!(block.terminator, Terminator::Conditional { taken } if Some(taken) == edge.to);
                let at_the_end = to_the_block || from == block.last || ways[s].is_some_and(|w| w.last == from);
                let arrives =
                    |w: &RunsOn| !taken && edge.to.is_some_and(|to| to >= block.end && to <= cfg.blocks[w.to].start);
                if ways[s].as_ref().is_some_and(|w| at_the_end && arrives(w)) {
                    out.ran_on[s] = Some(out.ran_on[s].unwrap_or(0).saturating_add(edge.count));
                    continue;
                }
                if to_the_block && jumps {
                    edge.from = Some(block.last);
                }
                if jumps && edge.from == Some(block.last) {
                    out.left[s] = out.left[s].saturating_add(edge.count);
                }
            }
            // Into the middle of a block, or where only we have a boundary, execution comes back from a call that had no end.
            let begins = |&t: &usize| Some(cfg.blocks[t].start) == edge.to && (t == 0 || !silent(t - 1));
            if let Some(t) = target.filter(begins) {
                out.came[t] = out.came[t].saturating_add(edge.count);
            }
            out.jumps.push(edge);
        }
        out
    }

    /// The branches, and stretches that cover each block as often as it ran, sorted.
    fn put_together(self) -> (Vec<Edge>, Vec<Stretch>) {
        let blocks = &self.cfg.blocks;
        let mut done: BTreeMap<(LinkAddr, LinkAddr), u64> = BTreeMap::new();
        // What runs, by where it began; the oldest ends first.
        let mut open: VecDeque<(LinkAddr, u64)> = VecDeque::new();
        for (i, block) in blocks.iter().enumerate() {
            let came_on: u64 = open.iter().fold(0, |sum, o| sum.saturating_add(o.1));
            let ran_on = self.ran_on[i];
            let gone = ran_on.unwrap_or(0).saturating_add(self.left[i]);
            let ran = came_on.saturating_add(self.came[i]).max(gone);
            if ran > came_on {
                open.push_back((block.start, ran - came_on));
            }
            let next_is_behind = blocks.get(i + 1).is_some_and(|b| b.start == block.end) && runs_on(block);
            let on = if next_is_behind { ran_on.unwrap_or(ran).min(ran) } else { 0 };
            end(&mut open, ran - on, block.last, &mut done);
        }
        let rows = done.into_iter().map(|((first, last), count)| (first, last, count));
        (self.jumps, rows.collect())
    }
}

/// Whether a branch ends it. (A call may, too: that comes back.)
fn ends_with_jump(block: &Block) -> bool {
    block.terminator != Terminator::FallThrough
}

/// Ends this many of the stretches that are open, the oldest first.
fn end(
    open: &mut VecDeque<(LinkAddr, u64)>,
    mut count: u64,
    last: LinkAddr,
    done: &mut BTreeMap<(LinkAddr, LinkAddr), u64>,
) {
    while count > 0
        && let Some((first, here)) = open.front_mut()
    {
        let ended = count.min(*here);
        let row = done.entry((*first, last)).or_default();
        *row = row.saturating_add(ended);
        (count, *here) = (count - ended, *here - ended);
        if *here == 0 {
            open.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{LEAF, Program, TEXT, WORK, branched, program};

    fn module(p: &Program) -> Module<'_> {
        Module { image: &p.image, functions: &p.functions, targets: &p.targets }
    }

    fn edge(from: u64, to: u64, count: u64) -> Edge {
        Edge::new(Some(LinkAddr(from)), Some(LinkAddr(to)), count)
    }

    /// `work` was called ten times from outside, went around its loop thirty times, and called `leaf`.
    fn loops(p: &Program) -> Vec<Edge> {
        let branches = [(WORK + 8, WORK + 6, 30), (WORK + 10, LEAF, 10)];
        let ranges = [(WORK, WORK + 8, 10), (WORK + 6, WORK + 8, 20), (WORK + 6, WORK + 10, 10)];
        let profile = branched(p, Method::Lbr, &branches, &ranges);
        edges(&module(p), &profile.modules[0], Method::Lbr)
    }

    #[test]
    fn stretches_become_ways_between_blocks() {
        let p = program();
        let wanted = [
            Edge::new(None, Some(LinkAddr(WORK)), 10),
            edge(WORK + 2, WORK + 4, 10),
            edge(WORK + 4, WORK + 6, 10),
            edge(WORK + 8, WORK + 6, 30),
            edge(WORK + 8, WORK + 10, 10),
            edge(WORK + 10, LEAF, 10),
        ];
        assert_eq!(loops(&p), wanted);
    }

    #[test]
    fn ways_become_stretches_that_say_the_same() {
        let p = program();
        let out = loops(&p);
        let back = evidence(&module(&p), &out, false);
        assert_eq!((back.branches.from, back.branches.to), (vec![WORK + 8, WORK + 10], vec![WORK + 6, LEAF]));
        let profile = branched(&p, Method::Lbr, &[(WORK + 8, WORK + 6, 30), (WORK + 10, LEAF, 10)], &[]);
        let mut module_profile = profile.modules[0].clone();
        module_profile.ranges = back.ranges;
        assert_eq!(edges(&module(&p), &module_profile, Method::Lbr), out);
        let seen = Seen::new(&module_profile, Method::Lbr);
        assert_eq!([0, 4, 6, 10].map(|at| seen.covered(LinkAddr(WORK + at))), [10, 10, 40, 10]);
    }

    #[test]
    fn counts_become_ways_by_inference() {
        let p = program();
        let blocks = [(WORK, WORK + 2, 10), (WORK + 6, WORK + 8, 40), (WORK + 16, WORK + 18, 0)];
        let profile = branched(&p, Method::Count, &[], &blocks);
        let ways = edges(&module(&p), &profile.modules[0], Method::Count);
        assert!(ways.contains(&edge(WORK + 8, WORK + 6, 30)), "{ways:?}");
        assert!(ways.contains(&edge(WORK + 8, WORK + 10, 10)), "{ways:?}");
        assert!(ways.contains(&edge(WORK + 10, LEAF, 10)), "{ways:?}");
        assert!(ways.contains(&Edge::new(Some(LinkAddr(WORK + 15)), None, 10)), "{ways:?}");
        assert!(ways.contains(&Edge::new(None, Some(LinkAddr(WORK)), 10)), "{ways:?}");
        assert!(ways.iter().all(|e| e.to != Some(LinkAddr(WORK + 16))), "{ways:?}");
    }

    #[test]
    fn after_bolt_a_source_is_its_block() {
        let p = program();
        let out = evidence(&module(&p), &[edge(WORK + 6, WORK + 6, 3), edge(WORK, WORK + 4, 3)], true);
        assert_eq!((out.branches.from, out.branches.to), (vec![WORK + 8], vec![WORK + 6]));
    }

    #[test]
    fn ways_that_make_no_sense_do_no_harm() {
        let p = program();
        for from in (TEXT - 2..TEXT + 0x40).step_by(3) {
            for to in TEXT - 2..TEXT + 0x40 {
                for count in [1, u64::MAX] {
                    let out = evidence(&module(&p), &[edge(from, to, count), edge(to, from, u64::MAX)], to % 2 == 0);
                    let profile = ModuleProfile {
                        build_id: p.image.build_id().clone(),
                        branches: out.branches,
                        ranges: out.ranges,
                        ..ModuleProfile::default()
                    };
                    let mut whole = branched(&p, Method::Lbr, &[], &[]);
                    whole.modules = vec![profile];
                    assert_eq!(whole.validate(), Ok(()));
                    assert!(edges(&module(&p), &whole.modules[0], Method::Lbr).is_sorted());
                }
            }
        }
    }
}
