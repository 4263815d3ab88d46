//! Recordings of `perf record`, between [`dyni_collector::perf_import`] and the archive.

use std::io::{BufRead, Read};
use std::path::Path;

use dyni_collector::perf_data::{MAX_BYTES, PerfData, PerfDataError};
use dyni_collector::perf_import::{ImportOptions, LeftOut, import};
use dyni_schema::Profile;

use super::exchange::ImportArgs;
use super::fdata::modified;
use super::foreign::Recording;
use crate::errors::Failure;
use crate::modules::{self, Binary};

/// How many other programs are named.
const NAMED: usize = 3;

/// Makes a profile of what `perf record` has written.
///
/// # Errors
/// The file is damaged, nothing in it tells where the program's time went, or none of its binaries is at hand.
pub fn read(
    file: &Path,
    from: &mut dyn BufRead,
    args: &ImportArgs,
    what: &str,
) -> Result<(Profile, Recording), Failure> {
    let mut bytes = Vec::new();
    let read = from.take(MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| Failure::failed(what, format!("it could not be read: {e}")))?;
    // A slip in a name is told, and not taken for a module that is not here.
    for path in &args.binary {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        Binary::read(path, &name)?;
    }
    let options = ImportOptions { program: args.program.as_deref(), binaries: &args.binary };
    let imported = PerfData::parse(&bytes).and_then(|data| import(&data, &options));
    let (mut profile, left_out) = imported.map_err(|e| failure(what, &e))?;
    drop(bytes);
    profile.label.clone_from(&args.label);
    // A file is written when its recording ends.
    profile.start_s = modified(file).saturating_sub(profile.duration_ns / 1_000_000_000);
    let binaries = modules::of_profile(&profile, &[]);
    let binaries: Vec<_> = binaries.iter().map(Binary::module).collect();
    dyni_analyzer::plan::annotate(&mut profile, &binaries);
    let recording = Recording {
        file: file.display().to_string(),
        format: "perf.data",
        program: profile.program.clone(),
        method: profile.method.name(),
        functions: profile.modules.iter().map(|m| m.functions.start.len() as u64).sum(),
        used: profile.samples,
        ..Recording::default()
    };
    let recording = told(recording, &profile, &left_out);
    Ok((profile, recording))
}

/// Says what is not in the profile.
fn told(mut recording: Recording, profile: &Profile, left_out: &LeftOut) -> Recording {
    recording.leave_out(profile.kernel, "in the kernel");
    recording.leave_out(profile.outside, "in code of no file");
    for ((module, reason), &count) in &left_out.modules {
        recording.leave_out(count, format!("in {module}: {reason}"));
    }
    let names: Vec<_> = left_out.programs.keys().take(NAMED).map(String::as_str).collect();
    let more = if left_out.programs.len() > NAMED { ", …" } else { "" };
    recording.leave_out(
        left_out.programs.values().sum(),
        format!("of other programs ({}{more}), which --program names", names.join(", ")),
    );
    recording.leave_out(left_out.unknown, "of processes of which perf does not say what they ran");
    recording.leave_out(left_out.events, "of other events than the first");
    recording.leave_out(profile.lost, "lost by perf");
    if !left_out.unproven.is_empty() {
        let names = left_out.unproven.join(", ");
        recording
            .notes
            .push(format!("which builds these were perf does not say, their files of now are taken: {names}"));
    }
    recording
}

fn failure(what: &str, e: &PerfDataError) -> Failure {
    let failure = match e {
        PerfDataError::OtherMachine(_)
        | PerfDataError::Compressed
        | PerfDataError::Lacks(_)
        | PerfDataError::NotTime(_)
        | PerfDataError::TooLarge(_) => Failure::refused(what, e),
        _ => Failure::failed(what, e),
    };
    failure.help(e.help())
}
