//! What is printed, from an archive with a profile and a plan in it.

use super::*;
use crate::errors::Status;
use dyni_schema::{
    BuildId, FunctionHash, FunctionIndex, FunctionPlan, Host, Method, ModulePlan, ModuleProfile, Plan, PlanKind,
    Profile, Samples,
};
use serde_json::{Value, json};

fn profile(functions: bool) -> Profile {
    let hash = FunctionHash([1; 16]);
    let index = FunctionIndex { start: vec![0x1000, 0x2000], size: vec![0x100, 0x10], hash: vec![hash, hash] };
    Profile {
        program: "post\x1bgres".into(),
        label: "before".into(),
        method: Method::Clock,
        method_note: String::new(),
        host: Host { cpu: "a processor".into(), kernel: "6.1.0".into() },
        start_s: 1_700_000_000,
        duration_ns: 10_000_000_000,
        frequency_hz: 1999,
        processes: 3,
        threads: 4,
        samples: 1060,
        outside: 0,
        kernel: 5,
        in_cache: 0,
        lost: 0,
        modules: vec![ModuleProfile {
            build_id: BuildId(vec![0xab; 20]),
            name: "postgres".into(),
            path: "/usr/bin/postgres".into(),
            samples: Samples { addr: vec![0x1004, 0x10ff, 0x1100, 0x2000], count: vec![20, 30, 10, 1000] },
            functions: if functions { index } else { FunctionIndex::default() },
            ..ModuleProfile::default()
        }],
    }
}

fn plan() -> Plan {
    let function = FunctionPlan {
        start: 0x1000,
        size: 0x100,
        hash: FunctionHash([1; 16]),
        blocks: vec![0, 0x20, 0x10],
        hot: 2,
        entries: vec![0x20],
        probes: Vec::new(),
        calls: Vec::new(),
        weight: 50,
    };
    Plan {
        program: "postgres".into(),
        kind: PlanKind::Layout,
        passes: vec!["infer".into(), "exttsp".into()],
        profile: [0; 32],
        modules: vec![ModulePlan {
            build_id: BuildId(vec![0xab; 20]),
            name: "postgres".into(),
            functions: vec![function],
        }],
    }
}

pub(super) fn archive(dir: &Path) -> (std::path::PathBuf, BlobId, BlobId) {
    let path = dir.join("a.db");
    let mut archive = Archive::open(&path).unwrap();
    let (a, b) = (archive.put_profile(&profile(true)).unwrap(), archive.put_plan(&plan()).unwrap());
    (path, a, b)
}

pub(super) fn json_of(report: &impl Report) -> Value {
    serde_json::to_value(report).unwrap()
}

#[test]
fn a_list_for_people_and_for_programs() {
    let dir = tempfile::tempdir().unwrap();
    let (path, a, b) = archive(dir.path());
    let report = ls(&LsArgs { program: None }, &path).unwrap();
    let text = report.text(Paint::PLAIN);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(
        lines[1].starts_with(&a.short()) && lines[1].ends_with("1,060 samples in 10.0 s, clock, \"before\""),
        "{text}"
    );
    assert!(lines[2].starts_with(&b.short()) && lines[2].ends_with("layout, 1 function, infer exttsp"), "{text}");
    assert!(!text.contains('\x1b'), "control characters reach the terminal: {text:?}");
    let json = json_of(&report);
    assert_eq!(json["entries"][0]["kind"], "profile");
    assert_eq!(json["entries"][0]["id"], a.hex());
    assert_eq!(json["entries"][0]["samples"], 1060);
    assert_eq!(json["entries"][1]["passes"], json!(["infer", "exttsp"]));
    assert_eq!(json["entries"][1]["profile"], Value::Null);
    assert_eq!(json["entries"][1]["build_ids"], json!(["ab".repeat(20)]));
    let only = ls(&LsArgs { program: Some("postgres".into()) }, &path).unwrap();
    assert_eq!(only.entries.len(), 1);
}

#[test]
fn a_list_of_nothing_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.db");
    let report = ls(&LsArgs { program: None }, &path).unwrap();
    assert!(report.text(Paint::PLAIN).contains("no archive at"));
    assert_eq!(json_of(&report)["exists"], false);
    assert!(!path.exists());
    drop(Archive::open(&path).unwrap());
    assert!(ls(&LsArgs { program: None }, &path).unwrap().text(Paint::PLAIN).starts_with("nothing in"));
}

#[test]
fn a_profile_is_shown_by_its_hottest_functions() {
    let dir = tempfile::tempdir().unwrap();
    let (path, a, _) = archive(dir.path());
    let Ok(show::Shown::Profile(report)) = show::show(&a.hex()[..6], &path) else { panic!("not a profile") };
    let json = json_of(&*report);
    assert_eq!(json["modules"][0]["samples"], 1060);
    let top = json!([
        { "module": "postgres", "build_id": "ab".repeat(20), "address": "0x2000", "size": 16, "samples": 1000 },
        { "module": "postgres", "build_id": "ab".repeat(20), "address": "0x1000", "size": 256, "samples": 50 },
    ]);
    assert_eq!(json["top"], top);
    let text = report.text(Paint::PLAIN);
    assert!(text.contains("taken     2023-11-14 22:13 UTC, for 10.0 s"), "{text}");
    assert!(!text.contains('\x1b'));

    let id = Archive::open(&path).unwrap().put_profile(&profile(false)).unwrap();
    let Ok(show::Shown::Profile(report)) = show::show(&id.hex(), &path) else { panic!("not a profile") };
    assert_eq!(json_of(&*report)["top"][3]["size"], Value::Null);
    assert_eq!(json_of(&*report)["top"][3]["samples"], 10);
}

#[test]
fn a_plan_is_shown_by_its_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _, b) = archive(dir.path());
    let Ok(show::Shown::Plan(report)) = show::show(&b.short(), &path) else { panic!("not a plan") };
    let module = json!({
        "name": "postgres", "build_id": "ab".repeat(20), "functions": 1, "function_bytes": 256, "blocks": 3,
        "hot_blocks": 2, "entries": 1,
        "top": [{ "address": "0x1000", "size": 256, "blocks": 3, "hot_blocks": 2, "weight": 50 }],
    });
    assert_eq!(json_of(&*report)["modules"][0], module);
    assert!(report.text(Paint::PLAIN).contains("passes    infer, exttsp"));
}

#[test]
fn a_slip_in_one_id_removes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (path, a, b) = archive(dir.path());
    let failure = rm(&RmArgs { ids: vec![a.short(), "0".repeat(64)] }, &path).unwrap_err();
    assert_eq!(failure.status(), Status::Failed);
    let failure = rm(&RmArgs { ids: vec![a.short(), "x".into()] }, &path).unwrap_err();
    assert_eq!(failure.status(), Status::Usage);
    assert_eq!(ls(&LsArgs { program: None }, &path).unwrap().entries.len(), 2);
    let removed = rm(&RmArgs { ids: vec![a.short(), b.hex(), a.hex()] }, &path).unwrap();
    assert_eq!(removed.removed.len(), 2);
    assert_eq!(ls(&LsArgs { program: None }, &path).unwrap().entries.len(), 0);
}

#[test]
fn gc_says_what_it_would_do() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ..) = archive(dir.path());
    let args = GcArgs { max_size: Some(0), max_age: None, dry_run: true };
    let would = gc(&args, &path).unwrap();
    let text = would.text(Paint::PLAIN);
    assert!(text.contains("would remove 2 records") && text.ends_with("0 records, 0 B kept\n"), "{text}");
    let kept = gc(&GcArgs { max_size: None, max_age: Some(30), dry_run: false }, &path).unwrap();
    assert_eq!((kept.removed.len(), kept.kept), (0, 2));
    let done = gc(&GcArgs { dry_run: false, ..args }, &path).unwrap();
    assert_eq!((done.removed.len(), done.kept, done.freed_bytes), (2, 0, would.freed_bytes));
}

#[test]
fn sizes_and_times() {
    assert_eq!(size("512"), Ok(512));
    assert_eq!(size("20M"), Ok(20 << 20));
    assert_eq!(size("1gb"), Ok(1 << 30));
    for text in ["", "M", "-1", "1.5M", "7x", "99999999999G"] {
        assert!(size(text).is_err(), "{text}");
    }
    assert_eq!(utc(0), "1970-01-01 00:00");
    assert_eq!(utc(951_782_399), "2000-02-28 23:59");
    assert_eq!(utc(951_782_400), "2000-02-29 00:00");
    assert_eq!(utc(4_107_542_400), "2100-03-01 00:00");
    assert_eq!(utc(u64::MAX), "");
}

#[test]
fn a_working_set_is_drawn_and_says_whether_it_helps() {
    use dyni_schema::{FileKey, FileSet, Recorder, Runs, Usefulness, WorkingSet};
    let mut runs = Runs::default();
    (0..8).for_each(|page| runs.push(page, 255, 0));
    let key = FileKey::Build(BuildId(vec![1; 20]));
    let file = FileSet { key: key.clone(), path: "/usr/bin/cl\x1bang".into(), size: 16 * 4096, runs };
    let set = WorkingSet {
        program: "clang".into(),
        executable: key,
        mode: String::new(),
        recordings: 4,
        recorder: Recorder::Pagemap,
        granule: 16,
        deadline_ns: 2_000_000_000,
        updated_s: 0,
        usefulness: Usefulness { starts: 3, read: 100, used: 10 },
        files: vec![file],
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let id = Archive::open(&path).unwrap().put_working_set(&set).unwrap();
    let show::Shown::WorkingSet(report) = show::show(&id.short(), &path).unwrap() else { panic!("another kind") };
    let text = report.text(Paint::PLAIN);
    for wanted in [
        "from 4 recordings, by pagemap, up to 2.0 s after the start; one touch may mark 64 KB",
        "100 pages for 3 starts, 10 of them used: it did not help and is no longer done",
        "cl\u{fffd}ang  64 KB      8  ████████········",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in {text}");
    }
    let listed = ls(&LsArgs { program: None }, &path).unwrap();
    assert!(listed.text(Paint::PLAIN).contains("8 pages of 1 file, 4 recordings"), "{}", listed.text(Paint::PLAIN));
    assert_eq!(serde_json::to_value(&listed).unwrap()["entries"][0]["kind"], "working set");
}
