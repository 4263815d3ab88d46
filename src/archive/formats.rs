//! `dyni archive export --format`: one profile for another tool.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use dyni_profiles::view::{Drawn, NamedFunction, NamedModule, Text, View};
use dyni_profiles::{Archive, ArchiveError, firefox, pprof};
use dyni_schema::envelope::{BlobId, BlobPrefix, Kind};
use dyni_schema::{BuildId, LinkAddr, ModuleProfile, Profile};
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
    /// For `go tool pprof`, and what else reads profile.proto
    Pprof,
    /// For the Firefox Profiler, profiler.firefox.com
    Firefox,
}

impl Format {
    /// The word for it on the command line and in JSON.
    const fn name(self) -> &'static str {
        match self {
            Self::Fdata => "fdata",
            Self::Pprof => "pprof",
            Self::Firefox => "firefox",
        }
    }

    /// Whether a file that begins so is of this format, so that a new one may take its place.
    fn is_same(self, begins: &[u8]) -> bool {
        match self {
            Self::Fdata => dyni_profiles::fdata::Fdata::looks_like(begins),
            Self::Pprof => begins.starts_with(&pprof::MAGIC),
            Self::Firefox => firefox::looks_like(begins),
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
    /// Samples, or executions of branches, in code for which the format has no place.
    pub left_out: u64,
    /// Those that are in it under their address, as no name is known.
    pub unnamed: u64,
}

/// Counts what goes through.
struct Counted<'a> {
    to: &'a mut dyn Write,
    bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
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
    unnamed: u64,
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
    if format == Format::Fdata {
        fdata::choose_module(&mut profile, args.build_id.len(), &what)?;
    }
    let binaries = binaries(&profile, &args.binary)?;
    let outcome = exchange::write(
        &args.file,
        |begins| format.is_same(begins),
        out,
        |name, to| {
            let what = format!("{what} to {name}");
            let mut to = Counted { to, bytes: 0 };
            let written = match format {
                Format::Fdata => fdata::write(&profile, &binaries, &mut to, &what)?,
                Format::Pprof => draw(&profile, &id, &binaries, &what, |view| pprof::write(view, &mut to))?,
                Format::Firefox => draw(&profile, &id, &binaries, &what, |view| firefox::write(view, &mut to))?,
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
                unnamed: written.unnamed,
                bytes: to.bytes,
            })
        },
    )?;
    exchange::tell(&args.file, &outcome, out);
    Ok(())
}

/// What to say of a file that can't be written.
pub fn cant_write(what: &str, e: &io::Error) -> Failure {
    Failure::failed(what, format!("it could not be written: {e}"))
        .help("check the path, its permissions and the room on its disk")
}

/// Lets a writer of drawings have the profile with what is known of its modules.
fn draw(
    profile: &Profile,
    id: &BlobId,
    binaries: &[Binary],
    what: &str,
    write: impl FnOnce(&View<'_>) -> io::Result<Drawn>,
) -> Result<Written, Failure> {
    let id = id.hex();
    let known = |m: &ModuleProfile| binaries.iter().find(|b| *b.image.build_id() == m.build_id).map(|b| named(b, m));
    let view = View { profile, id: &id, modules: profile.modules.iter().filter_map(known).collect() };
    if view.seen().is_empty() {
        return Err(Failure::refused(what, "it has neither samples nor branches"));
    }
    let drawn = write(&view).map_err(|e| cant_write(what, &e))?;
    Ok(Written { functions: drawn.functions, rows: drawn.rows, left_out: 0, unnamed: drawn.unnamed })
}

/// What is known of a module, as far as anything was seen there. A function without a name is called by where it begins.
fn named(binary: &Binary, seen: &ModuleProfile) -> NamedModule {
    let image = &binary.image;
    let mut functions: Vec<NamedFunction> = Vec::new();
    let mut hit: Vec<u64> = seen.samples.addr.iter().chain(&seen.branches.from).copied().collect();
    hit.sort_unstable();
    for at in hit {
        let Some(f) = binary.functions.at(LinkAddr(at)) else { continue };
        if functions.last().is_some_and(|last| last.start == f.start) {
            continue;
        }
        let by_place = || format!("{}+{}", seen.name, f.start);
        let symbol = image.symbol_at(f.start).filter(|s| s.1 == f.start).map(|s| s.0.to_owned());
        functions.push(NamedFunction {
            start: f.start,
            size: f.size,
            name: f.name(image).unwrap_or_else(by_place),
            symbol: symbol.unwrap_or_else(by_place),
        });
    }
    let text = image.segments().iter().filter(|s| s.executable);
    NamedModule {
        build_id: seen.build_id.clone(),
        base: image.base(),
        is_fixed: image.kind().is_fixed(),
        text: text.map(|s| Text { address: s.address, offset: s.offset, size: s.file_size }).collect(),
        functions,
    }
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
        if self.unnamed > 0 {
            text.push_str(&format!(
                "{} without a name: no function is there, or its file is not at hand\n",
                plural(self.unnamed, "count", "counts")
            ));
        }
        text
    }
}
