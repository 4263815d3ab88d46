//! One ELF file: segments, symbols, imports, and where its data point into its text.
//!
//! Only what the loader itself uses is relied on (program headers, `PT_DYNAMIC`, notes): distribution binaries are
//! stripped, and section headers may be missing or wrong. Sections are used where they are there, to know more.
//!
//! The file is untrusted input. Every table is bounded by the bytes that are really there, every offset is checked, and
//! nothing is allocated in proportion to a number that the file merely claims.
//!
//! Tables hold 32-bit offsets from [`Image::base`], not addresses, and names as offsets into the file: a module with a
//! million relocations stays at 8 bytes each. A module that spans 4 GiB or more is refused (the small code model of
//! x86-64 can't make one).

mod dynamic;
mod plt;
mod symbols;

use dyni_schema::{BuildId, FileOffset, LinkAddr};
use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use symbols::demangle;

/// The longest name that is looked at, in bytes. Longer ones are cut (C++ template names reach some kilobytes).
const MAX_NAME: usize = 1 << 14;
/// The most program headers that are looked at; a linker makes about a dozen.
const MAX_SEGMENTS: usize = 256;
/// The most sections that are looked at.
const MAX_SECTIONS: usize = 1 << 12;

/// Why a file can't be analysed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The file does not start with an ELF header.
    #[error("{0} is not an ELF file")]
    NotElf(String),
    /// An ELF file, but not a 64-bit little-endian x86-64 one.
    #[error("{0} is not a 64-bit x86-64 ELF file")]
    WrongMachine(String),
    /// An ELF file that is not a program or a shared object (an object file, a core dump).
    #[error("{0} is neither an executable nor a shared object")]
    WrongType(String),
    /// The file ends before what its headers name, or its headers contradict each other.
    #[error("{name} is damaged: {what}")]
    Damaged {
        /// The file.
        name: String,
        /// What does not fit.
        what: &'static str,
    },
    /// It has no executable code.
    #[error("{0} has no executable segment")]
    NoCode(String),
    /// Its segments span 4 GiB or more.
    #[error("{0} spans 4 GiB or more of address space")]
    TooLarge(String),
}

/// What kind of module a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An executable at a fixed address.
    Exec,
    /// A position-independent executable.
    Pie,
    /// A shared object.
    Shared,
    /// A position-independent executable that needs no dynamic linker.
    StaticPie,
}

impl Kind {
    /// Whether run addresses equal link addresses, so that code and data may hold text addresses as plain numbers.
    #[must_use]
    pub const fn is_fixed(self) -> bool {
        matches!(self, Self::Exec)
    }

    /// One word for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Pie => "pie",
            Self::Shared => "shared",
            Self::StaticPie => "static-pie",
        }
    }
}

/// A `PT_LOAD` segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where its bytes start in the file.
    pub offset: FileOffset,
    /// Where they are mapped, before the load bias.
    pub address: LinkAddr,
    /// How many bytes come from the file.
    pub file_size: u64,
    /// How many bytes of address space it takes; those after `file_size` are zero.
    pub mem_size: u64,
    /// May be executed.
    pub executable: bool,
    /// May be written.
    pub writable: bool,
}

/// A section that is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name, such as `.text`.
    pub name: String,
    /// Its first byte.
    pub address: LinkAddr,
    /// Its length in bytes.
    pub size: u64,
    /// Holds instructions.
    pub executable: bool,
    /// May be written.
    pub writable: bool,
    /// Has bytes in the file (is not `.bss`).
    pub has_bytes: bool,
}

/// A place in data that a relocation fills with a text address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CodePointer {
    /// The 8 bytes that are filled.
    pub slot: LinkAddr,
    /// The text address they get, before the load bias.
    pub target: LinkAddr,
}

/// A module's file. Cheap to clone: the bytes and the tables are shared.
#[derive(Clone)]
pub struct Image(Arc<Inner>);

struct Inner {
    data: Box<dyn AsRef<[u8]> + Send + Sync>,
    name: String,
    build_id: BuildId,
    kind: Kind,
    entry: LinkAddr,
    base: u64,
    span: u32,
    segments: Vec<Segment>,
    sections: Vec<Section>,
    eh_frame_hdr: Option<(LinkAddr, u64)>,
    notes: Vec<Note>,
    tables: Tables,
}

/// An entry of a note segment or section: owner, type, and where its description lies in the file.
#[derive(Clone, Debug)]
struct Note {
    owner: String,
    kind: u32,
    desc: Range<usize>,
}

/// A zero-ended string by its offset in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name(u32);

/// What the dynamic section and the symbol tables say. Addresses are offsets from the base.
#[derive(Default)]
struct Tables {
    needed: Vec<String>,
    soname: Option<String>,
    /// Defined symbols with an address, sorted by it.
    symbols: Vec<symbols::Symbol>,
    /// Undefined dynamic symbols.
    undefined: Vec<Name>,
    /// (slot, target), sorted.
    pointers: Vec<(u32, u32)>,
    /// (GOT slot, symbol), sorted.
    slots: Vec<(u32, Name)>,
    /// (PLT stub, GOT slot), sorted.
    plt: Vec<(u32, u32)>,
    /// Function entries that the loader calls (`DT_INIT`, …) and those that other modules may (`dynsym`), sorted.
    exported: Vec<u32>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}, {}, {})", self.0.name, self.0.kind.name(), self.0.build_id)
    }
}

impl Image {
    /// Reads a file's headers and tables. `bytes` are the whole file (a `Vec`, an `Arc<[u8]>`, a memory map: they are
    /// kept, not copied); `name` is what messages call it, usually its base name.
    ///
    /// # Errors
    /// What makes it unfit, in words for people. Damage to anything that is not needed to run the file (section
    /// headers, symbols) is not an error: that part is taken as missing.
    pub fn parse(bytes: impl AsRef<[u8]> + Send + Sync + 'static, name: &str) -> Result<Self, ImageError> {
        let data = bytes.as_ref();
        if data.len() < 4 || data[..4] != elf::ELFMAG {
            return Err(ImageError::NotElf(name.to_owned()));
        }
        let damaged = |what| ImageError::Damaged { name: name.to_owned(), what };
        if data.len() < 0x40 {
            return Err(damaged("it ends within its header"));
        }
        let header = elf::FileHeader64::<LE>::parse(data).map_err(|_| ImageError::WrongMachine(name.to_owned()))?;
        if header.endian().is_err() || header.e_machine(LE) != elf::EM_X86_64 {
            return Err(ImageError::WrongMachine(name.to_owned()));
        }
        let e_type = header.e_type(LE);
        if e_type != elf::ET_EXEC && e_type != elf::ET_DYN {
            return Err(ImageError::WrongType(name.to_owned()));
        }
        let headers =
            header.program_headers(LE, data).map_err(|_| damaged("its program headers lie outside the file"))?;
        if headers.len() > MAX_SEGMENTS {
            return Err(damaged("it has too many program headers"));
        }
        let segments = load_segments(headers, data.len() as u64).map_err(damaged)?;
        if !segments.iter().any(|s| s.executable && s.file_size > 0) {
            return Err(ImageError::NoCode(name.to_owned()));
        }
        let base = segments[0].address.0;
        let end = segments.iter().map(|s| s.address.0 + s.mem_size).max().unwrap_or(base);
        let span = u32::try_from(end - base).map_err(|_| ImageError::TooLarge(name.to_owned()))?;
        if u32::try_from(data.len()).is_err() {
            return Err(ImageError::TooLarge(name.to_owned()));
        }

        let sections = read_sections(header, data);
        let notes = read_notes(headers, data);
        let build_id = notes
            .iter()
            .find(|n| {
                n.owner == "GNU" && n.kind == 3 && (1..=dyni_schema::build_id::MAX_BUILD_ID).contains(&n.desc.len())
            })
            .map_or_else(
                || BuildId::from_text(segments.iter().filter(|s| s.executable).map(|s| file_bytes(data, s))),
                |n| BuildId(data[n.desc.clone()].to_vec()),
            );
        let eh_frame_hdr = headers
            .iter()
            .find(|h| h.p_type(LE) == elf::PT_GNU_EH_FRAME)
            .map(|h| (LinkAddr(h.p_vaddr(LE)), h.p_memsz(LE)));
        let has_interp = headers.iter().any(|h| h.p_type(LE) == elf::PT_INTERP);
        let entry = LinkAddr(header.e_entry(LE));

        let mut image = Inner {
            data: Box::new(Vec::new()),
            name: name.to_owned(),
            build_id,
            kind: Kind::Exec,
            entry,
            base,
            span,
            segments,
            sections,
            eh_frame_hdr,
            notes,
            tables: Tables::default(),
        };
        let dynamic = dynamic::Dynamic::read(&image, headers, data);
        image.kind = match () {
            () if e_type == elf::ET_EXEC => Kind::Exec,
            () if dynamic.is_pie() => {
                if has_interp {
                    Kind::Pie
                } else {
                    Kind::StaticPie
                }
            }
            // Linkers before 2017 did not set DF_1_PIE; a shared object with an interpreter (libc) has a soname.
            () if has_interp && !dynamic.has_soname() => Kind::Pie,
            () => Kind::Shared,
        };
        image.tables = dynamic.tables(&image, header, data);
        image.tables.plt = plt::stubs(&image, data);
        image.data = Box::new(bytes);
        Ok(Self(Arc::new(image)))
    }

    /// What messages call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its build-id note, or, without one, a hash of its executable segments.
    #[must_use]
    pub fn build_id(&self) -> &BuildId {
        &self.0.build_id
    }

    /// Executable, shared object, and so on.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Where the loader starts it; 0 for most shared objects.
    #[must_use]
    pub fn entry(&self) -> LinkAddr {
        self.0.entry
    }

    /// The lowest address of any segment.
    #[must_use]
    pub fn base(&self) -> LinkAddr {
        LinkAddr(self.0.base)
    }

    /// From the base to the end of the highest segment, in bytes.
    #[must_use]
    pub fn span(&self) -> u32 {
        self.0.span
    }

    /// The segments that are loaded, by rising address.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.0.segments
    }

    /// The loaded sections, by rising address; empty if the section headers were stripped.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.0.sections
    }

    /// The section of that name.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.0.sections.iter().find(|s| s.name == name)
    }

    /// The whole file.
    #[must_use]
    pub fn file(&self) -> &[u8] {
        (*self.0.data).as_ref()
    }

    /// The `len` bytes at an address, if all of them come from the file.
    #[must_use]
    pub fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        self.bytes_from(at)?.get(..len)
    }

    /// All bytes from an address to the end of its segment's part of the file.
    #[must_use]
    pub fn bytes_from(&self, at: LinkAddr) -> Option<&[u8]> {
        self.0.bytes_from(self.file(), at)
    }

    /// The little-endian 32-bit number at an address.
    #[must_use]
    pub fn u32_at(&self, at: LinkAddr) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(at, 4)?.try_into().ok()?))
    }

    /// The little-endian 64-bit number at an address.
    #[must_use]
    pub fn u64_at(&self, at: LinkAddr) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(at, 8)?.try_into().ok()?))
    }

    /// Where the byte at an address lies in the file.
    #[must_use]
    pub fn file_offset(&self, at: LinkAddr) -> Option<FileOffset> {
        self.0.file_offset(at).map(|o| FileOffset(o as u64))
    }

    /// The address that a byte of the file is mapped at, if it is.
    #[must_use]
    pub fn link_addr(&self, at: FileOffset) -> Option<LinkAddr> {
        let s = self.0.segments.iter().find(|s| at.0 >= s.offset.0 && at.0 - s.offset.0 < s.file_size)?;
        Some(s.address.plus(at.0 - s.offset.0))
    }

    /// The parts of the executable segments that come from the file, by rising address.
    pub fn executable_ranges(&self) -> impl Iterator<Item = Range<LinkAddr>> + '_ {
        self.0.segments.iter().filter(|s| s.executable).map(|s| s.address..s.address.plus(s.file_size))
    }

    /// Where instructions are: the executable sections, or, without section headers, the executable segments. By rising
    /// address, within the executable segments.
    #[must_use]
    pub fn text_ranges(&self) -> Vec<Range<LinkAddr>> {
        let mut ranges: Vec<Range<LinkAddr>> = Vec::new();
        for s in self.0.sections.iter().filter(|s| s.executable && s.has_bytes && s.size > 0) {
            if self.bytes(s.address, s.size as usize).is_none() || !self.is_executable(s.address) {
                continue;
            }
            let start = ranges.last().map_or(s.address, |r| r.end.max(s.address));
            let end = s.address.plus(s.size);
            if start < end {
                ranges.push(start..end);
            }
        }
        // A table that does not hold the entry point is not to be believed.
        let believable = self.0.entry.0 == 0 || ranges.iter().any(|r| r.contains(&self.0.entry));
        if ranges.is_empty() || !believable { self.executable_ranges().collect() } else { ranges }
    }

    /// Whether an address lies in bytes of the file that are mapped executable.
    #[must_use]
    pub fn is_executable(&self, at: LinkAddr) -> bool {
        self.0.is_executable(at)
    }

    /// Whether an address lies in any segment.
    #[must_use]
    pub fn contains(&self, at: LinkAddr) -> bool {
        self.0.segments.iter().any(|s| at >= s.address && at.0 - s.address.0 < s.mem_size)
    }

    /// Whether any segment is both writable and executable.
    #[must_use]
    pub fn has_writable_text(&self) -> bool {
        self.0.segments.iter().any(|s| s.executable && s.writable)
    }

    /// An address as an offset from the base, if it lies within the module.
    #[must_use]
    pub fn offset_of(&self, at: LinkAddr) -> Option<u32> {
        self.0.offset_of(at.0)
    }

    /// The reverse of [`Image::offset_of`].
    #[must_use]
    pub fn at_offset(&self, offset: u32) -> LinkAddr {
        LinkAddr(self.0.base + u64::from(offset))
    }

    /// `PT_GNU_EH_FRAME`: address and length in bytes.
    #[must_use]
    pub fn eh_frame_hdr(&self) -> Option<(LinkAddr, u64)> {
        self.0.eh_frame_hdr
    }

    /// Owners (`GNU`, `Go`, …) and types of the notes.
    pub fn notes(&self) -> impl Iterator<Item = (&str, u32)> + '_ {
        self.0.notes.iter().map(|n| (n.owner.as_str(), n.kind))
    }

    /// `DT_NEEDED`: the shared objects that it names.
    #[must_use]
    pub fn needed(&self) -> &[String] {
        &self.0.tables.needed
    }

    /// `DT_SONAME`.
    #[must_use]
    pub fn soname(&self) -> Option<&str> {
        self.0.tables.soname.as_deref()
    }

    /// Every place that a relocation fills with a text address, by rising slot address.
    pub fn code_pointers(&self) -> impl Iterator<Item = CodePointer> + '_ {
        let pointers = self.0.tables.pointers.iter();
        pointers.map(|&(slot, target)| CodePointer { slot: self.at_offset(slot), target: self.at_offset(target) })
    }

    /// The text address that the 8 bytes at `slot` hold once the module is loaded: from its relocation, or, in a module
    /// at a fixed address, from the file.
    #[must_use]
    pub fn pointer_at(&self, slot: LinkAddr) -> Option<LinkAddr> {
        let pointers = &self.0.tables.pointers;
        if let Some(offset) = self.offset_of(slot)
            && let Ok(i) = pointers.binary_search_by_key(&offset, |p| p.0)
        {
            return Some(self.at_offset(pointers[i].1));
        }
        if !self.0.kind.is_fixed() {
            return None;
        }
        self.u64_at(slot).map(LinkAddr).filter(|&a| self.is_executable(a))
    }

    /// Entries that the loader or other modules may call: `e_entry`, `DT_INIT`, exported functions. By rising address.
    pub fn exported(&self) -> impl Iterator<Item = LinkAddr> + '_ {
        self.0.tables.exported.iter().map(|&o| self.at_offset(o))
    }

    /// The GOT slot that the PLT stub at this address jumps through.
    #[must_use]
    pub fn plt_slot(&self, stub: LinkAddr) -> Option<LinkAddr> {
        let plt = &self.0.tables.plt;
        let i = plt.binary_search_by_key(&self.offset_of(stub)?, |p| p.0).ok()?;
        Some(self.at_offset(plt[i].1))
    }

    /// The name that the PLT stub at this address jumps to.
    #[must_use]
    pub fn plt_name(&self, stub: LinkAddr) -> Option<&str> {
        self.got_name(self.plt_slot(stub)?)
    }

    /// Every PLT stub and the name it jumps to, by rising address.
    pub fn plt(&self) -> impl Iterator<Item = (LinkAddr, &str)> + '_ {
        let stubs = self.0.tables.plt.iter();
        stubs.map(|&(stub, slot)| (self.at_offset(stub), self.got_name(self.at_offset(slot)).unwrap_or("")))
    }

    /// The name whose address the dynamic linker puts into this GOT slot (`call [rip + slot]`).
    #[must_use]
    pub fn got_name(&self, slot: LinkAddr) -> Option<&str> {
        let slots = &self.0.tables.slots;
        let i = slots.binary_search_by_key(&self.offset_of(slot)?, |p| p.0).ok()?;
        Some(self.0.text(self.file(), slots[i].1))
    }

    /// The names that it imports, as the dynamic symbol table lists them.
    pub fn imports(&self) -> impl Iterator<Item = &str> + '_ {
        self.0.tables.undefined.iter().map(|&n| self.0.text(self.file(), n))
    }
}

impl Inner {
    fn offset_of(&self, at: u64) -> Option<u32> {
        let offset = u32::try_from(at.checked_sub(self.base)?).ok()?;
        (offset < self.span).then_some(offset)
    }

    fn file_offset(&self, at: LinkAddr) -> Option<usize> {
        let s = self.segments.iter().find(|s| at >= s.address && at.0 - s.address.0 < s.file_size)?;
        usize::try_from(s.offset.0 + (at.0 - s.address.0)).ok()
    }

    fn bytes_from<'d>(&self, data: &'d [u8], at: LinkAddr) -> Option<&'d [u8]> {
        let s = self.segments.iter().find(|s| at >= s.address && at.0 - s.address.0 < s.file_size)?;
        file_bytes(data, s).get((at.0 - s.address.0) as usize..)
    }

    fn is_executable(&self, at: LinkAddr) -> bool {
        self.segments.iter().any(|s| s.executable && at >= s.address && at.0 - s.address.0 < s.file_size)
    }

    fn text<'d>(&self, data: &'d [u8], name: Name) -> &'d str {
        string_at(data, name.0 as usize).unwrap_or("")
    }
}

/// The zero-ended string at an offset; `None` if it is outside the file, not ended, or not UTF-8.
fn string_at(data: &[u8], offset: usize) -> Option<&str> {
    let rest = data.get(offset..)?;
    let rest = &rest[..rest.len().min(MAX_NAME)];
    let end = rest.iter().position(|&b| b == 0)?;
    std::str::from_utf8(&rest[..end]).ok()
}

/// A segment's bytes in the file. Segments are only made by [`load_segments`], which has checked the bounds.
fn file_bytes<'d>(data: &'d [u8], s: &Segment) -> &'d [u8] {
    &data[s.offset.0 as usize..(s.offset.0 + s.file_size) as usize]
}

fn load_segments(headers: &[elf::ProgramHeader64<LE>], file_len: u64) -> Result<Vec<Segment>, &'static str> {
    let mut segments = Vec::new();
    for h in headers.iter().filter(|h| h.p_type(LE) == elf::PT_LOAD) {
        let (offset, file_size) = (h.p_offset(LE), h.p_filesz(LE));
        let (address, mem_size) = (h.p_vaddr(LE), h.p_memsz(LE));
        if offset.checked_add(file_size).is_none_or(|end| end > file_len) {
            return Err("a segment lies outside the file (is it truncated?)");
        }
        if file_size > mem_size || address.checked_add(mem_size).is_none() {
            return Err("a segment's sizes contradict each other");
        }
        segments.push(Segment {
            offset: FileOffset(offset),
            address: LinkAddr(address),
            file_size,
            mem_size,
            executable: h.p_flags(LE).0 & elf::PF_X.0 != 0,
            writable: h.p_flags(LE).0 & elf::PF_W.0 != 0,
        });
    }
    segments.sort_by_key(|s| s.address);
    if segments.windows(2).any(|w| w[0].address.0 + w[0].mem_size > w[1].address.0) {
        return Err("two segments overlap");
    }
    Ok(segments)
}

/// The loaded sections, or none if the section headers are missing or unreadable.
fn read_sections(header: &elf::FileHeader64<LE>, data: &[u8]) -> Vec<Section> {
    let Ok(table) = header.sections(LE, data) else { return Vec::new() };
    let mut sections: Vec<Section> = table
        .iter()
        .take(MAX_SECTIONS)
        .filter(|s| s.sh_flags(LE).0 & elf::SHF_ALLOC.0 != 0 && s.sh_addr(LE).checked_add(s.sh_size(LE)).is_some())
        .map(|s| Section {
            name: table
                .section_name(LE, s)
                .map(|n| String::from_utf8_lossy(&n[..n.len().min(256)]).into_owned())
                .unwrap_or_default(),
            address: LinkAddr(s.sh_addr(LE)),
            size: s.sh_size(LE),
            executable: s.sh_flags(LE).0 & elf::SHF_EXECINSTR.0 != 0,
            writable: s.sh_flags(LE).0 & elf::SHF_WRITE.0 != 0,
            has_bytes: s.sh_type(LE) != elf::SHT_NOBITS,
        })
        .collect();
    sections.sort_by_key(|s| s.address);
    sections
}

fn read_notes(headers: &[elf::ProgramHeader64<LE>], data: &[u8]) -> Vec<Note> {
    let mut notes = Vec::new();
    for h in headers {
        let Ok(Some(mut entries)) = h.notes(LE, data) else { continue };
        while let Ok(Some(note)) = entries.next() {
            if notes.len() >= MAX_SEGMENTS {
                return notes;
            }
            let desc = note.desc();
            // The note borrows from `data`, so the distance between the two is its place in the file.
            let start = (desc.as_ptr() as usize).wrapping_sub(data.as_ptr() as usize);
            if desc.len() > data.len() || start > data.len() - desc.len() {
                continue;
            }
            let owner = note.name();
            notes.push(Note {
                owner: String::from_utf8_lossy(&owner[..owner.len().min(64)]).into_owned(),
                kind: note.n_type(LE).0,
                desc: start..start + desc.len(),
            });
        }
    }
    notes
}
