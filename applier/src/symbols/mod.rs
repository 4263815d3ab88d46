//! What debuggers and profilers have to be told of code caches, so that they work as if dyni were not there: which function
//! a place in a cache belongs to, and how to find its caller's frame.
//!
//! Nothing of this is kept in the process. It is made, for any generation and at any later time, from the ledger (which
//! block lies where), the copies themselves and the module's file (names, unwind data). So it costs a process nothing
//! that nobody looks at, and whether its own unwinder was told of the copies does not matter.
//!
//! - [`Symbolizer::symbols`]: names and ranges, as a perf map has them; those of text on huge pages, too, which looks to perf
//!   like memory without a file (debuggers know its names from the module, whose addresses are the same);
//! - [`Symbolizer::symbol_file`]: an ELF file with names and call frames (`elf`, [`crate::unwind::debugger`]), as a debugger
//!   loads it.

mod elf;
mod text;

use crate::check::Originals;
use crate::error::ApplyError;
use crate::ledger::{self, Entry};
use crate::lower::{CopiedBlock, Emission};
use crate::remote::Memory;
use crate::unwind::debugger::DebugFrame;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::{Image, demangle};
use dyni_collector::maps::{self, MappedModule, ModuleReader};
use dyni_schema::{BuildId, LinkAddr, RunAddr};
use std::collections::HashMap;
use std::ops::Range;
use text::MovedText;

/// What a function's part is called that lies among the cold code: compilers have the same word for it.
const COLD: &str = ".cold";

/// The most generations that are looked at. A process that was optimised anew every day for ten years has fewer.
const MAX_GENERATIONS: usize = 1 << 12;

/// A part of a function's copy, in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    /// Its first byte.
    pub start: RunAddr,
    /// Its length in bytes.
    pub size: u64,
    /// The function's name as people write it, or where it is in its module (`mariadbd+0x1234`, a link address), with
    /// `.cold` behind it for the cold part.
    pub name: String,
}

/// The symbols of a process as an ELF file.
#[derive(Debug, Clone)]
pub struct SymbolFile {
    /// The file.
    pub bytes: Vec<u8>,
    /// How many symbols it has.
    pub symbols: usize,
    /// How many functions it tells a debugger to find the caller of.
    pub frames: usize,
    /// How many it can't.
    pub without_frames: usize,
}

/// Finds out what is in caches. Reads each module once, for all processes that are asked for.
#[derive(Debug, Default)]
pub struct Symbolizer {
    reader: ModuleReader,
    /// By build; `None` for one whose file can't be read.
    images: HashMap<BuildId, Option<Image>>,
}

/// One generation of a process and what is known of its module.
struct Generation<'a> {
    entry: &'a Entry,
    image: Option<&'a Image>,
}

impl Symbolizer {
    /// What lies in the code caches of process `pid`, all generations', and in text that was moved to huge pages, by
    /// rising address; nothing if it has none.
    ///
    /// # Errors
    /// The process is gone, or not ours to read.
    pub fn symbols(&mut self, pid: i32) -> Result<Vec<Symbol>, ApplyError> {
        let (_, entries, texts) = self.look(pid).map_err(|e| e.or_death(pid))?;
        let image = |text: &MovedText| self.images.get(&text.build_id).and_then(Option::as_ref);
        let moved = texts.iter().flat_map(|text| text.symbols(image(text)));
        Ok(sorted(self.generations(&entries).flat_map(|g| g.symbols()).chain(moved).collect()))
    }

    /// The same as a file for a debugger, with call frames; `None` if the process has no code cache.
    ///
    /// # Errors
    /// As [`Symbolizer::symbols`].
    pub fn symbol_file(&mut self, pid: i32) -> Result<Option<SymbolFile>, ApplyError> {
        let (memory, entries, _) = self.look(pid).map_err(|e| e.or_death(pid))?;
        let mut frames = DebugFrame::default();
        let mut symbols = Vec::new();
        for generation in self.generations(&entries) {
            symbols.extend(generation.symbols());
            generation.frames(&memory, &mut frames);
        }
        if symbols.is_empty() {
            return Ok(None);
        }
        let symbols = sorted(symbols);
        let texts: Vec<_> = entries.iter().map(code_range).collect();
        let (described, without_frames) = (frames.described, frames.left_out);
        let bytes = elf::write(&texts, &symbols, &frames.into_bytes());
        Ok(Some(SymbolFile { bytes, symbols: symbols.len(), frames: described, without_frames }))
    }

    /// The process's ledgers and moved text; afterwards the images of their modules are known.
    fn look(&mut self, pid: i32) -> Result<(Memory, Vec<Entry>, Vec<MovedText>), ApplyError> {
        let memory = Memory::open_read_only(pid)?;
        let maps = maps::mappings(pid)?;
        let (mut entries, _) = ledger::find(pid, &maps, &memory);
        entries.truncate(MAX_GENERATIONS);
        let texts = MovedText::find(&maps, &memory);
        if !entries.is_empty() || !texts.is_empty() {
            let modules = self.reader.of(pid, &maps);
            let builds = entries.iter().map(|e| &e.ledger.build_id).chain(texts.iter().map(|t| &t.build_id));
            for build_id in builds {
                if !self.images.contains_key(build_id) {
                    self.images.insert(build_id.clone(), image(&modules, build_id));
                }
            }
        }
        Ok((memory, entries, texts))
    }

    fn generations<'a>(&'a self, entries: &'a [Entry]) -> impl Iterator<Item = Generation<'a>> {
        let image = |entry: &Entry| self.images.get(&entry.ledger.build_id)?.as_ref();
        entries.iter().map(move |entry| Generation { entry, image: image(entry) })
    }
}

/// The file of a build that is mapped.
fn image(modules: &[MappedModule], build_id: &BuildId) -> Option<Image> {
    let module = modules.iter().find(|m| m.build_id == *build_id)?;
    let bytes = std::fs::read(module.file.as_ref()?).ok()?;
    Image::parse(bytes, &module.name).ok().filter(|image| image.build_id() == build_id)
}

fn code_range(entry: &Entry) -> Range<RunAddr> {
    let start = RunAddr(entry.ledger.cache);
    start..start.plus(entry.ledger.code_size)
}

/// By rising start. A ledger is not to be trusted: what lies in another symbol is left out.
fn sorted(mut symbols: Vec<Symbol>) -> Vec<Symbol> {
    symbols.sort_by_key(|s| s.start);
    let mut end = RunAddr(0);
    symbols.retain(|s| {
        let free = s.start >= end && s.size > 0;
        if free {
            end = s.start.plus(s.size);
        }
        free
    });
    symbols
}

/// What people call a function of a module.
fn name(image: Option<&Image>, module: &str, function: LinkAddr) -> String {
    let by_symbol = image.and_then(|image| {
        let (name, start) = image.symbol_at(function)?;
        let name = demangle(name);
        Some(if start == function { name } else { format!("{name}+{:#x}", function.distance(start)) })
    });
    let name = by_symbol.unwrap_or_else(|| format!("{module}+{:#x}", function.0));
    // A line of a perf map is a name; control characters have no place in one.
    name.chars().filter(|c| !c.is_control()).collect()
}

impl Generation<'_> {
    /// Its functions' parts: copied blocks of one function that lie one behind the other are one.
    fn symbols(&self) -> Vec<Symbol> {
        let ledger = &self.entry.ledger;
        let mut blocks = ledger.blocks();
        blocks.sort_by_key(|b| (b.copy, b.copy_size));
        let of_one = |a: &CopiedBlock, b: &CopiedBlock| {
            a.copy.0 + u64::from(a.copy_size) == b.copy.0
                && (a.copy.0 < ledger.hot_size) == (b.copy.0 < ledger.hot_size)
                && self.function_of(a.original) == self.function_of(b.original)
        };
        let symbol = |part: &[CopiedBlock]| {
            let (first, last) = (part[0], part[part.len() - 1]);
            let end = last.copy.0 + u64::from(last.copy_size);
            let mut name = self.name(self.function_of(first.original));
            if first.copy.0 >= ledger.hot_size && !name.ends_with(COLD) {
                name.push_str(COLD);
            }
            Symbol { start: RunAddr(ledger.cache).plus(first.copy.0), size: end - first.copy.0, name }
        };
        blocks.chunk_by(of_one).map(symbol).collect()
    }

    /// The start of the copied function that holds a place of the original, or that place.
    fn function_of(&self, at: LinkAddr) -> LinkAddr {
        let ledger = &self.entry.ledger;
        let i = ledger.functions.partition_point(|&start| start <= at.0).checked_sub(1);
        let function = i.map(|i| (ledger.functions[i], u64::from(ledger.function_sizes[i])));
        function.filter(|(start, size)| at.0 - start < *size).map_or(at, |(start, _)| LinkAddr(start))
    }

    fn name(&self, function: LinkAddr) -> String {
        name(self.image, &self.entry.ledger.module, function)
    }

    /// How to find the callers of its copies, as far as the module's file is there to say it of the originals.
    fn frames(&self, memory: &Memory, frames: &mut DebugFrame) {
        let ledger = &self.entry.ledger;
        let Some(image) = self.image else {
            frames.left_out += ledger.functions.len();
            return;
        };
        let Ok(code) = memory.read_vec(RunAddr(ledger.cache), ledger.code_size as usize) else { return };
        let emission = Emission {
            code,
            hot_size: ledger.hot_size,
            blocks: ledger.blocks(),
            escapes: Vec::new(),
            counters: ledger.counter_map(),
            shortcuts: ledger.shortcuts.clone(),
        };
        let functions = Functions::find(image);
        frames.add(image, &functions, &emission, &InFile(image), ledger.cache_link(), ledger.bias);
    }
}

/// Originals as the file has them: nothing is ever copied that was not the same in the process (invariant 5).
struct InFile<'a>(&'a Image);

impl Originals for InFile<'_> {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        self.0.bytes(at, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Journal, Ledger, Release};
    use dyni_schema::CacheAddr;

    fn block(original: u64, copy: u64) -> CopiedBlock {
        CopiedBlock { original: LinkAddr(original), size: 8, copy: CacheAddr(copy), copy_size: 8 }
    }

    fn entry(blocks: &[CopiedBlock]) -> Entry {
        let mut ledger = Ledger {
            module: "mariadbd".into(),
            bias: 0x1000,
            cache: 0x20_0000,
            cache_size: 0x20_0000,
            code_size: 0x100,
            hot_size: 0x40,
            functions: vec![0x100, 0x200],
            function_sizes: vec![32, 32],
            ..Ledger::default()
        };
        ledger.set_blocks(blocks);
        Entry { at: RunAddr(0x1000), size: 4096, ledger, journal: Journal::default(), release: Release::No, kept_by: 0 }
    }

    fn names(blocks: &[CopiedBlock]) -> Vec<(u64, u64, String)> {
        let entry = entry(blocks);
        let generation = Generation { entry: &entry, image: None };
        sorted(generation.symbols()).into_iter().map(|s| (s.start.0 - 0x20_0000, s.size, s.name)).collect()
    }

    #[test]
    fn a_function_has_a_hot_and_a_cold_part() {
        let found = names(&[block(0x100, 8), block(0x108, 0x40), block(0x110, 0), block(0x200, 0x10)]);
        let wanted = [(0, 16, "mariadbd+0x100"), (0x10, 8, "mariadbd+0x200"), (0x40, 8, "mariadbd+0x100.cold")];
        assert_eq!(found, wanted.map(|(at, size, name)| (at, size, name.to_owned())));
    }

    #[test]
    fn a_block_of_no_function_is_named_by_its_place_and_none_lies_in_another() {
        let found = names(&[block(0x90, 0x20), block(0x1f0, 0x24)]);
        assert_eq!(found, [(0x20, 8, "mariadbd+0x90".to_owned())]);
    }
}
