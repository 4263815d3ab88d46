//! From a profile and the binaries it names to a plan: the analyzer's front door.
//!
//! Pure and deterministic: functions are analysed in parallel, but each depends on nothing but the profile and its own
//! module, and results are put together in order of address. The same profile and the same binaries give the same bytes on
//! any host and any number of threads.

use crate::cfg::{self, GiveUp, KeepOriginal};
use crate::functions::{Function, Functions, function_hash};
use crate::image::Image;
use crate::passes::infer::Evidence;
use crate::passes::{self, FunctionLayout, Pass, PassSet, PassStats};
use crate::refuse::{self, Runtime};
use crate::stale;
use crate::stats::{LayoutStats, Places};
use crate::targets::TargetIndex;
use crate::yardstick;
use dyni_schema::{
    BuildId, FunctionIndex, FunctionPlan, Invalid, LinkAddr, ModulePlan, ModuleProfile, Plan, PlanKind, Profile, Shapes,
};
use rayon::prelude::*;

/// A module and what was found out about it.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// The file.
    pub image: &'a Image,
    /// Its functions.
    pub functions: &'a Functions,
    /// Where execution may arrive in it.
    pub targets: &'a TargetIndex,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which passes run.
    pub passes: PassSet,
    /// Functions are taken, hottest first, until they have this share of a module's samples, in parts per million.
    pub coverage_ppm: u32,
    /// A module with less than this share of the samples is left as it is, in parts per million. Calls from other modules
    /// come to the original's entry, where a patch costs each of them a jump: a library that is only called now and then
    /// has less to gain from a better layout than that.
    pub min_share_ppm: u32,
    /// What goes into [`Plan::profile`].
    pub profile_hash: [u8; 32],
    /// Whether copies are registered with the unwinder. Without it functions that may be on the stack of a throw are
    /// refused here; with it, where registering fails, by the applier.
    pub unwind_registered: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            passes: PassSet::ALL,
            coverage_ppm: 999_000,
            min_share_ppm: 40_000,
            profile_hash: [0; 32],
            unwind_registered: true,
        }
    }
}

/// Why nothing can be analysed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The profile breaks a rule of its type.
    #[error("the profile is damaged: {0}")]
    Profile(#[from] Invalid),
    /// None of the modules that the profile names was given.
    #[error("none of the binaries that the profile was taken from is here (it names {0})")]
    NoModule(String),
}

/// Why a function, or all of a module, stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its code was not understood, or must not be copied.
    Function(GiveUp),
    /// Its first block must stay in the original, so there is nothing to enter a copy by.
    Entry(KeepOriginal),
    /// It goes through jump tables more often than a better layout of it saves branches, and each time through the
    /// original, as tables are not cloned.
    Dispatch,
    /// Its module belongs to a runtime that looks at return addresses or rewrites code.
    Module(&'static Runtime),
}

impl Reason {
    /// One line for people, to follow the function's name.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Function(why) => why.text(),
            Self::Entry(KeepOriginal::CallerIsObserved) => {
                "calls, in its first block, a function that looks at its caller"
            }
            Self::Entry(KeepOriginal::ReadsOwnAddress) => "reads its own address in its first block",
            Self::Entry(KeepOriginal::LandingPad) => "begins with an exception's landing pad",
            Self::Entry(KeepOriginal::Instruction) => "has an instruction in its first block that can't be copied",
            Self::Dispatch => "goes through jump tables more often than a better layout saves branches",
            Self::Module(runtime) => runtime.reason,
        }
    }
}

/// A function that was hot enough and is not in the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Its module.
    pub build_id: BuildId,
    /// Its first byte.
    pub start: LinkAddr,
    /// Why.
    pub reason: Reason,
    /// How hot it was: samples, or branches where there are none.
    pub weight: u64,
}

/// What was found in one module.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleReport {
    /// Which file.
    pub build_id: BuildId,
    /// Its base name.
    pub name: String,
    /// Samples (or branches) in the module.
    pub weight: u64,
    /// Those of them that no function has: PLT stubs, code without unwind data.
    pub outside: u64,
    /// Those of them in functions of the plan.
    pub planned: u64,
    /// Functions in which anything was seen.
    pub seen: u64,
    /// As the planned functions lie in the file.
    pub before: LayoutStats,
    /// As they would lie in the cache.
    pub after: LayoutStats,
    /// What each pass that ran did.
    pub passes: Vec<PassStats>,
}

/// A plan and how it came about.
#[derive(Clone, Debug, PartialEq)]
pub struct Analysis {
    /// The plan.
    pub plan: Plan,
    /// By module (as in the plan), then hottest first.
    pub refused: Vec<Refused>,
    /// By module, as in the profile; also those without any planned function.
    pub modules: Vec<ModuleReport>,
    /// Base names of modules of the profile that were not given.
    pub missing: Vec<String>,
    /// Base names of modules that have too small a share of the samples.
    pub minor: Vec<String>,
}

/// Makes the plan for a profile. `modules` are those that could be read, in any order; they are found by build-id.
///
/// # Errors
/// If the profile is damaged or none of its modules is there.
pub fn analyze(profile: &Profile, modules: &[Module<'_>], options: &Options) -> Result<Analysis, Error> {
    profile.validate()?;
    let passes = options.passes.iter().map(|p| p.name().to_owned()).collect();
    let mut analysis = Analysis {
        plan: Plan {
            program: profile.program.clone(),
            kind: PlanKind::Layout,
            passes,
            profile: options.profile_hash,
            modules: Vec::new(),
        },
        refused: Vec::new(),
        modules: Vec::new(),
        missing: Vec::new(),
        minor: Vec::new(),
    };
    let (chosen, missing, minor) = chosen_modules(profile, modules, options);
    (analysis.missing, analysis.minor) = (missing, minor);
    // What libraries do is not the program's work: they are called for it, now more, now less.
    let main = chosen.iter().map(|(seen, _)| weight_of(seen)).max();
    for (seen, module) in chosen {
        let evidence = Evidence::new(seen, profile.method);
        let (functions, refused, report) = analyze_module(module, &evidence, options, Some(weight_of(seen)) == main);
        analysis.refused.extend(refused);
        analysis.modules.push(report);
        if !functions.is_empty() {
            let plan = ModulePlan { build_id: seen.build_id.clone(), name: seen.name.clone(), functions };
            analysis.plan.modules.push(plan);
        }
    }
    if analysis.modules.is_empty() && !analysis.missing.is_empty() {
        return Err(Error::NoModule(analysis.missing.join(", ")));
    }
    debug_assert_eq!(analysis.plan.validate(), Ok(()));
    Ok(analysis)
}

/// A module of a profile, with its code.
type Chosen<'p, 'm> = (&'p ModuleProfile, &'m Module<'m>);

/// The modules of a profile that are worth it and are there; the names of those that are not there, and of those that
/// have too small a share of the samples.
pub(crate) fn chosen_modules<'p, 'm>(
    profile: &'p Profile,
    modules: &'m [Module<'m>],
    options: &Options,
) -> (Vec<Chosen<'p, 'm>>, Vec<String>, Vec<String>) {
    let (mut chosen, mut missing, mut minor) = (Vec::new(), Vec::new(), Vec::new());
    let total = total_of(profile);
    for seen in &profile.modules {
        let share = u128::from(weight_of(seen)) * 1_000_000;
        if share < u128::from(total) * u128::from(options.min_share_ppm) {
            minor.push(seen.name.clone());
        } else if let Some(module) = modules.iter().find(|m| *m.image.build_id() == seen.build_id) {
            chosen.push((seen, module));
        } else {
            missing.push(seen.name.clone());
        }
    }
    (chosen, missing, minor)
}

/// How much was seen in all modules.
fn total_of(profile: &Profile) -> u64 {
    profile.modules.iter().map(weight_of).fold(0, u64::saturating_add)
}

/// How much was seen in a module: samples, or branches where there are none, or counts where there are neither.
fn weight_of(module: &ModuleProfile) -> u64 {
    let sum = |counts: &[u64]| counts.iter().fold(0u64, |sum, &c| sum.saturating_add(c));
    match (module.samples.total(), sum(&module.branches.count)) {
        (0, 0) => sum(&module.ranges.count),
        (0, branches) => branches,
        (samples, _) => samples,
    }
}

fn analyze_module(
    module: &Module<'_>,
    evidence: &Evidence<'_>,
    options: &Options,
    is_main: bool,
) -> (Vec<FunctionPlan>, Vec<Refused>, ModuleReport) {
    let seen = Seen::of(module.functions, evidence.profile(), evidence.is_counted());
    let hot = seen.covering(options.coverage_ppm);
    let runtime = refuse::module_refusal(module.image);
    let unwind = refuse::Options { unwind_registered: options.unwind_registered, others_throw: false };
    let may_unwind = (runtime.is_none() && !options.unwind_registered)
        .then(|| refuse::may_unwind(module.image, module.functions, module.targets, unwind));
    let refuse =
        |start, reason, weight| Refused { build_id: evidence.profile().build_id.clone(), start, reason, weight };
    let mut done: Vec<Result<(FunctionLayout, Vec<PassStats>), Refused>> = hot
        .par_iter()
        .with_max_len(1)
        .map(|&(index, weight)| {
            let function = module.functions.all()[index as usize];
            let refuse = |reason| refuse(function.start, reason, weight);
            if let Some(runtime) = runtime {
                return Err(refuse(Reason::Module(runtime)));
            }
            if may_unwind.as_ref().is_some_and(|set| set.has(index as usize)) {
                return Err(refuse(Reason::Function(GiveUp::MayUnwind)));
            }
            let (mut layout, stats) = lay_out(module, function, evidence, options.passes).map_err(refuse)?;
            layout.weight = weight;
            Ok((layout, stats))
        })
        .collect();
    let refused: Vec<Refused> = done.iter().filter_map(|d| d.as_ref().err().cloned()).collect();
    done.sort_by_key(|d| d.as_ref().map_or(LinkAddr(0), |(l, _)| l.function.start));
    let mut passes: Vec<PassStats> = Vec::new();
    let mut layouts = Vec::with_capacity(done.len());
    for (layout, stats) in done.into_iter().flatten() {
        for stat in &stats {
            match passes.iter_mut().find(|p| p.pass == stat.pass) {
                Some(sum) => sum.add(stat),
                None => passes.push(*stat),
            }
        }
        layouts.push(layout);
    }
    if is_main {
        yardstick::choose(module.image, &mut layouts);
    }
    let mut order: Vec<u32> = (0..layouts.len() as u32).collect();
    if options.passes.has(Pass::CdSort) {
        let (sorted, stats) = passes::cdsort::run(&layouts, evidence);
        order = sorted;
        passes.push(stats);
    }
    let report = ModuleReport {
        build_id: evidence.profile().build_id.clone(),
        name: evidence.profile().name.clone(),
        weight: seen.total,
        outside: seen.outside,
        planned: layouts.iter().fold(0, |sum, l| sum.saturating_add(l.weight)),
        seen: seen.functions.len() as u64,
        before: LayoutStats::of(&layouts, &Places::original(&layouts)),
        after: LayoutStats::of(&layouts, &Places::planned(&layouts, &order)),
        passes,
    };
    let hashes: Vec<_> = layouts.par_iter().map(|l| function_hash(module.image, &l.function)).collect();
    let plan = order.iter().map(|&i| function_plan(&layouts[i as usize], hashes[i as usize])).collect();
    (plan, refused, report)
}

/// Runs the passes that work on one function.
pub(crate) fn lay_out(
    module: &Module<'_>,
    function: Function,
    evidence: &Evidence<'_>,
    passes: PassSet,
) -> Result<(FunctionLayout, Vec<PassStats>), Reason> {
    let graph = cfg::build(module.image, module.functions, module.targets, &function).map_err(Reason::Function)?;
    let mut layout = FunctionLayout::new(module.image, function, graph);
    if let Some(why) = layout.cfg.blocks.first().and_then(|b| b.keep_original) {
        return Err(Reason::Entry(why));
    }
    let mut stats = Vec::with_capacity(Pass::ALL.len());
    // Without inference the counts are still needed: raw ones.
    let inferred = passes::infer::run(&mut layout, evidence, passes.has(Pass::Infer));
    for pass in passes.iter() {
        stats.push(match pass {
            Pass::Infer => inferred,
            Pass::Split => passes::split::run(&mut layout),
            Pass::ExtTsp => passes::exttsp::run(&mut layout),
            Pass::Entries => passes::entries::run(&mut layout),
            Pass::Plt => passes::plt::run(&layout, module.image),
            Pass::Tables => passes::tables::run(&mut layout, module.image),
            Pass::Promote => passes::promote::run(&mut layout, module, evidence),
            Pass::Dispatch => match passes::dispatch::run(&layout) {
                (true, stats) => stats,
                (false, _) => return Err(Reason::Dispatch),
            },
            Pass::CdSort => continue,
        });
    }
    Ok((layout, stats))
}

/// A function's part of a plan.
pub(crate) fn function_plan(layout: &FunctionLayout, hash: dyni_schema::FunctionHash) -> FunctionPlan {
    let whole = |b: u32| layout.parts.partition_point(|p| p.0 < b)..layout.parts.partition_point(|p| p.0 <= b);
    // Each block, and what promoted calls part from it.
    let parts = |&b: &u32| {
        let b = layout.offset(b);
        std::iter::once(b).chain(layout.parts[whole(b)].iter().map(|p| p.1))
    };
    FunctionPlan {
        start: layout.function.start.0,
        size: layout.function.size,
        hash,
        blocks: layout.order.iter().flat_map(parts).collect(),
        hot: layout.order[..layout.hot].iter().flat_map(parts).count() as u32,
        entries: layout.entries.iter().map(|&b| layout.offset(b)).collect(),
        probes: layout.probes.iter().map(|&b| layout.offset(b)).collect(),
        calls: layout.calls.clone(),
        weight: layout.weight,
    }
}

/// The functions in which anything was seen.
pub(crate) struct Seen {
    /// Index into [`Functions::all`] and weight, by rising address.
    functions: Vec<(u32, u64)>,
    total: u64,
    outside: u64,
}

impl Seen {
    pub fn of(functions: &Functions, profile: &ModuleProfile, counted: bool) -> Self {
        let mut seen = Self { functions: Vec::new(), total: 0, outside: 0 };
        let branches = &profile.branches;
        if counted {
            seen.add_counted(functions, profile);
        } else if profile.samples.addr.is_empty() {
            branches
                .from
                .iter()
                .zip(&branches.count)
                .for_each(|(&at, &count)| seen.add(functions, LinkAddr(at), count));
        } else {
            profile.samples.iter().for_each(|(at, count)| seen.add(functions, at, count));
        }
        seen
    }

    /// A counted function weighs what ran in it, bytes for lack of cycles. One that was sampled and not counted weighs
    /// what its samples would be in that unit.
    fn add_counted(&mut self, functions: &Functions, profile: &ModuleProfile) {
        let r = &profile.ranges;
        for ((&start, &end), &count) in r.start.iter().zip(&r.end).zip(&r.count) {
            self.add(functions, LinkAddr(start), count.saturating_mul((end - start).saturating_add(1)));
        }
        let bytes = u128::from(self.total);
        let samples = u128::from(profile.samples.total().max(1));
        let mut sampled = Self { functions: Vec::new(), total: 0, outside: 0 };
        profile.samples.iter().for_each(|(at, count)| sampled.add(functions, at, count));
        let counted = |index: u32| self.functions.binary_search_by_key(&index, |f| f.0).is_ok();
        sampled.functions.retain(|&(index, _)| !counted(index));
        for (index, count) in sampled.functions {
            let weight = u64::try_from(u128::from(count) * bytes / samples).unwrap_or(u64::MAX).max(count);
            self.total = self.total.saturating_add(weight);
            self.functions.push((index, weight));
        }
        self.functions.retain(|f| f.1 > 0);
        self.functions.sort_unstable();
    }

    /// Addresses must rise.
    fn add(&mut self, functions: &Functions, at: LinkAddr, count: u64) {
        self.total = self.total.saturating_add(count);
        let same = |&&mut (index, _): &&mut (u32, u64)| functions.all()[index as usize].contains(at);
        if let Some(last) = self.functions.last_mut().filter(same) {
            last.1 = last.1.saturating_add(count);
        } else if let Some(index) = functions.index_at(at) {
            self.functions.push((index as u32, count));
        } else {
            self.outside = self.outside.saturating_add(count);
        }
    }

    /// The hottest functions, hottest first, ties by address, until they have that share of what lies in functions.
    pub fn covering(&self, ppm: u32) -> Vec<(u32, u64)> {
        let mut sorted = self.functions.clone();
        sorted.sort_by_key(|&(index, weight)| (std::cmp::Reverse(weight), index));
        let in_functions: u128 = sorted.iter().map(|f| u128::from(f.1)).sum();
        let wanted = in_functions * u128::from(ppm.min(1_000_000));
        let mut have = 0u128;
        let take = sorted.iter().take_while(|f| {
            let more = have * 1_000_000 < wanted;
            have += u128::from(f.1);
            more
        });
        let taken = take.count();
        sorted.truncate(taken);
        sorted
    }
}

/// Fills in [`ModuleProfile::functions`] for the modules that are given: every function in which a sample, a branch or
/// the start of a straight-line range that ran lies, with its hash; and [`ModuleProfile::shapes`]: the names of all of them, and what
/// those that a plan would take look like inside.
pub fn annotate(profile: &mut Profile, modules: &[Module<'_>]) {
    let counted = profile.method == dyni_schema::Method::Count;
    for seen in &mut profile.modules {
        let Some(module) = modules.iter().find(|m| *m.image.build_id() == seen.build_id) else { continue };
        let ran = seen.ranges.start.iter().zip(&seen.ranges.count).filter(|r| *r.1 > 0).map(|r| r.0);
        let places = [&seen.samples.addr, &seen.branches.from, &seen.branches.to];
        let mut hit: Vec<usize> = Vec::new();
        for &at in places.into_iter().flatten().chain(ran) {
            if let Some(index) = module.functions.index_at(LinkAddr(at)).filter(|i| hit.last() != Some(i)) {
                hit.push(index);
            }
        }
        hit.sort_unstable();
        hit.dedup();
        let functions: Vec<&Function> = hit.iter().map(|&i| &module.functions.all()[i]).collect();
        let coverage = Options::default().coverage_ppm;
        let hot = Seen::of(module.functions, seen, counted).covering(coverage);
        let hot: std::collections::BTreeSet<usize> = hot.into_iter().map(|f| f.0 as usize).collect();
        let is_hot: Vec<bool> = hit.iter().map(|i| hot.contains(i)).collect();
        seen.shapes = Shapes::pack(&stale::shapes(module, &functions, &is_hot));
        seen.functions = FunctionIndex {
            start: functions.iter().map(|f| f.start.0).collect(),
            size: functions.iter().map(|f| f.size).collect(),
            hash: functions.par_iter().map(|f| function_hash(module.image, f)).collect(),
        };
    }
}

#[cfg(test)]
mod tests;
