//! Places that can't be written: read-only files and disks, full disks.

mod common;

use common::{ARCHIVE, child, large_profile, profile};
use dyni_profiles::{Archive, ArchiveError};
use std::path::Path;
use std::process::Command;

/// Runs a test of this binary in a mount namespace of its own, after a shell command that prepares `$1`, the folder in
/// which the archive lies. Says why and skips where namespaces are not allowed.
fn in_a_namespace(prepare: &str, test: &str, folder: &Path) {
    let allowed = Command::new("unshare").args(["-m", "true"]).output().is_ok_and(|out| out.status.success());
    if !allowed {
        eprintln!("skipped: a mount namespace needs root");
        return;
    }
    let inner = child(test, &folder.join("archive.db"));
    let script = format!("set -e; {prepare}; shift; exec \"$@\"");
    let status = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, "sh"])
        .arg(folder)
        .arg(inner.get_program())
        .args(inner.get_args())
        .env(ARCHIVE, folder.join("archive.db"))
        .status()
        .expect("unshare");
    assert!(status.success());
}

fn child_archive() -> Option<std::path::PathBuf> {
    std::env::var_os(ARCHIVE).map(Into::into)
}

#[test]
fn a_full_database_keeps_what_it_has() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = dir.path().join("small");
    std::fs::create_dir(&folder).expect("folder");
    in_a_namespace("mount -t tmpfs -o size=2m none \"$1\"", "fill_the_disk", &folder);
}

#[test]
#[ignore = "run by the other tests as a process of its own"]
fn fill_the_disk() {
    let Some(path) = child_archive() else { return };
    let mut archive = Archive::open(&path).expect("open");
    let mut stored = Vec::new();
    let error = (0..100)
        .find_map(|n| match archive.put_profile(&large_profile(n)) {
            Ok(id) => {
                stored.push((id, n));
                None
            }
            Err(e) => Some(e),
        })
        .expect("2 MB are full at some time");
    assert_eq!(error, ArchiveError::Full(path.clone()));
    assert!(error.help().is_some_and(|help| help.contains("gc")));
    assert!(!stored.is_empty());
    for (id, n) in &stored {
        assert_eq!(archive.profile(&(*id).into()), Ok((*id, large_profile(*n))));
    }
    // Opening once more, and a folder that can't be made, fail as clearly.
    drop(archive);
    std::fs::write(path.with_file_name("filler"), vec![1; 2 << 20]).expect_err("no room");
    match Archive::open(&path) {
        Ok(archive) => assert_eq!(archive.list(None).expect("list").len(), stored.len()),
        Err(error) => assert_eq!(error, ArchiveError::Full(path.clone())),
    }
    let fresh = path.with_file_name("fresh.db");
    assert_eq!(Archive::open(&fresh).map(drop), Err(ArchiveError::Full(fresh)));
    // With some room, the oldest goes and a new one fits.
    std::fs::remove_file(path.with_file_name("filler")).expect("remove");
    let mut archive = Archive::open(&path).expect("open");
    archive.remove(&stored[0].0.into()).expect("remove");
    archive.put_profile(&profile("small", 1)).expect("put");
}

#[test]
fn a_read_only_disk_can_be_read() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = dir.path().join("disk with % and ?");
    std::fs::create_dir(&folder).expect("folder");
    Archive::open(&folder.join("archive.db")).and_then(|mut a| a.put_profile(&profile("p", 1))).expect("put");
    in_a_namespace("mount --bind \"$1\" \"$1\"; mount -o remount,bind,ro \"$1\"", "read_a_read_only_disk", &folder);
}

#[test]
#[ignore = "run by the other tests as a process of its own"]
fn read_a_read_only_disk() {
    let Some(path) = child_archive() else { return };
    let archive = Archive::open_read_only(&path).expect("open");
    let id = archive.find_profile("latest").expect("find");
    assert_eq!(archive.profile(&id.into()), Ok((id, profile("p", 1))));
    drop(archive);
    let written = Archive::open(&path).and_then(|mut archive| archive.put_profile(&profile("p", 2)));
    assert_eq!(written, Err(ArchiveError::ReadOnly(path.clone())));
    let fresh = path.with_file_name("new-folder").join("fresh.db");
    assert_eq!(Archive::open(&fresh).map(drop), Err(ArchiveError::ReadOnly(fresh)));
}

#[test]
fn a_read_only_disk_with_a_log_that_was_not_written_back() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = dir.path().join("disk");
    std::fs::create_dir(&folder).expect("folder");
    let mut archive = Archive::open(&dir.path().join("archive.db")).expect("open");
    archive.put_profile(&profile("p", 1)).expect("put");
    // The archive as a dead writer leaves it: the record is in the log alone, and the log's index is not there.
    for name in ["archive.db", "archive.db-wal"] {
        std::fs::copy(dir.path().join(name), folder.join(name)).expect("copy");
    }
    in_a_namespace("mount --bind \"$1\" \"$1\"; mount -o remount,bind,ro \"$1\"", "read_a_left_log", &folder);
}

#[test]
#[ignore = "run by the other tests as a process of its own"]
fn read_a_left_log() {
    let Some(path) = child_archive() else { return };
    // The record or an error, but not an archive without the record.
    match Archive::open_read_only(&path) {
        Ok(archive) => assert!(archive.find_profile("latest").is_ok()),
        Err(e) => assert!(matches!(e, ArchiveError::CannotOpen { .. } | ArchiveError::ReadOnly(_)), "{e:?}"),
    }
}

#[test]
fn a_file_that_may_not_grow_is_an_error_and_no_more() {
    // Much as a full disk, without any right to mount.
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("archive.db");
    drop(Archive::open(&path).expect("open"));
    let inner = child("write_with_a_limit", &path);
    let status = Command::new("sh")
        .args(["-c", "ulimit -f 1024; exec \"$@\"", "sh"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env(ARCHIVE, &path)
        .status()
        .expect("sh");
    assert!(status.success());
}

#[test]
#[ignore = "run by the other tests as a process of its own"]
fn write_with_a_limit() {
    let Some(path) = child_archive() else { return };
    // SIGXFSZ would end the process before the error is seen; the Rust runtime does not ignore it.
    let ignored = nix::sys::signal::SigSet::from_iter([nix::sys::signal::Signal::SIGXFSZ]);
    ignored.thread_block().expect("mask");
    let mut archive = Archive::open(&path).expect("open");
    let error = (0..100).find_map(|n| archive.put_profile(&large_profile(n)).err()).expect("the limit is met");
    assert!(matches!(&error, ArchiveError::Full(_) | ArchiveError::Sql { .. }), "{error:?}");
    assert!(archive.list(None).is_ok());
}

#[test]
fn a_file_that_may_not_be_written() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("archive.db");
    Archive::open(&path).and_then(|mut a| a.put_profile(&profile("p", 1))).expect("put");
    let mut permissions = std::fs::metadata(&path).expect("file").permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&path, permissions).expect("chmod");
    let archive = Archive::open_read_only(&path).expect("open");
    assert_eq!(archive.list(None).expect("list").len(), 1);
    drop(archive);
    if nix::unistd::geteuid().is_root() {
        eprintln!("skipped the rest: root may write what is read-only");
        return;
    }
    let written = Archive::open(&path).and_then(|mut archive| archive.put_profile(&profile("p", 2)));
    assert_eq!(written, Err(ArchiveError::ReadOnly(path)));
}
