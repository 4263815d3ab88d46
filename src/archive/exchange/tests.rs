//! What is written where, what is left alone, and what is said of it.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use serde_json::json;

use super::super::tests::{archive, json_of};
use super::*;
use crate::errors::Status;

fn everything() -> Selection {
    Selection::default()
}

fn import_one(file: &Path, archive: &Path) -> Result<ImportOutcome, Failure> {
    import_all(vec![file.to_owned()], archive)
}

fn import_all(files: Vec<PathBuf>, archive: &Path) -> Result<ImportOutcome, Failure> {
    import(&ImportArgs { files, binary: Vec::new(), program: None, label: String::new() }, archive)
}

fn to_file(file: &Path, selection: &Selection, archive: &Path) -> Result<ExportOutcome, Failure> {
    let archive = Archive::open_read_only(archive)?;
    super::to_file(file, is_bundle, |name, to| bundle(&archive, selection, name, to))
}

#[test]
fn there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ..) = archive(dir.path());
    let file = dir.path().join("all.dyni");
    let written = to_file(&file, &everything(), &path).unwrap();
    let bytes = fs::read(&file).unwrap();
    let expected = json!({
        "file": file, "profiles": 1, "plans": 1, "working_sets": 0, "left_out": 0, "bytes": bytes.len(),
    });
    assert_eq!(json_of(&written), expected);
    assert!(written.text(Paint::PLAIN).starts_with("1 profile, 1 plan and 0 working sets in "));
    // Again, in place of the first.
    to_file(&file, &everything(), &path).unwrap();
    assert_eq!(fs::read(&file).unwrap(), bytes);

    let other = dir.path().join("other/b.db");
    let report = import_one(&file, &other).unwrap();
    let none = json!({ "new": 0, "known": 0, "left_out": 0 });
    let one = json!({ "new": 1, "known": 0, "left_out": 0 });
    assert_eq!(
        json_of(&report),
        json!({ "archive": other, "profiles": one, "plans": one, "working_sets": none, "recordings": [] })
    );
    let again = import_all(vec![file.clone(), file], &other).unwrap();
    assert_eq!(json_of(&again)["profiles"], json!({ "new": 0, "known": 2, "left_out": 0 }));
    let text = again.text(Paint::PLAIN);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[1..],
        [
            "                new  known",
            "  profiles        0      2",
            "  plans           0      2",
            "  working sets    0      0"
        ]
    );
}

#[test]
fn what_matches_nothing_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ..) = archive(dir.path());
    let empty = tempfile::tempdir().unwrap();
    let selection = Selection { program: Some("mysqld".into()), ..Selection::default() };
    let failure = to_file(&empty.path().join("none.dyni"), &selection, &path).unwrap_err();
    assert_eq!(failure.status(), Status::Failed);
    assert!(failure.to_string().ends_with("none.dyni: the archive has nothing of that to share"), "{failure}");
    assert!(failure.helps().is_some());
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0);
}

#[test]
fn what_is_no_export_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ..) = archive(dir.path());
    let notes = dir.path().join("notes.txt");
    fs::write(&notes, "a shopping list").unwrap();
    let link = dir.path().join("link");
    symlink(&notes, &link).unwrap();
    // What is written to a device, a pipe or a socket can't take its name afterwards.
    let socket = dir.path().join("socket");
    let _socket = UnixListener::bind(&socket).unwrap();
    for target in [path.as_path(), &notes, &link, dir.path(), &socket] {
        let before = fs::read(target).ok();
        let failure = to_file(target, &everything(), &path).unwrap_err();
        assert_eq!(failure.status(), Status::Refused, "{}", target.display());
        assert_eq!(fs::read(target).ok(), before);
    }
    // An empty file is as good as none, and a link stays one.
    fs::write(&notes, "").unwrap();
    to_file(&link, &everything(), &path).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(fs::read(&notes).unwrap().starts_with(&MAGIC));
}

#[test]
fn of_several_files_all_are_imported_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ..) = archive(dir.path());
    let (good, bad) = (dir.path().join("good.dyni"), dir.path().join("bad.dyni"));
    to_file(&good, &everything(), &path).unwrap();
    let bytes = fs::read(&good).unwrap();
    fs::write(&bad, &bytes[..bytes.len() - 1]).unwrap();
    let other = dir.path().join("b.db");
    let failure = import_all(vec![good, bad], &other).unwrap_err();
    assert_eq!(failure.status(), Status::Failed);
    assert!(failure.to_string().contains("bad.dyni: it is cut off"), "{failure}");
    assert!(!other.exists(), "an archive was made for nothing");
    let failure = import_one(&path, &other).unwrap_err();
    assert_eq!(failure.status(), Status::Refused);
    assert!(failure.to_string().contains("it is a database"), "{failure}");
    let failure = import_one(&dir.path().join("missing"), &other).unwrap_err();
    assert_eq!(failure.status(), Status::Failed);
}

#[test]
fn a_build_id_is_whole() {
    assert_eq!(build_id("ab01"), Ok(BuildId(vec![0xab, 1])));
    for text in ["", "abc", "postgres", "-"] {
        assert!(build_id(text).is_err(), "{text}");
    }
}
