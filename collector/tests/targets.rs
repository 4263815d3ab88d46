//! Which processes may be targets, and which belong together.

mod common;

use common::{Victim, Workshop};
use dyni_collector::{ErrorKind, Group, Target, TargetError};
use std::process::Command;

#[test]
fn by_pid_with_its_facts() {
    let Some(shop) = Workshop::open() else { return };
    let victim = shop.start(&["threads"]);
    let target = Target::by_pid(victim.pid()).unwrap();
    assert_eq!((target.pid, target.name.as_str()), (victim.pid(), "victim"));
    assert_eq!(target.exe, std::fs::canonicalize(shop.path("victim")).unwrap());
    assert_eq!(target.parent, std::process::id() as i32);
    assert!(target.threads >= 3 && target.thread_ids().len() >= 3 && !target.exe_deleted);
    assert!(target.still_there());
    assert_eq!(Target::find(&victim.pid().to_string()).unwrap().start_ticks, target.start_ticks);
    drop(victim);
    assert!(!target.still_there());
    assert!(matches!(Target::by_pid(target.pid), Err(TargetError::NoSuchProcess(_))));
}

#[test]
fn a_thread_is_no_process() {
    let Some(shop) = Workshop::open() else { return };
    let victim = shop.start(&["threads"]);
    let thread = Target::by_pid(victim.pid()).unwrap().thread_ids()[1];
    assert!(matches!(Target::by_pid(thread), Err(TargetError::NoSuchProcess(_))));
}

#[test]
fn by_name_one_several_and_a_group() {
    let Some(shop) = Workshop::open() else { return };
    let named = |name: &str| {
        let path = shop.path(name);
        std::fs::copy(shop.path("victim"), &path).unwrap();
        path
    };
    // Names that nothing else on the host has.
    let (lone, grouped) = (format!("lone-{}", std::process::id()), format!("grouped-{}", std::process::id()));
    let path = named(&lone);
    let first = Victim::start(&path, &["sleep"]);
    assert_eq!(Target::find(&lone).unwrap().pid, first.pid());
    assert_eq!(Target::find(path.canonicalize().unwrap().to_str().unwrap()).unwrap().pid, first.pid());
    let second = Victim::start(&path, &["sleep"]);
    let error = Target::find(&lone).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let text = error.to_string();
    assert!(text.contains(&first.pid().to_string()) && text.contains(&second.pid().to_string()), "{text}");

    // By the name of a link, as no file has it; 15 bytes at most are known of that.
    let alias = format!("as-{}", std::process::id());
    std::os::unix::fs::symlink(shop.path("victim"), shop.path(&alias)).unwrap();
    let linked = Victim::start(&shop.path(&alias), &["sleep"]);
    assert_eq!(Target::find(&alias).unwrap().pid, linked.pid());

    let master = Victim::start(&named(&grouped), &["workers"]);
    assert_eq!(Target::find(&grouped).unwrap().pid, master.pid());
}

#[test]
fn a_group_is_the_same_whoever_is_asked() {
    let Some(shop) = Workshop::open() else { return };
    let master = shop.start(&["workers"]);
    let other = shop.start(&["sleep"]);
    let mut group = Group::of(&Target::by_pid(master.pid()).unwrap()).unwrap();
    assert_eq!((group.root.pid, group.members.len()), (master.pid(), 3));
    assert!(group.member(other.pid()).is_none(), "the same file, but started on its own");
    for member in &group.members {
        let again = Group::of(member).unwrap();
        assert_eq!(again.root.pid, master.pid());
        assert_eq!(again.members.len(), 3);
    }
    let mut few = group.busiest(2, std::time::Duration::from_millis(10));
    assert_eq!((few.members.len(), few.member(master.pid()).is_some()), (2, true));
    let changes = few.refresh().unwrap();
    assert!(changes.born.is_empty() && changes.gone.is_empty(), "who was left out is not born: {changes:?}");
    assert_eq!(group.busiest(3, std::time::Duration::ZERO), group);
    let worker = group.members.iter().map(|m| m.pid).find(|&pid| pid != master.pid()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker), nix::sys::signal::SIGKILL).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    let changes = group.refresh().unwrap();
    assert_eq!((changes.born.len(), changes.gone), (0, vec![worker]));
    drop(master);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(matches!(group.refresh(), Err(TargetError::Exited(_))));
}

#[test]
fn a_zombie_is_refused() {
    let Some(shop) = Workshop::open() else { return };
    let parent = shop.start(&["zombie"]);
    let pid = parent.said[0].parse().unwrap();
    let error = Target::by_pid(pid).unwrap_err();
    assert!(matches!(error, TargetError::Zombie { parent: p, .. } if p == parent.pid()), "{error}");
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[test]
fn a_kernel_thread_is_refused() {
    // PID 2 is kthreadd, unless a container hides it.
    match Target::by_pid(2) {
        Err(TargetError::KernelThread { name, .. }) => assert_eq!(name, "kthreadd"),
        other => println!("skipped: PID 2 is {other:?} here"),
    }
}

#[test]
fn a_traced_process_is_refused() {
    let Some(shop) = Workshop::open() else { return };
    let victim = shop.start(&["sleep"]);
    let pid = nix::unistd::Pid::from_raw(victim.pid());
    let Ok(()) = nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()) else {
        println!("skipped: ptrace is not allowed here");
        return;
    };
    let error = Target::by_pid(victim.pid()).unwrap_err();
    let us = std::process::id() as i32;
    assert!(matches!(error, TargetError::Traced { tracer, .. } if tracer == us), "{error}");
}

#[test]
fn a_32_bit_program_is_refused() {
    let Some(shop) = Workshop::open() else { return };
    // No 32-bit C library is needed to wait for a signal; nor to run it, if the kernel can.
    let source = r#"__asm__(".globl _start\n_start: mov $29, %eax\nint $0x80\njmp _start\n");"#;
    if !shop.compile("small", source, &["-m32", "-nostdlib", "-static"]) {
        println!("skipped: no 32-bit compiler");
        return;
    }
    let Ok(mut child) = Command::new(shop.path("small")).spawn() else {
        println!("skipped: this kernel runs no 32-bit programs");
        return;
    };
    let error = Target::by_pid(child.id() as i32);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(error, Err(TargetError::ThirtyTwoBit { .. })), "{error:?}");
}

#[test]
fn another_users_process_is_refused_with_its_owner() {
    // SAFETY: geteuid has no preconditions and never fails.
    if unsafe { libc::geteuid() } == 0 {
        println!("skipped: root may look into everything");
        return;
    }
    let error = Target::by_pid(1).unwrap_err();
    assert!(matches!(&error, TargetError::NotPermitted { owner, .. } if owner == "root"), "{error}");
}
