//! `dyni demo`: the main job on a built-in target, with nothing to install.
//!
//! Two identical processes serve queries from SQLite, side by side ([`measure`]). B is recorded, analysed and optimised
//! while it serves, and at the end put back: its code must then be what its files hold, byte for byte, and every answer of
//! both must have been right.

mod board;
mod measure;
mod report;

use std::time::Duration;

use dyni_collector::{Group, Target};
use dyni_schema::Method;

use crate::analyze::for_program;
use crate::apply::apply_group;
use crate::cli::{DemoArgs, MethodArg};
use crate::errors::Failure;
use crate::output::Output;
use crate::record::profile_group;
use crate::undo::undo_group;
use measure::{Measured, Pair, text_is_original};
use report::{DemoReport, Figures, Recorded};

/// Slices of each measurement.
const SLICES: u32 = 9;
/// The length of a slice.
const SLICE: Duration = Duration::from_millis(500);
/// What passes after a change before the next measurement.
const SETTLE: Duration = Duration::from_millis(500);

/// Runs the demo.
///
/// # Errors
/// What of it could not be done here, and why; no process is left behind.
pub fn run(args: &DemoArgs, out: Output) -> Result<(), Failure> {
    out.note("dyni demo: two identical processes serve queries from SQLite; B is optimised while it serves");
    let mut pair = {
        let _progress = out.progress("starting A and B");
        Pair::start()?
    };
    let target = Target::by_pid(pair.b.pid())?;
    // A is the same program too; it stays as it is.
    let mut group = Group::alone(&target);
    let before = measured(&mut pair, "measuring both as they are", out)?;
    let (recording, binaries) =
        profile_group(&mut group, args.duration, MethodArg::Auto, "demo", out).map_err(explained)?;
    if recording.profile.method == Method::Ptrace {
        out.note("only the weakest sampler works here: `dyni doctor` says what to change for better ones");
    }
    let analyzed = for_program(&recording.profile, &binaries, out)?;
    let applied = apply_group(&analyzed.stored, &mut group, None, out).map_err(explained)?;
    let after = measured(&mut pair, "measuring both again", out)?;
    let state = dyni_applier::status(target.pid)?.state;
    undo_group(&mut group)?;
    std::thread::sleep(SETTLE);
    let (text_restored, text_bytes) = text_is_original(target.pid)?;
    pair.alive()?;
    let (a, b) = (pair.a.finish()?, pair.b.finish()?);

    let report = DemoReport {
        state: crate::targets::StateWord(state),
        plan: analyzed.stored.id.clone(),
        recorded: Recorded::of(&recording.profile),
        functions: applied.processes.iter().flat_map(|p| &p.modules).map(|m| m.functions).sum(),
        patches: applied.processes.iter().flat_map(|p| &p.modules).map(|m| m.patches).sum(),
        hot_bytes: applied.processes.iter().flat_map(|p| &p.modules).map(|m| m.hot_bytes).sum(),
        huge_page: applied.processes.iter().flat_map(|p| &p.modules).any(|m| m.huge_page),
        refused: applied.refused(),
        layout_before: analyzed.before,
        layout_after: analyzed.after,
        stop_ns: applied.longest_stop_ns(),
        before: Figures::of(&before),
        after: Figures::of(&after),
        gain: after.ratio / before.ratio,
        operations: [a.operations, b.operations],
        wrong_answers: a.wrong + b.wrong,
        answers_agree: a.answers == b.answers && a.ready && b.ready,
        text_restored,
        text_bytes,
        pid: target.pid,
        name: target.name.clone(),
    };
    out.report(&report);
    report.verdict()
}

fn measured(pair: &mut Pair, what: &str, out: Output) -> Result<Measured, Failure> {
    let bar = out.progress_of(what, SLICES.into());
    std::thread::sleep(SETTLE);
    let mut done = 0;
    pair.measure(SLICES, SLICE, || {
        done += 1;
        bar.set(done);
    })
}

/// What the demo needs and a host may withhold, in its own words.
fn explained(failure: Failure) -> Failure {
    if failure.status() == crate::errors::Status::Refused {
        return failure.help(
            "the demo needs leave to trace its own children (ptrace) and to sample them; \
             containers often forbid both: run it on the host, or see `dyni doctor`",
        );
    }
    failure
}
