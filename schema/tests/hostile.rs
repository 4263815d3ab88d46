//! Bytes from anywhere: damage, lies and malice give an error that says what is wrong, never a panic, a wrong value or
//! a large allocation.

mod common;

use common::{forge, forge_parts, golden_plan, golden_profile, golden_working_set};
use dyni_schema::envelope::{self, HEADER_LEN, Kind, OpenError, Record};
use dyni_schema::{BuildId, FileKey, Plan, Profile, WorkingSet};
use proptest::prelude::*;
use std::time::{Duration, Instant};

/// The version of plans that is written.
const PLAN: u16 = <Plan as Record>::VERSION;
/// The same of profiles.
const PROFILE: u16 = <Profile as Record>::VERSION;

fn sealed_profile() -> Vec<u8> {
    envelope::seal(&golden_profile()).expect("seal")
}

fn refusal(bytes: &[u8]) -> OpenError {
    envelope::open::<Profile>(bytes).expect_err("must be refused")
}

#[test]
fn cut_off_anywhere() {
    let whole = sealed_profile();
    assert_eq!(refusal(&[]), OpenError::NotDyni);
    for len in 1..whole.len() {
        assert_eq!(refusal(&whole[..len]), OpenError::Truncated { have: len });
    }
}

#[test]
fn every_single_bit_flipped() {
    let whole = sealed_profile();
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            match envelope::open::<Profile>(&bytes) {
                Err(_) => {}
                // A zstd frame says some things in more than one way (an unused bit, a match that may be copied from
                // either of two equal places), so some flips don't change what comes out. Nothing else is let pass.
                Ok(value) => {
                    assert_eq!(value, golden_profile(), "byte {at}, bit {bit}");
                    assert!(at >= HEADER_LEN, "the header has no unused bits, byte {at}, bit {bit}");
                }
            }
        }
    }
}

#[test]
fn another_kind_version_or_file() {
    let payload = envelope::encode(&golden_profile()).expect("encode");
    let plan = envelope::seal(&golden_plan()).expect("seal");
    assert_eq!(refusal(&plan), OpenError::WrongKind { found: Kind::Plan, wanted: Kind::Profile });
    assert_eq!(refusal(&plan).to_string(), "this is a plan, where a profile is needed");
    let newer = refusal(&forge(Kind::Profile, PROFILE + 1, &payload));
    assert_eq!(newer, OpenError::NewerVersion { kind: Kind::Profile, found: PROFILE + 1, newest: PROFILE });
    assert!(newer.to_string().ends_with("update dyni"), "{newer}");
    let never = refusal(&forge(Kind::Profile, 0, &payload));
    assert_eq!(never, OpenError::NoSuchVersion { kind: Kind::Profile, found: 0 });
    assert_eq!(refusal(&forge_parts(9, 1, 0, &[], &[])), OpenError::UnknownKind(9));
    assert_eq!(refusal(b"\x7fELF and so on"), OpenError::NotDyni);
    // A copy in text mode turns CR LF into LF.
    let text_mode: Vec<u8> = sealed_profile().into_iter().filter(|&b| b != b'\r').collect();
    assert_eq!(refusal(&text_mode), OpenError::NotDyni);
}

#[test]
fn something_after_the_end() {
    let mut bytes = sealed_profile();
    bytes.push(0);
    assert_eq!(refusal(&bytes), OpenError::TrailingBytes(1));
    let twice = [sealed_profile(), sealed_profile()].concat();
    assert_eq!(refusal(&twice), OpenError::TrailingBytes(sealed_profile().len()));
    // A second frame, and the kind of frame that zstd tells its readers to skip.
    let second = zstd::bulk::compress(b"more", 3).expect("compress");
    for tail in [second.as_slice(), b"\x50\x2a\x4d\x18\x01\0\0\0x"] {
        let bytes = [sealed_profile().as_slice(), tail].concat();
        assert_eq!(refusal(&bytes), OpenError::TrailingBytes(tail.len()));
    }
}

#[test]
fn sizes_that_lie() {
    let payload = envelope::encode(&golden_profile()).expect("encode");
    let frame = zstd::bulk::compress(&payload, 3).expect("compress");
    let real = payload.len() as u64;
    for declared in [0, 1, real - 1, real + 1, 2 * real, Kind::Profile.max_payload()] {
        let e = refusal(&forge_parts(Kind::Profile.code(), PROFILE, declared, &payload, &frame));
        assert_eq!(e, OpenError::SizeMismatch { kind: Kind::Profile, declared });
    }
    for size in [Kind::Profile.max_payload() + 1, u64::MAX] {
        let e = refusal(&forge_parts(Kind::Profile.code(), PROFILE, size, &payload, &frame));
        assert_eq!(e, OpenError::TooLarge { kind: Kind::Profile, size, limit: 256 << 20 });
    }
}

#[test]
fn a_bomb_is_not_inflated() {
    // 4 GB of zeros in some 130 KB, made without having them: a frame of run-length blocks.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    let blocks = (4u64 << 30) / (128 << 10);
    for i in 0..blocks {
        let last = u32::from(i + 1 == blocks);
        bomb.extend_from_slice(&((128u32 << 10) << 3 | 1 << 1 | last).to_le_bytes()[..3]);
        bomb.push(0);
    }
    let began = Instant::now();
    for declared in [0, 4096, 1 << 20] {
        let bytes = forge_parts(Kind::Profile.code(), PROFILE, declared, &[], &bomb);
        assert_eq!(refusal(&bytes), OpenError::SizeMismatch { kind: Kind::Profile, declared });
    }
    assert!(began.elapsed() < Duration::from_secs(2), "it was inflated: {:?}", began.elapsed());
    // A frame that asks for 2 GB of history.
    let greedy = [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8][..], &bomb[6..]].concat();
    let e = refusal(&forge_parts(Kind::Profile.code(), PROFILE, 4096, &[], &greedy));
    assert!(matches!(&e, OpenError::Malformed { .. }), "{e}");
}

#[test]
fn right_bytes_of_a_record_that_breaks_its_rules() {
    let mut profile = golden_profile();
    profile.modules[0].samples.addr.reverse();
    let e = refusal(&forge(Kind::Profile, PROFILE, &envelope::encode(&profile).expect("encode")));
    assert_eq!(e.to_string(), "this profile breaks a rule and is not used: libc.so.6: samples are not sorted");
    assert!(matches!(envelope::seal(&profile), Err(envelope::SealError::Broken { .. })));

    let mut profile = golden_profile();
    profile.modules[0].name = "\x1b[2J".repeat(1 << 20);
    let e = refusal(&forge(Kind::Profile, PROFILE, &envelope::encode(&profile).expect("encode")));
    assert!(e.to_string().len() < 1000 && !e.to_string().contains('\x1b'), "{e}");

    let mut plan = golden_plan();
    plan.modules[1].functions[0].blocks[1] = 0x90;
    let e = envelope::open::<Plan>(&forge(Kind::Plan, PLAN, &envelope::encode(&plan).expect("encode")));
    assert!(matches!(e, Err(OpenError::Broken { .. })), "{e:?}");
}

#[test]
fn payloads_that_are_no_records() {
    for payload in [&[][..], &[0; 3], &[0; 64], &[0xff; 4096]] {
        let e = refusal(&forge(Kind::Profile, PROFILE, payload));
        assert!(matches!(&e, OpenError::Malformed { .. } | OpenError::Broken { .. }), "{e}");
    }
    // A plan's payload in a profile's envelope.
    let e = refusal(&forge(Kind::Profile, PROFILE, &envelope::encode(&golden_plan()).expect("encode")));
    assert!(matches!(&e, OpenError::Malformed { .. } | OpenError::Broken { .. }), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(envelope::open::<Profile>(&bytes).is_err());
        let headed = [&sealed_profile()[..HEADER_LEN], &bytes].concat();
        prop_assert!(envelope::open::<Profile>(&headed).is_err());
    }

    /// The stranger who damages a payload and then makes the hash right: only the layout check and the rules are left.
    #[test]
    fn random_changes_under_a_right_hash(
        value in common::profile(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut payload = envelope::encode(&value).expect("encode").to_vec();
        for (at, byte) in changes {
            let at = at.index(payload.len());
            payload[at] = byte;
        }
        if let Ok(value) = envelope::open::<Profile>(&forge(Kind::Profile, PROFILE, &payload)) {
            prop_assert!(value.validate().is_ok());
        }
    }

    #[test]
    fn random_changes_of_a_plan_under_a_right_hash(
        value in common::plan(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut payload = envelope::encode(&value).expect("encode").to_vec();
        for (at, byte) in changes {
            let at = at.index(payload.len());
            payload[at] = byte;
        }
        if let Ok(value) = envelope::open::<Plan>(&forge(Kind::Plan, PLAN, &payload)) {
            prop_assert!(value.validate().is_ok());
        }
    }
}

#[test]
fn a_working_set_that_breaks_its_rules() {
    let refusal = |change: &dyn Fn(&mut WorkingSet)| {
        let mut set = golden_working_set();
        change(&mut set);
        let bytes = forge(Kind::WorkingSet, 1, &envelope::encode(&set).expect("encode"));
        envelope::open::<WorkingSet>(&bytes).expect_err("must be refused").to_string()
    };
    type Rule<'a> = (&'a dyn Fn(&mut WorkingSet), &'a str);
    let rules: [Rule<'_>; 9] = [
        (&|s| s.files[0].runs.first[1] = 15, "runs are not sorted"),
        (&|s| s.files[0].runs.count[2] = 61, "a run lies outside its file"),
        (&|s| s.files[0].runs.count[2] = u32::MAX, "a run lies outside its file"),
        (&|s| s.files[0].runs.count[0] = 0, "a run is empty"),
        (&|s| s.files[0].runs.seen.truncate(1), "run columns differ in length"),
        (&|s| s.files.reverse(), "files are not sorted"),
        (&|s| s.usefulness.used = 91, "more pages were used than read"),
        (&|s| s.recordings = 0, "it was learned from nothing"),
        (&|s| s.executable = FileKey::Build(BuildId(Vec::new())), "bad build-id"),
    ];
    for (change, rule) in rules {
        let said = refusal(change);
        assert!(said.contains(rule), "{said}");
    }
    let whole = envelope::seal(&golden_working_set()).expect("seal");
    for at in HEADER_LEN..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        // A frame says some things in more than one way.
        if let Ok(value) = envelope::open::<WorkingSet>(&bytes) {
            assert_eq!(value, golden_working_set(), "byte {at}");
        }
    }
}
