//! Prints what the analyzer finds in ELF files: `cargo run --release -p dyni-analyzer --example census -- FILE …`

use dyni_analyzer::cfg::{self, GiveUp, Terminator};
use dyni_analyzer::functions::{Functions, function_hash};
use dyni_analyzer::image::Image;
use dyni_analyzer::refuse;
use dyni_analyzer::targets::{PatchRefusal, TargetIndex};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::time::Instant;

#[derive(Default)]
struct Census {
    gave_up: BTreeMap<GiveUp, usize>,
    refused: BTreeMap<PatchRefusal, usize>,
    kept: BTreeMap<String, usize>,
    entries: usize,
    blocks: usize,
    block_bytes: usize,
    tables: usize,
    exact: usize,
    indirect: usize,
    unresolved: usize,
    functions_unresolved: usize,
    example: BTreeMap<GiveUp, u64>,
}

impl Census {
    fn merge(mut self, other: Self) -> Self {
        other.gave_up.into_iter().for_each(|(k, n)| *self.gave_up.entry(k).or_default() += n);
        other.refused.into_iter().for_each(|(k, n)| *self.refused.entry(k).or_default() += n);
        other.kept.into_iter().for_each(|(k, n)| *self.kept.entry(k).or_default() += n);
        for (k, a) in other.example {
            let first = self.example.entry(k).or_insert(a);
            *first = a.min(*first);
        }
        self.entries += other.entries;
        self.blocks += other.blocks;
        self.block_bytes += other.block_bytes;
        self.tables += other.tables;
        self.exact += other.exact;
        self.indirect += other.indirect;
        self.unresolved += other.unresolved;
        self.functions_unresolved += other.functions_unresolved;
        self
    }
}

fn main() {
    for path in std::env::args().skip(1) {
        let start = Instant::now();
        let file = std::fs::File::open(&path).expect("the file can be opened");
        // SAFETY: a system binary, which nobody rewrites in place while this runs; at worst the figures are wrong.
        let map = unsafe { memmap2::Mmap::map(&file) }.expect("the file can be mapped");
        let image = match Image::parse(map, &path) {
            Ok(image) => image,
            Err(e) => {
                println!("{e}");
                continue;
            }
        };
        let parsed = start.elapsed();
        let functions = Functions::find(&image);
        let found = start.elapsed();
        let targets = TargetIndex::build(&image, &functions);
        let indexed = start.elapsed();
        println!("{image:?}");
        println!(
            "  {} needed, {} imports, {} PLT stubs, {} code pointers, {} symbols, refused: {:?}",
            image.needed().len(),
            image.imports().count(),
            image.plt().count(),
            image.code_pointers().count(),
            image.symbols().count(),
            refuse::module_refusal(&image).map(|r| r.name)
        );
        println!(
            "  {} FDEs, {} functions, {} landing pads",
            functions.fde_count(),
            functions.len(),
            functions.landing_pad_count()
        );
        println!("  {:?}", targets.counts());
        let census = functions
            .all()
            .par_iter()
            .map(|f| {
                let mut c = Census::default();
                match cfg::build(&image, &functions, &targets, f) {
                    Err(reason) => {
                        c.gave_up.insert(reason, 1);
                        c.example.insert(reason, f.start.0);
                    }
                    Ok(g) => {
                        match targets.patchable(&image, &g, f.start) {
                            Ok(()) => c.entries = 1,
                            Err(reason) => {
                                c.refused.insert(reason, 1);
                            }
                        }
                        c.blocks = g.blocks.len();
                        c.tables = g.jump_tables.len();
                        c.exact = g.jump_tables.iter().filter(|t| t.exact).count();
                        for b in &g.blocks {
                            c.block_bytes += (b.end.0 - b.start.0) as usize;
                            if let Some(k) = b.keep_original {
                                *c.kept.entry(format!("{k:?}")).or_default() += 1;
                            }
                            // `jmp [rip + slot]` is a tail call, not a computed jump.
                            let fixed = image.bytes(b.last, 2) == Some(&[0xff, 0x25]);
                            if let (Terminator::Indirect { table }, false) = (b.terminator, fixed) {
                                c.indirect += 1;
                                c.unresolved += usize::from(table.is_none());
                            }
                        }
                        c.functions_unresolved = usize::from(c.unresolved > 0);
                    }
                }
                c
            })
            .reduce(Census::default, Census::merge);
        let graphs = start.elapsed();
        let unwinding = refuse::may_unwind(&image, &functions, &targets, refuse::Options::default());
        let unwound = start.elapsed();
        let all: u32 = functions
            .all()
            .par_iter()
            .map(|f| u32::from(function_hash(&image, f).0[0]))
            .reduce(|| 0, u32::wrapping_add);
        let hashed = start.elapsed();
        println!(
            "  {} blocks of {} KB, entries patchable: {}, {} tables ({} exact), {} computed jumps, {} unresolved in {} functions",
            census.blocks,
            census.block_bytes / 1024,
            census.entries,
            census.tables,
            census.exact,
            census.indirect,
            census.unresolved,
            census.functions_unresolved
        );
        for (reason, n) in &census.gave_up {
            println!("  gave up: {n} {} (first {:#x})", reason.text(), census.example[reason]);
        }
        for (reason, n) in &census.refused {
            println!("  entry not patchable: {n} {}", reason.text());
        }
        println!("  kept in the original: {:?}", census.kept);
        println!("  may be on the stack of a throw: {}", unwinding.count());
        println!(
            "  parse {:.0?}, functions {:.0?}, targets {:.0?}, graphs {:.0?}, unwinding {:.0?}, hashes {:.0?} ({all})",
            parsed,
            found - parsed,
            indexed - found,
            graphs - indexed,
            unwound - graphs,
            hashed - unwound
        );
    }
}
