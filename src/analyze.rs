//! `dyni analyze`: a plan from a profile.

use std::collections::BTreeMap;
use std::path::Path;

use dyni_analyzer::passes::PassSet;
use dyni_analyzer::plan::{self, Analysis, Module, ModuleReport, Options};
use dyni_analyzer::stats::{BeforeAfter, LayoutStats};
use dyni_schema::Profile;
use dyni_schema::envelope::{BlobId, BlobPrefix, seal};
use serde::Serialize;

use crate::cli::AnalyzeArgs;
use crate::errors::Failure;
use crate::modules::{self, Binary};
use crate::output::{Align, Output, Paint, Report, Table, thousands};
use crate::rebuilt::{self, Matched};
use crate::store::{Store, StoredPlan};
use crate::targets::Refused;

/// Whether the copies are registered with the target's unwinder. As long as they are not, functions that may be on the
/// stack of a throw are left out.
pub const UNWIND_REGISTERED: bool = true;
/// How many of the left out functions are listed by name.
const LISTED: usize = 10;

/// `dyni analyze --json`.
#[derive(Debug, Serialize)]
pub struct AnalyzeReport {
    /// The plan's id in the archive; `null` if nothing is worth a plan.
    plan: Option<String>,
    profile: String,
    program: String,
    passes: Vec<String>,
    functions: usize,
    modules: Vec<ModuleJson>,
    /// Hot functions that are not in the plan, hottest first.
    refused: Vec<RefusedFunction>,
    /// Modules of the profile whose files were not found.
    missing: Vec<String>,
    /// With `--binary`: how much of a profile of another build could be carried over.
    matched: Option<Matched>,
    #[serde(skip)]
    table: String,
    #[serde(skip)]
    verbose: bool,
}

#[derive(Debug, Serialize)]
struct ModuleJson {
    name: String,
    build_id: String,
    /// Samples (or branches) in it.
    weight: u64,
    /// Those of them in functions of the plan.
    planned_weight: u64,
    functions: u64,
    before: Layout,
    after: Layout,
    refused: Vec<Refused>,
    #[serde(skip)]
    passes: Vec<String>,
}

/// Where hot code lies, by the profile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Layout {
    /// Bytes of blocks that ran.
    pub hot_bytes: u64,
    /// Pages of 4096 bytes that hold any of them.
    pub pages: u64,
    /// Share of taken branches among all edges inside functions.
    pub taken_branches: f64,
}

#[derive(Debug, Serialize)]
struct RefusedFunction {
    module: String,
    start: String,
    name: Option<String>,
    weight: u64,
    reason: String,
}

/// A plan and what it promises.
#[derive(Debug)]
pub struct Analyzed {
    /// The plan.
    pub stored: StoredPlan,
    /// As the planned functions lie in their files.
    pub before: Layout,
    /// As they would lie in the caches.
    pub after: Layout,
    /// Hot functions that are left out, and why.
    pub refused: Vec<Refused>,
    analysis: Analysis,
}

/// Makes a plan, prints it and keeps it; or explains one function.
///
/// # Errors
/// There is no such profile, pass or function, none of the binaries is here, or the archive can't be written.
pub fn run(args: &AnalyzeArgs, store: &Store, out: Output) -> Result<(), Failure> {
    let passes = passes(args.passes.as_deref())?;
    let (id, mut profile) = store.profile(args.profile.as_deref())?;
    let rebuilt = args.binary.as_deref().map(|path| for_build(&mut profile, path)).transpose()?;
    // The process that was recorded may still run, in a container whose paths mean nothing here.
    let binaries = {
        let _progress = out.progress("reading the binaries");
        let mut found = modules::of_profile(&profile, &modules::running(&profile));
        if let Some((binary, _)) = &rebuilt {
            found.retain(|b| b.image.build_id() != binary.image.build_id());
        }
        found
    };
    let (binaries, matched) = match rebuilt {
        Some((binary, matched)) => (std::iter::once(binary).chain(binaries).collect(), matched),
        None => (binaries, None),
    };
    if let Some(what) = &args.explain {
        return explain(&profile, &binaries, passes, what, out);
    }
    // Whoever looks for what the plan was made from finds what was recorded.
    let recorded = id.parse::<BlobPrefix>().map_err(|e| Failure::failed("name the profile", e))?.range().0;
    let analyzed = analyze_as(&profile, recorded, &binaries, passes, UNWIND_REGISTERED, out)?;
    if !analyzed.stored.plan.modules.is_empty() {
        store.keep_plan(&analyzed.stored)?;
    }
    let mut report = AnalyzeReport::new(&analyzed, &binaries, id);
    report.verbose = out.verbose() > 0;
    report.matched = matched;
    out.report(&report);
    Ok(())
}

/// Carries a profile over to the build at `path`; how much of it matched, if it was taken of another one.
fn for_build(profile: &mut Profile, path: &Path) -> Result<(Binary, Option<Matched>), Failure> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let binary = Binary::read(path, &name)?;
    let fitting = rebuilt::fit(profile, &binary, path)?;
    let matched = fitting.matched();
    *profile = fitting.profile;
    Ok((binary, matched))
}

/// The passes that a list names, by default all.
///
/// # Errors
/// One of the names is none.
fn passes(list: Option<&str>) -> Result<PassSet, Failure> {
    list.map_or(Ok(PassSet::ALL), |list| PassSet::parse(list).map_err(|e| Failure::usage("--passes", e)))
}

/// Makes a plan from a profile and the binaries that are at hand.
///
/// # Errors
/// None of the profile's binaries is here, or the profile is damaged.
pub fn analyze(
    profile: &Profile,
    binaries: &[Binary],
    passes: PassSet,
    unwind_registered: bool,
    out: Output,
) -> Result<Analyzed, Failure> {
    let sealed = seal(profile).map_err(|e| Failure::failed("analyze the profile", e))?;
    analyze_as(profile, BlobId::of(&sealed), binaries, passes, unwind_registered, out)
}

/// The same where what was recorded has another id: it was carried over from another build.
fn analyze_as(
    profile: &Profile,
    recorded: BlobId,
    binaries: &[Binary],
    passes: PassSet,
    unwind_registered: bool,
    out: Output,
) -> Result<Analyzed, Failure> {
    let _progress = out.progress("deciding a layout");
    let cant = |e: &dyn std::fmt::Display| Failure::failed("analyze the profile", e);
    let options = Options { passes, unwind_registered, profile_hash: recorded.0, ..Options::default() };
    let modules: Vec<Module<'_>> = binaries.iter().map(Binary::module).collect();
    let analysis = plan::analyze(profile, &modules, &options).map_err(|e| {
        cant(&e).help("analyze on the host that it was recorded on, with the program still installed or running")
    })?;
    let (before, after) = sums(&analysis.modules);
    Ok(Analyzed {
        stored: StoredPlan::new(analysis.plan.clone())?,
        before: Layout::of(&before),
        after: Layout::of(&after),
        refused: Refused::summed(analysis.refused.iter().map(|r| (r.reason.text().to_owned(), 1))),
        analysis,
    })
}

/// The same with every pass, for a program that is to be changed now.
///
/// # Errors
/// As [`analyze`]; or nothing of the program can be optimised.
pub fn for_program(profile: &Profile, binaries: &[Binary], out: Output) -> Result<Analyzed, Failure> {
    let analyzed = analyze(profile, binaries, PassSet::ALL, UNWIND_REGISTERED, out)?;
    if !analyzed.stored.plan.modules.is_empty() {
        return Ok(analyzed);
    }
    let reasons: Vec<_> = analyzed.refused.iter().map(|r| format!("{} {}", thousands(r.count), r.reason)).collect();
    let why = if reasons.is_empty() { "no sample fell in a function".to_owned() } else { reasons.join("; ") };
    Err(Failure::refused(format!("nothing of {} can be optimised", profile.program), why)
        .help("`dyni doctor -p PID` shows what its modules allow"))
}

fn sums(modules: &[ModuleReport]) -> (LayoutStats, LayoutStats) {
    let mut sums = (LayoutStats::default(), LayoutStats::default());
    for m in modules {
        sums.0.add(&m.before);
        sums.1.add(&m.after);
    }
    sums
}

/// `dyni analyze --explain FUNCTION --json`.
#[derive(Debug, Serialize)]
struct ExplainReport {
    function: String,
    text: String,
}

impl Report for ExplainReport {
    fn text(&self, _paint: Paint) -> String {
        self.text.clone()
    }
}

fn explain(profile: &Profile, binaries: &[Binary], passes: PassSet, what: &str, out: Output) -> Result<(), Failure> {
    let modules: Vec<Module<'_>> = binaries.iter().map(Binary::module).collect();
    let options = Options { passes, unwind_registered: UNWIND_REGISTERED, ..Options::default() };
    let text = dyni_analyzer::explain::explain(profile, &modules, &options, what).map_err(|e| {
        Failure::failed("explain the function", e)
            .help("give the name as `nm` or `perf` show it, or an address of the file in hexadecimal, as in 0x1234")
    })?;
    out.report(&ExplainReport { function: what.to_owned(), text });
    Ok(())
}

impl Layout {
    fn of(stats: &LayoutStats) -> Self {
        let share = if stats.edges == 0 { 0.0 } else { stats.taken_branches as f64 / stats.edges as f64 };
        Self { hot_bytes: stats.hot_bytes, pages: stats.pages, taken_branches: share }
    }
}

impl AnalyzeReport {
    fn new(analyzed: &Analyzed, binaries: &[Binary], profile: String) -> Self {
        let Analysis { plan, refused, modules, missing, minor } = &analyzed.analysis;
        let binary = |id: &_| binaries.iter().find(|b| b.image.build_id() == id);
        let mut names = BTreeMap::new();
        let modules_json: Vec<_> = modules
            .iter()
            .map(|m| {
                names.insert(m.build_id.clone(), m.name.clone());
                let left = refused.iter().filter(|r| r.build_id == m.build_id);
                ModuleJson {
                    name: m.name.clone(),
                    build_id: m.build_id.hex(),
                    weight: m.weight,
                    planned_weight: m.planned,
                    functions: m.before.functions,
                    before: Layout::of(&m.before),
                    after: Layout::of(&m.after),
                    refused: Refused::summed(left.map(|r| (r.reason.text().to_owned(), 1))),
                    passes: m.passes.iter().map(ToString::to_string).collect(),
                }
            })
            .collect();
        let mut functions: Vec<_> = refused
            .iter()
            .map(|r| {
                let found = binary(&r.build_id).and_then(|b| b.functions.starting_at(r.start)?.name(&b.image));
                RefusedFunction {
                    module: names.get(&r.build_id).cloned().unwrap_or_default(),
                    start: r.start.to_string(),
                    name: found,
                    weight: r.weight,
                    reason: r.reason.text().to_owned(),
                }
            })
            .collect();
        functions.sort_by_key(|f| std::cmp::Reverse(f.weight));
        let (before, after) = sums(modules);
        Self {
            plan: (!plan.modules.is_empty()).then(|| analyzed.stored.id.clone()),
            profile,
            program: plan.program.clone(),
            passes: plan.passes.clone(),
            functions: plan.function_count(),
            modules: modules_json,
            refused: functions,
            missing: missing.iter().chain(minor).cloned().collect(),
            matched: None,
            table: BeforeAfter { before: &before, after: &after }.to_string(),
            verbose: false,
        }
    }
}

impl Report for AnalyzeReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = format!("{}: {} functions\n", paint.bold(&self.program), thousands(self.functions as u64));
        if let Some(matched) = &self.matched {
            text.push_str(&format!("  {}\n", matched.text()));
        }
        let mut table = Table::new(&[
            ("module", Align::Left),
            ("functions", Align::Right),
            ("of samples", Align::Right),
            ("pages before", Align::Right),
            ("after", Align::Right),
            ("left out", Align::Right),
        ]);
        let mut modules: Vec<_> = self.modules.iter().filter(|m| m.weight > 0).collect();
        modules.sort_by_key(|m| std::cmp::Reverse(m.weight));
        for m in &modules {
            table.row([
                m.name.clone(),
                thousands(m.functions),
                format!("{:.1} %", m.planned_weight as f64 * 100.0 / m.weight as f64),
                thousands(m.before.pages),
                thousands(m.after.pages),
                thousands(m.refused.iter().map(|r| r.count).sum()),
            ]);
        }
        text.push_str(&table.render("  ", paint));
        text.push('\n');
        text.extend(self.table.lines().map(|line| format!("  {line}\n")));
        for m in modules.iter().filter(|_| self.verbose) {
            text.extend(m.passes.iter().map(|pass| format!("  {}: {pass}\n", m.name)));
        }
        let listed = if self.verbose { self.refused.len() } else { LISTED };
        if !self.refused.is_empty() {
            text.push_str("\n  left out:\n");
        }
        for f in self.refused.iter().take(listed) {
            let name = f.name.clone().unwrap_or_else(|| f.start.clone());
            text.push_str(&format!("  {} ({}, {} samples) {}\n", name, f.module, thousands(f.weight), f.reason));
        }
        if self.refused.len() > listed {
            text.push_str(&paint.dim(&format!("  and {} more (-v lists them)\n", self.refused.len() - listed)));
        }
        if !self.missing.is_empty() && self.verbose {
            text.push_str(&paint.dim(&format!("  not looked into: {}\n", self.missing.join(", "))));
        }
        match &self.plan {
            Some(id) => text.push_str(&format!("plan {}\n", paint.bold(id))),
            None => text.push_str(&paint.warn("no plan: nothing of this can be optimised\n")),
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::Status;

    #[test]
    fn a_pass_that_is_none_is_wrong_usage() {
        assert_eq!(passes(Some("inline")).unwrap_err().status(), Status::Usage);
        assert_eq!(passes(None).unwrap(), PassSet::ALL);
        assert_eq!(passes(Some("none")).unwrap(), PassSet::NONE);
    }
}
