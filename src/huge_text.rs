//! `dyni apply --only huge-text`: a program's original code on huge pages, and no copies.

use dyni_applier::{HugeTextApplied, HugeTextStatus, apply_huge_text};
use dyni_collector::Group;
use dyni_schema::Plan;
use serde::Serialize;

use crate::cli::ApplyArgs;
use crate::errors::Failure;
use crate::output::{Align, Output, Paint, Report, Table, human_bytes, plural};
use crate::store::Store;
use crate::symbols::write_perf_maps;
use crate::targets::{ROUNDS, Refused, born, find, has_ended, root_first};

/// `dyni apply --only huge-text --json`.
#[derive(Debug, Serialize)]
pub struct HugeTextReport {
    processes: Vec<ProcessReport>,
    /// What tools will miss that look at the program.
    notes: Vec<String>,
    #[serde(skip)]
    name: String,
    #[serde(skip)]
    root: i32,
}

#[derive(Debug, Serialize)]
struct ProcessReport {
    pid: i32,
    huge_text: Vec<HugeText>,
    /// Private memory before and after.
    private_bytes: [u64; 2],
    refused: Vec<Refused>,
}

/// Text of one module that was moved.
#[derive(Debug, Clone, Serialize)]
pub struct HugeText {
    /// The module's base name.
    pub module: String,
    /// Its build-id.
    pub build_id: String,
    /// How much of its text was moved.
    pub bytes: u64,
    /// How much of that the kernel gave huge pages.
    pub huge_bytes: u64,
}

impl From<&HugeTextStatus> for HugeText {
    fn from(m: &HugeTextStatus) -> Self {
        Self { module: m.module.clone(), build_id: m.build_id.clone(), bytes: m.bytes, huge_bytes: m.huge_bytes }
    }
}

/// A line for people about text on huge pages; empty if there is none.
pub fn line(modules: &[HugeText]) -> String {
    let each: Vec<_> = modules.iter().map(|m| format!("{} of {}", human_bytes(m.bytes), m.module)).collect();
    if each.is_empty() { String::new() } else { format!("  text on huge pages: {}\n", each.join(", ")) }
}

/// Moves the text of every member: what holds functions of the plan, if there is one, or all of it.
///
/// # Errors
/// Why the root can't be worked on, or that nothing of it could be moved.
pub fn run(args: &ApplyArgs, store: &Store, out: Output) -> Result<(), Failure> {
    let mut group = find(&args.pid)?;
    let stored = match store.plan(args.plan.as_deref(), &group.root) {
        Err(e) if args.plan.is_some() => return Err(e),
        found => found.ok(),
    };
    let all = apply_group(&mut group, stored.as_ref().map(|s| &s.plan))?;
    let processes: Vec<_> = all.iter().map(ProcessReport::new).collect();
    if processes.iter().all(|p| p.huge_text.is_empty()) {
        let why = match all.iter().find_map(|a| a.refused.first()) {
            Some((reason, _)) => reason.clone(),
            None => "it has no 2 MB of text in one piece".to_owned(),
        };
        return Err(Failure::refused(format!("move text of {} to huge pages", group.root.name), why));
    }
    let notes = write_perf_maps(&root_first(&group));
    out.report(&HugeTextReport { processes, notes, name: group.root.name.clone(), root: group.root.pid });
    Ok(())
}

/// The same for every member of a group, the root first, and then for whoever was forked meanwhile from one without.
///
/// # Errors
/// Why the root can't be worked on. A child for which it fails stays as it is.
pub fn apply_group(group: &mut Group, plan: Option<&Plan>) -> Result<Vec<HugeTextApplied>, Failure> {
    let mut all = Vec::new();
    let mut todo = root_first(group);
    for _ in 0..ROUNDS {
        for member in &todo {
            match apply_huge_text(member.pid, plan) {
                Ok(applied) => all.push(applied),
                Err(e) if member.pid != group.root.pid && (has_ended(member, &e) || e.is_refusal()) => {}
                Err(e) => return Err(e.into()),
            }
        }
        todo = born(group)?;
        if todo.is_empty() {
            break;
        }
    }
    Ok(all)
}

impl ProcessReport {
    fn new(applied: &HugeTextApplied) -> Self {
        Self {
            pid: applied.pid,
            huge_text: applied.modules.iter().map(HugeText::from).collect(),
            private_bytes: applied.private_bytes,
            refused: Refused::of(&applied.refused),
        }
    }
}

impl Report for HugeTextReport {
    fn text(&self, paint: Paint) -> String {
        let members = match self.processes.len() {
            1 => format!("pid: {}", self.root),
            _ => format!("parent pid {} and its children", self.root),
        };
        let mut text = format!("{}, {members}: text on huge pages\n", self.name);
        let Some(first) = self.processes.first() else { return text };
        let mut table =
            Table::new(&[("module", Align::Left), ("text moved", Align::Right), ("on huge pages", Align::Right)]);
        for m in &first.huge_text {
            table.row([m.module.clone(), human_bytes(m.bytes), human_bytes(m.huge_bytes)]);
        }
        text.push_str(&table.render("  ", paint));
        let [before, after] = [0, 1].map(|i| self.processes.iter().map(|p| p.private_bytes[i]).sum::<u64>());
        let many = plural(self.processes.len() as u64, "process", "processes");
        text.push_str(&format!(
            "  private memory of {many}: {} before, {} after\n",
            human_bytes(before),
            human_bytes(after)
        ));
        for refused in &first.refused {
            text.push_str(&format!("  {} of 2 MB left alone: {}\n", refused.count, refused.reason));
        }
        for note in &self.notes {
            text.push_str(&format!("  {}\n", paint.warn(note)));
        }
        text
    }
}
