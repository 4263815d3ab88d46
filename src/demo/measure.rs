//! Two identical targets side by side.
//!
//! A figure taken now and a figure taken a minute ago differ by what else the machine did meanwhile. So two targets run
//! at the same time on the same processor and feel the same neighbours in the same millisecond; only B is optimised, and
//! what counts is the ratio A/B of CPU time per operation, the median over several short slices.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::board::{Board, Score};
use crate::errors::Failure;

/// The targets' program, which build.rs makes from target.c.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo-target"));
const NAME: &str = "dyni-demo";

/// A running target and its score.
pub struct Target {
    child: Child,
    board: Board,
    name: char,
}

impl Target {
    fn start(name: char, program: &Path, cpu: usize) -> Result<Self, Failure> {
        let broken = |e: io::Error| {
            Failure::failed(format!("start the demo's target {name}"), e)
                .help("set TMPDIR to a folder in which programs may be run")
        };
        let (board, file) = Board::create().map_err(broken)?;
        let child = Command::new(program)
            .arg0(format!("{NAME}-{}", name.to_ascii_lowercase()))
            .args([cpu.to_string(), std::process::id().to_string()])
            .stdin(Stdio::from(file))
            .stdout(Stdio::null())
            .spawn()
            .map_err(broken)?;
        Ok(Self { child, board, name })
    }

    /// The target's PID.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it has published.
    pub fn score(&self) -> Score {
        self.board.read()
    }

    /// Fails if the target has ended.
    ///
    /// # Errors
    /// How it ended.
    pub fn alive(&mut self) -> Result<(), Failure> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(Failure::failed(format!("the demo's target {} ended", self.name), status)),
            Err(e) => Err(Failure::failed(format!("ask for the demo's target {}", self.name), e)),
        }
    }

    /// Asks the target to end and waits for it: how an undisturbed program ends is part of what the demo shows.
    ///
    /// # Errors
    /// If it ended badly or not at all.
    pub fn finish(&mut self) -> Result<Score, Failure> {
        self.board.stop();
        let end = Instant::now() + Duration::from_secs(10);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                _ => return Err(Failure::failed(format!("end the demo's target {}", self.name), "it does not answer")),
            }
        };
        if status.success() {
            return Ok(self.score());
        }
        Err(Failure::failed(format!("the demo's target {} ended badly", self.name), status))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.board.stop();
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One slice: what an operation cost in each target, ns of CPU time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slice {
    /// In A.
    pub a: f64,
    /// In B.
    pub b: f64,
}

/// The medians of several slices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// ns of CPU time for an operation in A.
    pub a: f64,
    /// ns of CPU time for an operation in B.
    pub b: f64,
    /// How many times as long A takes.
    pub ratio: f64,
    /// The lowest and the highest ratio of a slice.
    pub spread: (f64, f64),
}

impl Measured {
    /// The medians of these slices; `None` if there are none.
    pub fn of(slices: &[Slice]) -> Option<Self> {
        let ratios: Vec<f64> = slices.iter().map(|s| s.a / s.b).collect();
        Some(Self {
            a: median(slices.iter().map(|s| s.a).collect())?,
            b: median(slices.iter().map(|s| s.b).collect())?,
            ratio: median(ratios.clone())?,
            spread: (ratios.iter().copied().fold(f64::MAX, f64::min), ratios.iter().copied().fold(0.0, f64::max)),
        })
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { upper } else { f64::midpoint(values[middle - 1], upper) })
}

/// The two targets.
///
/// They are dropped, and so ended, before their folder.
pub struct Pair {
    /// Stays as it is.
    pub a: Target,
    /// Is optimised.
    pub b: Target,
    _folder: TempDir,
}

impl Pair {
    /// Starts both and waits until they serve.
    ///
    /// # Errors
    /// If one does not start.
    pub fn start() -> Result<Self, Failure> {
        let (folder, program) = unpack().map_err(|e| Failure::failed("unpack the demo's target", e))?;
        let cpu = last_allowed_cpu();
        let (a, b) = (Target::start('A', &program, cpu)?, Target::start('B', &program, cpu)?);
        let mut pair = Self { a, b, _folder: folder };
        let end = Instant::now() + Duration::from_secs(30);
        while !(pair.a.score().ready && pair.b.score().ready) {
            pair.alive()?;
            if Instant::now() > end {
                return Err(Failure::failed("start the demo's targets", "they were not ready after 30 s")
                    .help("the machine is very busy; try again later"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(pair)
    }

    /// Fails if one of them has ended.
    ///
    /// # Errors
    /// How it ended.
    pub fn alive(&mut self) -> Result<(), Failure> {
        self.a.alive()?;
        self.b.alive()
    }

    /// Measures both at once, `count` times for `length`.
    ///
    /// # Errors
    /// If one of them ends or does nothing.
    pub fn measure(&mut self, count: u32, length: Duration, mut tick: impl FnMut()) -> Result<Measured, Failure> {
        let mut slices = Vec::new();
        let mut before = (self.a.score(), self.b.score());
        for _ in 0..count {
            // On a very busy machine a slice may pass in which one of them was not let run at all: wait on.
            let end = Instant::now() + Duration::from_secs(10);
            let after = loop {
                std::thread::sleep(length);
                self.alive()?;
                let after = (self.a.score(), self.b.score());
                if after.0.operations > before.0.operations && after.1.operations > before.1.operations {
                    break after;
                }
                if Instant::now() > end {
                    return Err(Failure::failed("measure the demo's targets", "one of them does not go on"));
                }
            };
            slices.push(Slice { a: cost(before.0, after.0), b: cost(before.1, after.1) });
            before = after;
            tick();
        }
        Measured::of(&slices).ok_or_else(|| Failure::failed("measure the demo's targets", "no slice was asked for"))
    }
}

/// Writes the target's program to a folder of its own.
fn unpack() -> io::Result<(TempDir, PathBuf)> {
    let folder = TempDir::with_prefix("dyni-demo-")?;
    let program = folder.path().join(NAME);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o755).open(&program)?;
    file.write_all(PROGRAM)?;
    Ok((folder, program))
}

/// ns of CPU time for an operation between two readings of one board.
fn cost(before: Score, after: Score) -> f64 {
    (after.cpu_ns - before.cpu_ns) as f64 / (after.operations - before.operations) as f64
}

/// The highest-numbered processor that this process may use: interrupts and other programs tend to use the first.
fn last_allowed_cpu() -> usize {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else { return 0 };
    (0..CpuSet::count()).rev().find(|&cpu| allowed.is_set(cpu).unwrap_or(false)).unwrap_or(0)
}

/// Whether the file-backed code of a process is byte for byte what its files hold; the number of bytes compared.
///
/// # Errors
/// If the process's memory can't be read.
pub fn text_is_original(pid: i32) -> Result<(bool, u64), Failure> {
    let broken = |e: io::Error| Failure::failed(format!("compare the code of {pid} with its files"), e);
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(broken)?;
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(broken)?;
    let (mut same, mut compared) = (true, 0);
    for (start, length, offset, path) in maps.lines().filter_map(executable_file) {
        let (mut live, mut kept) = (vec![0; length], vec![0; length]);
        memory.read_exact_at(&mut live, start).map_err(broken)?;
        // The last page of a mapping reaches beyond the end of the file; the kernel fills it with zeros.
        let file = File::open(format!("/proc/{pid}/root{path}")).map_err(broken)?;
        let mut filled = 0;
        while filled < length {
            match file.read_at(&mut kept[filled..], offset + filled as u64).map_err(broken)? {
                0 => break,
                n => filled += n,
            }
        }
        same &= live == kept;
        compared += length as u64;
    }
    Ok((same && compared > 0, compared))
}

/// Start, length, file offset and path of a line of /proc/PID/maps, if it is executable memory of a file.
fn executable_file(line: &str) -> Option<(u64, usize, u64, &str)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let path = &line[line.find('/')?..];
    let start = u64::from_str_radix(start, 16).ok()?;
    let length = usize::try_from(u64::from_str_radix(end, 16).ok()?.checked_sub(start)?).ok()?;
    let is_file = !path.starts_with("/memfd:") && !path.starts_with("/dev/zero");
    (rights.starts_with("r-x") && is_file).then_some((start, length, offset, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_ignore_a_slice_that_went_wrong() {
        let slices = [Slice { a: 10.0, b: 10.0 }, Slice { a: 11.0, b: 10.0 }, Slice { a: 90.0, b: 10.0 }];
        let measured = Measured::of(&slices).unwrap();
        assert_eq!(measured.ratio, 1.1);
        assert_eq!(measured.spread, (1.0, 9.0));
        assert_eq!(Measured::of(&[]), None);
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn maps_lines() {
        let line = "7f00-8f00 r-xp 00001000 08:01 42                 /usr/lib/a b.so";
        assert_eq!(executable_file(line), Some((0x7f00, 0x1000, 0x1000, "/usr/lib/a b.so")));
        assert_eq!(executable_file("7f00-8f00 r--p 00001000 08:01 42   /usr/lib/a.so"), None);
        assert_eq!(executable_file("7f00-8f00 r-xp 00000000 00:00 0    [vdso]"), None);
        assert_eq!(executable_file("7f00-8f00 r-xp 00000000 00:01 9    /memfd:cache (deleted)"), None);
    }

    #[test]
    fn this_process_runs_what_its_files_hold() {
        let (same, bytes) = text_is_original(std::process::id() as i32).unwrap();
        assert!(same && bytes > 4096);
    }
}
