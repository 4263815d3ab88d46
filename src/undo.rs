//! `dyni undo`: the original bytes back in every patched place.

use std::time::Duration;

use dyni_applier::{Retired, State, Swept, Undone};
use dyni_collector::{Group, TargetError};
use serde::Serialize;

use crate::cli::UndoArgs;
use crate::daemon::control;
use crate::daemon::protocol::Contact;
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::output::{Output, Paint, Report, human_bytes, plural};
use crate::status::dynimized;
use crate::targets::{ROUNDS, StateWord, born, find, has_ended, root_first, state_line};

/// `dyni undo --json`.
#[derive(Debug, Serialize)]
pub struct UndoReport {
    state: StateWord,
    processes: Vec<ProcessReport>,
    #[serde(skip)]
    lines: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ProcessReport {
    pid: i32,
    name: String,
    state: StateWord,
    modules: Vec<String>,
    patches: usize,
    /// Text that lay on huge pages and is the file's own again.
    text_bytes: u64,
    stop_ns: u64,
    threads_moved: usize,
    /// What nothing referred to any more.
    freed_bytes: u64,
    kept: Vec<KeptReport>,
    damaged: Vec<String>,
}

/// Copies that stay mapped for now.
#[derive(Debug, Serialize)]
struct KeptReport {
    module: String,
    bytes: u64,
    reason: String,
}

impl KeptReport {
    fn of(retired: &Retired) -> Option<Self> {
        let reason = retired.kept?.text();
        Some(Self { module: retired.module.clone(), bytes: retired.bytes, reason })
    }
}

/// Undoes one program, or every one on this host: a daemon that follows it does that, so that it leaves it alone
/// afterwards.
///
/// # Errors
/// The first process that could not be undone; the others are done all the same.
pub fn run(args: &UndoArgs, contact: Option<&Contact>, out: Output) -> Result<(), Failure> {
    let kept = if args.free { 0 } else { KEPT };
    let by_daemon = contact.map_or(Ok(false), |c| control::undo(args, c, out))?;
    if by_daemon && !args.free {
        return Ok(());
    }
    let mut groups = match &args.pid {
        Some(spec) => vec![find(spec)?],
        None => dynimized()?.groups.into_iter().map(|(group, _)| group).collect(),
    };
    if by_daemon {
        groups.iter_mut().for_each(|group| drop(sweep_group(group, kept)));
        return Ok(());
    }
    let mut report = UndoReport { state: StateWord(State::Undynimized), processes: Vec::new(), lines: Vec::new() };
    let mut first_failure = None;
    for group in &mut groups {
        match undo_group(group) {
            Ok(undone) => {
                let swept = sweep_group(group, kept);
                report.add(group, &undone, &swept);
            }
            Err(failure) => first_failure = first_failure.or(Some(failure)),
        }
    }
    match first_failure {
        Some(failure) => Err(failure),
        None => {
            out.report(&report);
            Ok(())
        }
    }
}

/// Undoes every member, and again whoever was forked from a member that still had patches.
///
/// # Errors
/// The first member that could not be undone; the others are done all the same.
pub fn undo_group(group: &mut Group) -> Result<Vec<Undone>, Failure> {
    let mut all: Vec<Undone> = Vec::new();
    let mut first_failure = None;
    let mut todo = root_first(group);
    for _ in 0..ROUNDS {
        for member in &todo {
            match dyni_applier::undo(member.pid) {
                Ok(undone) => all.push(undone),
                Err(e) if has_ended(member, &e) => {}
                Err(e) => first_failure = first_failure.or(Some(Failure::from(e))),
            }
        }
        match born(group) {
            Ok(children) => todo = children,
            Err(TargetError::Exited(_)) => todo.clear(),
            Err(e) => return Err(e.into()),
        }
        if todo.is_empty() {
            break;
        }
    }
    match first_failure {
        Some(failure) => Err(failure.help("what was undone stays undone; run the same command again for the rest")),
        None => Ok(all),
    }
}

/// How many generations of a process that are out of force are left there, for the next time that their plan is applied: the
/// modules of a plan and of what counted for it.
pub const KEPT: usize = 8;

/// Frees what nothing refers to any more in every member that has more than `but` generations out of force. What could not
/// be done now can be done at the next time, so nothing is said of it but by `status`.
pub fn sweep_group(group: &mut Group, but: usize) -> Vec<(i32, Swept)> {
    // Members that were forked since.
    let _ = group.refresh();
    let members = root_first(group);
    members.iter().filter_map(|m| Some((m.pid, dyni_applier::sweep(m.pid, but).ok()?))).collect()
}

impl UndoReport {
    fn add(&mut self, group: &Group, undone: &[Undone], swept: &[(i32, Swept)]) {
        let root = &group.root;
        self.lines.push(state_line(&root.name, root.pid, undone.len(), State::Undynimized.name()));
        let patches: usize = undone.iter().map(|u| u.patches).sum();
        if patches > 0 {
            let stop = undone.iter().map(|u| u.stop).max().unwrap_or(Duration::ZERO);
            self.lines.push(format!(
                "  {} taken out, stopped for {}",
                plural(patches as u64, "patch", "patches"),
                human_ns(stop.as_nanos() as u64)
            ));
        }
        let text: u64 = undone.iter().map(|u| u.text_bytes).sum();
        if text > 0 {
            self.lines.push(format!("  {} of text are the file's own again", human_bytes(text)));
        }
        let freed: u64 = swept.iter().map(|(_, s)| s.freed()).sum();
        if freed > 0 {
            self.lines.push(format!("  {} freed", human_bytes(freed)));
        }
        for one in undone {
            let swept = swept.iter().find(|(pid, _)| *pid == one.pid).map(|(_, s)| s.clone()).unwrap_or_default();
            self.lines.extend(one.damaged.iter().map(|line| format!("  pid {}: {line}", one.pid)));
            self.processes.push(ProcessReport {
                pid: one.pid,
                name: root.name.clone(),
                state: StateWord(State::Undynimized),
                modules: one.modules.clone(),
                patches: one.patches,
                text_bytes: one.text_bytes,
                stop_ns: one.stop.as_nanos() as u64,
                threads_moved: one.moved,
                freed_bytes: swept.freed(),
                kept: swept.generations.iter().filter_map(KeptReport::of).collect(),
                damaged: one.damaged.clone(),
            });
        }
    }
}

impl Report for UndoReport {
    fn text(&self, _paint: Paint) -> String {
        if self.lines.is_empty() {
            return "no process is dynimized\n".to_owned();
        }
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_to_undo_is_no_error() {
        let report = UndoReport { state: StateWord(State::Undynimized), processes: Vec::new(), lines: Vec::new() };
        assert_eq!(report.text(Paint::PLAIN), "no process is dynimized\n");
        assert_eq!(serde_json::to_value(&report).unwrap()["state"], "undynimized");
    }
}
