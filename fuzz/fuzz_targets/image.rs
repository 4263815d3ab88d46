//! ELF files: the image, its functions, where execution may arrive, and a plan for all of it.
#![no_main]

use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::plan::{Module, Options, analyze};
use dyni_analyzer::targets::TargetIndex;
use dyni_schema::{Method, ModuleProfile, Samples};
use libfuzzer_sys::fuzz_target;

/// So many functions are looked at in one file.
const FUNCTIONS: usize = 64;

fuzz_target!(|data: &[u8]| {
    let Ok(image) = Image::parse(data.to_vec(), "fuzzed") else { return };
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    let mut addr: Vec<u64> = functions.all().iter().take(FUNCTIONS).map(|f| f.start.0).collect();
    addr.dedup();
    if addr.is_empty() {
        return;
    }
    let samples = Samples { count: vec![10; addr.len()], addr };
    let module = ModuleProfile { build_id: image.build_id().clone(), samples, ..ModuleProfile::default() };
    let profile = dyni_fuzz::profile(Method::Cycles, module);
    let modules = [Module { image: &image, functions: &functions, targets: &targets }];
    if let Ok(analysis) = analyze(&profile, &modules, &Options::default()) {
        let again = analyze(&profile, &modules, &Options::default()).expect("as before");
        assert!(analysis.plan == again.plan, "the same profile and file give the same plan");
    }
});
