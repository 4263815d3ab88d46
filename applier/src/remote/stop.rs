//! All threads of a process stopped between two instructions, for as short a time as can be.

use super::trace::{Registers, Report, Tracee, thread_state, threads};
use super::{Memory, RemoteError};
use dyni_schema::RunAddr;
use std::time::{Duration, Instant};

/// How long a thread may sleep uninterruptibly after it was asked to stop. Past it the whole process is let go again:
/// one such thread must not hold up the others.
const DEEP_SLEEP: Duration = Duration::from_millis(5);
/// How long a thread that is ready to run may take to stop. It stops as soon as it gets a processor.
const PATIENCE: Duration = Duration::from_millis(500);

/// One stopped thread.
#[derive(Debug)]
pub struct StoppedThread {
    tracee: Tracee,
    registers: Registers,
}

impl StoppedThread {
    /// Where it is.
    #[must_use]
    pub fn rip(&self) -> RunAddr {
        RunAddr(self.registers.rip)
    }

    /// Its stack pointer.
    #[must_use]
    pub fn rsp(&self) -> RunAddr {
        RunAddr(self.registers.rsp)
    }

    /// Its thread control block (the base of FS).
    #[must_use]
    pub fn thread_area(&self) -> RunAddr {
        RunAddr(self.registers.fs_base)
    }

    /// All its registers, as bytes: the general ones, then the extended state.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn register_bytes(&self) -> Result<Vec<u8>, RemoteError> {
        let r = &self.registers;
        let general = [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15, r.rip, r.orig_rax, r.fs_base, r.gs_base,
        ];
        let mut bytes: Vec<u8> = general.iter().flat_map(|r| r.to_le_bytes()).collect();
        bytes.extend(self.tracee.extended_state()?);
        Ok(bytes)
    }

    /// Whether it was interrupted in a system call that the kernel may yet restart by moving RIP back two bytes.
    #[must_use]
    pub fn in_syscall(&self) -> bool {
        self.registers.orig_rax as i64 >= 0
    }

    /// Moves it to another place that means the same.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn set_rip(&mut self, rip: RunAddr) -> Result<(), RemoteError> {
        let moved = Registers { rip: rip.0, ..self.registers };
        self.tracee.set_registers(moved)?;
        self.registers = moved;
        Ok(())
    }
}

/// A process all of whose threads are stopped; they go on when this is dropped.
#[derive(Debug)]
pub struct Stopped {
    /// The process.
    pub pid: i32,
    /// Its threads.
    pub threads: Vec<StoppedThread>,
    /// When the first thread was asked to stop.
    since: Instant,
}

impl Stopped {
    /// Stops every thread of `pid`, those included that are born meanwhile; tries again for about `patience` when a
    /// thread sits in an uninterruptible wait.
    ///
    /// # Errors
    /// The process is gone, traced by somebody else, not ours to trace, or can't be stopped in that time.
    pub fn all(pid: i32, patience: Duration) -> Result<Self, RemoteError> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        let mut stragglers = Stragglers::default();
        loop {
            // A look before the leap: while a thread is in vfork or on a dead disk, do not even begin.
            let busy = threads(pid)?.into_iter().find(|&tid| thread_state(pid, tid) == Some(b'D'));
            let result = match busy.or_else(|| stragglers.settle()) {
                Some(tid) => Err(RemoteError::Unstoppable { pid, tid }),
                None => Self::once(pid, &mut stragglers),
            };
            match result {
                Err(e) if e.is_passing() && start.elapsed() < patience => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                result => return result,
            }
        }
    }

    fn once(pid: i32, stragglers: &mut Stragglers) -> Result<Self, RemoteError> {
        let mut stopped = Self { pid, threads: Vec::new(), since: Instant::now() };
        // A thread that runs may make new ones, one that is stopped can't: when a look at the list finds nobody new,
        // and everybody in it is stopped, the list is complete.
        loop {
            let mut coming = Vec::new();
            let mut failed = None;
            for tid in threads(pid)? {
                if stopped.threads.iter().any(|t| t.tracee.tid == tid) {
                    continue;
                }
                match Tracee::seize(pid, tid).and_then(|t| t.interrupt().map(|()| t)) {
                    Ok(tracee) => coming.push(tracee),
                    // The thread ended between the look and the seizing; the process may well live.
                    Err(RemoteError::Died(_)) => {}
                    Err(e) => failed = Some(e),
                }
            }
            if coming.is_empty() && failed.is_none() {
                break;
            }
            for mut tracee in coming {
                // After a failure the others still have to stop, to be let go.
                match come_to_rest(&mut tracee) {
                    Ok(true) => {
                        let registers = tracee.registers()?;
                        stopped.threads.push(StoppedThread { tracee, registers });
                    }
                    Ok(false) => {}
                    Err(e) => {
                        stragglers.0.push(tracee);
                        failed = failed.or(Some(e));
                    }
                }
            }
            if let Some(e) = failed {
                return Err(e);
            }
        }
        if stopped.threads.is_empty() {
            return Err(RemoteError::Died(pid));
        }
        if let Some(other) = shares_memory(pid, &stopped) {
            return Err(RemoteError::SharedMemory { pid, other });
        }
        Ok(stopped)
    }

    /// How long the process has been stopped.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Lets all threads go on; how long they were stopped.
    #[must_use]
    pub fn resume(mut self) -> Duration {
        self.threads.clear();
        self.since.elapsed()
    }

    /// Checks that this is still the program whose memory `memory` opened, not one that it has exec'ed since: the bytes
    /// at `at` must be `expected` in the memory that the process has now.
    ///
    /// # Errors
    /// The process is gone.
    pub fn still_has(&self, at: RunAddr, expected: &[u8]) -> Result<bool, RemoteError> {
        let mut found = vec![0; expected.len()];
        let n = Memory::open_read_only(self.pid)?.read_some(at, &mut found);
        Ok(n == expected.len() && found == expected)
    }
}

/// Threads that were asked to stop and have not yet: they are let go as soon as they do.
#[derive(Debug, Default)]
pub(super) struct Stragglers(pub Vec<Tracee>);

impl Stragglers {
    /// Lets go of those that have stopped by now; one that has not, if any.
    pub fn settle(&mut self) -> Option<i32> {
        self.0.retain_mut(|tracee| come_to_rest(tracee).is_err() && tracee.is_attached());
        self.0.first().map(|t| t.tid)
    }
}

/// Waits for an interrupted thread to stop, handing it the signals that come first; `false` if it ended instead.
pub(crate) fn come_to_rest(tracee: &mut Tracee) -> Result<bool, RemoteError> {
    let start = Instant::now();
    loop {
        match tracee.poll()? {
            Some(Report::Stopped) => return tracee.mend().map(|()| true),
            Some(Report::Gone) => return Ok(false),
            Some(Report::Signal(signal)) => tracee.go_on(signal)?,
            Some(Report::Syscall) => tracee.go_on(0)?,
            // Most stop within microseconds.
            None if start.elapsed() < Duration::from_micros(50) => std::thread::yield_now(),
            None => {
                let asleep = || thread_state(tracee.pid, tracee.tid) == Some(b'D');
                let waited = start.elapsed();
                if waited > PATIENCE || (waited > DEEP_SLEEP && asleep()) {
                    return Err(RemoteError::Unstoppable { pid: tracee.pid, tid: tracee.tid });
                }
                // Let the core go to whoever must run for the stop to happen.
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }
}

/// A live process other than `pid` that runs in the same memory, among the children of the stopped threads.
fn shares_memory(pid: i32, stopped: &Stopped) -> Option<i32> {
    const KCMP_VM: i32 = 1; // include/uapi/linux/kcmp.h
    let children = stopped.threads.iter().flat_map(|t| {
        let list = std::fs::read_to_string(format!("/proc/{pid}/task/{}/children", t.tracee.tid)).unwrap_or_default();
        list.split_whitespace().filter_map(|c| c.parse().ok()).collect::<Vec<i32>>()
    });
    children.into_iter().find(|&child| {
        // SAFETY: kcmp compares two processes by number and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_kcmp, pid, child, KCMP_VM, 0, 0) == 0 }
    })
}
