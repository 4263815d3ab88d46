//! `dyni check` and what else serves builds that were not recorded: the workflow that the README shows is run as it stands
//! there, on a build that changed nothing and on one whose layout got worse.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::build::{self, Variant, variant};
use common::dyni::{BINARY, Dyni, Outcome, run};
use common::process::Victim;

/// Another build, laid out the same.
const ANOTHER: Variant = Variant { compiler: "gcc", tag: "another", flags: &["-O2", "-DANOTHER"] };
/// Another build, worse laid out.
const REGRESSED: Variant = Variant { compiler: "gcc", tag: "regressed", flags: &["-O2", "-DREGRESSED"] };

/// A folder like a repository's: the application, and what was recorded of it.
struct Repository {
    dyni: Dyni,
    app: PathBuf,
}

impl Repository {
    /// Builds the application, records it and writes profile and baseline, as the README says.
    fn new() -> Result<Self, String> {
        let dyni = Dyni::new();
        let app = dyni.folder().join("target/release/app");
        fs::create_dir_all(app.parent().expect("it has a folder")).expect("make folders");
        fs::create_dir_all(dyni.folder().join("ci")).expect("make folders");
        let repository = Self { dyni, app };
        repository.build(&variant::gcc_o2)?;
        let victim = Victim::start(&repository.app)?;
        repository.dyni.record(victim.pid(), "2s");
        victim.finish();
        repository.dyni.run(&["archive", "export", "--program", "app", &repository.path("ci/app.dyni")]).expect_done();
        let baseline = repository.check(&["--json"]);
        baseline.expect_done();
        fs::write(repository.path("ci/app.json"), &baseline.stdout).expect("write the baseline");
        Ok(repository)
    }

    fn path(&self, name: &str) -> String {
        self.dyni.folder().join(name).display().to_string()
    }

    /// Puts a build of the application where builds go.
    fn build(&self, v: &Variant) -> Result<(), String> {
        let built = build::victim("layout", v)?;
        // A running program's file can't be written to, but replaced.
        let _ = fs::remove_file(&self.app);
        fs::copy(built, &self.app).expect("copy the program");
        let status = Command::new("strip").arg(&self.app).status().map_err(|e| format!("strip: {e}"))?;
        assert!(status.success());
        Ok(())
    }

    fn check(&self, more: &[&str]) -> Outcome {
        let (profile, binary) = (self.path("ci/app.dyni"), self.app.display().to_string());
        let args = [&["check", "--profile", &profile, "--binary", &binary], more].concat();
        run(self.dyni.command(&args).env_remove("GITHUB_STEP_SUMMARY"))
    }

    /// Runs the workflow's step as GitHub's runner does; what it left: outcome, summary, JUnit's file.
    fn workflow(&self) -> (Outcome, String, String) {
        let bin = self.dyni.folder().join("bin");
        fs::create_dir_all(&bin).expect("make a folder");
        let _ = std::os::unix::fs::symlink(BINARY, bin.join("dyni"));
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let summary = self.dyni.folder().join("summary.md");
        let _ = fs::remove_file(&summary);
        let _ = fs::remove_file(self.path("dyni.xml"));
        let mut shell = Command::new("bash");
        shell.args(["--noprofile", "--norc", "-eo", "pipefail", "-c", &step_of_readme()]);
        shell.current_dir(self.dyni.folder()).env("PATH", path).env("GITHUB_STEP_SUMMARY", &summary);
        shell.env_remove("DYNI_FAILPOINT").env_remove("DYNI_ARCHIVE");
        let outcome = run(&mut shell);
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        (outcome, read(&summary), read(Path::new(&self.path("dyni.xml"))))
    }
}

/// The commands of the step of the README's workflow that runs dyni.
fn step_of_readme() -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(readme).expect("there is a README");
    let workflow =
        readme.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("it has a workflow");
    let lines: Vec<&str> = workflow.lines().collect();
    let indent = |l: &str| l.len() - l.trim_start().len();
    let mut steps = Vec::new();
    for (i, line) in lines.iter().enumerate().filter(|(_, l)| l.trim_start().starts_with("run: |")) {
        let block = lines[i + 1..].iter().take_while(|l| l.trim().is_empty() || indent(l) > indent(line));
        steps.push(block.map(|l| l.trim_start()).collect::<Vec<_>>().join("\n"));
    }
    let with_dyni: Vec<_> = steps.into_iter().filter(|s| s.contains("dyni check")).collect();
    assert_eq!(with_dyni.len(), 1, "one step of the workflow runs dyni check");
    with_dyni[0].clone()
}

#[test]
fn the_workflow_of_the_readme_passes_and_fails_where_it_should() {
    let repository = match Repository::new() {
        Ok(repository) => repository,
        Err(reason) => skip!("{reason}"),
    };
    // The very build, and another one that nothing was recorded of.
    for v in [variant::gcc_o2, ANOTHER] {
        repository.build(&v).expect("it was built before");
        let (outcome, summary, xml) = repository.workflow();
        outcome.expect_done();
        assert!(outcome.stdout.contains("no worse than it may be"), "{outcome:#?}");
        assert!(summary.contains("### dyni check: app, no worse than it may be"), "{summary}");
        assert!(xml.contains("failures=\"0\""), "{xml}");
    }
    repository.build(&REGRESSED).expect("the compiler is there");
    let (outcome, summary, xml) = repository.workflow();
    outcome.expect(&[1]);
    assert!(outcome.stderr.contains("as built"), "{outcome:#?}");
    assert!(summary.contains("**regressed**"), "{summary}");
    assert!(xml.contains("<failure message="), "{xml}");
    println!("{}", outcome.stdout);
}

#[test]
fn a_check_says_the_same_every_time() {
    let repository = match Repository::new() {
        Ok(repository) => repository,
        Err(reason) => skip!("{reason}"),
    };
    repository.build(&REGRESSED).expect("the compiler is there");
    let baseline = repository.path("ci/app.json");
    let one = repository.check(&["--json", "--baseline", &baseline]);
    one.expect(&[1]);
    let json = one.json();
    assert_eq!(json["regressed"], true);
    // One document, and not an error behind it.
    assert!(json["error"].is_null() && json["comparisons"].as_array().is_some_and(|c| c.len() == 8), "{json}");
    // What was carried over is nearly all: every function was edited, as far as a compiler's view of it goes.
    let share = json["matched"]["share"].as_f64().expect("it is another build");
    assert!(share > 0.5 && json["matched"]["recorded"] != json["build_id"], "{json}");
    let two = run(repository
        .dyni
        .command(&[
            "check",
            "--json",
            "--profile",
            &repository.path("ci/app.dyni"),
            "--binary",
            &repository.path("target/release/app"),
            "--baseline",
            &baseline,
        ])
        .env("RAYON_NUM_THREADS", "1"));
    assert_eq!(one.stdout, two.stdout);
    // Without a baseline there is nothing to be worse than.
    repository.check(&[]).expect_done();
    // The code of what runs is the same in the other build, and so is every figure.
    repository.build(&ANOTHER).expect("the compiler is there");
    repository.check(&["--baseline", &baseline, "--max-regress", "0"]).expect_done();
}

#[test]
fn what_can_not_be_checked_is_refused_with_the_reason() {
    let repository = match Repository::new() {
        Ok(repository) => repository,
        Err(reason) => skip!("{reason}"),
    };
    let d = &repository.dyni;
    let (profile, app) = (repository.path("ci/app.dyni"), repository.app.display().to_string());
    d.run(&["check", "--binary", &app]).expect(&[2]);
    repository.check(&["--max-regress", "2%"]).expect(&[2]);
    repository.check(&["--baseline", &repository.path("ci/app.json"), "--max-regress", "lots"]).expect(&[2]);
    d.run(&["check", "--profile", &app, "--binary", &app]).expect_clear_error(&[3], &["not a file that"]);
    d.run(&["check", "--profile", &profile, "--binary", &profile]).expect_clear_error(&[3], &["not an ELF"]);
    d.run(&["check", "--profile", &profile, "--binary", "/bin/sh"]).expect_clear_error(&[3], &["app"]);
    d.run(&["check", "--profile", &profile, "--binary", "/none"]).expect_clear_error(&[1], &["/none"]);
    repository.check(&["--baseline", &profile]).expect_clear_error(&[3], &["baseline"]);
    // A profile that was cut off.
    let bytes = fs::read(&profile).expect("it was exported");
    fs::write(&profile, &bytes[..bytes.len() - 9]).expect("cut it off");
    repository.check(&[]).expect_clear_error(&[1], &["cut off"]);
}

#[test]
fn a_plan_for_a_build_that_nothing_was_recorded_of() {
    let repository = match Repository::new() {
        Ok(repository) => repository,
        Err(reason) => skip!("{reason}"),
    };
    let d = &repository.dyni;
    repository.build(&ANOTHER).expect("the compiler is there");
    let victim = Victim::start(&repository.app).expect("it runs");
    let pid = victim.pid().to_string();
    // Not by itself.
    d.run(&["analyze"]).expect(&[0, 1]);
    d.run(&["apply", "-p", &pid]).expect_clear_error(&[1, 3], &["none"]);
    let analyzed = d.run(&["analyze", "--json", "--binary", &repository.app.display().to_string()]);
    analyzed.expect_done();
    let json = analyzed.json();
    assert!(json["matched"]["share"].as_f64().is_some_and(|s| s > 0.9), "{json}");
    assert!(json["plan"].is_string(), "{json}");
    let applied = d.apply(victim.pid());
    applied.expect_done();
    assert!(applied.functions(Some("app")) >= 4, "{applied:#?}");
    let exe = victim.exe.clone();
    let tally = victim.finish();
    assert_eq!(tally, common::process::verify(&exe, tally.rounds));
}

#[test]
fn what_two_plans_decide_otherwise_is_told_with_the_reason() {
    let repository = match Repository::new() {
        Ok(repository) => repository,
        Err(reason) => skip!("{reason}"),
    };
    let d = &repository.dyni;
    let plan = |more: &[&str]| {
        let out = d.run(&[&["analyze", "--json"], more].concat());
        out.expect_done();
        out.json()["plan"].as_str().expect("there is a plan").to_owned()
    };
    let diff = |a: &str, b: &str| {
        let out = d.run(&["plan", "diff", a, b, "--json"]);
        out.expect_done();
        out.json()["modules"][0].clone()
    };
    let (best, plain) = (plan(&[]), plan(&["--passes", "infer"]));
    let same = diff(&best, &best);
    assert!(same["changed"].as_array().is_some_and(Vec::is_empty), "{same}");
    assert!(same["same"].as_u64().is_some_and(|n| n >= 4), "{same}");
    // Without a pass that tells them apart every block is hot.
    let passes = diff(&plain, &best);
    let changed = passes["changed"].as_array().expect("a list");
    assert!(changed.iter().any(|c| c["why"] == "other passes ran"), "{passes}");

    // Another build, of which the profile has been carried over: all of it was edited.
    let app = repository.app.display().to_string();
    repository.build(&REGRESSED).expect("the compiler is there");
    let rebuilt = plan(&["--binary", &app]);
    let builds = diff(&best, &rebuilt);
    assert_ne!(builds["build_id_a"], builds["build_id_b"]);
    let changed = builds["changed"].as_array().expect("a list");
    assert!(changed.len() >= 4 && changed.iter().all(|c| c["edited"] == true), "{builds}");
    let text = d.run(&["plan", "diff", &best[..12], &rebuilt[..12]]);
    text.expect_done();
    assert!(text.stdout.contains("its code was edited"), "{text:#?}");
    println!("{}", text.stdout);
    d.run(&["plan", "diff", &best, "0000000"]).expect_clear_error(&[1, 2], &["0000000"]);
    d.run(&["plan", "diff", "zz", "yy"]).expect(&[2]);
}
