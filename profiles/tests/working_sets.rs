//! Working sets in the archive: found by the executable, replaced by their successor, thrown away like all else.

mod common;

use common::{build, working_set as set};
use dyni_profiles::{Archive, Entry, ForStart, GcPolicy};
use dyni_schema::{BuildId, FileKey, InodeKey, Usefulness};

#[test]
fn it_is_found_by_its_executable_and_replaced_by_its_successor() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a.db");
    let mut archive = Archive::open(&path).expect("open");
    let none = Usefulness::default();
    let inode = FileKey::Inode(InodeKey { device: (8, 1), inode: 5, size: 9, modified_ns: 3 });
    let first = archive.put_working_set(&set(&build(1), "", 1, none)).expect("put");
    let other = archive.put_working_set(&set(&inode, "", 1, none)).expect("put");
    assert_eq!(archive.put_working_set(&set(&build(1), "", 1, none)).expect("again"), first);
    let second = archive.put_working_set(&set(&build(1), "", 2, none)).expect("put");
    let found =
        |key: &FileKey| Archive::open_for_a_look(&path).expect("look").for_start("clang", None, key).expect("ask");
    assert_eq!(found(&build(1)), ForStart { plan: None, working_set: Some(second) });
    assert_eq!(found(&inode).working_set, Some(other));
    assert_eq!(found(&build(2)), ForStart::default());
    assert!(archive.working_set(&first.into()).is_err(), "its successor has replaced it");
    assert_eq!(archive.working_set_of(&build(1)).expect("read").map(|s| s.recordings), Some(2));
    let listed = archive.list(Some("clang")).expect("list");
    assert_eq!(listed.iter().map(Entry::id).collect::<Vec<_>>(), [second, other]);
    archive.remove(&second.into()).expect("remove");
    assert_eq!(archive.working_set_of(&build(1)).expect("read"), None);
}

#[test]
fn a_plan_for_this_build_comes_first_and_one_for_libraries_will_do() {
    use dyni_schema::{ModulePlan, Plan, PlanKind};
    let dir = tempfile::tempdir().expect("a folder");
    let mut archive = Archive::open(&dir.path().join("a.db")).expect("open");
    let plan = |kind, n: u8| Plan {
        program: "clang".into(),
        kind,
        passes: Vec::new(),
        profile: [0; 32],
        modules: vec![ModulePlan { build_id: BuildId(vec![n; 20]), name: "m".into(), functions: Vec::new() }],
    };
    let of = |archive: &Archive, program: &str, n: u8| {
        archive.for_start(program, Some(&BuildId(vec![n; 20])), &build(n)).expect("ask").plan
    };
    assert_eq!(of(&archive, "clang", 1), None);
    let exact = archive.put_plan(&plan(PlanKind::Layout, 1)).expect("put");
    let newer = archive.put_plan(&plan(PlanKind::Layout, 2)).expect("put");
    archive.put_plan(&plan(PlanKind::Counting, 1)).expect("put");
    assert_eq!(of(&archive, "clang", 1), Some(exact));
    assert_eq!(of(&archive, "clang", 3), Some(newer));
    assert_eq!(of(&archive, "gcc", 1), None);
}

#[test]
fn what_does_not_help_is_kept_and_not_handed_out() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a.db");
    let mut archive = Archive::open(&path).expect("open");
    let useless = Usefulness { starts: 3, read: 100, used: 10 };
    archive.put_working_set(&set(&build(1), "", 3, useless)).expect("put");
    assert_eq!(archive.for_start("clang", None, &build(1)).expect("ask"), ForStart::default());
    assert_eq!(archive.working_set_of(&build(1)).expect("read").map(|s| s.usefulness), Some(useless));
    let gone = archive.gc(&GcPolicy { max_bytes: Some(0), ..GcPolicy::default() }).expect("collect");
    assert_eq!((gone.removed.len(), gone.orphans.len(), gone.kept), (1, 0, 0));
}
