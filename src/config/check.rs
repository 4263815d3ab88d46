//! `dyni config check`: reads the configuration as the daemon would and says what it means.

use serde::Serialize;

use crate::cli::LimitArgs;
use crate::config::{Choice, Limit, Settings};
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::output::{Align, Output, Paint, Report, Table, human_bytes};

/// `dyni config check --json`.
#[derive(Debug, Serialize)]
struct ConfigReport {
    /// The file; null if there is none and dyni's own holds.
    file: Option<String>,
    reoptimize: bool,
    n_programs: usize,
    log: Option<String>,
    max_log_bytes: u64,
    /// User IDs; empty for everybody's programs.
    users: Vec<u32>,
    programs: Vec<ProgramReport>,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ProgramReport {
    name: String,
    window_ns: u64,
    delay_ns: u64,
    cpu_usage_percent: f64,
}

/// Reads the configuration that `--config` names, or the usual one.
///
/// # Errors
/// Exit status 2: it can't be read, or a line means nothing.
pub fn run(file: Option<&std::path::Path>, out: Output) -> Result<(), Failure> {
    out.report(&ConfigReport::of(&Settings::load(file, &LimitArgs::default())?));
    Ok(())
}

impl ConfigReport {
    fn of(s: &Settings) -> Self {
        let program = |name: &str, limit: &Limit| ProgramReport {
            name: name.to_owned(),
            window_ns: limit.window.as_nanos() as u64,
            delay_ns: limit.delay.as_nanos() as u64,
            cpu_usage_percent: limit.cpu_usage,
        };
        Self {
            file: s.file.as_ref().map(|f| f.display().to_string()),
            reoptimize: s.reoptimize,
            n_programs: s.n_programs,
            log: s.log.as_ref().map(|f| f.display().to_string()),
            max_log_bytes: s.max_log_size,
            users: s.users.clone(),
            programs: match &s.choice {
                Choice::Exes(listed) => listed.iter().map(|l| program(&l.name, &l.limit)).collect(),
                Choice::Pids(pids) => pids.iter().map(|pid| program(&pid.to_string(), &s.limit)).collect(),
            },
            notes: s.notes.clone(),
        }
    }
}

impl Report for ConfigReport {
    fn text(&self, paint: Paint) -> String {
        let file = self.file.as_deref().unwrap_or("no file: what dyni is shipped with holds");
        let users = match &self.users[..] {
            [] => "everybody's programs".to_owned(),
            ids => format!("programs of users {}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
        };
        let mut text = format!(
            "{file}\n  reoptimize {}, {} at once, log {} of {} at most, {users}\n",
            if self.reoptimize { "on" } else { "off" },
            self.n_programs,
            self.log.as_deref().unwrap_or("at its usual place"),
            human_bytes(self.max_log_bytes),
        );
        let mut table = Table::new(&[
            ("program", Align::Left),
            ("delay", Align::Right),
            ("window", Align::Right),
            ("cpu-usage", Align::Right),
        ]);
        for p in &self.programs {
            let usage = format!("{} %", p.cpu_usage_percent);
            table.row([p.name.clone(), human_ns(p.delay_ns), human_ns(p.window_ns), usage]);
        }
        match table.is_empty() {
            true => text.push_str(&paint.warn("  no program is listed: nothing will be optimised\n")),
            false => text.push_str(&table.render("  ", paint)),
        }
        for note in &self.notes {
            text.push_str(&paint.dim(&format!("  {note}\n")));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_holds_for_each_program() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dyni.conf");
        std::fs::write(&path, "[options]\nlicense=x\n[exeList]\nnginx -window=5\n").unwrap();
        let report = ConfigReport::of(&Settings::load(Some(&path), &LimitArgs::default()).unwrap());
        let text = report.text(Paint::PLAIN);
        assert!(text.contains("  nginx    60.0 s   5.0 s       10 %\n"), "{text}");
        assert!(text.contains("line 2: license"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["programs"][0]["window_ns"], 5_000_000_000_u64);
    }
}
