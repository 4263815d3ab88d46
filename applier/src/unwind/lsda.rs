//! Exception tables (language-specific data areas): what a personality routine is told of a function.
//!
//! The layout is GCC's, which the Itanium C++ ABI leaves to each vendor and which all languages on Linux share: a header
//! with the base of the landing pads, a table of call sites (a range of code; its landing pad, 0 for none; its first
//! action, 0 for a cleanup), a table of actions (chains of a filter and the distance to the next), and around one
//! address the type table (backwards, filter 1 first) and the lists of exception specifications (forwards, negative
//! filters). **Code in no call site's range must not throw**: the program ends there (`noexcept`).
//!
//! In a copy the ranges are others and may be more, as blocks have moved; which call has which entry, or none, stays.
//! Landing pads, actions and types stay what they are. The base of the landing pads is stated, as they are not in the
//! copy: one byte below the lowest, for a distance of 0 would mean that there is none.

use super::UnwindRefusal;
use super::origin::Origin;
use super::program::{Bytes, uleb};
use dyni_analyzer::functions::Function;
use dyni_analyzer::image::Image;
use dyni_schema::LinkAddr;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The most bytes that one function's action table, and its exception specifications, may take.
const MAX_TABLE: usize = 1 << 16;
/// The most types that one function may name.
const MAX_TYPES: u64 = 1 << 12;

// DWARF for exception handling (LSB Core 3.0, 10.5.1): formats, the application, the flag.
const OMIT: u8 = 0xff;
const ABSPTR: u8 = 0x00;
const ULEB128: u8 = 0x01;
const UDATA2: u8 = 0x02;
const UDATA4: u8 = 0x03;
const UDATA8: u8 = 0x04;
const SDATA4: u8 = 0x0b;
const SDATA8: u8 = 0x0c;
const PCREL: u8 = 0x10;
const APPLICATION: u8 = 0x70;
const INDIRECT: u8 = 0x80;

/// What happens at a throw from some range of code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Site {
    /// Where the unwinder enters the function; `None`: it passes by.
    pad: Option<LinkAddr>,
    /// The first action, as an offset into the table plus 1; 0: none.
    action: u64,
}

/// A type that a handler names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    /// Every exception.
    Any,
    /// Its `type_info`, or where that's address is: written as a distance.
    Near(LinkAddr),
    /// The same as a number, which is right at a fixed address only.
    Fixed(u64),
}

/// Everything of an exception table that does not depend on where the code lies.
#[derive(Debug, PartialEq, Eq)]
struct Shared {
    actions: Vec<u8>,
    /// How types are written; [`OMIT`] if there are none.
    encoding: u8,
    types: Vec<Type>,
    specifications: Vec<u8>,
}

impl Default for Shared {
    fn default() -> Self {
        Self { actions: Vec::new(), encoding: OMIT, types: Vec::new(), specifications: Vec::new() }
    }
}

/// A function's own exception table.
#[derive(Debug)]
pub(super) struct Table {
    /// Where each range begins and ends, rising, none overlapping another.
    sites: Vec<(LinkAddr, LinkAddr, Site)>,
    shared: Arc<Shared>,
}

/// The exception table of a stretch of copied code.
#[derive(Debug)]
pub(super) struct Fragment {
    /// Start, counted from the start of the stretch, and length, both in bytes.
    sites: Vec<(u64, u64, Site)>,
    shared: Arc<Shared>,
}

/// A reader that ends where its bytes do.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    bytes: &'a [u8],
    at: LinkAddr,
}

impl<'a> Cursor<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.bytes.split_first_chunk::<N>()?;
        self.bytes = rest;
        self.at = self.at.plus(N as u64);
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[b]| b)
    }

    /// A number of at most 63 bits in any number of bytes up to 10.
    fn uleb(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let b = self.u8()?;
            let bits = u64::from(b & 0x7f);
            if shift >= 63 && bits != 0 {
                return None;
            }
            value |= bits.checked_shl(shift).unwrap_or(0);
            if b & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn sleb(&mut self) -> Option<i64> {
        let mut value = 0i64;
        for shift in (0..63).step_by(7) {
            let b = self.u8()?;
            value |= i64::from(b & 0x7f) << shift;
            if b & 0x80 == 0 {
                let unused = 64 - 7 - shift;
                return Some(if unused > 0 { value << unused >> unused } else { value });
            }
        }
        None
    }

    /// An unsigned distance, as call sites have them.
    fn distance(&mut self, encoding: u8) -> Option<u64> {
        match encoding {
            ULEB128 => self.uleb(),
            UDATA2 => Some(u64::from(u16::from_le_bytes(self.take()?))),
            UDATA4 => Some(u64::from(u32::from_le_bytes(self.take()?))),
            UDATA8 => Some(u64::from_le_bytes(self.take()?)),
            _ => None,
        }
    }

    /// An address; `Some(None)` for a null one. `fixed`: numbers are addresses, as the module has no other place.
    fn address(&mut self, encoding: u8, fixed: bool) -> Option<Option<LinkAddr>> {
        let at = self.at;
        let value = match encoding & 0x0f {
            UDATA4 => u64::from(u32::from_le_bytes(self.take()?)),
            SDATA4 => i64::from(i32::from_le_bytes(self.take()?)) as u64,
            ABSPTR | UDATA8 | SDATA8 => u64::from_le_bytes(self.take()?),
            _ => return None,
        };
        match encoding & APPLICATION {
            _ if value == 0 => Some(None),
            PCREL => Some(Some(at.plus(value))),
            0 if fixed => Some(Some(LinkAddr(value))),
            _ => None,
        }
    }

    fn skip(&self, bytes: u64) -> Option<Self> {
        let rest = self.bytes.get(usize::try_from(bytes).ok()?..)?;
        Some(Self { bytes: rest, at: self.at.plus(bytes) })
    }
}

fn width(encoding: u8) -> Option<u64> {
    match encoding & 0x0f {
        UDATA4 | SDATA4 => Some(4),
        ABSPTR | UDATA8 | SDATA8 => Some(8),
        _ => None,
    }
}

impl Table {
    /// Reads the table at `at`, which is that of `function`. `None` for any that is not understood to its last byte.
    pub fn read(image: &Image, at: LinkAddr, function: &Function) -> Option<Self> {
        let fixed = image.kind().is_fixed();
        let mut header = Cursor { bytes: image.bytes_from(at)?, at };
        let base = match header.u8()? {
            OMIT => function.start,
            encoding if encoding & INDIRECT == 0 => header.address(encoding, fixed)??,
            _ => return None,
        };
        let types_encoding = header.u8()?;
        let types_at = match types_encoding {
            OMIT => None,
            _ => {
                let distance = header.uleb()?;
                Some(header.skip(distance)?)
            }
        };
        let site_encoding = header.u8()?;
        let length = header.uleb()?;
        let actions = header.skip(length)?;
        let mut rest = header.bytes.get(..usize::try_from(length).ok()?)?;
        let mut sites: Vec<(LinkAddr, LinkAddr, Site)> = Vec::new();
        while !rest.is_empty() {
            let mut c = Cursor { bytes: rest, at };
            let (start, len) = (c.distance(site_encoding)?, c.distance(site_encoding)?);
            let (pad, action) = (c.distance(site_encoding)?, c.uleb()?);
            rest = c.bytes;
            let end = start.checked_add(len).filter(|&end| end <= u64::from(function.size))?;
            let (start, end) = (function.start.plus(start), function.start.plus(end));
            if sites.last().is_some_and(|last| last.1 > start) {
                return None;
            }
            let pad = (pad != 0).then(|| base.plus(pad));
            if pad.is_some_and(|pad| !image.is_executable(pad)) {
                return None;
            }
            sites.push((start, end, Site { pad, action }));
        }
        // Without a landing pad there is nothing to do, whatever the action says.
        let firsts = sites.iter().filter(|s| s.2.pad.is_some()).map(|s| s.2.action);
        let (actions, filters) = read_actions(actions, firsts)?;
        let shared = read_types(types_encoding, types_at, fixed, image, actions, &filters)?;
        Some(Self { sites, shared: Arc::new(shared) })
    }

    fn site(&self, at: LinkAddr) -> Option<Site> {
        let i = self.sites.partition_point(|s| s.0 <= at).checked_sub(1)?;
        // Of several that begin here all but the last are empty.
        (at < self.sites[i].1).then_some(self.sites[i].2)
    }

    /// The table for a stretch of `len` bytes that starts at offset `start` of the cache and has these origins.
    pub fn fragment(&self, origins: &[Origin], start: u64, len: u64) -> Result<Fragment, UnwindRefusal> {
        let mut sites: Vec<(u64, u64, Site)> = Vec::new();
        for (i, origin) in origins.iter().enumerate() {
            let end = origins.get(i + 1).map_or(start + len, |next| next.copy);
            let site = self.site(origin.original);
            // Unwinders look at an instruction's first byte or, behind a call, at its last.
            if site != self.site(origin.original.plus(u64::from(origin.len) - 1)) {
                return Err(UnwindRefusal::ExceptionTable);
            }
            let Some(site) = site else { continue };
            let from = origin.copy - start;
            match sites.last_mut() {
                Some(last) if last.2 == site && last.0 + last.1 == from => last.1 = end - start - last.0,
                _ => sites.push((from, end - origin.copy, site)),
            }
        }
        // Without an action there are no types; most cold parts have none.
        let has_actions = sites.iter().any(|s| s.2.pad.is_some() && s.2.action != 0);
        let shared = if has_actions { Arc::clone(&self.shared) } else { Arc::default() };
        Ok(Fragment { sites, shared })
    }
}

/// The bytes of the action table as far as any chain reaches, and every filter in it.
fn read_actions(table: Cursor<'_>, firsts: impl Iterator<Item = u64>) -> Option<(Vec<u8>, BTreeSet<i64>)> {
    let mut filters = BTreeSet::new();
    let mut known = BTreeSet::new();
    let mut end = 0;
    for first in firsts.filter(|&first| first != 0) {
        let mut at = usize::try_from(first - 1).ok()?;
        let mut chain = BTreeSet::new();
        // Chains share their tails; one that was walked before needs no other walk.
        while at < MAX_TABLE && !known.contains(&at) {
            if !chain.insert(at) {
                // A circle: no routine would come to its end.
                return None;
            }
            let mut c = Cursor { bytes: table.bytes.get(at..)?, at: table.at };
            let len = c.bytes.len();
            filters.insert(c.sleb()?);
            let field = at + len - c.bytes.len();
            let next = c.sleb()?;
            end = end.max(at + len - c.bytes.len());
            if next == 0 {
                break;
            }
            at = field.checked_add_signed(isize::try_from(next).ok()?)?;
        }
        if at >= MAX_TABLE {
            return None;
        }
        known.append(&mut chain);
    }
    Some((table.bytes.get(..end)?.to_vec(), filters))
}

/// The types and specifications that these filters name.
fn read_types(
    encoding: u8,
    base: Option<Cursor<'_>>,
    fixed: bool,
    image: &Image,
    actions: Vec<u8>,
    filters: &BTreeSet<i64>,
) -> Option<Shared> {
    let mut highest = filters.last().copied().unwrap_or(0).max(0) as u64;
    let mut specifications = Vec::new();
    let lowest = filters.first().copied().unwrap_or(0);
    if highest == 0 && lowest >= 0 {
        return Some(Shared { actions, ..Shared::default() });
    }
    let base = base?;
    for filter in filters.iter().take_while(|f| **f < 0) {
        // The list for filter -1 begins at the very address, that for -2 one byte further on.
        let from = usize::try_from(filter.unsigned_abs() - 1).ok()?;
        let mut c = Cursor { bytes: base.bytes.get(from..)?, at: base.at };
        loop {
            match c.uleb()? {
                0 => break,
                index => highest = highest.max(index),
            }
        }
        let end = base.bytes.len() - c.bytes.len();
        if end > MAX_TABLE {
            return None;
        }
        if end > specifications.len() {
            specifications = base.bytes[..end].to_vec();
        }
    }
    if highest > MAX_TYPES {
        return None;
    }
    let width = width(encoding)?;
    // A number in a module without a fixed address would need a relocation, and an indirect one reads it at an address.
    if encoding & APPLICATION == 0 && !fixed {
        return None;
    }
    let mut types = Vec::new();
    for index in 1..=highest {
        let at = LinkAddr(base.at.0.checked_sub(index * width)?);
        let mut c = Cursor { bytes: image.bytes(at, width as usize)?, at };
        types.push(match c.address(encoding, fixed)? {
            None => Type::Any,
            Some(address) if !image.contains(address) => return None,
            Some(address) if encoding & APPLICATION == PCREL => Type::Near(address),
            Some(address) => Type::Fixed(address.0),
        });
    }
    Some(Shared { actions, encoding, types, specifications })
}

impl Fragment {
    /// Writes it at the end of `out`. Its length does not depend on where that is.
    pub fn write(&self, out: &mut Bytes) -> Result<(), ()> {
        let shared = &self.shared;
        let base = self.sites.iter().filter_map(|s| s.2.pad).min().map(|pad| pad.offset(-1));
        match base {
            Some(base) => {
                out.u8(PCREL | SDATA4);
                out.pcrel4(base)?;
            }
            None => out.u8(OMIT),
        }
        let mut sites = Vec::new();
        for &(start, len, site) in &self.sites {
            let pad = site.pad.zip(base).map_or(0, |(pad, base)| pad.distance(base) as u64);
            for number in [start, len, pad, if site.pad.is_some() { site.action } else { 0 }] {
                uleb(&mut sites, number);
            }
        }
        let mut length = Vec::new();
        uleb(&mut length, sites.len() as u64);
        out.u8(shared.encoding);
        if shared.encoding != OMIT {
            let types = shared.types.len() as u64 * width(shared.encoding).ok_or(())?;
            out.uleb(1 + (length.len() + sites.len() + shared.actions.len()) as u64 + types);
        }
        out.u8(ULEB128);
        out.bytes.extend(length);
        out.bytes.extend(sites);
        out.bytes.extend_from_slice(&shared.actions);
        for kind in shared.types.iter().rev() {
            let value = match *kind {
                Type::Any => 0,
                Type::Fixed(value) => value,
                Type::Near(address) => address.distance(out.here()) as u64,
            };
            match (width(shared.encoding), kind) {
                (Some(8), _) => out.u64(value),
                (_, Type::Near(address)) => out.pcrel4(*address)?,
                // The value was read from as many bytes.
                _ => out.u32(value as u32),
            }
        }
        out.bytes.extend_from_slice(&shared.specifications);
        Ok(())
    }
}
