//! The ptrace sampler, and that the target does not notice.

mod common;

use common::{Victim, Workshop};
use dyni_collector::{Group, MethodChoice, RecordError, RecordOptions, Recording, StopReason, Target, record};
use dyni_schema::Method;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn take(victim: &Victim, ms: u64, frequency_hz: u64) -> Result<Recording, RecordError> {
    let options = RecordOptions {
        duration: Duration::from_millis(ms),
        method: MethodChoice::Only(Method::Ptrace),
        frequency_hz: Some(frequency_hz),
        ..Default::default()
    };
    let group = Group::of(&Target::by_pid(victim.pid()).unwrap()).unwrap();
    let result = record(&group, &options, &mut |_| true);
    for task in std::fs::read_dir(format!("/proc/{}/task", victim.pid())).into_iter().flatten().flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        assert!(!status.contains("TracerPid:") || status.contains("TracerPid:\t0\n"), "still traced: {status}");
        assert!(!status.contains("State:\tt"), "left in a tracing stop: {status}");
    }
    result
}

/// False, with a line that says so, where even a child may not be traced.
fn may_trace(result: &Result<Recording, RecordError>) -> bool {
    if let Err(RecordError::NoSampler(note)) = result {
        println!("skipped: {note}");
        return false;
    }
    true
}

fn state(pid: i32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

/// The state, once it is the expected one or a second has passed.
fn settled(pid: i32, expected: char) -> char {
    for _ in 0..100 {
        if state(pid) == expected {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    state(pid)
}

fn ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(11).unwrap().parse().unwrap()
}

#[test]
fn the_same_function_is_hot() {
    let Some(shop) = Workshop::open() else { return };
    let victim = shop.start(&["threads"]);
    let result = take(&victim, 1500, 200);
    if !may_trace(&result) {
        return;
    }
    let profile = result.unwrap().profile;
    profile.validate().unwrap();
    let module = profile.modules.iter().find(|m| m.name == "victim").unwrap();
    let inside = |name| {
        let function = shop.function("victim", name);
        module.samples.iter().filter(|(a, _)| function.contains(&a.0)).map(|(_, c)| c).sum::<u64>()
    };
    let (one, two) = (inside("hot_one"), inside("hot_two"));
    assert!(profile.samples > 100, "{}", profile.samples);
    assert!((one + two) * 10 > profile.samples * 9, "{one} + {two} of {}", profile.samples);
    assert!(one > two && two > 10, "the late thread appears: {one}, {two}");
    assert_eq!((profile.method, profile.threads), (Method::Ptrace, 4));
}

#[test]
fn no_signal_is_lost_or_invented() {
    let Some(shop) = Workshop::open() else { return };
    let mut victim = shop.start(&["signals", "1.0"]);
    let result = take(&victim, 700, 1000);
    if !may_trace(&result) {
        return;
    }
    let line = victim.line();
    let (sent, counted) = line.split_once(' ').unwrap();
    assert_eq!(sent, counted);
    assert!(sent.parse::<u32>().unwrap() > 100, "{line}");
}

#[test]
fn no_wait_is_cut_short() {
    let Some(shop) = Workshop::open() else { return };
    let mut victim = shop.start(&["epoll", "3.5"]);
    let result = take(&victim, 3000, 1000);
    if !may_trace(&result) {
        return;
    }
    let line = victim.line();
    let (waits, failed) = line.split_once(' ').unwrap();
    assert!(waits.parse::<u32>().unwrap() > 100, "{line}");
    assert_eq!(failed, "0", "of {waits} waits");
}

#[test]
fn a_stopped_target_stays_stopped_until_it_is_continued() {
    let Some(shop) = Workshop::open() else { return };
    let victim = shop.start(&["burn"]);
    let pid = nix::unistd::Pid::from_raw(victim.pid());
    let kill = |signal| nix::sys::signal::kill(pid, signal).unwrap();
    let seen = std::thread::scope(|scope| {
        let recorder = scope.spawn(|| take(&victim, 900, 500));
        std::thread::sleep(Duration::from_millis(300));
        kill(nix::sys::signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(200));
        // `t` is how a tracer sees job control's stop that it listens to.
        assert!(matches!(state(victim.pid()), 'T' | 't'), "{}", state(victim.pid()));
        let before = ticks(victim.pid());
        std::thread::sleep(Duration::from_millis(150));
        assert!(ticks(victim.pid()) <= before + 1, "it must not run");
        recorder.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
    });
    // `take` has checked that it is not in a tracing stop; job control's stop must have outlived the tracer.
    if may_trace(&seen) {
        assert_eq!(settled(victim.pid(), 'T'), 'T');
        kill(nix::sys::signal::SIGCONT);
        assert_eq!(settled(victim.pid(), 'R'), 'R');
    }
}

#[test]
fn a_target_that_exits_is_no_failure() {
    let Some(shop) = Workshop::open() else { return };
    let victim = shop.start(&["exit", "0.5"]);
    let begin = Instant::now();
    let result = take(&victim, 20_000, 200);
    if !may_trace(&result) {
        return;
    }
    let recording = result.unwrap();
    assert_eq!(recording.stopped, StopReason::TargetExited);
    assert!(recording.profile.samples > 10 && begin.elapsed() < Duration::from_secs(5));
}

/// Not a test: what the next one starts and kills.
#[test]
#[ignore = "only as a helper process"]
fn helper_that_records_for_long() {
    let pid = std::env::var("VICTIM").unwrap().parse().unwrap();
    let group = Group::of(&Target::by_pid(pid).unwrap()).unwrap();
    let options = RecordOptions {
        duration: Duration::from_secs(60),
        method: MethodChoice::Only(Method::Ptrace),
        frequency_hz: Some(1000),
        ..Default::default()
    };
    let _ = record(&group, &options, &mut |_| true);
}

#[test]
fn a_killed_recorder_leaves_the_target_running() {
    let Some(shop) = Workshop::open() else { return };
    let victim = shop.start(&["threads"]);
    for round in 0..5 {
        let mut recorder = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "helper_that_records_for_long", "--ignored"])
            .env("VICTIM", victim.pid().to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(200 + 7 * round));
        recorder.kill().unwrap();
        recorder.wait().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let (before, deadline) = (ticks(victim.pid()), Instant::now() + Duration::from_secs(5));
        while ticks(victim.pid()) == before {
            assert!(Instant::now() < deadline, "it runs on");
            std::thread::sleep(Duration::from_millis(10));
        }
        Target::by_pid(victim.pid()).expect("nobody traces it");
    }
}
