//! Profiles as they were written before they told what their functions look like inside.

use super::{Branches, FunctionIndex, Host, Method, ModuleProfile, Profile, Ranges, Samples};
use crate::BuildId;
use crate::shapes::Shapes;
use rkyv::{Archive, Deserialize, Serialize};

/// Version 1 of [`ModuleProfile`].
#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct ModuleProfileV1 {
    build_id: BuildId,
    name: String,
    path: String,
    samples: Samples,
    branches: Branches,
    ranges: Ranges,
    functions: FunctionIndex,
}

/// Version 1 of [`Profile`].
#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct ProfileV1 {
    program: String,
    label: String,
    method: Method,
    method_note: String,
    host: Host,
    start_s: u64,
    duration_ns: u64,
    frequency_hz: u64,
    processes: u32,
    threads: u32,
    samples: u64,
    outside: u64,
    kernel: u64,
    in_cache: u64,
    lost: u64,
    modules: Vec<ModuleProfileV1>,
}

impl From<ProfileV1> for Profile {
    fn from(old: ProfileV1) -> Self {
        let module = |m: ModuleProfileV1| ModuleProfile {
            build_id: m.build_id,
            name: m.name,
            path: m.path,
            samples: m.samples,
            branches: m.branches,
            ranges: m.ranges,
            functions: m.functions,
            shapes: Shapes::default(),
        };
        Self {
            program: old.program,
            label: old.label,
            method: old.method,
            method_note: old.method_note,
            host: old.host,
            start_s: old.start_s,
            duration_ns: old.duration_ns,
            frequency_hz: old.frequency_hz,
            processes: old.processes,
            threads: old.threads,
            samples: old.samples,
            outside: old.outside,
            kernel: old.kernel,
            in_cache: old.in_cache,
            lost: old.lost,
            modules: old.modules.into_iter().map(module).collect(),
        }
    }
}
