//! Which programs run that may be chosen, and how much of a processor each uses.
//!
//! A look costs a system call for each process of the host (the link to its executable), and a read for each that may be
//! chosen. All are looked at once in the time over which shares are taken, which also finds who was forked; a program that
//! starts in between is known at once where the kernel tells of every `execve` ([`super::exec_events`]).

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dyni_applier::State as Ledger;
use dyni_collector::{Group, Target, cpu_time};
use nix::time::{ClockId, clock_gettime};

use super::machine::{Found, Id, Sighting};
use crate::config::{Limit, Settings};
use crate::errors::Failure;
use crate::gain::Ratio;

/// A process as it was last looked at, under its PID.
enum Known {
    /// What it runs (a hash of the link's text) is not listed.
    Other(u64),
    /// It may be chosen.
    Listed(Box<Listed>),
}

/// A process that may be chosen.
struct Listed {
    link: PathBuf,
    target: Target,
    limit: Limit,
    used: Used,
}

/// The processor time of a process.
#[derive(Clone, Copy, Default)]
struct Used {
    /// All of it, when it was last looked at.
    total: Option<Duration>,
    /// What it had used since the look before, as a share of one processor, percent.
    percent: Option<f64>,
}

/// The processes of this host.
#[derive(Default)]
pub struct Scanner {
    known: HashMap<i32, Known>,
    looked: Option<Instant>,
}

impl Scanner {
    /// Forgets what it has seen: the settings have changed.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Looks at every process, and at the processor time that those use which may be chosen; at these once more from the
    /// ground if `anew`.
    ///
    /// # Errors
    /// /proc can't be read.
    pub fn look_at_all(&mut self, anew: bool, settings: &Settings) -> Result<(), Failure> {
        let list = fs::read_dir("/proc").map_err(|e| Failure::failed("list the processes of this host", e))?;
        let pids: Vec<i32> = list.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        let mut known = std::mem::take(&mut self.known);
        for pid in pids {
            self.look_at(pid, known.remove(&pid), anew, settings);
        }
        let elapsed = self.looked.replace(Instant::now()).map_or(0.0, |before| before.elapsed().as_secs_f64());
        for (pid, known) in &mut self.known {
            let Known::Listed(process) = known else { continue };
            let Some(now) = cpu_time(*pid) else { continue };
            let used = &mut process.used;
            let since = used.total.replace(now).map(|before| now.saturating_sub(before).as_secs_f64());
            used.percent = since.filter(|_| elapsed > 0.0).map(|s| s * 100.0 / elapsed);
        }
        Ok(())
    }

    /// Looks at one process that may be new or may run something else now; whether it may be chosen.
    pub fn look_at_one(&mut self, pid: i32, settings: &Settings) -> bool {
        let known = self.known.remove(&pid);
        self.look_at(pid, known, true, settings);
        matches!(self.known.get(&pid), Some(Known::Listed(_)))
    }

    fn look_at(&mut self, pid: i32, known: Option<Known>, anew: bool, settings: &Settings) {
        // Kernel threads have no such link, and those that have just ended none any more.
        let Ok(link) = fs::read_link(format!("/proc/{pid}/exe")) else { return };
        let hash = hash_of(&link);
        let now = match known {
            Some(Known::Other(before)) if before == hash => Known::Other(hash),
            Some(Known::Listed(mut p)) if p.link == link && p.target.still_there() => {
                // A server may change its user after it has begun. One that is traced now is what it was.
                if anew && let Ok(target) = Target::by_pid(pid) {
                    p.target = target;
                }
                if !of_users(&p.target, settings) {
                    return;
                }
                Known::Listed(p)
            }
            _ => match examine(pid, &link, settings) {
                Examined::Listed(target, limit) => {
                    Known::Listed(Box::new(Listed { link, target, limit, used: Used::default() }))
                }
                Examined::Other => Known::Other(hash),
                // It may be a target by the next look.
                Examined::NotNow => return,
            },
        };
        self.known.insert(pid, now);
    }

    /// The programs that may be chosen, as far as they are known.
    pub fn programs(&self) -> Vec<Sighting> {
        let listed = self.known.values().filter_map(|known| match known {
            Known::Listed(p) => Some(p.target.clone()),
            Known::Other(_) => None,
        });
        let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        let sighting = |group: Group| {
            let root = &group.root;
            let Some(Known::Listed(first)) = self.known.get(&root.pid) else { return None };
            // A process that was not there at the look before counts from the next one on.
            let shares = group.members.iter().filter_map(|m| match self.known.get(&m.pid) {
                Some(Known::Listed(p)) => p.used.percent,
                _ => None,
            });
            Some(Sighting {
                id: Id { pid: root.pid, start_ticks: root.start_ticks, layout: root.layout },
                name: root.name.clone(),
                uid: root.uid,
                processes: group.members.len(),
                age: boot.saturating_sub(ticks(root.start_ticks)),
                cpu_percent: shares.reduce(|a, b| a + b),
                limit: first.limit,
            })
        };
        Group::all_of(listed.collect()).into_iter().filter_map(sighting).collect()
    }
}

/// What a process is that was not known, or runs something else now.
enum Examined {
    Listed(Target, Limit),
    Other,
    /// It is listed, and at this moment no target: it begins, it ends, or somebody traces it.
    NotNow,
}

fn examine(pid: i32, link: &Path, settings: &Settings) -> Examined {
    if pid == std::process::id() as i32 {
        return Examined::Other;
    }
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    // An executable that was replaced has a mark behind its path; the target's own path is without.
    let path = link.to_str().and_then(|l| l.strip_suffix(" (deleted)")).map_or(link, Path::new);
    let Some(limit) = settings.limit_of(pid, path, comm.trim_end_matches('\n')) else { return Examined::Other };
    match Target::by_pid(pid) {
        Ok(target) if of_users(&target, settings) => Examined::Listed(target, limit),
        _ => Examined::NotNow,
    }
}

/// Whether a process belongs to one whose programs may be chosen.
fn of_users(target: &Target, settings: &Settings) -> bool {
    settings.users.is_empty() || settings.users.contains(&target.uid)
}

fn hash_of(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}

/// Clock ticks as a time.
fn ticks(ticks: u64) -> Duration {
    // SAFETY: sysconf has no preconditions.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_secs_f64(ticks as f64 / per_second.max(1) as f64)
}

/// What the ledgers in a program's first process say.
pub fn ledger_of(pid: i32) -> Found {
    match dyni_applier::status(pid) {
        Ok(status) => match status.state {
            Ledger::Dynimized => {
                let in_force = status.modules.iter().filter(|m| m.in_force > 0);
                let gain = in_force.filter_map(|m| m.gain).next_back();
                Found::Dynimized(gain.map(|g| Ratio::from(g).ratio))
            }
            Ledger::Undynimized => Found::Nothing,
            Ledger::Profiling | Ledger::PartlyDynimized => Found::Partly,
        },
        // What can't be read can't be changed either; the job that tries will say why.
        Err(_) => Found::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::LimitArgs;
    use crate::config::Choice;

    fn only(pid: i32) -> Settings {
        let args = LimitArgs { pid: vec![pid], ..LimitArgs::default() };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("dyni.conf");
        fs::write(&file, "").unwrap();
        let settings = Settings::load(Some(&file), &args).unwrap();
        assert_eq!(settings.choice, Choice::Pids(vec![pid]));
        settings
    }

    #[test]
    fn a_busy_program_is_seen_with_its_share_and_its_age() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let pid = child.id() as i32;
        let settings = only(pid);
        let mut scanner = Scanner::default();
        let mut look = || {
            scanner.look_at_all(false, &settings).unwrap();
            scanner.programs()
        };
        while fs::read_link(format!("/proc/{pid}/exe")).unwrap() == std::env::current_exe().unwrap() {}
        let first = look();
        assert_eq!((first.len(), first[0].id.pid, first[0].cpu_percent), (1, pid, None));
        std::thread::sleep(Duration::from_millis(300));
        let then = look();
        // Beside other tests it may get a part of a processor only.
        assert!((1.0..130.0).contains(&then[0].cpu_percent.unwrap()), "{then:?}");
        assert!(then[0].age >= first[0].age + Duration::from_millis(250) && then[0].age < Duration::from_secs(60));
        assert_eq!(ledger_of(pid), Found::Nothing);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(look(), []);
    }

    #[test]
    fn programs_of_other_users_are_not_chosen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let me = nix::unistd::geteuid().as_raw();
        for (users, count) in [(vec![me], 1), (vec![me + 1], 0), (vec![], 1)] {
            let settings = Settings { users, ..only(pid) };
            let mut scanner = Scanner::default();
            assert_eq!(scanner.look_at_one(pid, &settings), count == 1);
            assert_eq!(scanner.programs().len(), count, "{:?}", settings.users);
            // And nobody who has become another user.
            scanner.look_at_all(true, &Settings { users: vec![me + 1], ..settings }).unwrap();
            assert_eq!(scanner.programs(), []);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
