//! The envelope around everything that is kept: how a record becomes bytes, and how bytes from anywhere become a record.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | [`MAGIC`]; its first byte and line ends show a file that went through a text-mode copy |
//! | 8 | 2 | [`Kind`], little-endian, as are all integers here |
//! | 10 | 2 | schema version of that kind |
//! | 12 | 4 | zero |
//! | 16 | 8 | size of the payload in bytes |
//! | 24 | 32 | BLAKE3 of bytes 0 to 24 and the payload |
//! | 56 | | the payload, one zstd frame |
//!
//! The payload is the record as rkyv lays it out. The header is hashed too, so that a damaged version number can't make
//! a reader take one version's payload for another's. Everything that bounds the work is outside the payload: kind,
//! version and size are judged before a byte is inflated, and inflating stops at the stated size.
//!
//! **Untrusted.** [`open`] is given files from other hosts, database blobs and the memory of target processes. It never
//! panics, never allocates more than a small multiple of the kind's limit, and gives a record only if the hash holds,
//! the layout is sound (bytecheck) and the type's own rules hold ([`Record::validate`]).
//!
//! **Deterministic.** Equal values seal to equal bytes: one compression level, no dictionary, no time, one thread.
//!
//! **A second version** of a record is added by renaming the type to `…V1`, making the new type, `From<…V1>` for it,
//! raising [`Record::VERSION`] and giving [`Record::open_version`] one more arm; the golden blob of version 1 stays in
//! the tests for ever.

mod id;

pub use id::{BlobId, BlobPrefix, NotAnId};

use crate::plan::v1::PlanV1;
use crate::profile::v1::ProfileV1;
use crate::{Invalid, Plan, Profile, WorkingSet};
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use std::fmt;
use std::io::Read;

/// The first bytes of everything sealed.
pub const MAGIC: [u8; 8] = *b"\x89dyni\r\n\x1a";

/// The length of the header in bytes; the compressed payload follows.
pub const HEADER_LEN: usize = 56;

/// The part of the header that is hashed before the payload.
const HASHED_HEADER: usize = 24;

/// A part of the format: another level gives other bytes, so other ids and other golden blobs. Level 3 packs a profile
/// of a million rows in a fraction of a second; higher ones gain little on sorted columns.
const ZSTD_LEVEL: i32 = 3;

/// The most memory a frame may ask its reader to keep as history, as a power of two: four times what our level uses.
const MAX_WINDOW_LOG: u32 = 23;

/// How much is inflated between two looks at the limit, in bytes.
const CHUNK: usize = 128 << 10;

/// What an envelope holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Kind {
    /// What was observed: [`Profile`].
    Profile = 1,
    /// Which pages a program touches: [`WorkingSet`].
    WorkingSet = 2,
    /// What is to be done: [`Plan`].
    Plan = 3,
    /// What was done to a process, kept in that process. The type is the applier's.
    Ledger = 4,
    /// Which text of a process lies in huge pages, kept in that process. The type is the applier's.
    HugeText = 5,
}

impl Kind {
    /// Every kind, by its number.
    pub const ALL: [Self; 5] = [Self::Profile, Self::WorkingSet, Self::Plan, Self::Ledger, Self::HugeText];

    /// The number in the header.
    #[must_use]
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// The kind with this number; `None` if this dyni knows none.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.code() == code)
    }

    /// The word for it in messages and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Profile => "profile",
            Self::WorkingSet => "working set",
            Self::Plan => "plan",
            Self::Ledger => "ledger",
            Self::HugeText => "huge text",
        }
    }

    /// The largest payload that is written or read, in bytes.
    #[must_use]
    pub const fn max_payload(self) -> u64 {
        match self {
            Self::Profile => 256 << 20,
            Self::WorkingSet | Self::Plan => 64 << 20,
            Self::Ledger => 16 << 20,
            Self::HugeText => 64 << 10,
        }
    }

    /// The largest sealed record in bytes. Whoever reads one from a file, a database or a process refuses more than
    /// this before reading it.
    #[must_use]
    pub const fn max_sealed(self) -> u64 {
        // zstd's own bound for input that does not compress is size + size / 256.
        HEADER_LEN as u64 + self.max_payload() + self.max_payload() / 256 + 1024
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a value was not sealed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The value breaks a rule of its type: a bug of whoever made it.
    #[error("the {kind} is not well formed and was not stored: {rule}")]
    Broken {
        /// What was to be sealed.
        kind: Kind,
        /// The rule.
        rule: Invalid,
    },
    /// The value is larger than readers accept.
    #[error("the {kind} has {size} bytes, the limit is {limit}; record for a shorter time or fewer modules")]
    TooLarge {
        /// What was to be sealed.
        kind: Kind,
        /// Its size in bytes.
        size: u64,
        /// [`Kind::max_payload`].
        limit: u64,
    },
    /// Serialising or compressing failed, which only lack of memory explains.
    #[error("could not pack the record: {0}")]
    Pack(String),
}

/// Why bytes were not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The bytes end before the record does.
    #[error("the file is cut off: it ends after {have} bytes; copy or fetch it again")]
    Truncated {
        /// How many bytes there are.
        have: usize,
    },
    /// The bytes do not begin as an envelope does.
    #[error("this is not a dyni file")]
    NotDyni,
    /// It holds something else.
    #[error("this is a {found}, where a {wanted} is needed")]
    WrongKind {
        /// What it holds.
        found: Kind,
        /// What the reader asked for.
        wanted: Kind,
    },
    /// It holds something that this dyni has never heard of.
    #[error("this holds a kind of record (number {0}) that this dyni does not know; update dyni")]
    UnknownKind(u16),
    /// It was written by a newer dyni.
    #[error("this {kind} has format version {found}, this dyni reads up to {newest}; update dyni")]
    NewerVersion {
        /// What it holds.
        kind: Kind,
        /// The version in the header.
        found: u16,
        /// The newest version known.
        newest: u16,
    },
    /// The version number was never given out, so the header is damaged.
    #[error("this {kind} claims format version {found}, which never existed: it is damaged")]
    NoSuchVersion {
        /// What it holds.
        kind: Kind,
        /// The version in the header.
        found: u16,
    },
    /// It claims, or has, more bytes than its kind may have.
    #[error("this {kind} claims {size} bytes, the limit is {limit}: it is damaged or was made to do harm")]
    TooLarge {
        /// What it holds.
        kind: Kind,
        /// The claimed size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The payload does not have the size that the header states.
    #[error("this {kind} does not have the {declared} bytes that it claims: it is damaged")]
    SizeMismatch {
        /// What it holds.
        kind: Kind,
        /// The size in the header.
        declared: u64,
    },
    /// Something follows the record.
    #[error("{0} bytes follow the end of the record: the file is damaged or is two files in one")]
    TrailingBytes(usize),
    /// The bytes are not those that were written.
    #[error("this {0} is damaged: its contents do not match its checksum")]
    HashMismatch(Kind),
    /// The bytes are what was written, but are no record: whoever wrote them was not dyni.
    #[error("this {kind} is malformed: {what}")]
    Malformed {
        /// What it claims to hold.
        kind: Kind,
        /// What is wrong, for a bug report.
        what: String,
    },
    /// The record breaks a rule that readers rely on.
    #[error("this {kind} breaks a rule and is not used: {rule}")]
    Broken {
        /// What it holds.
        kind: Kind,
        /// The rule.
        rule: Invalid,
    },
}

/// A type that can be kept. The types of this crate implement it here; the applier's ledger does so there.
///
/// [`encode`] and [`decode`] do the work for any type that derives rkyv's `Archive`, `Serialize` and `Deserialize`.
pub trait Record: Sized {
    /// What the envelope says it holds. One type per kind.
    const KIND: Kind;
    /// The version that [`Record::to_payload`] writes: the newest, counting from 1.
    const VERSION: u16;

    /// The payload of the newest version: [`encode`] of this value.
    ///
    /// # Errors
    /// [`SealError::Pack`] if memory ran out.
    fn to_payload(&self) -> Result<AlignedVec, SealError>;

    /// The value in a payload of any version from 1 to [`Record::VERSION`]: [`decode`], and `From` for older ones.
    /// The payload's hash has been checked.
    ///
    /// # Errors
    /// [`OpenError::Malformed`] if the payload has another layout, [`OpenError::NoSuchVersion`] if the version was
    /// never given out.
    fn open_version(version: u16, payload: &AlignedVec) -> Result<Self, OpenError>;

    /// Checks what every reader may rely on.
    ///
    /// # Errors
    /// The first rule that does not hold.
    fn validate(&self) -> Result<(), Invalid>;
}

impl Record for Profile {
    const KIND: Kind = Kind::Profile;
    const VERSION: u16 = 2;

    fn to_payload(&self) -> Result<AlignedVec, SealError> {
        encode(self)
    }

    fn open_version(version: u16, payload: &AlignedVec) -> Result<Self, OpenError> {
        match version {
            1 => decode::<ProfileV1, Self>(payload),
            2 => decode::<Self, Self>(payload),
            _ => Err(OpenError::NoSuchVersion { kind: Self::KIND, found: version }),
        }
    }

    fn validate(&self) -> Result<(), Invalid> {
        Self::validate(self)
    }
}

impl Record for WorkingSet {
    const KIND: Kind = Kind::WorkingSet;
    const VERSION: u16 = 1;

    fn to_payload(&self) -> Result<AlignedVec, SealError> {
        encode(self)
    }

    fn open_version(version: u16, payload: &AlignedVec) -> Result<Self, OpenError> {
        decode_only_version(version, payload)
    }

    fn validate(&self) -> Result<(), Invalid> {
        Self::validate(self)
    }
}

impl Record for Plan {
    const KIND: Kind = Kind::Plan;
    const VERSION: u16 = 2;

    fn to_payload(&self) -> Result<AlignedVec, SealError> {
        encode(self)
    }

    fn open_version(version: u16, payload: &AlignedVec) -> Result<Self, OpenError> {
        match version {
            1 => decode::<PlanV1, Self>(payload),
            2 => decode::<Self, Self>(payload),
            _ => Err(OpenError::NoSuchVersion { kind: Self::KIND, found: version }),
        }
    }

    fn validate(&self) -> Result<(), Invalid> {
        Self::validate(self)
    }
}

/// What the header of sealed bytes says. Nothing but the header has been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it holds.
    pub kind: Kind,
    /// The version of that kind's schema.
    pub version: u16,
    /// The payload's size before compression, in bytes; within the kind's limit.
    pub size: u64,
    /// BLAKE3 of the header's first 24 bytes and the payload.
    pub hash: [u8; 32],
}

/// Reads the header alone, to tell what a file is.
///
/// # Errors
/// [`OpenError::Truncated`], [`OpenError::NotDyni`], [`OpenError::UnknownKind`] or [`OpenError::TooLarge`].
pub fn header(bytes: &[u8]) -> Result<Header, OpenError> {
    let common = bytes.len().min(MAGIC.len());
    if bytes[..common] != MAGIC[..common] || bytes.is_empty() {
        return Err(OpenError::NotDyni);
    }
    let truncated = OpenError::Truncated { have: bytes.len() };
    let head: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(truncated)?;
    let code = u16::from_le_bytes(field(head, 8));
    let kind = Kind::from_code(code).ok_or(OpenError::UnknownKind(code))?;
    if field::<4>(head, 12) != [0; 4] {
        return Err(OpenError::Malformed { kind, what: "the reserved bytes of the header are not zero".into() });
    }
    let size = u64::from_le_bytes(field(head, 16));
    let limit = kind.max_payload();
    if size > limit {
        return Err(OpenError::TooLarge { kind, size, limit });
    }
    Ok(Header { kind, version: u16::from_le_bytes(field(head, 10)), size, hash: field(head, 24) })
}

/// The `N` bytes at a constant offset of the header.
fn field<const N: usize>(head: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&head[at..at + N]);
    out
}

/// The sealed bytes of a value, the same for equal values.
///
/// # Errors
/// If the value breaks its own rules, is too large, or memory runs out.
pub fn seal<T: Record>(value: &T) -> Result<Vec<u8>, SealError> {
    let kind = T::KIND;
    value.validate().map_err(|rule| SealError::Broken { kind, rule })?;
    seal_payload(kind, T::VERSION, &value.to_payload()?)
}

fn seal_payload(kind: Kind, version: u16, payload: &[u8]) -> Result<Vec<u8>, SealError> {
    let (size, limit) = (payload.len() as u64, kind.max_payload());
    if size > limit {
        return Err(SealError::TooLarge { kind, size, limit });
    }
    let frame = zstd::bulk::compress(payload, ZSTD_LEVEL).map_err(|e| SealError::Pack(e.to_string()))?;
    let mut out = Vec::with_capacity(HEADER_LEN + frame.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&kind.code().to_le_bytes());
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&size.to_le_bytes());
    let hash = record_hash(&out, payload);
    out.extend_from_slice(&hash);
    out.extend_from_slice(&frame);
    Ok(out)
}

fn record_hash(hashed_header: &[u8], payload: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(hashed_header);
    hasher.update(payload);
    *hasher.finalize().as_bytes()
}

/// The value in sealed bytes.
///
/// # Errors
/// Says what is wrong with the bytes; see [`OpenError`].
pub fn open<T: Record>(bytes: &[u8]) -> Result<T, OpenError> {
    let head = header(bytes)?;
    let (kind, version) = (head.kind, head.version);
    if kind != T::KIND {
        return Err(OpenError::WrongKind { found: kind, wanted: T::KIND });
    }
    if version > T::VERSION {
        return Err(OpenError::NewerVersion { kind, found: version, newest: T::VERSION });
    }
    if version == 0 {
        return Err(OpenError::NoSuchVersion { kind, found: version });
    }
    let sealed = bytes.len() as u64;
    if sealed > kind.max_sealed() {
        return Err(OpenError::TooLarge { kind, size: sealed, limit: kind.max_sealed() });
    }
    let payload = inflate(&head, bytes)?;
    if record_hash(&bytes[..HASHED_HEADER], &payload) != head.hash {
        return Err(OpenError::HashMismatch(kind));
    }
    let value = T::open_version(version, &payload)?;
    value.validate().map_err(|rule| OpenError::Broken { kind, rule })?;
    Ok(value)
}

/// The payload of sealed bytes. The buffer grows with what really comes out, never to what the header merely claims.
fn inflate(head: &Header, bytes: &[u8]) -> Result<AlignedVec, OpenError> {
    let kind = head.kind;
    let malformed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => OpenError::Truncated { have: bytes.len() },
        _ => OpenError::Malformed { kind, what: format!("it does not unpack ({e})") },
    };
    let mismatch = OpenError::SizeMismatch { kind, declared: head.size };
    let mut decoder = zstd::stream::read::Decoder::with_buffer(&bytes[HEADER_LEN..]).map_err(malformed)?.single_frame();
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(malformed)?;
    let mut payload = AlignedVec::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match decoder.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) if (payload.len() + n) as u64 > head.size => return Err(mismatch),
            Ok(n) => payload.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(malformed(e)),
        }
    }
    let rest = decoder.finish();
    if payload.len() as u64 != head.size {
        return Err(mismatch);
    }
    if !rest.is_empty() {
        return Err(OpenError::TrailingBytes(rest.len()));
    }
    Ok(payload)
}

/// The rkyv bytes of a value: what [`Record::to_payload`] returns.
///
/// # Errors
/// [`SealError::Pack`] if memory ran out or the value is beyond what 32-bit offsets reach.
pub fn encode<T>(value: &T) -> Result<AlignedVec, SealError>
where
    T: for<'a> rkyv::Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>,
{
    rkyv::to_bytes::<rancor::Error>(value).map_err(|e| SealError::Pack(e.to_string()))
}

/// The value in rkyv bytes that hold a `V`, converted to the record's newest type `T`: what [`Record::open_version`]
/// does for each version.
///
/// # Errors
/// [`OpenError::Malformed`] if the bytes are not the layout of a `V`.
pub fn decode<V, T>(payload: &AlignedVec) -> Result<T, OpenError>
where
    V: rkyv::Archive,
    V::Archived:
        for<'a> CheckBytes<HighValidator<'a, rancor::Error>> + rkyv::Deserialize<V, HighDeserializer<rancor::Error>>,
    T: Record + From<V>,
{
    rkyv::from_bytes::<V, rancor::Error>(payload)
        .map(T::from)
        .map_err(|e| OpenError::Malformed { kind: T::KIND, what: format!("{e}") })
}

/// What [`Record::open_version`] does for a record of which there has been one version only.
///
/// # Errors
/// [`OpenError::NoSuchVersion`] for any other than 1; [`OpenError::Malformed`] as for [`decode`].
pub fn decode_only_version<T>(version: u16, payload: &AlignedVec) -> Result<T, OpenError>
where
    T: Record + rkyv::Archive,
    T::Archived:
        for<'a> CheckBytes<HighValidator<'a, rancor::Error>> + rkyv::Deserialize<T, HighDeserializer<rancor::Error>>,
{
    match version {
        1 => decode::<T, T>(payload),
        _ => Err(OpenError::NoSuchVersion { kind: T::KIND, found: version }),
    }
}

/// The identity of sealed bytes: their BLAKE3 hash.
#[must_use]
pub fn content_id(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}
