//! What the kernel writes to a sampler's ring buffer.
#![no_main]

use dyni_collector::records;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [kind, misc, with_stack, body @ ..] = data else { return };
    let mut branches = Vec::new();
    let parsed = records::parse(u32::from(*kind), u16::from(*misc), body, with_stack & 1 == 1, &mut branches);
    assert!(parsed.is_ok() || branches.is_empty(), "what is malformed leaves nothing behind");
});
