//! What a layout is worth, before and after: the numbers that BOLT calls DynoStats.
//!
//! All of them are estimates from inferred counts. A count is in the profile's own unit (for sampled profiles 1024 per
//! sample in a block of one instruction), so only ratios of counts mean anything to people.

use crate::exttsp::{JumpKind, LayoutBlock, LayoutJump, score};
use crate::passes::FunctionLayout;
use crate::passes::infer::cost;
use std::collections::BTreeMap;
use std::fmt;

/// Bytes of a page of text.
pub const PAGE: u64 = 4096;

/// Numbers about where the code of some functions lies.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayoutStats {
    /// Functions.
    pub functions: u64,
    /// Their blocks that lie in the layout.
    pub blocks: u64,
    /// Those of them with a count.
    pub hot_blocks: u64,
    /// Bytes of the blocks with a count: the least that has to be in reach.
    pub hot_bytes: u64,
    /// Bytes that lie between hot blocks and have to be spanned: whole functions before, parts in front after.
    pub span_bytes: u64,
    /// Pages of 4096 bytes with any block that has a count.
    pub pages: u64,
    /// The fewest of these pages in which 99.9 % of the time is spent.
    pub pages_999: u64,
    /// Executions of edges inside functions, in units of count.
    pub edges: u64,
    /// Those of them that are taken branches.
    pub taken_branches: u64,
    /// The ext-TSP score of all functions, in units of count.
    pub ext_tsp: f64,
}

/// Where every block of some functions lies.
pub struct Places {
    /// By function: blocks in their order.
    order: Vec<Vec<u32>>,
    /// By function and place in the order: the address.
    address: Vec<Vec<u64>>,
    span: u64,
}

impl Places {
    /// As they lie in the file.
    #[must_use]
    pub fn original(layouts: &[FunctionLayout]) -> Self {
        let order: Vec<Vec<u32>> = layouts.iter().map(|l| (0..l.cfg.blocks.len() as u32).collect()).collect();
        let address = layouts.iter().map(|l| l.cfg.blocks.iter().map(|b| b.start.0).collect()).collect();
        Self { order, address, span: layouts.iter().map(|l| u64::from(l.function.size)).sum() }
    }

    /// As they would lie in a cache: the parts in front of all functions in this order, then the cold parts. Branches are
    /// taken to keep their lengths.
    #[must_use]
    pub fn planned(layouts: &[FunctionLayout], functions: &[u32]) -> Self {
        let mut places = Self {
            order: layouts.iter().map(|l| l.order.clone()).collect(),
            address: layouts.iter().map(|l| Vec::with_capacity(l.order.len())).collect(),
            span: 0,
        };
        let mut at = 0u64;
        for part in 0..2 {
            for &f in functions {
                let layout = &layouts[f as usize];
                let (hot, cold) = layout.order.split_at(layout.hot);
                for &b in if part == 0 { hot } else { cold } {
                    places.address[f as usize].push(at);
                    at += u64::from(layout.size(b));
                }
            }
            if part == 0 {
                places.span = at;
                at = at.next_multiple_of(PAGE);
            }
        }
        places
    }
}

impl LayoutStats {
    /// The numbers of these functions, their blocks lying there.
    #[must_use]
    pub fn of(layouts: &[FunctionLayout], places: &Places) -> Self {
        let mut stats = Self { functions: layouts.len() as u64, span_bytes: places.span, ..Self::default() };
        let mut pages: BTreeMap<u64, u128> = BTreeMap::new();
        for (f, layout) in layouts.iter().enumerate() {
            let (order, address) = (&places.order[f], &places.address[f]);
            stats.blocks += order.len() as u64;
            for (&b, &at) in order.iter().zip(address) {
                let (count, size) = (layout.flow.nodes[b as usize], u64::from(layout.size(b)));
                if count == 0 {
                    continue;
                }
                stats.hot_blocks += 1;
                stats.hot_bytes += size;
                let time = u128::from(count) * u128::from(cost(layout, b as usize));
                for page in at / PAGE..=(at + size - 1) / PAGE {
                    *pages.entry(page).or_default() += time;
                }
            }
            stats.count_branches(layout, order, address);
        }
        stats.pages = pages.len() as u64;
        let mut by_time: Vec<u128> = pages.into_values().collect();
        by_time.sort_unstable_by(|a, b| b.cmp(a));
        let total: u128 = by_time.iter().sum();
        let (mut have, mut needed) = (0, 0);
        while have * 1000 < total * 999 {
            have += by_time[needed];
            needed += 1;
        }
        stats.pages_999 = needed as u64;
        stats
    }

    fn count_branches(&mut self, layout: &FunctionLayout, order: &[u32], address: &[u64]) {
        let n = layout.cfg.blocks.len();
        let mut start = vec![None; n];
        for (&b, &at) in order.iter().zip(address) {
            start[b as usize] = Some(at);
        }
        let mut jumps = Vec::with_capacity(layout.edges.len());
        for (e, &count) in layout.edges.iter().zip(&layout.flow.edges) {
            let end = start[e.from as usize].map(|s| s + u64::from(layout.size(e.from)));
            let falls = e.kind != JumpKind::Indirect && end.is_some() && end == start[e.to as usize];
            self.edges = self.edges.saturating_add(count);
            self.taken_branches = self.taken_branches.saturating_add(if falls { 0 } else { count });
            jumps.push(LayoutJump { from: e.from, to: e.to, count, kind: e.kind });
        }
        let block = |b: u32| LayoutBlock { size: layout.size(b), count: layout.flow.nodes[b as usize] };
        let blocks: Vec<LayoutBlock> = (0..n as u32).map(block).collect();
        self.ext_tsp += score(&blocks, &jumps, order);
    }

    /// Adds another module's numbers.
    pub fn add(&mut self, other: &Self) {
        self.functions += other.functions;
        self.blocks += other.blocks;
        self.hot_blocks += other.hot_blocks;
        self.hot_bytes += other.hot_bytes;
        self.span_bytes += other.span_bytes;
        self.pages += other.pages;
        self.pages_999 += other.pages_999;
        self.edges = self.edges.saturating_add(other.edges);
        self.taken_branches = self.taken_branches.saturating_add(other.taken_branches);
        self.ext_tsp += other.ext_tsp;
    }
}

/// Two layouts side by side, as a table for people.
pub struct BeforeAfter<'a> {
    /// As it was.
    pub before: &'a LayoutStats,
    /// As it is planned.
    pub after: &'a LayoutStats,
}

impl fmt::Display for BeforeAfter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (b, a) = (self.before, self.after);
        writeln!(f, "{:<28}{:>14}{:>14}{:>10}", "", "before", "after", "change")?;
        let rows = [
            ("functions", b.functions, a.functions),
            ("blocks", b.blocks, a.blocks),
            ("hot blocks", b.hot_blocks, a.hot_blocks),
            ("hot bytes", b.hot_bytes, a.hot_bytes),
            ("bytes spanned by hot code", b.span_bytes, a.span_bytes),
            ("4 KiB pages with hot code", b.pages, a.pages),
            ("pages for 99.9 % of time", b.pages_999, a.pages_999),
        ];
        for (name, before, after) in rows {
            writeln!(f, "{name:<28}{before:>14}{after:>14}{:>10}", change(before as f64, after as f64))?;
        }
        // Counts have no unit that means anything: as shares of all edges.
        let share = |n: f64, of: u64| if of == 0 { 0.0 } else { 100.0 * n / of as f64 };
        let shares = [
            (
                "taken branches, % of edges",
                share(b.taken_branches as f64, b.edges),
                share(a.taken_branches as f64, a.edges),
            ),
            ("ext-TSP score, % of edges", share(b.ext_tsp, b.edges), share(a.ext_tsp, a.edges)),
        ];
        for (name, before, after) in shares {
            writeln!(f, "{name:<28}{before:>14.1}{after:>14.1}{:>10}", change(before, after))?;
        }
        Ok(())
    }
}

fn change(before: f64, after: f64) -> String {
    if before == 0.0 { "-".to_owned() } else { format!("{:+.1} %", 100.0 * (after - before) / before) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_reads_like_this() {
        let before = LayoutStats {
            functions: 2,
            blocks: 40,
            hot_blocks: 10,
            hot_bytes: 300,
            span_bytes: 2000,
            pages: 2,
            pages_999: 2,
            edges: 1000,
            taken_branches: 500,
            ext_tsp: 600.0,
        };
        let after = LayoutStats {
            blocks: 38,
            span_bytes: 400,
            pages: 1,
            pages_999: 1,
            taken_branches: 125,
            ext_tsp: 900.0,
            ..before
        };
        let table = BeforeAfter { before: &before, after: &after }.to_string();
        let heading = format!("{:28}        before         after    change\n", "");
        let expected = "\
functions                                2             2    +0.0 %
blocks                                  40            38    -5.0 %
hot blocks                              10            10    +0.0 %
hot bytes                              300           300    +0.0 %
bytes spanned by hot code             2000           400   -80.0 %
4 KiB pages with hot code                2             1   -50.0 %
pages for 99.9 % of time                 2             1   -50.0 %
taken branches, % of edges            50.0          12.5   -75.0 %
ext-TSP score, % of edges             60.0          90.0   +50.0 %
";
        assert_eq!(table, heading + expected);
    }
}
