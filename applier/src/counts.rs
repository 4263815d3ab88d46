//! Reading the counters of generations that count, from outside and while they do.

use crate::error::ApplyError;
use crate::ledger::{self, Entry};
use crate::lower::COUNTER;
use crate::remote::Memory;
use dyni_collector::maps::{self, FileId, Mapping};
use dyni_schema::{BuildId, LinkAddr, RunAddr};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The counters of one mapping: those of a process, shared with the children that it has forked since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Which mapping: processes that share it show the same one.
    mapping: FileId,
    /// Which module is counted.
    build_id: BuildId,
    /// Each counted block: where it is, its length in bytes, and its count.
    blocks: Vec<(LinkAddr, u32, u64)>,
}

/// The counters that process `pid` has mapped; none if no generation in it counts.
///
/// # Errors
/// The process is gone, or not ours to read.
pub fn counters(pid: i32) -> Result<Vec<Counters>, ApplyError> {
    Ok(CounterReader::open(pid)?.read())
}

/// Where the counters of a process are: found once, to be read at a moment of one's choice.
#[derive(Debug)]
pub struct CounterReader {
    memory: Memory,
    mapped: Vec<Mapped>,
}

/// A mapping of counters.
#[derive(Debug)]
struct Mapped {
    at: RunAddr,
    /// The load bias of the module.
    bias: u64,
    /// What they say but for the counts.
    counters: Counters,
    /// The calls through pointers whose last callees lie behind the counters.
    sites: Vec<LinkAddr>,
}

impl CounterReader {
    /// Finds those that process `pid` has mapped now.
    ///
    /// # Errors
    /// The process is gone, or not ours to read.
    pub fn open(pid: i32) -> Result<Self, ApplyError> {
        let memory = Memory::open_read_only(pid)?;
        let maps = maps::mappings(pid)?;
        let (entries, _) = ledger::find(pid, &maps, &memory);
        let mapped = entries.iter().filter_map(|e| find(e, &maps)).collect();
        Ok(Self { memory, mapped })
    }

    /// Reads them; none of a process that has ended.
    #[must_use]
    pub fn read(&self) -> Vec<Counters> {
        let counted = |m: &Mapped| {
            let counts = self.numbers(m.at, m.counters.blocks.len())?;
            let mut counters = m.counters.clone();
            counters.blocks.iter_mut().zip(counts).for_each(|(block, count)| block.2 = count);
            Some(counters)
        };
        self.mapped.iter().filter_map(counted).collect()
    }

    /// What the recorded calls called last: the site, and the callee if it may be in the same module. Those that were not
    /// made yet are not there.
    #[must_use]
    pub fn last_calls(&self) -> Vec<(BuildId, LinkAddr, Option<LinkAddr>)> {
        let of = |m: &Mapped| {
            let called = self.numbers(m.at.plus(m.counters.blocks.len() as u64 * COUNTER), m.sites.len());
            let made = m.sites.iter().copied().zip(called.unwrap_or_default()).filter(|(_, to)| *to != 0);
            made.map(|(site, to)| (m.counters.build_id.clone(), site, callee(to, m.bias))).collect::<Vec<_>>()
        };
        self.mapped.iter().flat_map(of).collect()
    }

    fn numbers(&self, at: RunAddr, count: usize) -> Option<Vec<u64>> {
        let bytes = self.memory.read_vec(at, count * COUNTER as usize).ok()?;
        Some(bytes.chunks_exact(8).map(|n| u64::from_le_bytes(n.try_into().expect("eight bytes"))).collect())
    }
}

/// A run address of a callee as a link address of the module, if it lies in reach of it.
fn callee(to: u64, bias: u64) -> Option<LinkAddr> {
    let at = RunAddr(to).link(bias);
    (to != 0 && to >= bias && at.0 <= i32::MAX as u64).then_some(at)
}

fn find(entry: &Entry, maps: &[Mapping]) -> Option<Mapped> {
    let ledger = &entry.ledger;
    let range = ledger.counters..ledger.counters + ledger.counters_size();
    let map = maps.iter().find(|m| ledger.counters != 0 && m.range == range && m.shared)?;
    let size = |at| ledger.block_original.binary_search(at).map_or(0, |block| ledger.block_size[block]);
    let blocks = ledger.counted.iter().map(|at| (LinkAddr(*at), size(at), 0)).collect();
    let counters = Counters { mapping: map.file, build_id: ledger.build_id.clone(), blocks };
    let sites = ledger.recorded.iter().map(|at| LinkAddr(*at)).collect();
    Some(Mapped { at: RunAddr(ledger.counters), bias: ledger.bias, counters, sites })
}

/// What was counted between two looks at the counters of some processes.
#[derive(Debug, Default)]
pub struct Tally {
    before: HashMap<FileId, Vec<u64>>,
    after: HashMap<FileId, Counters>,
}

impl Tally {
    /// Takes the counters of a process as they are at the beginning.
    pub fn begin(&mut self, counters: Vec<Counters>) {
        for c in counters {
            self.before.insert(c.mapping, c.blocks.iter().map(|b| b.2).collect());
        }
    }

    /// Takes the counters of a process as they are now. Those that other processes have shown already count once.
    pub fn end(&mut self, counters: Vec<Counters>) {
        for c in counters {
            self.after.insert(c.mapping, c);
        }
    }

    /// By module: the counted blocks that ran.
    #[must_use]
    pub fn ran(&self) -> BTreeMap<BuildId, BTreeSet<LinkAddr>> {
        let ran =
            |blocks: BTreeMap<LinkAddr, (u32, u64)>| blocks.into_iter().filter(|b| b.1.1 > 0).map(|b| b.0).collect();
        self.blocks().into_iter().map(|(module, blocks)| (module, ran(blocks))).collect()
    }

    /// By module: each counted block, its length in bytes, and how often it ran, by rising address.
    #[must_use]
    pub fn blocks(&self) -> BTreeMap<BuildId, BTreeMap<LinkAddr, (u32, u64)>> {
        let mut modules: BTreeMap<BuildId, BTreeMap<LinkAddr, (u32, u64)>> = BTreeMap::new();
        for (mapping, counters) in &self.after {
            let before = self.before.get(mapping);
            let module = modules.entry(counters.build_id.clone()).or_default();
            for (i, &(at, size, count)) in counters.blocks.iter().enumerate() {
                let began = before.and_then(|b| b.get(i)).copied().unwrap_or(0);
                let sum = &mut module.entry(at).or_insert((size, 0)).1;
                *sum = sum.saturating_add(count.saturating_sub(began));
            }
        }
        modules
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_counters_count_once_and_from_the_beginning() {
        let at = |inode, counts: &[u64]| Counters {
            mapping: FileId { dev: (0, 1), inode },
            build_id: BuildId(vec![7]),
            blocks: counts.iter().enumerate().map(|(i, &n)| (LinkAddr(16 * i as u64), 9, n)).collect(),
        };
        let mut tally = Tally::default();
        tally.begin(vec![at(1, &[5, 0])]);
        tally.end(vec![at(1, &[15, 1])]);
        tally.end(vec![at(1, &[16, 1]), at(2, &[100, 0])]);
        let blocks = &tally.blocks()[&BuildId(vec![7])];
        assert_eq!(blocks.values().copied().collect::<Vec<_>>(), [(9, 111), (9, 1)]);
    }
}
