//! `dyni status`: what is optimised, read from the processes themselves, and what a daemon is about. It stops nothing and
//! changes nothing.

use dyni_applier::{Kept, ModuleStatus, State, Status};
use dyni_collector::{Group, Target};
use dyni_schema::envelope::BlobId;
use serde::Serialize;

use crate::cli::StatusArgs;
use crate::daemon::protocol::{Contact, DaemonStatus, ProgramStatus, ReadAheadStatus, State as Followed};
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::gain::Ratio;
use crate::huge_text::{self, HugeText};
use crate::output::{Align, Output, Paint, Report, Table, human_bytes, plural, thousands};
use crate::targets::{Refused, StateWord, combined, find, has_ended, root_first, state_line};

/// `dyni status --json`.
#[derive(Debug, Serialize)]
pub struct StatusReport {
    /// What a daemon says; null if none runs.
    daemon: Option<DaemonStatus>,
    processes: Vec<ProcessReport>,
    /// Processes that this user may not look into; with `-p` always 0.
    not_permitted: usize,
    #[serde(skip)]
    verbose: bool,
}

#[derive(Debug, Serialize)]
struct ProcessReport {
    pid: i32,
    name: String,
    /// The PID of the group's root, the process itself if it is alone.
    root: i32,
    state: StateWord,
    modules: Vec<ModuleReport>,
    /// Its own code that lies on huge pages.
    huge_text: Vec<HugeText>,
    /// How long all threads were stopped when the newest generation was applied.
    stop_ns: u64,
    threads: u64,
    damaged: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ModuleReport {
    name: String,
    build_id: String,
    state: StateWord,
    plan: String,
    functions: usize,
    patches: usize,
    patches_in_force: usize,
    code_bytes: u64,
    hot_bytes: u64,
    mapped_bytes: u64,
    huge_page: bool,
    stop_ns: u64,
    threads: u64,
    applied_at_s: u64,
    /// Work per CPU time, divided by that of the original code, as `optimize` measured it; null if it did not.
    gain: Option<Ratio>,
    /// Why its memory was not freed when that was last tried; null if it is in force or was not tried.
    kept: Option<String>,
    refused: Vec<Refused>,
}

/// Shows one program, or every one that is optimised.
///
/// # Errors
/// If the process can't be found or read.
pub fn run(args: &StatusArgs, contact: Option<&Contact>, out: Output) -> Result<(), Failure> {
    let daemon = contact.map_or(Ok(None), Contact::status)?;
    let mut report = StatusReport { daemon, processes: Vec::new(), not_permitted: 0, verbose: out.verbose() > 0 };
    match &args.pid {
        Some(spec) => {
            let known = |p: &ProgramStatus, group: Option<&Group>| match group {
                Some(group) => p.pid == group.root.pid,
                None => p.name == *spec || p.pid.to_string() == *spec,
            };
            let group = match find(spec) {
                Ok(group) => group,
                // The daemon may see what this user may not.
                Err(_) if report.keep_only(|p| known(p, None)) => {
                    out.report(&report);
                    return Ok(());
                }
                Err(e) => return Err(e),
            };
            let known = report.keep_only(|p| known(p, Some(&group)));
            for member in root_first(&group) {
                match dyni_applier::status(member.pid) {
                    Ok(status) => report.processes.push(ProcessReport::new(&group, &member, &status)),
                    // A child that ended meanwhile is no longer part of the program.
                    Err(e) if has_ended(&member, &e) && group.members.len() > 1 => {}
                    Err(e) if known && e.is_refusal() => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        None => {
            let found = dynimized()?;
            report.not_permitted = found.not_permitted;
            for (group, members) in &found.groups {
                report.processes.extend(members.iter().map(|(t, s)| ProcessReport::new(group, t, s)));
            }
        }
    }
    out.report(&report);
    Ok(())
}

/// The programs on this host that hold a ledger.
#[derive(Debug, Default)]
pub struct Found {
    /// By group: the members that hold one.
    pub groups: Vec<(Group, Vec<(Target, Status)>)>,
    /// Processes that could not be looked into.
    pub not_permitted: usize,
}

/// Looks through every process of the host.
///
/// # Errors
/// If /proc can't be listed.
pub fn dynimized() -> Result<Found, Failure> {
    let list = std::fs::read_dir("/proc").map_err(|e| Failure::failed("list the processes of this host", e))?;
    let mut pids: Vec<i32> = list.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    let mut found = Found::default();
    for pid in pids {
        let target = match Target::by_pid(pid) {
            Ok(target) => target,
            Err(dyni_collector::TargetError::NotPermitted { .. }) => {
                found.not_permitted += 1;
                continue;
            }
            // Kernel threads, zombies, 32-bit programs, whoever ended meanwhile: they hold no ledger of ours.
            Err(_) => continue,
        };
        let status = match dyni_applier::status(pid) {
            Ok(status) => status,
            Err(e) => {
                found.not_permitted += usize::from(e.is_refusal());
                continue;
            }
        };
        if status.modules.is_empty() && status.huge_text.is_empty() && status.damaged.is_empty() {
            continue;
        }
        let known = found.groups.iter_mut().find(|(group, _)| group.member(pid).is_some());
        match known {
            Some((_, members)) => members.push((target, status)),
            None => {
                let Ok(group) = Group::of(&target) else { continue };
                found.groups.push((group, vec![(target, status)]));
            }
        }
    }
    Ok(found)
}

impl ProcessReport {
    fn new(group: &Group, target: &Target, status: &Status) -> Self {
        let newest = status.modules.iter().max_by_key(|m| m.applied_at_s);
        Self {
            pid: target.pid,
            name: target.name.clone(),
            root: group.root.pid,
            state: StateWord(status.state),
            stop_ns: newest.map_or(0, |m| m.stop.as_nanos() as u64),
            threads: newest.map_or(0, |m| m.threads),
            modules: status.modules.iter().map(ModuleReport::new).collect(),
            huge_text: status.huge_text.iter().map(HugeText::from).collect(),
            damaged: status.damaged.clone(),
        }
    }
}

impl ModuleReport {
    fn new(m: &ModuleStatus) -> Self {
        Self {
            name: m.name.clone(),
            build_id: m.build_id.clone(),
            state: StateWord(m.state),
            plan: BlobId(m.plan).hex(),
            functions: m.functions,
            patches: m.patches,
            patches_in_force: m.in_force,
            code_bytes: m.code_size,
            hot_bytes: m.hot_size,
            mapped_bytes: m.mapped,
            huge_page: m.huge_bytes > 0,
            stop_ns: m.stop.as_nanos() as u64,
            threads: m.threads,
            applied_at_s: m.applied_at_s,
            gain: m.gain.map(Ratio::from),
            kept: m.kept.map(Kept::text),
            refused: Refused::of(&m.refused),
        }
    }
}

impl StatusReport {
    /// Leaves only those of the daemon's programs; whether there is one.
    fn keep_only(&mut self, wanted: impl Fn(&ProgramStatus) -> bool) -> bool {
        self.daemon.as_mut().is_some_and(|d| {
            d.programs.retain(wanted);
            !d.programs.is_empty()
        })
    }
}

impl Report for StatusReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = String::new();
        let followed = self.daemon.iter().flat_map(|d| &d.programs);
        for program in followed.clone() {
            text.push_str(&state_line(&program.name, program.pid, program.processes, program.state.name()));
            text.push('\n');
            let group: Vec<_> = self.processes.iter().filter(|p| p.root == program.pid).collect();
            // While code is made and measured, what is in force changes many times a second.
            if self.verbose || !matches!(program.state, Followed::Profiling | Followed::Dynimizing) {
                group_text(&group, self.verbose, paint, &mut text);
            }
            program_text(program, paint, &mut text);
        }
        let others: Vec<_> = self.processes.iter().filter(|p| followed.clone().all(|f| f.pid != p.root)).collect();
        for group in others.chunk_by(|a, b| a.root == b.root) {
            let state = combined(group.iter().map(|p| p.state.0));
            text.push_str(&state_line(&group[0].name, group[0].root, group.len(), state.name()));
            text.push('\n');
            group_text(group, self.verbose, paint, &mut text);
        }
        let idle = text.is_empty();
        if let Some(read) = self.daemon.as_ref().and_then(|d| d.read_ahead.as_ref()) {
            read_ahead_text(read, paint, &mut text);
        }
        if idle {
            text.push_str(match self.daemon {
                Some(_) => "dyni runs; no program that is listed does, and no process is dynimized\n",
                None => "no process is dynimized\n",
            });
        }
        if self.not_permitted > 0 && self.daemon.is_none() {
            let many = plural(self.not_permitted as u64, "process", "processes");
            text.push_str(&paint.dim(&format!("{many} could not be looked into: not permitted\n")));
        }
        text
    }
}

/// What a daemon knows of a program besides its state.
fn program_text(program: &ProgramStatus, paint: Paint, text: &mut String) {
    if let (Some(in_cache), Some(drift)) = (program.in_cache, program.drift) {
        text.push_str(&format!("  {:.0} % of its time in copies, drift {drift:.2}\n", in_cache * 100.0));
    }
    if !program.reason.is_empty() {
        text.push_str(&format!("  {}\n", paint.dim(&program.reason)));
    }
}

/// What was read ahead; nothing where there was nothing to read.
fn read_ahead_text(read: &ReadAheadStatus, paint: Paint, text: &mut String) {
    if read.starts > 0 {
        let (pages, starts) = (plural(read.pages, "page", "pages"), plural(read.starts, "start", "starts"));
        text.push_str(&paint.dim(&format!("{pages} read ahead at {starts} of programs\n")));
    }
    if !read.stopped.is_empty() {
        text.push_str(&format!("not read ahead any more, as it did not help: {}\n", read.stopped.join(", ")));
    }
}

fn group_text(group: &[&ProcessReport], verbose: bool, paint: Paint, text: &mut String) {
    let shown = if verbose { group } else { &group[..group.len().min(1)] };
    for process in shown {
        if verbose && group.len() > 1 {
            text.push_str(&format!("  pid {}: {}\n", process.pid, process.state));
        }
        let mut table = Table::new(&[
            ("module", Align::Left),
            ("state", Align::Left),
            ("functions", Align::Right),
            ("patches", Align::Right),
            ("hot code", Align::Right),
            ("huge page", Align::Left),
            ("stopped", Align::Right),
            ("plan", Align::Left),
        ]);
        // Generations that were undone, or that only counted, are of interest where nothing else is there.
        let in_force = process.modules.iter().any(|m| m.patches_in_force > 0);
        for m in process.modules.iter().filter(|m| verbose || !in_force || m.patches_in_force > 0) {
            table.row([
                m.name.clone(),
                m.state.to_string(),
                thousands(m.functions as u64),
                format!("{}/{}", thousands(m.patches_in_force as u64), thousands(m.patches as u64)),
                human_bytes(m.hot_bytes),
                if m.huge_page { "yes" } else { "no" }.to_owned(),
                human_ns(m.stop_ns),
                m.plan.chars().take(12).collect(),
            ]);
        }
        if !table.is_empty() {
            text.push_str(&table.render("  ", paint));
        }
        let dynimized = process.modules.iter().filter(|m| m.state.0 == State::Dynimized);
        // Modules of one plan were measured together.
        if let Some(gain) = dynimized.filter_map(|m| m.gain).next_back() {
            text.push_str(&format!("  gain {gain}\n"));
        }
        text.push_str(&huge_text::line(&process.huge_text));
        let retired = || process.modules.iter().filter(|m| m.patches_in_force == 0);
        let bytes: u64 = retired().map(|m| m.mapped_bytes).sum();
        if bytes > 0 {
            let many = plural(retired().count() as u64, "generation", "generations");
            text.push_str(&format!("  {} of {many} out of force not freed yet\n", human_bytes(bytes)));
        }
        for m in retired().filter(|_| verbose) {
            if let Some(kept) = &m.kept {
                text.push_str(&format!("  {}: {} kept: {kept}\n", m.name, human_bytes(m.mapped_bytes)));
            }
        }
        if verbose {
            for m in process.modules.iter() {
                for refused in &m.refused {
                    text.push_str(&format!(
                        "  {}: {} left out: {}\n",
                        m.name,
                        thousands(refused.count),
                        refused.reason
                    ));
                }
            }
        }
        for damaged in &process.damaged {
            text.push_str(&format!("  {}\n", paint.bad(damaged)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, root: i32, state: State) -> ProcessReport {
        ProcessReport {
            pid,
            name: "nginx".into(),
            root,
            state: StateWord(state),
            modules: Vec::new(),
            huge_text: Vec::new(),
            stop_ns: 0,
            threads: 0,
            damaged: Vec::new(),
        }
    }

    fn report(processes: Vec<ProcessReport>) -> StatusReport {
        StatusReport { daemon: None, processes, not_permitted: 0, verbose: false }
    }

    #[test]
    fn a_group_is_one_line_and_two_groups_are_two() {
        let state = State::Dynimized;
        let one = report(vec![process(7, 7, state), process(8, 7, state), process(20, 20, State::Undynimized)]);
        assert_eq!(
            one.text(Paint::PLAIN),
            "nginx, parent pid 7 and its children, dynimized\nnginx, pid: 20, undynimized\n"
        );
    }

    #[test]
    fn a_daemon_knows_more_than_the_ledgers() {
        let program = ProgramStatus {
            pid: 7,
            name: "nginx".into(),
            uid: 0,
            processes: 2,
            state: Followed::Waiting,
            for_ns: 0,
            reason: "no samples".into(),
            cpu_percent: None,
            gain: None,
            stop_ns: 0,
            refused: 0,
            drift: None,
            in_cache: None,
        };
        let daemon = DaemonStatus { programs: vec![program], ..DaemonStatus::default() };
        let processes = vec![process(7, 7, State::Undynimized), process(20, 20, State::Dynimized)];
        let mut report = StatusReport { daemon: Some(daemon), ..report(processes) };
        let lines = "nginx, parent pid 7 and its children, waiting\n  no samples\nnginx, pid: 20, dynimized\n";
        assert_eq!(report.text(Paint::PLAIN), lines);
        let read = ReadAheadStatus { starts: 2, pages: 1200, missed: 0, stopped: vec!["git".into(), "node".into()] };
        report.daemon.as_mut().unwrap().read_ahead = Some(read);
        assert_eq!(
            report.text(Paint::PLAIN),
            format!(
                "{lines}1,200 pages read ahead at 2 starts of programs\n\
                 not read ahead any more, as it did not help: git, node\n"
            )
        );
        assert!(!report.keep_only(|p| p.pid == 20));
        assert!(report.text(Paint::PLAIN).starts_with("nginx, pid: 7, undynimized\n"));
    }

    #[test]
    fn nothing_is_said_too() {
        assert_eq!(report(Vec::new()).text(Paint::PLAIN), "no process is dynimized\n");
    }

    #[test]
    fn json_has_the_agreed_names() {
        let json = serde_json::to_value(report(vec![process(7, 7, State::PartlyDynimized)])).unwrap();
        assert_eq!(json["processes"][0]["state"], "partly dynimized");
        assert_eq!(json["processes"][0]["pid"], 7);
        assert!(json["processes"][0]["stop_ns"].is_u64());
    }
}
