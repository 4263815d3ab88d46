//! The plan for a counting generation: copies that are laid out as they were and count how often their blocks run.
//!
//! Samples say which functions are hot; these are counted, and with them the functions that they call, two calls deep:
//! under sparse samples many a function that runs all the time was never hit.

use crate::cfg::{self, Terminator};
use crate::functions::function_hash;
use crate::image::Image;
use crate::passes::infer::Evidence;
use crate::passes::{FunctionLayout, entries, infer};
use crate::plan::{self, Error, Module, Options, Seen, chosen_modules};
use crate::{calls, probes, refuse};
use dyni_schema::{CallSite, FunctionPlan, LinkAddr, ModulePlan, ModuleProfile, Plan, PlanKind, Profile};
use rayon::prelude::*;
use std::collections::BTreeSet;

/// How many calls a function may be away from a sampled one.
const DEPTH: usize = 2;
/// The most bytes of functions that are counted for want of evidence: a cache is 2 MB, and copies that count are larger.
const MAX_CALLED: u64 = 768 << 10;

/// Makes the plan that counts what a profile of samples found hot. `modules` as for [`crate::plan::analyze`].
///
/// # Errors
/// If the profile is damaged or none of its modules is there.
pub fn counting_plan(profile: &Profile, modules: &[Module<'_>], options: &Options) -> Result<Plan, Error> {
    profile.validate()?;
    let (chosen, missing, _) = chosen_modules(profile, modules, options);
    if chosen.is_empty() && !missing.is_empty() {
        return Err(Error::NoModule(missing.join(", ")));
    }
    let mut plan = Plan {
        program: profile.program.clone(),
        kind: PlanKind::Counting,
        passes: vec!["count".to_owned()],
        profile: options.profile_hash,
        modules: Vec::new(),
    };
    for (seen, module) in chosen {
        let functions = count_module(module, seen, profile, options);
        if !functions.is_empty() {
            plan.modules.push(ModulePlan { build_id: seen.build_id.clone(), name: seen.name.clone(), functions });
        }
    }
    debug_assert_eq!(plan.validate(), Ok(()));
    Ok(plan)
}

fn count_module(module: &Module<'_>, seen: &ModuleProfile, profile: &Profile, options: &Options) -> Vec<FunctionPlan> {
    if refuse::module_refusal(module.image).is_some() {
        return Vec::new();
    }
    let unwind = refuse::Options { unwind_registered: options.unwind_registered, others_throw: false };
    let may_unwind = (!options.unwind_registered)
        .then(|| refuse::may_unwind(module.image, module.functions, module.targets, unwind));
    let evidence = Evidence::new(seen, profile.method);
    let lay_out = |&(index, weight): &(u32, u64)| {
        let function = module.functions.all()[index as usize];
        if may_unwind.as_ref().is_some_and(|set| set.has(index as usize)) {
            return None;
        }
        let graph = cfg::build(module.image, module.functions, module.targets, &function).ok()?;
        let mut layout = FunctionLayout::new(module.image, function, graph);
        layout.weight = weight;
        infer::run(&mut layout, &evidence, true);
        layout.entries = entries::all(&layout);
        (!layout.entry_stays()).then_some(layout)
    };
    let mut met: BTreeSet<u32> = BTreeSet::new();
    let mut wave: Vec<(u32, u64)> = Seen::of(module.functions, seen, evidence.is_counted()).covering(1_000_000);
    let mut layouts: Vec<FunctionLayout> = Vec::new();
    let mut called_bytes = 0;
    for depth in 0..=DEPTH {
        wave.retain(|w| met.insert(w.0));
        let done: Vec<_> = wave.par_iter().with_max_len(1).filter_map(lay_out).collect();
        let mut next = BTreeSet::new();
        for layout in &done {
            next.extend(callees(layout).filter_map(|at| module.functions.index_at(at)).map(|i| i as u32));
        }
        if depth > 0 {
            called_bytes += done.iter().map(|l| u64::from(l.function.size)).sum::<u64>();
        }
        layouts.extend(done);
        if called_bytes > MAX_CALLED {
            break;
        }
        wave = next.into_iter().map(|index| (index, 0)).collect();
    }
    layouts.sort_by_key(|l| l.function.start);
    layouts.par_iter_mut().for_each(|l| {
        l.probes = probes_of(module.image, l);
        l.calls = calls_of(module.image, l);
    });
    layouts.par_iter().map(|l| plan::function_plan(l, function_hash(module.image, &l.function))).collect()
}

/// The functions that a function calls, or jumps to, where it is not about to fail.
fn callees(layout: &FunctionLayout) -> impl Iterator<Item = LinkAddr> + '_ {
    let lives = layout.cfg.blocks.iter().zip(&layout.info).filter(|(_, info)| !info.fails);
    lives.flat_map(|(block, info)| {
        let jump = match block.terminator {
            Terminator::Jump { target } => Some(target),
            _ => None,
        };
        info.calls.iter().map(|c| c.1).chain(jump)
    })
}

/// The calls through pointers whose targets are recorded: all that can be.
fn calls_of(image: &Image, layout: &FunctionLayout) -> Vec<CallSite> {
    let code = image.bytes(layout.cfg.start, layout.function.size as usize).unwrap_or(&[]);
    let sites = calls::sites(&layout.cfg, code).into_iter();
    let copied = sites.filter(|s| layout.order.binary_search(&(s.block as u32)).is_ok());
    copied.map(|s| CallSite { at: s.at.distance(layout.cfg.start) as u32, callee: 0 }).collect()
}

/// The blocks that must be counted for all counts to be known.
fn probes_of(image: &Image, layout: &FunctionLayout) -> Vec<u32> {
    let countable = |b: usize| layout.order.binary_search(&(b as u32)).is_ok() && layout.can_count(image, b as u32);
    let chosen = probes::choose(&layout.cfg, &countable, &|b| layout.flow.nodes[b]);
    chosen.into_iter().map(|b| b as u32).collect()
}
