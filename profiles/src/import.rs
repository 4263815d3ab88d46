//! Taking [bundles](crate::bundle) into the archive.
//!
//! A bundle is known to be whole only at its end, and it may come slowly, through a pipe. So its records are put aside first
//! ([`Incoming`]), in a temporary database that SQLite keeps in memory while it is small and in a nameless file when it is not.
//! The archive is not so much as opened for that. Then all of them go in at once ([`Archive::import`]).
//!
//! What the archive has is left as it is: it neither becomes newer nor counts twice. New records are stored as the newest, in
//! the bundle's order.

use crate::archive::{Archive, insert, plan_rows, profile_rows};
use crate::bundle::{self, BundleError, Reader};
use crate::db::sql;
use crate::entry::raw;
use crate::error::{ArchiveError, Result};
use crate::working_sets::working_set_rows;
use dyni_schema::envelope::{self, BlobId, Kind, OpenError, Record};
use dyni_schema::{Plan, Profile, WorkingSet};
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use std::collections::BTreeMap;
use std::io::Read;

/// Records of whole, checked bundles that are to be imported together.
#[derive(Debug)]
pub struct Incoming {
    spool: Connection,
}

/// What became of the records of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Records that the archive did not have.
    pub new: u64,
    /// Records that it had.
    pub known: u64,
    /// Working sets in whose place it has one that was learned from as many recordings or more.
    pub left_out: u64,
}

/// What was imported, by kind.
pub type ImportReport = BTreeMap<Kind, Imported>;

impl Incoming {
    /// With no bundle yet.
    ///
    /// # Errors
    /// [`BundleError::Spool`] if there is no place for it.
    pub fn new() -> std::result::Result<Self, BundleError> {
        // A database without a name is private, and gone when it is closed.
        let opened = Connection::open("").and_then(|spool| {
            // It is never rolled back.
            spool.pragma_update(None, "journal_mode", "OFF")?;
            spool.execute_batch("CREATE TABLE records (seq INTEGER PRIMARY KEY, bytes BLOB NOT NULL) STRICT")?;
            Ok(Self { spool })
        });
        opened.map_err(|e| BundleError::Spool(e.to_string()))
    }

    /// Adds a bundle, once it is read to its end and everything in it is known to be well formed.
    ///
    /// # Errors
    /// [`BundleError`]: what is wrong with it. Damage anywhere comes before anything that is wrong with a record: a record
    /// that makes no sense is a damaged one more often than one from a newer dyni.
    pub fn read(self, from: impl Read) -> std::result::Result<Self, BundleError> {
        let spooled = |e: rusqlite::Error| BundleError::Spool(e.to_string());
        let mut reader = Reader::new(from)?;
        let mut first_bad = None;
        while let Some(sealed) = reader.next_record()? {
            if first_bad.is_some() {
                continue;
            }
            match bundle::check(&sealed) {
                Ok(Kind::Profile | Kind::Plan | Kind::WorkingSet) => {
                    let mut add =
                        self.spool.prepare_cached("INSERT INTO records (bytes) VALUES (?1)").map_err(spooled)?;
                    add.execute([&sealed]).map_err(spooled)?;
                }
                Ok(kind) => first_bad = Some(reader.misplaced(kind)),
                Err(why) => first_bad = Some(reader.unusable(why)),
            }
        }
        first_bad.map_or(Ok(self), Err)
    }

    /// Adds a profile that was made here, of another tool's recording; its id.
    ///
    /// # Errors
    /// It breaks a rule of its type or is too large, or there is no place to put it aside.
    pub fn add(&mut self, profile: &Profile) -> std::result::Result<BlobId, BundleError> {
        let sealed = envelope::seal(profile).map_err(ArchiveError::from)?;
        let added = self.spool.execute("INSERT INTO records (bytes) VALUES (?1)", [&sealed]);
        added.map_err(|e| BundleError::Spool(e.to_string()))?;
        Ok(BlobId::of(&sealed))
    }

    /// Calls `each` with every profile that has come and its id, in the bundles' order.
    ///
    /// # Errors
    /// [`BundleError::Spool`] if what was put aside can't be read again.
    pub fn each_profile(&self, mut each: impl FnMut(BlobId, Profile)) -> std::result::Result<(), BundleError> {
        let spooled = |e: rusqlite::Error| BundleError::Spool(e.to_string());
        let mut records = self.spool.prepare("SELECT bytes FROM records ORDER BY seq").map_err(spooled)?;
        let mut rows = records.query([]).map_err(spooled)?;
        while let Some(row) = rows.next().map_err(spooled)? {
            let sealed = raw(row, 0).map_err(spooled)?;
            if envelope::header(sealed).is_ok_and(|h| h.kind == Kind::Profile) {
                each(BlobId::of(sealed), open(sealed)?);
            }
        }
        Ok(())
    }
}

impl Archive {
    /// Takes in all that has come, in one transaction.
    ///
    /// # Errors
    /// If the archive can't be written, or its index can't hold a profile's numbers; then nothing was imported.
    pub fn import(&mut self, incoming: &Incoming) -> Result<ImportReport> {
        let path = self.path().to_owned();
        let spooled = |e: rusqlite::Error| ArchiveError::Sql { path: path.clone(), what: e.to_string() };
        let mut report = ImportReport::new();
        let tx = sql(&path, self.conn.transaction())?;
        let mut records = incoming.spool.prepare("SELECT bytes FROM records ORDER BY seq").map_err(spooled)?;
        let mut rows = records.query([]).map_err(spooled)?;
        while let Some(row) = rows.next().map_err(spooled)? {
            let sealed = raw(row, 0).map_err(spooled)?;
            let kind = envelope::header(sealed).map_err(|why| bad(sealed, Kind::Plan, why))?.kind;
            let of_kind = report.entry(kind).or_default();
            if sql(&path, is_known(&tx, kind, sealed))? {
                of_kind.known += 1;
                continue;
            }
            let written = match kind {
                Kind::Profile => {
                    let profile: Profile = open(sealed)?;
                    insert(&tx, kind, sealed, profile_rows(&profile)?)
                }
                Kind::WorkingSet => {
                    let set: WorkingSet = open(sealed)?;
                    if sql(&path, has_better(&tx, &set))? {
                        of_kind.left_out += 1;
                        continue;
                    }
                    insert(&tx, kind, sealed, working_set_rows(&set))
                }
                _ => {
                    let plan: Plan = open(sealed)?;
                    insert(&tx, kind, sealed, plan_rows(&plan)?)
                }
            };
            sql(&path, written)?;
            of_kind.new += 1;
        }
        sql(&path, tx.commit())?;
        Ok(report)
    }
}

fn bad(sealed: &[u8], kind: Kind, why: OpenError) -> ArchiveError {
    ArchiveError::BadRecord { id: BlobId::of(sealed), kind, why }
}

fn open<T: Record>(sealed: &[u8]) -> Result<T> {
    envelope::open(sealed).map_err(|why| bad(sealed, T::KIND, why))
}

/// Whether the archive has this very record, undamaged and where it can be found.
fn is_known(tx: &Transaction<'_>, kind: Kind, sealed: &[u8]) -> rusqlite::Result<bool> {
    let query = "SELECT 1 FROM blobs WHERE id = ?1 AND kind = ?2 AND bytes = ?3 AND (
        id IN (SELECT blob FROM profiles) OR id IN (SELECT blob FROM plans) OR id IN (SELECT blob FROM working_sets))";
    let mut query = tx.prepare_cached(query)?;
    query.exists(params![BlobId::of(sealed).0, kind.code(), sealed])
}

/// Whether the archive has a working set for the same starts, learned from as many recordings or more.
fn has_better(tx: &Transaction<'_>, set: &WorkingSet) -> rusqlite::Result<bool> {
    let query = "SELECT recordings FROM working_sets WHERE executable = ?1 AND mode = ?2";
    let mut query = tx.prepare_cached(query)?;
    let recordings = query.query_row([&set.executable.text(), &set.mode], |row| row.get::<_, i64>(0)).optional()?;
    Ok(recordings.is_some_and(|n| n >= i64::from(set.recordings)))
}
