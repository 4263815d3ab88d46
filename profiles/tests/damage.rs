//! Files that are damaged, strange or hostile: a clear error, never a panic or something that was not stored.

mod common;

use common::{large_profile, plan, profile};
use dyni_profiles::{Archive, ArchiveError, Category, Entry, GcPolicy};
use dyni_schema::envelope::{BlobId, Kind, OpenError, seal};
use dyni_schema::{Plan, Profile};
use rusqlite::Connection;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

struct Place {
    dir: tempfile::TempDir,
    path: PathBuf,
}

/// An archive with some records, closed, all of it in one file.
fn place() -> Place {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("archive.db");
    let mut archive = Archive::open(&path).expect("open");
    for n in 0..3 {
        archive.put_profile(&profile("postgres", n)).expect("put");
        archive.put_plan(&plan("postgres", n)).expect("put");
    }
    archive.put_profile(&large_profile(7)).expect("put");
    Place { dir, path }
}

fn raw(path: &Path) -> Connection {
    Connection::open(path).expect("open")
}

static LARGE: LazyLock<Profile> = LazyLock::new(|| large_profile(7));

fn is_a_known_record(profile: &Profile) -> bool {
    (0..3).any(|n| *profile == common::profile("postgres", n)) || *profile == *LARGE
}

/// Everything that a command may do with an archive.
fn use_everything(path: &Path) -> Result<usize, ArchiveError> {
    let mut archive = Archive::open(path)?;
    let entries = archive.list(None)?;
    let mut good = 0;
    for entry in &entries {
        match entry {
            Entry::Profile(p) => match archive.profile(&p.id.into()) {
                Ok((_, value)) => {
                    assert!(is_a_known_record(&value), "something that was never stored");
                    good += 1;
                }
                Err(e) => drop(e.to_string()),
            },
            Entry::Plan(p) => match archive.plan(&p.id.into()) {
                Ok((_, value)) => {
                    assert!((0..3).any(|n| value == plan("postgres", n)), "something that was never stored");
                    good += 1;
                }
                Err(e) => drop(e.to_string()),
            },
            Entry::WorkingSet(_) => panic!("something that was never stored"),
        }
    }
    archive.find_profile("latest").map_or_else(|e| drop(e.to_string()), drop);
    archive.gc(&GcPolicy { dry_run: true, max_bytes: Some(1), ..GcPolicy::default() })?;
    archive.put_profile(&profile("nginx", 1))?;
    archive.remove(&BlobId::of(&seal(&profile("nginx", 1))?).into())?;
    Ok(good)
}

#[test]
fn whole_it_works() {
    assert_eq!(use_everything(&place().path), Ok(7));
}

#[test]
fn cut_off_anywhere() {
    let place = place();
    let whole = std::fs::read(&place.path).expect("read");
    let copy = place.dir.path().join("cut.db");
    let mut lengths: Vec<usize> = (0..whole.len()).step_by(whole.len() / 60).collect();
    lengths.extend([1, 15, 16, 99, 100, 4095, 4096, 4097, whole.len() - 1]);
    for len in lengths {
        std::fs::write(&copy, &whole[..len]).expect("write");
        for suffix in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(place.dir.path().join(format!("cut.db{suffix}")));
        }
        let result = use_everything(&copy);
        match &result {
            // An empty file is an archive that nobody has written to yet.
            Ok(good) => assert!(len == 0 || *good < 7, "{len} of {} bytes: nothing missed", whole.len()),
            Err(e) => assert!(
                matches!(e, ArchiveError::Damaged { .. } | ArchiveError::NotADatabase(_) | ArchiveError::Foreign(_)),
                "{len} bytes: {e:?}"
            ),
        }
    }
}

#[test]
fn bits_flipped_anywhere() {
    let place = place();
    let whole = std::fs::read(&place.path).expect("read");
    let copy = place.dir.path().join("flipped.db");
    // Every byte of the header page's beginning, then a sample of the rest.
    let step = whole.len() / 200;
    let places = (0..110).chain((110..whole.len()).step_by(step));
    for (n, at) in places.enumerate() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (n % 8);
        std::fs::write(&copy, &bytes).expect("write");
        for suffix in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(place.dir.path().join(format!("flipped.db{suffix}")));
        }
        if let Err(e) = use_everything(&copy) {
            assert!(!e.to_string().is_empty(), "byte {at}");
            assert!(!matches!(e, ArchiveError::Busy(_) | ArchiveError::Full(_)), "byte {at}: {e}");
        }
    }
}

#[test]
fn one_bad_record_leaves_the_others_usable() {
    let place = place();
    let ids: Vec<BlobId> = (0..3).map(|n| BlobId::of(&seal(&profile("postgres", n)).expect("seal"))).collect();
    let good = seal(&profile("postgres", 0)).expect("seal");
    let mut flipped = good.clone();
    flipped[80] ^= 1;
    let mut newer = good.clone();
    newer[10] = 9;
    let other = seal(&profile("another", 5)).expect("seal");
    let mut bomb = good[..56].to_vec();
    bomb[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    type Check = fn(&ArchiveError) -> bool;
    let cases: [(&str, &[u8], Check); 6] = [
        ("cut", &good[..70], |e| matches!(e, ArchiveError::BadRecord { why: OpenError::Truncated { .. }, .. })),
        ("flip", &flipped, |e| matches!(e, ArchiveError::BadRecord { .. })),
        ("newer", &newer, |e| matches!(e, ArchiveError::BadRecord { why: OpenError::NewerVersion { .. }, .. })),
        ("exchanged", &other, |e| matches!(e, ArchiveError::ChangedRecord { .. })),
        ("bomb", &bomb, |e| matches!(e, ArchiveError::BadRecord { why: OpenError::TooLarge { .. }, .. })),
        ("empty", &[], |e| matches!(e, ArchiveError::BadRecord { why: OpenError::NotDyni, .. })),
    ];
    for (name, bytes, right) in cases {
        raw(&place.path).execute("UPDATE blobs SET bytes = ?1 WHERE id = ?2", (bytes, ids[0].0)).expect("update");
        let archive = Archive::open(&place.path).expect("open");
        let error = archive.profile(&ids[0].into()).expect_err(name);
        assert!(right(&error), "{name}: {error:?}");
        assert!(error.to_string().contains(&ids[0].short()), "{name}: {error}");
        let wanted = if name == "newer" { "update dyni" } else { "dyni archive rm" };
        assert!(error.help().is_some_and(|help| help.contains(wanted)), "{name}: {:?}", error.help());
        assert_eq!(archive.profile(&ids[1].into()).expect("another").1, profile("postgres", 1));
        assert_eq!(archive.list(None).expect("list").len(), 7);
    }
    // Storing it again mends it.
    let mut archive = Archive::open(&place.path).expect("open");
    archive.put_profile(&profile("postgres", 0)).expect("put");
    assert!(archive.profile(&ids[0].into()).is_ok());
    archive.remove(&ids[0].into()).expect("remove");
}

#[test]
fn an_oversized_blob_is_refused_unread() {
    let place = place();
    let id = BlobId::of(&seal(&plan("postgres", 0)).expect("seal"));
    let size = Kind::Plan.max_sealed() as i64 + 1;
    raw(&place.path).execute("UPDATE blobs SET bytes = zeroblob(?1) WHERE id = ?2", (size, id.0)).expect("update");
    let archive = Archive::open(&place.path).expect("open");
    let error = archive.plan(&id.into()).expect_err("too large");
    assert!(matches!(&error, ArchiveError::BadRecord { why: OpenError::TooLarge { .. }, .. }), "{error:?}");
    assert!(archive.plan(&BlobId::of(&seal(&plan("postgres", 1)).expect("seal")).into()).is_ok());
}

#[test]
fn hostile_rows_and_orphans_are_swept_up() {
    let place = place();
    let db = raw(&place.path);
    db.pragma_update(None, "foreign_keys", false).expect("pragma");
    let blob = seal(&profile("orphan", 1)).expect("seal");
    let orphan = BlobId::of(&blob);
    let insert = "INSERT INTO blobs (id, kind, size, created, bytes) VALUES (?1, 1, ?2, 0, ?3)";
    db.execute(insert, (orphan.0, blob.len() as i64, &blob)).expect("insert");
    db.execute_batch(
        "INSERT INTO profiles (blob, stored_s, program, label, method, start_s, duration_ns, samples)
         VALUES (zeroblob(32), -5, 'no blob', '', '', -1, -1, -1),
                (x'00', 0, 'no id', '', '', 0, 0, 0);
         UPDATE profiles SET stored_s = -9223372036854775808, samples = -1, method = x'ff' || char(27),
             program = program || char(0) || 'x' WHERE label = 'number 0';
         UPDATE plan_modules SET build_id = 'not hex ' || build_id;",
    )
    .expect("insert");
    drop(db);
    let mut archive = Archive::open(&place.path).expect("open");
    assert_eq!(archive.list(None).expect("list").len(), 7, "rows without a record are not shown");
    let report = archive.gc(&GcPolicy::default()).expect("gc");
    assert_eq!((report.orphans.len(), report.removed.len(), report.kept), (2, 0, 7));
    assert!(report.orphans.contains(&orphan));
    assert!(matches!(archive.profile(&orphan.into()), Err(ArchiveError::NoSuchId { .. })));
    let again = archive.gc(&GcPolicy::default()).expect("gc");
    assert_eq!((again.orphans.len(), again.freed_bytes, again.kept), (0, 0, 7));
}

#[test]
fn a_blob_of_another_kind_under_a_plans_row() {
    let place = place();
    let sealed = seal::<Plan>(&plan("postgres", 0)).expect("seal");
    let id = BlobId::of(&sealed);
    let other = seal(&profile("postgres", 0)).expect("seal");
    raw(&place.path).execute("UPDATE blobs SET bytes = ?1 WHERE id = ?2", (other, id.0)).expect("update");
    let error = Archive::open(&place.path).expect("open").plan(&id.into()).expect_err("a profile");
    assert!(matches!(&error, ArchiveError::BadRecord { why: OpenError::WrongKind { .. }, .. }), "{error:?}");
}

#[test]
fn files_that_are_no_archive_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let text = dir.path().join("notes.txt");
    std::fs::write(&text, "a shopping list, and some more text so that it is longer than a header ".repeat(20))
        .expect("write");
    let foreign = dir.path().join("other.db");
    raw(&foreign).execute_batch("CREATE TABLE sheep (name TEXT); PRAGMA user_version = 1").expect("make");
    let plain = dir.path().join("plain.db");
    raw(&plain).execute_batch("CREATE TABLE blobs (name TEXT)").expect("make");
    let newer = dir.path().join("newer.db");
    drop(Archive::open(&newer).expect("open"));
    raw(&newer).execute_batch("PRAGMA user_version = 99").expect("make");
    let hollow = dir.path().join("hollow.db");
    drop(Archive::open(&hollow).expect("open"));
    raw(&hollow).execute_batch("DROP TABLE plan_modules; DROP TABLE plans; DROP TABLE profile_modules").expect("make");

    for (path, wanted) in [
        (&text, ArchiveError::NotADatabase(text.clone())),
        (&foreign, ArchiveError::Foreign(foreign.clone())),
        (&plain, ArchiveError::Foreign(plain.clone())),
        (&newer, ArchiveError::Newer { path: newer.clone(), found: 99, newest: 2 }),
    ] {
        let before = std::fs::read(path).expect("read");
        for error in [Archive::open(path).map(drop), Archive::open_read_only(path).map(drop)] {
            let error = error.expect_err("not ours");
            assert_eq!(error, wanted);
            assert_eq!(error.category(), Category::Refused);
            assert!(error.help().is_some());
        }
        assert_eq!(before, std::fs::read(path).expect("read"), "{} was changed", path.display());
    }
    let error = use_everything(&hollow).expect_err("no tables");
    assert!(matches!(&error, ArchiveError::Damaged { .. }), "{error:?}");
    let error = Archive::open(dir.path()).expect_err("a folder");
    assert!(error.to_string().ends_with("it is a folder"), "{error}");
    let below_a_file = text.join("archive.db");
    assert!(matches!(Archive::open(&below_a_file), Err(ArchiveError::CannotOpen { .. })));
}
