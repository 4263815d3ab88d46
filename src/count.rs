//! Exact counts: after the samples, the hot functions run for short bursts in copies that count.
//!
//! The same applier installs and removes them as any other generation; only the plan differs.

use dyni_analyzer::counting::counting_plan;
use dyni_analyzer::plan::{Module, Options};
use dyni_applier::{Applier, Choice, Tally, counters};
use dyni_collector::Group;

use dyni_schema::envelope::{BlobId, seal};
use dyni_schema::{BuildId, LinkAddr, Method, Profile, Ranges};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::analyze::UNWIND_REGISTERED;
use crate::apply::{ApplyReport, apply_group_with};
use crate::errors::Failure;
use crate::interrupt::Interruptible;
use crate::modules::Binary;
use crate::output::Output;
use crate::store::StoredPlan;
use crate::targets::root_first;
use crate::undo::undo_group;

/// The part of a recording that is for counting: one in this many.
const SHARE: u32 = 4;
/// How often counting begins and ends in that part.
const BURSTS: u32 = 4;
/// Copies that count are up to twice as slow, and the whole recording may slow the program down by a tenth: so they are in
/// force for at most one part in this many of the time for counting.
const DUTY: u32 = 3;
/// How often a burst looks whether it was asked to end.
const LOOK: Duration = Duration::from_millis(20);

/// How long to sample of a recording that is to be counted too.
pub fn sampling_part(duration: Duration) -> Duration {
    duration - duration / SHARE
}

/// Counts what `profile` found hot for the rest of a recording of this `duration`, and adds the counts to it.
///
/// # Errors
/// Why nothing was counted; the program is as it was, and so is the profile.
pub fn count_group(
    group: &mut Group,
    profile: &mut Profile,
    binaries: &[Binary],
    duration: Duration,
    out: Output,
) -> Result<(), Failure> {
    let stored = plan(profile, binaries)?;
    let mut applier = Applier::new(&stored.plan, None)?;
    let part = duration / SHARE / BURSTS;
    let interruptible = Interruptible::new();
    // First which of the functions run at all, by patches at their entries alone: then the others can be left out, and those
    // get patches wherever execution may come back from an indirect jump, so that no count is missing.
    let mut choice = Choice::Entries;
    let mut tally = Tally::default();
    group.members.iter().for_each(|m| tally.begin(counters(m.pid).unwrap_or_default()));
    for burst in 0..BURSTS {
        let begin = Instant::now();
        group.refresh()?;
        let applied = apply_group_with(&mut applier, &choice, &stored, group, out)?;
        out.detail(&summary(&applied));
        let in_force = Instant::now();
        while in_force.elapsed() < part / DUTY && !interruptible.asked() {
            std::thread::sleep(LOOK.min(part / DUTY));
        }
        // Those that were born meanwhile count too.
        let refreshed = group.refresh();
        for member in root_first(group) {
            tally.end(counters(member.pid).unwrap_or_default());
        }
        undo_group(group)?;
        refreshed?;
        if interruptible.asked() {
            break;
        }
        if burst == 0 {
            choice = Choice::FunctionsWith(tally.ran());
            tally = Tally::default();
            root_first(group).iter().for_each(|m| tally.begin(counters(m.pid).unwrap_or_default()));
        }
        std::thread::sleep(part.saturating_sub(begin.elapsed()));
    }
    add(profile, &tally.blocks())
}

fn plan(profile: &Profile, binaries: &[Binary]) -> Result<StoredPlan, Failure> {
    let cant = |e: &dyn std::fmt::Display| Failure::failed("decide what to count", e);
    let sealed = seal(profile).map_err(|e| cant(&e))?;
    let options =
        Options { unwind_registered: UNWIND_REGISTERED, profile_hash: BlobId::of(&sealed).0, ..Options::default() };
    let modules: Vec<Module<'_>> = binaries.iter().map(Binary::module).collect();
    let plan = counting_plan(profile, &modules, &options).map_err(|e| cant(&e))?;
    if plan.function_count() == 0 {
        return Err(Failure::refused("count", "no function that was sampled can be copied"));
    }
    StoredPlan::new(plan)
}

fn summary(applied: &ApplyReport) -> String {
    let modules = || applied.processes.first().into_iter().flat_map(|p| &p.modules);
    let refused = applied.refused();
    let reasons: Vec<_> = refused.iter().map(|r| format!("{} {}", r.count, r.reason)).collect();
    let functions: usize = modules().map(|m| m.functions).sum();
    let patches: usize = modules().map(|m| m.patches).sum();
    format!("counting {functions} functions, {patches} patches; left out: {}", reasons.join(", "))
}

/// Puts the counts into the profile.
fn add(profile: &mut Profile, counted: &BTreeMap<BuildId, BTreeMap<LinkAddr, (u32, u64)>>) -> Result<(), Failure> {
    if !counted.values().flat_map(|blocks| blocks.values()).any(|&(_, count)| count > 0) {
        return Err(Failure::failed("count", "nothing ran in the copies that count"));
    }
    for module in &mut profile.modules {
        let Some(blocks) = counted.get(&module.build_id) else { continue };
        module.ranges = Ranges {
            start: blocks.keys().map(|at| at.0).collect(),
            end: blocks.iter().map(|(at, (size, _))| at.0 + u64::from(size.saturating_sub(1))).collect(),
            count: blocks.values().map(|b| b.1).collect(),
        };
    }
    profile.method = Method::Count;
    Ok(())
}
