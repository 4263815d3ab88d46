//! The payloads of records, as they are once their envelope's hash was found right: whoever made the envelope may have made
//! the payload with ill will. What is taken for whole must come back the same from another envelope.
#![no_main]

use dyni_applier::ledger::Ledger;
use dyni_schema::envelope::{Record, open, seal};
use dyni_schema::{Plan, Profile, WorkingSet};
use libfuzzer_sys::fuzz_target;
use rkyv::util::AlignedVec;

fn read<T: Record + PartialEq>(version: u16, payload: &[u8]) {
    let mut aligned = AlignedVec::new();
    aligned.extend_from_slice(payload);
    let Ok(value) = T::open_version(version.clamp(1, T::VERSION), &aligned) else { return };
    if value.validate().is_ok() {
        let sealed = seal(&value).expect("what is valid can be sealed");
        assert!(open::<T>(&sealed).expect("what was sealed can be opened") == value);
    }
}

fuzz_target!(|data: &[u8]| {
    let [kind, version, payload @ ..] = data else { return };
    let version = u16::from(*version);
    match kind % 4 {
        0 => read::<Profile>(version, payload),
        1 => read::<Plan>(version, payload),
        2 => read::<WorkingSet>(version, payload),
        _ => read::<Ledger>(version, payload),
    }
});
