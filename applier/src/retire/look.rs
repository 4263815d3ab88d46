//! Looking through a process for references to generations.

use super::kept::Kept;
use super::pages::{Area, Pagemap};
use super::words::{Target, Words};
use crate::remote::{Memory, Stopped};
use dyni_schema::RunAddr;
use std::ops::Range;
use std::time::Instant;

/// So much is read at once, bytes.
const CHUNK: usize = 256 << 10;
/// The System V ABI's red zone, bytes: below it and the stack pointer nothing of a running function lies.
const RED_ZONE: u64 = 128;

/// One look through a process, or a part of it.
pub(super) struct Look<'a> {
    memory: &'a Memory,
    words: Words,
    /// By generation: where something refers to it.
    found: Vec<Option<Kept>>,
    /// The part of the main thread's stack below its stack pointer; empty if that is not known. It counts only if
    /// something points into it.
    dead: Range<u64>,
    dead_found: Vec<Option<Kept>>,
    /// The lowest address in the main thread's stack that anything outside of `dead` refers to.
    lowest: u64,
    /// When it has to be over.
    deadline: Option<Instant>,
    buffer: Vec<u8>,
}

impl<'a> Look<'a> {
    /// For references to these targets, one for each generation, in words plain or mangled with one of these guards.
    pub fn new(memory: &'a Memory, targets: &[Target], guards: &[u64], dead: Range<u64>) -> Self {
        let none = vec![None; targets.len()];
        Self {
            memory,
            words: words(targets, guards, dead.clone()),
            found: none.clone(),
            dead,
            dead_found: none,
            lowest: u64::MAX,
            deadline: None,
            buffer: vec![0; CHUNK],
        }
    }

    /// All of the main thread's stack instead of its dead part: what refers to it is noted for a look at which that is known.
    pub fn noting(self, targets: &[Target], guards: &[u64], stack: Range<u64>) -> Self {
        Self { words: words(targets, guards, stack), ..self }
    }

    /// What another look has found counts as well.
    pub fn going_on(self, found: &[Option<Kept>], lowest: u64) -> Self {
        Self { found: found.to_vec(), lowest, ..self }
    }

    /// It gives up at this moment.
    pub fn until(self, deadline: Instant) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// Looks through an area of memory, all of which that may hold what the process wrote.
    pub fn through(&mut self, pagemap: &Pagemap, area: &Area) -> Result<(), Kept> {
        let runs = pagemap.runs(area)?;
        runs.iter().try_for_each(|run| self.through_run(run))?;
        if area.shared {
            pagemap.rest_of_shared(area, &runs, |at, bytes| self.bytes(at, bytes))?;
        }
        Ok(())
    }

    /// Looks through a run of pages.
    pub fn through_run(&mut self, run: &Range<u64>) -> Result<(), Kept> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let done = self.run(run, &mut buffer);
        self.buffer = buffer;
        done
    }

    fn run(&mut self, run: &Range<u64>, buffer: &mut [u8]) -> Result<(), Kept> {
        let mut at = run.start;
        loop {
            let len = (run.end - at).min(buffer.len() as u64) as usize;
            if self.memory.read_some(RunAddr(at), &mut buffer[..len]) < len {
                return Err(Kept::Unreadable(RunAddr(at)));
            }
            self.bytes(at, &buffer[..len])?;
            if at + len as u64 == run.end {
                return Ok(());
            }
            // A word may lie across the end of what was read.
            at += len as u64 - 7;
        }
    }

    fn bytes(&mut self, start: u64, bytes: &[u8]) -> Result<(), Kept> {
        let (found, dead_found, lowest, dead) = (&mut self.found, &mut self.dead_found, &mut self.lowest, &self.dead);
        self.words.each(bytes, |target, offset, address| {
            let at = start + offset as u64;
            let of_dead = dead.contains(&at);
            match if of_dead { dead_found.get_mut(target) } else { found.get_mut(target) } {
                Some(place) => *place = place.or(Some(Kept::Word(RunAddr(at)))),
                None if of_dead => {}
                None => *lowest = (*lowest).min(address),
            }
        });
        self.in_time()
    }

    /// Whether there is time left.
    pub fn in_time(&self) -> Result<(), Kept> {
        match self.deadline {
            Some(deadline) if Instant::now() > deadline => Err(Kept::TooSlow),
            _ => Ok(()),
        }
    }

    /// Looks at the registers of all threads.
    pub fn through_registers(&mut self, stopped: &Stopped) -> Result<(), Kept> {
        for thread in &stopped.threads {
            let bytes = thread.register_bytes().map_err(|_| Kept::NotStopped)?;
            let (found, lowest) = (&mut self.found, &mut self.lowest);
            self.words.each(&bytes, |target, _, address| match found.get_mut(target) {
                Some(place) => *place = place.or(Some(Kept::Register)),
                None => *lowest = (*lowest).min(address),
            });
        }
        Ok(())
    }

    /// Whether there is a reference to every generation already.
    pub fn found_all(&self) -> bool {
        self.found.iter().all(Option::is_some)
    }

    /// What was found, and the lowest address in the main thread's stack that was, for [`Self::going_on`].
    pub fn so_far(self) -> (Vec<Option<Kept>>, u64) {
        (self.found, self.lowest)
    }

    /// What refers to each generation.
    pub fn finish(self) -> Vec<Option<Kept>> {
        let dead_counts = self.lowest < self.dead.end;
        let dead = self.dead_found.into_iter().map(|found| found.filter(|_| dead_counts));
        self.found.into_iter().zip(dead).map(|(live, dead)| live.or(dead)).collect()
    }
}

/// References to these targets and, as the last one, to a part of the main thread's stack.
fn words(targets: &[Target], guards: &[u64], stack: Range<u64>) -> Words {
    let stack = Target { range: stack, except: 0..0 };
    Words::new(targets.iter().cloned().chain([stack]).collect(), guards)
}

/// The part of the main thread's stack that is below the stack pointer of the thread that runs on it. What is in it was
/// left by calls that have returned, unless another stack was made in the middle of this one: then the frames that were
/// left for it lie there, and something points to them. Empty if no thread, or more than one, runs on it.
pub(super) fn below_stack_pointer(stopped: &Stopped, areas: &[Area]) -> Range<u64> {
    let Some(stack) = areas.iter().find(|a| a.stack) else { return 0..0 };
    let mut on_it = stopped.threads.iter().map(|t| t.rsp().0).filter(|rsp| stack.range.contains(rsp));
    match (on_it.next(), on_it.next()) {
        (Some(rsp), None) => stack.range.start..rsp.saturating_sub(RED_ZONE).max(stack.range.start),
        _ => 0..0,
    }
}

/// What the C library mangles code addresses with, as each thread has it (`fs:[0x30]`).
pub(super) fn guards(stopped: &Stopped, memory: &Memory) -> Vec<u64> {
    const GUARD_AT: u64 = 0x30;
    let of = |area: RunAddr| {
        let bytes = memory.read_vec(area.plus(GUARD_AT), 8).ok()?;
        Some(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    };
    let with_area = stopped.threads.iter().map(|t| t.thread_area()).filter(|area| area.0 != 0);
    let mut guards: Vec<u64> = with_area.filter_map(of).collect();
    guards.sort_unstable();
    guards.dedup();
    guards
}
