//! Does it pay? The program runs in slices with the optimisation and without it by turns, and what it does for its
//! processor time is compared (`gain`). An optimisation that does not pay is taken out again.
//!
//! "Without" is a generation too: copies of the few functions that are counted, laid out as they were. So both slices
//! count the same blocks in the same way, and all other code is the original.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use dyni_analyzer::yardstick;
use dyni_applier::{Applier, ApplyError, Choice, CounterReader, ModuleStatus, Swap, Tally};
use dyni_collector::{Group, Target, cpu_time};
use dyni_schema::envelope::BlobId;
use dyni_schema::{BuildId, FunctionPlan, LinkAddr, ModulePlan};

use crate::apply::apply_group_with;
use crate::errors::{Failure, Status};
use crate::gain::{Estimate, Slice};
use crate::interrupt::Interruptible;
use crate::output::Output;
use crate::store::StoredPlan;
use crate::targets::{ROUNDS, born, few_of, has_ended, root_first};
use crate::undo::undo_group;

/// A slice is this part of the recording's duration.
const PART: u32 = 200;
/// But never shorter than this: in less no block runs often enough to be compared.
const SHORTEST: Duration = Duration::from_millis(10);
/// So much of a slice goes by after each change before it begins: caches and predictors have to forget and learn.
const WARM_UP: u32 = 4;
/// Nothing more is measured once the interval is this narrow on each side.
const CLOSE: f64 = 0.01;
/// How many pairs of slices are measured at most.
const MAX_PAIRS: usize = 1024;
/// For how many times the recording's duration it is measured, and for how many if it can't yet be told from no gain.
const LIMIT: u32 = 2;
const LIMIT_IN_DOUBT: u32 = 4;

/// What came of it.
#[derive(Debug)]
pub enum Verdict {
    /// It pays, and is in force.
    Pays(Estimate),
    /// It does not, and was taken out.
    TakenOut(Estimate),
    /// That could not be found out, for this reason; it is in force.
    Unknown(String),
}

/// Measures what a program gains by a plan that is in force in it, and takes the plan out if that is nothing. It takes
/// twice as long as a recording of this `duration`, or four times that.
///
/// # Errors
/// The program can't be changed any more; what was applied is taken out, as far as that can be.
pub fn check(
    applier: &mut Applier<'_>,
    stored: &StoredPlan,
    group: &mut Group,
    duration: Duration,
    out: Output,
) -> Result<Verdict, Failure> {
    let verdict = compare(applier, stored, group, duration, out);
    match &verdict {
        Ok(Verdict::TakenOut(_)) => drop(undo_group(group)?),
        Ok(Verdict::Pays(estimate)) => {
            group.refresh()?;
            for member in &group.members {
                // For `status`. Whoever ended meanwhile needs no note.
                let _ = applier.note_gain(member.pid, estimate.ratio.into());
            }
        }
        Ok(Verdict::Unknown(_)) => {}
        // What is in force where nobody knows: nothing, then.
        Err(_) => drop(undo_group(group)),
    }
    verdict
}

/// Measures; the plan is in force again afterwards, or an error says that it may not be.
fn compare(
    applier: &mut Applier<'_>,
    stored: &StoredPlan,
    group: &Group,
    duration: Duration,
    out: Output,
) -> Result<Verdict, Failure> {
    let without = StoredPlan::new(yardstick::plan(&stored.plan))?;
    if without.plan.function_count() == 0 {
        return Ok(Verdict::Unknown("no code of it runs at a rate that can be counted".to_owned()));
    }
    let mut yardstick = Applier::new(&without.plan, None)?;
    let mut few = few_of(group);
    undo_group(&mut few)?;
    few.refresh()?;
    match apply_group_with(&mut yardstick, &Choice::All, &without, &mut few, out.silent()) {
        Err(refusal) if refusal.status() == Status::Refused => {
            few.refresh()?;
            apply_group_with(applier, &Choice::All, stored, &mut few, out.silent())?;
            return Ok(Verdict::Unknown(refusal.to_string()));
        }
        done => drop(done?),
    }
    let trial = Trial {
        plans: [applier, &yardstick],
        members: HashMap::new(),
        blocks: without.plan.modules.iter().flat_map(blocks_of).collect(),
    };
    let verdict = trial.run(&mut few, duration, out)?;
    // Where the two could not take turns, that which was to be compared with is still in force: the code for a process that
    // was changed early may have been made anew for a later one, and is no longer that which the first one holds.
    if few.members.iter().any(|m| holds_another(m, stored)) {
        undo_group(&mut few)?;
        few.refresh()?;
        apply_group_with(applier, &Choice::All, stored, &mut few, out.silent())?;
    }
    Ok(verdict)
}

/// Whether copies of another plan than this one are in force in a process.
fn holds_another(member: &Target, stored: &StoredPlan) -> bool {
    let another = |m: &ModuleStatus| m.in_force > 0 && BlobId(m.plan).hex() != stored.id;
    dyni_applier::status(member.pid).is_ok_and(|s| s.modules.iter().any(another))
}

/// What is in force in a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arm {
    With,
    Without,
}

/// A program in which the two take turns.
struct Trial<'a, 'p> {
    plans: [&'a Applier<'p>; 2],
    /// By PID; `None` for one into which they were not applied.
    members: HashMap<i32, Option<Subject<'a>>>,
    blocks: BTreeSet<(BuildId, LinkAddr)>,
}

/// A process of it.
struct Subject<'a> {
    swap: Swap<'a>,
    counters: CounterReader,
}

fn blocks_of(module: &ModulePlan) -> impl Iterator<Item = (BuildId, LinkAddr)> + '_ {
    let probes = |f: &FunctionPlan| f.probes.iter().map(|&p| f.start().plus(u64::from(p))).collect::<Vec<_>>();
    module.functions.iter().flat_map(probes).map(|at| (module.build_id.clone(), at))
}

impl Trial<'_, '_> {
    fn run(mut self, group: &mut Group, duration: Duration, out: Output) -> Result<Verdict, Failure> {
        let expected = (duration * LIMIT).as_millis() as u64;
        let progress = out.progress_of("checking that it pays", expected);
        let interruptible = Interruptible::new();
        let slice = (duration / PART).max(SHORTEST);
        let start = Instant::now();
        let mut logs: Vec<f64> = Vec::new();
        for pair in 0..MAX_PAIRS {
            // Each state follows itself as often as the other: half the changes, and drift cancels out.
            let order = if pair % 2 == 0 { [Arm::Without, Arm::With] } else { [Arm::With, Arm::Without] };
            let mut slices = [Slice::default(), Slice::default()];
            for arm in order {
                self.change(arm, group)?;
                std::thread::sleep(slice / WARM_UP);
                slices[arm as usize] = self.measure(group, slice)?;
            }
            let [with, without] = &slices;
            logs.extend(with.against(without));
            progress.set(expected.min(start.elapsed().as_millis() as u64));
            if interruptible.asked() {
                break;
            }
            if pair % 4 == 3 {
                let estimate = Estimate::of(&logs);
                let in_doubt = estimate.is_some_and(|e| e.ratio.low < 1.0 && e.ratio.high > 1.0);
                let limit = duration * if in_doubt { LIMIT_IN_DOUBT } else { LIMIT };
                let narrow = estimate.is_some_and(|e| e.error() <= CLOSE);
                if start.elapsed() > limit || (narrow && !in_doubt) {
                    break;
                }
            }
        }
        self.change(Arm::With, group)?;
        Ok(match Estimate::of(&logs) {
            None => Verdict::Unknown("it did too little meanwhile".to_owned()),
            Some(estimate) if estimate.ratio.ratio < 1.0 => Verdict::TakenOut(estimate),
            Some(estimate) => Verdict::Pays(estimate),
        })
    }

    /// Puts one of the two in force in every process.
    fn change(&mut self, arm: Arm, group: &mut Group) -> Result<(), Failure> {
        let mut todo = root_first(group);
        for _ in 0..ROUNDS {
            for member in &todo {
                match self.change_member(arm, member) {
                    Ok(()) => {}
                    Err(e) if has_ended(member, &e) && member.pid != group.root.pid => {}
                    Err(e) => return Err(e.into()),
                }
            }
            // Those that were born of a member that had not been changed yet.
            todo = born(group)?;
            self.members.retain(|pid, _| group.member(*pid).is_some());
            if todo.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn change_member(&mut self, arm: Arm, member: &Target) -> Result<(), ApplyError> {
        let subject = match self.members.entry(member.pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => match self.plans[0].swap(self.plans[1], member.pid) {
                Ok(swap) => new.insert(Some(Subject { swap, counters: CounterReader::open(member.pid)? })),
                // They were not applied to it, for a reason that the report of the apply has told.
                Err(ApplyError::Changed(_)) => new.insert(None),
                Err(e) => return Err(e),
            },
        };
        subject.as_mut().map_or(Ok(()), |s| s.swap.to(arm as usize))
    }

    /// What the program does in a slice of time.
    fn measure(&self, group: &mut Group, slice: Duration) -> Result<Slice, Failure> {
        let counters = |pid: &i32| self.members.get(pid).and_then(Option::as_ref).map(|s| s.counters.read());
        let mut tally = Tally::default();
        let mut began: HashMap<i32, Duration> = HashMap::new();
        for member in &group.members {
            began.extend(cpu_time(member.pid).map(|cpu| (member.pid, cpu)));
            tally.begin(counters(&member.pid).unwrap_or_default());
        }
        std::thread::sleep(slice);
        let mut done = Slice::default();
        for (pid, began) in &began {
            // One that has ended takes its time and its counts with it.
            let Some(now) = cpu_time(*pid) else { continue };
            done.cpu += now.saturating_sub(*began);
            tally.end(counters(pid).unwrap_or_default());
        }
        // Children that were born meanwhile count with their parents.
        group.refresh()?;
        let born = group.members.iter().filter(|m| !began.contains_key(&m.pid));
        done.cpu += born.filter_map(|m| cpu_time(m.pid)).sum::<Duration>();
        for (module, blocks) in tally.blocks() {
            let counted = blocks.into_iter().map(|(at, (_, count))| ((module.clone(), at), count));
            done.counts.extend(counted.filter(|(block, _)| self.blocks.contains(block)));
        }
        Ok(done)
    }
}
