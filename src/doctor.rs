//! `dyni doctor`: what this host, a process or a file allows, what not, why, and how to change it.
//!
//! Every list here is made from the code's own tables: the collector's checks, the analyzer's runtimes, passes and
//! reasons. What is not in a table is not claimed.

use dyni_analyzer::refuse::RUNTIMES;
use dyni_collector::host::{self, Verdict};
use dyni_collector::{ErrorKind, Group, Target};
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::errors::Failure;
use crate::examine::{ModuleReport, examine};
use crate::modules::{self, Binary};
use crate::output::{Align, Output, Paint, Report, Table, human_bytes, plural, thousands};
use crate::targets::{StateWord, combined, state_line};

/// `dyni doctor --json`.
#[derive(Debug, Serialize)]
struct DoctorReport {
    host: Vec<CheckReport>,
    /// The process that was asked for.
    process: Option<ProcessReport>,
    /// Its modules, or the file that was asked for.
    modules: Vec<ModuleReport>,
    /// Runtimes whose modules are never optimised.
    runtimes: Vec<RuntimeReport>,
    #[serde(skip)]
    verbose: bool,
}

#[derive(Debug, Serialize)]
struct CheckReport {
    id: &'static str,
    title: &'static str,
    found: String,
    /// `ok`, `limited` or `missing`.
    verdict: &'static str,
    remedy: String,
}

#[derive(Debug, Serialize)]
struct RuntimeReport {
    name: &'static str,
    reason: &'static str,
}

#[derive(Debug, Default, Serialize)]
struct ProcessReport {
    /// Why the process can't be a target; `null` if it can.
    refused: Option<String>,
    pid: Option<i32>,
    name: Option<String>,
    /// The PID of the group's first process.
    root: Option<i32>,
    processes: usize,
    threads: u32,
    state: Option<StateWord>,
    exe: Option<String>,
    /// Whether the executable's file was removed or replaced since it was started; no obstacle.
    exe_deleted: bool,
}

/// Looks at the host, and at a process or a file if one is named.
///
/// # Errors
/// There is no such process, or the file can't be read as a program.
pub fn run(args: &DoctorArgs, out: Output) -> Result<(), Failure> {
    let mut report = DoctorReport {
        host: checks(),
        process: None,
        modules: Vec::new(),
        runtimes: RUNTIMES.iter().map(|r| RuntimeReport { name: r.name, reason: r.reason }).collect(),
        verbose: out.verbose() > 0,
    };
    if let Some(file) = &args.exe {
        let _progress = out.progress("taking the file apart");
        let name = file.file_name().map_or_else(|| "?".into(), |n| n.to_string_lossy());
        let is_file = std::fs::metadata(file).map_err(|e| Failure::failed(format!("read {}", file.display()), e))?;
        if !is_file.is_file() {
            return Err(Failure::failed(format!("read {}", file.display()), "it is not a plain file"));
        }
        let binary = Binary::read(file, &name)?;
        report.modules.push(examine(&binary, file.display().to_string()));
    }
    if let Some(spec) = &args.pid {
        match Target::find(spec) {
            Ok(target) => {
                let _progress = out.progress("taking the process's modules apart");
                let (process, modules) = look_into(&target)?;
                report.process = Some(process);
                report.modules = modules;
            }
            // That is what the doctor was asked for.
            Err(e) if e.kind() == ErrorKind::Refused => {
                report.process = Some(ProcessReport { refused: Some(e.to_string()), ..ProcessReport::default() });
            }
            Err(e) => return Err(e.into()),
        }
    }
    out.report(&report);
    Ok(())
}

fn checks() -> Vec<CheckReport> {
    let all = host::checks(&host::Source::default());
    let one = |c: host::Check| CheckReport {
        id: c.id,
        title: c.title,
        found: c.found,
        verdict: c.verdict.name(),
        remedy: c.remedy,
    };
    all.into_iter().map(one).collect()
}

fn look_into(target: &Target) -> Result<(ProcessReport, Vec<ModuleReport>), Failure> {
    let group = Group::of(target)?;
    let states = group.members.iter().filter_map(|m| dyni_applier::status(m.pid).ok()).map(|s| s.state);
    let process = ProcessReport {
        refused: None,
        pid: Some(target.pid),
        name: Some(target.name.clone()),
        root: Some(group.root.pid),
        processes: group.members.len(),
        threads: group.threads(),
        state: Some(StateWord(combined(states))),
        exe: Some(target.exe.display().to_string()),
        exe_deleted: target.exe_deleted,
    };
    let modules = modules::of_process(target.pid)?;
    let reports = modules.iter().map(|(mapped, read)| match read {
        Ok(binary) => examine(binary, mapped.path.display().to_string()),
        Err(failure) => ModuleReport::unreadable(mapped, failure),
    });
    Ok((process, reports.collect()))
}

impl Report for DoctorReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = paint.bold("host") + "\n" + &self.host_text(paint);
        if let Some(process) = &self.process {
            text.push('\n');
            text.push_str(&process.text(paint));
        }
        for module in &self.modules {
            text.push('\n');
            text.push_str(&module.text(paint));
        }
        text.push('\n');
        text.push_str(&self.runtimes_text(paint));
        if self.process.is_none() && self.modules.is_empty() {
            text.push_str(&paint.dim("`dyni doctor -p PID` looks into a process, `--exe FILE` into a file\n"));
        }
        text
    }
}

impl DoctorReport {
    fn host_text(&self, paint: Paint) -> String {
        let mut table = Table::new(&[("", Align::Left), ("", Align::Left), ("", Align::Left)]);
        for c in &self.host {
            let verdict = match c.verdict {
                v if v == Verdict::Ok.name() => paint.good(v),
                v if v == Verdict::Limited.name() => paint.warn(v),
                v => paint.bad(v),
            };
            table.row([verdict, c.title.to_owned(), c.found.clone()]);
        }
        let mut text = table.render("  ", paint);
        for c in self.host.iter().filter(|c| !c.remedy.is_empty()) {
            text.push_str(&format!("  {}: {}\n", c.title, c.remedy));
        }
        text
    }

    fn runtimes_text(&self, paint: Paint) -> String {
        if self.verbose {
            let mut text = "never optimised, wherever they are met:\n".to_owned();
            text.extend(self.runtimes.iter().map(|r| format!("  {}: {}\n", r.name, r.reason)));
            return text;
        }
        let names: Vec<_> = self.runtimes.iter().map(|r| r.name).collect();
        format!("never optimised: {} {}\n", names.join(", "), paint.dim("(-v says why)"))
    }
}

impl ProcessReport {
    fn text(&self, paint: Paint) -> String {
        if let Some(why) = &self.refused {
            return format!("{}\n  {why}\n", paint.bad("can't be a target"));
        }
        let (Some(name), Some(root), Some(state)) = (&self.name, self.root, self.state) else { return String::new() };
        let mut text = paint.bold(&state_line(name, root, self.processes, &state.to_string())) + "\n";
        let processes = plural(self.processes as u64, "process", "processes");
        let threads = plural(self.threads.into(), "thread", "threads");
        text.push_str(&format!("  {processes}, {threads}, {}\n", self.exe.as_deref().unwrap_or_default()));
        if self.exe_deleted {
            text.push_str(
                "  its file was removed or replaced since it was started: no obstacle, the live code is used\n",
            );
        }
        text
    }
}

impl ModuleReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = format!("{}  {}\n", paint.bold(&self.name), paint.dim(&self.path));
        if let Some(why) = &self.refused {
            text.push_str(&format!("  {} {why}\n", paint.bad("not optimised:")));
        }
        if self.functions == 0 {
            return text;
        }
        let symbols = if self.stripped { "stripped" } else { "not stripped" };
        text.push_str(&format!(
            "  {}, {symbols}, {} of code, build-id {}\n",
            self.kind,
            human_bytes(self.text_bytes),
            self.build_id
        ));
        let share = self.served as f64 * 100.0 / self.functions as f64;
        text.push_str(&format!(
            "  {} of {} ({share:.1} %) can be optimised\n",
            thousands(self.served),
            plural(self.functions, "function", "functions"),
        ));
        let mut table = Table::new(&[("", Align::Right), ("", Align::Left)]);
        for r in &self.functions_refused {
            table.row([thousands(r.count), r.reason.clone()]);
        }
        text + &table.render("    ", paint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_come_from_the_analyzers_table() {
        let report = DoctorReport {
            host: Vec::new(),
            process: None,
            modules: Vec::new(),
            runtimes: RUNTIMES.iter().map(|r| RuntimeReport { name: r.name, reason: r.reason }).collect(),
            verbose: true,
        };
        let text = report.text(Paint::PLAIN);
        assert!(RUNTIMES.iter().all(|r| text.contains(r.name) && text.contains(r.reason)));
    }

    #[test]
    fn every_check_has_a_known_verdict() {
        let words = [Verdict::Ok, Verdict::Limited, Verdict::Missing].map(Verdict::name);
        assert!(checks().iter().all(|c| words.contains(&c.verdict)));
    }
}
