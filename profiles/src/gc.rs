//! What to throw away: records that nobody can find, that are old, and the oldest until the rest fits.

use crate::archive::{Archive, remove_rows};
use crate::db::sql;
use crate::entry::Entry;
use crate::error::Result;
use dyni_schema::envelope::BlobId;
use rusqlite::OptionalExtension;

/// What to keep. The default keeps every record that can be found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcPolicy {
    /// Throw away the oldest records until the sealed bytes of the rest are no more than this.
    pub max_bytes: Option<u64>,
    /// Throw away what was last stored before this time, seconds since 1970-01-01 UTC.
    pub stored_since_s: Option<u64>,
    /// Say what would be thrown away, and do nothing.
    pub dry_run: bool,
}

/// What was, or would be, thrown away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    /// The records, oldest first.
    pub removed: Vec<Entry>,
    /// Records that no list shows, because their rows or their bytes are missing.
    pub orphans: Vec<BlobId>,
    /// The sealed bytes of both together.
    pub freed_bytes: u64,
    /// How many records are left.
    pub kept: u64,
    /// Their sealed bytes.
    pub kept_bytes: u64,
}

impl Archive {
    /// Throws away what the policy does not keep.
    ///
    /// # Errors
    /// If the archive can't be read or, without [`GcPolicy::dry_run`], written.
    pub fn gc(&mut self, policy: &GcPolicy) -> Result<GcReport> {
        let report = self.gc_report(policy)?;
        if policy.dry_run {
            return Ok(report);
        }
        let path = self.path().to_owned();
        let removed = (|| {
            let tx = self.conn.transaction()?;
            for entry in &report.removed {
                // Whoever stored it again since the list was made wants it kept.
                let table = match entry {
                    Entry::Profile(_) => "SELECT stored_s FROM profiles WHERE blob = ?1",
                    Entry::Plan(_) => "SELECT stored_s FROM plans WHERE blob = ?1",
                    Entry::WorkingSet(_) => "SELECT stored_s FROM working_sets WHERE blob = ?1",
                };
                let stored: Option<i64> = tx.query_row(table, [entry.id().0], |row| row.get(0)).optional()?;
                if stored.is_none_or(|s| u64::try_from(s).unwrap_or(0) == entry.stored_s()) {
                    remove_rows(&tx, &entry.id())?;
                }
            }
            tx.execute_batch(&format!(
                "DELETE FROM profiles WHERE blob NOT IN (SELECT id FROM blobs);
                 DELETE FROM plans WHERE blob NOT IN (SELECT id FROM blobs);
                 DELETE FROM working_sets WHERE blob NOT IN (SELECT id FROM blobs);
                 DELETE FROM profile_modules WHERE profile NOT IN (SELECT blob FROM profiles);
                 DELETE FROM plan_modules WHERE plan NOT IN (SELECT blob FROM plans);
                 DELETE FROM blobs WHERE {NOT_FOUND};"
            ))?;
            tx.commit()
        })();
        sql(&path, removed)?;
        self.shrink();
        Ok(report)
    }

    fn gc_report(&self, policy: &GcPolicy) -> Result<GcReport> {
        let mut report = GcReport::default();
        let query = format!(
            "SELECT id, length(bytes) FROM blobs WHERE {NOT_FOUND}
             UNION ALL SELECT blob, 0 FROM profiles WHERE blob NOT IN (SELECT id FROM blobs)
             UNION ALL SELECT blob, 0 FROM plans WHERE blob NOT IN (SELECT id FROM blobs)
             UNION ALL SELECT blob, 0 FROM working_sets WHERE blob NOT IN (SELECT id FROM blobs)"
        );
        let orphans = self.conn.prepare(&query).and_then(|mut statement| {
            let rows = statement.query_map([], |row| {
                Ok((row.get_ref(0)?.as_bytes().ok().and_then(BlobId::from_slice), row.get::<_, i64>(1)?))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        });
        for (id, bytes) in sql(self.path(), orphans)? {
            report.freed_bytes = report.freed_bytes.saturating_add(u64::try_from(bytes).unwrap_or(0));
            report.orphans.extend(id);
        }
        let mut entries = self.list(None)?;
        // Of what was stored in the same second, a plan is worth more than a profile: it takes a profile to make.
        entries.sort_by_key(|e| (e.stored_s(), e.kind(), e.id()));
        let mut total = entries.iter().fold(0u64, |sum, e| sum.saturating_add(e.bytes()));
        for entry in entries {
            let old = policy.stored_since_s.is_some_and(|since| entry.stored_s() < since);
            if old || policy.max_bytes.is_some_and(|max| total > max) {
                total = total.saturating_sub(entry.bytes());
                report.freed_bytes = report.freed_bytes.saturating_add(entry.bytes());
                report.removed.push(entry);
            } else {
                report.kept += 1;
            }
        }
        report.kept_bytes = total;
        Ok(report)
    }
}

/// A blob that no table names.
const NOT_FOUND: &str = "id NOT IN (SELECT blob FROM profiles) AND id NOT IN (SELECT blob FROM plans)
    AND id NOT IN (SELECT blob FROM working_sets)";
