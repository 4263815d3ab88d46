//! Unwind data for copies, so that an exception can pass through them.
//!
//! An unwinder knows a frame by its return address. For one that lies in a code cache it needs what `.eh_frame` says of
//! the original: how to find the caller's registers at every instruction, whom to ask about exceptions (the personality
//! routine) and what to tell that one (the exception table, LSDA). All of it is made here from the original's, as one
//! `.eh_frame` section with the exception tables behind it. Nothing in it needs a relocation: every address is counted
//! from its own place, and the section lies at a fixed distance from the module and its cache.
//!
//! - `rows`: what the original says, instruction by instruction; `origin`: which bytes of a copy have the state of which
//!   place of the original; `program`: that as call frame instructions;
//! - `lsda`: the exception table, with the ranges of the copy. **Landing pads stay in the original**: the unwinder
//!   enters it there, with the state that the copy had;
//! - [`check`]: the result, read again and compared with the original instruction by instruction, in release builds too
//!   (invariant 6);
//! - [`unwinder`]: which unwinder the process has; [`register`]: telling it, by a call made in the process;
//! - [`debugger`]: the rows alone, for a debugger, at any later time.
//!
//! What is not understood in full is refused by function ([`examine`]): its copy would end the program at a throw.

mod check;
pub mod debugger;
mod frame;
mod lsda;
mod origin;
mod program;
pub mod register;
mod rows;
mod table;
pub mod unwinder;

use crate::check::Originals;
use crate::lower::{CopiedBlock, Emission};
use dyni_analyzer::functions::{Function, Functions};
use dyni_analyzer::image::Image;
use dyni_schema::LinkAddr;
use frame::{Frame, Personality};
use program::Bytes;
use rayon::prelude::*;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

pub use check::{UnwindMismatch, check};

/// Why a function's unwind data can't be made for its copy; shown to users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UnwindRefusal {
    /// Its frame description entry can't be read to the end, or is of a kind that no compiler makes for x86-64.
    Frame,
    /// A rule that a copy can't keep: it reads the instruction pointer, or has no encoding here.
    Rule,
    /// A personality routine whose exception tables are not known, or that can't be named without a relocation.
    Personality,
    /// Its exception table is not understood in full.
    ExceptionTable,
    /// Something that it refers to is more than 2 GB away from the new unwind data.
    OutOfReach,
    /// Its copy does not match it; the checker of copies says why.
    Copy,
}

impl UnwindRefusal {
    /// Every reason, for tables and documentation.
    pub const ALL: [Self; 6] =
        [Self::Frame, Self::Rule, Self::Personality, Self::ExceptionTable, Self::OutOfReach, Self::Copy];

    /// One line for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Frame => "has a frame description that can't be read",
            Self::Rule => "has an unwind rule that its copy can't keep",
            Self::Personality => "has a personality routine that is not known",
            Self::ExceptionTable => "has an exception table that is not understood",
            Self::OutOfReach => "refers to something more than 2 GB away from its unwind data",
            Self::Copy => "has a copy that does not match it",
        }
    }
}

/// The function for which no unwind data can be made, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the function at {function} {}", refusal.text())]
pub struct UnwindError {
    /// Its first byte.
    pub function: LinkAddr,
    /// Why.
    pub refusal: UnwindRefusal,
}

/// The unwind data of a code cache, not yet anywhere: `.eh_frame`, then the exception tables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnwindSection {
    /// All of it, for the link address that it was built for, which must be a multiple of 8.
    pub bytes: Vec<u8>,
    /// How many bytes, from the first, are `.eh_frame`, its end mark (four zero bytes) included.
    pub frames_size: u64,
    /// How many frame description entries it has. With none, there is nothing to register.
    pub entries: usize,
    /// How many exception tables.
    pub tables: usize,
}

/// Whether unwind data can be made for a function's copy.
///
/// # Errors
/// Why not.
pub fn examine(image: &Image, functions: &Functions, function: &Function) -> Result<(), UnwindRefusal> {
    frame::read(image, functions, function).map(drop)
}

/// Copied blocks of one function that lie one behind the other: what one frame description entry is for.
struct Stretch<'a> {
    /// Offset in the cache, bytes.
    start: u64,
    /// Length in bytes.
    len: u64,
    /// In layout order.
    blocks: Vec<&'a CopiedBlock>,
}

/// A stretch whose unwind data are made, but for the addresses in them.
struct Made {
    start: u64,
    len: u64,
    cie: Cie,
    program: Vec<u8>,
    table: Option<lsda::Fragment>,
    function: LinkAddr,
}

/// What entries can share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Cie {
    personality: Option<Personality>,
    has_table: bool,
    is_signal: bool,
}

/// The stretches of an emission by the function (index into [`Functions::all`]) that they were copied from, both
/// rising. Blocks that are no function's are not there: the original has no unwind data for them either.
fn stretches<'a>(emission: &'a Emission, functions: &Functions) -> Vec<(usize, Vec<Stretch<'a>>)> {
    let mut blocks: Vec<_> =
        emission.blocks.iter().filter_map(|b| Some((functions.index_at(b.original)?, b))).collect();
    blocks.sort_by_key(|(_, b)| (b.copy, b.copy_size));
    let mut found: HashMap<usize, Vec<Stretch<'a>>> = HashMap::new();
    let mut previous = None;
    for (function, block) in blocks {
        let of_function = found.entry(function).or_default();
        match of_function.last_mut() {
            Some(s) if previous == Some(function) && s.start + s.len == block.copy.0 => {
                s.len += u64::from(block.copy_size);
                s.blocks.push(block);
            }
            _ => {
                of_function.push(Stretch { start: block.copy.0, len: u64::from(block.copy_size), blocks: vec![block] })
            }
        }
        previous = Some(function);
    }
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_unstable_by_key(|(function, _)| *function);
    found
}

/// Makes the unwind data for a code cache at link address `cache`, to lie at link address `at` (a multiple of 8, within
/// 2 GB of the cache and the module).
///
/// # Errors
/// The first function, by address, for which it can't be done: leave it out and lower the others again. [`examine`]
/// tells beforehand, but for [`UnwindRefusal::OutOfReach`] and [`UnwindRefusal::Copy`].
pub fn build(
    image: &Image,
    functions: &Functions,
    emission: &Emission,
    originals: &dyn Originals,
    cache: LinkAddr,
    at: LinkAddr,
) -> Result<UnwindSection, UnwindError> {
    let made = stretches(emission, functions)
        .into_par_iter()
        .map(|(index, stretches)| {
            let function = &functions.all()[index];
            let fail = |refusal| UnwindError { function: function.start, refusal };
            let Some(frame) = frame::read(image, functions, function).map_err(fail)? else { return Ok(Vec::new()) };
            let stretches = stretches.into_iter().filter(|s| s.len > 0);
            stretches.map(|s| make(&frame, function, &s, emission, originals, cache).map_err(fail)).collect()
        })
        .collect::<Vec<Result<Vec<Made>, UnwindError>>>();
    let mut all = Vec::new();
    for made in made {
        all.extend(made?);
    }
    // By rising address, which unwinders sort them to anyway.
    all.sort_unstable_by_key(|m| m.start);
    assemble(&all, cache, at)
}

/// One stretch's call frame instructions and exception table.
fn make(
    frame: &Frame,
    function: &Function,
    stretch: &Stretch<'_>,
    emission: &Emission,
    originals: &dyn Originals,
    cache: LinkAddr,
) -> Result<Made, UnwindRefusal> {
    let mut origins = Vec::new();
    for block in &stretch.blocks {
        origin::of(block, emission, originals, cache, function, &mut origins).ok_or(UnwindRefusal::Copy)?;
    }
    let program = program::of(&origins, stretch.start, &frame.rows)?;
    let table = match &frame.table {
        Some(table) => Some(table.fragment(&origins, stretch.start, stretch.len)?),
        None => None,
    };
    let cie = Cie { personality: frame.personality, has_table: table.is_some(), is_signal: frame.is_signal };
    Ok(Made { start: stretch.start, len: stretch.len, cie, program, table, function: function.start })
}

/// How an address within reach is written in a frame entry: 4 signed bytes, counted from where they are.
const PCREL_SDATA4: u8 = 0x1b;
/// How a function's first byte is written: 8 bytes. With 4, libgcc ignores an entry whose address has 32 zero bits at
/// its end (it takes it for one that the linker dropped), and a cache may well begin at such an address.
const PCREL_SDATA8: u8 = 0x1c;
const INDIRECT: u8 = 0x80;

/// Lays out entries and tables, and fills in the addresses.
fn assemble(all: &[Made], cache: LinkAddr, at: LinkAddr) -> Result<UnwindSection, UnwindError> {
    // An entry's length does not depend on where it is, so all places are known before anything is written.
    let mut cies: HashMap<Cie, LinkAddr> = HashMap::new();
    let mut next = at;
    let mut places = Vec::with_capacity(all.len());
    for made in all {
        if let Entry::Vacant(new) = cies.entry(made.cie) {
            new.insert(next);
            next = next.plus(made.cie.len());
        }
        places.push(next);
        next = next.plus(made.len());
    }
    let frames_size = next.plus(4).distance(at) as u64;
    let mut tables = Bytes::at(at.plus(frames_size));
    let mut frames = Bytes::at(at);
    let mut written = 0;
    for (made, &place) in all.iter().zip(&places) {
        let fail = |()| UnwindError { function: made.function, refusal: UnwindRefusal::OutOfReach };
        let cie = cies[&made.cie];
        if frames.here() == cie {
            made.cie.write(&mut frames).map_err(fail)?;
        }
        debug_assert_eq!(frames.here(), place);
        let table = match &made.table {
            Some(table) => {
                let here = tables.here();
                table.write(&mut tables).map_err(fail)?;
                written += 1;
                Some(here)
            }
            None => None,
        };
        made.write(cie, cache.plus(made.start), table, &mut frames).map_err(fail)?;
    }
    frames.u32(0);
    debug_assert_eq!(frames.bytes.len() as u64, frames_size);
    let mut bytes = frames.bytes;
    bytes.extend(tables.bytes);
    Ok(UnwindSection { bytes, frames_size, entries: all.len(), tables: written })
}

impl Cie {
    fn write(&self, out: &mut Bytes) -> Result<(), ()> {
        let start = out.bytes.len();
        out.u32(0);
        out.u32(0);
        out.u8(1);
        out.u8(b'z');
        if self.personality.is_some() {
            out.u8(b'P');
        }
        if self.has_table {
            out.u8(b'L');
        }
        out.u8(b'R');
        if self.is_signal {
            // Behind 'R': libgcc's search for that one ends at a letter that it does not know there.
            out.u8(b'S');
        }
        out.u8(0);
        out.uleb(1);
        out.sleb(program::DATA_ALIGN);
        out.u8(program::RETURN_ADDRESS as u8);
        let personality = if self.personality.is_some() { 5 } else { 0 };
        out.uleb(personality + u64::from(self.has_table) + 1);
        if let Some(personality) = self.personality {
            out.u8(PCREL_SDATA4 | if personality.indirect { INDIRECT } else { 0 });
            out.pcrel4(personality.at)?;
        }
        if self.has_table {
            out.u8(PCREL_SDATA4);
        }
        out.u8(PCREL_SDATA8);
        out.bytes.extend(program::INITIAL);
        out.end_entry(start);
        Ok(())
    }

    fn len(&self) -> u64 {
        let near = self.personality.map(|p| Personality { at: LinkAddr(0), ..p });
        let mut out = Bytes::at(LinkAddr(0));
        Self { personality: near, ..*self }.write(&mut out).expect("zero is near zero");
        out.bytes.len() as u64
    }
}

impl Made {
    fn write(&self, cie: LinkAddr, begin: LinkAddr, table: Option<LinkAddr>, out: &mut Bytes) -> Result<(), ()> {
        let start = out.bytes.len();
        out.u32(0);
        // From this field back to the start of the common entry.
        let back = u32::try_from(out.here().distance(cie)).map_err(drop)?;
        out.u32(back);
        out.u64(begin.distance(out.here()) as u64);
        out.u64(self.len);
        match table {
            Some(table) => {
                out.uleb(4);
                out.pcrel4(table)?;
            }
            None => out.uleb(0),
        }
        out.bytes.extend_from_slice(&self.program);
        out.end_entry(start);
        Ok(())
    }

    fn len(&self) -> u64 {
        let fixed = 4 + 4 + 8 + 8 + 1 + if self.table.is_some() { 4 } else { 0 };
        (fixed + self.program.len() as u64).next_multiple_of(4)
    }
}
