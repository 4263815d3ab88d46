//! What was done to a process, from the process alone: its ledgers and its text.

use crate::error::ApplyError;
use crate::gain::Gain;
use crate::huge_text::{self, HugeTextStatus};
use crate::ledger::{self, Entry};
use crate::remote::Memory;
use crate::retire::Kept;
use dyni_collector::maps;
use std::time::Duration;

/// The state of a process, in Dynimize's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Patches are in force, all that the last apply made.
    Dynimized,
    /// No patch is in force.
    Undynimized,
    /// The patches in force lead into copies that count.
    Profiling,
    /// Some are: an apply or undo did not come to its end.
    PartlyDynimized,
}

impl State {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dynimized => "dynimized",
            Self::Undynimized => "undynimized",
            Self::Profiling => "profiling",
            Self::PartlyDynimized => "partly dynimized",
        }
    }
}

/// One generation: one module's copies in one process.
#[derive(Debug, Clone)]
pub struct ModuleStatus {
    /// The module's base name.
    pub name: String,
    /// Its build-id, in hexadecimal.
    pub build_id: String,
    /// The id of the plan, BLAKE3 of its sealed bytes.
    pub plan: [u8; 32],
    /// How many functions have a copy.
    pub functions: usize,
    /// How many patches are in force.
    pub in_force: usize,
    /// How many the generation has.
    pub patches: usize,
    /// The size of the code, bytes.
    pub code_size: u64,
    /// The size of its hot part, bytes.
    pub hot_size: u64,
    /// How much is mapped for it, bytes, the ledger included.
    pub mapped: u64,
    /// How many bytes of it lie in huge pages.
    pub huge_bytes: u64,
    /// How long all threads were stopped when it was applied last.
    pub stop: Duration,
    /// How many threads there were.
    pub threads: u64,
    /// When, seconds since 1970-01-01 UTC; 0 if it never was.
    pub applied_at_s: u64,
    /// What the program was measured to gain by it; `None` if it was not measured.
    pub gain: Option<Gain>,
    /// Why it was not freed when that was last tried; `None` if it is in force or was not tried.
    pub kept: Option<Kept>,
    /// Why functions of the plan are not in it: the reason, and how many.
    pub refused: Vec<(String, u32)>,
    /// Its state alone.
    pub state: State,
}

/// What was done to a process.
#[derive(Debug, Clone)]
pub struct Status {
    /// The process.
    pub pid: i32,
    /// Over all modules.
    pub state: State,
    /// Its generations, oldest first.
    pub modules: Vec<ModuleStatus>,
    /// Its text on huge pages, by module.
    pub huge_text: Vec<HugeTextStatus>,
    /// Ledgers that could not be read, a line each.
    pub damaged: Vec<String>,
}

/// Reads the state of process `pid`; stops nothing, changes nothing.
///
/// # Errors
/// The process is gone, or not ours to read.
pub fn status(pid: i32) -> Result<Status, ApplyError> {
    read(pid).map_err(|e| e.or_death(pid))
}

fn read(pid: i32) -> Result<Status, ApplyError> {
    let memory = Memory::open_read_only(pid)?;
    let maps = maps::mappings(pid)?;
    let (entries, damaged) = ledger::find(pid, &maps, &memory);
    let copies = entries.iter().filter(|e| !e.ledger.only_remembers());
    let modules: Vec<_> = copies.map(|e| of_entry(e, &memory)).collect();
    let any = |state| modules.iter().any(|m: &ModuleStatus| m.state == state);
    let state = if any(State::PartlyDynimized) {
        State::PartlyDynimized
    } else if any(State::Dynimized) {
        State::Dynimized
    } else if any(State::Profiling) {
        State::Profiling
    } else {
        State::Undynimized
    };
    let huge_text = huge_text::status(&huge_text::in_force(&maps, &memory));
    Ok(Status { pid, state, modules, huge_text, damaged })
}

fn of_entry(entry: &Entry, memory: &Memory) -> ModuleStatus {
    let Entry { ledger, journal, .. } = entry;
    let in_force = entry.in_force(memory);
    let state = match in_force {
        0 => State::Undynimized,
        _ if ledger.counting => State::Profiling,
        n if n as u64 == journal.applied => State::Dynimized,
        _ => State::PartlyDynimized,
    };
    ModuleStatus {
        name: ledger.module.clone(),
        build_id: ledger.build_id.hex(),
        plan: ledger.plan,
        functions: ledger.functions.len(),
        in_force,
        patches: ledger.patches.len(),
        code_size: ledger.code_size,
        hot_size: ledger.hot_size,
        mapped: ledger.cache_size + entry.size,
        huge_bytes: journal.huge_bytes,
        stop: Duration::from_nanos(journal.stop_ns),
        threads: journal.threads,
        applied_at_s: journal.applied_at_s,
        gain: Gain::of(journal),
        kept: (in_force == 0).then(|| Kept::from_number(entry.kept_by)).flatten(),
        refused: ledger.refused.clone(),
        state,
    }
}
