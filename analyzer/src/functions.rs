//! Where functions begin and end, and what the unwinder is told about them.
//!
//! Distribution binaries have no symbols left, but every function that could be on the stack of an exception, a signal
//! or a debugger has a frame description entry (FDE) in `.eh_frame`, which is loaded and can't be stripped. One FDE is one
//! function here; a GCC `.cold` part is a function of its own. Only a file without any FDE falls back to its symbols.

mod hash;
mod landing;

use crate::image::{Image, demangle};
use dyni_schema::LinkAddr;
use gimli::{BaseAddresses, CieOrFde, EhFrame, EhFrameHdr, EndianSlice, LittleEndian, Pointer, UnwindSection};
use std::ops::Range;

pub use hash::function_hash;

/// How gimli reads here.
pub type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// One function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// The first byte.
    pub start: LinkAddr,
    /// Length in bytes; not zero.
    pub size: u32,
    /// Offset of its FDE in `.eh_frame` in bytes; `None` if the bounds come from a symbol.
    pub fde: Option<u32>,
    /// It has an exception table (call sites, landing pads).
    pub has_lsda: bool,
    /// The unwinder asks a personality routine about it.
    pub has_personality: bool,
}

impl Function {
    /// The address after the last byte.
    #[must_use]
    pub const fn end(&self) -> LinkAddr {
        self.start.plus(self.size as u64)
    }

    /// Whether it holds the byte at this address.
    #[must_use]
    pub fn contains(&self, at: LinkAddr) -> bool {
        at >= self.start && at < self.end()
    }

    /// Its demangled name, if the file has one for its first byte.
    #[must_use]
    pub fn name(&self, image: &Image) -> Option<String> {
        let (name, start) = image.symbol_at(self.start)?;
        (start == self.start).then(|| demangle(name))
    }
}

/// The functions of a module, by rising address, none overlapping another.
#[derive(Clone, Debug, Default)]
pub struct Functions {
    all: Vec<Function>,
    /// Offsets from the image's base, sorted.
    landing_pads: Vec<u32>,
    base: LinkAddr,
    eh_frame: Option<LinkAddr>,
    fdes: usize,
}

impl Functions {
    /// Finds the functions of a module. Damaged unwind data end the search where they are damaged: what was found until
    /// then is right, and functions that are not found are not optimised.
    #[must_use]
    pub fn find(image: &Image) -> Self {
        let mut found = Self { base: image.base(), ..Self::default() };
        let mut landing = Vec::new();
        if let Some((section, start)) = locate(image) {
            found.eh_frame = Some(start);
            found.read_fdes(image, &section, start, &mut landing);
        }
        if found.all.is_empty() {
            found.read_symbols(image);
        }
        found.all.sort_unstable_by_key(|f| (f.start, std::cmp::Reverse(f.size), f.fde));
        found.all.dedup_by_key(|f| f.start);
        for i in 1..found.all.len() {
            let limit = found.all[i].start.0 - found.all[i - 1].start.0;
            let previous = &mut found.all[i - 1];
            previous.size = previous.size.min(u32::try_from(limit).unwrap_or(u32::MAX));
        }
        found.all.shrink_to_fit();
        landing.sort_unstable();
        landing.dedup();
        found.landing_pads = landing;
        found
    }

    fn read_fdes(&mut self, image: &Image, section: &EhFrame<Bytes<'_>>, start: LinkAddr, landing: &mut Vec<u32>) {
        let bases = bases(start);
        let mut entries = section.entries(&bases);
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let Ok(fde) = partial.parse(|s, b, o| s.cie_from_offset(b, o)) else { continue };
            let (at, len) = (LinkAddr(fde.initial_address()), fde.len());
            let (Ok(size), Ok(offset)) = (u32::try_from(len), u32::try_from(fde.offset())) else { continue };
            if size == 0 || !image.is_executable(at) || image.bytes(at, size as usize).is_none() {
                continue;
            }
            self.fdes += 1;
            if is_plt(image, at, size) {
                continue;
            }
            let lsda = fde.lsda().and_then(|p| match p {
                Pointer::Direct(a) => Some(LinkAddr(a)),
                Pointer::Indirect(a) => image.u64_at(LinkAddr(a)).map(LinkAddr),
            });
            let function = Function {
                start: at,
                size,
                fde: Some(offset),
                has_lsda: lsda.is_some(),
                has_personality: fde.personality().is_some(),
            };
            if let Some(lsda) = lsda {
                landing::pads(image, lsda, &function, |pad| {
                    if image.is_executable(pad) {
                        landing.extend(image.offset_of(pad));
                    }
                });
            }
            self.all.push(function);
        }
    }

    fn read_symbols(&mut self, image: &Image) {
        for (start, size, _) in image.symbols() {
            if size > 0 && image.is_executable(start) && image.bytes(start, size as usize).is_some() {
                self.all.push(Function { start, size, fde: None, has_lsda: false, has_personality: false });
            }
        }
    }

    /// All of them, by rising address.
    #[must_use]
    pub fn all(&self) -> &[Function] {
        &self.all
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// How many FDEs of the file name executable bytes, those of the PLT included.
    #[must_use]
    pub fn fde_count(&self) -> usize {
        self.fdes
    }

    /// The function that holds the byte at this address.
    #[must_use]
    pub fn at(&self, at: LinkAddr) -> Option<&Function> {
        self.index_at(at).map(|i| &self.all[i])
    }

    /// The function that begins at this address.
    #[must_use]
    pub fn starting_at(&self, at: LinkAddr) -> Option<&Function> {
        self.at(at).filter(|f| f.start == at)
    }

    /// The index into [`Functions::all`] of the function that holds the byte at this address.
    #[must_use]
    pub fn index_at(&self, at: LinkAddr) -> Option<usize> {
        let i = self.all.partition_point(|f| f.start <= at).checked_sub(1)?;
        self.all[i].contains(at).then_some(i)
    }

    /// The landing pads in a range of addresses, by rising address, whichever function's table names them.
    pub fn landing_pads_in(&self, range: Range<LinkAddr>) -> impl Iterator<Item = LinkAddr> + '_ {
        let offset = |a: LinkAddr| a.0.saturating_sub(self.base.0);
        let (from, to) = (offset(range.start), offset(range.end));
        let first = self.landing_pads.partition_point(|&o| u64::from(o) < from);
        let pads = self.landing_pads[first..].iter().take_while(move |&&o| u64::from(o) < to);
        pads.map(|&o| self.base.plus(u64::from(o)))
    }

    /// How many landing pads there are in the module.
    #[must_use]
    pub fn landing_pad_count(&self) -> usize {
        self.landing_pads.len()
    }

    /// The module's `.eh_frame` and the base addresses to read it with.
    #[must_use]
    pub fn eh_frame<'a>(&self, image: &'a Image) -> Option<(EhFrame<Bytes<'a>>, BaseAddresses)> {
        let start = self.eh_frame?;
        Some((section_at(image, start)?, bases(start)))
    }

    /// A function's FDE, read again from the file.
    #[must_use]
    pub fn fde<'a>(&self, image: &'a Image, f: &Function) -> Option<gimli::FrameDescriptionEntry<Bytes<'a>>> {
        let (section, bases) = self.eh_frame(image)?;
        section.fde_from_offset(&bases, (f.fde? as usize).into(), EhFrame::cie_from_offset).ok()
    }

    /// Calls `each` with every row of a function's unwind table, by rising address. `false` if it has none or the data are
    /// damaged (rows before the damage were handed out).
    pub fn unwind_rows(
        &self,
        image: &Image,
        f: &Function,
        context: &mut gimli::UnwindContext<usize>,
        mut each: impl FnMut(&gimli::UnwindTableRow<usize>),
    ) -> bool {
        let (Some((section, bases)), Some(fde)) = (self.eh_frame(image), self.fde(image, f)) else { return false };
        let Ok(mut rows) = fde.rows(&section, &bases, context) else { return false };
        loop {
            match rows.next_row() {
                Ok(Some(row)) => each(row),
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }
}

/// PLT stubs have FDEs too, one for each section; they are not functions.
fn is_plt(image: &Image, start: LinkAddr, size: u32) -> bool {
    let end = start.plus(u64::from(size));
    if image
        .sections()
        .iter()
        .any(|s| s.name.starts_with(".plt") && s.address <= start && start < s.address.plus(s.size))
    {
        return true;
    }
    // Without sections: the second entry of a PLT (the first loads the resolver) is the first stub.
    image.sections().is_empty()
        && [0, 16].iter().any(|&o| start.plus(o) < end && image.plt_name(start.plus(o)).is_some())
}

fn bases(eh_frame: LinkAddr) -> BaseAddresses {
    BaseAddresses::default().set_eh_frame(eh_frame.0)
}

fn section_at(image: &Image, start: LinkAddr) -> Option<EhFrame<Bytes<'_>>> {
    let bytes = image.bytes_from(start)?;
    // With sections the length is known; without, the table's own end mark (a zero length) ends it.
    let len = image.section(".eh_frame").filter(|s| s.address == start).map_or(bytes.len() as u64, |s| s.size);
    let bytes = &bytes[..bytes.len().min(usize::try_from(len).unwrap_or(usize::MAX))];
    let mut section = EhFrame::new(bytes, LittleEndian);
    section.set_address_size(8);
    Some(section)
}

/// Where `.eh_frame` is: from its index, which the program headers name, or from its section header.
fn locate(image: &Image) -> Option<(EhFrame<Bytes<'_>>, LinkAddr)> {
    let from_index = || {
        let (at, _) = image.eh_frame_hdr()?;
        let header = EhFrameHdr::new(image.bytes_from(at)?, LittleEndian);
        let parsed = header.parse(&BaseAddresses::default().set_eh_frame_hdr(at.0), 8).ok()?;
        match parsed.eh_frame_ptr() {
            Pointer::Direct(a) => Some(LinkAddr(a)),
            Pointer::Indirect(_) => None,
        }
    };
    let from_section = || image.section(".eh_frame").filter(|s| s.has_bytes).map(|s| s.address);
    let start = from_index().filter(|&a| image.bytes(a, 4).is_some()).or_else(from_section)?;
    Some((section_at(image, start)?, start))
}
