//! Well-formed profiles and plans of every shape, and envelopes with whatever a stranger may put in them.
// Each test file uses its own part of this.
#![allow(dead_code)]

use dyni_schema::envelope::{HEADER_LEN, Kind, MAGIC};
use dyni_schema::{
    BlockShape, Branches, BuildId, CallSite, FileKey, FileSet, FunctionHash, FunctionIndex, FunctionPlan,
    FunctionShape, Host, InodeKey, Method, ModulePlan, ModuleProfile, Plan, PlanKind, Profile, Ranges, Recorder, Runs,
    Samples, Shapes, Usefulness, WorkingSet,
};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use std::collections::BTreeMap;

/// Mostly small numbers, sometimes any, so that ends of ranges are met.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..0x1_0000u64, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

fn count() -> impl Strategy<Value = u64> {
    number().prop_map(|n| n.max(1))
}

fn build_id() -> impl Strategy<Value = BuildId> {
    vec(any::<u8>(), 1..24).prop_map(BuildId)
}

fn hash() -> impl Strategy<Value = FunctionHash> {
    any::<[u8; 16]>().prop_map(FunctionHash)
}

fn samples() -> impl Strategy<Value = Samples> {
    btree_map(number(), count(), 0..20)
        .prop_map(|m| Samples { addr: m.keys().copied().collect(), count: m.into_values().collect() })
}

fn branches() -> impl Strategy<Value = Branches> {
    btree_map((number(), number()), (count(), number()), 0..20).prop_map(|m| Branches {
        from: m.keys().map(|k| k.0).collect(),
        to: m.keys().map(|k| k.1).collect(),
        count: m.values().map(|v| v.0).collect(),
        mispredicted: m.values().map(|v| v.1.min(v.0)).collect(),
    })
}

fn ranges() -> impl Strategy<Value = Ranges> {
    btree_map((number(), number()).prop_map(|(a, b)| (a.min(b), a.max(b))), count(), 0..20).prop_map(|m| Ranges {
        start: m.keys().map(|k| k.0).collect(),
        end: m.keys().map(|k| k.1).collect(),
        count: m.into_values().collect(),
    })
}

fn block_shape() -> impl Strategy<Value = BlockShape> {
    (0..4u16, 1..300u16, any::<[u8; 2]>(), any::<bool>()).prop_map(|(skipped, length, h, falls)| BlockShape {
        skipped,
        length,
        hash: h[0],
        ends: h[1] & !BlockShape::RUNS_ON,
        successors: if falls { vec![0] } else { vec![] },
    })
}

fn function_shape() -> impl Strategy<Value = FunctionShape> {
    (number(), vec(any::<u16>(), 0..4), vec(block_shape(), 0..6)).prop_map(|(name, callees, blocks)| FunctionShape {
        name,
        callees,
        blocks,
    })
}

fn functions() -> impl Strategy<Value = (FunctionIndex, Shapes)> {
    let function = (4096..=u32::MAX, hash(), function_shape());
    (btree_map(0..u64::MAX / 2, function, 0..10), any::<bool>()).prop_map(|(m, shaped)| {
        let index = FunctionIndex {
            start: m.keys().copied().collect(),
            size: m.values().map(|v| v.0).collect(),
            hash: m.values().map(|v| v.1).collect(),
        };
        let shapes = if shaped { Shapes::pack(m.values().map(|v| &v.2)) } else { Shapes::default() };
        (index, shapes)
    })
}

fn modules() -> impl Strategy<Value = Vec<ModuleProfile>> {
    let module = (".{0,20}", ".{0,40}", samples(), branches(), ranges(), functions());
    btree_map(build_id(), module, 0..4).prop_map(|m| {
        m.into_iter()
            .map(|(build_id, (name, path, samples, branches, ranges, (functions, shapes)))| ModuleProfile {
                build_id,
                name,
                path,
                samples,
                branches,
                ranges,
                functions,
                shapes,
            })
            .collect()
    })
}

/// A well-formed profile.
pub fn profile() -> impl Strategy<Value = Profile> {
    let words = (".{0,20}", ".{0,20}", ".{0,60}", ".{0,20}", ".{0,20}");
    (words, select(Method::ALL.to_vec()), any::<[u64; 8]>(), any::<[u32; 2]>(), modules()).prop_map(
        |((program, label, method_note, cpu, kernel), method, n, m, modules)| Profile {
            program,
            label,
            method,
            method_note,
            host: Host { cpu, kernel },
            start_s: n[0],
            duration_ns: n[1],
            frequency_hz: n[2],
            processes: m[0],
            threads: m[1],
            samples: n[3],
            outside: n[4],
            kernel: n[5],
            in_cache: n[6],
            lost: n[7],
            modules,
        },
    )
}

fn function_plan() -> impl Strategy<Value = FunctionPlan> {
    let blocks = btree_set(1..4096u32, 0..12).prop_map(|set| set.into_iter().collect::<Vec<_>>()).prop_shuffle();
    (blocks, 4096..8192u32, hash(), any::<Index>(), vec(any::<bool>(), 13), number()).prop_map(
        |(rest, size, hash, hot, chosen, weight)| {
            let blocks: Vec<u32> = std::iter::once(0).chain(rest).collect();
            let mut entries: Vec<u32> = blocks.iter().zip(&chosen).filter(|c| *c.1).map(|c| *c.0).collect();
            entries.sort_unstable();
            FunctionPlan {
                start: 0,
                size,
                hash,
                hot: hot.index(blocks.len()) as u32 + 1,
                blocks,
                entries,
                probes: Vec::new(),
                calls: chosen
                    .iter()
                    .enumerate()
                    .filter(|c| *c.1)
                    .map(|(at, _)| CallSite { at: at as u32, callee: weight })
                    .collect(),
                weight,
            }
        },
    )
}

fn module_plan(build_id: BuildId, name: String, functions: BTreeMap<u32, FunctionPlan>) -> ModulePlan {
    // The keys are slots wider than the longest function, so no two functions overlap.
    let functions = functions.into_iter().map(|(slot, f)| FunctionPlan { start: u64::from(slot) * 8192, ..f });
    ModulePlan { build_id, name, functions: functions.collect() }
}

/// A well-formed plan.
pub fn plan() -> impl Strategy<Value = Plan> {
    let functions = btree_map(any::<u32>(), function_plan(), 0..6);
    let modules = btree_map(build_id(), (".{0,20}", functions), 0..4);
    (".{0,20}", any::<bool>(), vec("[a-z-]{1,12}", 0..5), any::<[u8; 32]>(), modules).prop_map(
        |(program, counting, passes, profile, modules)| Plan {
            program,
            kind: if counting { PlanKind::Counting } else { PlanKind::Layout },
            passes,
            profile,
            modules: modules.into_iter().map(|(id, (name, f))| module_plan(id, name, f)).collect(),
        },
    )
}

/// A header with these fields and the hash that fits `payload`, followed by `frame`.
pub fn forge_parts(kind: u16, version: u16, size: u64, payload: &[u8], frame: &[u8]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&size.to_le_bytes());
    let hash = blake3::Hasher::new().update(&out).update(payload).finalize();
    out.extend_from_slice(hash.as_bytes());
    assert_eq!(out.len(), HEADER_LEN);
    out.extend_from_slice(frame);
    out
}

/// An envelope that is right in every respect, around any payload.
pub fn forge(kind: Kind, version: u16, payload: &[u8]) -> Vec<u8> {
    let frame = zstd::bulk::compress(payload, 3).expect("compress");
    forge_parts(kind.code(), version, payload.len() as u64, payload, &frame)
}

/// A profile with something in every field; the value of the golden blob, so it never changes.
pub fn golden_profile() -> Profile {
    let block = |skipped, length, successors: &[i16]| BlockShape {
        skipped,
        length,
        hash: 0xe5,
        ends: BlockShape::LEFT | if length > 0x10 { BlockShape::RUNS_ON } else { 1 << 3 },
        successors: successors.to_vec(),
    };
    let module = |id: &[u8], name: &str, base: u64| ModuleProfile {
        build_id: BuildId(id.to_vec()),
        name: name.into(),
        path: format!("/usr/lib/x86_64-linux-gnu/{name}"),
        samples: Samples { addr: vec![base + 4, base + 9, base + 0x40], count: vec![7, 1, 1 << 40] },
        branches: Branches {
            from: vec![base + 9, base + 9],
            to: vec![base, base + 0x40],
            count: vec![12, 3],
            mispredicted: vec![0, 2],
        },
        ranges: Ranges { start: vec![base, base + 0x40], end: vec![base + 9, base + 0x52], count: vec![12, 3] },
        functions: FunctionIndex {
            start: vec![base, base + 0x40],
            size: vec![0x3b, 0x20],
            hash: vec![FunctionHash([0x11; 16]), FunctionHash([0xee; 16])],
        },
        shapes: Shapes::pack(&[
            FunctionShape {
                name: 0x1234_5678_9abc_def0,
                callees: vec![7, u16::MAX],
                blocks: vec![block(0, 0x10, &[2, 1]), block(3, 0x20, &[]), block(0, 8, &[-1])],
            },
            FunctionShape::default(),
        ]),
    };
    Profile {
        program: "postgres".into(),
        label: "a Tuesday, with tea: \u{2615}".into(),
        method: Method::Clock,
        method_note: "lbr: no branch stacks; cycles: no hardware counters".into(),
        host: Host { cpu: "An x86-64 processor".into(), kernel: "6.1.0".into() },
        start_s: 1_700_000_000,
        duration_ns: 10_000_000_000,
        frequency_hz: 4000,
        processes: 9,
        threads: 11,
        samples: (1 << 41) + 16,
        outside: 3,
        kernel: 1200,
        in_cache: 1,
        lost: 5,
        modules: vec![module(&[1; 20], "libc.so.6", 0x2_8000), module(&[2; 20], "postgres", 0x10_0000)],
    }
}

/// A plan with something in every field; the value of the golden blob, so it never changes.
pub fn golden_plan() -> Plan {
    let function = |start: u64, weight: u64| FunctionPlan {
        start,
        size: 0x90,
        hash: FunctionHash([0x5a; 16]),
        blocks: vec![0, 0x40, 0x11, 0x80],
        hot: 3,
        entries: vec![0x11, 0x40],
        probes: Vec::new(),
        calls: vec![CallSite { at: 0x12, callee: 0x10_0000 }, CallSite { at: 0x44, callee: 0x10_1000 }],
        weight,
    };
    Plan {
        program: "postgres".into(),
        kind: PlanKind::Layout,
        passes: vec!["infer".into(), "reorder-blocks".into(), "split".into(), "reorder-functions".into()],
        profile: [0xab; 32],
        modules: vec![
            ModulePlan { build_id: BuildId(vec![1; 20]), name: "libc.so.6".into(), functions: vec![] },
            ModulePlan {
                build_id: BuildId(vec![2; 20]),
                name: "postgres".into(),
                functions: vec![function(0x10_1000, 900), function(0x10_0000, 40)],
            },
        ],
    }
}

/// A working set with something in every field; the value of the golden blob, so it never changes.
pub fn golden_working_set() -> WorkingSet {
    let runs = Runs { first: vec![0, 16, 40], count: vec![16, 1, 60], weight: vec![255, 7, 128], seen: vec![0, 3, 1] };
    let file = |key, path: &str| FileSet { key, path: path.into(), size: 99 * 4096 + 1, runs: runs.clone() };
    let inode = FileKey::Inode(InodeKey { device: (8, 1), inode: 77, size: 99 * 4096 + 1, modified_ns: -5 });
    WorkingSet {
        program: "clang-16".into(),
        executable: FileKey::Build(BuildId(vec![3; 20])),
        mode: "-c".into(),
        recordings: 9,
        recorder: Recorder::Pagemap,
        granule: 16,
        deadline_ns: 10_000_000_000,
        updated_s: 1_700_000_000,
        usefulness: Usefulness { starts: 2, read: 90, used: 71 },
        files: vec![
            file(FileKey::Build(BuildId(vec![3; 20])), "/usr/lib/llvm-16/bin/clang"),
            file(inode, "/usr/lib/locale/locale-archive"),
        ],
    }
}
