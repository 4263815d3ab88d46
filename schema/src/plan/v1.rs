//! Plans as they were written before calls through pointers were promoted.

use super::{FunctionPlan, ModulePlan, Plan, PlanKind};
use crate::{BuildId, FunctionHash};
use rkyv::{Archive, Deserialize, Serialize};

/// Version 1 of [`FunctionPlan`].
#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct FunctionPlanV1 {
    start: u64,
    size: u32,
    hash: FunctionHash,
    blocks: Vec<u32>,
    hot: u32,
    entries: Vec<u32>,
    probes: Vec<u32>,
    weight: u64,
}

/// Version 1 of [`ModulePlan`].
#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct ModulePlanV1 {
    build_id: BuildId,
    name: String,
    functions: Vec<FunctionPlanV1>,
}

/// Version 1 of [`Plan`].
#[derive(Archive, Serialize, Deserialize)]
pub(crate) struct PlanV1 {
    program: String,
    kind: PlanKind,
    passes: Vec<String>,
    profile: [u8; 32],
    modules: Vec<ModulePlanV1>,
}

impl From<PlanV1> for Plan {
    fn from(old: PlanV1) -> Self {
        let function = |f: FunctionPlanV1| FunctionPlan {
            start: f.start,
            size: f.size,
            hash: f.hash,
            blocks: f.blocks,
            hot: f.hot,
            entries: f.entries,
            probes: f.probes,
            calls: Vec::new(),
            weight: f.weight,
        };
        let module = |m: ModulePlanV1| ModulePlan {
            build_id: m.build_id,
            name: m.name,
            functions: m.functions.into_iter().map(function).collect(),
        };
        Self {
            program: old.program,
            kind: old.kind,
            passes: old.passes,
            profile: old.profile,
            modules: old.modules.into_iter().map(module).collect(),
        }
    }
}
