//! Records to store, and the test binary as another process.
// Each test file uses its own part of this.
#![allow(dead_code)]

use dyni_schema::{
    BuildId, FileKey, FileSet, FunctionHash, FunctionPlan, Host, Method, ModulePlan, ModuleProfile, Plan, PlanKind,
    Profile, Recorder, Runs, Samples, Usefulness, WorkingSet,
};
use std::path::Path;
use std::process::Command;

/// A profile that differs from every other number's.
pub fn profile(program: &str, number: u64) -> Profile {
    let module = |id: u8, name: &str| ModuleProfile {
        build_id: BuildId(vec![id; 20]),
        name: name.into(),
        path: format!("/usr/lib/{name}"),
        samples: Samples { addr: vec![0x1000, 0x2000 + number], count: vec![1, number + 1] },
        ..ModuleProfile::default()
    };
    Profile {
        program: program.into(),
        label: format!("number {number}"),
        method: Method::Clock,
        method_note: String::new(),
        host: Host { cpu: "a processor".into(), kernel: "6.1.0".into() },
        start_s: 1_700_000_000 + number,
        duration_ns: 10_000_000_000,
        frequency_hz: 4000,
        processes: 1,
        threads: 4,
        samples: number + 2,
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![module(1, "libc.so.6"), module(100 + program.len() as u8, program)],
    }
}

/// A profile whose sealed bytes are at least some hundred kilobytes, because nothing in it repeats.
pub fn large_profile(number: u64) -> Profile {
    let mut profile = profile("large", number);
    let mut state = number;
    let samples = &mut profile.modules[0].samples;
    *samples = Samples::default();
    for i in 0..40_000u64 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        samples.addr.push((i << 32) | (state >> 32));
        samples.count.push((state >> 20) | 1);
    }
    profile
}

/// A plan for the modules of [`profile`].
pub fn plan(program: &str, weight: u64) -> Plan {
    let function = FunctionPlan {
        start: 0x1000,
        size: 0x40,
        hash: FunctionHash([7; 16]),
        blocks: vec![0, 0x20, 0x10],
        hot: 2,
        entries: vec![0x20],
        probes: Vec::new(),
        calls: Vec::new(),
        weight,
    };
    let module = |id: u8, name: &str| ModulePlan {
        build_id: BuildId(vec![id; 20]),
        name: name.into(),
        functions: vec![function.clone()],
    };
    Plan {
        program: program.into(),
        kind: PlanKind::Layout,
        passes: vec!["infer".into(), "exttsp".into()],
        profile: [9; 32],
        modules: vec![module(1, "libc.so.6"), module(100 + program.len() as u8, program)],
    }
}

/// What is touched of one file.
pub fn working_set(executable: &FileKey, mode: &str, recordings: u32, usefulness: Usefulness) -> WorkingSet {
    let mut runs = Runs::default();
    (3..9).for_each(|page| runs.push(page, 255, 0));
    WorkingSet {
        program: "clang".into(),
        executable: executable.clone(),
        mode: mode.into(),
        recordings,
        recorder: Recorder::Pagemap,
        granule: 16,
        deadline_ns: 1,
        updated_s: 1,
        usefulness,
        files: vec![FileSet { key: executable.clone(), path: "/usr/bin/clang".into(), size: 1 << 20, runs }],
    }
}

/// An executable that has a build-id.
pub fn build(n: u8) -> FileKey {
    FileKey::Build(BuildId(vec![n; 20]))
}

/// The variable that tells a test that it is run by another one, and on which archive to work.
pub const ARCHIVE: &str = "DYNI_TEST_CHILD_ARCHIVE";

/// One `#[ignore]`d test of this binary as a process of its own.
pub fn child(test: &str, archive: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1", "--quiet"]).env(ARCHIVE, archive);
    command
}
