//! Freeing generations that are out of force: when nothing in the process can refer to a cache any more, it is unmapped.
//!
//! **What can refer to a cache.** Only program counters ever lie in one: function pointers, `jmp_buf`s made in the original,
//! all data keep pointing to the original code. A program counter gets out of a register by a call, which pushes it, by a
//! signal, whose frame holds it, or by code that saves a context; from there on it is a word like any other, which may be
//! copied. So once the patches of a generation are out of the text, a word that refers to its cache is never made again
//! but by code that runs in it; and if *at one moment no word of the process and no register refers to it*, none ever will,
//! and the cache can be unmapped whenever it suits. dyni may die after that moment at any instruction.
//!
//! **How that is found out.** Like a conservative garbage collector does it: every word that might be a reference counts as
//! one. At every byte offset, in all memory that the process can have written (`pages`), in every general, x87 and vector
//! register of every thread, plain and as glibc mangles it in a `jmp_buf` (`words`). What a stack holds below its pointer
//! counts as well: only of the main thread's is it certain that it is a stack to its end, and even there the frames of a
//! context may lie that was left to run on a stack inside this one; then something points to them, and they count
//! (`look`).
//!
//! **At one moment**: references wander, as a program copies a `jmp_buf` or a coroutine's stack. So the look that decides
//! is made while all threads stand still. One before, while they run, spares the stop where a reference is found easily, and
//! in a big process all of the looking but at what was written since (`before`, `watch`). The look in the stop is broken off
//! after [`PATIENCE`]; then the cache is kept, and so where anything could not be read: a later sweep may have more luck. A
//! cache that is kept costs memory and nothing else.
//!
//! **What is not seen**, and would break: a program counter that the program keeps *outside* its memory (written to a pipe
//! or a file, sent to another process) or in a form of its own (encrypted, compressed, in less than eight bytes), and later
//! jumps to. And a word that is, at that very moment, being moved by fewer than eight bytes, a part at a time.
//!
//! **The unwinder.** Where it was told of copies it keeps pointers to their frame descriptions, which do not count as
//! references, and it must be told to forget them before they go, by a call in the process (`remote::function`). A call
//! that was begun is never begun again: whether it was made is told by what its trampoline left. GCC 13 and later also keep
//! the address of the first byte of the code, which can't be told from a program counter there: those caches are kept.
//!
//! What a stack or the heap holds of a generation that is gone must not look like a reference to a later one. So the places
//! that were in use are remembered, too, and a new cache goes elsewhere as long as there is room.
//!
//! **The order of the steps** (`release`) is such that a dyni may die between any two: the pages that a generation wrote to
//! stay known, in a ledger that only remembers; every step is noted in the generation's own ledger before it is begun, and
//! that ledger is unmapped last. A generation whose release has begun is never put in force again.

mod before;
mod kept;
mod look;
mod pages;
mod release;
mod watch;
mod words;

pub use kept::Kept;

use crate::error::ApplyError;
use crate::failpoint;
use crate::install::STOP_PATIENCE;
use crate::ledger::{self, Entry, MAGIC, Release};
use crate::lock::Lock;
use crate::remote::{Caller, Memory, Stopped, in_own_thread};
use crate::room;
use crate::undo::move_out;
use crate::unwind::register;
use before::Seen;
use dyni_collector::maps;
use dyni_schema::RunAddr;
use look::Look;
use pages::Pagemap;
use release::{Releaser, Stay};
use std::ops::Range;
use std::time::{Duration, Instant};
use words::Target;

/// How long it is looked while all threads stand still.
const PATIENCE: Duration = Duration::from_millis(4);

/// A generation that was freed, or was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retired {
    /// The base name of its module.
    pub module: String,
    /// How much was mapped for it, bytes: its cache and its counters.
    pub bytes: u64,
    /// Why it is still there; `None`: it was freed.
    pub kept: Option<Kept>,
}

/// What came of a sweep of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// Every generation that was out of force.
    pub generations: Vec<Retired>,
    /// How long all threads were stopped; zero if they were not.
    pub stop: Duration,
}

impl Swept {
    /// How much was freed, bytes.
    #[must_use]
    pub fn freed(&self) -> u64 {
        self.generations.iter().filter(|g| g.kept.is_none()).map(|g| g.bytes).sum()
    }
}

/// Frees every generation of process `pid` that is out of force and that nothing refers to any more, if there are more
/// than `but` of them: to look for references costs the process a stop of some milliseconds, and a generation that is
/// still there need not be made and mapped again when its plan is.
///
/// # Errors
/// The process is gone, not ours to change, or another dyni is at work on it. What could not be freed is no error.
pub fn sweep(pid: i32, but: usize) -> Result<Swept, ApplyError> {
    in_own_thread(|| sweep_here(pid, but)).map_err(|e| e.or_death(pid))
}

fn sweep_here(pid: i32, but: usize) -> Result<Swept, ApplyError> {
    let _lock = Lock::take(pid)?.ok_or(ApplyError::Locked(pid))?;
    let memory = Memory::open(pid)?;
    let (entries, _) = ledger::find_all(pid, &maps::mappings(pid)?, &memory);
    // One that nobody ever entered was left by a dyni that died while it prepared it; `undo` knows how far it had come.
    let out_of_force = |e: &Entry| !e.ledger.only_remembers() && e.journal.entered != 0 && e.in_force(&memory) == 0;
    let (mut retired, others): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(out_of_force);
    let mut swept = Swept::default();
    // What was begun is brought to its end.
    if retired.len() <= but && retired.iter().all(|e| e.release == Release::No) {
        return Ok(swept);
    }
    let mut why: Vec<Option<Kept>> = vec![None; retired.len()];
    swept.stop = prove_those(pid, &memory, &mut retired, &others, &mut why, Release::No)?;
    failpoint::pass("free:proven", pid);
    if why.iter().any(Option::is_none) {
        let room = room::find(pid, &memory)?;
        let caller = Caller::new(pid, &memory, room.at);
        let releaser = Releaser { pid, memory: &memory, caller, room: room.page() };
        let going = retired.iter().zip(&why).filter(|(_, kept)| kept.is_none()).map(|(e, _)| &e.ledger);
        releaser.remember(going, &others)?;
        failpoint::pass("free:remembered", pid);
        for (entry, kept) in retired.iter_mut().zip(&mut why).filter(|(_, kept)| kept.is_none()) {
            stay(releaser.forget(entry), kept)?;
        }
        failpoint::pass("free:forgotten", pid);
        // The thread that told the unwinder did so by way of a trampoline in the cache, and may be there yet.
        swept.stop += prove_those(pid, &memory, &mut retired, &others, &mut why, Release::Forgotten)?;
        for (index, kept) in why.iter_mut().enumerate().filter(|(_, kept)| kept.is_none()) {
            let (before, rest) = retired.split_at_mut(index);
            let Some((entry, after)) = rest.split_first_mut() else { continue };
            stay(releaser.free(entry, before.iter().chain(after.iter()).chain(&others)), kept)?;
        }
        failpoint::pass("free:done", pid);
    }
    for (entry, kept) in retired.iter_mut().zip(&why) {
        if let Some(kept) = kept {
            entry.write_kept_by(&memory, kept.number())?;
        }
    }
    let of = |(entry, kept): (&Entry, Option<Kept>)| Retired {
        module: entry.ledger.module.clone(),
        bytes: entry.ledger.cache_size + entry.ledger.counters_size(),
        kept,
    };
    swept.generations = retired.iter().zip(why).map(of).collect();
    Ok(swept)
}

/// Notes why a generation stays, if it does.
fn stay(done: Result<(), Stay>, kept: &mut Option<Kept>) -> Result<(), ApplyError> {
    match done {
        Ok(()) => {}
        Err(Stay::Because(why)) => *kept = Some(why),
        Err(Stay::Failed(e)) => return Err(e.into()),
    }
    Ok(())
}

/// Finds out of those of the generations whose release has come so far whether anything refers to them; how long the
/// process was stopped. What is proven is noted in their ledgers, what is not, in `why`.
fn prove_those(
    pid: i32,
    memory: &Memory,
    retired: &mut [Entry],
    others: &[Entry],
    why: &mut [Option<Kept>],
    so_far: Release,
) -> Result<Duration, ApplyError> {
    let those: Vec<usize> = (0..retired.len()).filter(|&i| why[i].is_none() && retired[i].release == so_far).collect();
    if those.is_empty() {
        return Ok(Duration::ZERO);
    }
    let subjects: Vec<&Entry> = those.iter().map(|&i| &retired[i]).collect();
    let all: Vec<&Entry> = retired.iter().chain(others).collect();
    let (verdicts, stop) = prove(pid, memory, &subjects, &all)?;
    for (&index, verdict) in those.iter().zip(verdicts) {
        why[index] = verdict;
        if verdict.is_none() && so_far == Release::No {
            retired[index].write_release(memory, Release::Proven)?;
        }
    }
    Ok(stop)
}

/// For each of these generations, which are out of force, why it has to be kept; `None` if nothing refers to it and never
/// will. And how long the process was stopped. `all`: every generation of the process.
fn prove(
    pid: i32,
    memory: &Memory,
    subjects: &[&Entry],
    all: &[&Entry],
) -> Result<(Vec<Option<Kept>>, Duration), ApplyError> {
    let targets: Vec<Target> = subjects.iter().map(|e| target(e, memory)).collect();
    let ours: Vec<Range<u64>> = all.iter().flat_map(|e| ours(e)).collect();
    let all_for = |kept: Kept| vec![Some(kept); subjects.len()];

    let areas = pages::areas(&maps::mappings(pid)?, &ours);
    let before = match before::look(pid, memory, &targets, &areas)? {
        Ok(before) => before,
        Err(kept) => return Ok((all_for(kept), Duration::ZERO)),
    };
    let stopped_before = before.seen.as_ref().map_or(Duration::ZERO, |seen| seen.stop);
    if before.found.iter().all(Option::is_some) {
        return Ok((before.found, stopped_before));
    }
    let mut stopped = match Stopped::all(pid, STOP_PATIENCE) {
        Ok(stopped) => stopped,
        Err(e) if e.is_passing() => return Ok((all_for(Kept::NotStopped), stopped_before)),
        Err(e) => return Err(e.into()),
    };
    failpoint::pass("free:stopped", pid);
    let decided = decide(&stopped, memory, subjects, &targets, &ours, before.seen.as_ref());
    // A loop that never returns stays in its copy until a stop finds the thread there.
    move_out(&mut stopped, memory, subjects.iter().copied())?;
    let stop = stopped_before + stopped.resume();
    // What was found before says more than that there was no time to find it again.
    let verdicts = match decided {
        Ok(found) => found,
        Err(kept) => before.found.into_iter().map(|b| b.or(Some(kept))).collect(),
    };
    Ok((verdicts, stop))
}

/// The look that decides.
fn decide(
    stopped: &Stopped,
    memory: &Memory,
    subjects: &[&Entry],
    targets: &[Target],
    ours: &[Range<u64>],
    seen: Option<&Seen>,
) -> Result<Vec<Option<Kept>>, Kept> {
    let deadline = Instant::now() + PATIENCE;
    // An exec'ed program would have other memory than the one that is being looked at.
    if !subjects.iter().all(|e| stopped.still_has(e.at, &MAGIC).is_ok_and(|has| has)) {
        return Err(Kept::NotStopped);
    }
    let areas = pages::areas(&maps::mappings(stopped.pid).map_err(|_| Kept::NotStopped)?, ours);
    let pagemap = Pagemap::open(stopped.pid)?;
    let guards = look::guards(stopped, memory);
    let dead = look::below_stack_pointer(stopped, &areas);
    let mut look = Look::new(memory, targets, &guards, dead).until(deadline);
    if let Some(seen) = seen {
        // A word that was mangled with another number looked like none.
        if !guards.iter().all(|guard| seen.guards.contains(guard)) {
            return Err(Kept::NotStopped);
        }
        look = look.going_on(&seen.found, seen.lowest);
    }
    look.through_registers(stopped)?;
    for area in &areas {
        if look.found_all() {
            break;
        }
        let written = seen.filter(|seen| seen.watch.covers(area)).and_then(|_| pagemap.written(area).ok());
        match written {
            Some(runs) => runs.iter().try_for_each(|run| look.through_run(run))?,
            None => look.through(&pagemap, area)?,
        }
        look.in_time()?;
    }
    Ok(look.finish())
}

/// The addresses that nothing may refer to: all of the cache but the frame descriptions that the unwinder knows.
fn target(entry: &Entry, memory: &Memory) -> Target {
    let ledger = &entry.ledger;
    let end = ledger.cache + ledger.cache_size;
    let except =
        if ledger.unwind == 0 { 0..0 } else { ledger.unwind..ledger.unwind + frames_size(memory, ledger.unwind, end) };
    Target { range: ledger.cache..end, except }
}

/// How long `.eh_frame` is that begins at `at`: entries, each behind its length, to one of length 0. The exception tables
/// behind it count: one that was read at a throw may be read again in a handler.
fn frames_size(memory: &Memory, at: u64, end: u64) -> u64 {
    let mut next = at;
    while next + 4 <= end {
        let Ok(len) = memory.read_vec(RunAddr(next), 4) else { return 0 };
        match u32::from_le_bytes(len.try_into().expect("four bytes")) {
            0 => return next + 4 - at,
            len => next += 4 + u64::from(len),
        }
    }
    0
}

/// The mappings of a generation in which addresses of caches are no references: the ledger, the copies, the counters, and
/// what the unwinder notes of them. The trampolines of calls are none of those: a thread may come back to one.
fn ours(entry: &Entry) -> Vec<Range<u64>> {
    let ledger = &entry.ledger;
    let mut ours = Vec::new();
    ours.push(entry.at.0..entry.at.0 + entry.size);
    // Before it was entered, and once it is being unmapped, others may lie at its places.
    if entry.journal.entered == 0 || entry.release > Release::Forgotten || ledger.only_remembers() {
        return ours;
    }
    let end = ledger.cache + ledger.cache_size;
    match entry.unwind_place() {
        Some(place) => {
            ours.extend([ledger.cache..place.code.0, place.object_page(), place.code.0 + register::CODE_LEN..end])
        }
        None => ours.push(ledger.cache..end),
    }
    if ledger.counters != 0 {
        ours.push(ledger.counters..ledger.counters + ledger.counters_size());
    }
    ours
}
