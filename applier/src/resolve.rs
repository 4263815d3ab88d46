//! From a place in a code cache back to the place in the original that means the same.
//!
//! For moving threads out at an undo, and for attributing samples that were taken in a cache. The pairs are not kept in
//! the ledger: they are made again by the walk that checks a copy ([`crate::check::pairs`]).

use crate::check::{Originals, pairs};
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
struct Cache<'a> {
    entry: &'a Entry,
    memory: &'a Memory,
    blocks: Vec<CopiedBlock>,
    counters: CounterMap,
    code: Vec<u8>,
}

impl<'a> Cache<'a> {
    fn read(entry: &'a Entry, memory: &'a Memory) -> Option<Self> {
        let code = memory.read_vec(RunAddr(entry.ledger.cache), entry.ledger.code_size as usize).ok()?;
        Some(Self { entry, memory, blocks: entry.ledger.blocks(), counters: entry.ledger.counter_map(), code })
    }

    /// The places of one block that correspond, as run addresses (copy, original).
    fn pairs(&self, block: &CopiedBlock) -> Option<Vec<(RunAddr, RunAddr)>> {
        let ledger = &self.entry.ledger;
        let bytes = self.entry.original_bytes(self.memory, block.original, block.size as usize)?;
        let original = OneBlock { at: block.original, bytes };
        let pairs = pairs(&self.code, ledger.cache_link(), &self.blocks, block, &self.counters, &original).ok()?;
        let run = |p: &crate::check::Pair| (RunAddr(ledger.cache + p.copy.0), p.original.run(ledger.bias));
        Some(pairs.iter().map(run).collect())
    }
}

/// The place in the original that means what `at` in this generation's cache means; `None` where the original has
/// nothing (a jump that only the copy needs).
pub(crate) fn original_of(entry: &Entry, memory: &Memory, at: RunAddr) -> Option<RunAddr> {
    let cache = Cache::read(entry, memory)?;
    let offset = at.0.checked_sub(entry.ledger.cache)?;
    let block = cache.blocks.iter().find(|b| (b.copy.0..b.copy.0 + u64::from(b.copy_size)).contains(&offset))?;
    // Several originals share a copy where no-operations were left out; the last is past them.
    cache.pairs(block)?.into_iter().rev().find(|(copy, _)| *copy == at).map(|(_, original)| original)
}

/// Every place in the code caches of one process, with the original's.
#[derive(Debug, Default)]
pub struct Resolver {
    /// (copy, original), by rising copy.
    pairs: Vec<(RunAddr, RunAddr)>,
    /// The caches' code, run addresses.
    caches: Vec<std::ops::Range<u64>>,
}

impl Resolver {
    /// For process `pid`; empty if it has no code cache.
    ///
    /// # Errors
    /// The process is gone, or not ours to read.
    pub fn of(pid: i32) -> Result<Self, ApplyError> {
        let memory = Memory::open_read_only(pid)?;
        let (entries, _) = ledger::find(pid, &maps::mappings(pid)?, &memory);
        let mut resolver = Self::default();
        for cache in entries.iter().filter_map(|e| Cache::read(e, &memory)) {
            let start = cache.entry.ledger.cache;
            resolver.caches.push(start..start + cache.entry.ledger.code_size);
            resolver.pairs.extend(cache.blocks.iter().filter_map(|b| cache.pairs(b)).flatten());
        }
        resolver.pairs.sort_unstable();
        Ok(resolver)
    }

    /// The original's place for one in a cache; a jump that only the copy has counts for the instruction before it.
    #[must_use]
    pub fn resolve(&self, at: RunAddr) -> Option<RunAddr> {
        self.caches.iter().find(|c| c.contains(&at.0))?;
        let i = self.pairs.partition_point(|(copy, _)| *copy <= at).checked_sub(1)?;
        Some(self.pairs[i].1)
    }
}
