//! What the archive knows of a record without opening it: the rows of its index.
//!
//! A row may come from a damaged or hostile file. It is read leniently, since what it says is for searching and for
//! people, and one bad row must not keep the others from being listed.

use dyni_schema::BuildId;
use dyni_schema::envelope::{BlobId, Kind};
use rusqlite::Row;
use rusqlite::types::ValueRef;

/// What one row gives: its place in the order of storing, and the entry; `None` if it names no record.
pub(crate) type ReadRow<T> = rusqlite::Result<Option<(i64, T)>>;

/// What the archive knows of a record without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A profile.
    Profile(ProfileEntry),
    /// A plan.
    Plan(PlanEntry),
    /// A working set.
    WorkingSet(WorkingSetEntry),
}

/// What the archive knows of a profile without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileEntry {
    /// Its id.
    pub id: BlobId,
    /// The length of its sealed bytes.
    pub bytes: u64,
    /// When it was stored, seconds since 1970-01-01 UTC.
    pub stored_s: u64,
    /// The program's name.
    pub program: String,
    /// What the user called it; may be empty.
    pub label: String,
    /// How it was taken: the name of a [`dyni_schema::Method`].
    pub method: String,
    /// When the recording began, seconds since 1970-01-01 UTC.
    pub start_s: u64,
    /// How long it took, ns.
    pub duration_ns: u64,
    /// Samples in modules that are known.
    pub samples: u64,
}

/// What the archive knows of a plan without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanEntry {
    /// Its id.
    pub id: BlobId,
    /// The length of its sealed bytes.
    pub bytes: u64,
    /// When it was stored, seconds since 1970-01-01 UTC.
    pub stored_s: u64,
    /// The program's name.
    pub program: String,
    /// What it is for: `layout` or `counting`.
    pub kind: String,
    /// The passes that made it, in the order in which they ran, with commas between.
    pub passes: String,
    /// The profile that it was made from, which may no longer be in the archive; `None` if from none.
    pub profile: Option<BlobId>,
    /// How many functions it names.
    pub functions: u64,
    /// The modules that it is for, sorted.
    pub build_ids: Vec<BuildId>,
}

/// What the archive knows of a working set without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSetEntry {
    /// Its id.
    pub id: BlobId,
    /// The length of its sealed bytes.
    pub bytes: u64,
    /// When it was stored, seconds since 1970-01-01 UTC.
    pub stored_s: u64,
    /// The program's name.
    pub program: String,
    /// What identifies its executable: the text of a [`dyni_schema::FileKey`].
    pub executable: String,
    /// The class of arguments that it is for; empty if for any.
    pub mode: String,
    /// How many recordings it was learned from.
    pub recordings: u64,
    /// How many files it names.
    pub files: u64,
    /// How many pages (of 4096 bytes) of them.
    pub pages: u64,
    /// Whether reading them ahead has helped, as far as that is known: [`dyni_schema::Usefulness::helps`].
    pub helps: bool,
}

impl Entry {
    /// Its id.
    #[must_use]
    pub const fn id(&self) -> BlobId {
        match self {
            Self::Profile(p) => p.id,
            Self::Plan(p) => p.id,
            Self::WorkingSet(p) => p.id,
        }
    }

    /// What it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Profile(_) => Kind::Profile,
            Self::Plan(_) => Kind::Plan,
            Self::WorkingSet(_) => Kind::WorkingSet,
        }
    }

    /// The program's name.
    #[must_use]
    pub fn program(&self) -> &str {
        match self {
            Self::Profile(p) => &p.program,
            Self::Plan(p) => &p.program,
            Self::WorkingSet(p) => &p.program,
        }
    }

    /// The length of its sealed bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        match self {
            Self::Profile(p) => p.bytes,
            Self::Plan(p) => p.bytes,
            Self::WorkingSet(p) => p.bytes,
        }
    }

    /// When it was stored, seconds since 1970-01-01 UTC.
    #[must_use]
    pub const fn stored_s(&self) -> u64 {
        match self {
            Self::Profile(p) => p.stored_s,
            Self::Plan(p) => p.stored_s,
            Self::WorkingSet(p) => p.stored_s,
        }
    }
}

// `substr` and lossy text: a row of a damaged or hostile archive must not keep the others from being listed.
pub(crate) const PROFILE_COLUMNS: &str = "p.seq, p.blob, b.size, p.stored_s, substr(p.program, 1, 4096),
    substr(p.label, 1, 4096), substr(p.method, 1, 64), p.start_s, p.duration_ns, p.samples
    FROM profiles p JOIN blobs b ON b.id = p.blob";
pub(crate) const PLAN_COLUMNS: &str = "p.seq, p.blob, b.size, p.stored_s, substr(p.program, 1, 4096),
    substr(p.kind, 1, 64), substr(p.passes, 1, 4096), p.profile, p.functions
    FROM plans p JOIN blobs b ON b.id = p.blob";
pub(crate) const WORKING_SET_COLUMNS: &str = "p.seq, p.blob, b.size, p.stored_s, substr(p.program, 1, 4096),
    substr(p.executable, 1, 4096), substr(p.mode, 1, 4096), p.recordings, p.files, p.pages, p.helps
    FROM working_sets p JOIN blobs b ON b.id = p.blob";

pub(crate) fn profile_entry(row: &Row<'_>) -> ReadRow<ProfileEntry> {
    let Some(id) = blob_id(row, 1) else { return Ok(None) };
    let entry = ProfileEntry {
        id,
        bytes: number(row, 2)?,
        stored_s: number(row, 3)?,
        program: text(row, 4)?,
        label: text(row, 5)?,
        method: text(row, 6)?,
        start_s: number(row, 7)?,
        duration_ns: number(row, 8)?,
        samples: number(row, 9)?,
    };
    Ok(Some((row.get(0)?, entry)))
}

pub(crate) fn plan_entry(row: &Row<'_>) -> ReadRow<PlanEntry> {
    let Some(id) = blob_id(row, 1) else { return Ok(None) };
    let entry = PlanEntry {
        id,
        bytes: number(row, 2)?,
        stored_s: number(row, 3)?,
        program: text(row, 4)?,
        kind: text(row, 5)?,
        passes: text(row, 6)?,
        profile: blob_id(row, 7).filter(|id| id.0 != [0; 32]),
        functions: number(row, 8)?,
        build_ids: Vec::new(),
    };
    Ok(Some((row.get(0)?, entry)))
}

pub(crate) fn working_set_entry(row: &Row<'_>) -> ReadRow<WorkingSetEntry> {
    let Some(id) = blob_id(row, 1) else { return Ok(None) };
    let entry = WorkingSetEntry {
        id,
        bytes: number(row, 2)?,
        stored_s: number(row, 3)?,
        program: text(row, 4)?,
        executable: text(row, 5)?,
        mode: text(row, 6)?,
        recordings: number(row, 7)?,
        files: number(row, 8)?,
        pages: number(row, 9)?,
        helps: number(row, 10)? != 0,
    };
    Ok(Some((row.get(0)?, entry)))
}

pub(crate) fn blob_id(row: &Row<'_>, at: usize) -> Option<BlobId> {
    raw(row, at).ok().and_then(BlobId::from_slice)
}

pub(crate) fn raw<'a>(row: &'a Row<'_>, at: usize) -> rusqlite::Result<&'a [u8]> {
    Ok(match row.get_ref(at)? {
        ValueRef::Blob(bytes) | ValueRef::Text(bytes) => bytes,
        _ => &[],
    })
}

pub(crate) fn text(row: &Row<'_>, at: usize) -> rusqlite::Result<String> {
    Ok(String::from_utf8_lossy(raw(row, at)?).into_owned())
}

fn number(row: &Row<'_>, at: usize) -> rusqlite::Result<u64> {
    Ok(match row.get_ref(at)? {
        ValueRef::Integer(n) => u64::try_from(n).unwrap_or(0),
        _ => 0,
    })
}
