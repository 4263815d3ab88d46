//! `dyni symbols`: what debuggers and profilers have to know of the copies in a program, where they look for it.
//!
//! For `perf` a map of each process, which an apply writes too: this command is for children that were forked since. For a
//! debugger a file of symbols and call frames of one process, which share/gdb/dyni.py asks for when gdb attaches.

use std::path::Path;

use dyni_applier::symbols::Symbolizer;
use dyni_collector::{Target, TargetError};
use serde::Serialize;

use crate::cli::SymbolsArgs;
use crate::errors::Failure;
use crate::output::{Output, Paint, Report, plural};
use crate::perf_map;
use crate::targets::{find, has_ended, root_first};

/// `dyni symbols --json`.
#[derive(Debug, Serialize)]
pub struct SymbolsReport {
    /// The file that was asked for with `--output`; null if the process holds no copies, or without that option.
    file: Option<String>,
    /// The processes that hold copies.
    processes: Vec<ProcessReport>,
    /// What could not be done.
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ProcessReport {
    pid: i32,
    /// How many functions' parts were named.
    symbols: usize,
    /// Functions whose caller a debugger can't find, with `--output`; else 0.
    without_frames: usize,
    /// Its perf map; null with `--output`, or if it could not be written.
    perf_map: Option<String>,
}

/// Writes the perf maps of a program, or a symbol file of one process.
///
/// # Errors
/// There is no such process, it can't be read, or the file can't be written.
pub fn run(args: &SymbolsArgs, out: Output) -> Result<(), Failure> {
    let mut report = SymbolsReport { file: None, processes: Vec::new(), notes: Vec::new() };
    match &args.output {
        Some(path) => {
            let pid = match Target::find(&args.pid) {
                Ok(target) => target.pid,
                // It is only looked at, and the debugger that holds it may be who asks.
                Err(TargetError::Traced { pid, .. }) => pid,
                Err(e) => return Err(e.into()),
            };
            report.symbol_file(pid, path)?;
        }
        None => report.perf_maps(&root_first(&find(&args.pid)?))?,
    }
    out.report(&report);
    Ok(())
}

/// Writes the perf maps of these processes; what could not be done.
pub fn write_perf_maps(members: &[Target]) -> Vec<String> {
    let mut report = SymbolsReport { file: None, processes: Vec::new(), notes: Vec::new() };
    match report.perf_maps(members) {
        Ok(()) => report.notes,
        Err(e) => vec![e.to_string()],
    }
}

impl SymbolsReport {
    fn perf_maps(&mut self, members: &[Target]) -> Result<(), Failure> {
        perf_map::sweep();
        let mut symbolizer = Symbolizer::default();
        for member in members {
            let symbols = match symbolizer.symbols(member.pid) {
                Ok(symbols) if symbols.is_empty() => continue,
                Ok(symbols) => symbols,
                // A child that ended meanwhile is no longer part of the program.
                Err(e) if has_ended(member, &e) && members.len() > 1 => continue,
                Err(e) => return Err(e.into()),
            };
            let written = perf_map::write(member.pid, &symbols).map_err(|note| self.notes.push(note));
            self.processes.push(ProcessReport {
                pid: member.pid,
                symbols: symbols.len(),
                without_frames: 0,
                perf_map: written.ok().map(|path| path.display().to_string()),
            });
        }
        Ok(())
    }

    fn symbol_file(&mut self, pid: i32, path: &Path) -> Result<(), Failure> {
        let Some(file) = Symbolizer::default().symbol_file(pid)? else { return Ok(()) };
        std::fs::write(path, &file.bytes).map_err(|e| Failure::failed(format!("write {}", path.display()), e))?;
        self.file = Some(path.display().to_string());
        self.processes.push(ProcessReport {
            pid,
            symbols: file.symbols,
            without_frames: file.without_frames,
            perf_map: None,
        });
        Ok(())
    }
}

impl Report for SymbolsReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = String::new();
        for p in &self.processes {
            let names = plural(p.symbols as u64, "name", "names");
            match self.file.as_ref().or(p.perf_map.as_ref()) {
                Some(path) => text.push_str(&format!("pid {}: {names} in {path}\n", p.pid)),
                None => text.push_str(&format!("pid {}: not written\n", p.pid)),
            }
            if p.without_frames > 0 {
                let many = plural(p.without_frames as u64, "function", "functions");
                text.push_str(
                    &paint.warn(&format!("  {many} without call frames: their unwind data are not understood\n")),
                );
            }
        }
        if self.processes.is_empty() {
            text.push_str("the program holds no copies: there is nothing to name\n");
        }
        for note in &self.notes {
            text.push_str(&paint.warn(&format!("{note}\n")));
        }
        text
    }
}
