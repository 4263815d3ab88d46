//! `dyni archive export --format`: one profile for another tool.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use dyni_profiles::{Archive, ArchiveError};
use dyni_schema::envelope::{BlobId, BlobPrefix, Kind};
use dyni_schema::{BuildId, Profile};
use serde::Serialize;

use super::exchange::{self, ExportArgs};
use super::{clean, fdata};
use crate::errors::Failure;
use crate::modules::{self, Binary};
use crate::output::{Output, Paint, Report, human_bytes, plural};

/// What another tool reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For BOLT: `llvm-bolt -data`
    Fdata,
}

impl Format {
    /// The word for it on the command line and in JSON.
    const fn name(self) -> &'static str {
        match self {
            Self::Fdata => "fdata",
        }
    }

    /// Whether a file that begins so is of this format, so that a new one may take its place.
    fn is_same(self, begins: &[u8]) -> bool {
        match self {
            Self::Fdata => dyni_profiles::fdata::Fdata::looks_like(begins),
        }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// How many functions it tells of.
    pub functions: u64,
    /// How many lines or samples it has, each with a count.
    pub rows: u64,
    /// Samples, or counts, in code for which the format has no place or no name is known.
    pub left_out: u64,
    /// The file's length.
    pub bytes: u64,
}

/// `dyni archive export --format FORMAT --json`.
#[derive(Debug, Serialize)]
struct FormatOutcome {
    /// The file that was written.
    file: String,
    /// Its format.
    format: &'static str,
    /// The profile's id.
    profile: String,
    program: String,
    /// The names of the modules that it tells of.
    modules: Vec<String>,
    functions: u64,
    rows: u64,
    left_out: u64,
    bytes: u64,
}

/// Writes a profile in another tool's format and prints what is in it.
///
/// # Errors
/// There is no such profile, it has nothing for that tool, or something can't be read or written.
pub fn export(args: &ExportArgs, format: Format, archive: &Path, out: Output) -> Result<(), Failure> {
    let (id, mut profile) = choose(args, &Archive::open_read_only(archive)?)?;
    let what = format!("export profile {} as {}", id.short(), format.name());
    let lacks = |id: &&BuildId| profile.module(id).is_none();
    if let Some(absent) = args.build_id.iter().find(lacks) {
        let why = format!("it saw nothing of the module {}", absent.hex());
        return Err(Failure::failed(what, why).help("`dyni archive show` lists the modules that it saw"));
    }
    profile.modules.retain(|m| args.build_id.is_empty() || args.build_id.contains(&m.build_id));
    match format {
        Format::Fdata => fdata::choose_module(&mut profile, args.build_id.len(), &what)?,
    }
    let binaries = binaries(&profile, &args.binary)?;
    let outcome = exchange::write(
        &args.file,
        |begins| format.is_same(begins),
        out,
        |name, to| {
            let what = format!("{what} to {name}");
            let written = match format {
                Format::Fdata => fdata::write(&profile, &binaries, to, &what)?,
            };
            Ok(FormatOutcome {
                file: name.to_owned(),
                format: format.name(),
                profile: id.hex(),
                program: profile.program.clone(),
                modules: profile.modules.iter().map(|m| m.name.clone()).collect(),
                functions: written.functions,
                rows: written.rows,
                left_out: written.left_out,
                bytes: written.bytes,
            })
        },
    )?;
    exchange::tell(&args.file, &outcome, out);
    Ok(())
}

/// The profile that is meant: the one that is named, or the newest that has to do with the program or the modules.
fn choose(args: &ExportArgs, archive: &Archive) -> Result<(BlobId, Profile), Failure> {
    let id = match (&args.profile, &args.program) {
        (Some(words), _) => archive.find_profile(words)?,
        (None, Some(program)) => archive.latest_profile(program)?,
        (None, None) => {
            let newest = archive.profiles_for(&args.build_id)?.first().map(|p| p.id);
            let what = args.build_id.iter().map(BuildId::hex).collect::<Vec<_>>().join(", ");
            newest.ok_or(ArchiveError::NoneFor { kind: Kind::Profile, what })?
        }
    };
    Ok(archive.profile(&BlobPrefix::from(id))?)
}

/// The profile's binaries that are at hand: those that were named, others from where they were recorded.
fn binaries(profile: &Profile, given: &[PathBuf]) -> Result<Vec<Binary>, Failure> {
    let mut binaries = Vec::new();
    for path in given {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let binary = Binary::read(path, &name)?;
        if profile.module(binary.image.build_id()).is_none() {
            let why = format!("its build-id is {}, of which the profile saw nothing", binary.image.build_id().hex());
            return Err(Failure::refused(format!("use {}", path.display()), why)
                .help("`dyni archive show` lists the build-ids that the profile saw"));
        }
        binaries.push(binary);
    }
    let mut rest = profile.clone();
    rest.modules.retain(|m| binaries.iter().all(|b| *b.image.build_id() != m.build_id));
    binaries.extend(modules::of_profile(&rest, &modules::running(&rest)));
    Ok(binaries)
}

impl Report for FormatOutcome {
    fn text(&self, _: Paint) -> String {
        let modules = self.modules.join(", ");
        let mut text = format!(
            "profile {:.12} of {} as {}: {}, {} in {}, {}\n",
            self.profile,
            clean(&modules),
            self.format,
            plural(self.functions, "function", "functions"),
            plural(self.rows, "row", "rows"),
            clean(&self.file),
            human_bytes(self.bytes)
        );
        if self.left_out > 0 {
            text.push_str(&format!(
                "{} left out, in code that has no function\n",
                plural(self.left_out, "count", "counts")
            ));
        }
        text
    }
}
