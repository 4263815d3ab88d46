//! Pass `dispatch`: leaves out functions that go from jump to jump through tables, as interpreters do.
//!
//! A jump through a table that was not cloned, or to a label, arrives in the original, where a patch leads back to the copy:
//! one more taken branch each time. Where that is more than the new layout saves, the function is better off as it is. (CPython's
//! bytecode loop: 0.965 of the original's speed with it in the cache, 1.022 without; see bench/README.md.)

use super::{FunctionLayout, Pass, PassStats};
use crate::cfg::Terminator;
use crate::stats::{LayoutStats, Places};

/// Whether the function is worth a copy.
pub fn run(layout: &FunctionLayout) -> (bool, PassStats) {
    // Without a table that was understood, and without labels, it is a call at the function's end.
    let has_labels = layout.cfg.blocks.iter().any(|b| b.address_taken);
    let through_original = |block: usize| match layout.cfg.blocks[block].terminator {
        Terminator::Indirect { table: Some(_) } => !layout.cloned[block],
        Terminator::Indirect { table: None } => has_labels,
        _ => false,
    };
    let nodes = layout.flow.nodes.iter().enumerate();
    let jumps = nodes.filter(|(b, _)| through_original(*b)).fold(0u64, |sum, (_, n)| sum.saturating_add(*n));
    let alone = std::slice::from_ref(layout);
    let taken = |places: &Places| LayoutStats::of(alone, places).taken_branches;
    let saved = || taken(&Places::original(alone)).saturating_sub(taken(&Places::planned(alone, &[0])));
    let saved = if jumps > 0 { saved() } else { 0 };
    let numbers = [
        ("functions with jumps through the original's tables", u64::from(jumps > 0)),
        ("such jumps", jumps),
        ("taken branches that they save", saved),
        ("", 0),
    ];
    (saved >= jumps, PassStats { pass: Pass::Dispatch, numbers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::PassSet;
    use crate::passes::infer::Evidence;
    use crate::plan::{Module, lay_out};
    use crate::testing::{WORK, branched, program};
    use dyni_schema::{LinkAddr, Method};

    #[test]
    fn a_function_of_many_jumps_through_tables_stays_where_it_is() {
        let p = program();
        let counted = [(WORK, WORK + 2, 1000), (WORK + 6, WORK + 8, 10_000), (WORK + 0x10, WORK + 0x12, 0)];
        let seen = branched(&p, Method::Count, &[], &counted);
        let evidence = Evidence::new(&seen.modules[0], Method::Count);
        let module = Module { image: &p.image, functions: &p.functions, targets: &p.targets };
        let function = *p.functions.starting_at(LinkAddr(WORK)).unwrap();
        let (mut layout, _) = lay_out(&module, function, &evidence, PassSet::ALL).unwrap();
        assert!(run(&layout).0, "it has none");
        // As if its loop went round by a table.
        layout.cfg.blocks[2].terminator = Terminator::Indirect { table: Some(0) };
        let (kept, stats) = run(&layout);
        assert!(!kept, "{stats}");
        assert_eq!(stats.numbers[1].1, 10_000);
        // Or by labels that nobody knows.
        layout.cfg.blocks[2].terminator = Terminator::Indirect { table: None };
        assert!(run(&layout).0, "then it is a call at the end");
        layout.cfg.blocks[2].address_taken = true;
        assert!(!run(&layout).0);
    }
}
