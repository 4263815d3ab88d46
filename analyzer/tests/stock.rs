//! Stock binaries: what must be found in them, whatever their version.

mod common;

use common::{Module, check, stock};
use dyni_analyzer::cfg::{self, Terminator};
use dyni_analyzer::refuse;
use rayon::prelude::*;
use std::collections::HashSet;
use std::process::Command;

/// Analyses every function; at least `least` of them, hardly any given up, hardly any entry unpatchable.
fn census(path: &str, least: usize) {
    let Some(image) = stock(path) else { return };
    let m = Module::of(image);
    assert!(m.functions.len() >= least, "{path}: {} functions", m.functions.len());
    assert_eq!(refuse::module_refusal(&m.image), None);
    let large: Vec<_> = m.functions.all().iter().filter(|f| f.size >= 5).collect();
    let graphs: Vec<_> = large.par_iter().map(|f| cfg::build(&m.image, &m.functions, &m.targets, f)).collect();
    let good: Vec<_> = graphs.iter().flatten().collect();
    good.iter().for_each(|g| check(g));
    assert!(good.len() * 100 >= large.len() * 98, "{path}: {} of {} given up", large.len() - good.len(), large.len());
    let patchable = good.iter().filter(|g| m.targets.patchable(&m.image, g, g.start).is_ok()).count();
    assert!(patchable * 100 >= good.len() * 97, "{path}: {patchable} of {} entries patchable", good.len());
    let tables: usize = good.iter().map(|g| g.jump_tables.len()).sum();
    let exact: usize = good.iter().map(|g| g.jump_tables.iter().filter(|t| t.exact).count()).sum();
    assert!(exact * 100 >= tables * 75, "{path}: {exact} of {tables} tables exact");
    println!("{path}: {} functions, {} graphs, {patchable} patchable, {tables} tables", m.functions.len(), good.len());
}

#[test]
fn mariadbd() {
    census("/usr/sbin/mariadbd", 30_000);
}

#[test]
fn postgres() {
    census("/usr/lib/postgresql/15/bin/postgres", 15_000);
}

#[test]
fn redis() {
    census("/usr/bin/redis-server", 3_000);
}

#[test]
fn nginx() {
    census("/usr/sbin/nginx", 1_000);
}

#[test]
fn python_at_a_fixed_address() {
    census("/usr/bin/python3.11", 8_000);
}

/// The interpreter's loop: a jump through one table after every instruction, some of whose entries are in its cold part.
#[test]
fn the_interpreters_loop_is_understood() {
    let Some(image) = stock("/usr/bin/python3.11") else { return };
    let m = Module::of(image);
    let graphs = m.functions.all().par_iter().filter_map(|f| cfg::build(&m.image, &m.functions, &m.targets, f).ok());
    let jumps = |g: &cfg::Cfg, known: bool| {
        let of = |t: &Terminator| matches!(t, Terminator::Indirect { table } if table.is_some() == known);
        g.blocks.iter().filter(|b| of(&b.terminator)).count()
    };
    let all = |g: &cfg::Cfg| jumps(g, true) + jumps(g, false);
    let loop_ = graphs.max_by_key(|g| (all(g), std::cmp::Reverse(g.start))).expect("a function");
    assert!(
        all(&loop_) > 50 && jumps(&loop_, true) * 10 > all(&loop_) * 9,
        "{} of {}",
        jumps(&loop_, true),
        all(&loop_)
    );
}

#[test]
fn libc() {
    census("/lib/x86_64-linux-gnu/libc.so.6", 3_000);
}

/// Every instruction that starts or ends a block is one where another disassembler sees one.
#[test]
fn blocks_begin_and_end_where_objdump_sees_instructions() {
    let path = "/usr/sbin/nginx";
    let Some(image) = stock(path) else { return };
    let Ok(dump) = Command::new("objdump").args(["-d", "--no-show-raw-insn", "-w", path]).output() else {
        println!("SKIPPED: there is no objdump");
        return;
    };
    let text = String::from_utf8_lossy(&dump.stdout);
    let address = |line: &str| u64::from_str_radix(line.trim_start().split(':').next()?, 16).ok();
    let seen: HashSet<u64> = text.lines().filter(|l| l.starts_with(' ')).filter_map(address).collect();
    let m = Module::of(image);
    let mut blocks = 0;
    for f in m.functions.all() {
        let Ok(g) = cfg::build(&m.image, &m.functions, &m.targets, f) else { continue };
        for b in &g.blocks {
            assert!(seen.contains(&b.start.0) && seen.contains(&b.last.0), "{b:?}");
            if let Terminator::Conditional { taken } | Terminator::Jump { target: taken } = b.terminator {
                assert!(seen.contains(&taken.0), "{b:?}");
            }
            blocks += 1;
        }
    }
    assert!(blocks > 10_000, "{blocks} blocks");
}
