//! Every function of some stock binaries, lowered with its blocks in a scrambled order and with every shortcut, passes the checker.

use dyni_analyzer::calls::{self, Site};
use dyni_analyzer::cfg;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::table_loads;
use dyni_analyzer::targets::TargetIndex;
use dyni_applier::check::check;
use dyni_applier::lower::{Source, lower};
use dyni_applier::originals::FunctionBytes;
use dyni_applier::shortcuts::Stub;
use dyni_schema::{CallSite, FunctionHash, FunctionPlan, LinkAddr};
use rayon::prelude::*;

fn whole(path: &str) {
    let Ok(bytes) = std::fs::read(path) else {
        println!("SKIPPED: {path} is not installed");
        return;
    };
    let image = Image::parse(bytes, path).unwrap();
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    let mut graphs: Vec<_> =
        functions.all().par_iter().filter_map(|f| cfg::build(&image, &functions, &targets, f).ok()).collect();
    // Every call through a pointer is promoted to some function of the same file.
    let starts: Vec<LinkAddr> = graphs.iter().map(|cfg| cfg.start).collect();
    let calls: Vec<Vec<CallSite>> = graphs
        .par_iter_mut()
        .map(|cfg| {
            let code = image.bytes(cfg.start, cfg.end.distance(cfg.start) as usize).unwrap();
            let sites = calls::sites(cfg, code);
            sites.iter().filter(|s| !s.is_jump).for_each(|s| cfg.part(s.at.plus(u64::from(s.len)), s.at));
            let offset = |s: &Site| s.at.distance(cfg.start) as u32;
            sites
                .iter()
                .map(|s| (offset(s), starts[s.at.0 as usize % starts.len()].0))
                .map(|(at, callee)| CallSite { at, callee })
                .collect()
        })
        .collect();
    let plans: Vec<FunctionPlan> = graphs
        .iter()
        .zip(&calls)
        .map(|(cfg, calls)| {
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
                calls: calls.clone(),
                weight: 1,
            }
        })
        .collect();
    let sources: Vec<Source<'_>> = graphs
        .into_iter()
        .zip(&plans)
        .map(|(cfg, plan)| {
            let code = image.bytes(cfg.start, plan.size as usize).unwrap().to_vec();
            let table_loads = table_loads::all(&image, &cfg);
            Source { stubs: Stub::all(&image, &cfg, &code), code, cfg, plan, table_loads }
        })
        .collect();
    let room = 256 << 20;
    let cache = image.base().offset(-room);
    let (emission, refused) = lower(&sources, cache, room as u64, cache.plus(room as u64));
    check(&emission, cache, &FunctionBytes::of(sources.iter(), &image)).unwrap();
    let shortcuts = &emission.shortcuts;
    println!(
        "{path}: {} functions, {} copied, {} not, {} blocks, {} bytes, past {} stubs, {} table reads ({} addresses), {} of {} calls promoted",
        functions.len(),
        sources.len() - refused.len(),
        functions.len() - sources.len() + refused.len(),
        emission.blocks.len(),
        emission.code.len(),
        shortcuts.stubs.len(),
        shortcuts.tables.len(),
        shortcuts.pointers.len(),
        shortcuts.calls.len(),
        calls.iter().map(Vec::len).sum::<usize>(),
    );
    assert!(!shortcuts.tables.is_empty() && !shortcuts.calls.is_empty());
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
