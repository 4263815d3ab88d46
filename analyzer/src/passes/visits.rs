//! Pass `visits`: leaves out functions of libraries that are mostly called from elsewhere.
//!
//! Calls from another module come by way of its linkage table to the original's entry, where a patch leads to the copy: a
//! taken branch each time, and a line of the original. In the module in which a program spends its time that is made up for
//! by code that lies close together; in a library that is only called now and then, by nothing but the taken branches
//! that the better layout saves. A function stays in the original if those are fewer than the visits to it. What it would
//! have called in the cache is then visited from the original too, so this goes on until nothing changes.

use super::{FunctionLayout, Pass, PassStats};
use crate::cfg::Terminator;
use crate::stats::{LayoutStats, Places};
use dyni_schema::LinkAddr;
use std::collections::HashMap;

/// Whether each of a module's functions, by rising address, is worth a copy.
#[must_use]
pub fn run(layouts: &[FunctionLayout]) -> (Vec<bool>, PassStats) {
    let index = |at: LinkAddr| layouts.binary_search_by_key(&at, |l| l.function.start).ok();
    // Calls and jumps to other functions of the module, by caller.
    let calls: Vec<HashMap<usize, u64>> = layouts.iter().map(|l| calls_of(l, &index)).collect();
    let saved: Vec<u64> = layouts.iter().map(saved).collect();
    let mut kept = vec![true; layouts.len()];
    let mut spared = 0u64;
    loop {
        let from_copies = |callee: usize| {
            let callers = calls.iter().enumerate().filter(|&(caller, _)| kept[caller] && caller != callee);
            callers.filter_map(|(_, calls)| calls.get(&callee)).fold(0u64, |sum, n| sum.saturating_add(*n))
        };
        let visits = |f: usize| {
            let entered = layouts[f].flow.entered.iter().fold(0u64, |sum, n| sum.saturating_add(*n));
            entered.saturating_sub(from_copies(f))
        };
        let out: Vec<usize> = (0..layouts.len()).filter(|&f| kept[f] && saved[f] < visits(f)).collect();
        if out.is_empty() {
            break;
        }
        spared = out.iter().fold(spared, |sum, &f| sum.saturating_add(visits(f)));
        out.into_iter().for_each(|f| kept[f] = false);
    }
    let numbers = [
        ("functions of libraries", layouts.len() as u64),
        ("of them left as they are", kept.iter().filter(|k| !**k).count() as u64),
        ("visits spared", spared),
        ("", 0),
    ];
    (kept, PassStats { pass: Pass::Visits, numbers })
}

/// The taken branches that a function's new layout saves.
fn saved(layout: &FunctionLayout) -> u64 {
    let alone = std::slice::from_ref(layout);
    let taken = |places: &Places| LayoutStats::of(alone, places).taken_branches;
    taken(&Places::original(alone)).saturating_sub(taken(&Places::planned(alone, &[0])))
}

fn calls_of(layout: &FunctionLayout, index: &dyn Fn(LinkAddr) -> Option<usize>) -> HashMap<usize, u64> {
    let mut calls: HashMap<usize, u64> = HashMap::new();
    for (b, (block, info)) in layout.cfg.blocks.iter().zip(&layout.info).enumerate() {
        let (runs, leaves) = (layout.flow.nodes[b], layout.flow.left[b]);
        let mut add = |to: LinkAddr, count: u64| {
            if let Some(callee) = index(to) {
                let sum = calls.entry(callee).or_default();
                *sum = sum.saturating_add(count);
            }
        };
        info.calls.iter().for_each(|&(_, to)| add(to, runs));
        if let Terminator::Jump { target } | Terminator::Conditional { taken: target } = block.terminator {
            add(target, leaves);
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::PassSet;
    use crate::passes::infer::Evidence;
    use crate::plan::{Module, lay_out};
    use crate::testing::{WORK, branched, program};
    use dyni_schema::Method;

    #[test]
    fn a_function_that_is_visited_more_often_than_its_layout_saves_branches_stays() {
        let p = program();
        let module = Module { image: &p.image, functions: &p.functions, targets: &p.targets };
        // The entry mostly goes to the block at the end.
        let counted = [(WORK, WORK + 2, 1000), (WORK + 6, WORK + 8, 1), (WORK + 0x10, WORK + 0x12, 999)];
        let seen = branched(&p, Method::Count, &[], &counted);
        let evidence = Evidence::new(&seen.modules[0], Method::Count);
        let function = *p.functions.starting_at(LinkAddr(WORK)).unwrap();
        let (mut layout, _) = lay_out(&module, function, &evidence, PassSet::ALL).unwrap();
        let saves = saved(&layout);
        assert!(saves > 0);
        let mut kept = |visits| {
            layout.flow.entered.fill(0);
            layout.flow.entered[0] = visits;
            run(std::slice::from_ref(&layout)).0[0]
        };
        assert!(kept(saves) && !kept(saves + 1));
    }
}
