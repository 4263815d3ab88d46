//! The yardstick: what it is measured by whether a layout pays.
//!
//! A program's work can't be seen from outside, but every piece of it runs the same code whatever the layout. So a few
//! blocks are counted in the new layout and, in a second plan that changes nothing else, in the old one; executions per
//! CPU time, new to old, is the gain. The blocks run often enough to be counted in a fraction of a second and seldom
//! enough that counting costs nothing, and they are entries of functions where there are such: an entry stands for a
//! piece of work rather than for a turn of a loop.

use crate::image::Image;
use crate::passes::FunctionLayout;
use dyni_schema::{FunctionPlan, ModulePlan, Plan, PlanKind};
use std::cmp::Reverse;

/// How many functions of a module are counted.
const FUNCTIONS: usize = 16;
/// How many bytes of code are to run for one execution of a counted block: a processor runs some 10^10 in a second.
const BYTES_PER_RUN: u64 = 1 << 20;
/// How far a function's entry may be from that, as a factor, to be counted before blocks that are nearer.
const NEAR: u64 = 16;
/// A function that has more of the program's time than one part in this many is counted only for want of others: a copy
/// is never quite what the original was, and here it stands for it.
const LIGHT: u128 = 256;

/// Chooses the blocks of a module by which its layout is measured: fills `probes`.
pub fn choose(image: &Image, layouts: &mut [FunctionLayout]) {
    let runs = |l: &FunctionLayout, b: u32| l.flow.nodes[b as usize];
    let bytes =
        |l: &FunctionLayout| l.order.iter().map(|&b| u128::from(runs(l, b)) * u128::from(l.size(b))).sum::<u128>();
    let total: u128 = layouts.iter().map(bytes).sum();
    let wanted = u64::try_from(total / u128::from(BYTES_PER_RUN)).unwrap_or(u64::MAX).max(1);
    // How far from what is wanted, in sixteenths of a factor.
    let distance = |count: u64| (u128::from(count.max(wanted)) * 16 / u128::from(count.min(wanted))) as u64;
    let mut candidates: Vec<(bool, Reverse<bool>, u64, usize, u32)> = Vec::new();
    for (index, layout) in layouts.iter().enumerate() {
        let hot = layout.order[..layout.hot].iter().copied();
        let mut blocks: Vec<_> = hot.filter(|&b| runs(layout, b) > 0).map(|b| (distance(runs(layout, b)), b)).collect();
        blocks.sort_unstable();
        let entry = blocks.iter().position(|&(distance, b)| b == 0 && distance <= NEAR * 16);
        if let Some(entry) = entry {
            blocks[..=entry].rotate_right(1);
        }
        // The blocks of one function say much the same.
        if let Some(&(distance, b)) = blocks.iter().take(FUNCTIONS).find(|(_, b)| layout.can_count(image, *b)) {
            let is_heavy = bytes(layout) * LIGHT > total;
            candidates.push((is_heavy, Reverse(entry.is_some() && b == 0), distance, index, b));
        }
    }
    candidates.sort_unstable();
    for (_, _, _, index, block) in candidates.into_iter().take(FUNCTIONS) {
        layouts[index].probes = vec![block];
    }
}

/// The plan that counts the same blocks and leaves everything as it was: copies of the counted functions, in their
/// original order. Empty if nothing is counted.
#[must_use]
pub fn plan(layout: &Plan) -> Plan {
    let as_it_was = |f: &FunctionPlan| {
        let mut blocks = f.blocks.clone();
        blocks.sort_unstable();
        FunctionPlan { hot: blocks.len() as u32, blocks, calls: Vec::new(), ..f.clone() }
    };
    let module = |m: &ModulePlan| {
        let mut functions: Vec<_> = m.functions.iter().filter(|f| !f.probes.is_empty()).map(as_it_was).collect();
        functions.sort_by_key(|f| f.start);
        ModulePlan { functions, ..m.clone() }
    };
    let modules = layout.modules.iter().map(module).filter(|m| !m.functions.is_empty()).collect();
    Plan { kind: PlanKind::Counting, passes: vec!["yardstick".to_owned()], modules, ..layout.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Module, Options, analyze};
    use crate::testing::{WORK, branched, program};
    use dyni_schema::Method;

    #[test]
    fn what_is_counted_runs_now_and_then_and_lies_as_it_did() {
        let p = program();
        let often = 1 << 22;
        let counted = [(WORK, WORK + 2, 8), (WORK + 6, WORK + 8, often), (WORK + 0x10, WORK + 0x12, 0)];
        let seen = branched(&p, Method::Count, &[], &counted);
        let module = Module { image: &p.image, functions: &p.functions, targets: &p.targets };
        let analysis = analyze(&seen, &[module], &Options::default()).unwrap();
        let work = &analysis.plan.modules[0].functions[0];
        // The loop runs half a million times as often as what surrounds it.
        assert_eq!(work.probes, [0]);
        let before = plan(&analysis.plan);
        assert_eq!(before.validate(), Ok(()));
        assert_eq!(before.kind, PlanKind::Counting);
        let same = &before.modules[0].functions[0];
        assert!(same.blocks.is_sorted() && same.hot as usize == same.blocks.len());
        assert_eq!((same.start, &same.probes, &same.entries), (work.start, &work.probes, &work.entries));
    }
}
