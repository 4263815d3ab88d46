//! Landing pads: where the unwinder resumes a function when an exception passes through it.
//!
//! They are in the call-site table of the function's language-specific data area (LSDA), whose layout all Itanium-ABI
//! languages on Linux share (C++, Rust, Ada, D; Go and OCaml have none).

use super::Function;
use crate::image::Image;
use dyni_schema::LinkAddr;

/// A reader that ends at the end of the segment; `None` ends the parse.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: LinkAddr,
}

impl Cursor<'_> {
    fn u8(&mut self) -> Option<u8> {
        let (&b, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        self.at = self.at.plus(1);
        Some(b)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.bytes.split_first_chunk::<N>()?;
        self.bytes = rest;
        self.at = self.at.plus(N as u64);
        Some(*head)
    }

    fn uleb(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let b = self.u8()?;
            if shift < 64 {
                value |= u64::from(b & 0x7f) << shift;
            }
            shift += 7;
            if b & 0x80 == 0 {
                return Some(value);
            }
            if shift > 70 {
                return None;
            }
        }
    }

    /// A number in a `DW_EH_PE` encoding; only those that compilers use in call-site tables.
    fn encoded(&mut self, encoding: u8) -> Option<u64> {
        let at = self.at;
        let value = match encoding & 0x0f {
            0x01 => self.uleb()?,
            0x02 => u64::from(u16::from_le_bytes(self.take()?)),
            0x03 => u64::from(u32::from_le_bytes(self.take()?)),
            0x0b => i64::from(i32::from_le_bytes(self.take()?)) as u64,
            0x00 | 0x04 | 0x0c => u64::from_le_bytes(self.take()?),
            _ => return None,
        };
        match encoding & 0x70 {
            0x00 => Some(value),
            0x10 => Some(value.wrapping_add(at.0)),
            _ => None,
        }
    }
}

/// Calls `each` with every landing pad of the LSDA at `lsda`, which belongs to `f`. A table that can't be read ends early.
pub(super) fn pads(image: &Image, lsda: LinkAddr, f: &Function, mut each: impl FnMut(LinkAddr)) -> Option<()> {
    let mut c = Cursor { bytes: image.bytes_from(lsda)?, at: lsda };
    let encoding = c.u8()?;
    let start = if encoding == 0xff { f.start.0 } else { c.encoded(encoding)? };
    if c.u8()? != 0xff {
        c.uleb()?;
    }
    let encoding = c.u8()?;
    let length = usize::try_from(c.uleb()?).ok()?;
    c.bytes = c.bytes.get(..length)?;
    while !c.bytes.is_empty() {
        let (_start, _length, pad) = (c.encoded(encoding)?, c.encoded(encoding)?, c.encoded(encoding)?);
        c.uleb()?;
        if pad != 0 {
            each(LinkAddr(start.wrapping_add(pad)));
        }
    }
    Some(())
}
