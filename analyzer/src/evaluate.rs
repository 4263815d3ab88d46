//! What a plan is worth under a profile that it need not have been made from: of a stale profile, of another workload.

use crate::passes::infer::Evidence;
use crate::passes::{FunctionLayout, Pass, PassSet};
use crate::plan::{Error, Module, Options, Seen, chosen_modules, lay_out};
use crate::stats::{LayoutStats, Places};
use dyni_schema::{Method, ModulePlan, Plan, Profile};
use rayon::prelude::*;

/// The layout of a profile's hot functions, as they lie in their files and with a plan in force.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Worth {
    /// As they lie in the files.
    pub original: LayoutStats,
    /// With the plan in force. Functions that it does not have stay where they are and count as they lie there.
    pub planned: LayoutStats,
}

/// What `plan` is worth where the program does what `profile` says. Only modules of which both are there are looked at.
///
/// # Errors
/// The profile is damaged.
pub fn evaluate(plan: &Plan, profile: &Profile, modules: &[Module<'_>], options: &Options) -> Result<Worth, Error> {
    profile.validate()?;
    let (chosen, ..) = chosen_modules(profile, modules, options);
    let mut worth = Worth::default();
    for (seen, module) in chosen {
        let evidence = Evidence::new(seen, profile.method);
        let hot = Seen::of(module.functions, seen, profile.method == Method::Count).covering(options.coverage_ppm);
        let passes = PassSet::NONE.with(Pass::Infer);
        let lay_out = |&(index, _): &(u32, u64)| {
            let function = module.functions.all()[index as usize];
            lay_out(module, function, &evidence, passes).ok().map(|l| l.0)
        };
        let mut layouts: Vec<FunctionLayout> = hot.par_iter().filter_map(lay_out).collect();
        layouts.sort_by_key(|l| l.function.start);
        worth.original.add(&LayoutStats::of(&layouts, &Places::original(&layouts)));
        let Some(plan) = plan.modules.iter().find(|m| m.build_id == seen.build_id) else {
            worth.planned.add(&LayoutStats::of(&layouts, &Places::original(&layouts)));
            continue;
        };
        let (mut copied, stays): (Vec<_>, Vec<_>) = layouts.into_iter().partition(|l| in_plan(plan, l).is_some());
        copied.sort_by_key(|l| in_plan(plan, l));
        copied.iter_mut().for_each(|l| take_order(plan, l));
        let order: Vec<u32> = (0..copied.len() as u32).collect();
        worth.planned.add(&LayoutStats::of(&copied, &Places::planned(&copied, &order)));
        worth.planned.add(&LayoutStats::of(&stays, &Places::original(&stays)));
    }
    Ok(worth)
}

/// Which of the plan's functions one is.
fn in_plan(plan: &ModulePlan, layout: &FunctionLayout) -> Option<usize> {
    plan.functions.iter().position(|f| f.start() == layout.function.start && f.size == layout.function.size)
}

/// Gives a function the order of blocks that the plan has for it. Parts of blocks go with their blocks.
fn take_order(plan: &ModulePlan, layout: &mut FunctionLayout) {
    let Some(planned) = in_plan(plan, layout).map(|i| &plan.functions[i]) else { return };
    let block = |&offset: &u32| layout.cfg.block_at(planned.start().plus(u64::from(offset))).map(|b| b as u32);
    let hot: Vec<u32> = planned.blocks.iter().take(planned.hot as usize).filter_map(block).collect();
    let all: Vec<u32> = planned.blocks.iter().filter_map(block).collect();
    (layout.hot, layout.order) = (hot.len(), all);
}
