//! Putting generations in force while a process stands still: threads are moved into the copies, then patches written.

use crate::check::{Originals, pairs};
use crate::failpoint;
use crate::generation::Generation;
use crate::ledger::{Entry, Ledger, PATCH};
use crate::patch::{self, Edit};
use crate::remote::{Memory, RemoteError, Stopped};
use dyni_collector::maps::Mapping;
use dyni_schema::{BuildId, LinkAddr, RunAddr};
use std::collections::{BTreeMap, BTreeSet};

/// Which of a generation's patches are to be put in force.
#[derive(Debug, Clone)]
pub enum Choice {
    /// All.
    All,
    /// Those at the entries of functions.
    Entries,
    /// All of the functions that hold any of these places, by module; none of the others.
    FunctionsWith(BTreeMap<BuildId, BTreeSet<LinkAddr>>),
}

impl Choice {
    /// Whether each patch of a ledger is chosen.
    fn of(&self, ledger: &Ledger) -> Vec<bool> {
        let function = |at: u64| ledger.functions.partition_point(|&f| f <= at).checked_sub(1);
        let chosen = |&at: &u64| match self {
            Self::All => true,
            Self::Entries => ledger.functions.binary_search(&at).is_ok(),
            Self::FunctionsWith(places) => function(at).is_some_and(|f| {
                let range =
                    LinkAddr(ledger.functions[f])..LinkAddr(ledger.functions[f] + u64::from(ledger.function_sizes[f]));
                places.get(&ledger.build_id).is_some_and(|places| places.range(range).next().is_some())
            }),
        };
        ledger.patches.iter().map(chosen).collect()
    }
}

/// A generation in the process at hand.
#[derive(Debug)]
pub(crate) struct Site<'a> {
    pub generation: &'a Generation,
    pub bias: u64,
    pub entry: Entry,
}

/// The run addresses to which the copies of these generations in a process may jump.
pub(crate) fn escapes(entries: &[Entry]) -> BTreeSet<RunAddr> {
    let of = |e: &Entry| e.ledger.escapes.iter().map(|&at| LinkAddr(at).run(e.ledger.bias)).collect::<Vec<_>>();
    entries.iter().flat_map(of).collect()
}

/// The patches of some generations in one process.
#[derive(Debug, Clone)]
pub(crate) struct Edits {
    /// By rising place.
    pub all: Vec<Edit>,
    /// The generation of each, an index into the sites.
    site: Vec<usize>,
    /// By site: how many are in force.
    pub in_force: Vec<usize>,
    /// By site: how many were left out.
    pub dropped: Vec<u32>,
}

impl Edits {
    /// The chosen patches of generations. Copies of other ones may still run, and escape to `old_escapes`: what would
    /// overwrite the middle of such a place is left out.
    pub fn of(sites: &[Site<'_>], choice: &Choice, old_escapes: &BTreeSet<RunAddr>) -> Self {
        let mut edits: Vec<(Edit, usize)> = Vec::new();
        let mut dropped = vec![0u32; sites.len()];
        for (index, site) in sites.iter().enumerate() {
            let chosen = choice.of(&site.entry.ledger);
            for (at, from, to) in site.entry.ledger.patches().zip(&chosen).filter(|c| *c.1).map(|c| c.0) {
                if old_escapes.range(at.plus(1)..at.plus(PATCH as u64)).next().is_some() {
                    dropped[index] += 1;
                } else {
                    edits.push((Edit { at, from, to }, index));
                }
            }
        }
        edits.sort_by_key(|(edit, _)| edit.at);
        let (all, site) = edits.into_iter().unzip();
        Self { all, site, in_force: vec![0; sites.len()], dropped }
    }

    /// Puts them in force, but for those whose bytes a thread is about to return into; how many threads were moved into
    /// a copy. `maps` tells where the stacks are.
    pub fn enter(
        &mut self,
        stopped: &mut Stopped,
        sites: &[Site<'_>],
        memory: &Memory,
        maps: &[Mapping],
    ) -> Result<usize, RemoteError> {
        let places: Vec<RunAddr> = self.all.iter().map(|edit| edit.at).collect();
        let mut unsafe_now = patch::pointed_into(stopped, memory, maps, &places);
        let moved = move_in(stopped, sites, memory, &places, &mut unsafe_now)?;
        failpoint::pass("apply:threads-moved", stopped.pid);
        let edits = std::mem::take(&mut self.all).into_iter().zip(std::mem::take(&mut self.site));
        let (safe, unsafe_edits): (Vec<_>, Vec<_>) = edits.partition(|(edit, _)| !unsafe_now.contains(&edit.at));
        unsafe_edits.iter().for_each(|(_, site)| self.dropped[*site] += 1);
        (self.all, self.site) = safe.into_iter().unzip();
        let written = patch::write(stopped, memory, &self.all, "apply:half-patched")?;
        failpoint::pass("apply:patched", stopped.pid);
        for (&site, _) in self.site.iter().zip(&written).filter(|(_, written)| **written) {
            self.in_force[site] += 1;
        }
        Ok(moved)
    }
}

/// Moves each thread that stands in a copied block to the same place in the copy; how many. A thread that stands inside
/// bytes to be patched and can't be moved makes that patch unsafe.
fn move_in(
    stopped: &mut Stopped,
    sites: &[Site<'_>],
    memory: &Memory,
    places: &[RunAddr],
    unsafe_now: &mut BTreeSet<RunAddr>,
) -> Result<usize, RemoteError> {
    let mut moved = 0;
    for thread in &mut stopped.threads {
        let rip = thread.rip();
        // After a system call that may be restarted, RIP goes back over the instruction; patches leave those alone.
        let copy = (!thread.in_syscall()).then(|| sites.iter().find_map(|s| s.copy_of(rip, memory))).flatten();
        if let Some(copy) = copy {
            thread.set_rip(copy)?;
            moved += 1;
        } else if let Some(&place) = places.get(places.partition_point(|p| *p < rip).wrapping_sub(1))
            && rip.distance(place) < PATCH as i64
        {
            unsafe_now.insert(place);
        }
    }
    Ok(moved)
}

impl Site<'_> {
    /// The place in the copy that means the same as `rip`, if `rip` is in a copied block and the block is there: the
    /// module may have been unloaded since, and another one mapped at its place.
    fn copy_of(&self, rip: RunAddr, memory: &Memory) -> Option<RunAddr> {
        let at = rip.link(self.bias);
        let blocks = &self.generation.emission.blocks;
        let block = &blocks[blocks.partition_point(|b| b.original <= at).checked_sub(1)?];
        if at >= block.original.plus(u64::from(block.size)) {
            return None;
        }
        let original = self.generation.originals.bytes(block.original, block.size as usize)?;
        if memory.read_vec(block.original.run(self.bias), original.len()).ok()? != original {
            return None;
        }
        let cache = self.generation.cache;
        let emission = &self.generation.emission;
        let originals = &self.generation.originals;
        let pairs = pairs(&emission.code, cache, blocks, block, emission.into(), originals).ok()?;
        let pair = pairs.iter().find(|p| p.original == at)?;
        Some(cache.plus(pair.copy.0).run(self.bias))
    }
}
