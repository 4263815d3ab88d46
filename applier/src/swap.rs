//! Two plans that take turns in a process, to be compared: both are installed, and one stop takes the patches of one out
//! and puts those of the other in. All that an apply has to find out first is known, so it takes little more than the stop.
//!
//! Between any two writes the process is as an undo would leave it or an apply: a dyni that dies here has left nothing
//! that `undo` does not know.

use crate::enter::{Choice, Edits, Site, escapes};
use crate::error::ApplyError;
use crate::failpoint;
use crate::generation::Generation;
use crate::install::{STOP_PATIENCE, is_same, text_is_original};
use crate::ledger::{self, Entry, Journal};
use crate::lock::Lock;
use crate::patch::{self, Edit};
use crate::remote::{Memory, Stopped, in_own_thread};
use crate::undo::{move_out, taking_out};
use dyni_collector::maps::{self, MappedModule};
use dyni_schema::RunAddr;

/// One process and the two plans that take turns in it. No other dyni changes the process as long as this lives.
#[derive(Debug)]
pub struct Swap<'g> {
    pid: i32,
    memory: Memory,
    modules: Vec<MappedModule>,
    /// Every ledger of the process.
    entries: Vec<Entry>,
    sides: [Side<'g>; 2],
    _lock: Lock,
}

/// One of the plans.
#[derive(Debug)]
struct Side<'g> {
    sites: Vec<Site<'g>>,
    edits: Edits,
    /// What takes it out, by rising place.
    out: Vec<Edit>,
}

impl<'g> Swap<'g> {
    /// For process `pid`, into which one of what was made for either plan was installed.
    ///
    /// # Errors
    /// [`ApplyError::Changed`] if it was not. Otherwise as for an apply.
    pub(crate) fn open(pid: i32, plans: [&[&'g [Generation]]; 2]) -> Result<Self, ApplyError> {
        let lock = Lock::take(pid)?.ok_or(ApplyError::Locked(pid))?;
        let memory = Memory::open(pid)?;
        let maps = maps::mappings(pid)?;
        let modules = maps::ModuleReader::default().of(pid, &maps);
        let (entries, _) = ledger::find(pid, &maps, &memory);
        let old_escapes = escapes(&entries);
        let side = |made: &[&'g [Generation]]| {
            let sites = fullest(made.iter().map(|m| sites(m, &modules, &entries, &memory)))?;
            let edits = Edits::of(&sites, &Choice::All, &old_escapes);
            let mut out: Vec<Edit> = sites.iter().flat_map(|s| taking_out(&s.entry)).collect();
            out.sort_by_key(|edit| edit.at);
            Some(Side { sites, edits, out })
        };
        let [Some(first), Some(second)] = plans.map(side) else { return Err(ApplyError::Changed(pid)) };
        let sides = [first, second];
        Ok(Self { pid, memory, modules, entries, sides, _lock: lock })
    }

    /// Puts the first plan (0) or the second (1) in force, and the other one out of it.
    ///
    /// # Errors
    /// [`ApplyError::Changed`] if somebody else has written to the text meanwhile; nothing was done then. Otherwise why it
    /// could not be done: `undo` will know what is in force.
    pub fn to(&mut self, side: usize) -> Result<(), ApplyError> {
        let pid = self.pid;
        in_own_thread(|| self.put_in(side)).map_err(|e| e.or_death(pid))
    }

    fn put_in(&mut self, index: usize) -> Result<(), ApplyError> {
        let in_force = |side: &Side<'_>| side.sites.iter().any(|s| s.entry.in_force(&self.memory) > 0);
        if in_force(&self.sides[index]) && !in_force(&self.sides[1 - index]) {
            return Ok(());
        }
        let maps = maps::mappings(self.pid)?;
        let (side, other) = match &mut self.sides {
            [first, second] if index == 0 => (first, second),
            [first, second] => (second, first),
        };
        for site in &side.sites {
            let Some(module) = self.modules.iter().find(|m| m.build_id == site.generation.build_id) else { continue };
            let of_module = |o: &&Site<'_>| o.generation.build_id == site.generation.build_id;
            let patched: Vec<_> = other.sites.iter().filter(of_module).chain([site]).map(|s| &s.entry).collect();
            let (generation, memory) = (site.generation, &self.memory);
            if !text_is_original(self.pid, generation, module, memory, &maps, &self.entries, &patched) {
                return Err(ApplyError::Changed(self.pid));
            }
        }
        let mut edits = side.edits.clone();
        patch::touch(&self.memory, &edits.all)?;

        let mut stopped = Stopped::all(self.pid, STOP_PATIENCE)?;
        failpoint::pass("swap:stopped", self.pid);
        for site in side.sites.iter().chain(&other.sites) {
            if !stopped.still_has(site.entry.at, &ledger::MAGIC)? {
                return Err(ApplyError::Changed(self.pid));
            }
        }
        patch::write(&stopped, &self.memory, &other.out, "swap:half-out")?;
        move_out(&mut stopped, &self.memory, other.sites.iter().map(|s| &s.entry))?;
        failpoint::pass("swap:out", self.pid);
        edits.enter(&mut stopped, &side.sites, &self.memory, &maps)?;
        failpoint::pass("swap:in", self.pid);
        for site in &mut other.sites {
            site.entry.write_journal(&self.memory, Journal { applied: 0, ..site.entry.journal })?;
        }
        for (site, in_force) in side.sites.iter_mut().zip(&edits.in_force) {
            let journal = Journal { applied: *in_force as u64, ..site.entry.journal };
            site.entry.write_journal(&self.memory, journal)?;
        }
        Ok(())
    }
}

/// What was made for a process, of all that was made for its group: that of which it holds most. It may hold one module's
/// code that was made for all and another module's that was made anew for it, and so a part of what is not its own.
fn fullest<T>(held: impl DoubleEndedIterator<Item = Vec<T>>) -> Option<Vec<T>> {
    // Of equal ones the first, which is the newest.
    held.rev().max_by_key(Vec::len).filter(|most| !most.is_empty())
}

/// The generations of a plan that the process holds.
fn sites<'g>(
    generations: &'g [Generation],
    modules: &[MappedModule],
    entries: &[Entry],
    memory: &Memory,
) -> Vec<Site<'g>> {
    let site = |generation: &'g Generation| {
        let module = modules.iter().find(|m| m.build_id == generation.build_id)?;
        let wanted = generation.ledger(module, RunAddr(0));
        let entry = entries.iter().find(|e| is_same(e, &wanted, memory))?.clone();
        Some(Site { generation, bias: module.bias, entry })
    };
    generations.iter().filter_map(site).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_what_is_anothers_is_not_taken_for_ones_own() {
        let of = |held: &[&[&'static str]]| fullest(held.iter().map(|h| h.to_vec()));
        assert_eq!(of(&[&["libc"], &["libc", "postgres"]]), Some(vec!["libc", "postgres"]));
        assert_eq!(of(&[&[], &["newer"], &["older"]]), Some(vec!["newer"]));
        assert_eq!(of(&[&[], &[]]), None);
        assert_eq!(of(&[]), None);
    }
}
