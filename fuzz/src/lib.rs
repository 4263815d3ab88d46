//! What several fuzz targets need.

use dyni_schema::{Host, Method, ModuleProfile, Profile};

/// A profile of one module, with nothing else in it.
pub fn profile(method: Method, module: ModuleProfile) -> Profile {
    Profile {
        program: "fuzzed".to_owned(),
        label: String::new(),
        method,
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
        modules: vec![module],
    }
}
