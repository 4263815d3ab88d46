//! Tables of the cache: the original's jump tables with the copies of the targets as entries.

use super::Source;
use super::operand::Operand;
use crate::shortcuts::TableLoad;
use dyni_schema::LinkAddr;
use std::collections::HashMap;
use std::ops::Range;

/// One of them.
pub(super) struct Clone {
    /// Its offset from the first one, in bytes.
    pub at: u64,
    /// The original's table.
    pub original: LinkAddr,
    /// Whether its entries are addresses.
    pub absolute: bool,
    /// Where they lead in the original.
    pub targets: Vec<LinkAddr>,
}

/// All tables of a cache.
#[derive(Default)]
pub(super) struct Tables {
    pub clones: Vec<Clone>,
    /// By the instruction that reads it, rising, and its clone.
    pub loads: Vec<(TableLoad, usize)>,
    /// Their length in bytes.
    pub len: u64,
}

impl Tables {
    /// Those of the copied blocks, given as (source, block), that may have one in this cache.
    pub fn of(sources: &[&Source<'_>], blocks: impl Iterator<Item = (usize, usize)>, cache: &Range<LinkAddr>) -> Self {
        let mut tables = Self::default();
        let mut known: HashMap<(usize, u32), usize> = HashMap::new();
        for (f, b) in blocks {
            let source = sources[f];
            let block = &source.cfg.blocks[b];
            let Some(&(load, t)) = source.table_loads.iter().find(|(at, _)| block.start <= *at && *at < block.end)
            else {
                continue;
            };
            let table = &source.cfg.jump_tables[t as usize];
            if !reaches(source, load, table.address, cache) {
                continue;
            }
            let clone = *known.entry((f, t)).or_insert_with(|| {
                let width = if table.absolute { 8 } else { 4 };
                let at = tables.len.next_multiple_of(width);
                tables.len = at + table.targets.len() as u64 * width;
                let (original, absolute, targets) = (table.address, table.absolute, table.targets.clone());
                tables.clones.push(Clone { at, original, absolute, targets });
                tables.clones.len() - 1
            });
            let count = table.targets.len() as u32;
            let load = TableLoad { at: load.0, table: table.address.0, absolute: table.absolute, count };
            tables.loads.push((load, clone));
        }
        tables.loads.sort_unstable_by_key(|l| l.0.at);
        tables
    }

    /// How far a table lies from the original's, for the instruction that reads it, if the first one lies at `region`.
    pub fn moved(&self, load: LinkAddr, region: LinkAddr) -> Option<i64> {
        let i = self.loads.binary_search_by_key(&load.0, |l| l.0.at).ok()?;
        let (load, clone) = self.loads[i];
        Some(region.plus(self.clones[clone].at).distance(LinkAddr(load.table)))
    }
}

/// Whether the displacement of the instruction that reads a table can be such that it reads one in the cache.
fn reaches(source: &Source<'_>, load: LinkAddr, table: LinkAddr, cache: &Range<LinkAddr>) -> bool {
    let wide = source.code.get(load.distance(source.cfg.start) as usize..).and_then(Operand::of_load);
    wide.and_then(Operand::wide).is_some_and(|(_, displacement)| {
        let moved = |to: LinkAddr| i32::try_from(i64::from(displacement) + to.distance(table)).is_ok();
        moved(cache.start) && moved(cache.end)
    })
}
