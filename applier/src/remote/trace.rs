//! ptrace, as little of it as dyni needs, on one thread of the target.
//!
//! Raw `libc`, in this one file: nix gives signals as an enum without the real-time ones, and a `waitpid` that meets one
//! answers an error *after* the kernel has handed the report over.

use super::RemoteError;
use nix::errno::Errno;
use std::ffi::c_void;
use std::ptr;

pub(crate) type Registers = libc::user_regs_struct;

// include/uapi/linux/ptrace.h
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
/// More bytes than any processor's XSAVE area has (with AMX: 11 KB).
const MAX_STATE: usize = 16 << 10;

/// What a traced thread reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Report {
    /// It stopped because it was interrupted, or takes part in a group stop: between two instructions, no signal in hand.
    Stopped,
    /// It is about to receive this signal.
    Signal(i32),
    /// It is at the entry or the exit of a system call.
    Syscall,
    /// It is no more.
    Gone,
}

/// A thread that the calling thread of dyni has seized (`PTRACE_SEIZE`). Dropping it lets it go as it is.
///
/// We let go only of a thread whose stop has been reported to us. One that has not stopped yet may stop for a signal at any
/// moment, and to detach from it then would take the signal from it: it is given to [`Stragglers`], and at the very last
/// the kernel lets go of it, signal and all, when the dyni thread ends ([`super::in_own_thread`]).
#[derive(Debug)]
pub(crate) struct Tracee {
    pub pid: i32,
    pub tid: i32,
    attached: bool,
    /// It is stopped and has said why; with the signal that it is about to receive, or 0.
    stopped: Option<i32>,
    /// What the newest stop was for.
    event: Event,
}

/// What a [`Report::Stopped`] was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// It was interrupted.
    Interrupted,
    /// The whole process was stopped by a signal (job control).
    Group,
    /// It has just become another program, before the first instruction of that.
    Exec,
    /// It is about to end; its memory is still there.
    Exit,
}

fn ptrace(request: libc::c_uint, tid: i32, data: *mut c_void) -> Result<(), Errno> {
    // SAFETY: the requests made in this file use `data` as an integer, or as a pointer to a `Registers` that the caller
    // owns and that outlives the call; `addr` is unused by all of them. The tracee's memory is not ours.
    let result = unsafe { libc::ptrace(request, tid, ptr::null_mut::<c_void>(), data) };
    Errno::result(result).map(drop)
}

fn integer(value: i32) -> *mut c_void {
    ptr::without_provenance_mut(value as usize)
}

impl Tracee {
    /// Seizes a running thread; it goes on running.
    pub fn seize(pid: i32, tid: i32) -> Result<Self, RemoteError> {
        Self::seize_with(pid, tid, 0)
    }

    /// The same; it also stops at an exec and at its end.
    pub fn seize_for_events(pid: i32, tid: i32) -> Result<Self, RemoteError> {
        Self::seize_with(pid, tid, libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_TRACEEXIT)
    }

    fn seize_with(pid: i32, tid: i32, events: i32) -> Result<Self, RemoteError> {
        let mut options = libc::PTRACE_O_TRACESYSGOOD | events;
        if sandboxed(tid) {
            // The target's own filter must not judge our system calls. Needs CAP_SYS_ADMIN; without it the seize fails
            // with EPERM and the error says so.
            options |= libc::PTRACE_O_SUSPEND_SECCOMP;
        }
        match ptrace(libc::PTRACE_SEIZE, tid, integer(options)) {
            Ok(()) => Ok(Self { pid, tid, attached: true, stopped: None, event: Event::Interrupted }),
            Err(Errno::EPERM) => match status_field(tid, "TracerPid") {
                // One that we asked to stop before and that has not come to it yet.
                Some(tracer) if is_ours(tracer) => Err(RemoteError::Unstoppable { pid, tid }),
                Some(tracer) if tracer != 0 => Err(RemoteError::Traced { pid, tracer }),
                // A thread that is about to end can't be traced either.
                _ if matches!(thread_state(pid, tid), None | Some(b'Z' | b'X')) || killed(tid) => {
                    Err(RemoteError::Died(pid))
                }
                _ => Err(RemoteError::NotPermitted { pid, what: "tracing it", errno: Errno::EPERM }),
            },
            Err(errno) => Err(RemoteError::from_errno(pid, "tracing it", errno)),
        }
    }

    fn request(&self, what: &'static str, request: libc::c_uint, data: *mut c_void) -> Result<(), RemoteError> {
        ptrace(request, self.tid, data).map_err(|errno| RemoteError::from_errno(self.pid, what, errno))
    }

    /// Whether it is still seized: not ended, not let go.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Asks it to stop; [`Tracee::wait`] or [`Tracee::poll`] then reports.
    pub fn interrupt(&self) -> Result<(), RemoteError> {
        self.request("stopping a thread", libc::PTRACE_INTERRUPT, integer(0))
    }

    /// Lets it run on, with this signal delivered (0: none).
    pub fn go_on(&mut self, signal: i32) -> Result<(), RemoteError> {
        self.stopped = None;
        self.request("resuming a thread", libc::PTRACE_CONT, integer(signal))
    }

    /// Lets a process that a signal has stopped stay so, and reports when it goes on.
    pub fn stay_stopped(&mut self) -> Result<(), RemoteError> {
        self.stopped = None;
        self.request("leaving a thread stopped", libc::PTRACE_LISTEN, integer(0))
    }

    /// What its newest stop was for.
    pub fn event(&self) -> Event {
        self.event
    }

    /// Lets it run to the next entry or exit of a system call.
    pub fn go_to_syscall(&mut self) -> Result<(), RemoteError> {
        self.stopped = None;
        self.request("resuming a thread", libc::PTRACE_SYSCALL, integer(0))
    }

    /// Its registers; it must be stopped.
    pub fn registers(&self) -> Result<Registers, RemoteError> {
        // SAFETY: user_regs_struct is 27 integers; all zero is a value of it.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        self.request("reading registers", libc::PTRACE_GETREGS, (&raw mut registers).cast())?;
        Ok(registers)
    }

    /// Its x87, vector and other extended state, as XSAVE writes it; it must be stopped.
    pub fn extended_state(&self) -> Result<Vec<u8>, RemoteError> {
        const NT_X86_XSTATE: usize = 0x202;
        let mut state = vec![0u8; MAX_STATE];
        let mut vector = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
        let (kind, data) = (ptr::without_provenance_mut::<c_void>(NT_X86_XSTATE), (&raw mut vector).cast::<c_void>());
        // SAFETY: the kernel writes at most `iov_len` bytes to `iov_base`, a live buffer of that length, and the length
        // that it wrote to `vector`; both outlive the call.
        let result = unsafe { libc::ptrace(libc::PTRACE_GETREGSET, self.tid, kind, data) };
        Errno::result(result).map_err(|errno| RemoteError::from_errno(self.pid, "reading registers", errno))?;
        state.truncate(vector.iov_len);
        Ok(state)
    }

    /// The signals that it has blocked, a bit each; it must be stopped.
    pub fn signal_mask(&self) -> Result<u64, RemoteError> {
        let mut mask = 0u64;
        self.mask_request("reading its signal mask", PTRACE_GETSIGMASK, &mut mask)?;
        Ok(mask)
    }

    /// Blocks these signals and no others; it must be stopped.
    pub fn set_signal_mask(&self, mut mask: u64) -> Result<(), RemoteError> {
        self.mask_request("writing its signal mask", PTRACE_SETSIGMASK, &mut mask)
    }

    fn mask_request(&self, what: &'static str, request: libc::c_uint, mask: &mut u64) -> Result<(), RemoteError> {
        let size = ptr::without_provenance_mut::<c_void>(size_of::<u64>());
        // SAFETY: the kernel reads or writes eight bytes at `mask`, as it is told, which outlives the call.
        let result = unsafe { libc::ptrace(request, self.tid, size, ptr::from_mut(mask).cast::<c_void>()) };
        Errno::result(result).map(drop).map_err(|errno| RemoteError::from_errno(self.pid, what, errno))
    }

    /// Sets its registers in one step; it must be stopped.
    pub fn set_registers(&self, mut registers: Registers) -> Result<(), RemoteError> {
        self.request("writing registers", libc::PTRACE_SETREGS, (&raw mut registers).cast())
    }

    /// Undoes the one thing that a stop alone changes: an `EINTR` that no signal caused.
    pub fn mend(&self) -> Result<(), RemoteError> {
        let mut registers = self.registers()?;
        if dyni_collector::interrupted::mend(self.tid, &mut registers) {
            self.set_registers(registers)?;
        }
        Ok(())
    }

    /// Waits for its next report.
    pub fn wait(&mut self) -> Result<Report, RemoteError> {
        loop {
            if let Some(report) = self.report(libc::__WALL)? {
                return Ok(report);
            }
        }
    }

    /// Its next report, if there is one already.
    pub fn poll(&mut self) -> Result<Option<Report>, RemoteError> {
        self.report(libc::__WALL | libc::WNOHANG)
    }

    fn report(&mut self, flags: i32) -> Result<Option<Report>, RemoteError> {
        let mut status = 0;
        // SAFETY: waitpid writes one integer, which lives on this frame.
        match Errno::result(unsafe { libc::waitpid(self.tid, &raw mut status, flags) }) {
            Ok(0) | Err(Errno::EINTR) => Ok(None),
            Err(Errno::ECHILD) => {
                self.attached = false;
                Ok(Some(Report::Gone))
            }
            Err(errno) => Err(RemoteError::from_errno(self.pid, "waiting for a thread", errno)),
            Ok(_) if libc::WIFSTOPPED(status) => {
                self.event = match (status >> 16, libc::WSTOPSIG(status)) {
                    (libc::PTRACE_EVENT_EXEC, _) => Event::Exec,
                    (libc::PTRACE_EVENT_EXIT, _) => Event::Exit,
                    (libc::PTRACE_EVENT_STOP, signal) if signal != libc::SIGTRAP => Event::Group,
                    _ => Event::Interrupted,
                };
                let report = match (status >> 16, libc::WSTOPSIG(status)) {
                    // Where nothing else was asked for, the one event is the stop itself, group stops among them.
                    (1.., _) => Report::Stopped,
                    (_, signal) if signal == libc::SIGTRAP | 0x80 => Report::Syscall,
                    (_, signal) => Report::Signal(signal),
                };
                self.stopped = Some(if let Report::Signal(signal) = report { signal } else { 0 });
                Ok(Some(report))
            }
            Ok(_) => {
                self.attached = false;
                Ok(Some(Report::Gone))
            }
        }
    }

    fn release(&mut self) {
        if let (true, Some(signal)) = (std::mem::take(&mut self.attached), self.stopped) {
            // The one failure is ESRCH: the thread is dead.
            let _ = ptrace(libc::PTRACE_DETACH, self.tid, integer(signal));
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        self.release();
    }
}

fn status_field(tid: i32, name: &str) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
}

/// Whether SIGKILL is on its way to a thread.
fn killed(tid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let pending = |name: &str| {
        let mask = status.lines().find_map(|l| l.strip_prefix(name))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    ["SigPnd:", "ShdPnd:"].iter().any(|n| pending(n).is_some_and(|m| m >> (libc::SIGKILL - 1) & 1 != 0))
}

/// Whether a process has ended or is about to: then whatever goes wrong with it is for that reason. One that is on its way
/// out loses its memory first and is listed for some time yet.
pub(crate) fn is_ending(pid: i32) -> bool {
    let no_memory = || std::fs::read(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.is_empty());
    threads(pid).is_ok_and(|t| t.is_empty())
        || !std::path::Path::new("/proc").join(pid.to_string()).exists()
        || killed(pid)
        || no_memory()
}

/// Whether this is a thread of dyni's own process.
fn is_ours(tracer: i32) -> bool {
    std::path::Path::new("/proc/self/task").join(tracer.to_string()).exists()
}

fn sandboxed(tid: i32) -> bool {
    status_field(tid, "Seccomp").is_some_and(|mode| mode != 0)
}

/// The state letter of a thread (`R`, `S`, `D`, `T`, `Z`, …), `None` if it is gone.
pub(crate) fn thread_state(pid: i32, tid: i32) -> Option<u8> {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    let end = stat.iter().rposition(|&b| b == b')')?;
    stat.get(end + 2).copied()
}

/// The threads of a process that are not dead.
pub(crate) fn threads(pid: i32) -> Result<Vec<i32>, RemoteError> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| RemoteError::Died(pid))?;
    let tids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    // A leader that has called pthread_exit stays in the list as a zombie and can't be stopped: it runs nothing.
    Ok(tids.filter(|&tid| !matches!(thread_state(pid, tid), None | Some(b'Z' | b'X'))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::in_own_thread;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[test]
    fn letting_go_takes_no_signal_away() {
        let script = "trap 'echo got' USR1; echo ready; while :; do sleep 0.01; done";
        let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().expect("a shell");
        let pid = child.id() as i32;
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let next = || lines.recv_timeout(Duration::from_secs(10));
        assert_eq!(next().as_deref(), Ok("ready"));
        for reported in [false, true] {
            in_own_thread(|| {
                let mut tracee = Tracee::seize(pid, pid).expect("our own child");
                // SAFETY: kill takes two integers and touches no memory of ours.
                unsafe { libc::kill(pid, libc::SIGUSR1) };
                // It stops to receive the signal, and we let go of it there, having looked or not.
                std::thread::sleep(Duration::from_millis(50));
                while reported && tracee.wait().expect("it is there") != Report::Signal(libc::SIGUSR1) {
                    tracee.go_on(libc::SIGCHLD).expect("it is stopped");
                }
            });
            assert_eq!(next().as_deref(), Ok("got"), "reported: {reported}");
        }
        child.kill().expect("our own child");
        child.wait().expect("our own child");
    }
}
