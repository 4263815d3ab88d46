use super::*;

/// A block that runs on into the next one.
fn block(hash: u8, length: u16) -> BlockShape {
    BlockShape { hash, length, ends: BlockShape::RUNS_ON, ..BlockShape::default() }
}

fn branch(hash: u8, to: i16) -> BlockShape {
    BlockShape { ends: BlockShape::RUNS_ON | 1 << 3, successors: vec![to], ..block(hash, 7) }
}

fn last(hash: u8) -> BlockShape {
    BlockShape { ends: BlockShape::LEFT | 3 << 3, ..block(hash, 4) }
}

fn found(old: &[BlockShape], new: &[BlockShape]) -> Vec<Option<(u32, Found)>> {
    let pairs = pair(old, new);
    let mut taken: Vec<u32> = pairs.iter().flatten().map(|p| p.0).collect();
    let all = taken.len();
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), all, "a block was matched twice: {pairs:?}");
    pairs
}

const fn hash(to: u32) -> Option<(u32, Found)> {
    Some((to, Found::Hash))
}

const fn flow(to: u32) -> Option<(u32, Found)> {
    Some((to, Found::Flow))
}

#[test]
fn the_same_function_is_matched_block_by_block() {
    // Nothing but order tells its blocks apart.
    let f = [block(1, 4), block(1, 4), block(1, 4), last(1)];
    assert_eq!(found(&f, &f), [hash(0), hash(1), hash(2), hash(3)]);
}

#[test]
fn a_block_that_was_put_in_shifts_the_others() {
    let old = [block(1, 8), branch(2, 2), block(3, 5), last(4)];
    let new = [block(1, 8), block(9, 6), branch(2, 2), block(3, 5), last(4)];
    assert_eq!(found(&old, &new), [hash(0), hash(2), hash(3), hash(4)]);
    assert_eq!(found(&new, &old), [hash(0), None, hash(1), hash(2), hash(3)]);
}

#[test]
fn an_edited_block_is_known_by_what_leads_to_it() {
    // 0 branches to 2; of its two ways out one was edited, beyond a place where something was added.
    let old = [branch(1, 2), block(2, 9), last(3)];
    let new = [branch(1, 3), block(7, 21), block(8, 3), last(3)];
    assert_eq!(found(&old, &new), [hash(0), flow(1), hash(3)]);
}

#[test]
fn what_ends_otherwise_is_not_the_same_block() {
    let old = [branch(1, 2), block(2, 9), last(3)];
    let new = [branch(1, 2), last(7), last(3)];
    assert_eq!(found(&old, &new), [hash(0), None, hash(2)]);
}

#[test]
fn one_that_moved_is_found_if_there_is_but_one_like_it() {
    let old = [branch(1, 3), block(2, 40), block(3, 50), last(4)];
    let new = [branch(1, 3), block(3, 50), block(2, 40), last(4)];
    assert_eq!(found(&old, &new), [hash(0), hash(2), hash(1), hash(3)]);
}

#[test]
fn nothing_matches_nothing() {
    assert_eq!(found(&[], &[last(1)]), []);
    assert_eq!(found(&[last(1)], &[]), [None]);
}

#[test]
fn likeness_goes_from_nothing_to_all() {
    let f = [block(1, 4), block(1, 4), last(2)];
    assert_eq!(likeness(&f, &f), 1000);
    assert_eq!(likeness(&f, &[block(5, 4)]), 0);
    assert_eq!(likeness(&f, &[block(1, 4)]), 500);
    assert_eq!(likeness(&[], &[]), 0);
}

/// Whatever shapes there are, no block is matched twice, and edges that lead nowhere do no harm.
#[test]
fn any_two_functions_are_matched_in_bounds() {
    let mut state = 7u64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    for _ in 0..400 {
        let mut function = || -> Vec<BlockShape> {
            let blocks = random(12);
            let shape = |_| BlockShape {
                skipped: random(2) as u16,
                length: 1 + random(20) as u16,
                hash: random(4) as u8,
                ends: random(32) as u8,
                successors: (0..random(3)).map(|_| random(24) as i16 - 12).collect(),
            };
            (0..blocks).map(shape).collect()
        };
        let (old, new) = (function(), function());
        let pairs = found(&old, &new);
        assert_eq!(pairs.len(), old.len());
        assert!(pairs.iter().flatten().all(|p| (p.0 as usize) < new.len()));
        let same = found(&old, &old);
        assert!(same.iter().enumerate().all(|(i, p)| *p == hash(i as u32)), "{old:?}: {same:?}");
    }
}
