//! Applying a plan to processes: prepared once, installed in each.

use crate::enter::Choice;
use crate::error::ApplyError;
use crate::gain::{self, Gain};
use crate::generation::{Generation, Library, prepare};
use crate::install::{Applied, install};
use crate::status::{State, status};
use crate::swap::Swap;
use dyni_schema::Plan;
use dyni_schema::envelope::{content_id, seal};
use std::collections::HashSet;

/// A plan on its way into one or more processes that run the same builds.
#[derive(Debug)]
pub struct Applier<'p> {
    plan: &'p Plan,
    id: [u8; 32],
    fuel: Option<usize>,
    library: Library,
    told: Variant,
    untold: Variant,
    /// Processes whose unwinder could not be told: no thread of theirs waits where a function can be called.
    left_untold: HashSet<i32>,
}

/// A plan's code for processes whose unwinder is told of copies, or for those where it can't be.
#[derive(Debug)]
struct Variant {
    /// What was prepared, newest last: the processes of a group need not have the same holes free.
    made: Vec<Vec<Generation>>,
    usable: bool,
}

/// How many of them are kept.
const KEPT: usize = 8;
/// How often code is made for a process that changes meanwhile: one that maps something where a cache was to go.
const TRIES: u32 = 4;

impl Default for Variant {
    fn default() -> Self {
        Self { made: Vec::new(), usable: true }
    }
}

/// What would be installed in a process.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The module's base name.
    pub name: String,
    /// How many functions would get a copy.
    pub functions: usize,
    /// The size of the code, bytes.
    pub code_size: u64,
    /// The size of its hot part, bytes.
    pub hot_size: u64,
    /// Why functions are left out: the reason, and how many.
    pub refused: Vec<(String, u32)>,
}

impl<'p> Applier<'p> {
    /// For this plan. `fuel` bounds the number of functions that are copied, to find one that is at fault.
    ///
    /// # Errors
    /// The plan breaks a rule of its type.
    pub fn new(plan: &'p Plan, fuel: Option<usize>) -> Result<Self, ApplyError> {
        let id = content_id(&seal(plan)?);
        Ok(Self {
            plan,
            id,
            fuel,
            library: Library::default(),
            told: Variant::default(),
            untold: Variant::default(),
            left_untold: HashSet::new(),
        })
    }

    /// Makes and checks the code for process `pid` without touching the process.
    ///
    /// # Errors
    /// Why it can't be done.
    pub fn prepare(&mut self, pid: i32) -> Result<Vec<Prepared>, ApplyError> {
        let made = prepare(pid, self.plan, self.id, &mut self.library, self.fuel, true).map_err(|e| e.or_death(pid))?;
        let summary = made.iter().map(Generation::summary).collect();
        self.told.made.push(made);
        Ok(summary)
    }

    /// Applies the plan to process `pid`, which must not be dynimized with another plan. What was prepared for another
    /// process of the group serves again where it fits.
    ///
    /// # Errors
    /// Why it can't be done; the process is then as it was.
    pub fn apply(&mut self, pid: i32) -> Result<Applied, ApplyError> {
        self.apply_chosen(pid, &Choice::All)
    }

    /// The same with some of the patches only.
    ///
    /// # Errors
    /// As [`Applier::apply`].
    pub fn apply_chosen(&mut self, pid: i32, choice: &Choice) -> Result<Applied, ApplyError> {
        self.apply_living(pid, choice).map_err(|e| e.or_death(pid))
    }

    /// Lets this plan (0) and that of another applier (1) take turns in process `pid`, into which both were applied.
    ///
    /// # Errors
    /// [`ApplyError::Changed`] if they were not. Otherwise as [`Applier::apply`].
    pub fn swap<'a>(&'a self, other: &'a Applier<'_>, pid: i32) -> Result<Swap<'a>, ApplyError> {
        Swap::open(pid, [&self.made(), &other.made()]).map_err(|e| e.or_death(pid))
    }

    fn made(&self) -> Vec<&[Generation]> {
        [&self.told, &self.untold].iter().flat_map(|v| v.made.iter().rev()).map(Vec::as_slice).collect()
    }

    /// Notes in process `pid`, for `status`, what it was measured to gain by this plan; nothing if it does not hold it.
    ///
    /// # Errors
    /// The process is gone, not ours to write to, or another dyni is at work on it.
    pub fn note_gain(&self, pid: i32, gain: Gain) -> Result<(), ApplyError> {
        gain::note(pid, self.id, gain).map_err(|e| e.or_death(pid))
    }

    fn apply_living(&mut self, pid: i32, choice: &Choice) -> Result<Applied, ApplyError> {
        let now = status(pid)?;
        if now.modules.iter().any(|m| m.state != State::Undynimized && m.plan != self.id) {
            return Err(ApplyError::OtherPlan(pid));
        }
        if self.told.usable && !self.left_untold.contains(&pid) {
            match self.apply_variant(pid, true, choice) {
                // Then without the functions for which that matters.
                Err(ApplyError::UnwinderNotTold { .. }) => {
                    self.left_untold.insert(pid);
                }
                // Nor is anything told that the checker does not vouch for.
                Err(ApplyError::Misdescribed(_)) => self.told.usable = false,
                done => return done,
            }
        }
        self.apply_variant(pid, false, choice)
    }

    fn apply_variant(&mut self, pid: i32, tell_unwinder: bool, choice: &Choice) -> Result<Applied, ApplyError> {
        let variant = if tell_unwinder { &mut self.told } else { &mut self.untold };
        for made in variant.made.iter().rev() {
            match install(pid, made, choice, &mut self.library.unwinders) {
                Ok(applied) if !applied.modules.is_empty() => return Ok(applied),
                Ok(_) | Err(ApplyError::Changed(_)) => {}
                Err(e) => return Err(e),
            }
        }
        let mut tries = TRIES;
        loop {
            let made = prepare(pid, self.plan, self.id, &mut self.library, self.fuel, tell_unwinder)?;
            let installed = install(pid, &made, choice, &mut self.library.unwinders);
            tries -= 1;
            if tries > 0 && matches!(installed, Err(ApplyError::Changed(_))) {
                continue;
            }
            if variant.made.len() == KEPT {
                variant.made.remove(0);
            }
            variant.made.push(made);
            return installed;
        }
    }
}
