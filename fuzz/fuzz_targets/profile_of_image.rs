//! Profiles that are well formed and make no sense, for a real program: this one.
#![no_main]

use std::sync::LazyLock;

use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::plan::{Module, Options, analyze};
use dyni_analyzer::targets::TargetIndex;
use dyni_schema::{Branches, Method, ModuleProfile, Profile, Ranges, Samples};
use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;

struct This {
    image: Image,
    functions: Functions,
    targets: TargetIndex,
}

/// The C library, which is smaller than the fuzzer and has all kinds of code.
static THIS: LazyLock<This> = LazyLock::new(|| {
    let maps = std::fs::read("/proc/self/maps").expect("/proc is there");
    let libc = dyni_collector::maps::parse(&maps).into_iter().find(|m| m.path.to_string_lossy().contains("libc.so"));
    let file = std::fs::read(libc.expect("there is a C library").path).expect("it can be read");
    let image = Image::parse(file, "libc.so.6").expect("it is an ELF file");
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    This { image, functions, targets }
});

/// An address near a function's, or anywhere.
fn address(u: &mut Unstructured<'_>) -> Result<u64> {
    let all = THIS.functions.all();
    let near = &all[u.choose_index(all.len())?];
    Ok(if u.ratio(1, 16)? { u64::arbitrary(u)? } else { near.start.0 + u64::from(u8::arbitrary(u)?) })
}

fn profile(u: &mut Unstructured<'_>) -> Result<Profile> {
    let counted = u.ratio(1, 2)?;
    let (mut samples, mut branches, mut ranges) = (Samples::default(), Branches::default(), Ranges::default());
    let mut places = u.arbitrary_iter::<()>()?.take(40).map(|_| Ok(0)).collect::<Result<Vec<u64>>>()?;
    places.iter_mut().try_for_each(|p| address(u).map(|a| *p = a))?;
    places.sort_unstable();
    places.dedup();
    for at in places {
        let count = u64::arbitrary(u)?.max(1);
        match u.int_in_range(0..=2)? {
            0 if !counted => {
                samples.addr.push(at);
                samples.count.push(count);
            }
            1 => {
                branches.from.push(at);
                branches.to.push(address(u)?);
                branches.count.push(count);
                branches.mispredicted.push(0);
            }
            _ => {
                ranges.start.push(at);
                ranges.end.push(at.saturating_add(u64::from(u8::arbitrary(u)?)));
                ranges.count.push(count);
            }
        }
    }
    let build_id = THIS.image.build_id().clone();
    let module = ModuleProfile { build_id, samples, branches, ranges, ..ModuleProfile::default() };
    let method = if counted { Method::Count } else { Method::Lbr };
    Ok(dyni_fuzz::profile(method, module))
}

fuzz_target!(|data: &[u8]| {
    let Ok(profile) = profile(&mut Unstructured::new(data)) else { return };
    if profile.validate().is_err() {
        return;
    }
    let modules = [Module { image: &THIS.image, functions: &THIS.functions, targets: &THIS.targets }];
    if let Ok(analysis) = analyze(&profile, &modules, &Options::default()) {
        analysis.plan.validate().expect("a plan that is made is valid");
    }
});
