//! A part of an archive as one file, to be carried to another host: a *bundle*. How it is laid out, written and read.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 2 | format version, little-endian as are all integers here |
//! | 6 | the first dyni that can use all of it: major, minor and patch number |
//! | 4, n | a record: its length, which is not zero, and its sealed bytes (see [`dyni_schema::envelope`]); any number of these |
//! | 4 | zero: no record follows |
//! | 4 | how many there were |
//! | 32 | BLAKE3 of the first 16 bytes and the ids of all records in their order |
//!
//! An id is the hash of a record's bytes, so the last one covers the whole file, and a file that is cut off has none. Both
//! ends work on a stream: whoever reads knows only at the end that all is well, and must have used nothing before.
//!
//! **Untrusted.** What is read is bounded, one record at a time, by what really comes; a length reserves nothing.

use crate::error::{ArchiveError, Category};
use dyni_schema::envelope::{self, BlobId, Kind, OpenError};
use dyni_schema::{Plan, Profile, WorkingSet};
use std::fmt;
use std::io::{Read, Write};

/// The first bytes of a bundle; the odd ones show a file that went through a text-mode copy.
pub const MAGIC: [u8; 8] = *b"\x89dynb\r\n\x1a";

/// The length of magic, format version and needed dyni, in bytes.
pub const HEADER_LEN: usize = 16;

/// The most records of one bundle.
pub const MAX_RECORDS: u32 = 1 << 20;

/// The most bytes that the records of one bundle may have before compression, all together: it bounds a reader's work.
pub const MAX_UNPACKED: u64 = 64 << 30;

/// The format that is written.
const FORMAT: u16 = 1;

/// The first dyni that can use all that this one writes. To be raised with a new kind or version of a record.
const NEEDED: Version = Version([0, 1, 0]);

/// This dyni.
const THIS: &str = env!("CARGO_PKG_VERSION");

/// What a database of SQLite begins with, as an archive does.
const DATABASE: &[u8; HEADER_LEN] = b"SQLite format 3\0";

/// A version of dyni: major, minor and patch number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub [u16; 3]);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// Why a bundle was not written, or not read. Whatever it was, the archive is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// There was nothing to write.
    #[error("the archive has nothing of that to share")]
    Nothing,
    /// The file, or what stands for it, gave an error.
    #[error("it could not be read: {0}")]
    Read(String),
    /// The file, or what stands for it, takes no more.
    #[error("it could not be written: {0}")]
    Write(String),
    /// There was no place to keep the records until all of them were there.
    #[error("its records could not be put aside until all of them were there: {0}")]
    Spool(String),
    /// It does not begin as a bundle does.
    #[error("it is not a file that `dyni archive export` has written, nor any other format that is known here")]
    NotABundle,
    /// It is an archive, or another program's database.
    #[error("it is a database, not a file that `dyni archive export` has written")]
    Database,
    /// It ends too early.
    #[error("it is cut off: it ends after {have} bytes, without its end mark")]
    Truncated {
        /// How many bytes there are.
        have: u64,
    },
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// It, or what is to be written, is beyond what readers accept.
    #[error("it holds more than {0}")]
    TooLarge(String),
    /// It was written by a newer dyni.
    #[error("it needs dyni {needed} or newer, this is {}: {what}", THIS)]
    Newer {
        /// Which dyni it says can use it.
        needed: Version,
        /// What of it is not known here.
        what: String,
    },
    /// One of its records is as it was written, and can't be used.
    #[error("its record {number} can't be used: {why}")]
    BadRecord {
        /// Which one, counted from 1.
        number: u32,
        /// What is wrong with it.
        why: OpenError,
    },
    /// One of its records is of a kind that is kept elsewhere.
    #[error("its record {number} is a {kind}, which archives do not hold")]
    Misplaced {
        /// Which one, counted from 1.
        number: u32,
        /// What it is.
        kind: Kind,
    },
    /// It is the archive that could not be read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

impl BundleError {
    /// What the reader can do about it.
    #[must_use]
    pub fn help(&self) -> Option<&'static str> {
        Some(match self {
            Self::Nothing => "`dyni archive ls` lists what there is; what is kept for one host only is never exported",
            Self::Read(_) => "check the path and its permissions",
            Self::Write(_) => "check the path, its permissions and the room on its disk",
            Self::Spool(_) => "free some room for temporary files, or name another folder for them with SQLITE_TMPDIR",
            Self::NotABundle => "write one with `dyni archive export` on the other host",
            Self::Database => "if it is an archive, `dyni archive export --archive` with its path writes one",
            Self::Truncated { .. } | Self::Damaged(_) => "copy or export it again",
            Self::TooLarge(_) => "export less at a time, with --program or --build-id",
            Self::Newer { .. } => "update dyni",
            Self::BadRecord { .. } | Self::Misplaced { .. } => "do not trust whoever made it: dyni writes no such file",
            Self::Archive(e) => return e.help(),
        })
    }

    /// Which exit status it deserves.
    #[must_use]
    pub const fn category(&self) -> Category {
        match self {
            Self::NotABundle | Self::Database | Self::TooLarge(_) | Self::Newer { .. } => Category::Refused,
            Self::BadRecord { .. } | Self::Misplaced { .. } => Category::Refused,
            Self::Archive(e) => e.category(),
            _ => Category::Failed,
        }
    }
}

/// The kind of a sealed record that an archive can hold, once it is known to be well formed.
pub(crate) fn check(sealed: &[u8]) -> Result<Kind, OpenError> {
    let kind = envelope::header(sealed)?.kind;
    match kind {
        Kind::Profile => envelope::open::<Profile>(sealed).map(drop)?,
        Kind::Plan => envelope::open::<Plan>(sealed).map(drop)?,
        Kind::WorkingSet => envelope::open::<WorkingSet>(sealed).map(drop)?,
        // Whoever asks looks at the kind: the types are not known here.
        Kind::Ledger | Kind::HugeText => {}
    }
    Ok(kind)
}

/// What has gone by of a bundle: what its end is checked against, and its limits, which are the same at both ends.
struct Passed {
    /// What the last hash is of.
    covered: Vec<u8>,
    records: u32,
    unpacked: u64,
}

impl Passed {
    fn new(header: &[u8]) -> Self {
        Self { covered: header.to_vec(), records: 0, unpacked: 0 }
    }

    fn add(&mut self, sealed: &[u8]) -> Result<(), BundleError> {
        let claimed = envelope::header(sealed).map_or(0, |h| h.size).max(sealed.len() as u64);
        self.unpacked = self.unpacked.saturating_add(claimed);
        self.records += 1;
        if self.records > MAX_RECORDS {
            return Err(BundleError::TooLarge(format!("{MAX_RECORDS} records")));
        }
        if self.unpacked > MAX_UNPACKED {
            return Err(BundleError::TooLarge(format!("{} GB of records", MAX_UNPACKED >> 30)));
        }
        self.covered.extend_from_slice(&BlobId::of(sealed).0);
        Ok(())
    }

    fn trailer(&self) -> [u8; 36] {
        let mut bytes = [0; 36];
        bytes[..4].copy_from_slice(&self.records.to_le_bytes());
        bytes[4..].copy_from_slice(&envelope::content_id(&self.covered));
        bytes
    }
}

/// Writes a bundle, record by record.
pub(crate) struct Writer<W> {
    to: W,
    passed: Passed,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(to: W) -> Result<Self, BundleError> {
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&FORMAT.to_le_bytes());
        header.extend(NEEDED.0.iter().flat_map(|n| n.to_le_bytes()));
        let mut writer = Self { to, passed: Passed::new(&header), bytes: 0 };
        writer.write(&header)?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BundleError> {
        self.bytes += bytes.len() as u64;
        self.to.write_all(bytes).map_err(|e| BundleError::Write(e.to_string()))
    }

    /// Adds a record whose bytes are known to be well formed, and so neither empty nor too large.
    pub(crate) fn record(&mut self, sealed: &[u8]) -> Result<(), BundleError> {
        self.passed.add(sealed)?;
        self.write(&(sealed.len() as u32).to_le_bytes())?;
        self.write(sealed)
    }

    /// Writes the end; how many bytes the bundle has.
    pub(crate) fn finish(mut self) -> Result<u64, BundleError> {
        self.write(&[0; 4])?;
        self.write(&self.passed.trailer())?;
        self.to.flush().map_err(|e| BundleError::Write(e.to_string()))?;
        Ok(self.bytes)
    }
}

/// Reads a bundle, record by record.
pub(crate) struct Reader<R> {
    from: R,
    at: u64,
    needed: Version,
    passed: Passed,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(from: R) -> Result<Self, BundleError> {
        let mut reader = Self { from, at: 0, needed: NEEDED, passed: Passed::new(&[]) };
        let header = reader.up_to(HEADER_LEN as u64)?;
        if header == DATABASE {
            return Err(BundleError::Database);
        }
        let common = header.len().min(MAGIC.len());
        if header[..common] != MAGIC[..common] {
            return Err(BundleError::NotABundle);
        }
        let header: [u8; HEADER_LEN] = header.try_into().map_err(|_| BundleError::Truncated { have: reader.at })?;
        let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        reader.needed = Version([number(10), number(12), number(14)]);
        reader.passed = Passed::new(&header);
        match number(8) {
            FORMAT => Ok(reader),
            0 => Err(BundleError::Damaged("its format version never existed")),
            newer => Err(reader.newer(format!("its format is {newer}, the newest known here is {FORMAT}"))),
        }
    }

    /// What to say of something that this dyni does not know.
    fn newer(&self, what: String) -> BundleError {
        BundleError::Newer { needed: self.needed, what }
    }

    /// What to say of the record that was read last, if it can't be used.
    pub(crate) fn unusable(&self, why: OpenError) -> BundleError {
        match why {
            OpenError::UnknownKind(_) | OpenError::NewerVersion { .. } => {
                self.newer(format!("record {}: {why}", self.passed.records))
            }
            why => BundleError::BadRecord { number: self.passed.records, why },
        }
    }

    /// The same if it is of a kind that is kept elsewhere.
    pub(crate) fn misplaced(&self, kind: Kind) -> BundleError {
        BundleError::Misplaced { number: self.passed.records, kind }
    }

    fn up_to(&mut self, most: u64) -> Result<Vec<u8>, BundleError> {
        let mut bytes = Vec::new();
        let read = self.from.by_ref().take(most).read_to_end(&mut bytes);
        read.map_err(|e| BundleError::Read(e.to_string()))?;
        self.at += bytes.len() as u64;
        Ok(bytes)
    }

    fn exactly(&mut self, count: u64) -> Result<Vec<u8>, BundleError> {
        let bytes = self.up_to(count)?;
        if bytes.len() as u64 == count { Ok(bytes) } else { Err(BundleError::Truncated { have: self.at }) }
    }

    /// The sealed bytes of the next record, which nobody has looked into; `None` once the end is found to be right.
    pub(crate) fn next_record(&mut self) -> Result<Option<Vec<u8>>, BundleError> {
        let length = self.exactly(4)?;
        let length = length.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
        if length == 0 {
            return self.end().map(|()| None);
        }
        if Kind::ALL.into_iter().all(|kind| length > kind.max_sealed()) {
            return Err(BundleError::Damaged("a record claims to be larger than any may be"));
        }
        let sealed = self.exactly(length)?;
        self.passed.add(&sealed)?;
        Ok(Some(sealed))
    }

    fn end(&mut self) -> Result<(), BundleError> {
        let trailer = self.passed.trailer();
        if self.exactly(trailer.len() as u64)? != trailer {
            return Err(BundleError::Damaged("its contents do not match its checksum"));
        }
        if !self.up_to(1)?.is_empty() {
            return Err(BundleError::Damaged("something follows its end"));
        }
        Ok(())
    }
}
