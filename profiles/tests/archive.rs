//! What is stored is found again, by every name that it has.

mod common;

use common::{large_profile, plan, profile};
use dyni_profiles::{Archive, ArchiveError, Category, Entry, GcPolicy};
use dyni_schema::BuildId;
use dyni_schema::envelope::{BlobId, BlobPrefix, Kind, SealError, seal};
use std::path::PathBuf;

struct Place {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().expect("temporary folder");
    Place { path: dir.path().join("made/on/the/way/archive.db"), _dir: dir }
}

fn prefix(id: BlobId) -> BlobPrefix {
    id.short().parse().expect("prefix")
}

#[test]
fn records_come_back_after_the_archive_was_closed() {
    let place = place();
    let mut archive = Archive::open(&place.path).expect("open");
    let a = archive.put_profile(&profile("postgres", 1)).expect("put");
    let b = archive.put_plan(&plan("postgres", 1)).expect("put");
    assert_eq!(a, BlobId::of(&seal(&profile("postgres", 1)).expect("seal")));
    drop(archive);
    let archive = Archive::open_read_only(&place.path).expect("open");
    assert_eq!(archive.profile(&prefix(a)), Ok((a, profile("postgres", 1))));
    assert_eq!(archive.plan(&prefix(b)), Ok((b, plan("postgres", 1))));
    assert_eq!(
        archive.plan(&prefix(a)),
        Err(ArchiveError::WrongKind { id: a, found: Kind::Profile, wanted: Kind::Plan })
    );
}

#[test]
fn what_is_stored_twice_is_there_once_and_newest() {
    let place = place();
    let mut archive = Archive::open(&place.path).expect("open");
    let first = archive.put_plan(&plan("redis", 1)).expect("put");
    let second = archive.put_plan(&plan("redis", 2)).expect("put");
    let libc = [BuildId(vec![1; 20])];
    let order = |archive: &Archive| archive.plans_for(&libc).expect("query").iter().map(|p| p.id).collect::<Vec<_>>();
    assert_eq!(order(&archive), [second, first]);
    assert_eq!(archive.put_plan(&plan("redis", 1)), Ok(first));
    assert_eq!(order(&archive), [first, second]);
}

#[test]
fn found_by_label_program_module_and_age() {
    let place = place();
    let mut archive = Archive::open(&place.path).expect("open");
    let put = |archive: &mut Archive, program, number| archive.put_profile(&profile(program, number)).expect("put");
    let old = put(&mut archive, "postgres", 1);
    let new = put(&mut archive, "postgres", 2);
    let other = put(&mut archive, "nginx", 3);
    assert_eq!(archive.find_profile("latest"), Ok(other));
    assert_eq!(archive.find_profile("postgres"), Ok(new));
    assert_eq!(archive.latest_profile("postgres"), Ok(new));
    assert_eq!(archive.find_profile("number 1"), Ok(old));
    assert_eq!(archive.find_profile(&old.hex()[..20]), Ok(old));
    let none = archive.find_profile("mys\x1bql").expect_err("nothing of it");
    assert_eq!(none.to_string(), "the archive has no profile for mys\\u{1b}ql");

    let postgres = BuildId(vec![108; 20]);
    let ids = |found: Vec<dyni_profiles::ProfileEntry>| found.iter().map(|p| p.id).collect::<Vec<_>>();
    assert_eq!(ids(archive.profiles_for(std::slice::from_ref(&postgres)).expect("query")), [new, old]);
    let both = [postgres.clone(), BuildId(vec![1; 20]), BuildId(vec![77; 20])];
    assert_eq!(ids(archive.profiles_for(&both).expect("query")), [other, new, old]);

    let stored = archive.put_plan(&plan("postgres", 1)).expect("put");
    let found = archive.plans_for(&both).expect("query");
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].id, found[0].functions, found[0].passes.as_str()), (stored, 2, "infer,exttsp"));
    assert_eq!(found[0].build_ids, [BuildId(vec![1; 20]), postgres]);
    assert_eq!(found[0].profile, Some(BlobId([9; 32])));
    assert_eq!(archive.plans_for(&[]), Ok(vec![]));

    let listed: Vec<BlobId> = archive.list(None).expect("list").iter().map(Entry::id).collect();
    assert_eq!(listed, [other, new, old, stored]);
    let listed: Vec<BlobId> = archive.list(Some("nginx")).expect("list").iter().map(Entry::id).collect();
    assert_eq!(listed, [other]);
}

#[test]
fn an_id_that_fits_several_lists_them() {
    let place = place();
    let mut archive = Archive::open(&place.path).expect("open");
    // Of some hundred ids two begin with the same four digits only by luck, so the pair is looked for first.
    let mut seen = std::collections::BTreeMap::new();
    let (a, b) = (0..)
        .find_map(|n| {
            let id = BlobId::of(&seal(&profile("p", n)).expect("seal"));
            seen.insert(id.hex()[..4].to_owned(), n).map(|earlier| (earlier, n))
        })
        .expect("a pair");
    let a = archive.put_profile(&profile("p", a)).expect("put");
    let b = archive.put_profile(&profile("p", b)).expect("put");
    let error = archive.profile(&a.hex()[..4].parse().expect("prefix")).expect_err("two fit");
    assert!(matches!(&error, ArchiveError::Ambiguous { found, more: false, .. } if found.len() == 2), "{error}");
    assert!(error.to_string().contains(&a.hex()[..16]) && error.to_string().contains(&b.hex()[..16]), "{error}");
    assert_eq!(error.help(), Some("give more digits"));
    assert_eq!(archive.profile(&a.into()).map(|found| found.0), Ok(a));
}

#[test]
fn removing_gives_the_room_back() {
    let place = place();
    let mut archive = Archive::open(&place.path).expect("open");
    let kept = archive.put_profile(&profile("postgres", 1)).expect("put");
    let large: Vec<BlobId> = (0..4).map(|n| archive.put_profile(&large_profile(n)).expect("put")).collect();
    drop(archive);
    let before = std::fs::metadata(&place.path).expect("file").len();
    assert!(before > 1 << 20, "{before}");
    let mut archive = Archive::open(&place.path).expect("open");
    for id in large {
        assert_eq!(archive.remove(&prefix(id)), Ok((id, Kind::Profile)));
        assert!(matches!(archive.profile(&prefix(id)), Err(ArchiveError::NoSuchId { .. })));
    }
    assert!(matches!(archive.remove(&BlobId([0; 32]).into()), Err(ArchiveError::NoSuchId { .. })));
    drop(archive);
    let after = std::fs::metadata(&place.path).expect("file").len();
    assert!(after < before / 4, "{before} to {after}");
    let archive = Archive::open_read_only(&place.path).expect("open");
    assert_eq!(archive.list(None).expect("list").len(), 1);
    assert!(archive.profile(&prefix(kept)).is_ok());
}

#[test]
fn gc_keeps_what_the_policy_keeps() {
    let place = place();
    let mut archive = Archive::open(&place.path).expect("open");
    let ids: Vec<BlobId> = (0..4).map(|n| archive.put_profile(&profile("p", n)).expect("put")).collect();
    let stored = archive.put_plan(&plan("p", 1)).expect("put");
    drop(archive);
    // Ages can't be waited for.
    let raw = rusqlite::Connection::open(&place.path).expect("open");
    for (age, id) in ids.iter().enumerate() {
        raw.execute("UPDATE profiles SET stored_s = ?1 WHERE blob = ?2", (100 + age as i64, id.0)).expect("update");
    }
    drop(raw);
    let mut archive = Archive::open(&place.path).expect("open");
    let total: u64 = archive.list(None).expect("list").iter().map(Entry::bytes).sum();

    let everything = archive.gc(&GcPolicy::default()).expect("gc");
    assert_eq!((everything.removed.len(), everything.kept, everything.kept_bytes), (0, 5, total));

    let by_age = GcPolicy { stored_since_s: Some(102), dry_run: true, ..GcPolicy::default() };
    let would = archive.gc(&by_age).expect("gc");
    assert_eq!(would.removed.iter().map(Entry::id).collect::<Vec<_>>(), ids[..2]);
    assert_eq!(archive.list(None).expect("list").len(), 5, "a dry run removes nothing");
    assert_eq!(archive.gc(&GcPolicy { dry_run: false, ..by_age }), Ok(would));
    assert_eq!(archive.list(None).expect("list").len(), 3);

    let plan_bytes = archive.plans_for(&[BuildId(vec![1; 20])]).expect("query")[0].bytes;
    let by_size = archive.gc(&GcPolicy { max_bytes: Some(plan_bytes), ..GcPolicy::default() }).expect("gc");
    assert_eq!(by_size.removed.iter().map(Entry::id).collect::<Vec<_>>(), ids[2..]);
    assert_eq!((by_size.kept, by_size.kept_bytes), (1, plan_bytes));
    assert_eq!(archive.list(None).expect("list")[0].id(), stored);
}

#[test]
fn what_breaks_a_rule_or_a_column_is_not_stored() {
    let place = place();
    let mut archive = Archive::open(&place.path).expect("open");
    let mut bad = profile("p", 1);
    bad.modules[0].samples.count.pop();
    assert!(matches!(archive.put_profile(&bad), Err(ArchiveError::Seal(SealError::Broken { .. }))));
    let mut bad = profile("p", 1);
    bad.start_s = u64::MAX;
    assert_eq!(archive.put_profile(&bad), Err(ArchiveError::OutOfRange("start")));
    assert_eq!(archive.list(None), Ok(vec![]));
}

#[test]
fn a_missing_archive_is_not_made_by_looking() {
    let place = place();
    let error = Archive::open_read_only(&place.path).expect_err("there is none");
    assert_eq!(error, ArchiveError::Missing(place.path.clone()));
    assert_eq!(error.category(), Category::Failed);
    assert!(!place.path.parent().expect("parent").exists());
}
