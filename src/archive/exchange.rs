//! `dyni archive export` and `import`: a part of the archive as a file, for other hosts.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use dyni_profiles::bundle::{BundleError, MAGIC};
use dyni_profiles::{Archive, Category, ExportReport, ImportReport, Imported, Incoming, Selection};
use dyni_schema::BuildId;
use dyni_schema::envelope::Kind;
use serde::Serialize;

use super::clean;
use super::foreign::{self, Recording};
use super::formats::{self, Format};
use crate::errors::Failure;
use crate::output::{Align, Output, Paint, Report, Table, human_bytes, plural, thousands};

/// The name that stands for standard input or output.
const STREAM: &str = "-";

/// What files are called that will be exports.
const UNFINISHED: &str = ".dyni-export-";

/// `dyni archive export`
#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("which").required(true).multiple(true).args(["all", "program", "build_id", "profile"]))]
pub struct ExportArgs {
    /// Everything but working sets of executables without a build-id, which only this host can use
    #[arg(long, conflicts_with_all = ["program", "build_id", "format"])]
    pub all: bool,
    /// Only what is of this program
    #[arg(long, value_name = "PROGRAM")]
    pub program: Option<String>,
    /// Only what has to do with this module: profiles and plans that it is a part of, the working set of that executable (may
    /// be given several times)
    #[arg(long, value_name = "ID", value_parser = build_id)]
    pub build_id: Vec<BuildId>,
    /// One profile in the format of another tool: of several that fit the newest, and of that, if modules are named, only what
    /// it saw in those
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Which profile, for --format: its id or the first four digits of it, its label, a program's name, or latest
    #[arg(long, value_name = "PROFILE", requires = "format", conflicts_with = "program")]
    pub profile: Option<String>,
    /// Where a module of the profile lies now, for --format, if not where it was recorded (may be given several times)
    #[arg(long, value_name = "FILE", requires = "format")]
    pub binary: Vec<PathBuf>,
    /// The file to write, or - for standard output
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// `dyni archive import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Files that `dyni archive export` has written, perf.data, or fdata of BOLT; - for standard input; all are imported, or none
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// A binary that another tool has recorded, where it does not say which (fdata) or the file has moved (may be given several
    /// times)
    #[arg(long, value_name = "FILE")]
    pub binary: Vec<PathBuf>,
    /// The program to take from a recording of perf that is of several; by default the one with the most samples
    #[arg(long, value_name = "PROGRAM")]
    pub program: Option<String>,
    /// What to call profiles that are made of other tools' recordings
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub label: String,
}

/// A build-id on the command line.
fn build_id(text: &str) -> Result<BuildId, String> {
    let id = BuildId::from_hex(text).filter(|id| !id.0.is_empty());
    id.ok_or_else(|| "expected a whole build-id in hexadecimal, as `dyni doctor` prints it".to_owned())
}

/// `dyni archive export --json`.
#[derive(Debug, Serialize)]
pub struct ExportOutcome {
    /// The file that was written.
    file: String,
    profiles: u64,
    plans: u64,
    working_sets: u64,
    /// Working sets that only this host can use.
    left_out: u64,
    /// The file's length.
    bytes: u64,
}

/// Writes the file and prints what is in it.
///
/// # Errors
/// Nothing matches, or something can't be read or written; then there is no new file.
pub fn export(args: &ExportArgs, archive: &Path, out: Output) -> Result<(), Failure> {
    if let Some(format) = args.format {
        return formats::export(args, format, archive, out);
    }
    let selection = Selection { program: args.program.clone(), build_ids: args.build_id.clone() };
    let archive = Archive::open_read_only(archive)?;
    let outcome = write(&args.file, is_bundle, out, |name, to| bundle(&archive, &selection, name, to))?;
    tell(&args.file, &outcome, out);
    Ok(())
}

fn is_bundle(begins: &[u8]) -> bool {
    begins == MAGIC
}

fn bundle(archive: &Archive, selection: &Selection, name: &str, to: &mut dyn Write) -> Result<ExportOutcome, Failure> {
    let report = archive.export(selection, to).map_err(|e| failure(&format!("export to {name}"), e))?;
    Ok(ExportOutcome::new(name, &report))
}

/// Prints what was written, where the file itself does not go.
pub(super) fn tell(file: &Path, outcome: &impl Report, out: Output) {
    if file.as_os_str() == STREAM {
        out.note(outcome.text(Paint::PLAIN).trim_end());
    } else {
        out.report(outcome);
    }
}

/// Lets `content` write to a file, or to standard output; it is given its name for people. A file takes its name when it
/// is whole, and only the place of one that `is_same` finds to begin like it, or of an empty one.
///
/// # Errors
/// It may not be written there, or what `content` gave; then there is no new file.
pub(super) fn write<T>(
    file: &Path,
    is_same: impl Fn(&[u8]) -> bool,
    out: Output,
    content: impl FnOnce(&str, &mut dyn Write) -> Result<T, Failure>,
) -> Result<T, Failure> {
    if file.as_os_str() != STREAM {
        return to_file(file, is_same, content);
    }
    let name = "standard output";
    let what = format!("export to {name}");
    if out.json() {
        return Err(Failure::usage(what, "--json wants it, too").help("name a file"));
    }
    let mut to = io::stdout().lock();
    if to.is_terminal() {
        return Err(Failure::refused(what, "it is a terminal")
            .help("name a file, or put `| ssh HOST dyni archive import -` behind"));
    }
    content(name, &mut to)
}

fn to_file<T>(
    file: &Path,
    is_same: impl Fn(&[u8]) -> bool,
    content: impl FnOnce(&str, &mut dyn Write) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let what = format!("export to {}", file.display());
    // What a symbolic link leads to is what is to be replaced.
    let target = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    if !may_replace(&target, is_same) {
        return Err(Failure::refused(what, "there is something of that name that is no export of dyni's")
            .help("name another file, or - for standard output"));
    }
    let folder = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |e: io::Error| failure(&what, BundleError::Write(e.to_string()));
    let unfinished = tempfile::Builder::new()
        .prefix(UNFINISHED)
        // As any new file: less what the umask takes away.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(failed)?;
    let mut to = BufWriter::new(unfinished.as_file());
    let outcome = content(&file.display().to_string(), &mut to)?;
    to.flush().map_err(failed)?;
    drop(to);
    unfinished.persist(&target).map_err(|e| failed(e.error))?;
    Ok(outcome)
}

/// Whether there is nothing, or nothing but an earlier export: not the archive itself, nor a device.
fn may_replace(target: &Path, is_same: impl Fn(&[u8]) -> bool) -> bool {
    let is_export = || {
        let mut begins = Vec::new();
        let read = File::open(target).and_then(|file| file.take(MAGIC.len() as u64).read_to_end(&mut begins));
        read.is_ok() && (begins.is_empty() || is_same(&begins))
    };
    match fs::metadata(target) {
        Ok(found) => found.is_file() && is_export(),
        // If it can't be asked, it can't be written either, and that is then said.
        Err(_) => true,
    }
}

/// Reads the files and takes all of them in, or none.
///
/// # Errors
/// One of them can't be used, or the archive can't be written.
pub fn import(args: &ImportArgs, archive: &Path) -> Result<ImportOutcome, Failure> {
    let what = |name: &dyn std::fmt::Display| format!("import {name}");
    let mut incoming = Incoming::new().map_err(|e| failure("import", e))?;
    let mut recordings = Vec::new();
    for file in &args.files {
        let (what, mut from): (String, Box<dyn BufRead>) = if file.as_os_str() == STREAM {
            let what = what(&"standard input");
            let from = io::stdin().lock();
            if from.is_terminal() {
                return Err(Failure::refused(what, "it is a terminal")
                    .help("name a file, or put `ssh HOST dyni archive export --all - |` before"));
            }
            (what, Box::new(from))
        } else {
            let what = what(&file.display());
            let from = File::open(file).map_err(|e| failure(&what, BundleError::Read(e.to_string())))?;
            (what, Box::new(BufReader::new(from)))
        };
        let begins = from.fill_buf().map_err(|e| failure(&what, BundleError::Read(e.to_string())))?;
        match foreign::format_of(begins) {
            Some(format) => {
                let (profile, mut recording) = foreign::read(format, file, &mut from, args, &what)?;
                recording.profile = incoming.add(&profile).map_err(|e| failure(&what, e))?.hex();
                recordings.push(recording);
            }
            None => incoming = incoming.read(from).map_err(|e| failure(&what, e))?,
        }
    }
    let report = Archive::open(archive)?.import(&incoming)?;
    Ok(ImportOutcome::new(archive, &report, recordings))
}

/// What the command says of a bundle that could not be used.
pub fn failure(what: &str, e: BundleError) -> Failure {
    let failure = match e.category() {
        Category::Failed => Failure::failed(what, &e),
        Category::Usage => Failure::usage(what, &e),
        Category::Refused => Failure::refused(what, &e),
    };
    match e.help() {
        Some(help) => failure.help(help),
        None => failure,
    }
}

impl ExportOutcome {
    fn new(file: &str, report: &ExportReport) -> Self {
        let count = |kind| report.records.get(&kind).copied().unwrap_or(0);
        Self {
            file: file.to_owned(),
            profiles: count(Kind::Profile),
            plans: count(Kind::Plan),
            working_sets: count(Kind::WorkingSet),
            left_out: report.left_out,
            bytes: report.bytes,
        }
    }
}

impl Report for ExportOutcome {
    fn text(&self, _: Paint) -> String {
        let mut text = format!(
            "{}, {} and {} in {}, {}\n",
            plural(self.profiles, "profile", "profiles"),
            plural(self.plans, "plan", "plans"),
            plural(self.working_sets, "working set", "working sets"),
            clean(&self.file),
            human_bytes(self.bytes)
        );
        if self.left_out > 0 {
            let sets = plural(self.left_out, "working set", "working sets");
            text.push_str(&format!("{sets} left out: only this host can use what is known by an inode\n"));
        }
        text
    }
}

/// `dyni archive import --json`.
#[derive(Debug, Serialize)]
pub struct ImportOutcome {
    /// The archive's path.
    archive: String,
    profiles: Counts,
    plans: Counts,
    working_sets: Counts,
    /// Recordings of other tools, of each of which a profile was made.
    recordings: Vec<Recording>,
}

/// What became of the records of one kind.
#[derive(Debug, Serialize)]
struct Counts {
    /// Those that the archive did not have.
    new: u64,
    /// Those that it had.
    known: u64,
    /// Those in whose place it has one that is as good or better.
    left_out: u64,
}

impl ImportOutcome {
    fn new(archive: &Path, report: &ImportReport, recordings: Vec<Recording>) -> Self {
        let counts = |kind| {
            let Imported { new, known, left_out } = report.get(&kind).copied().unwrap_or_default();
            Counts { new, known, left_out }
        };
        Self {
            archive: archive.display().to_string(),
            profiles: counts(Kind::Profile),
            plans: counts(Kind::Plan),
            working_sets: counts(Kind::WorkingSet),
            recordings,
        }
    }
}

impl Report for ImportOutcome {
    fn text(&self, paint: Paint) -> String {
        let mut table = Table::new(&[("", Align::Left), ("new", Align::Right), ("known", Align::Right)]);
        for (name, counts) in
            [("profiles", &self.profiles), ("plans", &self.plans), ("working sets", &self.working_sets)]
        {
            table.row([name.into(), thousands(counts.new), thousands(counts.known)]);
        }
        let mut text: String = self.recordings.iter().map(|r| r.text(paint)).collect();
        text.push_str(&format!("imported into {}\n{}", clean(&self.archive), table.render("  ", paint)));
        if self.working_sets.left_out > 0 {
            let sets = plural(self.working_sets.left_out, "working set", "working sets");
            text.push_str(&format!("{sets} left out: the archive's own was learned from as many recordings or more\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests;
