//! The sampler for hosts that allow no perf events: stop a running thread for a moment and read its RIP.
//!
//! What keeps this harmless to the target:
//!
//! - `PTRACE_SEIZE` does not stop anything, and no option is set, so births and `execve` go unnoticed by the target.
//! - Only a thread that is running is interrupted. Interrupting a blocked one could end its system call with `EINTR`; a
//!   thread that blocks between the look and the interrupt has its call started again.
//! - A thread that stops to receive a signal gets that very signal at once; one that was stopped by job control stays
//!   stopped (`PTRACE_LISTEN`).
//! - The tracer is a thread of its own and detaches by ending: the kernel then lets go of every tracee, running or not,
//!   without stopping it once more. The same happens if dyni is killed.
//!
//! Threads and processes that are born are found by looking, four times a second; those that live shorter may be missed.

use crate::group::Group;
use crate::interrupted;
use crate::perf::OpenError;
use crate::records::{Branch, Event};
use crate::target::Target;
use dyni_schema::{Method, RunAddr};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often new threads and processes are looked for.
const SCAN_EVERY: Duration = Duration::from_millis(250);
/// How long a thread may wait in vain to receive a signal from us: the pause between two looks.
const PAUSE: Duration = Duration::from_millis(1);
/// The pause while a thread is being stopped, so that it is let go again soon.
const SHORT_PAUSE: Duration = Duration::from_micros(50);
/// How many threads are looked at, and how many stopped, at one tick.
const LOOKS_PER_TICK: usize = 64;
const STOPS_PER_TICK: usize = 8;
/// The highest rate that is accepted, per second: beyond it the target does little but stop.
const MAX_FREQUENCY_HZ: u64 = 1000;
/// How long threads that were interrupted last are waited for.
const LAST_STOPS: Duration = Duration::from_millis(200);
/// How long the end of tracing is waited for.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);

/// A tracer at work.
#[derive(Debug)]
pub struct PtraceSession {
    frequency_hz: u64,
    events: Receiver<Event>,
    stop: Arc<AtomicBool>,
    tracer: Option<JoinHandle<(i32, Vec<i32>)>>,
}

impl PtraceSession {
    /// Seizes every thread of the group and starts sampling. `frequency_hz` is per running thread, at most 1000.
    ///
    /// # Errors
    /// Why no thread could be seized: `EPERM` if the host forbids it or a debugger has it, `ESRCH` if none is left.
    pub fn open(group: &Group, frequency_hz: u64) -> Result<Self, OpenError> {
        let frequency_hz = frequency_hz.clamp(1, MAX_FREQUENCY_HZ);
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, events) = channel();
        let (ready, is_ready) = channel();
        let (group, stopped) = (group.clone(), Arc::clone(&stop));
        let work = move || {
            let period = Duration::from_nanos(1_000_000_000 / frequency_hz);
            let mut tracer = Tracer { group, threads: BTreeMap::new(), cursor: 0, sender };
            let seized = tracer.scan();
            let works = seized.is_ok();
            if ready.send(seized).is_ok() && works {
                tracer.run(period, &stopped);
            }
            (nix::unistd::gettid().as_raw(), tracer.threads.into_keys().collect())
        };
        let fail = |errno| OpenError { method: Method::Ptrace, errno, paranoid: None };
        let spawned = std::thread::Builder::new().name("dyni-ptrace".to_owned()).spawn(work);
        let tracer = spawned.map_err(|e| fail(e.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        let session = Self { frequency_hz, events, stop, tracer: Some(tracer) };
        match is_ready.recv() {
            Ok(Ok(())) => Ok(session),
            Ok(Err(errno)) => Err(fail(errno)),
            Err(_) => Err(fail(libc::ECANCELED)),
        }
    }

    /// Samples a second and running thread, as opened.
    #[must_use]
    pub fn frequency_hz(&self) -> u64 {
        self.frequency_hz
    }

    /// Hands on what was seen since the last call.
    pub fn drain(&mut self, event: &mut dyn FnMut(&Event, &[Branch])) {
        loop {
            match self.events.try_recv() {
                Ok(seen) => event(&seen, &[]),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    /// Lets the target go and hands on what is left.
    pub fn finish(mut self, event: &mut dyn FnMut(&Event, &[Branch])) {
        self.detach();
        self.drain(event);
    }

    fn detach(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let Some((tracer, tracees)) = self.tracer.take().and_then(|t| t.join().ok()) else { return };
        // A thread can be joined a moment before the kernel has let its tracees go. Whoever traces next must not fail.
        let deadline = Instant::now() + DETACH_TIMEOUT;
        for tid in tracees {
            while tracer_of(tid) == Some(tracer) && Instant::now() < deadline {
                std::thread::sleep(SHORT_PAUSE);
            }
        }
    }
}

impl Drop for PtraceSession {
    fn drop(&mut self) {
        self.detach();
    }
}

/// What the tracer knows of a thread.
#[derive(Clone, Copy, Debug)]
struct Tracee {
    pid: i32,
    /// It was interrupted and has not stopped yet.
    pending: bool,
}

struct Tracer {
    group: Group,
    threads: BTreeMap<i32, Tracee>,
    /// The thread at which the last tick's round ended.
    cursor: i32,
    sender: Sender<Event>,
}

impl Tracer {
    /// Seizes threads that are new. Fails if there is none left at all, or none that may be seized.
    fn scan(&mut self) -> Result<(), i32> {
        let known: Vec<i32> = self.group.members.iter().map(|m| m.pid).collect();
        // Keep what can be kept: the old members end with the reports of their threads.
        let _ = self.group.refresh();
        let mut refused = None;
        for member in &self.group.members {
            let born = !known.contains(&member.pid);
            for tid in Target::thread_ids(member) {
                if self.threads.contains_key(&tid) {
                    continue;
                }
                match ptrace(libc::PTRACE_SEIZE, tid, 0, 0) {
                    Ok(()) => {
                        self.threads.insert(tid, Tracee { pid: member.pid, pending: false });
                        let parent = if born { self.group.root.pid } else { member.pid };
                        let _ = self.sender.send(Event::Fork { pid: member.pid, parent, tid });
                    }
                    Err(libc::ESRCH) => {}
                    Err(errno) => refused = Some(errno),
                }
            }
            // Nothing reports a `dlopen`: let the modules be looked at again.
            let _ = self.sender.send(Event::Mapped { pid: member.pid });
        }
        match (self.threads.is_empty(), refused) {
            (false, _) => Ok(()),
            (true, Some(errno)) => Err(errno),
            (true, None) => Err(libc::ESRCH),
        }
    }

    fn run(&mut self, period: Duration, stop: &AtomicBool) {
        let mut next_tick = Instant::now() + period;
        let mut next_scan = Instant::now() + SCAN_EVERY;
        while !stop.load(Ordering::Relaxed) {
            self.reap();
            let now = Instant::now();
            if now >= next_scan {
                next_scan = now + SCAN_EVERY;
                if self.scan().is_err() {
                    return;
                }
            }
            if now >= next_tick {
                // After a delay start afresh: ticks that were missed are not made up for in a burst.
                next_tick = (next_tick + period).max(now);
                self.tick();
            }
            let waiting = self.threads.values().any(|t| t.pending);
            std::thread::sleep(if waiting { SHORT_PAUSE } else { PAUSE });
        }
        // A thread that is just being interrupted must stop and be seen, or its system call is not mended. One that does
        // not (it sleeps uninterruptibly) is let go by our ending.
        let deadline = Instant::now() + LAST_STOPS;
        self.reap();
        while self.threads.values().any(|t| t.pending) && Instant::now() < deadline {
            std::thread::sleep(SHORT_PAUSE);
            self.reap();
        }
    }

    /// Interrupts the running threads among the next ones.
    fn tick(&mut self) {
        let round: Vec<(i32, Tracee)> = self
            .threads
            .range(self.cursor + 1..)
            .chain(self.threads.range(..=self.cursor))
            .take(LOOKS_PER_TICK)
            .map(|(&tid, &t)| (tid, t))
            .collect();
        let mut stops = 0;
        for (tid, tracee) in round {
            self.cursor = tid;
            if tracee.pending || !is_running(tracee.pid, tid) {
                continue;
            }
            if ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0).is_ok()
                && let Some(t) = self.threads.get_mut(&tid)
            {
                t.pending = true;
            }
            stops += 1;
            if stops == STOPS_PER_TICK {
                break;
            }
        }
    }

    /// Takes in every report that is there and lets each stopped thread go on.
    fn reap(&mut self) {
        loop {
            let mut status = 0;
            // Only the tracees of this very thread: other children of the process are not ours to collect.
            let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
            // SAFETY: `status` is a valid int to write to.
            let tid = unsafe { libc::waitpid(-1, &mut status, flags) };
            if tid <= 0 {
                // Nothing to report, no tracee left, or EINTR, which the next look makes up for.
                return;
            }
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                self.threads.remove(&tid);
            } else if libc::WIFSTOPPED(status) {
                self.stopped(tid, libc::WSTOPSIG(status), status >> 16);
            }
        }
    }

    fn stopped(&mut self, tid: i32, signal: i32, event: i32) {
        // Every failure below is ESRCH: the thread was killed meanwhile, and its end will be reported.
        if event == libc::PTRACE_EVENT_STOP && signal == libc::SIGTRAP {
            if let Some(tracee) = self.threads.get_mut(&tid)
                && std::mem::take(&mut tracee.pending)
            {
                let pid = tracee.pid;
                if let Ok(seen) = where_is(pid, tid) {
                    let _ = self.sender.send(seen);
                }
            }
            let _ = ptrace(libc::PTRACE_CONT, tid, 0, 0);
        } else if event == libc::PTRACE_EVENT_STOP {
            if let Some(tracee) = self.threads.get_mut(&tid) {
                tracee.pending = false;
            }
            let _ = ptrace(libc::PTRACE_LISTEN, tid, 0, 0);
        } else {
            let _ = ptrace(libc::PTRACE_CONT, tid, 0, if event == 0 { signal } else { 0 });
        }
    }
}

/// Where a thread that we interrupted was.
fn where_is(pid: i32, tid: i32) -> Result<Event, i32> {
    let mut regs = MaybeUninit::<libc::user_regs_struct>::uninit();
    // SAFETY: PTRACE_GETREGS writes one user_regs_struct to `data`, which has room for it.
    let done = unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, 0usize, regs.as_mut_ptr()) };
    if done < 0 {
        return Err(errno());
    }
    // SAFETY: the call succeeded, so the structure was written whole.
    let mut regs = unsafe { regs.assume_init() };
    // In a system call its number is here, otherwise -1.
    if regs.orig_rax.cast_signed() < 0 {
        return Ok(Event::Sample { pid, tid, ip: RunAddr(regs.rip), stack: 0..0 });
    }
    if interrupted::mend(tid, &mut regs) {
        // SAFETY: PTRACE_SETREGS reads one user_regs_struct from `data`, which points to one.
        unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, 0usize, &raw const regs) };
    }
    Ok(Event::Kernel)
}

/// A request that takes numbers and touches none of our memory.
fn ptrace(request: libc::c_uint, tid: i32, address: usize, data: i32) -> Result<(), i32> {
    debug_assert!(request != libc::PTRACE_GETREGS);
    // SAFETY: SEIZE, INTERRUPT, CONT and LISTEN take `data` as a number and write nothing to this process.
    match unsafe { libc::ptrace(request, tid, address, data as usize) } {
        -1 => Err(errno()),
        _ => Ok(()),
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Whether a thread runs or is ready to.
fn is_running(pid: i32, tid: i32) -> bool {
    fs::read(format!("/proc/{pid}/task/{tid}/stat")).is_ok_and(|stat| state(&stat) == Some(b'R'))
}

/// The state letter in a `stat` text: it follows the name, which may hold anything, parentheses too.
fn state(stat: &[u8]) -> Option<u8> {
    let end = stat.iter().rposition(|&b| b == b')')?;
    stat.get(end + 2).copied()
}

/// The thread that traces a thread; 0 if none does, `None` if the thread has ended.
fn tracer_of(tid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("TracerPid:")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_follows_the_last_parenthesis() {
        assert_eq!(state(b"12 (a) S) R 1 2"), Some(b'R'));
        assert_eq!(state(b"12 (a)"), None);
        assert_eq!(state(b""), None);
    }
}
