//! Profiles go to other tools and come from them, and tell the same there.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::build::{self, variant};
use common::dyni::{Dyni, run};
use common::find_program;
use common::process::{Victim, verify};
use dyni_profiles::Archive;
use dyni_schema::envelope::{BlobPrefix, Kind};
use dyni_schema::{FunctionPlan, ModulePlan, Plan};
use serde_json::Value;

/// A victim whose work is its own code, recorded with this method.
fn recorded(name: &str, method: &str) -> Result<(Victim, Dyni), String> {
    let victim = Victim::start(&build::victim(name, &variant::gcc_o2)?)?;
    let d = Dyni::new();
    let pid = victim.pid().to_string();
    let found = (0..10).any(|_| {
        let out = d.run(&["record", "-p", &pid, "--method", method, "--duration", "2s"]);
        let starved = out.starved();
        if !starved {
            out.expect_done();
        }
        !starved
    });
    assert!(found, "the victim was never sampled");
    Ok((victim, d))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of the tests is UTF-8")
}

/// Writes the newest profile.
fn export(d: &Dyni, format: &str, name: &str) -> PathBuf {
    let file = d.folder().join(name);
    d.run(&["archive", "export", "--format", format, "--profile", "latest", text(&file)]).expect_done();
    file
}

/// A fresh archive with nothing but this recording in it.
fn imported(file: &Path, options: &[&str]) -> Dyni {
    let other = Dyni::new();
    other.run(&[&["archive", "import", text(file)], options].concat()).expect_done();
    other
}

/// The plan that the newest profile makes.
fn plan(d: &Dyni) -> Plan {
    let out = d.run(&["analyze", "--json"]);
    out.expect_done();
    let json = out.json();
    let id: BlobPrefix = json["plan"].as_str().expect("there is a plan").parse().expect("it is an id");
    let archive = Archive::open_read_only(d.archive()).expect("open the archive");
    archive.plan(&id).expect("read the plan").1
}

/// What a plan has of the module of this name.
fn of_module(plan: &Plan, exe: &Path) -> ModulePlan {
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    let found = plan.modules.iter().find(|m| m.name == name);
    found.unwrap_or_else(|| panic!("{name} is not in {plan:#?}")).clone()
}

fn ids(d: &Dyni) -> Vec<String> {
    let archive = Archive::open_read_only(d.archive()).expect("open the archive");
    let entries = archive.list(None).expect("list the archive");
    entries.iter().filter(|e| e.kind() == Kind::Profile).map(|e| e.id().hex()).collect()
}

#[test]
fn samples_go_to_bolt_and_back_and_make_the_same_plan() {
    let (victim, d) = match recorded("usual", "clock") {
        Ok(recorded) => recorded,
        Err(reason) => skip!("{reason}"),
    };
    let file = export(&d, "fdata", "samples.fdata");
    let other = imported(&file, &["--binary", text(&victim.exe)]);
    let (here, there) = (of_module(&plan(&d), &victim.exe), of_module(&plan(&other), &victim.exe));
    assert_eq!(here, there);
    // The same file again is the same profile.
    other.run(&["archive", "import", text(&file), "--binary", text(&victim.exe)]).expect_done();
    assert_eq!(ids(&other).len(), 1);
    victim.finish();
}

/// What differs: fdata has no bytes and no time, so functions weigh what they branch and not what they run; that decides
/// which of the coldest are in the plan, in which order functions lie and which blocks are the yardstick. And counts that
/// are known for certain become evidence like that of any branch stack: of blocks that ran next to equally often (the cases
/// of a switch) another one may come first.
#[test]
fn counts_go_to_bolt_and_back_and_lay_functions_out_the_same() {
    let (victim, d) = match recorded("usual", "count") {
        Ok(recorded) => recorded,
        Err(reason) => skip!("{reason}"),
    };
    let file = export(&d, "fdata", "counts.fdata");
    let other = imported(&file, &["--binary", text(&victim.exe)]);
    let again = export(&other, "fdata", "again.fdata");
    assert_eq!(fs::read_to_string(&file).expect("read"), fs::read_to_string(again).expect("read"));
    let (here, there) = (of_module(&plan(&d), &victim.exe), of_module(&plan(&other), &victim.exe));
    let total: u64 = here.functions.iter().map(|f| f.weight).sum();
    let (mut hot, mut same) = (0, 0);
    for f in here.functions.iter().filter(|f| f.weight * 100 >= total) {
        let back = there.functions.iter().find(|b| b.start == f.start);
        let back = back.unwrap_or_else(|| panic!("{:#x} of weight {} is lost", f.start, f.weight));
        let hot_blocks = |f: &FunctionPlan| f.blocks[..f.hot as usize].iter().copied().collect::<BTreeSet<_>>();
        assert_eq!(hot_blocks(back), hot_blocks(f), "{:#x}", f.start);
        (hot, same) = (hot + 1, same + usize::from(back.blocks == f.blocks));
    }
    println!("{same} of {hot} hot functions have the same order");
    assert!(same > 0 && same * 3 >= hot * 2, "{same} of {hot} hot functions: {here:#?} {there:#?}");
    victim.finish();
}

/// The names and offsets are those that BOLT itself gives: of a program as it was linked, and of one that was stripped.
#[test]
fn bolt_reads_what_is_exported() {
    let Some(bolt) = find_program("llvm-bolt-19").or_else(|| find_program("llvm-bolt")) else {
        skip!("llvm-bolt is not installed")
    };
    let exe = match build::victim("usual", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let (victim, d) = match recorded("usual", "count") {
        Ok(recorded) => recorded,
        Err(reason) => skip!("{reason}"),
    };
    victim.finish();
    let stripped = d.folder().join("stripped");
    run(Command::new("strip").arg("-o").arg(&stripped).arg(&exe)).expect_done();
    for binary in [&exe, &stripped] {
        let file = d.folder().join("counts.fdata");
        let named = ["--binary", text(binary)];
        d.run(&[&["archive", "export", "--format", "fdata", "--profile", "latest", text(&file)], &named[..]].concat())
            .expect_done();
        let mut bolt = Command::new(&bolt);
        bolt.arg(binary).args(["-allow-stripped", "-o", "/dev/null", "-data"]).arg(&file);
        let out = run(&mut bolt);
        out.expect_done();
        let said = format!("{}{}", out.stdout, out.stderr);
        // "12 out of 80 functions in the binary (15.0%) have non-empty execution profile"
        let line = said.lines().find(|l| l.contains("have non-empty execution profile"));
        let words = line.and_then(|l| l.split_once("BOLT-INFO: ")).and_then(|l| l.1.split_once(' '));
        let profiled: u64 = words.and_then(|w| w.0.parse().ok()).unwrap_or(0);
        println!("{}: {}", binary.display(), line.unwrap_or("nothing of a profile"));
        assert!(profiled >= 3, "{said}");
        assert!(!said.contains("stale") && !said.contains("invalid profile"), "{said}");
    }
}

/// What they hold is tested where they are written; here, that names of the binary reach them, and all samples.
#[test]
fn drawings_have_all_samples_and_the_names_of_the_binary() {
    let (victim, d) = match recorded("usual", "clock") {
        Ok(recorded) => recorded,
        Err(reason) => skip!("{reason}"),
    };
    victim.finish();
    let shown = d.run(&["archive", "ls", "--json"]).json();
    let samples = shown["entries"][0]["samples"].as_i64().expect("a number of samples");
    let drawing = export(&d, "firefox", "drawing.json");
    let json: Value = serde_json::from_slice(&fs::read(&drawing).expect("read")).expect("it is JSON");
    let weights = json["threads"][0]["samples"]["weight"].as_array().expect("there are weights");
    assert_eq!(weights.iter().filter_map(Value::as_i64).sum::<i64>(), samples);
    assert!(json.to_string().contains("\"by_memory\""), "{json}");
    let graph = export(&d, "pprof", "graph.pb.gz");
    let unpacked = Command::new("gzip").arg("-dc").arg(&graph).output().expect("run gzip");
    assert!(unpacked.status.success(), "{unpacked:?}");
    let holds = |word: &[u8]| unpacked.stdout.windows(word.len()).any(|w| w == word);
    assert!(holds(b"by_memory") && holds(b"usual-gcc-O2") && holds(b"nanoseconds"));
    // Each takes the place of one of its own kind and of no other.
    let again = |format: &str, file: &Path| {
        d.run(&["archive", "export", "--format", format, "--profile", "latest", text(file)])
    };
    again("pprof", &graph).expect_done();
    again("firefox", &drawing).expect_done();
    again("pprof", &drawing).expect_clear_error(&[3], &["no export"]);
    again("firefox", &graph).expect_clear_error(&[3], &["no export"]);
}

/// Without branch stacks, which this needs a processor for; a recording with some is made by hand where they are read.
#[test]
fn a_recording_of_perf_makes_a_plan() {
    let Some(perf) = find_program("perf") else { skip!("perf is not installed") };
    let exe = match build::victim("usual", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let victim = match Victim::start(&exe) {
        Ok(victim) => victim,
        Err(reason) => skip!("{reason}"),
    };
    let d = Dyni::new();
    let (file, pid) = (d.folder().join("perf.data"), victim.pid().to_string());
    let mut record = Command::new(perf);
    record.args(["record", "-q", "-e", "cpu-clock:u", "-F", "999", "-p", &pid, "-o", text(&file), "--", "sleep", "2"]);
    let out = run(&mut record);
    if out.code() != Some(0) || !file.is_file() {
        skip!("perf can't record here: {}", out.stderr.lines().next().unwrap_or_default());
    }
    let out = d.run(&["archive", "import", text(&file), "--label", "by perf", "--json"]);
    out.expect_done();
    let recording = &out.json()["recordings"][0];
    assert_eq!((&recording["format"], &recording["method"]), (&Value::from("perf.data"), &Value::from("clock")));
    assert!(recording["used"].as_u64().is_some_and(|n| n > 100), "{recording}");
    let planned = of_module(&plan(&d), &exe);
    assert!(planned.functions.len() >= 3, "{planned:#?}");
    // It is a plan like any other, and the victim that it was recorded of is given it.
    d.apply(victim.pid()).expect_done();
    let tally = victim.finish();
    assert_eq!(tally, verify(&exe, tally.rounds));

    let bytes = fs::read(&file).expect("read the recording");
    let bad = d.folder().join("bad.data");
    for cut in [10, 90, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&bad, &bytes[..cut]).expect("write");
        d.run(&["archive", "import", text(&bad)]).expect_clear_error(&[1], &["cut off"]);
    }
    let none = d.run(&["archive", "import", text(&file), "--program", "nobody"]);
    none.expect_clear_error(&[1], &["no samples"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (victim, d) = match recorded("usual", "clock") {
        Ok(recorded) => recorded,
        Err(reason) => skip!("{reason}"),
    };
    let exe = victim.exe.clone();
    victim.finish();
    let file = export(&d, "fdata", "samples.fdata");
    let export = |options: &[&str]| d.run(&[&["archive", "export"], options].concat());
    export(&["--format", "fdata", "--all", text(&file)]).expect(&[2]);
    export(&["--profile", "latest", text(&file)]).expect(&[2]);
    export(&["--format", "fdata", text(&file)]).expect(&[2]);
    export(&["--format", "fdata", "--build-id", "abcd", text(&file)]).expect_clear_error(&[1], &["no profile"]);
    let archive = d.archive().to_owned();
    export(&["--format", "fdata", "--profile", "latest", text(&archive)]).expect_clear_error(&[3], &["no export"]);
    let sh = ["--format", "fdata", "--profile", "latest", "--binary", "/bin/sh", text(&file)];
    export(&sh).expect_clear_error(&[3], &["build-id"]);

    let other = Dyni::new();
    let import = |options: &[&str]| other.run(&[&["archive", "import"], options].concat());
    import(&[text(&file)]).expect_clear_error(&[2], &["--binary"]);
    import(&[text(&file), "--binary", "/bin/sh"]).expect_clear_error(&[1, 3], &["names"]);
    import(&[text(&file), "--binary", "/etc/passwd"]).expect_clear_error(&[3], &["ELF"]);
    let bytes = fs::read(&file).expect("read the export");
    let bad = d.folder().join("bad.fdata");
    for cut in [3, 20, bytes.len() - 1] {
        fs::write(&bad, &bytes[..cut]).expect("write");
        import(&[text(&bad), "--binary", text(&exe)]).expect_clear_error(&[1, 3], &["line", "not a file"]);
    }
    // Nothing of it is kept, and nothing of what came with it.
    import(&[text(&file), text(&bad), "--binary", text(&exe)]).expect(&[1]);
    assert!(!other.archive().exists());
}
