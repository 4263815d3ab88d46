//! BOLT's profiles. What was read is written so that it is read the same.
#![no_main]

use dyni_profiles::fdata::Fdata;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(read) = Fdata::read(data) else { return };
    let mut written = Vec::new();
    read.write(&mut written).expect("memory can be written to");
    let again = Fdata::read(&written[..]).expect("what was written can be read");
    let mut twice = Vec::new();
    again.write(&mut twice).expect("memory can be written to");
    assert!(written == twice);
});
