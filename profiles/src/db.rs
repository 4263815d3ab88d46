//! Opening the database: who it belongs to, which format it has, and how little it is trusted.

use crate::error::{ArchiveError, Result};
use crate::path::make_parent;
use dyni_schema::envelope::Kind;
use nix::unistd::{AccessFlags, access};
use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use rusqlite_migration::{M, Migrations};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait for another process's write. The largest record takes well under a second.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// "dyni" in the file's `application_id`, so that another program's database is never taken for an archive.
const APPLICATION_ID: i64 = 0x6479_6e69;

/// The formats, oldest first; their number is the file's `user_version`. An entry that was released never changes.
const MIGRATIONS: &[M<'static>] = &[
    M::up(
        "
    PRAGMA application_id = 0x64796e69;
    -- A blob is immutable and named by its own BLAKE3 hash. The bytes come last, so that the other columns are read
    -- without walking through them.
    CREATE TABLE blobs (
        id BLOB NOT NULL PRIMARY KEY CHECK (length(id) = 32),
        kind INTEGER NOT NULL,
        size INTEGER NOT NULL,
        created INTEGER NOT NULL,
        bytes BLOB NOT NULL
    ) STRICT;
    -- In order of storing: a record that is stored again becomes the newest.
    CREATE TABLE profiles (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        blob BLOB NOT NULL UNIQUE REFERENCES blobs (id),
        stored_s INTEGER NOT NULL,
        program TEXT NOT NULL,
        label TEXT NOT NULL,
        method TEXT NOT NULL,
        start_s INTEGER NOT NULL,
        duration_ns INTEGER NOT NULL,
        samples INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX profiles_program ON profiles (program);
    CREATE TABLE profile_modules (
        build_id TEXT NOT NULL,
        profile BLOB NOT NULL REFERENCES profiles (blob) ON DELETE CASCADE,
        PRIMARY KEY (build_id, profile)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX profile_modules_profile ON profile_modules (profile);
    CREATE TABLE plans (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        blob BLOB NOT NULL UNIQUE REFERENCES blobs (id),
        stored_s INTEGER NOT NULL,
        program TEXT NOT NULL,
        kind TEXT NOT NULL,
        passes TEXT NOT NULL,
        profile BLOB NOT NULL,
        functions INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX plans_program ON plans (program);
    CREATE TABLE plan_modules (
        build_id TEXT NOT NULL,
        plan BLOB NOT NULL REFERENCES plans (blob) ON DELETE CASCADE,
        PRIMARY KEY (build_id, plan)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX plan_modules_plan ON plan_modules (plan);
    ",
    ),
    M::up(
        "
    -- One for each executable and class of arguments.
    CREATE TABLE working_sets (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        blob BLOB NOT NULL UNIQUE REFERENCES blobs (id),
        stored_s INTEGER NOT NULL,
        program TEXT NOT NULL,
        executable TEXT NOT NULL,
        mode TEXT NOT NULL,
        recordings INTEGER NOT NULL,
        files INTEGER NOT NULL,
        pages INTEGER NOT NULL,
        helps INTEGER NOT NULL,
        UNIQUE (executable, mode)
    ) STRICT;
    CREATE INDEX working_sets_program ON working_sets (program);
    ",
    ),
];

const NEWEST: i64 = MIGRATIONS.len() as i64;

/// What a file turned out to be.
enum State {
    /// No table yet: new, or its maker died before the first commit.
    Empty,
    /// An archive of an older dyni.
    Older,
    /// An archive of this format.
    Current,
}

/// Opens the archive for reading and writing, making it and its folder if need be and bringing it up to date.
pub(crate) fn open(path: &Path, patience: Duration) -> Result<Connection> {
    make_parent(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let opened = Connection::open_with_flags(path, flags).and_then(|conn| harden(&conn, patience).map(|()| conn));
    let mut conn = opened.map_err(|e| match why_not_open(path, &e) {
        ArchiveError::CannotOpen { .. } if is_read_only(path) => ArchiveError::ReadOnly(path.to_owned()),
        other => other,
    })?;
    match state(&conn, path)? {
        State::Current => {}
        found @ (State::Empty | State::Older) => {
            if matches!(found, State::Empty) {
                // Only possible before the first table.
                sql(path, conn.pragma_update(None, "auto_vacuum", "INCREMENTAL"))?;
            }
            wal_mode(&conn, path, patience)?;
            migrate(&mut conn, path)?;
        }
    }
    sql(path, conn.pragma_update(None, "synchronous", "FULL"))?;
    conn.set_transaction_behavior(TransactionBehavior::Immediate);
    Ok(conn)
}

/// Opens the archive for reading alone; also one in a folder or on a disk that can't be written.
pub(crate) fn open_read_only(path: &Path, patience: Duration) -> Result<Connection> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(ArchiveError::Missing(path.to_owned())),
        _ => {}
    }
    let conn = match look(path, patience) {
        // A WAL database wants its -shm file beside it. Where that can't be made and no -wal file holds anything, nobody
        // can be writing either, and the file may be read as it is.
        Err(ArchiveError::CannotOpen { .. } | ArchiveError::ReadOnly(_)) if wal_is_empty(path) => {
            look_immutable(path, patience)?
        }
        other => other?,
    };
    match state(&conn, path)? {
        State::Current => Ok(conn),
        State::Empty | State::Older => {
            drop(conn);
            // Nothing is lost by it, and every query here knows the newest format only.
            drop(open(path, patience)?);
            look(path, patience)
        }
    }
}

/// Opens the archive for one look whose answer need not be the newest: without locks and the files that they need, where
/// nobody is writing. A writer that begins meanwhile can make the look fail, or make it miss what it writes.
pub(crate) fn open_for_a_look(path: &Path, patience: Duration) -> Result<Connection> {
    if wal_is_empty(path)
        && let Ok(conn) = look_immutable(path, patience)
        && matches!(state(&conn, path), Ok(State::Current))
    {
        return Ok(conn);
    }
    open_read_only(path, patience)
}

fn look(path: &Path, patience: Duration) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let opened = Connection::open_with_flags(path, flags).and_then(|conn| harden(&conn, patience).map(|()| conn));
    opened.map_err(|e| why_not_open(path, &e))
}

fn look_immutable(path: &Path, patience: Duration) -> Result<Connection> {
    let absolute = std::path::absolute(path)
        .map_err(|e| ArchiveError::CannotOpen { path: path.to_owned(), why: e.to_string() })?;
    let mut uri = String::from("file:");
    for &byte in absolute.as_os_str().as_bytes() {
        uri.push_str(&if byte == b'/' { "/".into() } else { format!("%{byte:02X}") });
    }
    uri.push_str("?immutable=1");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let opened = Connection::open_with_flags(uri, flags).and_then(|conn| harden(&conn, patience).map(|()| conn));
    opened.map_err(|e| why_not_open(path, &e))
}

fn wal_is_empty(path: &Path) -> bool {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    std::fs::metadata(wal).map_or_else(|e| e.kind() == std::io::ErrorKind::NotFound, |m| m.len() == 0)
}

/// SQLite says only "unable to open database file"; the system knows why.
fn why_not_open(path: &Path, error: &rusqlite::Error) -> ArchiveError {
    let plain = ArchiveError::from_sql(path, error);
    let ArchiveError::CannotOpen { path, why } = plain else { return plain };
    let cause = match std::fs::metadata(&path) {
        Ok(m) if m.is_dir() => "it is a folder".into(),
        Ok(_) => match std::fs::File::open(&path) {
            Err(e) => e.to_string(),
            Ok(_) => why,
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => "it can't be made in its folder".into(),
        Err(e) => e.to_string(),
    };
    ArchiveError::CannotOpen { path, why: cause }
}

/// Whether there is an archive that could be looked at: it can be read, but it or its folder can't be written.
fn is_read_only(path: &Path) -> bool {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let writable = |p: &Path| access(p, AccessFlags::W_OK).is_ok();
    path.is_file() && access(path, AccessFlags::R_OK).is_ok() && !(writable(path) && writable(folder))
}

/// What the file is trusted with: nothing in it may run, allocate without bound or be executed by looking at it.
fn harden(conn: &Connection, patience: Duration) -> rusqlite::Result<()> {
    conn.busy_timeout(patience)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    let largest = Kind::ALL.into_iter().map(Kind::max_sealed).max().unwrap_or(0) + 4096;
    conn.set_limit(Limit::SQLITE_LIMIT_LENGTH, i32::try_from(largest).unwrap_or(i32::MAX))?;
    conn.pragma_update(None, "cell_size_check", true)?;
    conn.pragma_update(None, "mmap_size", 0)?;
    // The first statement that reads the file: everything that is wrong with opening it shows here.
    conn.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))
}

fn state(conn: &Connection, path: &Path) -> Result<State> {
    let pragma = |name: &str| -> Result<i64> { sql(path, conn.pragma_query_value(None, name, |row| row.get(0))) };
    let (owner, version) = (pragma("application_id")?, pragma("user_version")?);
    if version == 0 && owner == 0 {
        let empty = sql(path, conn.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| row.get(0)))?;
        return if empty { Ok(State::Empty) } else { Err(ArchiveError::Foreign(path.to_owned())) };
    }
    if owner != APPLICATION_ID || version < 1 {
        return Err(ArchiveError::Foreign(path.to_owned()));
    }
    match version {
        _ if version > NEWEST => Err(ArchiveError::Newer { path: path.to_owned(), found: version, newest: NEWEST }),
        _ if version < NEWEST => Ok(State::Older),
        _ => Ok(State::Current),
    }
}

/// Several processes may make the archive at once, and SQLite does not wait for this lock by itself.
fn wal_mode(conn: &Connection, path: &Path, patience: Duration) -> Result<()> {
    let began = Instant::now();
    loop {
        match conn.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0)) {
            Err(e) if is_busy(&e) && began.elapsed() < patience => std::thread::sleep(Duration::from_millis(5)),
            // A file system without shared memory keeps its rollback journal, which is as safe.
            other => return sql(path, other.map(|_| ())),
        }
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

fn migrate(conn: &mut Connection, path: &Path) -> Result<()> {
    conn.set_transaction_behavior(TransactionBehavior::Immediate);
    let Err(failed) = Migrations::from_slice(MIGRATIONS).to_latest(conn) else { return Ok(()) };
    // The version is read before the lock is taken, so two processes may both set out; the second then finds it done.
    if matches!(state(conn, path), Ok(State::Current)) {
        return Ok(());
    }
    Err(match failed {
        rusqlite_migration::Error::RusqliteError { err, .. } => ArchiveError::from_sql(path, &err),
        other => ArchiveError::Damaged { path: path.to_owned(), what: other.to_string() },
    })
}

pub(crate) fn sql<T>(path: &Path, result: rusqlite::Result<T>) -> Result<T> {
    result.map_err(|e| ArchiveError::from_sql(path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_migrations_run() {
        assert_eq!(Migrations::from_slice(MIGRATIONS).validate(), Ok(()));
    }

    #[test]
    fn whoever_holds_it_too_long_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let holder = open(&path, PATIENCE).unwrap();
        holder.execute_batch("BEGIN IMMEDIATE").unwrap();
        let mut second = open(&path, Duration::from_millis(30)).unwrap();
        let error = ArchiveError::from_sql(&path, &second.transaction().unwrap_err());
        assert_eq!(error, ArchiveError::Busy(path.clone()));
        // Readers are not held up.
        assert!(open_read_only(&path, Duration::from_millis(30)).is_ok());
        holder.execute_batch("COMMIT").unwrap();
        assert!(second.transaction().is_ok());
    }

    #[test]
    fn what_a_dead_maker_left_is_an_empty_archive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        std::fs::write(&path, b"").unwrap();
        assert!(open_read_only(&path, PATIENCE).is_ok());
        let Ok(conn) = open(&path, PATIENCE) else { panic!("can't open") };
        let mode: String = conn.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
        let vacuum: i64 = conn.pragma_query_value(None, "auto_vacuum", |row| row.get(0)).unwrap();
        assert_eq!((mode.as_str(), vacuum), ("wal", 2));
    }
}
