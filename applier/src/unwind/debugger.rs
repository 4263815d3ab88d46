//! The rows of copies as a debugger reads them: a `.debug_frame` section (DWARF 5, 6.4.1), for a file of symbols.
//!
//! Nothing of it is in the process, and whether the process's unwinder knows the copies does not matter: it is made again,
//! at any time, from the copies, the block map and the unwind data of the module's file. A debugger only looks, so a
//! function that is not understood costs its own frames and no others; personality and exception tables are nothing to it.

use super::program::{self, Bytes};
use super::{Stretch, UnwindRefusal, frame, origin, stretches};
use crate::check::Originals;
use crate::lower::Emission;
use dyni_analyzer::functions::{Function, Functions};
use dyni_analyzer::image::Image;
use dyni_schema::LinkAddr;
use rayon::prelude::*;

/// What marks a common entry in this section (DWARF 5, 7.24).
const CIE_ID: u32 = u32::MAX;
/// What begins an augmentation that tells its own length, and the one mark that is used.
const ORDINARY: &[u8] = b"\0";
const SIGNAL: &[u8] = b"zS\0";

/// A `.debug_frame` section, to which the entries of one generation after the other are added.
#[derive(Debug)]
pub struct DebugFrame {
    out: Bytes,
    /// How many functions have entries.
    pub described: usize,
    /// How many functions have none, as what their file says of them is not understood.
    pub left_out: usize,
}

/// One stretch of copies: where it begins in the cache, its length, its call frame instructions, all in bytes.
type Entry = (u64, u64, Vec<u8>);

impl Default for DebugFrame {
    fn default() -> Self {
        let mut out = Bytes::at(LinkAddr(0));
        common_entry(&mut out, ORDINARY);
        common_entry(&mut out, SIGNAL);
        Self { out, described: 0, left_out: 0 }
    }
}

impl DebugFrame {
    /// Adds the copies of one generation, whose cache is at link address `cache` and runs with this load bias.
    pub fn add(
        &mut self,
        image: &Image,
        functions: &Functions,
        emission: &Emission,
        originals: &dyn Originals,
        cache: LinkAddr,
        bias: u64,
    ) {
        let made: Vec<_> = stretches(emission, functions)
            .into_par_iter()
            .map(|(index, stretches)| {
                let function = &functions.all()[index];
                entries(image, functions, emission, originals, cache, function, &stretches)
            })
            .collect();
        for of_function in made {
            match of_function {
                Ok((entries, is_signal)) => {
                    self.described += usize::from(!entries.is_empty());
                    for (start, len, program) in entries {
                        self.entry(cache.plus(start).run(bias).0, len, &program, is_signal);
                    }
                }
                Err(_) => self.left_out += 1,
            }
        }
    }

    /// The section.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.out.bytes
    }

    fn entry(&mut self, start: u64, len: u64, program: &[u8], is_signal: bool) {
        let out = &mut self.out;
        let at = out.bytes.len();
        out.u32(0);
        // Where the common entry is, in bytes from the section's start.
        out.u32(if is_signal { common_len(ORDINARY) } else { 0 });
        out.u64(start);
        out.u64(len);
        if is_signal {
            out.uleb(0);
        }
        out.bytes.extend_from_slice(program);
        out.end_entry(at);
    }
}

fn common_entry(out: &mut Bytes, augmentation: &[u8]) {
    let at = out.bytes.len();
    out.u32(0);
    out.u32(CIE_ID);
    out.u8(1);
    out.bytes.extend_from_slice(augmentation);
    out.uleb(1);
    out.sleb(program::DATA_ALIGN);
    out.u8(program::RETURN_ADDRESS as u8);
    if augmentation == SIGNAL {
        out.uleb(0);
    }
    out.bytes.extend(program::INITIAL);
    out.end_entry(at);
}

fn common_len(augmentation: &[u8]) -> u32 {
    let mut out = Bytes::at(LinkAddr(0));
    common_entry(&mut out, augmentation);
    out.bytes.len() as u32
}

/// The entries of one function's copies, none if it has no unwind data; whether they are of a signal's frame.
fn entries(
    image: &Image,
    functions: &Functions,
    emission: &Emission,
    originals: &dyn Originals,
    cache: LinkAddr,
    function: &Function,
    stretches: &[Stretch<'_>],
) -> Result<(Vec<Entry>, bool), UnwindRefusal> {
    let Some((rows, is_signal)) = frame::rows(image, functions, function)? else { return Ok((Vec::new(), false)) };
    let mut entries = Vec::new();
    for stretch in stretches.iter().filter(|s| s.len > 0) {
        let mut origins = Vec::new();
        for block in &stretch.blocks {
            origin::of(block, emission, originals, cache, function, &mut origins).ok_or(UnwindRefusal::Copy)?;
        }
        entries.push((stretch.start, stretch.len, program::of(&origins, stretch.start, &rows)?));
    }
    Ok((entries, is_signal))
}
