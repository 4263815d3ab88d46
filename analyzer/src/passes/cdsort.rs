//! Pass `cdsort`: the order of a module's functions; see [`crate::cdsort`].
//!
//! The calls are those that the profile saw (LBR, which knows indirect ones too), else the direct calls, the promoted ones and
//! tail jumps in blocks with a count. Calls through the PLT go to other modules or hide their target, and are not followed.

use super::infer::Evidence;
use super::{FunctionLayout, Pass, PassStats};
use crate::cdsort::{SortCall, SortFunction, sort};
use crate::cfg::Terminator;
use dyni_schema::LinkAddr;
use std::collections::{BTreeMap, BTreeSet};

/// An order of the functions, which are given by rising address.
#[must_use]
pub fn run(layouts: &[FunctionLayout], evidence: &Evidence<'_>) -> (Vec<u32>, PassStats) {
    let functions: Vec<SortFunction> = layouts
        .iter()
        .map(|l| SortFunction {
            size: u32::try_from(l.hot_bytes()).unwrap_or(u32::MAX),
            count: l.flow.entered.iter().fold(0, |sum, &c| sum.saturating_add(c)),
        })
        .collect();
    let index = |at: LinkAddr| layouts.binary_search_by_key(&at, |l| l.function.start).ok().map(|i| i as u32);
    let mut calls: BTreeMap<(u32, u32, u32), u64> = BTreeMap::new();
    for (from, layout) in layouts.iter().enumerate() {
        let mut add = |offset: u32, to: LinkAddr, count: u64| {
            if let Some(to) = index(to).filter(|&to| to as usize != from && count > 0) {
                let sum = calls.entry((from as u32, to, offset)).or_default();
                *sum = sum.saturating_add(count);
            }
        };
        let mut at = 0;
        for &b in &layout.order[..layout.hot] {
            let (block, info) = (&layout.cfg.blocks[b as usize], &layout.info[b as usize]);
            if evidence.has_branches() {
                for (branch, to, count) in evidence.branches_from(block.start, block.end) {
                    add(at + (branch.0 - block.start.0) as u32, to, count);
                }
            } else {
                let promoted = layout.calls.iter().filter_map(|c| {
                    let offset = c.at.checked_sub(layout.offset(b)).filter(|&o| o < layout.size(b))?;
                    Some((offset, LinkAddr(c.callee)))
                });
                for (offset, to) in info.calls.iter().copied().chain(promoted) {
                    add(at + offset, to, layout.flow.nodes[b as usize]);
                }
                if let Terminator::Jump { target } | Terminator::Conditional { taken: target } = block.terminator {
                    add(at + layout.size(b), target, layout.flow.left[b as usize]);
                }
            }
            at += layout.size(b);
        }
    }
    let calls: Vec<SortCall> =
        calls.into_iter().map(|((from, to, offset), count)| SortCall { from, to, count, offset }).collect();
    let order = sort(&functions, &calls);
    let pairs: BTreeSet<(u32, u32)> = calls.iter().map(|c| (c.from.min(c.to), c.from.max(c.to))).collect();
    let adjacent = order.windows(2).filter(|w| pairs.contains(&(w[0].min(w[1]), w[0].max(w[1]))));
    let numbers = [
        ("functions", functions.len() as u64),
        ("call sites between them", calls.len() as u64),
        ("neighbours that call each other", adjacent.count() as u64),
        ("", 0),
    ];
    (order, PassStats { pass: Pass::CdSort, numbers })
}
