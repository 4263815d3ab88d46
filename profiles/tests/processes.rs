//! Several processes on one archive, and writers that die.

mod common;

use common::{ARCHIVE, child, large_profile, profile};
use dyni_profiles::Archive;
use dyni_schema::envelope::BlobPrefix;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

const WRITERS: u64 = 4;
const RECORDS: u64 = 25;

fn integrity(path: &Path) -> String {
    let conn = rusqlite::Connection::open(path).expect("open");
    let verdict: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("check");
    let dangling: i64 = conn.query_row("SELECT count(*) FROM pragma_foreign_key_check", [], |r| r.get(0)).expect("fk");
    assert_eq!(dangling, 0);
    verdict
}

#[test]
#[ignore = "run by the other tests as a process of its own"]
fn write_some() {
    let Some(path) = std::env::var_os(ARCHIVE) else { return };
    let writer: u64 = std::env::var("WRITER").expect("writer").parse().expect("number");
    // Opening is part of the race: the archive is not there yet.
    let mut archive = Archive::open(Path::new(&path)).expect("open");
    for n in 0..RECORDS {
        archive.put_profile(&profile(&format!("writer{writer}"), n)).expect("put");
    }
}

#[test]
fn processes_that_write_at_once_lose_nothing() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("archive.db");
    let start = |w: u64| child("write_some", &path).env("WRITER", w.to_string()).stdout(Stdio::null()).spawn();
    let children: Vec<_> = (0..WRITERS).map(|w| start(w).expect("spawn")).collect();
    for mut child in children {
        assert!(child.wait().expect("wait").success());
    }
    let archive = Archive::open_read_only(&path).expect("open");
    let entries = archive.list(None).expect("list");
    assert_eq!(entries.len() as u64, WRITERS * RECORDS);
    for entry in &entries {
        archive.profile(&entry.id().into()).expect("readable");
    }
    assert_eq!(integrity(&path), "ok");
}

#[test]
#[ignore = "run by the other tests as a process of its own"]
fn write_until_killed() {
    let Some(path) = std::env::var_os(ARCHIVE) else { return };
    let mut archive = Archive::open(Path::new(&path)).expect("open");
    let first: u64 = std::env::var("FIRST").expect("first").parse().expect("number");
    for n in first.. {
        // Said only when the write is promised to last.
        println!("stored {}", archive.put_profile(&large_profile(n)).expect("put"));
    }
}

#[test]
fn a_writer_that_is_killed_loses_its_last_write_at_most() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("archive.db");
    let mut stored = Vec::new();
    for round in 0..12u64 {
        let mut writer = child("write_until_killed", &path)
            .env("FIRST", (round * 1000).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn");
        // Each round dies at another point of the same work; the first before the archive is there.
        std::thread::sleep(Duration::from_millis(3 + 17 * round));
        writer.kill().expect("kill");
        writer.wait().expect("wait");
        let lines = BufReader::new(writer.stdout.take().expect("stdout")).lines();
        let said: Vec<String> = lines.map_while(Result::ok).collect();
        let ids = said.iter().filter_map(|line| line.split_once("stored ").map(|s| s.1));
        // The last line may be cut off by the kill; then the write it speaks of is there all the same.
        stored.extend(ids.filter(|id| id.len() == 64).map(|id| id.parse::<BlobPrefix>().expect("id")));
        let archive = Archive::open(&path).expect("opens after every kill");
        for id in &stored {
            archive.profile(id).expect("nothing that was stored is lost");
        }
        let extra = archive.list(None).expect("list").len() - stored.len();
        assert!(extra as u64 <= round + 1, "a kill leaves at most one write that nobody heard of, not {extra}");
    }
    assert!(stored.len() > 3, "the writers must have got somewhere: {}", stored.len());
    assert_eq!(integrity(&path), "ok");
}

#[test]
fn readers_see_whole_records_while_others_write() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("archive.db");
    drop(Archive::open(&path).expect("open"));
    let mut writer = child("write_some", &path).env("WRITER", "9").stdout(Stdio::null()).spawn().expect("spawn");
    loop {
        let done = writer.try_wait().expect("wait");
        let archive = Archive::open_read_only(&path).expect("open");
        for entry in archive.list(None).expect("list") {
            archive.profile(&entry.id().into()).expect("whole");
        }
        if let Some(status) = done {
            assert!(status.success());
            assert_eq!(archive.list(None).expect("list").len() as u64, RECORDS);
            return;
        }
    }
}
