//! What can go wrong with an archive: what happened and why ([`std::fmt::Display`]), and what to do ([`ArchiveError::help`]).

use dyni_schema::envelope::{BlobId, Kind, NotAnId, OpenError, SealError};
use rusqlite::ErrorCode;
use rusqlite::ffi;
use std::path::{Path, PathBuf};

/// Which exit status an error deserves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    /// It did not work.
    Failed,
    /// The request makes no sense.
    Usage,
    /// It could be tried, but would do harm.
    Refused,
}

/// Why the archive did not do what was asked. Whatever it was, the archive is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    /// There is no file.
    #[error("there is no archive at {}", .0.display())]
    Missing(PathBuf),
    /// The file or its folder can't be opened or made.
    #[error("could not open the archive {}: {why}", .path.display())]
    CannotOpen {
        /// The archive.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// There is neither a home directory nor a path given.
    #[error("there is no place for an archive: neither HOME nor XDG_DATA_HOME is set")]
    NoHome,
    /// It can be read but not written.
    #[error("the archive {} can't be written", .0.display())]
    ReadOnly(PathBuf),
    /// No room.
    #[error("no room to write to the archive {}: the disk or the quota is full", .0.display())]
    Full(PathBuf),
    /// Another process held it for too long.
    #[error("the archive {} is in use by another process", .0.display())]
    Busy(PathBuf),
    /// Not SQLite at all.
    #[error("{} is not an archive of dyni: it is not a database", .0.display())]
    NotADatabase(PathBuf),
    /// SQLite, but of another program.
    #[error("{} is not an archive of dyni: it is a database of another program", .0.display())]
    Foreign(PathBuf),
    /// Made by a newer dyni.
    #[error("the archive {} has format {found}, this dyni knows formats up to {newest}", .path.display())]
    Newer {
        /// The archive.
        path: PathBuf,
        /// Its `user_version`.
        found: i64,
        /// The newest that is known.
        newest: i64,
    },
    /// The database is damaged beyond one record.
    #[error("the archive {} is damaged: {what}", .path.display())]
    Damaged {
        /// The archive.
        path: PathBuf,
        /// What SQLite said.
        what: String,
    },
    /// One record is damaged, of a newer format or hostile; the others are not concerned.
    #[error("{kind} {} can't be used: {why}", .id.short())]
    BadRecord {
        /// Which record.
        id: BlobId,
        /// What it is said to be.
        kind: Kind,
        /// What is wrong with it.
        why: OpenError,
    },
    /// One record's bytes are not those that its id names.
    #[error("{kind} {} is damaged: its bytes are not those that were stored", .id.short())]
    ChangedRecord {
        /// Which record.
        id: BlobId,
        /// What it is said to be.
        kind: Kind,
    },
    /// What was typed is no id.
    #[error(transparent)]
    NotAnId(#[from] NotAnId),
    /// No record has this id.
    #[error("the archive has no {} whose id begins with {prefix}", .wanted.map_or("record", Kind::name))]
    NoSuchId {
        /// What was typed.
        prefix: String,
        /// What was asked for; `None` for anything.
        wanted: Option<Kind>,
    },
    /// Several records have an id that begins so.
    #[error("{prefix} could be any of {}", candidates(.found, *.more))]
    Ambiguous {
        /// What was typed.
        prefix: String,
        /// Some of them.
        found: Vec<(BlobId, Kind)>,
        /// Whether there are more.
        more: bool,
    },
    /// The id is that of another kind of record.
    #[error("{} is a {found}, where a {wanted} is needed", .id.short())]
    WrongKind {
        /// The record.
        id: BlobId,
        /// What it is.
        found: Kind,
        /// What was asked for.
        wanted: Kind,
    },
    /// Nothing is known of this program, label or set of modules.
    #[error("the archive has no {kind} for {what}")]
    NoneFor {
        /// What was asked for.
        kind: Kind,
        /// For what.
        what: String,
    },
    /// The value can't be stored.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A number is beyond what the index holds.
    #[error("the profile was not stored: its {0} is beyond any real recording")]
    OutOfRange(&'static str),
    /// Anything else: an input or output error of the disk, no memory.
    #[error("the archive {} could not be used: {what}", .path.display())]
    Sql {
        /// The archive.
        path: PathBuf,
        /// What SQLite said.
        what: String,
    },
}

fn candidates(found: &[(BlobId, Kind)], more: bool) -> String {
    let mut list: Vec<String> = found.iter().map(|(id, kind)| format!("{id:.16} ({kind})")).collect();
    if more {
        list.push("others".into());
    }
    list.join(", ")
}

impl ArchiveError {
    /// What the reader can do about it.
    #[must_use]
    pub fn help(&self) -> Option<&'static str> {
        Some(match self {
            Self::Missing(_) => "record something first (dyni record), or name another archive with --archive",
            Self::CannotOpen { .. } => "check the path and its permissions, or name another archive with --archive",
            Self::NoHome => "name an archive with --archive or DYNI_ARCHIVE",
            Self::ReadOnly(_) => "run as the archive's owner, or name another archive with --archive",
            Self::Full(_) => "free some room; `dyni archive gc` throws old records away once there is a little",
            Self::Busy(_) => "try again, or find out who holds it with `fuser`",
            Self::NotADatabase(_) | Self::Foreign(_) => "name another path with --archive; the file was not changed",
            Self::Newer { .. } => "update dyni, or name another archive with --archive; the file was not changed",
            Self::Damaged { .. } => "move the file away; profiles and plans can be made again",
            Self::BadRecord { why: OpenError::NewerVersion { .. } | OpenError::UnknownKind(_), .. } => {
                "update dyni; the other records can be used"
            }
            Self::BadRecord { .. } | Self::ChangedRecord { .. } => {
                "remove it with `dyni archive rm` and its id; the other records can be used"
            }
            Self::NotAnId(_) | Self::NoSuchId { .. } => "`dyni archive ls` lists what there is",
            Self::Ambiguous { .. } => "give more digits",
            Self::NoneFor { kind: Kind::Profile, .. } => "record it first (dyni record)",
            Self::NoneFor { kind: Kind::Plan, .. } => "make one first (dyni analyze)",
            Self::WrongKind { .. } | Self::NoneFor { .. } | Self::Seal(_) | Self::OutOfRange(_) | Self::Sql { .. } => {
                return None;
            }
        })
    }

    /// Which exit status it deserves.
    #[must_use]
    pub const fn category(&self) -> Category {
        match self {
            Self::NotAnId(_) => Category::Usage,
            Self::NotADatabase(_) | Self::Foreign(_) | Self::Newer { .. } => Category::Refused,
            _ => Category::Failed,
        }
    }

    /// What SQLite's error means for the archive at `path`.
    pub(crate) fn from_sql(path: &Path, error: &rusqlite::Error) -> Self {
        let path = path.to_owned();
        let what = error.to_string();
        let Some(cause) = error.sqlite_error() else {
            // No call failed: a column holds something else than its table says.
            return Self::Damaged { path, what };
        };
        match (cause.code, cause.extended_code) {
            (ErrorCode::ReadOnly, _) => Self::ReadOnly(path),
            (ErrorCode::DiskFull, _) | (_, ffi::SQLITE_IOERR_SHMSIZE) => Self::Full(path),
            (ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed, _) => {
                Self::Busy(path)
            }
            (ErrorCode::NotADatabase, _) => Self::NotADatabase(path),
            (ErrorCode::CannotOpen | ErrorCode::PermissionDenied, _) => Self::CannotOpen { path, why: what },
            // SQLITE_ERROR here means that a table or column is not there: all statements are constants.
            (ErrorCode::DatabaseCorrupt | ErrorCode::TooBig | ErrorCode::TypeMismatch | ErrorCode::Unknown, _)
            | (_, ffi::SQLITE_IOERR_SHORT_READ) => Self::Damaged { path, what },
            _ => Self::Sql { path, what },
        }
    }
}

/// The result of everything that uses an archive.
pub type Result<T> = std::result::Result<T, ArchiveError>;
