//! What `perf record` writes.
#![no_main]

use dyni_collector::perf_data::PerfData;
use dyni_collector::perf_import::{ImportOptions, import};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(parsed) = PerfData::parse(data) else { return };
    if let Ok((profile, _)) = import(&parsed, &ImportOptions::default()) {
        profile.validate().expect("what is imported is a valid profile");
    }
});
