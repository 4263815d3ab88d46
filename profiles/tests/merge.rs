//! Merging loses nothing and depends neither on order nor on grouping.

use dyni_profiles::{MergeError, merge};
use dyni_schema::{
    BlockShape, Branches, BuildId, FunctionHash, FunctionIndex, FunctionShape, Host, Method, ModuleProfile, Profile,
    Ranges, Samples, Shapes,
};
use proptest::collection::btree_map;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Few keys, so that they meet; counts at both ends, so that sums saturate.
fn count() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 1..100u64, 1 => Just(u64::MAX), 1 => Just(u64::MAX / 2)]
}

fn module() -> impl Strategy<Value = ModuleProfile> {
    let rows = btree_map(0..12u64, count(), 0..8);
    let pairs = || btree_map((0..5u64, 5..9u64), (count(), 0..100u64), 0..8);
    let functions = (btree_map(0..6u64, (1..3u32, 0..3u8, 0..3u8), 0..4), any::<bool>());
    (0..2u8, rows, pairs(), pairs(), functions).prop_map(|(name, samples, branches, ranges, (functions, shaped))| {
        ModuleProfile {
            build_id: BuildId::default(),
            name: ["", "a", "b"][name as usize].into(),
            path: format!("/{name}"),
            samples: Samples { addr: samples.keys().copied().collect(), count: samples.into_values().collect() },
            branches: Branches {
                from: branches.keys().map(|k| k.0).collect(),
                to: branches.keys().map(|k| k.1).collect(),
                count: branches.values().map(|v| v.0).collect(),
                mispredicted: branches.values().map(|v| v.1).collect(),
            },
            ranges: Ranges {
                start: ranges.keys().map(|k| k.0).collect(),
                end: ranges.keys().map(|k| k.1).collect(),
                count: ranges.values().map(|v| v.0).collect(),
            },
            functions: FunctionIndex {
                start: functions.keys().copied().collect(),
                size: functions.values().map(|v| v.0).collect(),
                hash: functions.values().map(|v| FunctionHash([v.1; 16])).collect(),
            },
            // Where a function was not hot, its shape is not known.
            shapes: if shaped {
                Shapes::pack(&functions.values().map(|v| shape(v.2)).collect::<Vec<_>>())
            } else {
                Shapes::default()
            },
        }
    })
}

fn shape(hash: u8) -> FunctionShape {
    let block = BlockShape { length: 1, hash, ..BlockShape::default() };
    let blocks = if hash == 0 { vec![] } else { vec![block] };
    FunctionShape { name: hash.into(), callees: vec![], blocks }
}

fn profile() -> impl Strategy<Value = Profile> {
    let method = proptest::sample::select(vec![Method::Lbr, Method::Cycles, Method::Clock]);
    (btree_map(1..5u8, module(), 0..4), method, any::<[u64; 6]>(), any::<[u32; 2]>(), 0..2u8).prop_map(
        |(modules, method, n, m, word)| Profile {
            program: "p".into(),
            label: ["one", "two"][word as usize].into(),
            method,
            method_note: String::new(),
            host: Host { cpu: format!("cpu {word}"), kernel: "6.1".into() },
            start_s: n[0],
            duration_ns: n[1],
            frequency_hz: 4000 + u64::from(word),
            processes: m[0],
            threads: m[1],
            samples: n[2],
            outside: n[3],
            kernel: n[4],
            in_cache: n[5],
            lost: 1,
            modules: modules.into_iter().map(|(id, m)| ModuleProfile { build_id: BuildId(vec![id]), ..m }).collect(),
        },
    )
}

fn two(a: &Profile, b: &Profile) -> Profile {
    merge(&[a, b]).expect("same program")
}

/// The same sums, made in the simplest way.
fn sums(profiles: &[Profile]) -> BTreeMap<(BuildId, u64), u64> {
    let mut out = BTreeMap::new();
    for m in profiles.iter().flat_map(|p| &p.modules) {
        for (addr, count) in m.samples.iter() {
            let sum: &mut u64 = out.entry((m.build_id.clone(), addr.0)).or_default();
            *sum = sum.saturating_add(count);
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn order_does_not_matter(a in profile(), b in profile()) {
        prop_assert_eq!(two(&a, &b), two(&b, &a));
    }

    #[test]
    fn grouping_does_not_matter(a in profile(), b in profile(), c in profile()) {
        let left = two(&two(&a, &b), &c);
        prop_assert_eq!(&left, &two(&a, &two(&b, &c)));
        prop_assert_eq!(&left, &merge(&[&a, &b, &c]).expect("same program"));
        prop_assert_eq!(&left, &merge(&[&c, &a, &b]).expect("same program"));
    }

    #[test]
    fn well_formed_and_complete(profiles in proptest::collection::vec(profile(), 1..6)) {
        let all: Vec<&Profile> = profiles.iter().collect();
        let merged = merge(&all).expect("same program");
        prop_assert_eq!(merged.validate(), Ok(()));
        prop_assert_eq!(sums(std::slice::from_ref(&merged)), sums(&profiles));
        prop_assert_eq!(merged.lost, profiles.len() as u64);
    }

    #[test]
    fn one_is_itself(a in profile()) {
        prop_assert_eq!(merge(&[&a]), Ok(a));
    }
}

#[test]
fn what_can_not_be_merged() {
    let base = Profile {
        program: "nginx".into(),
        label: String::new(),
        method: Method::Clock,
        method_note: String::new(),
        host: Host::default(),
        start_s: 0,
        duration_ns: 0,
        frequency_hz: 0,
        processes: 0,
        threads: 0,
        samples: 0,
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![],
    };
    let other = Profile { program: "apache".into(), ..base.clone() };
    let counted = Profile { method: Method::Count, ..base.clone() };
    assert_eq!(merge(&[]), Err(MergeError::Nothing));
    assert_eq!(merge(&[&base, &other]), Err(MergeError::Programs("apache".into(), "nginx".into())));
    assert_eq!(merge(&[&base, &counted]), Err(MergeError::Units));
    assert_eq!(merge(&[&counted, &counted]).map(|p| p.method), Ok(Method::Count));
}
