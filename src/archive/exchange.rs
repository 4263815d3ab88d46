//! `dyni archive export` and `import`: a part of the archive as a file, for other hosts.

use std::fs::{self, File, Permissions};
use std::io::{self, BufReader, BufWriter, IsTerminal, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use dyni_profiles::bundle::{BundleError, MAGIC};
use dyni_profiles::{Archive, Category, ExportReport, ImportReport, Imported, Incoming, Selection};
use dyni_schema::BuildId;
use dyni_schema::envelope::Kind;
use serde::Serialize;

use super::clean;
use crate::errors::Failure;
use crate::output::{Align, Output, Paint, Report, Table, human_bytes, plural, thousands};

/// The name that stands for standard input or output.
const STREAM: &str = "-";

/// What files are called that will be exports.
const UNFINISHED: &str = ".dyni-export-";

/// `dyni archive export`
#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("which").required(true).multiple(true).args(["all", "program", "build_id"]))]
pub struct ExportArgs {
    /// Everything but working sets of executables without a build-id, which only this host can use
    #[arg(long, conflicts_with_all = ["program", "build_id"])]
    pub all: bool,
    /// Only what is of this program
    #[arg(long, value_name = "PROGRAM")]
    pub program: Option<String>,
    /// Only what has to do with this module: profiles and plans that it is a part of, the working set of that executable (may
    /// be given several times)
    #[arg(long, value_name = "ID", value_parser = build_id)]
    pub build_id: Vec<BuildId>,
    /// The file to write, or - for standard output
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// `dyni archive import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Files that `dyni archive export` has written, or - for standard input; all are imported, or none
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
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
    let selection = Selection { program: args.program.clone(), build_ids: args.build_id.clone() };
    if args.file.as_os_str() != STREAM {
        out.report(&to_file(&args.file, &selection, archive)?);
        return Ok(());
    }
    let what = "export to standard output";
    if out.json() {
        return Err(Failure::usage(what, "--json wants it, too").help("name a file"));
    }
    let mut to = io::stdout().lock();
    if to.is_terminal() {
        return Err(Failure::refused(what, "it is a terminal")
            .help("name a file, or put `| ssh HOST dyni archive import -` behind"));
    }
    let report = Archive::open_read_only(archive)?.export(&selection, &mut to).map_err(|e| failure(what, e))?;
    out.note(ExportOutcome::new("standard output", &report).text(Paint::PLAIN).trim_end());
    Ok(())
}

/// The file takes its name when it is whole.
fn to_file(file: &Path, selection: &Selection, archive: &Path) -> Result<ExportOutcome, Failure> {
    let what = format!("export to {}", file.display());
    let archive = Archive::open_read_only(archive)?;
    // What a symbolic link leads to is what is to be replaced.
    let target = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    if !may_replace(&target) {
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
    let report = archive.export(selection, BufWriter::new(unfinished.as_file())).map_err(|e| failure(&what, e))?;
    unfinished.persist(&target).map_err(|e| failed(e.error))?;
    Ok(ExportOutcome::new(&file.display().to_string(), &report))
}

/// Whether there is nothing, or nothing but an earlier export: not the archive itself, nor a device.
fn may_replace(target: &Path) -> bool {
    let is_export = || {
        let mut begins = Vec::new();
        let read = File::open(target).and_then(|file| file.take(MAGIC.len() as u64).read_to_end(&mut begins));
        read.is_ok() && (begins.is_empty() || begins == MAGIC)
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
    for file in &args.files {
        incoming = if file.as_os_str() == STREAM {
            let what = what(&"standard input");
            let from = io::stdin().lock();
            if from.is_terminal() {
                return Err(Failure::refused(what, "it is a terminal")
                    .help("name a file, or put `ssh HOST dyni archive export --all - |` before"));
            }
            incoming.read(from).map_err(|e| failure(&what, e))?
        } else {
            let what = what(&file.display());
            let from = File::open(file).map_err(|e| failure(&what, BundleError::Read(e.to_string())))?;
            incoming.read(BufReader::new(from)).map_err(|e| failure(&what, e))?
        };
    }
    let report = Archive::open(archive)?.import(&incoming)?;
    Ok(ImportOutcome::new(archive, &report))
}

fn failure(what: &str, e: BundleError) -> Failure {
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
    fn new(archive: &Path, report: &ImportReport) -> Self {
        let counts = |kind| {
            let Imported { new, known, left_out } = report.get(&kind).copied().unwrap_or_default();
            Counts { new, known, left_out }
        };
        Self {
            archive: archive.display().to_string(),
            profiles: counts(Kind::Profile),
            plans: counts(Kind::Plan),
            working_sets: counts(Kind::WorkingSet),
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
        let mut text = format!("imported into {}\n{}", clean(&self.archive), table.render("  ", paint));
        if self.working_sets.left_out > 0 {
            let sets = plural(self.working_sets.left_out, "working set", "working sets");
            text.push_str(&format!("{sets} left out: the archive's own was learned from as many recordings or more\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests;
