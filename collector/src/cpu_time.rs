//! How much processor time a process has used, and whether the threads that used it are still there.

use nix::sys::time::TimeSpec;
use nix::time::ClockId;
use nix::unistd::Pid;
use std::fs;
use std::time::Duration;

/// The processor time of all threads of a process, those that have ended included, in user and kernel mode, to the ns;
/// `None` if it is gone. See clock_getcpuclockid(3): no permission is needed.
#[must_use]
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let now = || ClockId::pid_cpu_clock_id(Pid::from_raw(pid))?.now();
    now().ok().map(TimeSpec::into)
}

/// Whether most of a process's work was done by threads, and children that it waited for, that are gone. The clock of an
/// event that watches a thread begins with the thread, so threads that live for less than its period are never sampled.
#[must_use]
pub fn lives_are_brief(pid: i32) -> bool {
    let Some(own) = cpu_time(pid) else { return false };
    let children = procfs::process::Process::new(pid).and_then(|p| p.stat()).map_or(Duration::ZERO, |stat| {
        let ticks = u64::try_from(stat.cutime.saturating_add(stat.cstime)).unwrap_or(0);
        Duration::from_millis(ticks.saturating_mul(1000) / procfs::ticks_per_second())
    });
    // The first word is the time on a processor in ns: Documentation/scheduler/sched-stats.rst.
    let used = |schedstat: String| -> Option<u64> { schedstat.split(' ').next()?.parse().ok() };
    let of_thread = |entry: fs::DirEntry| used(fs::read_to_string(entry.path().join("schedstat")).ok()?);
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let living: u64 = threads.filter_map(|entry| of_thread(entry.ok()?)).sum();
    Duration::from_nanos(living) * 2 < own + children
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_work_and_the_dead_have_none() {
        let me = std::process::id() as i32;
        let before = cpu_time(me).unwrap();
        while cpu_time(me).unwrap() == before {}
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        child.wait().unwrap();
        assert_eq!(cpu_time(pid), None);
    }
}
