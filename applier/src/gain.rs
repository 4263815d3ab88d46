//! What a program was measured to gain, kept with the generation that it gains by.

use crate::error::ApplyError;
use crate::ledger::{self, Journal};
use crate::lock::Lock;
use crate::remote::Memory;
use dyni_collector::maps;

/// Work per CPU time as parts per million of what it was without: 1,050,000 is a gain of 5 %.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gain {
    /// The best estimate.
    pub ratio_ppm: u64,
    /// The lower end of the 95 % interval.
    pub low_ppm: u64,
    /// Its upper end.
    pub high_ppm: u64,
}

impl Gain {
    pub(crate) fn of(journal: &Journal) -> Option<Self> {
        let [ratio_ppm, low_ppm, high_ppm] = journal.gain_ppm;
        (ratio_ppm != 0).then_some(Self { ratio_ppm, low_ppm, high_ppm })
    }
}

/// Notes in process `pid` what it gains by a plan; nothing if it does not hold that plan.
///
/// # Errors
/// The process is gone, not ours to write to, or another dyni is at work on it.
pub(crate) fn note(pid: i32, plan: [u8; 32], gain: Gain) -> Result<(), ApplyError> {
    let _lock = Lock::take(pid)?.ok_or(ApplyError::Locked(pid))?;
    let memory = Memory::open(pid)?;
    let (entries, _) = ledger::find(pid, &maps::mappings(pid)?, &memory);
    for mut entry in entries.into_iter().filter(|e| e.ledger.plan == plan) {
        let gain_ppm = [gain.ratio_ppm, gain.low_ppm, gain.high_ppm];
        let journal = Journal { gain_ppm, ..entry.journal };
        entry.write_journal(&memory, journal)?;
    }
    Ok(())
}
