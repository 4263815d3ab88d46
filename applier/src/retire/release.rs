//! Taking a generation out of a process that nothing refers to: the steps, and going on where a dyni that died left off.

use super::kept::Kept;
use crate::error::ApplyError;
use crate::failpoint;
use crate::ledger::{self, Entry, Journal, Ledger, Release};
use crate::remote::{Caller, Memory, RemoteError};
use crate::unwind::register::{self, CallError, RegisterError};
use crate::unwind::unwinder::Unwinders;
use dyni_collector::maps::{self, Mapping};
use dyni_schema::{BuildId, RunAddr};
use std::collections::BTreeSet;
use std::ops::Range;

const PAGE: u64 = 4096;

/// The process that generations are taken out of.
pub(super) struct Releaser<'a> {
    pub pid: i32,
    pub memory: &'a Memory,
    pub caller: Caller<'a>,
    /// The page in which the caller's trampolines lie.
    pub room: RunAddr,
}

/// Why a generation is not gone.
pub(super) enum Stay {
    /// For a reason that may pass.
    Because(Kept),
    /// The process is gone, or does not let dyni at it.
    Failed(RemoteError),
}

impl From<RemoteError> for Stay {
    fn from(e: RemoteError) -> Self {
        match e {
            RemoteError::Call { .. } | RemoteError::Interrupted(_) => Self::Because(Kept::NotUnmapped),
            e => Self::Failed(e),
        }
    }
}

impl Releaser<'_> {
    fn unmap(&self, range: &Range<u64>) -> Result<(), RemoteError> {
        let arguments = [range.start, range.end - range.start, 0, 0, 0, 0];
        self.caller.call("munmap", libc::SYS_munmap, arguments).map(drop)
    }

    /// Sees to it that a ledger knows the pages that these generations wrote to, and where they were, and that there is one
    /// such ledger, not one more at each time. `others`: the other ledgers of the process.
    pub fn remember<'l>(&self, going: impl Iterator<Item = &'l Ledger>, others: &[Entry]) -> Result<(), ApplyError> {
        let (mut pages, mut vacated, mut build_id) = (BTreeSet::from([self.room.0]), Vec::new(), BuildId::default());
        for ledger in going {
            build_id = ledger.build_id.clone();
            pages.extend(ledger.written_pages());
            vacated.push(ledger.cache..ledger.cache + ledger.cache_size);
        }
        let old: Vec<&Entry> = others.iter().filter(|e| e.ledger.only_remembers()).collect();
        for ledger in old.iter().map(|e| &e.ledger) {
            pages.extend(&ledger.borrowed_pages);
            vacated.extend(ledger.vacated());
        }
        let ledger = Ledger::of_gone(build_id, pages.into_iter().collect(), vacated);
        if old.iter().any(|e| e.ledger == ledger) {
            return Ok(());
        }
        self.write(&ledger)?;
        for old in old {
            self.unmap(&(old.at.0..old.at.0 + old.size))?;
        }
        Ok(())
    }

    /// Maps and writes a ledger that only remembers.
    fn write(&self, ledger: &Ledger) -> Result<(), ApplyError> {
        let bytes = ledger::seal(ledger)?;
        let size = (bytes.len() as u64).next_multiple_of(PAGE);
        let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let arguments = [0, size, libc::PROT_READ as u64, private, u64::MAX, 0];
        let at = RunAddr(self.caller.call("mmap", libc::SYS_mmap, arguments)?);
        self.memory.write(at, &bytes)?;
        let journal = Journal::default();
        let mut entry = Entry { at, size, ledger: ledger.clone(), journal, release: Release::No, kept_by: 0 };
        // To every dyni this is a generation that has been in use, and so none to be thrown away.
        entry.write_journal(self.memory, Journal { entered: 1, ..journal })?;
        ledger::publish(self.memory, at)?;
        Ok(())
    }

    /// Makes the unwinder forget the copies of a generation that nothing refers to, if it was told of them.
    pub fn forget(&self, entry: &mut Entry) -> Result<(), Stay> {
        let Some(place) = entry.unwind_place() else { return Ok(()) };
        if entry.release >= Release::Forgotten || !register::is_registered(self.memory, &place)? {
            return Ok(());
        }
        if entry.release < Release::Forgetting {
            let maps = maps::mappings(self.pid).map_err(|_| RemoteError::Died(self.pid))?;
            let modules = maps::ModuleReader::default().of(self.pid, &maps);
            let found = Unwinders::default().find(self.pid, &modules);
            let unwinder = found.map_err(|_| Stay::Because(Kept::Unwinder))?;
            register::prepare_deregister(self.memory, &place)?;
            entry.write_release(self.memory, Release::Forgetting)?;
            match register::deregister(self.pid, self.memory, &unwinder, &place) {
                Ok(()) => {}
                Err(RegisterError::Call(CallError::NoSafePoint(_) | CallError::NoRoom(_))) => {
                    entry.write_release(self.memory, Release::Proven)?;
                    return Err(Stay::Because(Kept::Unwinder));
                }
                Err(RegisterError::Call(CallError::Remote(e)) | RegisterError::Remote(e)) => {
                    return Err(Stay::Failed(e));
                }
                Err(_) => return Err(Stay::Because(Kept::UnwinderUnknown)),
            }
        } else if !register::has_deregistered(self.memory, &place)? {
            return Err(Stay::Because(Kept::UnwinderUnknown));
        }
        entry.write_release(self.memory, Release::Forgotten)?;
        Ok(())
    }

    /// Unmaps a generation that nothing refers to, and that the unwinder does not know. `others`: all other ledgers of the
    /// process.
    pub fn free<'e>(&self, entry: &mut Entry, others: impl Iterator<Item = &'e Entry>) -> Result<(), Stay> {
        let ledger = entry.ledger.clone();
        let cache = ledger.cache..ledger.cache + ledger.cache_size;
        let counters = ledger.counters..ledger.counters + ledger.counters_size();
        if entry.release <= Release::UnmappingCode {
            entry.write_release(self.memory, Release::UnmappingCode)?;
            // A dyni that died may have unmapped it already, and a later one have put the same code there again.
            let replaced = others.filter(|o| o.release == Release::No).any(|o| {
                let end = o.ledger.cache + o.ledger.cache_size;
                o.ledger.cache < cache.end && cache.start < end
            });
            if !replaced && is_there(self.pid, self.memory, entry)? {
                self.unmap(&cache)?;
            }
            failpoint::pass("free:code-unmapped", self.pid);
            // What these hold does not tell whose they are. So a dyni that dies after this leaves them: a few pages.
            entry.write_release(self.memory, Release::UnmappingRest)?;
            if ledger.counters != 0 {
                self.unmap(&counters)?;
            }
            failpoint::pass("free:half-unmapped", self.pid);
            if ledger.unwind_data != 0 {
                self.unmap(&(ledger.unwind_data..ledger.unwind_data + register::data_len()))?;
            }
        }
        Ok(self.unmap(&(entry.at.0..entry.at.0 + entry.size))?)
    }
}

/// Whether the cache that a ledger names is mapped, and is that cache.
fn is_there(pid: i32, memory: &Memory, entry: &Entry) -> Result<bool, Stay> {
    let ledger = &entry.ledger;
    let maps = maps::mappings(pid).map_err(|_| RemoteError::Died(pid))?;
    let end = ledger.cache + ledger.cache_size;
    let holds = |m: &&Mapping| {
        let ours = m.executable && !m.writable && !m.shared && m.file.inode == 0;
        ours && m.range.start <= ledger.cache && end <= m.range.end
    };
    if maps.iter().find(holds).is_none() {
        return Ok(false);
    }
    let mut code = vec![0; ledger.code_size as usize];
    if memory.read_some(RunAddr(ledger.cache), &mut code) < code.len() {
        return Ok(false);
    }
    ledger.shortcuts.relocate(&mut code, ledger.bias.wrapping_neg());
    Ok(*blake3::hash(&code).as_bytes() == ledger.code_hash)
}
