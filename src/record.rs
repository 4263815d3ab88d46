//! `dyni record`: where a program's time goes, kept as a profile.

mod working_set;

use dyni_applier::{Resolver, State};
use dyni_collector::attribution::bounded;
use dyni_collector::record::{MethodChoice, Progress, RecordOptions, Recording, StopReason};
use dyni_collector::{Group, record};
use dyni_schema::{Method, Profile, RunAddr};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

use crate::cli::{MethodArg, RecordArgs};
use crate::count::{count_group, sampling_part};
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::interrupt::Interruptible;
use crate::modules::{self, Binary};
use crate::output::{Align, Output, Paint, Report, Table, plural, thousands};
use crate::store::Store;
use crate::targets::find;

/// Fewer samples than this make a plan that leaves out much.
const FEW: u64 = 500;

/// `dyni record --json`.
#[derive(Debug, Serialize)]
pub struct RecordReport {
    /// The profile's id in the archive.
    pub profile: String,
    program: String,
    root: i32,
    label: String,
    /// The sampler that was used.
    pub method: &'static str,
    method_note: String,
    duration_ns: u64,
    frequency_hz: u64,
    processes: u32,
    threads: u32,
    /// Samples in code of known modules.
    pub samples: u64,
    outside: u64,
    kernel: u64,
    in_cache: u64,
    lost: u64,
    ended: &'static str,
    modules: Vec<ModuleReport>,
}

#[derive(Debug, Serialize)]
struct ModuleReport {
    name: String,
    build_id: String,
    samples: u64,
}

/// Records a program and keeps the profile.
///
/// # Errors
/// There is no such program, no sampler, no samples, or the archive can't be written.
pub fn run(args: &RecordArgs, store: &Store, out: Output) -> Result<(), Failure> {
    if args.working_set {
        return working_set::run(args, store, out);
    }
    let mut group = find(&args.pid)?;
    store.check_writable()?;
    let (mut recording, binaries) = profile_group(&mut group, args.duration, args.method, &args.label, out)?;
    let id = keep(&mut recording.profile, &binaries, store)?;
    out.report(&RecordReport::new(&group, &recording, id));
    Ok(())
}

/// Keeps a profile, with the hashes of the functions in which anything was seen, so that it still serves when the program
/// has been rebuilt; its id.
///
/// # Errors
/// The archive can't be written.
pub fn keep(profile: &mut Profile, binaries: &[Binary], store: &Store) -> Result<String, Failure> {
    let modules: Vec<_> = binaries.iter().map(Binary::module).collect();
    dyni_analyzer::plan::annotate(profile, &modules);
    store.keep_profile(profile)
}

/// The sampler that a word on the command line means; counting begins with samples too.
const fn sampler(method: MethodArg) -> MethodChoice {
    match method {
        MethodArg::Auto | MethodArg::Count => MethodChoice::Auto,
        MethodArg::Lbr => MethodChoice::Only(Method::Lbr),
        MethodArg::Cycles => MethodChoice::Only(Method::Cycles),
        MethodArg::Clock => MethodChoice::Only(Method::Clock),
        MethodArg::Ptrace => MethodChoice::Only(Method::Ptrace),
    }
}

/// Samples a program and then, if asked or if there is nothing better, counts; with the binaries that were sampled.
///
/// # Errors
/// Why there is no recording. That a program can't be counted is an error only if that was asked for.
pub fn profile_group(
    group: &mut Group,
    duration: Duration,
    method: MethodArg,
    label: &str,
    out: Output,
) -> Result<(Recording, Vec<Binary>), Failure> {
    let may_count = matches!(method, MethodArg::Auto | MethodArg::Count);
    // Copies that are in force already would be taken out by counting.
    let state = dyni_applier::status(group.root.pid)?.state;
    let can_count = may_count && state == State::Undynimized;
    if method == MethodArg::Count && !can_count {
        return Err(Failure::refused(format!("count {}", group.root.name), format!("it is {}", state.name()))
            .help("`dyni undo` first: what is counted is the original code"));
    }
    let sampling = if can_count { sampling_part(duration) } else { duration };
    let mut recording = record_group(group, sampling, sampler(method), label, None, out)?;
    let binaries = {
        let _progress = out.progress("reading the binaries");
        modules::of_profile(&recording.profile, std::slice::from_ref(&group.root))
    };
    let counts_pay = method == MethodArg::Count || recording.profile.method != Method::Lbr;
    if can_count && counts_pay && recording.stopped == StopReason::Complete {
        let counted = count_group(group, &mut recording.profile, &binaries, duration, out);
        match counted {
            Ok(()) => recording.profile.duration_ns = duration.as_nanos() as u64,
            Err(e) if method == MethodArg::Count => return Err(e),
            Err(e) => {
                let note = &mut recording.profile.method_note;
                *note = bounded(&format!("{note}{}count: {e}", if note.is_empty() { "" } else { "; " }));
            }
        }
    }
    Ok((recording, binaries))
}

/// Records with a progress bar; Ctrl-C ends it and keeps what there is. Samples in the code cache of a program that is
/// dynimized count where their originals are. Without a `frequency_hz` the rate is the sampler's own.
///
/// # Errors
/// Why there is no recording.
pub fn record_group(
    group: &Group,
    duration: Duration,
    method: MethodChoice,
    label: &str,
    frequency_hz: Option<u64>,
    out: Output,
) -> Result<Recording, Failure> {
    let interruptible = Interruptible::new();
    let title = format!("profiling {}, pid: {}", group.root.name, group.root.pid);
    let bar = out.progress_of(&title, duration.as_millis() as u64);
    let caches = RefCell::new(HashMap::new());
    let resolve = |pid: i32, at: RunAddr| {
        let mut caches = caches.borrow_mut();
        // A process that can't be read any more has ended; its last samples count as outside.
        caches.entry(pid).or_insert_with(|| Resolver::of(pid).unwrap_or_default()).resolve(at)
    };
    let options = RecordOptions { duration, method, frequency_hz, label: label.to_owned(), resolve: Some(&resolve) };
    let mut tick = |p: Progress| {
        bar.set(p.elapsed.as_millis() as u64);
        bar.say(&format!("{title} ({}): {} samples", p.method.name(), thousands(p.totals.samples)));
        !interruptible.asked()
    };
    Ok(record(group, &options, &mut tick)?)
}

impl RecordReport {
    /// What was recorded, under this id in the archive.
    pub fn new(group: &Group, recording: &Recording, id: String) -> Self {
        let Profile { modules, .. } = &recording.profile;
        let p = &recording.profile;
        let mut modules: Vec<_> = modules
            .iter()
            .map(|m| ModuleReport { name: m.name.clone(), build_id: m.build_id.hex(), samples: m.samples.total() })
            .collect();
        modules.sort_by(|a, b| b.samples.cmp(&a.samples).then_with(|| a.name.cmp(&b.name)));
        Self {
            profile: id,
            program: p.program.clone(),
            root: group.root.pid,
            label: p.label.clone(),
            method: p.method.name(),
            method_note: p.method_note.clone(),
            duration_ns: p.duration_ns,
            frequency_hz: p.frequency_hz,
            processes: p.processes,
            threads: p.threads,
            samples: p.samples,
            outside: p.outside,
            kernel: p.kernel,
            in_cache: p.in_cache,
            lost: p.lost,
            ended: match recording.stopped {
                StopReason::Complete => "complete",
                StopReason::Interrupted => "interrupted",
                StopReason::TargetExited => "target exited",
            },
            modules,
        }
    }
}

impl RecordReport {
    /// One line.
    pub fn summary(&self, paint: Paint) -> String {
        format!(
            "{}: {} in {} with `{}`, {}, {}\n",
            paint.bold(&self.program),
            plural(self.samples, "sample", "samples"),
            human_ns(self.duration_ns),
            self.method,
            plural(self.processes.into(), "process", "processes"),
            plural(self.threads.into(), "thread", "threads"),
        )
    }
}

impl Report for RecordReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = self.summary(paint);
        let mut table = Table::new(&[("module", Align::Left), ("samples", Align::Right), ("share", Align::Right)]);
        let all = self.modules.iter().map(|m| m.samples).sum::<u64>().max(1);
        for m in self.modules.iter().filter(|m| m.samples > 0).take(8) {
            let share = m.samples as f64 * 100.0 / all as f64;
            table.row([m.name.clone(), thousands(m.samples), format!("{share:.1} %")]);
        }
        text.push_str(&table.render("  ", paint));
        let mut also = Vec::new();
        for (count, what) in [
            (self.in_cache, "of them in the code cache"),
            (self.kernel, "in the kernel"),
            (self.outside, "in code of no file"),
            (self.lost, "lost by the kernel"),
        ] {
            if count > 0 {
                also.push(format!("{} {what}", thousands(count)));
            }
        }
        if !also.is_empty() {
            text.push_str(&format!("  also {}\n", also.join(", ")));
        }
        if !self.method_note.is_empty() {
            text.push_str(&paint.dim(&format!("  not used: {}\n", self.method_note)));
        }
        if self.ended != "complete" {
            text.push_str(&paint.warn(&format!("  ended early: {}\n", self.ended)));
        }
        if self.samples < FEW {
            text.push_str(&paint.warn("  few samples: record longer, or under more load\n"));
        }
        text.push_str(&format!("profile {}\n", paint.bold(&self.profile)));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_begins_with_the_best_sampler() {
        assert_eq!(sampler(MethodArg::Count), MethodChoice::Auto);
        assert_eq!(sampler(MethodArg::Clock), MethodChoice::Only(Method::Clock));
    }
}
