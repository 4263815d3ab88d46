//! An ELF file that holds symbols and call frames of code that lies elsewhere, as files of debug information do.
//!
//! Layout: header; `.debug_frame`; `.symtab`; its names; the sections' names; the section headers. Each code cache is a
//! `.text` without bytes at its run address, so that a debugger loads the file without being told where it belongs.

use super::Symbol;
use dyni_schema::RunAddr;
use std::ops::Range;

const HEADER: u64 = 64;
const SECTION_HEADER: u16 = 64;
const SYMBOL: u64 = 24;

// The System V gABI, chapter 4.
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_STRTAB: u32 = 3;
const SHT_NOBITS: u32 = 8;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
/// Local: a debugger that is asked for a function by name thinks of the original first.
const LOCAL_FUNCTION: u8 = 2;

/// The sections' names; each section knows where its own begins.
const NAMES: &[u8] = b"\0.text\0.debug_frame\0.symtab\0.strtab\0.shstrtab\0";

/// A section header, in the order of its fields.
#[derive(Default)]
struct Section {
    name: &'static str,
    kind: u32,
    flags: u64,
    address: u64,
    offset: u64,
    size: u64,
    link: u32,
    info: u32,
    align: u64,
    entry_size: u64,
}

/// The file for code at `texts`, with symbols in them by rising start, and this `.debug_frame`.
pub(super) fn write(texts: &[Range<RunAddr>], symbols: &[Symbol], debug_frame: &[u8]) -> Vec<u8> {
    let mut names = vec![0];
    let mut table = vec![0; SYMBOL as usize];
    for symbol in symbols {
        // The first section is no section.
        let Some(section) = texts.iter().position(|t| t.contains(&symbol.start)) else { continue };
        table.extend((names.len() as u32).to_le_bytes());
        table.extend([LOCAL_FUNCTION, 0]);
        table.extend((section as u16 + 1).to_le_bytes());
        table.extend(symbol.start.0.to_le_bytes());
        table.extend(symbol.size.to_le_bytes());
        names.extend(symbol.name.bytes());
        names.push(0);
    }
    let mut file = vec![0; HEADER as usize];
    let mut sections = vec![Section::default()];
    sections.extend(texts.iter().map(|text| Section {
        name: ".text",
        kind: SHT_NOBITS,
        flags: SHF_ALLOC | SHF_EXECINSTR,
        address: text.start.0,
        offset: HEADER,
        size: text.end.distance(text.start) as u64,
        align: 16,
        ..Section::default()
    }));
    let mut add = |section: Section, bytes: &[u8]| {
        file.resize(file.len().next_multiple_of(8), 0);
        sections.push(Section { offset: file.len() as u64, size: bytes.len() as u64, align: 8, ..section });
        file.extend_from_slice(bytes);
    };
    add(Section { name: ".debug_frame", kind: SHT_PROGBITS, ..Section::default() }, debug_frame);
    let strings = texts.len() as u32 + 3;
    let locals = (table.len() as u64 / SYMBOL) as u32;
    let symtab = Section { name: ".symtab", kind: SHT_SYMTAB, link: strings, info: locals, ..Section::default() };
    add(Section { entry_size: SYMBOL, ..symtab }, &table);
    add(Section { name: ".strtab", kind: SHT_STRTAB, ..Section::default() }, &names);
    add(Section { name: ".shstrtab", kind: SHT_STRTAB, ..Section::default() }, NAMES);

    file.resize(file.len().next_multiple_of(8), 0);
    let header = header(file.len() as u64, sections.len() as u16);
    file[..HEADER as usize].copy_from_slice(&header);
    sections.iter().for_each(|s| s.write(&mut file));
    file
}

fn header(sections_at: u64, sections: u16) -> [u8; HEADER as usize] {
    let mut out = Vec::with_capacity(HEADER as usize);
    // 64 bits, little-endian, version 1.
    out.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    out.extend(ET_EXEC.to_le_bytes());
    out.extend(EM_X86_64.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    // No entry, no program headers.
    out.extend([0; 16]);
    out.extend(sections_at.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    out.extend((HEADER as u16).to_le_bytes());
    out.extend([0; 4]);
    out.extend(SECTION_HEADER.to_le_bytes());
    out.extend(sections.to_le_bytes());
    // The sections' names are the last one.
    out.extend((sections - 1).to_le_bytes());
    out.try_into().expect("the fields are 64 bytes together")
}

impl Section {
    fn write(&self, out: &mut Vec<u8>) {
        let named = |at: &usize| NAMES[*at..].starts_with(self.name.as_bytes()) && NAMES[at + self.name.len()] == 0;
        let name = (0..NAMES.len()).find(named).expect("every section's name is there");
        out.extend((name as u32).to_le_bytes());
        out.extend(self.kind.to_le_bytes());
        for field in [self.flags, self.address, self.offset, self.size] {
            out.extend(field.to_le_bytes());
        }
        out.extend(self.link.to_le_bytes());
        out.extend(self.info.to_le_bytes());
        out.extend(self.align.to_le_bytes());
        out.extend(self.entry_size.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_analyzer::image::Image;

    #[test]
    fn another_reader_finds_what_was_written() {
        let texts = [RunAddr(0x20_0000)..RunAddr(0x20_0100), RunAddr(0x60_0000)..RunAddr(0x60_0040)];
        let symbol = |start, name: &str| Symbol { start: RunAddr(start), size: 16, name: name.to_owned() };
        let symbols =
            [symbol(0x20_0010, "first"), symbol(0x60_0000, "mariadbd+0x12.cold"), symbol(0x90_0000, "astray")];
        let file = write(&texts, &symbols, b"frames");
        let header = u64::from_le_bytes(file[40..48].try_into().unwrap()) as usize;
        assert_eq!(file.len(), header + 7 * usize::from(SECTION_HEADER));
        let text = String::from_utf8_lossy(&file);
        assert!(text.contains("first\0mariadbd+0x12.cold\0") && !text.contains("astray"), "{text}");
        // It is no program: nobody can take it for the module itself.
        assert!(Image::parse(file, "symbols").is_err());
    }
}
