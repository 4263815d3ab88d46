//! The few facts of an ELF file that mapping needs: its class, its loadable segments, its build-id.
//!
//! The file is whatever a target has mapped, so it is untrusted and may change while it is read. Every table is bounded,
//! every offset is checked by the read itself, and nothing is kept but plain numbers.

use dyni_schema::BuildId;
use dyni_schema::build_id::MAX_BUILD_ID;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// The most program headers that are looked at; the linker writes about a dozen.
const MAX_SEGMENTS: u16 = 256;
/// The most bytes of a note segment that are looked at.
const MAX_NOTES: u64 = 64 << 10;
/// The most executable bytes that are hashed for a file without a build-id.
const MAX_TEXT: u64 = 1 << 30;
/// The page size of x86-64, bytes.
pub const PAGE: u64 = 4096;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const PF_X: u32 = 1;
const NT_GNU_BUILD_ID: u32 = 3;

/// Why a file gives no ELF facts.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// It does not begin as an ELF file does.
    #[error("not an ELF file")]
    NotElf,
    /// A 32-bit ELF file.
    #[error("a 32-bit ELF file")]
    Class32,
    /// An ELF file for another machine, or of another byte order.
    #[error("an ELF file for another machine")]
    OtherMachine,
    /// Its tables contradict themselves.
    #[error("a malformed ELF file: {0}")]
    Malformed(&'static str),
    /// It can't be read.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// One `PT_LOAD` segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file, bytes.
    pub offset: u64,
    /// Where it begins, a link address.
    pub vaddr: u64,
    /// How many bytes of it come from the file.
    pub file_size: u64,
    /// How many bytes it has in memory.
    pub mem_size: u64,
    /// Whether it is executable.
    pub executable: bool,
}

impl Segment {
    /// The link addresses that it covers in memory, in whole pages.
    #[must_use]
    pub fn pages(&self) -> Range<u64> {
        let end = self.vaddr.saturating_add(self.mem_size).saturating_add(PAGE - 1) & !(PAGE - 1);
        self.vaddr & !(PAGE - 1)..end
    }
}

/// What mapping needs to know of an ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfFacts {
    /// Its loadable segments, in the order of the program headers.
    pub segments: Vec<Segment>,
    /// Its identity.
    pub build_id: BuildId,
}

impl ElfFacts {
    /// The load bias (bytes, wrapping) of a mapping that shows the file's byte `offset` at run address `start`; `None` if
    /// no segment has that byte. `executable` prefers such a segment: in small files two may share a page. A mapping that
    /// is not executable and shows text is not where that was loaded to: text that gave way to huge pages is kept aside so.
    #[must_use]
    pub fn bias(&self, start: u64, offset: u64, executable: bool) -> Option<u64> {
        let shows = |s: &&Segment| {
            let first = s.offset & !(PAGE - 1);
            let end = s.offset.saturating_add(s.file_size).saturating_add(PAGE - 1) & !(PAGE - 1);
            (first..end).contains(&offset)
        };
        let segment = self.segments.iter().filter(|s| s.executable == executable).find(shows);
        let segment = segment.or_else(|| self.segments.iter().filter(|s| executable || !s.executable).find(shows))?;
        let vaddr = segment.vaddr.wrapping_add(offset.wrapping_sub(segment.offset));
        Some(start.wrapping_sub(vaddr))
    }

    /// The link addresses of its executable segments, in whole pages.
    pub fn text(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.segments.iter().filter(|s| s.executable && s.mem_size > 0).map(Segment::pages)
    }
}

/// Reads up to the slice's length of bytes at an offset in the file; returns how many.
pub type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> io::Result<usize> + 'a;

fn exactly<const N: usize>(read: &ReadAt, offset: u64) -> Result<[u8; N], ElfError> {
    let mut bytes = [0; N];
    fill(read, offset, &mut bytes)?;
    Ok(bytes)
}

fn fill(read: &ReadAt, offset: u64, bytes: &mut [u8]) -> Result<(), ElfError> {
    let mut done = 0;
    while done < bytes.len() {
        match read(offset.saturating_add(done as u64), &mut bytes[done..]) {
            Ok(0) => return Err(ElfError::Malformed("it ends too early")),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |n, &b| n << 8 | u32::from(b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
}

fn header(read: &ReadAt) -> Result<[u8; 64], ElfError> {
    let ident: [u8; 20] = exactly(read, 0).map_err(|e| match e {
        ElfError::Malformed(_) => ElfError::NotElf,
        other => other,
    })?;
    if &ident[..4] != b"\x7fELF" {
        return Err(ElfError::NotElf);
    }
    match (ident[4], ident[5], u16_at(&ident, 18)) {
        (1, ..) => Err(ElfError::Class32),
        (2, 1, 62) => exactly(read, 0),
        _ => Err(ElfError::OtherMachine),
    }
}

/// Checks that a file is a 64-bit x86-64 ELF file.
///
/// # Errors
/// What it is instead.
pub fn class(file: &File) -> Result<(), ElfError> {
    header(&|offset, bytes: &mut [u8]| file.read_at(bytes, offset)).map(drop)
}

/// The facts of an ELF file; one without a build-id note is identified by its executable bytes.
///
/// # Errors
/// What is wrong with the file.
pub fn facts(file: &File) -> Result<ElfFacts, ElfError> {
    let read = |offset: u64, bytes: &mut [u8]| file.read_at(bytes, offset);
    let (segments, noted) = tables(&read)?;
    let build_id = match noted {
        Some(id) => id,
        None => hash_text(&read, &segments)?,
    };
    Ok(ElfFacts { segments, build_id })
}

/// What can be told of a program that is to be started without reading much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartFacts {
    /// Its build-id note, if it has one.
    pub build_id: Option<BuildId>,
    /// Whether a dynamic loader starts it.
    pub has_loader: bool,
}

/// What can be told of a program that is to be started.
///
/// # Errors
/// What is wrong with the file.
pub fn start_facts(file: &File) -> Result<StartFacts, ElfError> {
    let read = |offset: u64, bytes: &mut [u8]| file.read_at(bytes, offset);
    let header = header(&read)?;
    let (table, count) = (u64_at(&header, 32), u16_at(&header, 56));
    let (_, build_id) = tables(&read)?;
    let mut has_loader = false;
    for i in 0..u64::from(count) {
        let kind: [u8; 4] = exactly(&read, table.saturating_add(56 * i))?;
        has_loader |= u32_at(&kind, 0) == PT_INTERP;
    }
    Ok(StartFacts { build_id, has_loader })
}

/// The facts of an ELF file of which only parts can be read (live memory), so that only its note can identify it: the
/// executable bytes there may be patched, their hash would name another file.
///
/// # Errors
/// What is wrong with the file; `Malformed` if it has no build-id note.
pub fn facts_by_note(read: &ReadAt) -> Result<ElfFacts, ElfError> {
    let (segments, noted) = tables(read)?;
    let build_id = noted.ok_or(ElfError::Malformed("no build-id note in memory"))?;
    Ok(ElfFacts { segments, build_id })
}

fn tables(read: &ReadAt) -> Result<(Vec<Segment>, Option<BuildId>), ElfError> {
    let header = header(read)?;
    let (table, entry, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if entry != 56 || count > MAX_SEGMENTS {
        return Err(ElfError::Malformed("its program headers have an unknown form"));
    }
    let (mut segments, mut build_id) = (Vec::new(), None);
    for i in 0..u64::from(count) {
        let p: [u8; 56] = exactly(read, table.saturating_add(56 * i))?;
        let (kind, flags) = (u32_at(&p, 0), u32_at(&p, 4));
        let (offset, vaddr, file_size, mem_size) = (u64_at(&p, 8), u64_at(&p, 16), u64_at(&p, 32), u64_at(&p, 40));
        match kind {
            PT_LOAD => segments.push(Segment { offset, vaddr, file_size, mem_size, executable: flags & PF_X != 0 }),
            PT_NOTE if build_id.is_none() => build_id = note(read, offset, file_size, u64_at(&p, 48))?,
            _ => {}
        }
    }
    Ok((segments, build_id))
}

/// The GNU build-id in a note segment, if it is there and of a plausible length.
fn note(read: &ReadAt, offset: u64, size: u64, align: u64) -> Result<Option<BuildId>, ElfError> {
    let mut bytes = vec![0; size.min(MAX_NOTES) as usize];
    match fill(read, offset, &mut bytes) {
        Ok(()) => {}
        // A note outside the file is as good as none.
        Err(ElfError::Malformed(_)) => return Ok(None),
        Err(e) => return Err(e),
    }
    let align = if align == 8 { 8 } else { 4 };
    let pad = |n: usize| n.checked_add(align - 1).map(|n| n & !(align - 1));
    let mut rest = bytes.as_slice();
    while rest.len() >= 12 {
        let (name_size, data_size, kind) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize, u32_at(rest, 8));
        let Some(data) = pad(12 + name_size) else { break };
        let (Some(name), Some(id)) = (rest.get(12..12 + name_size), rest.get(data..data.saturating_add(data_size)))
        else {
            break;
        };
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" && !id.is_empty() && id.len() <= MAX_BUILD_ID {
            return Ok(Some(BuildId(id.to_vec())));
        }
        let Some(next) = pad(data + data_size).and_then(|n| rest.get(n..)) else { break };
        rest = next;
    }
    Ok(None)
}

fn hash_text(read: &ReadAt, segments: &[Segment]) -> Result<BuildId, ElfError> {
    let mut texts = Vec::new();
    let mut left = MAX_TEXT;
    for s in segments.iter().filter(|s| s.executable) {
        left = left.checked_sub(s.file_size).ok_or(ElfError::Malformed("its code is larger than 1 GiB"))?;
        // Grows with what the file really has: a hostile size reserves nothing.
        let mut bytes = Vec::new();
        let mut block = vec![0; 1 << 20];
        while (bytes.len() as u64) < s.file_size {
            let want = block.len().min((s.file_size - bytes.len() as u64) as usize);
            fill(read, s.offset.saturating_add(bytes.len() as u64), &mut block[..want])?;
            bytes.extend_from_slice(&block[..want]);
        }
        texts.push(bytes);
    }
    Ok(BuildId::from_text(texts.iter().map(Vec::as_slice)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with one executable segment of `text` and, perhaps, a note.
    fn image(text: &[u8], note: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64 + 2 * 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = 2;
        let (note_at, text_at) = (0x1000u64, 0x2000u64);
        for (at, kind, flags, offset, len) in
            [(64, PT_NOTE, 4, note_at, note.len()), (120, PT_LOAD, 5, text_at, text.len())]
        {
            file[at..at + 4].copy_from_slice(&u32::to_le_bytes(kind));
            file[at + 4..at + 8].copy_from_slice(&u32::to_le_bytes(flags));
            file[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
            file[at + 16..at + 24].copy_from_slice(&(offset + 0x40_0000).to_le_bytes());
            file[at + 32..at + 40].copy_from_slice(&(len as u64).to_le_bytes());
            file[at + 40..at + 48].copy_from_slice(&(len as u64).to_le_bytes());
            file[at + 48] = 4;
        }
        file.resize(note_at as usize, 0);
        file.extend_from_slice(note);
        file.resize(text_at as usize, 0);
        file.extend_from_slice(text);
        file
    }

    fn reader(file: &[u8]) -> impl Fn(u64, &mut [u8]) -> io::Result<usize> + '_ {
        |offset, bytes: &mut [u8]| {
            let rest = usize::try_from(offset).ok().and_then(|o| file.get(o..)).unwrap_or_default();
            let n = rest.len().min(bytes.len());
            bytes[..n].copy_from_slice(&rest[..n]);
            Ok(n)
        }
    }

    fn gnu_note(id: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for n in [4, id.len() as u32, NT_GNU_BUILD_ID] {
            note.extend_from_slice(&n.to_le_bytes());
        }
        note.extend_from_slice(b"GNU\0");
        note.extend_from_slice(id);
        note
    }

    #[test]
    fn the_note_identifies_and_the_bias_follows_the_segment() {
        let file = image(&[0x90; 100], &gnu_note(&[7; 20]));
        let facts = facts_by_note(&reader(&file)).unwrap();
        assert_eq!(facts.build_id, BuildId(vec![7; 20]));
        assert_eq!(facts.bias(0x55_0000_2000, 0x2000, true), Some(0x55_0000_2000 - 0x40_2000));
        assert_eq!(facts.bias(0x55_0000_2000, 0x2000, false), None);
        assert_eq!(facts.bias(0x55_0000_2000, 0x9000, true), None);
        assert!(facts.text().eq(std::iter::once(0x40_2000..0x40_3000)));
    }

    #[test]
    fn a_file_without_a_note_is_identified_by_its_code() {
        let file = image(b"code", &[]);
        let (segments, noted) = tables(&reader(&file)).unwrap();
        assert_eq!(noted, None);
        assert_eq!(hash_text(&reader(&file), &segments).unwrap(), BuildId::from_text([&b"code"[..]]));
    }

    #[test]
    fn what_is_no_x86_64_elf_file_says_so() {
        let mut file = image(b"code", &[]);
        assert!(matches!(header(&reader(b"#!/bin/sh\n")), Err(ElfError::NotElf)));
        file[18] = 183;
        assert!(matches!(header(&reader(&file)), Err(ElfError::OtherMachine)));
        file[4] = 1;
        assert!(matches!(header(&reader(&file)), Err(ElfError::Class32)));
    }

    #[test]
    fn no_damaged_file_panics_or_hangs() {
        let file = image(&[0x90; 64], &gnu_note(&[7; 20]));
        for cut in 0..file.len() {
            let _ = facts_by_note(&reader(&file[..cut]));
        }
        for at in 0..200 {
            for value in [0, 0x7f, 0xff] {
                let mut bad = file.clone();
                bad[at] = value;
                if let Ok((segments, _)) = tables(&reader(&bad)) {
                    let _ = hash_text(&reader(&bad), &segments);
                    let facts = ElfFacts { segments, build_id: BuildId::default() };
                    let _ = facts.bias(u64::MAX, u64::MAX, true);
                    let _ = facts.text().count();
                }
            }
        }
        let mut bad = gnu_note(&[7; 20]);
        bad[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        bad[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(tables(&reader(&image(b"code", &bad))).unwrap().1, None);
    }
}
