//! Every function of some stock binaries, lowered with its blocks in a scrambled order, passes the checker.

use dyni_analyzer::cfg;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::targets::TargetIndex;
use dyni_applier::check::{Originals, check};
use dyni_applier::lower::{Source, lower};
use dyni_schema::{FunctionHash, FunctionPlan, LinkAddr};
use rayon::prelude::*;

struct File<'a>(&'a Image);

impl Originals for File<'_> {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        self.0.bytes(at, len)
    }
}

fn whole(path: &str) {
    let Ok(bytes) = std::fs::read(path) else {
        println!("SKIPPED: {path} is not installed");
        return;
    };
    let image = Image::parse(bytes, path).unwrap();
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    let graphs: Vec<_> =
        functions.all().par_iter().filter_map(|f| cfg::build(&image, &functions, &targets, f).ok()).collect();
    let plans: Vec<FunctionPlan> = graphs
        .iter()
        .map(|cfg| {
            let mut blocks: Vec<u32> = cfg.blocks.iter().map(|b| b.start.distance(cfg.start) as u32).collect();
            blocks[1..].sort_by_key(|o| o.wrapping_mul(2_654_435_761));
            FunctionPlan {
                start: cfg.start.0,
                size: cfg.end.distance(cfg.start) as u32,
                hash: FunctionHash::default(),
                hot: blocks.len().div_ceil(2) as u32,
                blocks,
                entries: Vec::new(),
                probes: Vec::new(),
                weight: 1,
            }
        })
        .collect();
    let sources: Vec<Source<'_>> = graphs
        .into_iter()
        .zip(&plans)
        .map(|(cfg, plan)| Source { code: image.bytes(cfg.start, plan.size as usize).unwrap().to_vec(), cfg, plan })
        .collect();
    let room = 256 << 20;
    let cache = image.base().offset(-room);
    let (emission, refused) = lower(&sources, cache, room as u64, cache.plus(room as u64));
    check(&emission, cache, &File(&image)).unwrap();
    println!(
        "{path}: {} functions, {} copied, {} not, {} blocks, {} bytes",
        functions.len(),
        sources.len() - refused.len(),
        functions.len() - sources.len() + refused.len(),
        emission.blocks.len(),
        emission.code.len()
    );
    assert!(sources.len() - refused.len() > functions.len() / 2, "{refused:?}");
}

#[test]
fn whole_stock_programs_pass_the_checker() {
    for path in ["/lib/x86_64-linux-gnu/libc.so.6", "/usr/bin/redis-server", "/usr/bin/python3.11", "/usr/sbin/nginx"] {
        whole(path);
    }
    let mut versions: Vec<_> = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().collect();
    versions.sort_by_key(std::fs::DirEntry::path);
    whole(&versions.last().map_or("postgres".into(), |v| v.path().join("bin/postgres").display().to_string()));
}

#[test]
fn whole_mariadb_passes_the_checker() {
    whole("/usr/sbin/mariadbd");
}
