//! Working sets in the archive: one for each program and class of arguments, replaced by its successor.

use crate::archive::{Archive, remove_rows};
use crate::db::sql;
use crate::entry::blob_id;
use crate::error::Result;
use dyni_schema::envelope::{self, BlobId, BlobPrefix, Kind};
use dyni_schema::{BuildId, FileKey, WorkingSet};
use rusqlite::{OptionalExtension, Transaction, params};

/// What the archive has for a program that is about to start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForStart {
    /// The newest layout plan for a program of this name: one that has this build of its executable, or else any, as the
    /// libraries that it is for may be the same.
    pub plan: Option<BlobId>,
    /// What it touches, if reading ahead by that helps it.
    pub working_set: Option<BlobId>,
}

impl Archive {
    /// What is kept for a program that is about to start: two queries by key, for those who have no time.
    ///
    /// # Errors
    /// If the archive can't be read.
    pub fn for_start(&self, program: &str, build: Option<&BuildId>, executable: &FileKey) -> Result<ForStart> {
        let found = (|| {
            let plan = "SELECT p.blob FROM plans p WHERE p.program = ?1 AND p.kind = 'layout' ORDER BY
                 EXISTS (SELECT 1 FROM plan_modules m WHERE m.plan = p.blob AND m.build_id = ?2) DESC, p.seq DESC LIMIT 1";
            let build = build.map(BuildId::hex).unwrap_or_default();
            let plan = self.conn.query_row(plan, [program, &build], |row| Ok(blob_id(row, 0))).optional()?.flatten();
            let set = "SELECT blob FROM working_sets WHERE executable = ?1 AND helps ORDER BY seq DESC LIMIT 1";
            let set = self.conn.query_row(set, [&executable.text()], |row| Ok(blob_id(row, 0))).optional()?.flatten();
            Ok(ForStart { plan, working_set: set })
        })();
        sql(self.path(), found)
    }

    /// Stores a working set in place of the one that there was for this executable and class of arguments.
    ///
    /// # Errors
    /// [`crate::ArchiveError::Seal`] if it breaks its rules or is too large, others if the archive can't be written.
    pub fn put_working_set(&mut self, set: &WorkingSet) -> Result<BlobId> {
        let sealed = envelope::seal(set)?;
        self.put(Kind::WorkingSet, &sealed, working_set_rows(set))
    }

    /// The newest working set of an executable, whether it helps or not.
    ///
    /// # Errors
    /// If the archive can't be read, or the record can't be used.
    pub fn working_set_of(&self, executable: &FileKey) -> Result<Option<WorkingSet>> {
        let query = "SELECT blob FROM working_sets WHERE executable = ?1 ORDER BY seq DESC LIMIT 1";
        let found = self.conn.query_row(query, [&executable.text()], |row| Ok(blob_id(row, 0))).optional();
        sql(self.path(), found)?.flatten().map(|id| self.load(id)).transpose()
    }

    /// The working set whose id begins so.
    ///
    /// # Errors
    /// [`crate::ArchiveError`]: no such id, several, another kind, or a record that can't be used.
    pub fn working_set(&self, prefix: &BlobPrefix) -> Result<(BlobId, WorkingSet)> {
        let (id, _) = self.resolve(prefix, Some(Kind::WorkingSet))?;
        Ok((id, self.load(id)?))
    }
}

/// What writes a working set's row, in place of the one that there was for this executable and class of arguments.
pub(crate) fn working_set_rows(
    set: &WorkingSet,
) -> impl FnOnce(&Transaction<'_>, &[u8; 32], i64) -> rusqlite::Result<()> {
    move |tx, id, now| {
        let key = set.executable.text();
        let (files, pages) = (set.files.len() as i64, i64::try_from(set.pages()).unwrap_or(i64::MAX));
        let before = "SELECT blob FROM working_sets WHERE executable = ?1 AND mode = ?2";
        let before = tx.query_row(before, [&key, &set.mode], |row| Ok(blob_id(row, 0))).optional()?.flatten();
        tx.execute("DELETE FROM working_sets WHERE blob = ?1", [id])?;
        if let Some(before) = before.filter(|before| before.0 != *id) {
            remove_rows(tx, &before)?;
        }
        tx.execute("DELETE FROM working_sets WHERE executable = ?1 AND mode = ?2", [&key, &set.mode])?;
        tx.execute(
            "INSERT INTO working_sets (blob, stored_s, program, executable, mode, recordings, files, pages, helps)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            params![id, now, set.program, key, set.mode, set.recordings, files, pages, set.usefulness.helps()],
        )?;
        Ok(())
    }
}
