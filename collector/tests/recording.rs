//! Recordings of live programs.

mod common;

use common::{Victim, Workshop, has_clock};
use dyni_collector::{
    Group, MethodChoice, Progress, RecordError, RecordOptions, Recording, StopReason, Target, cpu_time,
    lives_are_brief, modules_of, record,
};
use dyni_schema::{Method, ModuleProfile, Profile};
use std::ops::Range;
use std::time::{Duration, Instant};

fn options(method: Method, ms: u64) -> RecordOptions<'static> {
    RecordOptions { duration: Duration::from_millis(ms), method: MethodChoice::Only(method), ..Default::default() }
}

fn try_take(victim: &Victim, options: &RecordOptions) -> Result<Recording, RecordError> {
    let group = Group::of(&Target::by_pid(victim.pid()).unwrap()).unwrap();
    record(&group, options, &mut |_| true)
}

fn take(victim: &Victim, options: &RecordOptions) -> Profile {
    checked(try_take(victim, options).unwrap())
}

/// Records until there is enough, however busy the host is.
fn take_until(victim: &Victim, enough: impl Fn(&Progress) -> bool) -> Profile {
    let group = Group::of(&Target::by_pid(victim.pid()).unwrap()).unwrap();
    checked(record(&group, &options(Method::Clock, 60_000), &mut |p| !enough(&p)).unwrap())
}

fn checked(recording: Recording) -> Profile {
    recording.profile.validate().unwrap();
    assert_eq!(recording.malformed, 0);
    recording.profile
}

fn module<'a>(profile: &'a Profile, name: &str) -> &'a ModuleProfile {
    profile.modules.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("no {name} in {:?}", profile.modules))
}

fn inside(module: &ModuleProfile, function: &Range<u64>) -> u64 {
    module.samples.iter().filter(|(addr, _)| function.contains(&addr.0)).map(|(_, count)| count).sum()
}

#[test]
fn the_hot_function_has_the_samples() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let victim = shop.start(&["burn"]);
    let profile = take_until(&victim, |p| p.totals.samples >= 500);
    let hot = inside(module(&profile, "victim"), &shop.function("victim", "hot_one"));
    assert!(hot * 10 > profile.samples * 9, "{hot} of {}", profile.samples);
    assert_eq!((profile.program.as_str(), profile.method, profile.frequency_hz), ("victim", Method::Clock, 1999));
    assert_eq!((profile.processes, profile.threads), (1, 2));
    assert!(!profile.host.cpu.is_empty() && !profile.host.kernel.is_empty());
    let modules = modules_of(victim.pid()).unwrap();
    let named = modules.iter().find(|m| m.name == "victim").unwrap();
    assert_eq!(named.build_id, module(&profile, "victim").build_id);
}

#[test]
fn threads_born_during_the_recording_appear() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let victim = shop.start(&["threads"]);
    let profile =
        take_until(&victim, |p| p.elapsed.as_millis() >= 1200 && p.totals.threads == 4 && p.totals.samples >= 500);
    let late = inside(module(&profile, "victim"), &shop.function("victim", "hot_two"));
    assert!(late * 10 > profile.samples, "{late} of {}", profile.samples);
    assert_eq!(profile.threads, 4);
}

#[test]
fn threads_too_brief_for_a_clock_of_their_own_are_seen() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let lasting = shop.start(&["burn"]);
    let victim = shop.start(&["brief"]);
    assert!(lives_are_brief(victim.pid()) && !lives_are_brief(lasting.pid()));
    let before = cpu_time(victim.pid()).unwrap();
    let group = Group::of(&Target::by_pid(victim.pid()).unwrap()).unwrap();
    let recording = record(&group, &options(Method::Clock, 1000), &mut |_| true);
    let used = cpu_time(victim.pid()).unwrap() - before;
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: only root may look at the whole system");
    }
    let profile = checked(recording.unwrap());
    let seen = inside(module(&profile, "victim"), &shop.function("victim", "hot_two"));
    let wanted = used.as_millis() as u64 * profile.frequency_hz / 1000;
    // Some of the time goes into the making of threads.
    assert!(seen * 3 > wanted, "{seen} of {wanted}");
}

#[test]
fn children_born_during_the_recording_appear() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let victim = shop.start(&["forks"]);
    let profile = take_until(&victim, |p| p.totals.samples >= 300 && p.totals.processes > 5);
    let hot = inside(module(&profile, "victim"), &shop.function("victim", "hot_one"));
    assert!(hot * 10 > profile.samples * 8, "{hot} of {}", profile.samples);
}

#[test]
fn a_child_that_runs_another_program_does_not_count() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let victim = shop.start(&["shell"]);
    let recording = try_take(&victim, &options(Method::Clock, 700));
    if let Ok(recording) = recording {
        let names: Vec<_> = recording.profile.modules.iter().map(|m| m.name.as_str()).collect();
        assert!(!names.iter().any(|n| n.contains("sh")), "{names:?}");
        assert!(recording.profile.outside < 100, "{}", recording.profile.outside);
    }
}

#[test]
fn a_library_loaded_during_the_recording_appears() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let library = shop.path("library.so");
    let victim = shop.start(&["dlopen", library.to_str().unwrap()]);
    let profile = take(&victim, &options(Method::Clock, 1000));
    let hot = inside(module(&profile, "library.so"), &shop.function("library.so", "hot_library"));
    assert!(hot * 10 > profile.samples * 9, "{hot} of {}", profile.samples);
}

#[test]
fn a_target_that_exits_half_way_leaves_its_samples() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let victim = shop.start(&["exit", "0.5"]);
    let begin = Instant::now();
    let recording = try_take(&victim, &options(Method::Clock, 20_000)).unwrap();
    assert_eq!(recording.stopped, StopReason::TargetExited);
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(recording.profile.samples > 50);
}

#[test]
fn a_deleted_executable_is_no_obstacle() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let copy = shop.path("gone");
    std::fs::copy(shop.path("victim"), &copy).unwrap();
    let victim = Victim::start(&copy, &["burn"]);
    std::fs::remove_file(&copy).unwrap();
    let target = Target::by_pid(victim.pid()).unwrap();
    assert!(target.exe_deleted && target.exe == copy && target.name == "gone");
    let profile = take(&victim, &options(Method::Clock, 300));
    assert!(inside(module(&profile, "gone"), &shop.function("victim", "hot_one")) * 10 > profile.samples * 9);
}

#[test]
fn an_idle_target_says_so_and_an_impatient_caller_is_obeyed() {
    let Some(shop) = Workshop::open() else { return };
    if !has_clock() {
        return;
    }
    let idle = shop.start(&["sleep"]);
    assert!(matches!(try_take(&idle, &options(Method::Clock, 200)), Err(RecordError::NoSamples(_))));
    let busy = shop.start(&["burn"]);
    let group = Group::of(&Target::by_pid(busy.pid()).unwrap()).unwrap();
    let begin = Instant::now();
    let recording = record(&group, &options(Method::Clock, 20_000), &mut |p| p.totals.samples < 50).unwrap();
    assert_eq!(recording.stopped, StopReason::Interrupted);
    assert!(begin.elapsed() < Duration::from_secs(5) && recording.profile.samples >= 50);
}
