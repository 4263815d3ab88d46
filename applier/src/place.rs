//! Where a code cache goes: a hole in the address space, 2 MB-aligned, within reach of the whole module.
//!
//! Below the module first, never between a main executable and its heap, which grows upwards (OCOLOS collided with
//! `brk`). Libraries lie one beside the other at the top of the address space, where the kernel places what the program maps,
//! each time as high as it goes: so for them it is the middle of the largest hole within reach, where new mappings and the
//! stacks of new threads come last.

use dyni_collector::maps::Mapping;
use dyni_schema::RunAddr;
use std::ops::Range;
use std::path::Path;

/// The size of a huge page in bytes, and the alignment of a cache.
pub const HUGE: u64 = 2 << 20;
/// How far a `jmp rel32` and a RIP-relative operand reach, with room to spare.
const REACH: u64 = (1 << 31) - (1 << 20);
/// Kept free above the topmost mapping's hole, for the stack to grow into.
const STACK_ROOM: u64 = 64 << 20;
/// The lowest address that is tried; `vm.mmap_min_addr` is below it on every distribution.
const LOWEST: u64 = 1 << 20;

/// The mapped ranges of a process, by rising address, and which of them is the heap.
#[derive(Debug, Clone)]
pub struct AddressSpace {
    mapped: Vec<Range<u64>>,
    heap: Option<u64>,
    stack: Option<u64>,
}

impl AddressSpace {
    /// The address space of a process with these mappings.
    #[must_use]
    pub fn of(maps: &[Mapping]) -> Self {
        let start = |name: &str| maps.iter().find(|m| m.path == Path::new(name)).map(|m| m.range.start);
        // The vsyscall page is above the user's half; not ours to look at.
        let user = maps.iter().filter(|m| m.range.start < 1 << 47);
        Self { mapped: user.map(|m| m.range.clone()).collect(), heap: start("[heap]"), stack: start("[stack]") }
    }

    /// Counts this range as mapped from now on.
    pub fn take(&mut self, range: Range<u64>) {
        let i = self.mapped.partition_point(|m| m.start < range.start);
        self.mapped.insert(i, range);
    }

    /// Whether nothing is mapped in this range.
    #[must_use]
    pub fn is_free(&self, range: &Range<u64>) -> bool {
        !self.mapped.iter().any(|m| m.start < range.end && range.start < m.end)
    }

    /// Holes for a cache of `size` bytes (a multiple of [`HUGE`]) with `behind` more bytes behind it, for the module that
    /// occupies `module`, best first, at most `most` of them.
    #[must_use]
    pub fn holes(&self, module: &Range<u64>, size: u64, behind: u64, most: usize) -> Vec<RunAddr> {
        let reach = (module.end.saturating_sub(REACH)).max(LOWEST)..module.start.saturating_add(REACH);
        let is_library = self.heap.is_some_and(|heap| heap < module.start);
        let mut middles = Vec::new();
        let mut below = Vec::new();
        let mut above = Vec::new();
        let mut previous = LOWEST;
        for next in self.mapped.iter().map(Some).chain([None]) {
            // A hole that ends at the stack is the stack's; keep well away from it.
            let end = next.map_or(previous, |n| n.start - if Some(n.start) == self.stack { STACK_ROOM } else { 0 });
            let hole = previous..end;
            previous = next.map_or(previous, |n| n.end.max(previous));
            let low = hole.start.max(reach.start).next_multiple_of(HUGE);
            let high = hole.end.min(reach.end) & !(HUGE - 1);
            let Some(top) = high.checked_sub(size + behind.next_multiple_of(HUGE)).filter(|&top| top >= low) else {
                continue;
            };
            // The heap grows up into the hole above it.
            let above_heap = self.heap.is_some_and(|heap| heap < low && heap >= module.start);
            if is_library {
                middles.push((top - low, low.midpoint(top) & !(HUGE - 1)));
            } else if hole.end <= module.start {
                below.push(top);
            } else if !above_heap {
                above.push(low);
            }
        }
        middles.sort_unstable();
        below.extend(middles.into_iter().map(|(_, middle)| middle));
        below.reverse();
        below.into_iter().chain(above).take(most).map(RunAddr).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(mapped: &[(u64, u64)], heap: Option<u64>, stack: Option<u64>) -> AddressSpace {
        AddressSpace { mapped: mapped.iter().map(|&(a, b)| a..b).collect(), heap, stack }
    }

    #[test]
    fn below_a_pie_and_never_at_its_heap() {
        let s = space(
            &[(0x5555_5555_4000, 0x5555_5575_4000), (0x5555_5580_0000, 0x5555_5590_0000)],
            Some(0x5555_5580_0000),
            None,
        );
        let holes = s.holes(&(0x5555_5555_4000..0x5555_5575_4000), HUGE, 0, 9);
        assert_eq!(holes, [RunAddr(0x5555_5520_0000)]);
    }

    #[test]
    fn below_a_position_dependent_program() {
        let s = space(&[(0x40_0000, 0xa0_0000), (0xb0_0000, 0xc0_0000)], Some(0xb0_0000), None);
        assert_eq!(s.holes(&(0x40_0000..0xa0_0000), HUGE, 0, 9), [RunAddr(0x20_0000)]);
        assert_eq!(s.holes(&(0x40_0000..0xa0_0000), 2 * HUGE, 0, 9), [], "there is no other");
    }

    #[test]
    fn a_librarys_is_where_nothing_comes_to_lie_soon() {
        let library = 0x7fff_e000_0000..0x7fff_e020_0000;
        let s = space(
            &[(0x5555_5555_4000, 0x5555_5575_4000), (0x7fff_c000_0000, 0x7fff_c010_0000), (library.start, library.end)],
            Some(0x5555_5580_0000),
            None,
        );
        // Of the two holes below within 2 GB, the lower one is larger by 1 GB than the other.
        let holes = s.holes(&library, HUGE, 0, 9);
        assert_eq!(holes[0], RunAddr(0x7fff_9000_0000));
        assert!(s.is_free(&(holes[0].0..holes[0].0 + HUGE)));
    }

    #[test]
    fn between_libraries_and_away_from_the_stack() {
        let stack = 0x7fff_f000_0000;
        let s = space(
            &[(0x7000_0000_0000, 0x7000_1000_0000), (0x7fff_e000_0000, 0x7fff_e020_0000), (stack, stack + 0x2_1000)],
            None,
            Some(stack),
        );
        let holes = s.holes(&(0x7fff_e000_0000..0x7fff_e020_0000), HUGE, 0, 9);
        assert_eq!(holes[0], RunAddr(0x7fff_dfe0_0000));
        assert_eq!(holes[1], RunAddr(0x7fff_e020_0000));
    }
}
