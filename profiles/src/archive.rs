//! Put and get, list and remove.

use crate::db::{self, PATIENCE, sql};
use crate::entry::{
    Entry, PLAN_COLUMNS, PROFILE_COLUMNS, PlanEntry, ProfileEntry, ReadRow, WORKING_SET_COLUMNS, WorkingSetEntry,
    blob_id, plan_entry, profile_entry, raw, text, working_set_entry,
};
use crate::error::{ArchiveError, Result};
use dyni_schema::envelope::{self, BlobId, BlobPrefix, Kind, OpenError, Record};
use dyni_schema::{BuildId, Plan, PlanKind, Profile};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How many pages are given back at a time.
const VACUUM_PAGES: u32 = 64;

/// How many candidates an ambiguous id is answered with.
const CANDIDATES: usize = 8;

/// An open archive. Several processes may have the same one open; each call is one transaction.
#[derive(Debug)]
pub struct Archive {
    pub(crate) conn: Connection,
    path: PathBuf,
}

impl Archive {
    /// Opens the archive for reading and writing; makes it and its folder if need be, and brings it up to date.
    ///
    /// # Errors
    /// [`ArchiveError`] if it can't be opened, is no archive, is a newer dyni's, is damaged or is held by another.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { conn: db::open(path, PATIENCE)?, path: path.to_owned() })
    }

    /// Opens the archive for reading alone, which works where it can't be written, too.
    ///
    /// # Errors
    /// [`ArchiveError::Missing`] if there is none, else as [`Archive::open`].
    pub fn open_read_only(path: &Path) -> Result<Self> {
        Ok(Self { conn: db::open_read_only(path, PATIENCE)?, path: path.to_owned() })
    }

    /// Opens the archive for one quick look whose answer is a hint: it may be older than the newest write, or fail while
    /// somebody writes. What is then read by its id is checked as ever.
    ///
    /// # Errors
    /// As [`Archive::open_read_only`].
    pub fn open_for_a_look(path: &Path) -> Result<Self> {
        Ok(Self { conn: db::open_for_a_look(path, PATIENCE)?, path: path.to_owned() })
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stores a profile. If it is there already it becomes the newest.
    ///
    /// # Errors
    /// [`ArchiveError::Seal`] or [`ArchiveError::OutOfRange`] if the profile can't be stored, others if the archive
    /// can't be written.
    pub fn put_profile(&mut self, profile: &Profile) -> Result<BlobId> {
        let sealed = envelope::seal(profile)?;
        self.put(Kind::Profile, &sealed, profile_rows(profile)?)
    }

    /// Stores a plan. If it is there already it becomes the newest.
    ///
    /// # Errors
    /// [`ArchiveError::Seal`] if the plan breaks its rules or is too large, others if the archive can't be written.
    pub fn put_plan(&mut self, plan: &Plan) -> Result<BlobId> {
        let sealed = envelope::seal(plan)?;
        self.put(Kind::Plan, &sealed, plan_rows(plan)?)
    }

    pub(crate) fn put(
        &mut self,
        kind: Kind,
        sealed: &[u8],
        index: impl FnOnce(&Transaction<'_>, &[u8; 32], i64) -> rusqlite::Result<()>,
    ) -> Result<BlobId> {
        let written = (|| {
            let tx = self.conn.transaction()?;
            let id = insert(&tx, kind, sealed, index)?;
            tx.commit().map(|()| id)
        })();
        sql(&self.path, written)
    }

    /// The profile whose id begins so.
    ///
    /// # Errors
    /// [`ArchiveError`]: no such id, several, another kind, or a record that can't be used.
    pub fn profile(&self, prefix: &BlobPrefix) -> Result<(BlobId, Profile)> {
        let (id, _) = self.resolve(prefix, Some(Kind::Profile))?;
        Ok((id, self.load(id)?))
    }

    /// The plan whose id begins so.
    ///
    /// # Errors
    /// As [`Archive::profile`].
    pub fn plan(&self, prefix: &BlobPrefix) -> Result<(BlobId, Plan)> {
        let (id, _) = self.resolve(prefix, Some(Kind::Plan))?;
        Ok((id, self.load(id)?))
    }

    /// The profile that a user means: `latest`, the beginning of an id, a label or a program's name; of several with
    /// that label or program, the newest.
    ///
    /// # Errors
    /// [`ArchiveError::NoneFor`] if nothing is called so, [`ArchiveError::Ambiguous`].
    pub fn find_profile(&self, text: &str) -> Result<BlobId> {
        if text == "latest" {
            return self.newest(
                "SELECT blob FROM profiles WHERE ?1 = ?1 ORDER BY seq DESC LIMIT 1",
                text,
                "any program",
            );
        }
        if let Ok(prefix) = text.parse::<BlobPrefix>() {
            match self.resolve(&prefix, Some(Kind::Profile)) {
                // Labels and programs may look like an id, as "cafe" does.
                Err(ArchiveError::NoSuchId { .. }) => {}
                other => return other.map(|(id, _)| id),
            }
        }
        let by_label_then_program = "SELECT blob FROM profiles WHERE label = ?1 OR program = ?1
             ORDER BY label = ?1 DESC, seq DESC LIMIT 1";
        self.newest(by_label_then_program, text, text)
    }

    /// The newest profile of a program.
    ///
    /// # Errors
    /// [`ArchiveError::NoneFor`] if there is none.
    pub fn latest_profile(&self, program: &str) -> Result<BlobId> {
        self.newest("SELECT blob FROM profiles WHERE program = ?1 ORDER BY seq DESC LIMIT 1", program, program)
    }

    fn newest(&self, query: &str, parameter: &str, what: &str) -> Result<BlobId> {
        let found = self.conn.query_row(query, [parameter], |row| Ok(blob_id(row, 0))).optional();
        let none = || ArchiveError::NoneFor { kind: Kind::Profile, what: quotable(what) };
        sql(&self.path, found)?.flatten().ok_or_else(none)
    }

    /// The profiles that saw any of these modules, newest first.
    ///
    /// # Errors
    /// If the archive can't be read.
    pub fn profiles_for(&self, build_ids: &[BuildId]) -> Result<Vec<ProfileEntry>> {
        let query = format!(
            "SELECT {PROFILE_COLUMNS} WHERE p.blob IN (SELECT profile FROM profile_modules WHERE build_id = ?1)"
        );
        self.for_modules(build_ids, &query, profile_entry)
    }

    /// The plans for any of these modules, newest first. A plan of another program is among them if both use a library:
    /// compare [`PlanEntry::program`], or see which modules it is for.
    ///
    /// # Errors
    /// If the archive can't be read.
    pub fn plans_for(&self, build_ids: &[BuildId]) -> Result<Vec<PlanEntry>> {
        let query =
            format!("SELECT {PLAN_COLUMNS} WHERE p.blob IN (SELECT plan FROM plan_modules WHERE build_id = ?1)");
        let mut found = self.for_modules(build_ids, &query, plan_entry)?;
        self.fill_build_ids(found.iter_mut())?;
        Ok(found)
    }

    fn for_modules<T>(&self, build_ids: &[BuildId], query: &str, read: fn(&Row<'_>) -> ReadRow<T>) -> Result<Vec<T>> {
        let mut rows: Vec<(i64, T)> = Vec::new();
        for build_id in build_ids {
            rows.extend(self.rows(query, Some(&build_id.hex()), read)?);
        }
        rows.sort_by_key(|row| Reverse(row.0));
        rows.dedup_by_key(|row| row.0);
        Ok(rows.into_iter().map(|row| row.1).collect())
    }

    /// Everything in the archive, newest first: profiles, then plans, then working sets. `program` limits it to one.
    ///
    /// # Errors
    /// If the archive can't be read.
    pub fn list(&self, program: Option<&str>) -> Result<Vec<Entry>> {
        let filter = "WHERE ?1 IS NULL OR p.program = ?1 ORDER BY p.seq DESC";
        let profiles = self.rows(&format!("SELECT {PROFILE_COLUMNS} {filter}"), program, profile_entry)?;
        let plans = self.rows(&format!("SELECT {PLAN_COLUMNS} {filter}"), program, plan_entry)?;
        let mut plans: Vec<PlanEntry> = plans.into_iter().map(|row| row.1).collect();
        self.fill_build_ids(plans.iter_mut())?;
        let profiles = profiles.into_iter().map(|row| Entry::Profile(row.1));
        let sets = self.working_sets(program)?.into_iter().map(Entry::WorkingSet);
        Ok(profiles.chain(plans.into_iter().map(Entry::Plan)).chain(sets).collect())
    }

    /// The working sets, newest first; of one program if it is named.
    ///
    /// # Errors
    /// If the archive can't be read.
    pub fn working_sets(&self, program: Option<&str>) -> Result<Vec<WorkingSetEntry>> {
        let query = format!("SELECT {WORKING_SET_COLUMNS} WHERE ?1 IS NULL OR p.program = ?1 ORDER BY p.seq DESC");
        Ok(self.rows(&query, program, working_set_entry)?.into_iter().map(|row| row.1).collect())
    }

    fn rows<T>(&self, query: &str, parameter: Option<&str>, read: fn(&Row<'_>) -> ReadRow<T>) -> Result<Vec<(i64, T)>> {
        let rows = self.conn.prepare_cached(query).and_then(|mut statement| {
            let rows = statement.query_map([parameter], read)?;
            // A row without a proper id names no record: `gc` throws it away.
            rows.filter_map(std::result::Result::transpose).collect::<rusqlite::Result<Vec<_>>>()
        });
        sql(&self.path, rows)
    }

    fn fill_build_ids<'a>(&self, plans: impl Iterator<Item = &'a mut PlanEntry>) -> Result<()> {
        let filled = (|| {
            let query = "SELECT substr(build_id, 1, 128) FROM plan_modules WHERE plan = ?1 ORDER BY build_id";
            let mut statement = self.conn.prepare_cached(query)?;
            for plan in plans {
                let ids = statement.query_map([plan.id.0], |row| Ok(BuildId::from_hex(&text(row, 0)?)))?;
                plan.build_ids = ids.filter_map(std::result::Result::transpose).collect::<rusqlite::Result<_>>()?;
            }
            Ok(())
        })();
        sql(&self.path, filled)
    }

    /// The id and the kind of the record whose id begins so, without opening it; so also of one that is damaged.
    ///
    /// # Errors
    /// [`ArchiveError::NoSuchId`], [`ArchiveError::Ambiguous`], or if the archive can't be read.
    pub fn identify(&self, prefix: &BlobPrefix) -> Result<(BlobId, Kind)> {
        self.resolve(prefix, None)
    }

    /// Removes a record. The room is given back to the disk.
    ///
    /// # Errors
    /// [`ArchiveError::NoSuchId`], [`ArchiveError::Ambiguous`], or if the archive can't be written.
    pub fn remove(&mut self, prefix: &BlobPrefix) -> Result<(BlobId, Kind)> {
        let (id, kind) = self.resolve(prefix, None)?;
        let removed = (|| {
            let tx = self.conn.transaction()?;
            remove_rows(&tx, &id)?;
            tx.commit()
        })();
        sql(&self.path, removed)?;
        self.shrink();
        Ok((id, kind))
    }

    /// Gives free pages back to the file system, as far as that works: the record is gone already, its pages are used
    /// again if they stay, and on a full disk there may be no room to move pages about.
    pub(crate) fn shrink(&self) {
        let free = || self.conn.pragma_query_value(None, "freelist_count", |row| row.get::<_, i64>(0)).unwrap_or(0);
        let mut left = free();
        while left > 0 {
            // A few at a time, so that the log stays small. A reader may keep it from being emptied; that is not worth
            // waiting for, the last close does it.
            let step = self.vacuum_some();
            let emptied = self.conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
            let now = free();
            if step.is_err() || emptied.is_err() || now >= left {
                return;
            }
            left = now;
        }
    }

    fn vacuum_some(&self) -> rusqlite::Result<()> {
        let mut statement = self.conn.prepare(&format!("PRAGMA incremental_vacuum({VACUUM_PAGES})"))?;
        let mut rows = statement.query([])?;
        // Each step gives back one page, so the statement is stepped to its end.
        while rows.next()?.is_some() {}
        Ok(())
    }

    /// The one record whose id begins so, and its kind.
    pub(crate) fn resolve(&self, prefix: &BlobPrefix, wanted: Option<Kind>) -> Result<(BlobId, Kind)> {
        let (low, high) = prefix.range();
        let query = "SELECT id, kind FROM blobs WHERE id BETWEEN ?1 AND ?2 ORDER BY id";
        let rows = self.conn.prepare_cached(query).and_then(|mut statement| {
            let rows = statement.query_map(params![low.0, high.0], |row| {
                let code: i64 = row.get(1).unwrap_or(0);
                Ok(blob_id(row, 0).map(|id| (id, u16::try_from(code).ok().and_then(Kind::from_code))))
            })?;
            rows.filter_map(std::result::Result::transpose).collect::<rusqlite::Result<Vec<_>>>()
        });
        let all = sql(&self.path, rows)?;
        // A kind that makes no sense is only good to be removed; as a plan it fails when it is opened.
        let all: Vec<(BlobId, Kind)> = all.into_iter().map(|(id, kind)| (id, kind.unwrap_or(Kind::Plan))).collect();
        let fitting: Vec<_> = all.iter().filter(|found| wanted.is_none_or(|kind| found.1 == kind)).copied().collect();
        match (fitting.as_slice(), all.as_slice(), wanted) {
            ([one], _, _) => Ok(*one),
            ([], [other], Some(wanted)) => Err(ArchiveError::WrongKind { id: other.0, found: other.1, wanted }),
            ([], _, _) => Err(ArchiveError::NoSuchId { prefix: prefix.as_str().into(), wanted }),
            (several, _, _) => Err(ArchiveError::Ambiguous {
                prefix: prefix.as_str().into(),
                found: several.iter().take(CANDIDATES).copied().collect(),
                more: several.len() > CANDIDATES,
            }),
        }
    }

    /// The record with exactly this id.
    pub(crate) fn load<T: Record>(&self, id: BlobId) -> Result<T> {
        self.open_with(id, T::KIND, envelope::open).map(|(value, _)| value)
    }

    /// What `open` makes of the record with exactly this id, and its sealed bytes.
    pub(crate) fn open_with<T>(
        &self,
        id: BlobId,
        kind: Kind,
        open: impl FnOnce(&[u8]) -> std::result::Result<T, OpenError>,
    ) -> Result<(T, Vec<u8>)> {
        let bad = |why| ArchiveError::BadRecord { id, kind, why };
        // The length first: it is known without reading the bytes.
        let query = "SELECT length(bytes) FROM blobs WHERE id = ?1";
        let length = self.conn.query_row(query, [id.0], |row| row.get::<_, i64>(0)).optional();
        let Some(length) = sql(&self.path, length)? else { return Err(bad(OpenError::Truncated { have: 0 })) };
        let (size, limit) = (u64::try_from(length).unwrap_or(u64::MAX), kind.max_sealed());
        if size > limit {
            return Err(bad(OpenError::TooLarge { kind, size, limit }));
        }
        let query = "SELECT bytes FROM blobs WHERE id = ?1";
        let bytes = self.conn.query_row(query, [id.0], |row| Ok(raw(row, 0)?.to_vec()));
        let bytes = match sql(&self.path, bytes) {
            // The page list of this blob is broken; other records have their own.
            Err(ArchiveError::Damaged { .. }) => return Err(ArchiveError::ChangedRecord { id, kind }),
            other => other?,
        };
        // What the envelope finds says more than that the hash differs.
        let value = open(&bytes).map_err(bad)?;
        if BlobId::of(&bytes) == id { Ok((value, bytes)) } else { Err(ArchiveError::ChangedRecord { id, kind }) }
    }
}

/// Writes a record and its rows.
pub(crate) fn insert(
    tx: &Transaction<'_>,
    kind: Kind,
    sealed: &[u8],
    index: impl FnOnce(&Transaction<'_>, &[u8; 32], i64) -> rusqlite::Result<()>,
) -> rusqlite::Result<BlobId> {
    let id = BlobId::of(sealed);
    let now = i64::try_from(now_s()).unwrap_or(i64::MAX);
    // What is there under this id has these bytes, unless it was damaged: then this mends it.
    tx.execute(
        "INSERT INTO blobs (id, kind, size, created, bytes) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (id) DO UPDATE SET kind = ?2, size = ?3, bytes = ?5
         WHERE bytes <> ?5 OR kind <> ?2 OR size <> ?3",
        params![id.0, kind.code(), sealed.len() as i64, now, sealed],
    )?;
    index(tx, &id.0, now)?;
    Ok(id)
}

/// What writes a profile's rows.
pub(crate) fn profile_rows(
    profile: &Profile,
) -> Result<impl FnOnce(&Transaction<'_>, &[u8; 32], i64) -> rusqlite::Result<()>> {
    let start = column(profile.start_s, "start")?;
    let duration = column(profile.duration_ns, "duration")?;
    let samples = column(profile.samples, "number of samples")?;
    Ok(move |tx: &Transaction<'_>, id: &[u8; 32], now: i64| {
        tx.execute("DELETE FROM profile_modules WHERE profile = ?1", [id])?;
        tx.execute("DELETE FROM profiles WHERE blob = ?1", [id])?;
        tx.execute(
            "INSERT INTO profiles (blob, stored_s, program, label, method, start_s, duration_ns, samples)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![id, now, profile.program, profile.label, profile.method.name(), start, duration, samples],
        )?;
        let mut insert = tx.prepare_cached("INSERT INTO profile_modules (build_id, profile) VALUES (?1, ?2)")?;
        profile.modules.iter().try_for_each(|m| insert.execute(params![m.build_id.hex(), id]).map(|_| ()))
    })
}

/// What writes a plan's rows.
pub(crate) fn plan_rows(plan: &Plan) -> Result<impl FnOnce(&Transaction<'_>, &[u8; 32], i64) -> rusqlite::Result<()>> {
    let functions = column(plan.function_count() as u64, "number of functions")?;
    Ok(move |tx: &Transaction<'_>, id: &[u8; 32], now: i64| {
        tx.execute("DELETE FROM plan_modules WHERE plan = ?1", [id])?;
        tx.execute("DELETE FROM plans WHERE blob = ?1", [id])?;
        tx.execute(
            "INSERT INTO plans (blob, stored_s, program, kind, passes, profile, functions)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![id, now, plan.program, kind_name(plan.kind), plan.passes.join(","), plan.profile, functions],
        )?;
        let mut insert = tx.prepare_cached("INSERT INTO plan_modules (build_id, plan) VALUES (?1, ?2)")?;
        plan.modules.iter().try_for_each(|m| insert.execute(params![m.build_id.hex(), id]).map(|_| ()))
    })
}

/// Takes a record and all of its rows out.
pub(crate) fn remove_rows(tx: &Transaction<'_>, id: &BlobId) -> rusqlite::Result<()> {
    tx.execute("DELETE FROM profile_modules WHERE profile = ?1", [id.0])?;
    tx.execute("DELETE FROM plan_modules WHERE plan = ?1", [id.0])?;
    tx.execute("DELETE FROM profiles WHERE blob = ?1", [id.0])?;
    tx.execute("DELETE FROM plans WHERE blob = ?1", [id.0])?;
    tx.execute("DELETE FROM working_sets WHERE blob = ?1", [id.0])?;
    tx.execute("DELETE FROM blobs WHERE id = ?1", [id.0])?;
    Ok(())
}

/// Seconds since 1970-01-01 UTC.
fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

const fn kind_name(kind: PlanKind) -> &'static str {
    match kind {
        PlanKind::Layout => "layout",
        PlanKind::Counting => "counting",
    }
}

/// SQLite's integers are signed.
fn column(number: u64, what: &'static str) -> Result<i64> {
    i64::try_from(number).map_err(|_| ArchiveError::OutOfRange(what))
}

/// What a user typed, short and without control characters.
fn quotable(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}
