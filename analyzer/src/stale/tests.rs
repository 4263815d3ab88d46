use super::*;
use crate::plan::annotate;
use crate::testing::{IDLE, LEAF, Program, WORK, branched, program, sampled};
use dyni_schema::{BlockShape, FunctionHash, FunctionIndex, FunctionShape, Method, Ranges, Shapes};

fn of(p: &Program) -> Module<'_> {
    Module { image: &p.image, functions: &p.functions, targets: &p.targets }
}

/// The profile as if its program had been built once before, at other addresses; and that build.
fn of_an_older_build(mut profile: Profile, p: &Program, moved: u64) -> (Profile, BuildId) {
    annotate(&mut profile, &[of(p)]);
    let was = BuildId(vec![7; 20]);
    let m = &mut profile.modules[0];
    m.build_id = was.clone();
    for column in [&mut m.samples.addr, &mut m.branches.from, &mut m.ranges.start, &mut m.ranges.end] {
        column.iter_mut().for_each(|at| *at += moved);
    }
    m.branches.to.iter_mut().filter(|to| **to != 0).for_each(|to| *to += moved);
    m.functions.start.iter_mut().for_each(|at| *at += moved);
    (profile, was)
}

/// The same without anything that only the function's code tells: as if every function had been edited.
fn edited(profile: &mut Profile) {
    profile.modules[0].functions.hash.iter_mut().for_each(|h| h.0[15] ^= 1);
}

#[test]
fn a_module_that_only_moved_keeps_everything() {
    let p = program();
    let profile = sampled(&p, &[(WORK, 9), (WORK + 6, 100), (LEAF + 3, 7), (IDLE, 2)]);
    let mut expected = profile.clone();
    annotate(&mut expected, &[of(&p)]);
    let (mut old, was) = of_an_older_build(profile, &p, 0x5000);
    // A profile as dyni wrote them before it knew of shapes serves for this, too.
    old.modules[0].shapes = Shapes::default();
    let (new, report) = carry_over(&old, &[(was, of(&p))]);
    assert_eq!(new, expected);
    assert!((report[0].share() - 1.0).abs() < 1e-9);
    assert_eq!((report[0].found_by(Rule::Hash), report[0].carried_by(Rule::Hash)), (3, 118));
}

#[test]
fn edited_functions_are_found_by_name_and_their_blocks_by_shape() {
    let p = program();
    let profile = sampled(&p, &[(WORK, 9), (WORK + 6, 100), (LEAF + 3, 7)]);
    let (mut old, was) = of_an_older_build(profile, &p, 0x5000);
    edited(&mut old);
    let (new, report) = carry_over(&old, &[(was, of(&p))]);
    assert_eq!(report[0].found_by(Rule::Name), 2);
    assert_eq!(new.modules[0].samples.addr, [WORK, WORK + 6, LEAF + 3]);
    assert_eq!(new.modules[0].samples.count, [9, 100, 7]);
}

#[test]
fn without_names_the_call_graph_and_the_place_tell() {
    let p = program();
    let profile = sampled(&p, &[(WORK + 6, 100), (LEAF + 3, 7)]);
    let (mut old, was) = of_an_older_build(profile, &p, 0x5000);
    let m = &mut old.modules[0];
    m.shapes.name.iter_mut().for_each(|n| *n = 0);
    // What is called has been edited, the caller has not.
    m.functions.hash[1].0[15] ^= 1;
    let (new, report) = carry_over(&old, &[(was.clone(), of(&p))]);
    assert_eq!((report[0].found_by(Rule::Hash), report[0].found_by(Rule::Calls)), (1, 1));
    assert_eq!(new.modules[0].samples.addr, [WORK + 6, LEAF + 3]);

    edited(&mut old);
    old.modules[0].functions.hash[1].0[15] ^= 3;
    let (new, report) = carry_over(&old, &[(was, of(&p))]);
    assert_eq!(report[0].found_by(Rule::Place), 2, "{report:?}");
    assert_eq!(new.samples, old.samples);
}

#[test]
fn counts_of_a_whole_function_are_told_by_those_of_a_part() {
    let p = program();
    // Counted: the guard and the loop. The blocks in between and behind follow.
    let ranges = [(WORK, WORK + 3, 10), (WORK + 6, WORK + 9, 70)];
    let profile = branched(&p, Method::Count, &[], &ranges);
    let (mut old, was) = of_an_older_build(profile, &p, 0x100);
    edited(&mut old);
    let (new, report) = carry_over(&old, &[(was, of(&p))]);
    let r = &new.modules[0].ranges;
    let rows: Vec<_> = r.start.iter().zip(&r.count).map(|(&s, &c)| (s - WORK, c)).collect();
    assert_eq!(rows, [(0, 10), (4, 10), (6, 70), (0xa, 10), (0x10, 0)]);
    assert!((report[0].share() - 1.0).abs() < 1e-9);
}

#[test]
fn branches_and_stretches_go_with_their_blocks() {
    let p = program();
    let branches = [(WORK + 8, WORK + 6, 50), (WORK + 0xa, LEAF, 5)];
    let profile = branched(&p, Method::Lbr, &branches, &[(WORK, WORK + 8, 5), (WORK + 6, WORK + 8, 45)]);
    let (mut old, was) = of_an_older_build(profile.clone(), &p, 0x40_0000);
    // Only the caller: nothing was seen in what it calls, so nothing but the hash tells it.
    old.modules[0].functions.hash[0].0[15] ^= 1;
    let (new, report) = carry_over(&old, &[(was, of(&p))]);
    assert_eq!(new.modules[0].branches, profile.modules[0].branches);
    assert_eq!(new.modules[0].ranges, profile.modules[0].ranges);
    assert!((report[0].share() - 1.0).abs() < 1e-9);
}

#[test]
fn what_is_gone_is_lost_and_said_to_be() {
    let p = program();
    let (mut old, was) = of_an_older_build(sampled(&p, &[(WORK + 6, 60), (LEAF, 40)]), &p, 0);
    old.samples = 100;
    edited(&mut old);
    let m = &mut old.modules[0];
    // The second looks like nothing that is there now.
    let strange = BlockShape { length: 7, hash: 1, ends: 3 | 5 << 3, ..BlockShape::default() };
    let mut shapes = m.shapes.unpack();
    shapes[1] = FunctionShape { name: 5, callees: vec![], blocks: vec![strange] };
    m.shapes = Shapes::pack(&shapes);
    let (new, report) = carry_over(&old, &[(was, of(&p))]);
    assert!((report[0].share() - 0.6).abs() < 1e-9, "{report:?}");
    assert_eq!(report[0].functions[1].now, None);
    assert_eq!(new.samples, 60);
    assert_eq!(new.modules[0].samples.total(), 60);
}

#[test]
fn other_modules_and_builds_that_are_known_stay_as_they_are() {
    let p = program();
    let profile = sampled(&p, &[(WORK, 9)]);
    assert_eq!(carry_over(&profile, &[(BuildId(vec![9; 4]), of(&p))]).1, []);
    let (old, was) = of_an_older_build(profile.clone(), &p, 0);
    let mut both = profile;
    both.modules.insert(0, old.modules[0].clone());
    both.modules.sort_by(|a, b| a.build_id.cmp(&b.build_id));
    let (new, report) = carry_over(&both, &[(was, of(&p))]);
    assert_eq!((new.modules.len(), report.len()), (2, 0));
}

/// A profile may be anybody's: whatever it claims, what comes out is well formed.
#[test]
fn no_profile_does_harm() {
    let p = program();
    let mut state = 3u64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let hashes: Vec<FunctionHash> =
        p.functions.all().iter().map(|f| crate::functions::function_hash(&p.image, f)).collect();
    for round in 0..300 {
        let method = Method::ALL[random(5) as usize];
        let sorted = |rows: &mut Vec<(u64, u64)>| {
            rows.sort_unstable();
            rows.dedup_by_key(|r| r.0);
        };
        let base = if round % 9 == 0 { u64::MAX - 0x2000 } else { 0x1000 };
        let mut rows: Vec<(u64, u64)> = (0..random(20)).map(|_| (base + random(0x60), 1 + random(1 << 40))).collect();
        sorted(&mut rows);
        let mut profile = branched(&p, method, &[], &[]);
        let m = &mut profile.modules[0];
        m.build_id = BuildId(vec![1]);
        m.samples.addr = rows.iter().map(|r| r.0).collect();
        m.samples.count = rows.iter().map(|r| r.1).collect();
        m.branches.from = m.samples.addr.clone();
        m.branches.to = rows.iter().map(|r| if r.1 % 3 == 0 { 0 } else { base + r.1 % 0x60 }).collect();
        m.branches.count = m.samples.count.clone();
        m.branches.mispredicted = m.samples.count.clone();
        m.ranges = Ranges {
            start: m.samples.addr.clone(),
            end: rows.iter().map(|r| if r.1 % 7 == 0 { u64::MAX } else { r.0 + r.1 % 16 }).collect(),
            count: rows.iter().map(|_| random(9)).collect(),
        };
        let mut starts: Vec<(u64, u64)> = (0..random(5)).map(|_| (base + random(0x60), 1 + random(60))).collect();
        sorted(&mut starts);
        let shapes: Vec<FunctionShape> = starts
            .iter()
            .map(|s| {
                let blocks = (0..s.1 / 9).map(|i| BlockShape {
                    skipped: random(3) as u16,
                    length: 1 + random(4) as u16,
                    hash: random(256) as u8,
                    ends: random(256) as u8 & !BlockShape::RUNS_ON,
                    successors: if i % 2 == 1 { vec![-1] } else { vec![] },
                });
                let blocks = blocks.collect();
                FunctionShape { name: random(2), callees: vec![random(1 << 16) as u16], blocks }
            })
            .collect();
        m.functions = FunctionIndex {
            start: starts.iter().map(|s| s.0).collect(),
            size: starts.iter().map(|s| s.1 as u32).collect(),
            hash: starts.iter().map(|s| hashes[s.1 as usize % hashes.len()]).collect(),
        };
        m.shapes = if random(4) == 0 { Shapes::default() } else { Shapes::pack(&shapes) };
        assert_eq!(profile.validate(), Ok(()));
        let (new, report) = carry_over(&profile, &[(BuildId(vec![1]), of(&p))]);
        assert_eq!(new.validate(), Ok(()));
        assert!(report[0].functions.iter().all(|f| f.carried <= f.weight));
        assert_eq!(carry_over(&profile, &[(BuildId(vec![1]), of(&p))]), (new, report), "the same twice");
    }
}
