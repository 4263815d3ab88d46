//! `dyni apply`: a plan's code into every process of a program.

use dyni_applier::{Applied, AppliedModule, Applier, ApplyError, Choice, Prepared, State};
use dyni_collector::Group;
use dyni_schema::Plan;
use serde::Serialize;

use crate::cli::{ApplyArgs, OnlyArg};
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::huge_text;
use crate::output::{Align, Output, Paint, Report, Table, human_bytes, plural, thousands};
use crate::store::{Store, StoredPlan};
use crate::symbols::write_perf_maps;
use crate::targets::{ROUNDS, Refused, StateWord, born, find, has_ended, root_first, state_line};
use crate::undo::{KEPT, sweep_group};

/// How often a process that changes meanwhile is tried.
const ATTEMPTS: usize = 4;

/// `dyni apply --json`.
#[derive(Debug, Serialize)]
pub struct ApplyReport {
    /// What the program is now.
    pub state: StateWord,
    /// The plan's id.
    pub plan: String,
    /// Whether everything was done but changing the program.
    pub dry_run: bool,
    /// Every process of the program that was changed (with `--dry-run`: would be).
    pub processes: Vec<ProcessReport>,
    /// Processes of the program that were left alone, and why.
    pub left_out: Vec<LeftOut>,
    /// What tools will miss that look at the program.
    pub notes: Vec<String>,
    #[serde(skip)]
    name: String,
    #[serde(skip)]
    root: i32,
    #[serde(skip)]
    verbose: bool,
}

/// A process that was left alone.
#[derive(Debug, Serialize)]
pub struct LeftOut {
    pid: i32,
    reason: String,
}

/// What was done to one process.
#[derive(Debug, Serialize)]
pub struct ProcessReport {
    pid: i32,
    /// The modules that have copies now.
    pub modules: Vec<ModuleReport>,
    /// How long all its threads were stopped.
    pub stop_ns: u64,
    /// How many threads it had.
    pub threads: usize,
    threads_moved: usize,
}

/// What was done to one module.
#[derive(Debug, Serialize)]
pub struct ModuleReport {
    name: String,
    build_id: String,
    /// Functions that have a copy.
    pub functions: usize,
    /// Places that lead into the copies.
    pub patches: usize,
    code_bytes: u64,
    /// The part of it that is hot.
    pub hot_bytes: u64,
    /// Whether the copies lie in a huge page.
    pub huge_page: bool,
    refused: Vec<Refused>,
}

/// Applies the plan that was asked for, or the newest one for this program.
///
/// # Errors
/// There is no such plan, or it can't be applied; the program is then as it was.
pub fn run(args: &ApplyArgs, store: &Store, out: Output) -> Result<(), Failure> {
    if args.only == Some(OnlyArg::HugeText) {
        return huge_text::run(args, store, out);
    }
    let mut group = find(&args.pid)?;
    let stored = store.plan(args.plan.as_deref(), &group.root)?;
    let fuel = args.fuel.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    if !args.dry_run {
        sweep_group(&mut group, KEPT);
    }
    let mut report =
        if args.dry_run { dry_run(&stored, &group, fuel)? } else { apply_group(&stored, &mut group, fuel, out)? };
    report.verbose = out.verbose() > 0;
    out.report(&report);
    Ok(())
}

fn dry_run(stored: &StoredPlan, group: &Group, fuel: Option<usize>) -> Result<ApplyReport, Failure> {
    let mut applier = Applier::new(&stored.plan, fuel)?;
    let pid = group.root.pid;
    let prepared = applier.prepare(pid)?;
    let state = dyni_applier::status(pid)?.state;
    let modules = prepared.iter().map(|p| ModuleReport::would_be(p, &stored.plan)).collect();
    let process = ProcessReport { pid, modules, stop_ns: 0, threads: group.root.threads as usize, threads_moved: 0 };
    Ok(ApplyReport { dry_run: true, processes: vec![process], ..ApplyReport::new(stored, group, state) })
}

/// Applies a plan to every member, the root first, and then to whoever was forked from a member that was still without.
///
/// A child that can't be changed for a good reason (somebody debugs it) is left alone. Any other failure undoes what was
/// done, so that the program is as it was.
///
/// # Errors
/// Why the root, or the program as a whole, could not be changed.
pub fn apply_group(
    stored: &StoredPlan,
    group: &mut Group,
    fuel: Option<usize>,
    out: Output,
) -> Result<ApplyReport, Failure> {
    apply_group_with(&mut Applier::new(&stored.plan, fuel)?, &Choice::All, stored, group, out)
}

/// The same with an applier that may have prepared the plan already, and with some of the patches only.
///
/// # Errors
/// As [`apply_group`].
pub fn apply_group_with(
    applier: &mut Applier<'_>,
    choice: &Choice,
    stored: &StoredPlan,
    group: &mut Group,
    out: Output,
) -> Result<ApplyReport, Failure> {
    let progress = out.progress("dynimizing");
    let mut report = ApplyReport::new(stored, group, State::Dynimized);
    let mut todo = root_first(group);
    for round in 0..ROUNDS {
        for member in &todo {
            progress.say(&format!("dynimizing {}, pid: {}", member.name, member.pid));
            if round > 0
                && dyni_applier::status(member.pid)
                    .is_ok_and(|s| s.state == State::Dynimized || s.state == State::Profiling)
            {
                continue; // It inherited the patches.
            }
            match patiently(applier, member.pid, choice) {
                Ok(applied) => report.processes.push(ProcessReport::new(&applied)),
                Err(e) if has_ended(member, &e) && member.pid != group.root.pid => {}
                Err(e) if e.is_refusal() && member.pid != group.root.pid => {
                    report.left_out.push(LeftOut { pid: member.pid, reason: e.to_string() });
                }
                Err(e) => return Err(rolled_back(e.into(), &report, group.root.pid)),
            }
        }
        match born(group) {
            Ok(children) => todo = children,
            Err(e) => return Err(rolled_back(e.into(), &report, group.root.pid)),
        }
        if todo.is_empty() {
            break;
        }
    }
    if !report.left_out.is_empty() {
        report.state = StateWord(State::PartlyDynimized);
    }
    report.notes = write_perf_maps(&root_first(group));
    Ok(report)
}

/// Applies to one process. One that maps something in the very moment has changed since the code was placed: then all is
/// placed anew.
///
/// # Errors
/// Why it could not be changed.
pub fn patiently(applier: &mut Applier<'_>, pid: i32, choice: &Choice) -> Result<Applied, ApplyError> {
    for _ in 1..ATTEMPTS {
        match applier.apply_chosen(pid, choice) {
            Err(ApplyError::Changed(_)) => {}
            done => return done,
        }
    }
    applier.apply_chosen(pid, choice)
}

/// Takes out what was done before the failure, by PID: the group may have changed under our hands (by an exec).
fn rolled_back(failure: Failure, report: &ApplyReport, root: i32) -> Failure {
    let gone = |pid: i32| dyni_applier::status(pid).is_err();
    let undone = |pid: i32| dyni_applier::undo(pid).err().filter(|_| !gone(pid));
    match report.processes.iter().find_map(|p| undone(p.pid)) {
        None => failure,
        Some(undo) => failure.help(format!("and it could not be taken back ({undo}): run `dyni undo -p {root}`")),
    }
}

impl ApplyReport {
    fn new(stored: &StoredPlan, group: &Group, state: State) -> Self {
        Self {
            state: StateWord(state),
            plan: stored.id.clone(),
            dry_run: false,
            processes: Vec::new(),
            left_out: Vec::new(),
            notes: Vec::new(),
            name: group.root.name.clone(),
            root: group.root.pid,
            verbose: false,
        }
    }

    /// Why functions were left out, over all modules of the first process: the others get the same code.
    pub fn refused(&self) -> Vec<Refused> {
        let modules = self.processes.first().into_iter().flat_map(|p| &p.modules);
        let all: Vec<_> = modules.flat_map(|m| &m.refused).map(|r| (r.reason.clone(), r.count)).collect();
        Refused::summed(all)
    }

    /// The longest stop of a process, ns.
    pub fn longest_stop_ns(&self) -> u64 {
        self.processes.iter().map(|p| p.stop_ns).max().unwrap_or(0)
    }
}

impl ProcessReport {
    fn new(applied: &Applied) -> Self {
        Self {
            pid: applied.pid,
            modules: applied.modules.iter().map(ModuleReport::new).collect(),
            stop_ns: applied.stop.as_nanos() as u64,
            threads: applied.threads,
            threads_moved: applied.moved,
        }
    }
}

impl ModuleReport {
    fn new(m: &AppliedModule) -> Self {
        Self {
            name: m.name.clone(),
            build_id: m.build_id.clone(),
            functions: m.functions,
            patches: m.patches,
            code_bytes: m.code_size,
            hot_bytes: m.hot_size,
            huge_page: m.huge_bytes > 0,
            refused: Refused::of(&m.refused),
        }
    }

    fn would_be(p: &Prepared, plan: &Plan) -> Self {
        let build_id = plan.modules.iter().find(|m| m.name == p.name).map(|m| m.build_id.hex());
        Self {
            name: p.name.clone(),
            build_id: build_id.unwrap_or_default(),
            functions: p.functions,
            patches: 0,
            code_bytes: p.code_size,
            hot_bytes: p.hot_size,
            huge_page: false,
            refused: Refused::of(&p.refused),
        }
    }
}

impl Report for ApplyReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = if self.dry_run {
            format!("{}, pid: {}, {}: nothing was changed; this would be applied:\n", self.name, self.root, self.state)
        } else {
            state_line(&self.name, self.root, self.processes.len(), &self.state.to_string()) + "\n"
        };
        // The processes of a group get the same code; one table says it for all.
        if let Some(first) = self.processes.first() {
            let mut table = Table::new(&[
                ("module", Align::Left),
                ("functions", Align::Right),
                ("patches", Align::Right),
                ("hot code", Align::Right),
                ("huge page", Align::Left),
            ]);
            for m in &first.modules {
                let applied = |text: String| if self.dry_run { "-".to_owned() } else { text };
                table.row([
                    m.name.clone(),
                    thousands(m.functions as u64),
                    applied(thousands(m.patches as u64)),
                    human_bytes(m.hot_bytes),
                    applied(if m.huge_page { "yes" } else { "no" }.to_owned()),
                ]);
            }
            text.push_str(&table.render("  ", paint));
            for m in &first.modules {
                let count: u64 = m.refused.iter().map(|r| r.count).sum();
                if count > 0 && !self.verbose {
                    text.push_str(&paint.dim(&format!("  {}: {} left out (-v says why)\n", m.name, thousands(count))));
                }
                for refused in m.refused.iter().filter(|_| self.verbose) {
                    text.push_str(&format!(
                        "  {}: {} left out: {}\n",
                        m.name,
                        thousands(refused.count),
                        refused.reason
                    ));
                }
            }
        }
        if !self.dry_run {
            let threads: usize = self.processes.iter().map(|p| p.threads).sum();
            text.push_str(&format!(
                "  stopped for {} ({})\n",
                paint.bold(&human_ns(self.longest_stop_ns())),
                plural(threads as u64, "thread", "threads")
            ));
        }
        for left in &self.left_out {
            text.push_str(&format!("  {}\n", paint.warn(&format!("pid {} left alone: {}", left.pid, left.reason))));
        }
        for note in &self.notes {
            text.push_str(&format!("  {}\n", paint.warn(note)));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> ApplyReport {
        let module = ModuleReport {
            name: "mariadbd".into(),
            build_id: "ab".into(),
            functions: 1076,
            patches: 1300,
            code_bytes: 900_000,
            hot_bytes: 645_120,
            huge_page: true,
            refused: vec![Refused { reason: "is too small".into(), count: 3 }],
        };
        let process =
            ProcessReport { pid: 8375, modules: vec![module], stop_ns: 2_400_000, threads: 1, threads_moved: 0 };
        ApplyReport {
            state: StateWord(State::Dynimized),
            plan: "c0ffee".into(),
            dry_run: false,
            processes: vec![process],
            left_out: Vec::new(),
            notes: Vec::new(),
            name: "mariadbd".into(),
            root: 8375,
            verbose: false,
        }
    }

    #[test]
    fn people_read_the_state_first() {
        assert_eq!(
            report().text(Paint::PLAIN),
            "mariadbd, pid: 8375, dynimized\n\
             \x20 module    functions  patches  hot code  huge page\n\
             \x20 mariadbd      1,076    1,300    630 KB  yes\n\
             \x20 mariadbd: 3 left out (-v says why)\n\
             \x20 stopped for 2.4 ms (1 thread)\n"
        );
    }

    #[test]
    fn json_has_the_agreed_names() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["state"], "dynimized");
        assert_eq!(json["plan"], "c0ffee");
        let module = &json["processes"][0]["modules"][0];
        assert_eq!((&module["functions"], &module["huge_page"]), (&1076.into(), &true.into()));
        assert_eq!(module["refused"][0]["count"], 3);
        assert_eq!(json["processes"][0]["stop_ns"], 2_400_000);
    }
}
