//! Times the analyzer on one binary under made-up samples, always the same ones for a binary:
//! `cargo run --release -p dyni-analyzer --example analyze_bench -- /usr/sbin/mariadbd [SAMPLES [PASSES]]`.
//!
//! Functions get samples by Zipf's law; in each, a few random walks over its instructions decide where they fall.

use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::passes::PassSet;
use dyni_analyzer::plan::{Module, Options, analyze};
use dyni_analyzer::stats::BeforeAfter;
use dyni_analyzer::targets::TargetIndex;
use dyni_schema::{Host, Method, ModuleProfile, Profile, Samples};
use std::collections::BTreeMap;
use std::time::Instant;

/// A generator whose numbers are the same everywhere (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: analyze_bench BINARY [SAMPLES [PASSES]]")?;
    let samples: u64 = args.next().map_or(Ok(200_000), |n| n.parse())?;
    let passes = PassSet::parse(&args.next().unwrap_or_else(|| "all".to_owned()))?;

    let start = Instant::now();
    let mut last = start;
    let mut phase = |name: &str| {
        println!("{name:<28}{:>9.1} ms", last.elapsed().as_secs_f64() * 1e3);
        last = Instant::now();
    };
    let image = Image::parse(std::fs::read(&path)?, path.rsplit('/').next().unwrap_or(&path))?;
    phase("read and parse the image");
    let functions = Functions::find(&image);
    phase("find functions");
    let targets = TargetIndex::build(&image, &functions);
    phase("index targets");
    let profile = synthesize(&image, &functions, samples);
    phase("(make samples)");
    let module = Module { image: &image, functions: &functions, targets: &targets };
    let analysis = analyze(&profile, &[module], &Options { passes, ..Options::default() })?;
    phase("analyze");

    let report = &analysis.modules[0];
    println!(
        "{} of {} functions seen, {} planned, {} refused; {} % of samples planned",
        report.seen,
        functions.len(),
        analysis.plan.function_count(),
        analysis.refused.len(),
        100 * report.planned / report.weight.max(1)
    );
    for stat in &report.passes {
        println!("{stat}");
    }
    print!("{}", BeforeAfter { before: &report.before, after: &report.after });
    let peak = std::fs::read_to_string("/proc/self/status")?;
    println!("{}", peak.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default());
    Ok(())
}

fn synthesize(image: &Image, functions: &Functions, samples: u64) -> Profile {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let all = functions.all();
    let chosen: Vec<usize> = (0..2000).map(|_| random.below(all.len() as u64) as usize).collect();
    let harmonic: f64 = (1..=chosen.len()).map(|i| 1.0 / i as f64).sum();
    let mut rows: BTreeMap<u64, u64> = BTreeMap::new();
    for (rank, &index) in chosen.iter().enumerate() {
        let f = &all[index];
        let share = (samples as f64 / harmonic / (rank + 1) as f64) as u64;
        // Where execution dwells: a third of the function, in stretches.
        let spots: Vec<u64> = (0..1 + f.size / 100).map(|_| random.below(u64::from(f.size))).collect();
        for _ in 0..share {
            let spot = spots[random.below(spots.len() as u64) as usize];
            let at = (spot + random.below(30)).min(u64::from(f.size) - 1);
            *rows.entry(f.start.0 + at).or_default() += 1;
        }
    }
    Profile {
        program: image.name().to_owned(),
        label: String::new(),
        method: Method::Clock,
        method_note: String::new(),
        host: Host::default(),
        start_s: 0,
        duration_ns: 0,
        frequency_hz: 0,
        processes: 1,
        threads: 1,
        samples: rows.values().sum(),
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![ModuleProfile {
            build_id: image.build_id().clone(),
            name: image.name().to_owned(),
            samples: Samples { addr: rows.keys().copied().collect(), count: rows.values().copied().collect() },
            ..ModuleProfile::default()
        }],
    }
}
