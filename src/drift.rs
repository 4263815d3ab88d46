//! `dyni drift`: where a dynimized program spends its time now. The daemon asks this of each from time to time.

use std::collections::BTreeMap;

use dyni_applier::State;
use dyni_collector::record::MethodChoice;
use dyni_schema::Profile;
use serde::Serialize;

use crate::cli::DriftArgs;
use crate::daemon::drift::Watch;
use crate::errors::Failure;
use crate::output::{Output, Paint, Report, plural};
use crate::record::record_group;
use crate::targets::{find, state_line};

/// Samples a second and running thread. A few seconds of it every few minutes cost a program less than a ten-thousandth of
/// its time, and tell enough of one that is in the kernel for most of it.
const FREQUENCY_HZ: u64 = 499;
/// Code is told apart in pieces of so many bytes, which needs no binary to be read.
const PIECE: u64 = 256;
/// So many of the busiest pieces are kept.
const PIECES: usize = 256;

/// `dyni drift --json`.
#[derive(Debug, Serialize)]
struct DriftReport {
    program: String,
    root: i32,
    /// The share of the samples in modules that have copies which is not in these.
    in_original: f64,
    watch: Watch,
    #[serde(skip)]
    processes: usize,
}

/// Samples a dynimized program for a few seconds at a low rate.
///
/// # Errors
/// It can't be found or sampled, or is not dynimized (exit status 3).
pub fn run(args: &DriftArgs, out: Output) -> Result<(), Failure> {
    let group = find(&args.pid)?;
    let status = dyni_applier::status(group.root.pid)?;
    if status.state != State::Dynimized {
        return Err(Failure::refused(
            format!("watch {}, pid: {}", group.root.name, group.root.pid),
            format!("it is {}", status.state.name()),
        )
        .help("`dyni optimize` it first: what is looked for is how well that still fits"));
    }
    let recording = record_group(&group, args.duration, MethodChoice::Auto, "", Some(FREQUENCY_HZ), out)?;
    let copied: Vec<_> = status.modules.iter().filter(|m| m.in_force > 0).map(|m| m.build_id.clone()).collect();
    let watch = watch(&recording.profile, &copied);
    out.report(&DriftReport {
        program: group.root.name.clone(),
        root: group.root.pid,
        in_original: watch.in_original(),
        watch,
        processes: group.members.len(),
    });
    Ok(())
}

/// What a recording says about modules with these build-ids, which have copies.
fn watch(profile: &Profile, copied: &[String]) -> Watch {
    let mut pieces: BTreeMap<String, u64> = BTreeMap::new();
    let mut samples = 0;
    for module in profile.modules.iter().filter(|m| copied.contains(&m.build_id.hex())) {
        samples += module.samples.total();
        for (at, count) in module.samples.iter() {
            *pieces.entry(format!("{}+{:#x}", module.name, at.0 / PIECE * PIECE)).or_default() += count;
        }
    }
    let mut busiest: Vec<_> = pieces.into_iter().collect();
    busiest.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    busiest.truncate(PIECES);
    Watch { samples, in_cache: profile.in_cache.min(samples), pieces: busiest.into_iter().collect() }
}

impl Report for DriftReport {
    fn text(&self, paint: Paint) -> String {
        format!(
            "{}\n  {} of {} in copies, {} in original code of the same modules\n",
            state_line(&self.program, self.root, self.processes, State::Dynimized.name()),
            paint.bold(&format!("{:.0} %", 100.0 - self.in_original * 100.0)),
            plural(self.watch.samples, "sample", "samples"),
            paint.bold(&format!("{:.0} %", self.in_original * 100.0)),
        )
    }
}
