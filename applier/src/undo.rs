//! Undo: the original bytes back in the patched places. Copies stay mapped for whoever is still in them, until
//! nothing refers to them ([`crate::sweep`]).

use crate::error::ApplyError;
use crate::failpoint;
use crate::install::{STOP_PATIENCE, unmap_ledger};
use crate::ledger::{self, Entry, Journal};
use crate::lock::Lock;
use crate::patch::{self, Edit};
use crate::remote::{Caller, Memory, RemoteError, Stopped, in_own_thread};
use crate::resolve::original_of;
use crate::{huge_text, room};
use dyni_collector::maps::{self, Mapping};
use dyni_schema::RunAddr;
use std::time::Duration;

/// What was undone in one process.
#[derive(Debug, Clone)]
pub struct Undone {
    /// The process.
    pub pid: i32,
    /// The modules whose patches were taken out, by name.
    pub modules: Vec<String>,
    /// How many patches were taken out.
    pub patches: usize,
    /// How long all threads were stopped; zero if there was nothing to take out.
    pub stop: Duration,
    /// How many threads were moved from a copy back to the original on the spot.
    pub moved: usize,
    /// How much text lay on huge pages and is the file's own again, bytes.
    pub text_bytes: u64,
    /// Ledgers that could not be read, a line each.
    pub damaged: Vec<String>,
}

/// Takes out every patch of every generation in process `pid`.
///
/// # Errors
/// The process is gone, not ours, or can't be stopped; it is then as it was, or, if it died half-way, gone.
pub fn undo(pid: i32) -> Result<Undone, ApplyError> {
    in_own_thread(|| undo_here(pid)).map_err(|e| e.or_death(pid))
}

fn undo_here(pid: i32) -> Result<Undone, ApplyError> {
    let _lock = Lock::take(pid)?.ok_or(ApplyError::Locked(pid))?;
    failpoint::pass("undo:locked", pid);
    let memory = Memory::open(pid)?;
    let maps = maps::mappings(pid)?;
    let (mut entries, damaged) = ledger::find(pid, &maps, &memory);
    let mut done =
        Undone { pid, modules: Vec::new(), patches: 0, stop: Duration::ZERO, moved: 0, text_bytes: 0, damaged };
    forget_unused(pid, &memory, &mut entries);
    take_out(pid, &memory, &maps, &mut entries, &mut done)?;
    // Patches first: what is put back is the file's own text, without any.
    let (bytes, left) = huge_text::undo(pid, &memory)?;
    done.text_bytes = bytes;
    done.damaged.extend(left);
    Ok(done)
}

/// Takes every patch out, in one stop if there is any.
fn take_out(
    pid: i32,
    memory: &Memory,
    maps: &[Mapping],
    entries: &mut [Entry],
    done: &mut Undone,
) -> Result<(), ApplyError> {
    let mut edits: Vec<Edit> = Vec::new();
    for entry in &*entries {
        if entry.in_force(memory) > 0 {
            done.modules.push(entry.ledger.module.clone());
            edits.extend(taking_out(entry));
        }
    }
    let leftovers = room::has_leftovers(pid, memory);
    if edits.is_empty() && !leftovers {
        return Ok(());
    }
    edits.sort_by_key(|e| e.at);
    let mut stopped = Stopped::all(pid, STOP_PATIENCE)?;
    failpoint::pass("undo:stopped", pid);
    if let Some(entry) = entries.first()
        && !stopped.still_has(entry.at, &ledger::MAGIC)?
    {
        return Err(ApplyError::Changed(pid));
    }
    if leftovers {
        room::clean(&stopped, memory, maps)?;
    }
    done.patches = patch::write(&stopped, memory, &edits, "undo:half-restored")?.iter().filter(|d| **d).count();
    failpoint::pass("undo:restored", pid);
    done.moved = move_out(&mut stopped, memory, entries.iter())?;
    failpoint::pass("undo:threads-moved", pid);
    for entry in entries {
        let journal = Journal { applied: 0, ..entry.journal };
        entry.write_journal(memory, journal)?;
    }
    done.stop = stopped.resume();
    failpoint::pass("undo:resumed", pid);
    Ok(())
}

/// The edits that take a generation's patches out.
pub(crate) fn taking_out(entry: &Entry) -> impl Iterator<Item = Edit> + '_ {
    entry.ledger.patches().map(|(at, original, jump)| Edit { at, from: jump, to: original })
}

/// Unmaps what a dyni that died while preparing left: generations that no thread can ever have entered.
fn forget_unused(pid: i32, memory: &Memory, entries: &mut Vec<Entry>) {
    entries.retain(|entry| {
        if entry.journal.entered != 0 || entry.in_force(memory) > 0 {
            return true;
        }
        let Ok(room) = room::find(pid, memory) else { return true };
        let caller = Caller::new(pid, memory, room.at);
        // The cache may not have been mapped yet; nothing else lies there unless it was mapped later, so look.
        let code = memory.read_vec(RunAddr(entry.ledger.cache), entry.ledger.code_size as usize);
        let ours = maps::mappings(pid).is_ok_and(|maps| {
            maps.iter().any(|m| {
                m.range == (entry.ledger.cache..entry.ledger.cache + entry.ledger.cache_size)
                    && m.executable
                    && !m.writable
                    && m.file.inode == 0
            })
        });
        // A half-written cache has the beginning of the code, or nothing.
        if ours && code.is_ok() {
            let unmapped =
                caller.call("munmap", libc::SYS_munmap, [entry.ledger.cache, entry.ledger.cache_size, 0, 0, 0, 0]);
            if unmapped.is_err() {
                return true;
            }
        }
        let (at, size) = (entry.ledger.counters, entry.ledger.counters_size());
        let counters = maps::mappings(pid)
            .is_ok_and(|maps| maps.iter().any(|m| m.range == (at..at + size) && m.shared && m.writable));
        if at != 0 && counters && caller.call("munmap", libc::SYS_munmap, [at, size, 0, 0, 0, 0]).is_err() {
            return true;
        }
        unmap_ledger(memory, &caller, entry);
        false
    });
}

/// Moves each thread that stands in a copy to the same place in the original; how many. One that stands where the
/// original has nothing (a jump that only the copy needed) stays: it leaves by itself.
pub(crate) fn move_out<'e>(
    stopped: &mut Stopped,
    memory: &Memory,
    entries: impl Iterator<Item = &'e Entry> + Clone,
) -> Result<usize, RemoteError> {
    let mut moved = 0;
    for thread in &mut stopped.threads {
        if thread.in_syscall() {
            continue;
        }
        let rip = thread.rip();
        let original = entries.clone().find(|e| e.ledger.holds(rip)).and_then(|e| original_of(e, memory, rip));
        if let Some(original) = original {
            thread.set_rip(original)?;
            moved += 1;
        }
    }
    Ok(moved)
}
