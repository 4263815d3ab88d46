//! What of a module can be optimised: every function looked at as `analyze` and `apply` would.

use std::collections::BTreeMap;

use dyni_analyzer::cfg;
use dyni_analyzer::functions::Function;
use dyni_analyzer::plan::Reason;
use dyni_analyzer::refuse::{self, FunctionSet, module_refusal};
use dyni_collector::maps::MappedModule;
use rayon::prelude::*;
use serde::Serialize;

use crate::analyze::UNWIND_REGISTERED;
use crate::errors::Failure;
use crate::modules::Binary;
use crate::targets::Refused;

/// A module, as `dyni doctor --json` shows it.
#[derive(Debug, Default, Serialize)]
pub struct ModuleReport {
    /// Its base name.
    pub name: String,
    /// Where it is.
    pub path: String,
    /// Its build-id, hexadecimal.
    pub build_id: String,
    /// `exec` (position dependent), `pie`, `shared`, `static-pie`.
    pub kind: &'static str,
    /// Whether most functions have no name. They are found by their unwind data all the same.
    pub stripped: bool,
    /// Size of its executable segments.
    pub text_bytes: u64,
    /// Functions: stretches of code with unwind data of their own.
    pub functions: u64,
    /// Those of them that have a name.
    pub named: u64,
    /// Those of them that can be optimised.
    pub served: u64,
    /// Why the others can't.
    pub functions_refused: Vec<Refused>,
    /// Why nothing of the module is ever optimised; `null` otherwise.
    pub refused: Option<String>,
}

impl ModuleReport {
    /// A module whose file can't be taken apart.
    pub fn unreadable(mapped: &MappedModule, failure: &Failure) -> Self {
        Self {
            name: mapped.name.clone(),
            path: mapped.path.display().to_string(),
            build_id: mapped.build_id.hex(),
            refused: Some(failure.to_string()),
            ..Self::default()
        }
    }
}

/// Looks at every function of a module.
pub fn examine(binary: &Binary, path: String) -> ModuleReport {
    let Binary { image, functions, targets } = binary;
    let runtime = module_refusal(image);
    let options = refuse::Options { unwind_registered: UNWIND_REGISTERED, others_throw: false };
    let may_unwind = refuse::may_unwind(image, functions, targets, options);
    let reasons: Vec<Option<String>> = functions
        .all()
        .par_iter()
        .enumerate()
        .map(|(index, function)| match runtime {
            Some(runtime) => Some(Reason::Module(runtime).text().to_owned()),
            None => refusal(binary, index, function, &may_unwind),
        })
        .collect();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for reason in reasons.iter().flatten() {
        *counts.entry(reason.clone()).or_default() += 1;
    }
    let named = functions.all().iter().filter(|f| f.name(image).is_some()).count() as u64;
    ModuleReport {
        name: image.name().to_owned(),
        path,
        build_id: image.build_id().hex(),
        kind: image.kind().name(),
        stripped: named * 2 < functions.len() as u64,
        named,
        text_bytes: image.executable_ranges().map(|r| r.end.distance(r.start).unsigned_abs()).sum(),
        functions: functions.len() as u64,
        served: reasons.iter().filter(|r| r.is_none()).count() as u64,
        functions_refused: Refused::summed(counts),
        refused: runtime.map(|r| format!("it belongs to {}: {}", r.name, r.reason)),
    }
}

/// Why this function can't be optimised: as the analyzer decides, then whether its entry can be patched.
fn refusal(binary: &Binary, index: usize, function: &Function, may_unwind: &FunctionSet) -> Option<String> {
    if may_unwind.has(index) {
        return Some(Reason::Function(cfg::GiveUp::MayUnwind).text().to_owned());
    }
    let Binary { image, functions, targets } = binary;
    let graph = match cfg::build(image, functions, targets, function) {
        Ok(graph) => graph,
        Err(why) => return Some(Reason::Function(why).text().to_owned()),
    };
    if let Some(why) = graph.blocks.first().and_then(|b| b.keep_original) {
        return Some(Reason::Entry(why).text().to_owned());
    }
    targets.patchable(image, &graph, function.start).err().map(|why| format!("entry: {}", why.text()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn this_test_is_a_program_too() {
        let exe = std::env::current_exe().unwrap();
        let binary = Binary::read(&exe, "test").unwrap();
        let report = examine(&binary, exe.display().to_string());
        assert!(report.functions > 1000 && report.served > 0, "{report:?}");
        let refused: u64 = report.functions_refused.iter().map(|r| r.count).sum();
        assert_eq!(report.served + refused, report.functions);
        assert_eq!((report.kind, report.stripped, &report.refused), ("pie", false, &None));
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        assert!(Binary::read(Path::new("/proc/self/status"), "status").is_err());
        assert!(Binary::read(Path::new("/nonexistent"), "nothing").is_err());
    }
}
