//! `dyni archive`: what is kept, sharing it, and throwing it away.
//!
//! Everything printed may come from another host: text is cleaned of control characters before it reaches a terminal.

mod exchange;
mod fdata;
mod foreign;
mod formats;
mod perf_data;
mod show;
mod working_set;

pub use exchange::failure as bundle_failure;
pub use working_set::WorkingSetReport;

use std::path::Path;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use dyni_profiles::{Archive, ArchiveError, Entry, GcPolicy, GcReport};
use dyni_schema::envelope::{BlobId, BlobPrefix, Kind};
use serde::Serialize;

use crate::duration::human_ns;
use crate::errors::Failure;
use crate::output::{Align, Output, Paint, Report, Table, human_bytes, plural, thousands};

/// `dyni archive`
#[derive(Debug, Args)]
pub struct ArchiveArgs {
    /// What to do with the archive.
    #[command(subcommand)]
    pub command: ArchiveCommand,
}

/// The subcommands of `dyni archive`.
#[derive(Debug, Subcommand)]
pub enum ArchiveCommand {
    /// List profiles, plans and working sets, the newest first
    Ls(LsArgs),
    /// Show what a profile, a plan or a working set holds
    Show(ShowArgs),
    /// Remove profiles, plans and working sets
    Rm(RmArgs),
    /// Remove what is old, and the oldest until the rest fits
    Gc(GcArgs),
    /// Write profiles, plans and working sets into a file, for other hosts; or a profile, for other tools
    Export(exchange::ExportArgs),
    /// Take in what another host has exported, or another tool recorded; what is known already counts once
    #[command(visible_alias = "merge")]
    Import(exchange::ImportArgs),
}

/// `dyni archive ls`
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Only those of this program
    #[arg(long, value_name = "PROGRAM")]
    pub program: Option<String>,
}

/// `dyni archive show`
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The id, or its first four digits or more
    #[arg(value_name = "ID")]
    pub id: String,
}

/// `dyni archive rm`
#[derive(Debug, Args)]
pub struct RmArgs {
    /// The ids, or their first four digits or more
    #[arg(value_name = "ID", required = true)]
    pub ids: Vec<String>,
}

/// `dyni archive gc`
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Remove the oldest until the rest is no larger, in bytes or as 500K, 20M, 1G
    #[arg(long, value_name = "N", value_parser = size)]
    pub max_size: Option<u64>,
    /// Remove what was stored longer ago
    #[arg(long, value_name = "DAYS")]
    pub max_age: Option<u32>,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
}

/// Does what `dyni archive` was asked to do and prints the result.
///
/// # Errors
/// A [`Failure`]: the archive can't be used, or has no such record.
pub fn run(args: &ArchiveArgs, archive_path: &Path, out: Output) -> Result<(), Failure> {
    match &args.command {
        ArchiveCommand::Ls(args) => out.report(&ls(args, archive_path)?),
        ArchiveCommand::Show(args) => match show::show(&args.id, archive_path)? {
            show::Shown::Profile(report) => out.report(&*report),
            show::Shown::Plan(report) => out.report(&*report),
            show::Shown::WorkingSet(report) => out.report(&*report),
        },
        ArchiveCommand::Rm(args) => out.report(&rm(args, archive_path)?),
        ArchiveCommand::Gc(args) => out.report(&gc(args, archive_path)?),
        ArchiveCommand::Export(args) => exchange::export(args, archive_path, out)?,
        ArchiveCommand::Import(args) => out.report(&exchange::import(args, archive_path)?),
    }
    Ok(())
}

/// `dyni archive ls --json`.
#[derive(Debug, Serialize)]
struct LsReport {
    /// The archive's path.
    archive: String,
    /// Whether there is such a file.
    exists: bool,
    /// The sealed bytes of all entries together.
    bytes: u64,
    /// Profiles, then plans, then working sets, each the newest first.
    entries: Vec<EntryReport>,
}

/// One record in JSON. Which fields there are depends on `kind`.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum EntryReport {
    /// `"kind": "profile"`
    Profile {
        id: String,
        program: String,
        label: String,
        method: String,
        start_s: u64,
        duration_ns: u64,
        samples: u64,
        bytes: u64,
        stored_s: u64,
    },
    /// `"kind": "plan"`
    Plan {
        id: String,
        program: String,
        purpose: String,
        passes: Vec<String>,
        profile: Option<String>,
        functions: u64,
        build_ids: Vec<String>,
        bytes: u64,
        stored_s: u64,
    },
    /// `"kind": "working set"`
    #[serde(rename = "working set")]
    WorkingSet {
        id: String,
        program: String,
        executable: String,
        mode: String,
        recordings: u64,
        files: u64,
        pages: u64,
        bytes: u64,
        stored_s: u64,
    },
}

impl From<&Entry> for EntryReport {
    fn from(entry: &Entry) -> Self {
        match entry {
            Entry::Profile(p) => Self::Profile {
                id: p.id.hex(),
                program: p.program.clone(),
                label: p.label.clone(),
                method: p.method.clone(),
                start_s: p.start_s,
                duration_ns: p.duration_ns,
                samples: p.samples,
                bytes: p.bytes,
                stored_s: p.stored_s,
            },
            Entry::Plan(p) => Self::Plan {
                id: p.id.hex(),
                program: p.program.clone(),
                purpose: p.kind.clone(),
                passes: p.passes.split(',').filter(|pass| !pass.is_empty()).map(str::to_owned).collect(),
                profile: p.profile.map(|id| id.hex()),
                functions: p.functions,
                build_ids: p.build_ids.iter().map(|id| id.hex()).collect(),
                bytes: p.bytes,
                stored_s: p.stored_s,
            },
            Entry::WorkingSet(p) => Self::WorkingSet {
                id: p.id.hex(),
                program: p.program.clone(),
                executable: p.executable.clone(),
                mode: p.mode.clone(),
                recordings: p.recordings,
                files: p.files,
                pages: p.pages,
                bytes: p.bytes,
                stored_s: p.stored_s,
            },
        }
    }
}

fn ls(args: &LsArgs, path: &Path) -> Result<LsReport, Failure> {
    let (exists, entries) = match Archive::open_read_only(path) {
        Ok(archive) => (true, archive.list(args.program.as_deref())?),
        // Before the first recording that is how things are.
        Err(ArchiveError::Missing(_)) => (false, Vec::new()),
        Err(e) => return Err(e.into()),
    };
    Ok(LsReport {
        archive: path.display().to_string(),
        exists,
        bytes: entries.iter().map(Entry::bytes).fold(0, u64::saturating_add),
        entries: entries.iter().map(EntryReport::from).collect(),
    })
}

impl Report for LsReport {
    fn text(&self, paint: Paint) -> String {
        if self.entries.is_empty() {
            let path = clean(&self.archive);
            return if self.exists {
                format!("nothing in the archive {path}\n")
            } else {
                format!("no archive at {path} yet; `dyni record` makes one\n")
            };
        }
        let mut text = table(&self.entries, paint);
        let count = plural(self.entries.len() as u64, "record", "records");
        text.push_str(&format!("{count}, {} in {}\n", human_bytes(self.bytes), clean(&self.archive)));
        text
    }
}

fn table(entries: &[EntryReport], paint: Paint) -> String {
    let mut table = Table::new(&[
        ("id", Align::Left),
        ("kind", Align::Left),
        ("program", Align::Left),
        ("stored (UTC)", Align::Left),
        ("size", Align::Right),
        ("what", Align::Left),
    ]);
    for entry in entries {
        let (id, kind, program, stored_s, bytes, what) = match entry {
            EntryReport::Profile { id, program, label, method, duration_ns, samples, bytes, stored_s, .. } => {
                let count = plural(*samples, "sample", "samples");
                let label = if label.is_empty() { String::new() } else { format!(", \"{}\"", short(label)) };
                let what = format!("{count} in {}, {}{label}", human_ns(*duration_ns), clean(method));
                (id, "profile", program, *stored_s, *bytes, what)
            }
            EntryReport::Plan { id, program, purpose, passes, functions, bytes, stored_s, .. } => {
                let count = plural(*functions, "function", "functions");
                let what = format!("{}, {count}, {}", clean(purpose), short(&passes.join(" ")));
                (id, "plan", program, *stored_s, *bytes, what)
            }
            EntryReport::WorkingSet { id, program, recordings, files, pages, bytes, stored_s, .. } => {
                let (pages, files) = (plural(*pages, "page", "pages"), plural(*files, "file", "files"));
                let what = format!("{pages} of {files}, {}", plural(*recordings, "recording", "recordings"));
                (id, "working set", program, *stored_s, *bytes, what)
            }
        };
        let id = id.get(..BlobId::SHORT).unwrap_or(id);
        table.row([id.to_owned(), kind.into(), short(program), utc(stored_s), human_bytes(bytes), what]);
    }
    table.render("", paint)
}

/// `dyni archive rm --json`.
#[derive(Debug, Serialize)]
struct RmReport {
    /// What was removed.
    removed: Vec<Removed>,
}

#[derive(Debug, Serialize)]
struct Removed {
    id: String,
    kind: &'static str,
}

fn rm(args: &RmArgs, path: &Path) -> Result<RmReport, Failure> {
    if !path.exists() {
        return Err(ArchiveError::Missing(path.to_owned()).into());
    }
    let mut archive = Archive::open(path)?;
    // All are looked up before the first goes, so that a slip in the last leaves everything in place.
    let mut ids: Vec<BlobId> = Vec::new();
    for text in &args.ids {
        let prefix: BlobPrefix = text.parse().map_err(ArchiveError::from)?;
        ids.push(archive.identify(&prefix)?.0);
    }
    ids.sort_unstable();
    ids.dedup();
    let mut removed = Vec::new();
    for id in ids {
        match archive.remove(&id.into()) {
            Ok((id, kind)) => removed.push(Removed { id: id.hex(), kind: kind.name() }),
            // Another process was faster, which is as good.
            Err(ArchiveError::NoSuchId { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(RmReport { removed })
}

impl Report for RmReport {
    fn text(&self, _: Paint) -> String {
        self.removed.iter().map(|r| format!("removed {} {}\n", r.kind, &r.id[..BlobId::SHORT])).collect()
    }
}

/// `dyni archive gc --json`.
#[derive(Debug, Serialize)]
struct GcOutcome {
    /// Whether nothing was done.
    dry_run: bool,
    /// What was, or would be, removed; the oldest first.
    removed: Vec<EntryReport>,
    /// The ids of records that no list shows, removed too.
    orphans: Vec<String>,
    /// The sealed bytes of both together.
    freed_bytes: u64,
    /// How many records are left.
    kept: u64,
    /// Their sealed bytes.
    kept_bytes: u64,
}

fn gc(args: &GcArgs, path: &Path) -> Result<GcOutcome, Failure> {
    const DAY_S: u64 = 24 * 3600;
    let now_s = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let policy = GcPolicy {
        max_bytes: args.max_size,
        stored_since_s: args.max_age.map(|days| now_s.saturating_sub(u64::from(days) * DAY_S)),
        dry_run: args.dry_run,
    };
    let report = match path.exists() {
        // Looking needs no right to write.
        true if args.dry_run => Archive::open_read_only(path)?.gc(&policy)?,
        true => Archive::open(path)?.gc(&policy)?,
        false => GcReport::default(),
    };
    Ok(GcOutcome {
        dry_run: args.dry_run,
        removed: report.removed.iter().map(EntryReport::from).collect(),
        orphans: report.orphans.iter().map(BlobId::hex).collect(),
        freed_bytes: report.freed_bytes,
        kept: report.kept,
        kept_bytes: report.kept_bytes,
    })
}

impl Report for GcOutcome {
    fn text(&self, paint: Paint) -> String {
        let mut text = if self.removed.is_empty() { String::new() } else { table(&self.removed, paint) };
        if !self.orphans.is_empty() {
            let count = plural(self.orphans.len() as u64, "record that", "records that");
            text.push_str(&format!("{count} no list shows\n"));
        }
        let count = plural((self.removed.len() + self.orphans.len()) as u64, "record", "records");
        let freed = human_bytes(self.freed_bytes);
        let verb = if self.dry_run { "would remove" } else { "removed" };
        let kept = plural(self.kept, "record", "records");
        text.push_str(&format!("{verb} {count}, {freed}; {kept}, {} kept\n", human_bytes(self.kept_bytes)));
        text
    }
}

/// Text of unknown origin as a terminal may have it.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The same for a cell of a table.
fn short(text: &str) -> String {
    const MOST: usize = 40;
    let mut out: String = clean(text).chars().take(MOST).collect();
    if text.chars().nth(MOST).is_some() {
        out.pop();
        out.push('…');
    }
    out
}

/// Seconds since 1970-01-01 UTC as `2026-02-03 04:05`; empty beyond the year 9999.
pub(crate) fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    if days > 2_932_896 {
        return String::new();
    }
    // Years counted from March, so that the leap day is a year's last; eras of 400 years, 146,097 days each.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", second / 3600, second % 3600 / 60)
}

/// A size on the command line: bytes, or with K, M, G (of 1024).
fn size(text: &str) -> Result<u64, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let scale: u64 = match unit.to_ascii_uppercase().trim_end_matches('B').trim() {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return Err("expected a number of bytes, or one with K, M or G, as in 20M".into()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a number first, as in 20M".to_owned())?;
    number.checked_mul(scale).ok_or_else(|| "is too large".to_owned())
}

/// The kind and id of a record as the first line of `show` has them.
fn heading(kind: Kind, id: &str, paint: Paint) -> String {
    format!("{} {}\n", kind.name(), paint.bold(id))
}

/// A label and its value on a line of `show`; nothing if there is no value.
fn line(label: &str, value: &str) -> String {
    if value.is_empty() { String::new() } else { format!("  {label:<10}{}\n", clean(value)) }
}

#[cfg(test)]
mod tests;
