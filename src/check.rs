//! `dyni check`: what a profile says of a binary that need not run, for CI.
//!
//! Every figure is a prediction from the profile, the binary's bytes and nothing else: the same on any host, in any job. They
//! are compared with those of an earlier build, which is a file that `dyni check --json` has written.

mod figures;
mod render;

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use dyni_analyzer::passes::PassSet;
use dyni_analyzer::plan::{self, Options};
use dyni_profiles::{BundleError, Incoming};
use dyni_schema::envelope::BlobId;
use dyni_schema::{LinkAddr, Profile};
use serde::{Deserialize, Serialize};

use crate::analyze::UNWIND_REGISTERED;
use crate::errors::Failure;
use crate::modules::Binary;
use crate::output::{Output, Paint, Report};
use crate::rebuilt::{self, Fitting, Matched};
use figures::{Comparison, Figures};

/// The form of the document; a later one that can't be compared with this has another number.
const FORM: u32 = 1;
/// The longest baseline that is read, in bytes.
const MAX_BASELINE: u64 = 64 << 20;
/// The variable by which GitHub's runners say where a job's summary goes.
const SUMMARY: &str = "GITHUB_STEP_SUMMARY";

/// `dyni check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// What was recorded: a file that `dyni archive export` has written. Of several profiles that of this very build is
    /// taken, else the newest of a module with the binary's name
    #[arg(long, value_name = "FILE")]
    pub profile: PathBuf,
    /// The binary; of another build than the recorded one, too
    #[arg(long, value_name = "FILE")]
    pub binary: PathBuf,
    /// Compare with this: what an earlier `dyni check --json` has printed, with the same profile
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// How much worse than the baseline any figure may be, per cent of it
    #[arg(long, value_name = "PERCENT", default_value = "2%", value_parser = percent, requires = "baseline")]
    pub max_regress: f64,
    /// Write the result for machines that read JUnit's XML, too
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
}

/// `2%`, `0.5` and the like.
fn percent(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.strip_suffix('%').unwrap_or(text).trim().parse().ok();
    number.filter(|n| (0.0..=100.0).contains(n)).ok_or_else(|| "expected per cent from 0 to 100, as in 2%".to_owned())
}

/// A hot function that stays as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefusedFunction {
    /// Where it begins in the build that was recorded, which is how it is known again from build to build; where it begins
    /// now if nothing else is known.
    pub recorded: String,
    /// Where it begins in this build.
    pub start: String,
    /// Its name, if the file has one.
    pub name: Option<String>,
    /// Its share of what was seen, 0 to 1.
    pub share: f64,
    /// Why.
    pub reason: String,
}

/// What earlier builds are remembered by: the part of the document that is read again.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The form of this document: 1.
    pub check: u32,
    /// The profile's id.
    pub profile: String,
    /// The module's name.
    pub module: String,
    /// The binary's build-id.
    pub build_id: String,
    /// How much of the profile still fits, if it is of another build.
    pub matched: Option<Matched>,
    /// How many functions a plan would have.
    pub functions: u64,
    /// As the compiler and the linker have laid it out.
    pub built: Figures,
    /// As dyni would.
    pub planned: Figures,
    /// Hot functions that a plan would leave out, hottest first.
    pub refused: Vec<RefusedFunction>,
}

/// `dyni check --json`.
#[derive(Debug, Serialize)]
pub struct CheckReport {
    #[serde(flatten)]
    facts: Facts,
    /// How the profile was taken.
    method: String,
    /// The file that was compared with.
    baseline: Option<String>,
    /// How much worse a figure may be, per cent.
    max_regress: f64,
    comparisons: Vec<Comparison>,
    /// Those of `refused` that the baseline does not have.
    newly_refused: Vec<RefusedFunction>,
    /// Whether anything is worse than it may be.
    regressed: bool,
}

/// Checks a binary, prints and writes the result.
///
/// # Errors
/// Status 1 if anything is worse than it may be; otherwise why nothing could be said, or the result not be written.
pub fn run(args: &CheckArgs, out: Output) -> Result<(), Failure> {
    let what = format!("check {}", args.binary.display());
    let baseline = args.baseline.as_deref().map(|path| read_baseline(path).map(|b| (path, b))).transpose()?;
    let name = args.binary.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let binary = {
        let _progress = out.progress("reading the binary");
        Binary::read(&args.binary, &name)?
    };
    let (id, profile) = choose(&args.profile, &binary, &args.binary)?;
    let fitting = rebuilt::fit(&profile, &binary, &args.binary)?;
    let facts = {
        let _progress = out.progress("deciding a layout");
        facts(&fitting, &binary, &id).map_err(|e| Failure::failed(&what, e))?
    };
    if facts.functions == 0 {
        let why = facts.refused.first().map_or("nothing that was recorded has its place in it", |r| r.reason.as_str());
        return Err(Failure::refused(what, why).help("`dyni doctor --exe FILE` shows what it allows"));
    }
    let mut report = CheckReport {
        facts,
        method: fitting.profile.method.name().to_owned(),
        baseline: None,
        max_regress: args.max_regress,
        comparisons: Vec::new(),
        newly_refused: Vec::new(),
        regressed: false,
    };
    if let Some((path, baseline)) = baseline {
        report.compare(path, &baseline)?;
    }
    if let Some(path) = &args.junit {
        let failed = |e: std::io::Error| Failure::failed(format!("write {}", path.display()), e);
        fs::write(path, render::junit(&report)).map_err(failed)?;
    }
    if let Some(path) = std::env::var_os(SUMMARY).filter(|p| !p.is_empty()) {
        let written = OpenOptions::new().append(true).create(true).open(&path);
        let written = written.and_then(|mut file| file.write_all(render::markdown(&report).as_bytes()));
        written
            .map_err(|e| Failure::failed(format!("write the job's summary to {}", Path::new(&path).display()), e))?;
    }
    out.report(&report);
    if report.regressed {
        let worse: Vec<&str> = report.comparisons.iter().filter(|c| c.regressed).map(|c| c.figure.as_str()).collect();
        let why = format!("worse than it may be: {}", worse.join(", "));
        return Err(Failure::failed(what, why)
            .help("look into the change, or take this build's `dyni check --json` as the new baseline")
            .reported());
    }
    Ok(())
}

/// The profile of a bundle that says most of a binary, and its id.
fn choose(file: &Path, binary: &Binary, path: &Path) -> Result<(String, Profile), Failure> {
    let what = format!("read {}", file.display());
    let unreadable = |e: BundleError| crate::archive::bundle_failure(&what, e);
    let open = File::open(file).map_err(|e| unreadable(BundleError::Read(e.to_string())))?;
    let incoming = Incoming::new().and_then(|i| i.read(BufReader::new(open))).map_err(unreadable)?;
    let mut best: Option<(bool, BlobId, Profile)> = None;
    let mut programs = std::collections::BTreeSet::new();
    let each = |id, profile: Profile| {
        programs.insert(profile.program.clone());
        // The last one is the newest.
        if let Some(exact) = rebuilt::concerns(&profile, binary, path)
            && best.as_ref().is_none_or(|b| exact >= b.0)
        {
            best = Some((exact, id, profile));
        }
    };
    incoming.each_profile(each).map_err(unreadable)?;
    let none = || {
        let has: Vec<String> = programs.into_iter().take(8).collect();
        let why = if has.is_empty() {
            "there is no profile in it".to_owned()
        } else {
            format!("its profiles are of {}, and none has a module of this build or this file name", has.join(", "))
        };
        Failure::refused(format!("check {} with {}", path.display(), file.display()), why)
            .help("`dyni record -p PID`, then `dyni archive export --program NAME FILE`")
    };
    best.map(|(_, id, profile)| (id.hex(), profile)).ok_or_else(none)
}

/// What there is to say of a binary under a profile.
fn facts(fitting: &Fitting, binary: &Binary, id: &str) -> Result<Facts, plan::Error> {
    // Of the profile nothing but this module: how hot others are must not decide whether it is looked at.
    let mut profile = fitting.profile.clone();
    profile.modules.retain(|m| m.build_id == *binary.image.build_id());
    let options = Options { passes: PassSet::ALL, unwind_registered: UNWIND_REGISTERED, ..Options::default() };
    let analysis = plan::analyze(&profile, &[binary.module()], &options)?;
    let module = analysis.modules.first();
    let weight = module.map_or(0, |m| m.weight).max(1);
    let recorded = |now: LinkAddr| {
        let of = fitting.carried.iter().flat_map(|c| &c.functions);
        of.filter(|f| f.now.is_some_and(|n| n.0 == now)).map(|f| f.was).next().unwrap_or(now)
    };
    let mut refused: Vec<_> = analysis.refused.iter().collect();
    refused.sort_by_key(|r| (std::cmp::Reverse(r.weight), r.start));
    let refused = refused.into_iter().map(|r| RefusedFunction {
        recorded: recorded(r.start).to_string(),
        start: r.start.to_string(),
        name: binary.functions.starting_at(r.start).and_then(|f| f.name(&binary.image)),
        share: r.weight as f64 / weight as f64,
        reason: r.reason.text().to_owned(),
    });
    Ok(Facts {
        check: FORM,
        profile: id.to_owned(),
        module: binary.image.name().to_owned(),
        build_id: binary.image.build_id().hex(),
        matched: fitting.matched(),
        functions: analysis.plan.function_count() as u64,
        built: module.map(|m| Figures::of(&m.before)).unwrap_or_default(),
        planned: module.map(|m| Figures::of(&m.after)).unwrap_or_default(),
        refused: refused.collect(),
    })
}

fn read_baseline(path: &Path) -> Result<Facts, Failure> {
    let what = format!("read the baseline {}", path.display());
    let help = "make one with `dyni check --json` on the build that others are to be compared with";
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|f| f.take(MAX_BASELINE + 1).read_to_end(&mut bytes));
    read.map_err(|e| Failure::failed(&what, e).help(help))?;
    if bytes.len() as u64 > MAX_BASELINE {
        return Err(Failure::refused(&what, format!("it has more than {} MB", MAX_BASELINE >> 20)).help(help));
    }
    let facts: Facts = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::refused(&what, format!("it is not what `dyni check --json` prints ({e})")).help(help))?;
    if facts.check != FORM {
        let why = format!("its form is {}, the one known here is {FORM}", facts.check);
        return Err(Failure::refused(&what, why).help(help));
    }
    if !facts.built.are_sound() || !facts.planned.are_sound() || facts.refused.iter().any(|r| !r.share.is_finite()) {
        return Err(Failure::refused(&what, "some of its figures are none").help(help));
    }
    Ok(facts)
}

impl CheckReport {
    /// # Errors
    /// The baseline is of another profile or module.
    fn compare(&mut self, path: &Path, baseline: &Facts) -> Result<(), Failure> {
        let (now, was) = (&self.facts, baseline);
        if now.profile != was.profile || now.module != was.module {
            let (a, b) = (short(&was.profile), short(&now.profile));
            let why = format!("it is of {} with profile {a}, this is {} with profile {b}", was.module, now.module);
            return Err(Failure::refused(format!("compare with {}", path.display()), why)
                .help("a profile is compared with itself only: make a new baseline with the new profile"));
        }
        let known = |r: &&RefusedFunction| was.refused.iter().any(|w| w.recorded == r.recorded);
        self.newly_refused = now.refused.iter().filter(|r| !known(r)).cloned().collect();
        // (The sum of nothing is -0.0.)
        let lost = self.newly_refused.iter().map(|r| r.share).fold(0.0, |sum, share| sum + share);
        let share = |f: &Facts| f.matched.as_ref().map_or(1.0, |m| m.share);
        self.comparisons = figures::compare(
            (&was.built, &was.planned, share(was)),
            (&now.built, &now.planned, share(now)),
            lost,
            self.max_regress,
        );
        self.regressed = self.comparisons.iter().any(|c| c.regressed);
        self.baseline = Some(path.display().to_string());
        Ok(())
    }
}

/// The first digits of an id, which suffice to name it.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

impl Report for CheckReport {
    fn text(&self, paint: Paint) -> String {
        render::text(self, paint)
    }
}

#[cfg(test)]
mod tests;
