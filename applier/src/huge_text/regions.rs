//! Which text is moved: whole huge pages inside a module's executable segments, those that a plan's functions lie in.

use crate::place::HUGE;
use dyni_collector::maps::MappedModule;
use dyni_schema::{LinkAddr, ModulePlan, Plan, RunAddr};
use std::ops::Range;

/// A run of whole huge pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    pub start: RunAddr,
    pub end: RunAddr,
}

impl Region {
    pub fn size(&self) -> u64 {
        self.end.0 - self.start.0
    }
}

/// The regions to move, each as long as can be.
pub(super) fn of<'m>(modules: &'m [MappedModule], plan: Option<&Plan>) -> Vec<(&'m MappedModule, Region)> {
    let mut all = Vec::new();
    for module in modules {
        let part = plan.map(|p| p.modules.iter().find(|m| m.build_id == module.build_id));
        let wanted = |page: &Range<u64>| match part {
            None => true,
            Some(None) => false,
            Some(Some(part)) => holds_function(part, module.bias, page),
        };
        for text in &module.text {
            let (first, end) = (text.start.0.next_multiple_of(HUGE), text.end.0 & !(HUGE - 1));
            let pages: Vec<u64> = (first..end).step_by(HUGE as usize).filter(|&at| wanted(&(at..at + HUGE))).collect();
            let runs = pages.chunk_by(|a, b| a + HUGE == *b);
            all.extend(runs.map(|run| {
                let region = Region { start: RunAddr(run[0]), end: RunAddr(run[run.len() - 1] + HUGE) };
                (module, region)
            }));
        }
    }
    all
}

fn holds_function(part: &ModulePlan, bias: u64, page: &Range<u64>) -> bool {
    let link = |at: u64| RunAddr(at).link(bias);
    let (start, end): (LinkAddr, LinkAddr) = (link(page.start), link(page.end));
    part.functions.iter().any(|f| f.start < end.0 && start.0 < f.start + u64::from(f.size))
}
