//! The same profile and binary give the same plan on any number of threads.

use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::plan::{Module, Options, analyze};
use dyni_analyzer::targets::TargetIndex;
use dyni_schema::{Host, Method, ModuleProfile, Profile, Samples};

/// A small real program: whichever shell the host has.
fn shell() -> Image {
    Image::parse(std::fs::read("/bin/sh").expect("every host has a shell"), "sh").expect("it is a program")
}

#[test]
fn plans_do_not_depend_on_the_number_of_threads() {
    let image = shell();
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    let mut state = 1u64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut samples: Vec<(u64, u64)> = Vec::new();
    for f in functions.all() {
        let hits = random(8);
        samples.extend((0..hits).map(|_| (f.start.0 + random(u64::from(f.size)), 1 + random(40))));
    }
    samples.sort_unstable();
    samples.dedup_by_key(|s| s.0);
    let profile = Profile {
        program: "sh".into(),
        label: String::new(),
        method: Method::Clock,
        method_note: String::new(),
        host: Host::default(),
        start_s: 0,
        duration_ns: 0,
        frequency_hz: 0,
        processes: 1,
        threads: 1,
        samples: 0,
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![ModuleProfile {
            build_id: image.build_id().clone(),
            name: "sh".into(),
            samples: Samples {
                addr: samples.iter().map(|s| s.0).collect(),
                count: samples.iter().map(|s| s.1).collect(),
            },
            ..ModuleProfile::default()
        }],
    };
    let module = Module { image: &image, functions: &functions, targets: &targets };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be made");
        pool.install(|| analyze(&profile, &[module], &Options::default())).expect("the shell can be analysed")
    };
    let one = run(1);
    assert!(one.plan.function_count() > 20, "{} functions", one.plan.function_count());
    assert_eq!(one.plan.validate(), Ok(()));
    for threads in [2, 4] {
        assert_eq!(one, run(threads), "{threads} threads");
    }
}
