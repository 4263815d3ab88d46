//! Exported archives: whole ones, damaged ones, and what only looks like one.
#![no_main]

use dyni_profiles::Incoming;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let incoming = Incoming::new().expect("there is a place for it");
    // An error is fine, and said to the user; anything else that goes wrong is not.
    drop(incoming.read(data));
});
