//! `dyni plan diff`: what two plans decide otherwise, and why.
//!
//! A plan says what is done, not why. Why is in the profile that it was made from: what was seen. That is looked up in the
//! archive, and where the binary is at hand, too, its analysis is made anew to name the reason for which a function is left
//! out. What is not there any more is said to be unknown.

mod compare;

use std::collections::BTreeMap;
use std::path::Path;

use dyni_analyzer::plan::{self, Options};
use dyni_schema::envelope::BlobId;
use dyni_schema::{FunctionPlan, LinkAddr, ModulePlan, ModuleProfile, Plan, Profile};
use serde::Serialize;

use crate::analyze::UNWIND_REGISTERED;
use crate::errors::Failure;
use crate::modules::{self, Binary};
use crate::output::{Align, Output, Paint, Report, Table, thousands};
use crate::rebuilt;
use crate::store::{Store, StoredPlan};
use compare::{Both, Difference};

/// How many functions of a kind are listed by name without `-v`.
const LISTED: usize = 8;

/// `dyni plan diff --json`.
#[derive(Debug, Serialize)]
pub struct DiffReport {
    a: Side,
    b: Side,
    modules: Vec<ModuleDiff>,
    #[serde(skip)]
    verbose: bool,
}

#[derive(Debug, Serialize)]
struct Side {
    plan: String,
    profile: String,
    program: String,
    passes: Vec<String>,
    functions: usize,
}

#[derive(Debug, Serialize)]
struct ModuleDiff {
    name: String,
    /// Null if only the other plan has the module.
    build_id_a: Option<String>,
    build_id_b: Option<String>,
    /// Functions of both for which nothing is decided otherwise.
    same: usize,
    /// Functions of both that lie elsewhere among the others.
    moved: usize,
    added: Vec<Single>,
    removed: Vec<Single>,
    changed: Vec<Changed>,
}

#[derive(Debug, Serialize)]
struct Single {
    start: String,
    name: Option<String>,
    /// Of the weight of its plan's functions, 0 to 1.
    share: f64,
    /// Why the other plan does not have it.
    why: String,
}

#[derive(Debug, Serialize)]
struct Changed {
    start_a: String,
    start_b: String,
    name: Option<String>,
    share_a: f64,
    share_b: f64,
    edited: bool,
    newly_hot_blocks: usize,
    newly_cold_blocks: usize,
    reordered: bool,
    promoted_calls: usize,
    demoted_calls: usize,
    why: &'static str,
}

/// What is known of the build and the profile that a plan was made for.
struct Known {
    stored: StoredPlan,
    profile: Option<Profile>,
    binaries: Vec<Binary>,
    /// By module and start: why a function is left out.
    refused: BTreeMap<(String, LinkAddr), &'static str>,
    /// By start in the recorded build: where functions are in the plan's, if that is another one.
    carried: BTreeMap<LinkAddr, LinkAddr>,
}

/// Compares two plans of the archive.
///
/// # Errors
/// There is no such plan, or the archive can't be read.
pub fn run(a: &str, b: &str, store: &Store, out: Output) -> Result<(), Failure> {
    let known = |id: &str| -> Result<Known, Failure> {
        let stored = store.plan_named(id)?;
        let profile = store.profile_of(BlobId(stored.plan.profile)).ok();
        let _progress = out.progress("looking up what the plan was made from");
        Ok(Known::new(stored, profile))
    };
    let (a, b) = (known(a)?, known(b)?);
    let mut report = diff(&a, &b);
    report.verbose = out.verbose() > 0;
    out.report(&report);
    Ok(())
}

impl Known {
    fn new(stored: StoredPlan, profile: Option<Profile>) -> Self {
        let mut known =
            Self { stored, profile, binaries: Vec::new(), refused: BTreeMap::new(), carried: BTreeMap::new() };
        let Some(recorded) = known.profile.clone() else { return known };
        let mut fitting = recorded.clone();
        for module in &known.stored.plan.modules {
            let Some(seen) = recorded.modules.iter().find(|m| m.name == module.name) else { continue };
            let path = Path::new(&seen.path);
            let Some(binary) = modules::of_build(path, &module.name, &module.build_id) else { continue };
            if let Ok(fitted) = rebuilt::fit(&fitting, &binary, path) {
                let found = fitted.carried.iter().flat_map(|c| &c.functions);
                known.carried.extend(found.filter_map(|f| Some((f.was, f.now?.0))));
                fitting = fitted.profile;
            }
            known.binaries.push(binary);
        }
        let modules: Vec<plan::Module<'_>> = known.binaries.iter().map(Binary::module).collect();
        let options = Options { unwind_registered: UNWIND_REGISTERED, ..Options::default() };
        if let Ok(analysis) = plan::analyze(&fitting, &modules, &options) {
            let reasons = analysis.refused.iter().map(|r| ((r.build_id.hex(), r.start), r.reason.text()));
            known.refused = reasons.collect();
        }
        known.profile = Some(fitting);
        known
    }

    const fn plan(&self) -> &Plan {
        &self.stored.plan
    }

    fn name(&self, module: &ModulePlan, start: LinkAddr) -> Option<String> {
        let binary = self.binaries.iter().find(|b| *b.image.build_id() == module.build_id)?;
        binary.functions.starting_at(start)?.name(&binary.image)
    }

    /// Why this plan has no function that would be at `start` in its build of a module.
    fn why_not(&self, module: &ModulePlan, start: Option<LinkAddr>, size: u32) -> String {
        let Some(start) = start else { return "it was not found in that build".into() };
        if let Some(reason) = self.refused.get(&(module.build_id.hex(), start)) {
            return format!("it {reason}");
        }
        let Some(profile) = &self.profile else {
            return "unknown: what that plan was made from is not in the archive".into();
        };
        match profile.module(&module.build_id) {
            Some(seen) if any_seen(seen, start, size) => "too little was seen in it".into(),
            Some(_) => "nothing was seen in it".into(),
            None => "unknown: that build's part of the profile is not at hand".into(),
        }
    }

    fn side(&self) -> Side {
        let plan = self.plan();
        Side {
            plan: self.stored.id.clone(),
            profile: BlobId(plan.profile).hex(),
            program: plan.program.clone(),
            passes: plan.passes.clone(),
            functions: plan.function_count(),
        }
    }
}

/// Whether a profile has anything of a function.
fn any_seen(seen: &ModuleProfile, start: LinkAddr, size: u32) -> bool {
    let inside = |at: u64| at >= start.0 && at - start.0 < u64::from(size);
    let ran = seen.ranges.start.iter().zip(&seen.ranges.count).any(|(&at, &count)| count > 0 && inside(at));
    ran || seen.samples.addr.iter().chain(&seen.branches.from).any(|&at| inside(at))
}

fn diff(a: &Known, b: &Known) -> DiffReport {
    let mut modules = Vec::new();
    for module in &a.plan().modules {
        let other = b.plan().modules.iter().find(|m| m.build_id == module.build_id);
        let other = other.or_else(|| b.plan().modules.iter().find(|m| m.name == module.name));
        let empty = ModulePlan { functions: Vec::new(), ..module.clone() };
        let mut d = module_diff((a, module), (b, other.unwrap_or(&empty)));
        d.build_id_b = other.map(|m| m.build_id.hex());
        modules.push(d);
    }
    for module in &b.plan().modules {
        let known = |m: &&ModulePlan| m.build_id == module.build_id || m.name == module.name;
        if a.plan().modules.iter().find(known).is_none() {
            let empty = ModulePlan { functions: Vec::new(), ..module.clone() };
            let mut d = module_diff((a, &empty), (b, module));
            d.build_id_a = None;
            modules.push(d);
        }
    }
    DiffReport { a: a.side(), b: b.side(), modules, verbose: false }
}

fn module_diff((a, of_a): (&Known, &ModulePlan), (b, of_b): (&Known, &ModulePlan)) -> ModuleDiff {
    // Where functions of the one build are in the other is known if one of them is what the other's profile is of.
    let back = a.carried.iter().map(|(was, now)| (*now, *was));
    let now: BTreeMap<LinkAddr, LinkAddr> = if b.carried.is_empty() { back.collect() } else { b.carried.clone() };
    let was: BTreeMap<LinkAddr, LinkAddr> = now.iter().map(|(a, b)| (*b, *a)).collect();
    let same_build = of_a.build_id == of_b.build_id;
    let Difference { both, only_a, only_b, moved } = compare::compare(of_a, of_b, &now);
    let total = |m: &ModulePlan| m.functions.iter().map(|f| u128::from(f.weight)).sum::<u128>().max(1) as f64;
    let (all_a, all_b) = (total(of_a), total(of_b));
    let there = |f: &FunctionPlan, known: &BTreeMap<LinkAddr, LinkAddr>| {
        if same_build { Some(f.start()) } else { known.get(&f.start()).copied() }
    };
    let removed = only_a.iter().map(|&i| &of_a.functions[i]).map(|f| Single {
        start: f.start().to_string(),
        name: a.name(of_a, f.start()),
        share: f.weight as f64 / all_a,
        why: b.why_not(of_b, there(f, &now), f.size),
    });
    let added = only_b.iter().map(|&i| &of_b.functions[i]).map(|f| Single {
        start: f.start().to_string(),
        name: b.name(of_b, f.start()),
        share: f.weight as f64 / all_b,
        why: a.why_not(of_a, there(f, &was), f.size),
    });
    let differs = both.iter().filter(|p| p.differs());
    let changed = differs.map(|p| {
        let (f, g) = (&of_a.functions[p.a], &of_b.functions[p.b]);
        Changed {
            start_a: f.start().to_string(),
            start_b: g.start().to_string(),
            name: b.name(of_b, g.start()),
            share_a: f.weight as f64 / all_a,
            share_b: g.weight as f64 / all_b,
            edited: p.edited,
            newly_hot_blocks: p.newly_hot,
            newly_cold_blocks: p.newly_cold,
            reordered: p.reordered,
            promoted_calls: p.promoted.len(),
            demoted_calls: p.demoted.len(),
            why: why_changed(p, a.plan(), b.plan()),
        }
    });
    let mut result = ModuleDiff {
        name: of_a.name.clone(),
        build_id_a: Some(of_a.build_id.hex()),
        build_id_b: Some(of_b.build_id.hex()),
        same: both.iter().filter(|p| !p.differs()).count(),
        moved,
        added: added.collect(),
        removed: removed.collect(),
        changed: changed.collect(),
    };
    let by_share = |a: f64, b: f64| b.total_cmp(&a);
    result.added.sort_by(|x, y| by_share(x.share, y.share));
    result.removed.sort_by(|x, y| by_share(x.share, y.share));
    result.changed.sort_by(|x, y| by_share(x.share_a.max(x.share_b), y.share_a.max(y.share_b)));
    result
}

/// What a function is decided otherwise for: a plan is a function of code, profile and passes, so it is one of these.
fn why_changed(both: &Both, a: &Plan, b: &Plan) -> &'static str {
    if both.edited {
        "its code was edited"
    } else if a.passes != b.passes {
        "other passes ran"
    } else if a.profile != b.profile {
        "it was seen to go other ways"
    } else {
        "what it lies beside, or calls, was edited"
    }
}

impl Changed {
    /// What is otherwise, in a few words.
    fn what(&self) -> String {
        let counted = |n: usize, what: &str| (n > 0).then(|| format!("{n} {what}"));
        let parts = [
            counted(self.newly_hot_blocks, "blocks newly hot"),
            counted(self.newly_cold_blocks, "newly cold"),
            self.reordered.then(|| "reordered".to_owned()),
            counted(self.promoted_calls, "calls promoted"),
            counted(self.demoted_calls, "no longer"),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

impl Report for DiffReport {
    fn text(&self, paint: Paint) -> String {
        let short = |id: &str| id.get(..12).unwrap_or(id).to_owned();
        let side = |s: &Side| format!("{} ({} functions)", short(&s.plan), thousands(s.functions as u64));
        let mut text = format!("{}: {} and {}\n", paint.bold(&self.b.program), side(&self.a), side(&self.b));
        let listed = if self.verbose { usize::MAX } else { LISTED };
        for m in &self.modules {
            let sums = [
                (m.same, "the same"),
                (m.changed.len(), "changed"),
                (m.added.len(), "new"),
                (m.removed.len(), "gone"),
                (m.moved, "moved among the others"),
            ];
            let sums: Vec<_> = sums.iter().map(|(n, what)| format!("{} {what}", thousands(*n as u64))).collect();
            text.push_str(&format!("\n  {}: {}\n", paint.bold(&m.name), sums.join(", ")));
            let mut table = Table::new(&["", "function", "share", "", "why"].map(|h| (h, Align::Left)));
            let share = |s: f64| format!("{:.2} %", s * 100.0);
            for (what, list) in [("new", &m.added), ("gone", &m.removed)] {
                for f in list.iter().take(listed) {
                    let name = f.name.clone().unwrap_or_else(|| f.start.clone());
                    let not = if what == "new" { "before: " } else { "" };
                    table.row([what.into(), name, share(f.share), String::new(), format!("{not}{}", f.why)]);
                }
            }
            for f in m.changed.iter().take(listed) {
                let name = f.name.clone().unwrap_or_else(|| f.start_b.clone());
                let shares = format!("{} to {}", share(f.share_a), share(f.share_b));
                table.row(["changed".into(), name, shares, f.what(), f.why.to_owned()]);
            }
            if !table.is_empty() {
                text.push_str(&table.render("    ", paint));
            }
            let more: usize =
                [m.added.len(), m.removed.len(), m.changed.len()].iter().map(|n| n.saturating_sub(listed)).sum();
            if more > 0 {
                text.push_str(&paint.dim(&format!("    and {} more (-v lists them)\n", thousands(more as u64))));
            }
        }
        text
    }
}
