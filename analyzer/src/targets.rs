//! Where execution may arrive in a module's text other than by falling through: what may be overwritten by a patch.
//!
//! A patch is a 5-byte jump. It is safe if execution can only arrive at its first byte: nothing branches, returns or is
//! resumed into the other four. So these sets are *supersets* of what can happen, made from all of the module at once:
//!
//! | set | what is in it |
//! |---|---|
//! | branch | targets of direct jumps and calls, from a linear decode of all text |
//! | observed | addresses that data hold (relocations; any 8 bytes in a module at a fixed address) or that *other* code computes |
//! | soft | addresses that the function itself computes, landing pads, exported symbols, numbers in fixed code that might be addresses |
//! | tables | every entry of everything that might be a jump table |
//! | returns | addresses after a call |
//! | traps | addresses after an instruction that enters the kernel: a thread in there resumes at it, or two bytes before |
//!
//! A bit too many only makes a patch impossible. What is missed is what no static look can see (a computed address without
//! any trace in the file); programs built by compilers have none.

mod bits;
mod patch;
mod scan;

use crate::functions::{Function, Functions};
use crate::image::Image;
use crate::refuse;
use bits::{Bits, Filling, Layout};
use dyni_schema::LinkAddr;
use rayon::prelude::*;
use std::ops::Range;

pub use patch::{PATCH, PatchRefusal};
pub(crate) use scan::is_trap;

/// The most entries of one possible jump table that are looked at.
const MAX_TABLE: usize = 1 << 16;
/// How many starts of other possible tables are run over before a possible table is taken to have ended: code may compute
/// the address of something in the middle of a table.
const TABLE_OVERRUN: usize = 4;

/// The index; see the module's description. One bit a set and byte of text.
#[derive(Clone, Debug)]
pub struct TargetIndex {
    layout: Layout,
    branch: Bits,
    observed: Bits,
    soft: Bits,
    tables: Bits,
    returns: Bits,
    traps: Bits,
    /// Data addresses that code computes, as offsets from the image's base, sorted.
    bases: Vec<u32>,
    /// Entries of functions that look at their return address, sorted.
    observers: Vec<LinkAddr>,
    /// Entries of functions that restartable sequences name, sorted.
    rseq: Vec<LinkAddr>,
    base: LinkAddr,
}

/// How many addresses each set has, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetCounts {
    /// Targets of direct branches and calls.
    pub branch: usize,
    /// Text addresses in data or computed by other functions.
    pub observed: usize,
    /// Other possible targets.
    pub soft: usize,
    /// Possible jump table entries.
    pub tables: usize,
    /// Return addresses.
    pub returns: usize,
    /// Addresses after system calls and software interrupts.
    pub traps: usize,
    /// Functions that look at their return address, or let a callee do so.
    pub observers: usize,
    /// Functions named by restartable sequences.
    pub rseq: usize,
}

impl TargetIndex {
    /// Reads all of the module's text. The result does not depend on the number of threads.
    #[must_use]
    pub fn build(image: &Image, functions: &Functions) -> Self {
        let layout = Layout::of(image);
        let new = || Filling::new(&layout);
        let sets =
            scan::Sets { branch: new(), observed: new(), soft: new(), tables: new(), returns: new(), traps: new() };
        let pieces = pieces(&layout, functions);
        let found: Vec<(Option<u32>, scan::Found)> = pieces
            .par_iter()
            .with_min_len(64)
            .map(|(range, owner)| {
                let function = owner.map(|i| &functions.all()[i as usize]);
                let mut found = scan::scan(image, &layout, &sets, range.clone(), function);
                if !found.indirect {
                    found.labels = Vec::new();
                }
                (*owner, found)
            })
            .collect();

        let mut bases: Vec<u32> = found.iter().flat_map(|f| &f.1.bases).filter_map(|&b| image.offset_of(b)).collect();
        bases.par_sort_unstable();
        bases.dedup();
        found.par_iter().filter(|f| f.1.indirect).for_each(|(owner, found)| {
            if let Some(f) = owner.map(|i| &functions.all()[i as usize]) {
                possible_tables(image, &layout, &sets.tables, &bases, f, found);
            }
        });

        let mut observers = refuse::return_address_readers(image, functions);
        let passing = found.iter().filter(|f| f.1.passes_caller).filter_map(|f| f.0);
        observers.extend(passing.map(|i| functions.all()[i as usize].start));
        observers.extend(refuse::observers_by_name(image));
        observers.sort_unstable();
        observers.dedup();
        drop(found);

        for p in image.code_pointers() {
            sets.observed.set(&layout, p.target);
        }
        if image.kind().is_fixed() {
            pointers_in_data(image, &layout, &sets);
        }
        for at in image.exported() {
            sets.soft.set(&layout, at);
        }
        let everything = LinkAddr(0)..LinkAddr(u64::MAX);
        for at in functions.landing_pads_in(everything) {
            sets.soft.set(&layout, at);
        }
        let rseq = refuse::rseq_functions(image, functions);
        Self {
            branch: sets.branch.done(),
            observed: sets.observed.done(),
            soft: sets.soft.done(),
            tables: sets.tables.done(),
            returns: sets.returns.done(),
            traps: sets.traps.done(),
            layout,
            bases,
            observers,
            rseq,
            base: image.base(),
        }
    }

    /// Whether a direct or indirect branch or call may arrive at this address.
    #[must_use]
    pub fn is_branch_target(&self, at: LinkAddr) -> bool {
        [&self.branch, &self.observed, &self.soft, &self.tables].iter().any(|s| s.has(&self.layout, at))
    }

    /// Whether a `ret` may arrive at this address: the instruction before it is a call.
    #[must_use]
    pub fn is_return_point(&self, at: LinkAddr) -> bool {
        self.returns.has(&self.layout, at)
    }

    /// Whether the instruction before this address enters the kernel (`syscall`, `int`), which resumes here.
    #[must_use]
    pub fn is_trap_point(&self, at: LinkAddr) -> bool {
        self.traps.has(&self.layout, at)
    }

    /// Whether data hold this text address, or a function that does not hold it computes it.
    #[must_use]
    pub fn is_observed(&self, at: LinkAddr) -> bool {
        self.observed.has(&self.layout, at)
    }

    /// Addresses in a function, after its first byte, at which an indirect jump may arrive: those that are known
    /// elsewhere, those that it computes itself, exported ones, landing pads. Rising, each once.
    #[must_use]
    pub fn labels_in(&self, f: &Function) -> Vec<LinkAddr> {
        let sets = [&self.observed, &self.soft];
        let mut all: Vec<_> = sets.iter().flat_map(|s| s.within(&self.layout, f.start.plus(1), f.end())).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Addresses in a function, after its first byte, that any possible jump table names. Rising.
    #[must_use]
    pub fn table_entries_in(&self, f: &Function) -> Vec<LinkAddr> {
        self.tables.within(&self.layout, f.start.plus(1), f.end()).collect()
    }

    /// The lowest data address above this one that code computes: where a table must have ended.
    #[must_use]
    pub fn next_base(&self, after: LinkAddr) -> Option<LinkAddr> {
        let offset = after.0.checked_sub(self.base.0)?;
        let i = self.bases.partition_point(|&b| u64::from(b) <= offset);
        self.bases.get(i).map(|&b| self.base.plus(u64::from(b)))
    }

    /// Whether the function that starts here looks at its return address, or jumps to one that does: its callers' calls
    /// must come from the original.
    #[must_use]
    pub fn observes_caller(&self, entry: LinkAddr) -> bool {
        self.observers.binary_search(&entry).is_ok()
    }

    /// Whether a restartable sequence names the function that starts here.
    #[must_use]
    pub fn is_rseq(&self, entry: LinkAddr) -> bool {
        self.rseq.binary_search(&entry).is_ok()
    }

    /// The names of the sets that hold this address, for people.
    #[must_use]
    pub fn kinds(&self, at: LinkAddr) -> String {
        let sets = [
            ("branch", &self.branch),
            ("observed", &self.observed),
            ("soft", &self.soft),
            ("table", &self.tables),
            ("return", &self.returns),
            ("trap", &self.traps),
        ];
        let names: Vec<&str> = sets.iter().filter(|s| s.1.has(&self.layout, at)).map(|s| s.0).collect();
        names.join(", ")
    }

    /// How many addresses each set has.
    #[must_use]
    pub fn counts(&self) -> TargetCounts {
        TargetCounts {
            branch: self.branch.count(),
            observed: self.observed.count(),
            soft: self.soft.count(),
            tables: self.tables.count(),
            returns: self.returns.count(),
            traps: self.traps.count(),
            observers: self.observers.len(),
            rseq: self.rseq.len(),
        }
    }
}

/// All text, cut into functions and what lies between them.
fn pieces(layout: &Layout, functions: &Functions) -> Vec<(Range<LinkAddr>, Option<u32>)> {
    let mut pieces = Vec::with_capacity(functions.len() * 2);
    for (i, f) in functions.all().iter().enumerate() {
        pieces.push((f.start..f.end(), Some(i as u32)));
    }
    for (start, end) in layout.ranges() {
        let mut at = start;
        let first = functions.all().partition_point(|f| f.end() <= start);
        for f in functions.all()[first..].iter().take_while(|f| f.start < end) {
            if at < f.start {
                pieces.push((at..f.start, None));
            }
            at = at.max(f.end());
        }
        if at < end {
            pieces.push((at..end, None));
        }
    }
    pieces
}

/// Marks what every 4-byte table at an address that this function computes could name. Up to the next such address of any
/// function, wherever it lands in the text (a table may name the function's cold part); further on, in the function only.
fn possible_tables(image: &Image, layout: &Layout, tables: &Filling, bases: &[u32], f: &Function, found: &scan::Found) {
    let mut mine = found.bases.clone();
    mine.sort_unstable();
    mine.dedup();
    // Tables of distances between labels have a label as their base; usually the table itself is the base.
    let mut labels = found.labels.clone();
    labels.sort_unstable();
    labels.dedup();
    for table in mine {
        let (Some(bytes), Some(offset)) = (image.bytes_from(table), image.offset_of(table)) else { continue };
        let next = bases.partition_point(|&b| b <= offset);
        let limit = |i: usize| bases.get(i).map_or(usize::MAX, |&b| (b - offset) as usize);
        let (own, far) = (limit(next), limit(next + TABLE_OVERRUN));
        let entries = bytes[..bytes.len().min(far)].chunks_exact(4).take(MAX_TABLE);
        let entries = entries.map(|e| i64::from(i32::from_le_bytes([e[0], e[1], e[2], e[3]])));
        for (i, distance) in entries.clone().enumerate() {
            let target = table.offset(distance);
            if layout.bit(target).is_none() {
                break;
            }
            if i * 4 < own || f.contains(target) {
                tables.set(layout, target);
            }
        }
        for &label in &labels {
            for target in entries.clone().map(|d| label.offset(d)).take_while(|&t| f.contains(t)) {
                tables.set(layout, target);
            }
        }
    }
}

/// How many text addresses in a row make a jump table in read-only data.
const ROW: usize = 3;

/// A module at a fixed address has no relocations left: any aligned 8 bytes that equal a text address may be one.
///
/// Rows of them in read-only data are `switch` tables (or arrays of functions); to take their targets for labels that
/// somebody compares with the program counter would give up every function whose `switch` reaches into its cold part.
fn pointers_in_data(image: &Image, layout: &Layout, sets: &scan::Sets) {
    for s in image.segments() {
        let Some(bytes) = image.bytes(s.address, s.file_size as usize) else { continue };
        let skip = (s.address.0.wrapping_neg() & 7) as usize;
        let mut row: Vec<LinkAddr> = Vec::new();
        let flush = |row: &mut Vec<LinkAddr>| {
            let set = if row.len() >= ROW && !s.writable { &sets.soft } else { &sets.observed };
            row.drain(..).for_each(|a| set.set(layout, a));
        };
        for (i, word) in bytes.get(skip..).unwrap_or(&[]).chunks_exact(8).enumerate() {
            let value = LinkAddr(u64::from_le_bytes(word.try_into().expect("8 bytes")));
            if layout.bit(value).is_some() && layout.bit(s.address.plus((skip + i * 8) as u64)).is_none() {
                row.push(value);
            } else {
                flush(&mut row);
            }
        }
        flush(&mut row);
    }
}
