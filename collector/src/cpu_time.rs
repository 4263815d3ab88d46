//! How much processor time a process has used.

use nix::sys::time::TimeSpec;
use nix::time::ClockId;
use nix::unistd::Pid;
use std::time::Duration;

/// The processor time of all threads of a process, those that have ended included, in user and kernel mode, to the ns;
/// `None` if it is gone. See clock_getcpuclockid(3): no permission is needed.
#[must_use]
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let now = || ClockId::pid_cpu_clock_id(Pid::from_raw(pid))?.now();
    now().ok().map(TimeSpec::into)
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
