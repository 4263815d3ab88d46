//! What is looked through while the process runs, so that the stop is short.
//!
//! Of a small process that proves nothing and spares it the stop where a reference is found easily. Of a big one, whose
//! memory can't be looked through in a stop, it is most of the proof: what is not written any more after it was looked at
//! need not be looked at again ([`Watch`]).

use super::kept::Kept;
use super::look::{self, Look};
use super::pages::{Area, Pagemap};
use super::watch::Watch;
use super::words::Target;
use crate::error::ApplyError;
use crate::failpoint;
use crate::install::STOP_PATIENCE;
use crate::remote::{Caller, Memory, Stopped};
use crate::room;
use std::time::Duration;

/// So much is looked through in a stop without further ado, bytes.
const AT_ONCE: u64 = 16 << 20;
/// How much is so much that it can't be looked through in a stop on any machine, bytes.
const TOO_MUCH: u64 = 64 << 20;
/// How much is so much that in a stop one can't even ask what of it was written, bytes.
const TOO_MUCH_TO_WATCH: u64 = 16 << 30;
/// If less than this was written since the last look there is no point in one more before the stop, bytes.
const ENOUGH: u64 = 1 << 20;
/// How often what was written since is looked through again: a program may write faster than anybody can read.
const ROUNDS: u32 = 5;

/// What came of it.
pub(super) struct Before {
    /// By generation: a reference to it that was there.
    pub found: Vec<Option<Kept>>,
    pub seen: Option<Seen>,
}

/// What a stop need not look through again.
pub(super) struct Seen {
    pub watch: Watch,
    /// By generation: a reference in it.
    pub found: Vec<Option<Kept>>,
    /// The lowest address in the main thread's stack that it refers to.
    pub lowest: u64,
    /// What the C library's mangled words in it were undone with.
    pub guards: Vec<u64>,
    /// How long all threads were stopped to learn that.
    pub stop: Duration,
}

/// Looks through the process while it runs; `Err` if there is no point in a stop.
pub(super) fn look(
    pid: i32,
    memory: &Memory,
    targets: &[Target],
    areas: &[Area],
) -> Result<Result<Before, Kept>, ApplyError> {
    let pagemap = match Pagemap::open(pid) {
        Ok(pagemap) => pagemap,
        Err(kept) => return Ok(Err(kept)),
    };
    let mut sizes = Vec::new();
    for area in areas {
        match pagemap.runs(area) {
            Ok(runs) => sizes.push(runs.iter().map(|run| run.end - run.start).sum::<u64>()),
            Err(kept) => return Ok(Err(kept)),
        }
    }
    let seen = match sizes.iter().sum() {
        0..=AT_ONCE => None,
        TOO_MUCH_TO_WATCH.. => return Ok(Err(Kept::TooMuch)),
        _ => watched(pid, memory, &pagemap, targets, areas)?,
    };
    let covered = |area: &Area| seen.as_ref().is_some_and(|seen| seen.watch.covers(area));
    let others: Vec<(&Area, &u64)> = areas.iter().zip(&sizes).filter(|(area, _)| !covered(area)).collect();
    if others.iter().map(|(_, size)| **size).sum::<u64>() > TOO_MUCH {
        return Ok(Err(Kept::TooMuch));
    }
    let mut look = Look::new(memory, targets, &[], 0..0);
    if let Some(seen) = &seen {
        look = look.going_on(&seen.found, seen.lowest);
    }
    // What lies below the main thread's stack pointer is not known.
    for (area, _) in others.iter().filter(|(area, _)| !area.stack) {
        if look.found_all() {
            break;
        }
        match look.through(&pagemap, area) {
            // It may have been unmapped since. If not, the look that decides will say so.
            Ok(()) | Err(Kept::Unreadable(_)) => {}
            Err(kept) => return Ok(Err(kept)),
        }
    }
    Ok(Ok(Before { found: look.finish(), seen }))
}

/// Looks through all that can be watched, until little of it has been written since; `None` where nothing can be.
fn watched(
    pid: i32,
    memory: &Memory,
    pagemap: &Pagemap,
    targets: &[Target],
    areas: &[Area],
) -> Result<Option<Seen>, ApplyError> {
    let room = room::find(pid, memory)?;
    let Some(mut watch) = Watch::begin(pid, &Caller::new(pid, memory, room.at))? else { return Ok(None) };
    let (guards, stop) = match Stopped::all(pid, STOP_PATIENCE) {
        Ok(stopped) => (look::guards(&stopped, memory), stopped.resume()),
        Err(e) if e.is_passing() => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let stack = areas.iter().find(|a| a.stack).map_or(0..0, |a| a.range.clone());
    let mut look = Look::new(memory, targets, &guards, 0..0).noting(targets, &guards, stack);
    for area in areas {
        // What can't be read stays for the stop.
        let _unreadable = watch.through(pagemap, area, |run| look.through_run(run));
    }
    failpoint::pass("free:watching", pid);
    for _ in 0..ROUNDS {
        let bytes: u64 = areas.iter().map(|area| watch.again(pagemap, area, |run| look.through_run(run))).sum();
        if bytes < ENOUGH {
            break;
        }
    }
    failpoint::pass("free:looked", pid);
    let (found, lowest) = look.so_far();
    Ok(Some(Seen { watch, found, lowest, guards, stop }))
}
