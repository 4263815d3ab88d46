//! The checker of unwind data: proves a section against the original's before it is installed, in release builds too.
//!
//! It trusts gimli, the walk that proves copies ([`crate::check::pairs`]), and what the original file says. The claim:
//! *an unwinder that finds a frame in a copy does with it what it would do at the same place of the original*. For every
//! instruction of every copied block:
//!
//! - the section has an entry for it if, and only if, the original has;
//! - the rules for the frame, all registers and the argument size are equal at its first byte and at its last, as are the
//!   signal mark and the personality;
//! - the exception table leads to the same landing pad with the same handlers, or to none, at the instruction's first
//!   byte (a signal's frame) and at its last (a call's).
//!
//! For the jumps that only a copy has, the rules must be those of the instruction before them or of the place behind it.

use super::UnwindSection;
use super::program::RETURN_ADDRESS;
use super::rows::Rows;
use super::table::{self, Outcome, Ranges, Source};
use crate::check::{Originals, pairs};
use crate::lower::{CopiedBlock, Emission};
use dyni_analyzer::functions::{Function, Functions};
use dyni_analyzer::image::Image;
use dyni_schema::{CacheAddr, LinkAddr};
use gimli::{
    BaseAddresses, CieOrFde, EhFrame, EndianSlice, FrameDescriptionEntry, LittleEndian, Pointer, UnwindContext,
    UnwindSection as _,
};
use iced_x86::{Decoder, DecoderOptions};
use rayon::prelude::*;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

/// Unwind data that say something else of a copy than of its original. This is a bug in dyni: nothing is installed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the unwind data of the copy at cache {copy} do not match those of the original at {original}: {what}")]
pub struct UnwindMismatch {
    /// Where in the original.
    pub original: LinkAddr,
    /// Where in the cache.
    pub copy: CacheAddr,
    /// What is wrong.
    pub what: &'static str,
}

type Slice<'a> = EndianSlice<'a, LittleEndian>;
type Fde<'a> = FrameDescriptionEntry<Slice<'a>>;

/// The section under test.
struct Made<'a> {
    bytes: &'a [u8],
    at: LinkAddr,
    section: EhFrame<Slice<'a>>,
    bases: BaseAddresses,
    /// By first byte, as a distance from the cache.
    entries: BTreeMap<u64, Fde<'a>>,
}

impl Source for Made<'_> {
    fn from(&self, at: u64) -> Option<&[u8]> {
        self.bytes.get(usize::try_from(LinkAddr(at).distance(self.at)).ok()?..)
    }
}

impl Source for Image {
    fn from(&self, at: u64) -> Option<&[u8]> {
        self.bytes_from(LinkAddr(at))
    }
}

/// What an entry says, by address.
struct View {
    rows: Rows,
    ranges: Option<Ranges>,
    personality: Option<Pointer>,
    is_signal: bool,
}

/// Checks that `section`, which is to lie at link address `at`, says of every copied block what the module says of its
/// original. `cache` is the link address of the cache.
///
/// # Errors
/// A mismatch, the first by original function.
pub fn check(
    image: &Image,
    functions: &Functions,
    emission: &Emission,
    originals: &dyn Originals,
    section: &UnwindSection,
    cache: LinkAddr,
    at: LinkAddr,
) -> Result<(), UnwindMismatch> {
    let made = Made::read(section, cache, at)?;
    made.covers_blocks_only(emission)?;
    let mut by_function: BTreeMap<Option<usize>, Vec<&CopiedBlock>> = BTreeMap::new();
    for block in &emission.blocks {
        by_function.entry(functions.index_at(block.original)).or_default().push(block);
    }
    let by_function: Vec<_> = by_function.into_iter().collect();
    let checked: Vec<_> = by_function
        .par_iter()
        .map(|(index, blocks)| {
            let function = index.map(|i| &functions.all()[i]);
            of_function(&made, image, functions, function, blocks, emission, originals, cache)
        })
        .collect();
    checked.into_iter().collect()
}

impl<'a> Made<'a> {
    fn read(made: &'a UnwindSection, cache: LinkAddr, at: LinkAddr) -> Result<Self, UnwindMismatch> {
        let wrong = |what| UnwindMismatch { original: LinkAddr(0), copy: CacheAddr(0), what };
        let size = usize::try_from(made.frames_size).unwrap_or(usize::MAX);
        let frames = made.bytes.get(..size).ok_or_else(|| wrong("the section is cut off"))?;
        if !frames.ends_with(&[0; 4]) || !at.0.is_multiple_of(8) {
            return Err(wrong("the section has no end mark, or a crooked start"));
        }
        let mut section = EhFrame::new(frames, LittleEndian);
        section.set_address_size(8);
        let bases = BaseAddresses::default().set_eh_frame(at.0);
        let mut found = BTreeMap::new();
        let mut all = section.entries(&bases);
        let mut end = 0;
        while let Some(entry) = all.next().map_err(|_| wrong("an entry can't be read"))? {
            let (offset, len) = match entry {
                CieOrFde::Cie(cie) => (cie.offset(), cie.entry_len()),
                CieOrFde::Fde(partial) => {
                    let fde = partial.parse(|s, b, o| s.cie_from_offset(b, o));
                    let fde = fde.map_err(|_| wrong("an entry can't be read"))?;
                    let place = (fde.offset(), fde.entry_len());
                    let begin = LinkAddr(fde.initial_address()).distance(cache) as u64;
                    if found.insert(begin, fde).is_some() {
                        return Err(wrong("two entries begin at one place"));
                    }
                    place
                }
            };
            end = offset + 4 + len;
        }
        // An end mark in the middle would hide what is behind it.
        if end + 4 != size || found.len() != made.entries {
            return Err(wrong("not all entries are found"));
        }
        let overlap = found.iter().zip(found.keys().skip(1)).any(|((start, fde), next)| fde.len() > next - start);
        if overlap {
            return Err(wrong("two entries overlap"));
        }
        Ok(Self { bytes: &made.bytes, at, section, bases, entries: found })
    }

    /// Every entry begins where a block does and ends where one does.
    fn covers_blocks_only(&self, emission: &Emission) -> Result<(), UnwindMismatch> {
        let starts: BTreeSet<u64> = emission.blocks.iter().map(|b| b.copy.0).collect();
        let ends: BTreeSet<u64> = emission.blocks.iter().map(|b| b.copy.0 + u64::from(b.copy_size)).collect();
        match self.entries.iter().find(|(s, fde)| !starts.contains(s) || !ends.contains(&s.wrapping_add(fde.len()))) {
            Some((&start, _)) => Err(UnwindMismatch {
                original: LinkAddr(0),
                copy: CacheAddr(start),
                what: "an entry is for something that is no copy",
            }),
            None => Ok(()),
        }
    }

    /// The entry for a place in the cache.
    fn entry(&self, copy: u64) -> Option<(u64, &Fde<'a>)> {
        let (start, fde) = self.entries.range(..=copy).next_back()?;
        (copy - start < fde.len()).then_some((*start, fde))
    }
}

fn view<'a>(
    section: &EhFrame<Slice<'a>>,
    bases: &BaseAddresses,
    fde: &Fde<'a>,
    tables: &dyn Source,
    context: &mut UnwindContext<usize>,
) -> Option<View> {
    let rows = Rows::read(section, bases, fde, context).ok()?;
    // A null pointer that is counted from its own place comes as that place.
    let begin = bases.eh_frame.section?.wrapping_add(fde.offset() as u64);
    let null = |p: &u64| *p == 0 || p.wrapping_sub(begin) < fde.entry_len() as u64 + 12;
    let ranges = match fde.lsda() {
        Some(Pointer::Direct(at)) if !null(&at) => Some(table::read(tables, at, fde.initial_address())?),
        Some(Pointer::Indirect(_)) => return None,
        _ => None,
    };
    if ranges.as_ref().is_some_and(|r| !table::is_sorted(r)) {
        return None;
    }
    Some(View { rows, ranges, personality: fde.personality(), is_signal: fde.is_signal_trampoline() })
}

impl View {
    /// The outer `None`: there is no table, which is not the same as a table that says nothing.
    fn outcome(&self, at: u64) -> Option<Option<&Outcome>> {
        self.ranges.as_ref().map(|ranges| table::look_up(ranges, at))
    }
}

#[expect(clippy::too_many_arguments, reason = "called once; a struct for it would be read once")]
fn of_function(
    made: &Made<'_>,
    image: &Image,
    functions: &Functions,
    function: Option<&Function>,
    blocks: &[&CopiedBlock],
    emission: &Emission,
    originals: &dyn Originals,
    cache: LinkAddr,
) -> Result<(), UnwindMismatch> {
    let start = function.map_or(LinkAddr(0), |f| f.start);
    let wrong = |what| UnwindMismatch { original: start, copy: blocks[0].copy, what };
    let original = function.and_then(|f| functions.fde(image, f));
    let Some(fde) = original else {
        let has_entry = blocks.iter().any(|b| b.copy_size > 0 && made.entry(b.copy.0).is_some());
        return if has_entry { Err(wrong("the original has no unwind data")) } else { Ok(()) };
    };
    let mut context = UnwindContext::new();
    let (section, bases) = functions.eh_frame(image).ok_or_else(|| wrong("the original can't be read"))?;
    let from = view(&section, &bases, &fde, image, &mut context).ok_or_else(|| wrong("the original can't be read"))?;
    let mut views: BTreeMap<u64, View> = BTreeMap::new();
    for block in blocks {
        if block.copy_size == 0 {
            continue;
        }
        let fault = |what| UnwindMismatch { original: block.original, copy: block.copy, what };
        let (begin, entry) = made.entry(block.copy.0).ok_or_else(|| fault("there is no entry"))?;
        if block.copy.0 + u64::from(block.copy_size) > begin + entry.len() {
            return Err(fault("the entry ends within the block"));
        }
        let to = match views.entry(begin) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let view = view(&made.section, &made.bases, entry, made, &mut context);
                new.insert(view.ok_or_else(|| fault("the entry can't be read"))?)
            }
        };
        if to.personality != from.personality || to.is_signal != from.is_signal {
            return Err(fault("the personality or the signal mark differs"));
        }
        if entry.cie().return_address_register().0 != RETURN_ADDRESS {
            return Err(fault("the return address is elsewhere"));
        }
        of_block(&from, to, block, emission, originals, cache)?;
    }
    Ok(())
}

fn of_block(
    from: &View,
    to: &View,
    block: &CopiedBlock,
    emission: &Emission,
    originals: &dyn Originals,
    cache: LinkAddr,
) -> Result<(), UnwindMismatch> {
    let end = block.copy.0 + u64::from(block.copy_size);
    let after = block.original.plus(u64::from(block.size));
    let fault = |original, copy, what| UnwindMismatch { original, copy: CacheAddr(copy), what };
    let pairs = pairs(&emission.code, cache, &emission.blocks, block, emission.into(), originals)
        .map_err(|e| UnwindMismatch { original: e.original, copy: e.copy, what: e.what })?;
    let code = emission.code.get(block.copy.0 as usize..end as usize);
    let code = code.ok_or_else(|| fault(block.original, block.copy.0, "the copy is cut off"))?;
    let mut decoder = Decoder::with_ip(64, code, block.copy.0, DecoderOptions::NONE);
    let mut index = 0;
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let at = instruction.ip();
        let first = cache.plus(at);
        let last = first.plus(instruction.len() as u64 - 1);
        let row = to.rows.at(first);
        // A caller's frame is looked up by the last byte of its call.
        if row != to.rows.at(last) {
            return Err(fault(block.original, at, "the rules change within an instruction"));
        }
        // Of several that share a place, all but the last are no-operations that were left out.
        while pairs.get(index + 1).is_some_and(|next| next.copy.0 <= at) {
            index += 1;
        }
        let original = pairs[index].original;
        let next = pairs.get(index + 1).map_or(after, |next| next.original);
        // What raises a counter neither throws nor calls.
        if at < pairs[index].instruction.0 {
            if row.is_none() || row != from.rows.at(original) {
                return Err(fault(original, at, "the rules at a counter differ"));
            }
            continue;
        }
        if pairs[index].instruction.0 != at {
            let is_right = row.is_some() && (row == from.rows.at(original) || row == from.rows.at(after));
            if !is_right || index + 1 != pairs.len() {
                return Err(fault(original, at, "the rules at a jump differ"));
            }
            continue;
        }
        if row.is_none() || row != from.rows.at(original) {
            return Err(fault(original, at, "the rules differ"));
        }
        let same = |original: LinkAddr, copy: LinkAddr| from.outcome(original.0) == to.outcome(copy.0);
        if !same(original, first) || !same(next.offset(-1), last) {
            return Err(fault(original, at, "the exception table differs"));
        }
    }
    Ok(())
}
