//! From a place in a code cache back to the place in the original that means the same.
//!
//! For moving threads out at an undo, and for attributing samples that were taken in a cache. The pairs are not kept in
//! the ledger: they are made again by the walk that checks a copy ([`crate::check::pairs`]).

use crate::check::{Extras, Originals, pairs};
use crate::error::ApplyError;
use crate::ledger::{self, Entry};
use crate::lower::{CopiedBlock, CounterMap};
use crate::remote::Memory;
use dyni_collector::maps;
use dyni_schema::{LinkAddr, RunAddr};

/// The bytes of one block.
struct OneBlock {
    at: LinkAddr,
    bytes: Vec<u8>,
}

impl Originals for OneBlock {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        (at == self.at && len == self.bytes.len()).then_some(&self.bytes[..])
    }
}

/// A generation's map and code, read once.
#[derive(Debug)]
struct Cache {
    blocks: Vec<CopiedBlock>,
    counters: CounterMap,
    code: Vec<u8>,
}

impl Cache {
    fn read(entry: &Entry, memory: &Memory) -> Option<Self> {
        let code = memory.read_vec(RunAddr(entry.ledger.cache), entry.ledger.code_size as usize).ok()?;
        Some(Self { blocks: entry.ledger.blocks(), counters: entry.ledger.counter_map(), code })
    }

    /// The places of the block whose copy holds `at` that correspond, as run addresses (copy, original), rising.
    fn pairs(&self, entry: &Entry, memory: &Memory, at: RunAddr) -> Option<Vec<(RunAddr, RunAddr)>> {
        let ledger = &entry.ledger;
        let offset = at.0.checked_sub(ledger.cache)?;
        let holds = |b: &&CopiedBlock| (b.copy.0..b.copy.0 + u64::from(b.copy_size)).contains(&offset);
        let block = self.blocks.iter().find(holds)?;
        let bytes = entry.original_bytes(memory, block.original, block.size as usize)?;
        let original = OneBlock { at: block.original, bytes };
        let extras = Extras { counters: &self.counters, shortcuts: &ledger.shortcuts };
        let pairs = pairs(&self.code, ledger.cache_link(), &self.blocks, block, extras, &original).ok()?;
        let run = |p: &crate::check::Pair| (RunAddr(ledger.cache + p.copy.0), p.original.run(ledger.bias));
        Some(pairs.iter().map(run).collect())
    }
}

/// The place in the original that means what `at` in this generation's cache means; `None` where the original has
/// nothing (a jump that only the copy needs).
pub(crate) fn original_of(entry: &Entry, memory: &Memory, at: RunAddr) -> Option<RunAddr> {
    let pairs = Cache::read(entry, memory)?.pairs(entry, memory, at)?;
    // Several originals share a copy where no-operations were left out; the last is past them.
    pairs.into_iter().rev().find(|(copy, _)| *copy == at).map(|(_, original)| original)
}

/// From places in the code caches of one process to the original's.
#[derive(Debug, Default)]
pub struct Resolver(Option<(Memory, Vec<(Entry, Cache)>)>);

impl Resolver {
    /// For process `pid`; knows nothing if it has no code cache.
    ///
    /// # Errors
    /// The process is gone, or not ours to read.
    pub fn of(pid: i32) -> Result<Self, ApplyError> {
        let memory = Memory::open_read_only(pid)?;
        let (entries, _) = ledger::find(pid, &maps::mappings(pid)?, &memory);
        let caches = entries.into_iter().filter_map(|e| Cache::read(&e, &memory).map(|cache| (e, cache))).collect();
        Ok(Self(Some((memory, caches))))
    }

    /// The original's place for one in a cache; a jump that only the copy has counts for the instruction before it.
    #[must_use]
    pub fn resolve(&self, at: RunAddr) -> Option<RunAddr> {
        let (memory, caches) = self.0.as_ref()?;
        let (entry, cache) = caches.iter().find(|(e, _)| e.ledger.holds(at))?;
        let pairs = cache.pairs(entry, memory, at)?;
        let i = pairs.partition_point(|(copy, _)| *copy <= at).checked_sub(1)?;
        Some(pairs[i].1)
    }
}
