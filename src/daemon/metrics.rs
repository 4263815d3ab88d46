//! What Prometheus reads: the daemon's programs and its own cost, in the text format, over as much HTTP as that takes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::machine::{Job, Outcome, State};
use super::protocol::{DaemonStatus, ProgramStatus, ReadAheadStatus};

/// How many jobs have ended, by kind and how.
#[derive(Debug, Default)]
pub struct Totals(BTreeMap<(&'static str, &'static str), u64>);

impl Totals {
    /// Counts a job that has ended.
    pub fn count(&mut self, job: Job, outcome: &Outcome) {
        let job = match job {
            Job::Reuse => "reuse",
            Job::Optimize { .. } => "optimize",
            Job::Undo => "undo",
            Job::Watch => "watch",
        };
        let outcome = match outcome {
            Outcome::Done(report) if report.taken_out => "taken_out",
            Outcome::Done(_) => "done",
            Outcome::NoPlan => "no_plan",
            Outcome::Failed(_) => "failed",
            Outcome::Refused(_) => "refused",
            Outcome::Killed => "killed",
        };
        *self.0.entry((job, outcome)).or_default() += 1;
    }
}

/// The answer to a request, whose head this is.
pub fn http(head: &[u8], status: &DaemonStatus, totals: &Totals) -> Vec<u8> {
    let (code, body) = match head.starts_with(b"GET ") {
        true => ("200 OK", text(status, totals)),
        false => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    format!(
        "HTTP/1.1 {code}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn text(status: &DaemonStatus, totals: &Totals) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, lines: Vec<(String, f64)>| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in lines {
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    let of_state = |state: State| {
        let count = status.programs.iter().filter(|p| p.state == state).count();
        (format!("state=\"{}\"", state.name()), count as f64)
    };
    family("dyni_programs", "gauge", "Programs that are followed, by state.", State::ALL.map(of_state).to_vec());
    let each = |value: &dyn Fn(&ProgramStatus) -> Option<f64>| -> Vec<(String, f64)> {
        let labels = |p: &ProgramStatus| format!("name=\"{}\",pid=\"{}\"", escaped(&p.name), p.pid);
        status.programs.iter().filter_map(|p| Some((labels(p), value(p)?))).collect()
    };
    let was_changed = |p: &ProgramStatus| p.stop_ns > 0;
    family(
        "dyni_program_gain_ratio",
        "gauge",
        "Work per CPU time, divided by that of the original code.",
        each(&|p| p.gain),
    );
    family(
        "dyni_program_stop_seconds",
        "gauge",
        "How long all threads were stopped by the newest change.",
        each(&|p| was_changed(p).then_some(p.stop_ns as f64 / 1e9)),
    );
    family(
        "dyni_program_refused_functions",
        "gauge",
        "Functions that were left out of the newest generation.",
        each(&|p| was_changed(p).then_some(p.refused as f64)),
    );
    family(
        "dyni_program_drift_ratio",
        "gauge",
        "How far the work has moved from the plan, 0 to 1.",
        each(&|p| p.drift),
    );
    family(
        "dyni_program_cache_ratio",
        "gauge",
        "The share of the time that is spent in copies.",
        each(&|p| p.in_cache),
    );
    family(
        "dyni_program_cpu_ratio",
        "gauge",
        "How much of one processor the program uses.",
        each(&|p| p.cpu_percent.map(|c| c / 100.0)),
    );
    let jobs = totals.0.iter().map(|((job, outcome), n)| (format!("job=\"{job}\",outcome=\"{outcome}\""), *n as f64));
    family("dyni_jobs_total", "counter", "Jobs that have ended, by kind and how.", jobs.collect());
    let read = |of: &dyn Fn(&ReadAheadStatus) -> u64| -> Vec<(String, f64)> {
        status.read_ahead.iter().map(|r| (String::new(), of(r) as f64)).collect()
    };
    family(
        "dyni_read_ahead_starts_total",
        "counter",
        "Starts of programs whose working set is known.",
        read(&|r| r.starts),
    );
    family("dyni_read_ahead_pages_total", "counter", "Pages that were read ahead for them.", read(&|r| r.pages));
    let cpu = vec![(String::new(), status.cpu_ns as f64 / 1e9)];
    family("dyni_daemon_cpu_seconds_total", "counter", "Processor time of the daemon itself, without its jobs.", cpu);
    let uptime = vec![(String::new(), status.uptime_ns as f64 / 1e9)];
    family("dyni_daemon_uptime_seconds", "gauge", "How long the daemon has been running.", uptime);
    out
}

/// A label's value, which is a file's name and may hold anything.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_there() {
        let program = ProgramStatus {
            pid: 7,
            name: "a\"b".into(),
            uid: 0,
            processes: 1,
            state: State::Dynimized,
            for_ns: 0,
            reason: String::new(),
            cpu_percent: Some(50.0),
            gain: Some(1.07),
            stop_ns: 1_500_000,
            refused: 3,
            drift: None,
            in_cache: Some(0.9),
        };
        let read_ahead = Some(ReadAheadStatus { starts: 2, pages: 300, ..ReadAheadStatus::default() });
        let status =
            DaemonStatus { cpu_ns: 2_500_000_000, programs: vec![program], read_ahead, ..DaemonStatus::default() };
        let mut totals = Totals::default();
        totals.count(Job::Undo, &Outcome::Killed);
        let answer = String::from_utf8(http(b"GET /metrics HTTP/1.1\r\n\r\n", &status, &totals)).unwrap();
        for line in [
            "dyni_programs{state=\"dynimized\"} 1",
            "dyni_programs{state=\"waiting\"} 0",
            "dyni_program_gain_ratio{name=\"a\\\"b\",pid=\"7\"} 1.07",
            "dyni_program_stop_seconds{name=\"a\\\"b\",pid=\"7\"} 0.0015",
            "dyni_program_refused_functions{name=\"a\\\"b\",pid=\"7\"} 3",
            "dyni_program_cache_ratio{name=\"a\\\"b\",pid=\"7\"} 0.9",
            "dyni_program_cpu_ratio{name=\"a\\\"b\",pid=\"7\"} 0.5",
            "dyni_jobs_total{job=\"undo\",outcome=\"killed\"} 1",
            "dyni_read_ahead_pages_total 300",
            "dyni_daemon_cpu_seconds_total 2.5",
        ] {
            assert!(answer.lines().any(|l| l == line), "{line}\n{answer}");
        }
        assert!(!answer.contains("dyni_program_drift_ratio{"), "{answer}");
        assert!(http(b"POST / HTTP/1.1\r\n\r\n", &status, &totals).starts_with(b"HTTP/1.1 405"));
    }
}
