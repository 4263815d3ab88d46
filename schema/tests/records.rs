//! What is sealed comes back; equal values are equal bytes; a type outside this crate can be a record, and can grow.

mod common;

use dyni_schema::envelope::{self, BlobId, Kind, OpenError, Record, SealError};
use dyni_schema::{Invalid, Plan, Profile};
use proptest::prelude::*;
use rkyv::util::AlignedVec;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn profiles_come_back(value in common::profile()) {
        let sealed = envelope::seal(&value).expect("seal");
        let opened: Profile = envelope::open(&sealed).expect("open");
        prop_assert_eq!(&opened, &value);
        prop_assert_eq!(BlobId::of(&envelope::seal(&opened).expect("seal")), BlobId::of(&sealed));
        prop_assert!(sealed.len() as u64 <= Kind::Profile.max_sealed());
    }

    #[test]
    fn plans_come_back(value in common::plan()) {
        let sealed = envelope::seal(&value).expect("seal");
        let opened: Plan = envelope::open(&sealed).expect("open");
        prop_assert_eq!(&opened, &value);
        prop_assert_eq!(envelope::seal(&opened).expect("seal"), sealed);
    }
}

/// A record as another crate has it, in its second version.
#[derive(Clone, Debug, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
struct Ledger {
    pid: u32,
    state: String,
    bytes: Vec<u8>,
}

/// Its first version.
#[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
struct LedgerV1 {
    pid: u32,
    done: bool,
}

impl From<LedgerV1> for Ledger {
    fn from(old: LedgerV1) -> Self {
        Self { pid: old.pid, state: if old.done { "done".into() } else { "begun".into() }, bytes: vec![] }
    }
}

impl Record for Ledger {
    const KIND: Kind = Kind::Ledger;
    const VERSION: u16 = 2;

    fn to_payload(&self) -> Result<AlignedVec, SealError> {
        envelope::encode(self)
    }

    fn open_version(version: u16, payload: &AlignedVec) -> Result<Self, OpenError> {
        match version {
            1 => envelope::decode::<LedgerV1, Self>(payload),
            2 => envelope::decode::<Self, Self>(payload),
            _ => Err(OpenError::NoSuchVersion { kind: Self::KIND, found: version }),
        }
    }

    fn validate(&self) -> Result<(), Invalid> {
        if self.pid == 0 { Err(Invalid("no process".into())) } else { Ok(()) }
    }
}

#[test]
fn an_old_version_is_read_as_the_new() {
    let old = envelope::encode(&LedgerV1 { pid: 7, done: true }).expect("encode");
    let sealed = common::forge(Kind::Ledger, 1, &old);
    let new = Ledger { pid: 7, state: "done".into(), bytes: vec![] };
    assert_eq!(envelope::open::<Ledger>(&sealed), Ok(new.clone()));
    let sealed = envelope::seal(&new).expect("seal");
    assert_eq!(envelope::header(&sealed).map(|h| (h.kind, h.version)), Ok((Kind::Ledger, 2)));
    assert_eq!(envelope::open::<Ledger>(&sealed), Ok(new));
    let broken = common::forge(Kind::Ledger, 1, &envelope::encode(&LedgerV1 { pid: 0, done: true }).expect("encode"));
    assert_eq!(
        envelope::open::<Ledger>(&broken),
        Err(OpenError::Broken { kind: Kind::Ledger, rule: Invalid("no process".into()) })
    );
}

#[test]
fn the_header_of_one_version_does_not_fit_the_payload_of_another() {
    // A damaged version number must not make version 2's bytes be read as version 1's.
    let mut sealed = envelope::seal(&Ledger { pid: 7, state: String::new(), bytes: vec![] }).expect("seal");
    sealed[10] = 1;
    assert_eq!(envelope::open::<Ledger>(&sealed), Err(OpenError::HashMismatch(Kind::Ledger)));
}

#[test]
fn what_is_too_large_is_not_sealed() {
    let limit = Kind::Ledger.max_payload();
    let ledger = |len: u64| Ledger { pid: 1, state: String::new(), bytes: vec![0x5a; len as usize] };
    assert!(matches!(envelope::seal(&ledger(limit)), Err(SealError::TooLarge { kind: Kind::Ledger, .. })));
    let largest = envelope::seal(&ledger(limit - 64)).expect("seal");
    assert_eq!(envelope::open::<Ledger>(&largest).map(|l| l.bytes.len() as u64), Ok(limit - 64));
}
