//! `PT_DYNAMIC`: what the dynamic linker is told, which is also what a stripped file still says about itself.

use super::{Inner, Name, Tables, string_at, symbols};
use dyni_schema::LinkAddr;
use object::LittleEndian as LE;
use object::elf;
use object::pod;
use object::read::elf::{FileHeader, ProgramHeader, Relr, SectionHeader};

/// The most entries of the dynamic section that are looked at.
const MAX_ENTRIES: usize = 4096;
/// The most `DT_NEEDED` entries that are kept.
const MAX_NEEDED: usize = 1024;
/// Bytes of a symbol table entry.
const SYM: u64 = 24;

/// The entries of the dynamic section that matter here, still as the file states them.
#[derive(Default)]
pub(super) struct Dynamic {
    needed: Vec<u64>,
    soname: Option<u64>,
    strtab: Option<u64>,
    symtab: Option<u64>,
    hash: Option<u64>,
    gnu_hash: Option<u64>,
    rela: (u64, u64),
    relr: (u64, u64),
    jmprel: (u64, u64),
    init: [Option<u64>; 2],
    flags_1: u64,
    present: bool,
}

impl Dynamic {
    pub(super) fn read(image: &Inner, headers: &[elf::ProgramHeader64<LE>], data: &[u8]) -> Self {
        let mut d = Self::default();
        let Some(header) = headers.iter().find(|h| h.p_type(LE) == elf::PT_DYNAMIC) else { return d };
        let Some(bytes) = image.bytes_from(data, LinkAddr(header.p_vaddr(LE))) else { return d };
        d.present = true;
        let bytes = &bytes[..bytes.len().min(header.p_filesz(LE).min(16 * MAX_ENTRIES as u64) as usize)];
        for entry in bytes.chunks_exact(16) {
            let tag = i64::from_le_bytes(entry[..8].try_into().expect("8 bytes"));
            let value = u64::from_le_bytes(entry[8..].try_into().expect("8 bytes"));
            match tag {
                0 => break,
                1 if d.needed.len() < MAX_NEEDED => d.needed.push(value),
                2 => d.jmprel.1 = value,
                4 => d.hash = Some(value),
                5 => d.strtab = Some(value),
                6 => d.symtab = Some(value),
                7 => d.rela.0 = value,
                8 => d.rela.1 = value,
                12 => d.init[0] = Some(value),
                13 => d.init[1] = Some(value),
                14 => d.soname = Some(value),
                23 => d.jmprel.0 = value,
                35 => d.relr.1 = value,
                36 => d.relr.0 = value,
                0x6fff_fef5 => d.gnu_hash = Some(value),
                0x6fff_fffb => d.flags_1 = value,
                _ => {}
            }
        }
        d
    }

    /// The linker said `DF_1_PIE`.
    pub(super) fn is_pie(&self) -> bool {
        self.flags_1 & 0x0800_0000 != 0
    }

    pub(super) fn has_soname(&self) -> bool {
        self.soname.is_some()
    }

    pub(super) fn tables(&self, image: &Inner, header: &elf::FileHeader64<LE>, data: &[u8]) -> Tables {
        let mut t = Tables::default();
        let strings = self.strtab.and_then(|a| image.file_offset(LinkAddr(a)));
        let string = |offset: u64| -> Option<Name> {
            let at = strings?.checked_add(usize::try_from(offset).ok()?)?;
            string_at(data, at).filter(|s| !s.is_empty())?;
            u32::try_from(at).ok().map(Name)
        };
        let text = |o: u64| string(o).and_then(|n| string_at(data, n.0 as usize)).map(str::to_owned);
        t.needed = self.needed.iter().filter_map(|&o| text(o)).collect();
        t.soname = self.soname.and_then(text);

        let dynsym = self.dynsym(image, header, data);
        for s in dynsym {
            let Some(name) = string(u64::from(s.st_name.get(LE))) else { continue };
            if s.st_shndx.get(LE).0 == 0 {
                t.undefined.push(name);
            } else {
                add_symbol(image, &mut t, s, name);
                // Any kind of symbol: assembly entry points are often of no type.
                if let Some(o) = image.offset_of(s.st_value.get(LE))
                    && s.st_info.0 & 15 != 6
                    && image.is_executable(LinkAddr(s.st_value.get(LE)))
                {
                    t.exported.push(o);
                }
            }
        }
        for at in self.init.iter().flatten().copied().chain([image.entry.0]) {
            if image.is_executable(LinkAddr(at)) {
                t.exported.extend(image.offset_of(at));
            }
        }
        symtab(image, header, data, &mut t);

        for (start, size) in [self.rela, self.jmprel] {
            relocations(image, table(image, data, start, size), dynsym, &string, &mut t);
        }
        self.relative(image, data, &mut t);
        if !self.present {
            // A static executable at a fixed address: only its IRELATIVE relocations, found by section.
            if let Ok(sections) = header.sections(LE, data) {
                for s in sections.iter().filter(|s| s.sh_type(LE) == elf::SHT_RELA && s.sh_addr(LE) != 0).take(64) {
                    let rows = table(image, data, s.sh_addr(LE), s.sh_size(LE));
                    relocations(image, rows, dynsym, &string, &mut t);
                }
            }
        }

        symbols::sort(&mut t.symbols);
        t.exported.sort_unstable();
        t.exported.dedup();
        t.pointers.sort_unstable();
        t.pointers.dedup();
        t.pointers.shrink_to_fit();
        t.slots.sort_unstable();
        t.slots.dedup_by_key(|s| s.0);
        t
    }

    /// The dynamic symbols. Their number is not stated anywhere. The hash tables imply it, but GNU's lists only what is
    /// exported; relocations name the others, and so does the section header, if there is one.
    fn dynsym<'d>(&self, image: &Inner, header: &elf::FileHeader64<LE>, data: &'d [u8]) -> &'d [elf::Sym64<LE>] {
        let Some(start) = self.symtab else { return &[] };
        let word = |at: u64| -> Option<u64> {
            let bytes = image.bytes_from(data, LinkAddr(at))?.get(..4)?;
            Some(u64::from(u32::from_le_bytes(bytes.try_into().ok()?)))
        };
        let gnu_count = |hash: u64| -> Option<u64> {
            let (buckets, first, blooms) = (word(hash)?, word(hash.wrapping_add(4))?, word(hash.wrapping_add(8))?);
            let bucket_at = hash.checked_add(16)?.checked_add(blooms.checked_mul(8)?)?;
            let heads = image.bytes_from(data, LinkAddr(bucket_at))?.get(..usize::try_from(buckets * 4).ok()?)?;
            let head = |b: &[u8]| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let last = heads.chunks_exact(4).map(head).max().unwrap_or(0);
            if last < first {
                return Some(first);
            }
            // The chain of the highest bucket runs to the last symbol; its end has the low bit set.
            let chain_at = bucket_at.checked_add(buckets * 4)?.checked_add((last - first) * 4)?;
            let chain = image.bytes_from(data, LinkAddr(chain_at))?;
            let steps = chain.chunks_exact(4).position(|b| b[0] & 1 == 1)? as u64;
            Some(last + steps + 1)
        };
        let hashed = self.gnu_hash.and_then(gnu_count).or_else(|| word(self.hash?.checked_add(4)?)).unwrap_or(0);
        let relocated = [self.rela, self.jmprel]
            .iter()
            .flat_map(|&(start, size)| table::<elf::Rela64<LE>>(image, data, start, size))
            .map(|r| (r.r_info.get(LE) >> 32) + 1)
            .max()
            .unwrap_or(0);
        let listed = header.section_headers(LE, data).ok().and_then(|sections| {
            let section = sections.iter().find(|s| s.sh_type(LE) == elf::SHT_DYNSYM && s.sh_addr(LE) == start)?;
            Some(section.sh_size(LE) / SYM)
        });
        let count = hashed.max(relocated).max(listed.unwrap_or(0));
        table(image, data, start, count.saturating_mul(SYM))
    }

    /// `DT_RELR`: compact relative relocations. The target is what the file holds in the slot.
    fn relative(&self, image: &Inner, data: &[u8], t: &mut Tables) {
        let (start, size) = self.relr;
        let words: &[elf::Relr64<LE>] = table(image, data, start, size);
        let (mut next, mut slots) = (0u64, Vec::new());
        for word in words {
            let word = word.get(LE);
            slots.clear();
            if word & 1 == 0 {
                slots.push(word);
                next = word.wrapping_add(8);
            } else {
                slots.extend((0..63).filter(|i| word >> (i + 1) & 1 == 1).map(|i| next.wrapping_add(8 * i)));
                next = next.wrapping_add(8 * 63);
            }
            for &slot in &slots {
                let value = image.bytes_from(data, LinkAddr(slot)).and_then(|b| b.get(..8));
                if let Some(value) = value {
                    let value = u64::from_le_bytes(value.try_into().expect("8 bytes"));
                    add_pointer(image, t, slot, value);
                }
            }
        }
    }
}

/// `size` bytes at an address as rows of a table; as many rows as are really there.
fn table<'d, T: pod::Pod>(image: &Inner, data: &'d [u8], start: u64, size: u64) -> &'d [T] {
    if size == 0 {
        return &[];
    }
    let Some(bytes) = image.bytes_from(data, LinkAddr(start)) else { return &[] };
    let count = bytes.len().min(usize::try_from(size).unwrap_or(usize::MAX)) / size_of::<T>();
    pod::slice_from_bytes(bytes, count).map_or(&[], |(rows, _)| rows)
}

fn add_symbol(image: &Inner, t: &mut Tables, s: &elf::Sym64<LE>, name: Name) {
    let kind = s.st_info.0 & 15;
    // Functions, indirect functions, objects, and symbols without a type; not sections, files and thread-local data.
    if !matches!(kind, 0 | 1 | 2 | 10) || s.st_shndx.get(LE).0 == 0 || s.st_shndx.get(LE).0 >= 0xff00 {
        return;
    }
    if let Some(offset) = image.offset_of(s.st_value.get(LE)) {
        let size = u32::try_from(s.st_size.get(LE)).unwrap_or(0);
        t.symbols.push(symbols::Symbol { offset, size, name });
    }
}

/// The static symbol table, in files that were not stripped.
fn symtab(image: &Inner, header: &elf::FileHeader64<LE>, data: &[u8], t: &mut Tables) {
    let Ok(sections) = header.sections(LE, data) else { return };
    let Some(section) = sections.iter().find(|s| s.sh_type(LE) == elf::SHT_SYMTAB) else { return };
    let Ok(symbols) = section.data_as_array::<elf::Sym64<LE>, _>(LE, data) else { return };
    let strings = sections.section(object::SectionIndex(section.sh_link(LE) as usize));
    let Ok(strings) = strings.map(|s| s.sh_offset(LE)) else { return };
    for s in symbols {
        let at = strings.saturating_add(u64::from(s.st_name.get(LE)));
        let Ok(at) = u32::try_from(at) else { continue };
        if string_at(data, at as usize).is_some_and(|n| !n.is_empty()) {
            add_symbol(image, t, s, Name(at));
        }
    }
}

fn add_pointer(image: &Inner, t: &mut Tables, slot: u64, target: u64) {
    if image.is_executable(LinkAddr(target))
        && let (Some(slot), Some(target)) = (image.offset_of(slot), image.offset_of(target))
    {
        t.pointers.push((slot, target));
    }
}

fn relocations(
    image: &Inner,
    rows: &[elf::Rela64<LE>],
    dynsym: &[elf::Sym64<LE>],
    string: &dyn Fn(u64) -> Option<Name>,
    t: &mut Tables,
) {
    for r in rows {
        let (slot, info, addend) = (r.r_offset.get(LE), r.r_info.get(LE), r.r_addend.get(LE) as u64);
        let symbol = dynsym.get((info >> 32) as usize).filter(|_| info >> 32 != 0);
        match info as u32 {
            // RELATIVE, RELATIVE64, IRELATIVE: the addend is the address (of the resolver, for IRELATIVE).
            8 | 37 | 38 => add_pointer(image, t, slot, addend),
            // 64, GLOB_DAT, JUMP_SLOT: a symbol's address.
            kind @ (1 | 6 | 7) => {
                let Some(symbol) = symbol else { continue };
                if symbol.st_shndx.get(LE).0 != 0 && symbol.st_info.0 & 15 != 6 {
                    let addend = if kind == 1 { addend } else { 0 };
                    add_pointer(image, t, slot, symbol.st_value.get(LE).wrapping_add(addend));
                }
                if let (Some(slot), Some(name)) = (image.offset_of(slot), string(u64::from(symbol.st_name.get(LE)))) {
                    t.slots.push((slot, name));
                }
            }
            _ => {}
        }
    }
}
