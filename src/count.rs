//! Exact counts: after the samples, the hot functions run for short bursts in copies that count.
//!
//! The same applier installs and removes them as any other generation; only the plan differs.

use dyni_analyzer::counting::counting_plan;
use dyni_analyzer::plan::{Module, Options};
use dyni_applier::{Applier, Choice, CounterReader, Tally, counters};
use dyni_collector::Group;
use dyni_schema::envelope::{BlobId, seal};
use dyni_schema::{Branches, BuildId, LinkAddr, Method, Profile, Ranges};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::analyze::UNWIND_REGISTERED;
use crate::apply::{ApplyReport, apply_group_with};
use crate::errors::Failure;
use crate::interrupt::Interruptible;
use crate::modules::Binary;
use crate::output::Output;
use crate::store::StoredPlan;
use crate::targets::{few_of, root_first};
use crate::undo::undo_group;

/// The part of a recording that is for counting: one in this many.
const SHARE: u32 = 4;
/// How often counting begins and ends in that part.
const BURSTS: u32 = 4;
/// Copies that count are up to twice as slow, and the whole recording may slow the program down by a tenth: so they are in
/// force for at most one part in this many of the time for counting.
const DUTY: u32 = 3;
/// How often a burst looks what was called last through pointers, and whether it was asked to end.
const LOOK: Duration = Duration::from_millis(2);

/// How long to sample of a recording that is to be counted too.
pub fn sampling_part(duration: Duration) -> Duration {
    duration - duration / SHARE
}

/// Counts what `profile` found hot for the rest of a recording of this `duration`, and adds the counts to it.
///
/// # Errors
/// Why nothing was counted; the program is as it was, and so is the profile.
pub fn count_group(
    group: &Group,
    profile: &mut Profile,
    binaries: &[Binary],
    duration: Duration,
    out: Output,
) -> Result<(), Failure> {
    let stored = plan(profile, binaries)?;
    let group = &mut few_of(group);
    let mut applier = Applier::new(&stored.plan, None)?;
    let part = duration / SHARE / BURSTS;
    let interruptible = Interruptible::new();
    // First which of the functions run at all, by patches at their entries alone: then the others can be left out, and those
    // get patches wherever execution may come back from an indirect jump, so that no count is missing.
    let mut choice = Choice::Entries;
    let mut tally = tally_of(group);
    let mut calls = Calls::default();
    for burst in 0..BURSTS {
        let begin = Instant::now();
        group.refresh()?;
        let applied = apply_group_with(&mut applier, &choice, &stored, group, out)?;
        out.detail(&summary(&applied));
        let in_force = Instant::now();
        let readers: Vec<_> = group.members.iter().filter_map(|m| CounterReader::open(m.pid).ok()).collect();
        while in_force.elapsed() < part / DUTY && !interruptible.asked() {
            std::thread::sleep(LOOK.min(part / DUTY));
            readers.iter().for_each(|reader| calls.look(reader));
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
            choice = with_samples(tally.ran(), profile);
            tally = tally_of(group);
        }
        std::thread::sleep(part.saturating_sub(begin.elapsed()));
    }
    add(profile, &tally.blocks(), &calls, binaries)
}

/// A tally that begins with what the group's counters say now.
fn tally_of(group: &Group) -> Tally {
    let mut tally = Tally::default();
    group.members.iter().for_each(|m| tally.begin(counters(m.pid).unwrap_or_default()));
    tally
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

/// What the counters say of each module: for each counted block its length in bytes and how often it ran.
type Counted = BTreeMap<BuildId, BTreeMap<LinkAddr, (u32, u64)>>;

/// What calls through pointers were seen to have called, by module: site and callee, and how often it was the last one when
/// it was looked at. Callee 0 stands for all that are not in the module.
#[derive(Debug, Default)]
struct Calls(BTreeMap<BuildId, BTreeMap<(LinkAddr, LinkAddr), u64>>);

impl Calls {
    fn look(&mut self, reader: &CounterReader) {
        for (module, site, callee) in reader.last_calls() {
            let seen = self.0.entry(module).or_default();
            *seen.entry((site, callee.unwrap_or_default())).or_default() += 1;
        }
    }

    /// As a profile has them.
    fn branches(&self, module: &BuildId) -> Branches {
        let seen = || self.0.get(module).into_iter().flatten();
        Branches {
            from: seen().map(|(call, _)| call.0.0).collect(),
            to: seen().map(|(call, _)| call.1.0).collect(),
            count: seen().map(|(_, count)| *count).collect(),
            mispredicted: seen().map(|_| 0).collect(),
        }
    }
}

/// Adds the places of a profile's samples: a loop that is never left is not entered either, so what was sampled is counted
/// even if it did not seem to run.
fn with_samples(mut places: BTreeMap<BuildId, BTreeSet<LinkAddr>>, profile: &Profile) -> Choice {
    for module in &profile.modules {
        places.entry(module.build_id.clone()).or_default().extend(module.samples.iter().map(|(at, _)| at));
    }
    Choice::FunctionsWith(places)
}

/// Puts the counts into the profile. A function that was sampled and never counted keeps its samples instead: it may have
/// had no work just then, or one that was under way all the time.
fn add(profile: &mut Profile, counted: &Counted, calls: &Calls, binaries: &[Binary]) -> Result<(), Failure> {
    let (mut confirmed, mut sampled) = (0, 0);
    let mut all_ranges = BTreeMap::new();
    for module in &profile.modules {
        let Some(blocks) = counted.get(&module.build_id) else { continue };
        let Some(binary) = binaries.iter().find(|b| *b.image.build_id() == module.build_id) else { continue };
        let index = |at: LinkAddr| binary.functions.index_at(at);
        let ran: BTreeSet<_> = blocks.iter().filter(|b| b.1.1 > 0).filter_map(|b| index(*b.0)).collect();
        let watched: BTreeSet<_> = blocks.keys().filter_map(|&at| index(at)).collect();
        let mut silent = BTreeSet::new();
        for (at, count) in module.samples.iter() {
            let Some(function) = index(at).filter(|f| watched.contains(f)) else { continue };
            sampled += count;
            if ran.contains(&function) {
                confirmed += count;
            } else {
                silent.insert(function);
            }
        }
        let kept: Vec<_> = blocks.iter().filter(|b| index(*b.0).is_none_or(|f| !silent.contains(&f))).collect();
        let ranges = Ranges {
            start: kept.iter().map(|(at, _)| at.0).collect(),
            end: kept.iter().map(|(at, (size, _))| at.0 + u64::from(size.saturating_sub(1))).collect(),
            count: kept.iter().map(|(_, block)| block.1).collect(),
        };
        all_ranges.insert(module.build_id.clone(), ranges);
    }
    if confirmed * 2 <= sampled {
        return Err(Failure::failed("count", "the program did something else than while it was sampled"));
    }
    for module in &mut profile.modules {
        module.ranges = all_ranges.remove(&module.build_id).unwrap_or_default();
        module.branches = calls.branches(&module.build_id);
    }
    profile.method = Method::Count;
    Ok(())
}
