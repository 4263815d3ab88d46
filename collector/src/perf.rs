//! The samplers of the kernel: cpu-clock, hardware cycles, branch stacks.
//!
//! An event that is inherited by new threads and children can't have a ring buffer across CPUs, so there is one event
//! per thread and CPU, all events of a CPU writing into one ring. Where that needs more file descriptors than there are,
//! or would miss threads that live too briefly, one event per CPU watches the whole system and strangers are filtered out
//! when records are read.
//!
//! There is no system call per sample: the rings are read where they are mapped, some ten times a second.

use crate::cpu_time::lives_are_brief;
use crate::record::default_frequency_hz;
use crate::records::{self, Branch, Event, Timed};
use crate::target::Target;
use dyni_schema::Method;
use perf_event::events::{Hardware, Software};
use perf_event::{Builder, Clock, Counter, ReadFormat, SampleBranchFlag, SampleFlag, SampleSkid, Sampler};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

/// Bytes of a CPU's ring for samples of the instruction pointer: 40 bytes each, so 0.6 s at 5 kHz.
const RING: usize = 128 << 10;
/// Bytes of a CPU's ring for branch stacks of 32 entries: 0.13 s at 5 kHz; what an unprivileged user gets by default.
const RING_STACKS: usize = 512 << 10;
/// The smallest ring that is worth having, bytes.
const RING_LEAST: usize = 16 << 10;
/// File descriptors that are left to the rest of the process.
const SPARE_FDS: u64 = 64;

/// Why a sampler could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", .method.name(), self.cause())]
pub struct OpenError {
    /// Which sampler.
    pub method: Method,
    /// What the kernel answered, an `errno` value.
    pub errno: i32,
    /// The host's `kernel.perf_event_paranoid`, if it could be read.
    pub paranoid: Option<i32>,
}

impl OpenError {
    /// What the answer means and what can be done, in one line.
    #[must_use]
    pub fn cause(&self) -> String {
        let Self { method, errno, paranoid } = *self;
        match errno {
        libc::EACCES | libc::EPERM if method == Method::Ptrace => {
            "not permitted (a debugger holds the process, or kernel.yama.ptrace_scope or the lack of CAP_SYS_PTRACE \
             forbids it; run as root)"
                .to_owned()
        }
        libc::EACCES | libc::EPERM => match paranoid {
            Some(level) => format!(
                "not permitted (kernel.perf_event_paranoid is {level}; run as root or with CAP_PERFMON, or set it to 1)"
            ),
            None => "not permitted (run as root or with CAP_PERFMON)".to_owned(),
        },
        libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP if method == Method::Clock => {
            "this kernel has no cpu-clock event".to_owned()
        }
        libc::ENOENT | libc::ENODEV => "the processor shows no counters here (often so in virtual machines)".to_owned(),
        libc::EOPNOTSUPP | libc::EINVAL if method == Method::Lbr => {
            "the processor or the virtual machine offers no branch stacks".to_owned()
        }
        libc::EOPNOTSUPP => "the processor's counters can't interrupt here (often so in virtual machines)".to_owned(),
        libc::EBUSY => "the counters are taken (by another profiler or the kernel's watchdog)".to_owned(),
        libc::ENOSYS => "this kernel or its seccomp filter has no perf_event_open".to_owned(),
        libc::EMFILE | libc::ENFILE => "too many threads for the open-file limit (raise `ulimit -n`)".to_owned(),
        libc::ENOMEM => "no locked memory for the ring buffers (raise kernel.perf_event_mlock_kb)".to_owned(),
        libc::ESRCH => "the process has ended".to_owned(),
        other => io::Error::from_raw_os_error(other).to_string(),
        }
    }

    fn new(method: Method, e: &io::Error) -> Self {
        // The crate hides E2BIG (an older kernel does not know a flag) behind an error of its own.
        let errno = e.raw_os_error().unwrap_or(libc::E2BIG);
        let read = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid");
        Self { method, errno, paranoid: read.ok().and_then(|t| t.trim().parse().ok()) }
    }
}

/// Tries to open a sampler on the calling thread.
///
/// # Errors
/// What the kernel answered.
pub fn probe(method: Method) -> Result<(), OpenError> {
    // 0 names the calling thread.
    let opened =
        open_one(&mut flavours(method), 0, online_cpus()[0], default_frequency_hz(method).min(max_sample_rate()));
    opened.map(drop).map_err(|e| OpenError::new(method, &e))
}

/// Whom the events of a session watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The threads of the group and whatever they give birth to.
    Group,
    /// Everything on the host; the group must be picked out of it.
    System,
}

/// Open events and their rings.
pub struct Session {
    method: Method,
    scope: Scope,
    frequency_hz: u64,
    rings: Vec<Ring>,
    /// The events that have no ring of their own.
    others: Vec<Counter>,
    batch: Batch,
    malformed: u64,
    /// Lost records that records told of.
    told: u64,
}

/// What a session leaves behind besides its events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// Records that the rings had no room for and that no event told of.
    pub lost: u64,
    /// Records that made no sense and were dropped.
    pub malformed: u64,
}

struct Ring {
    cpu: usize,
    sampler: Sampler,
}

/// Records that were read and not yet handed on.
#[derive(Debug, Default)]
struct Batch {
    timed: Vec<Timed>,
    branches: Vec<Branch>,
}

impl Session {
    /// Opens the events of one method for all threads of these processes, and starts them. `frequency_hz` is per running
    /// thread, and is lowered to what the host allows.
    ///
    /// A thread that is born between the listing of the threads and the opening of its creator's events is not seen.
    ///
    /// # Errors
    /// What the kernel answered; `ESRCH` if no thread is left.
    pub fn open(members: &[Target], method: Method, frequency_hz: u64) -> Result<Self, OpenError> {
        let fail = |e: &io::Error| OpenError::new(method, e);
        let frequency_hz = frequency_hz.clamp(1, max_sample_rate());
        let threads: Vec<i32> = members.iter().flat_map(Target::thread_ids).collect();
        let cpus = online_cpus();
        if members.iter().any(|m| lives_are_brief(m.pid))
            && let Ok(session) = Self::open_scope(&threads, &cpus, Scope::System, method, frequency_hz)
        {
            return Ok(session);
        }
        let needed = (threads.len() * cpus.len()) as u64 + SPARE_FDS;
        if needed <= raise_open_files(needed) {
            let opened = Self::open_scope(&threads, &cpus, Scope::Group, method, frequency_hz);
            return opened.map_err(|e| fail(&e));
        }
        // Prefer the reason why there are too few descriptors over the reason why the way out is closed.
        Self::open_scope(&threads, &cpus, Scope::System, method, frequency_hz)
            .map_err(|_| fail(&io::Error::from_raw_os_error(libc::EMFILE)))
    }

    pub(crate) fn open_scope(
        threads: &[i32],
        cpus: &[usize],
        scope: Scope,
        method: Method,
        frequency_hz: u64,
    ) -> io::Result<Self> {
        let mut session = Self {
            method,
            scope,
            frequency_hz,
            rings: Vec::new(),
            others: Vec::new(),
            batch: Batch::default(),
            malformed: 0,
            told: 0,
        };
        let whom: &[i32] = if scope == Scope::System { &[-1] } else { threads };
        // Found out with the first event and then the same for all.
        let mut flavours = flavours(method);
        for &thread in whom {
            for &cpu in cpus {
                match open_one(&mut flavours, thread, cpu, frequency_hz) {
                    Ok(counter) => session.add(cpu, counter)?,
                    // A thread that ended is no failure, nor is a CPU that was just taken away.
                    Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH)) => break,
                    Err(e) if cpu != cpus[0] && e.raw_os_error() == Some(libc::ENODEV) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        if session.rings.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        session.rings.iter_mut().try_for_each(|r| r.sampler.enable())?;
        session.others.iter_mut().try_for_each(Counter::enable)?;
        Ok(session)
    }

    /// Gives an event the ring of its CPU; the first one there makes the ring.
    fn add(&mut self, cpu: usize, counter: Counter) -> io::Result<()> {
        match self.rings.iter().find(|r| r.cpu == cpu) {
            Some(ring) => {
                set_output(&counter, ring.sampler.as_counter())?;
                self.others.push(counter);
            }
            None => {
                let size = if self.method == Method::Lbr { RING_STACKS } else { RING };
                self.rings.push(Ring { cpu, sampler: map_ring(counter, size)? });
            }
        }
        Ok(())
    }

    /// Which sampler it is.
    #[must_use]
    pub fn method(&self) -> Method {
        self.method
    }

    /// Whom its events watch.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// Samples a second and running thread, as opened.
    #[must_use]
    pub fn frequency_hz(&self) -> u64 {
        self.frequency_hz
    }

    /// Reads what is in the rings and hands on, by rising time, every event that happened before this call. What happened
    /// while the rings were being read waits for the next call: another CPU's ring may hold something earlier.
    pub fn drain(&mut self, event: &mut dyn FnMut(&Event, &[Branch])) {
        self.hand_on(monotonic_ns(), event);
    }

    fn hand_on(&mut self, until_ns: u64, event: &mut dyn FnMut(&Event, &[Branch])) {
        let with_stack = self.method == Method::Lbr;
        let batch = &mut self.batch;
        for ring in &mut self.rings {
            // A ring can fill as fast as it is read; what it holds at the outset is enough for one turn.
            for _ in 0..RING_STACKS / 40 {
                let Some(record) = ring.sampler.next_record() else { break };
                let body = record.to_contiguous();
                match records::parse(record.ty(), record.misc(), &body, with_stack, &mut batch.branches) {
                    Ok(Timed { event: Event::Other, .. }) => {}
                    Ok(timed) => batch.timed.push(timed),
                    Err(_) => self.malformed += 1,
                }
            }
        }
        // Stable: records of one ring are in order already, and equal times keep it.
        batch.timed.sort_by_key(|t| t.time_ns);
        let ready = batch.timed.partition_point(|t| t.time_ns <= until_ns);
        for timed in batch.timed.drain(..ready) {
            if let Event::Lost(count) = timed.event {
                self.told = self.told.saturating_add(count);
            }
            event(&timed.event, &batch.branches);
        }
        if batch.timed.is_empty() {
            batch.branches.clear();
        } else if with_stack {
            keep_pending(batch);
        }
    }

    /// Stops the events and hands on all that is left.
    pub fn finish(mut self, event: &mut dyn FnMut(&Event, &[Branch])) -> End {
        // An event whose thread has ended is disabled already, and says so with an error.
        self.rings.iter_mut().for_each(|r| drop(r.sampler.disable()));
        self.others.iter_mut().for_each(|c| drop(c.disable()));
        self.hand_on(u64::MAX, event);
        let counters = self.rings.iter_mut().map(|r| r.sampler.as_counter_mut()).chain(&mut self.others);
        let lost: u64 = counters.filter_map(|c| c.read_full().ok()?.lost()).sum();
        End { lost: lost.saturating_sub(self.told), malformed: self.malformed }
    }
}

/// Drops the branches of events that were handed on; those of pending ones move to the front.
fn keep_pending(batch: &mut Batch) {
    let old = std::mem::take(&mut batch.branches);
    for timed in &mut batch.timed {
        if let Event::Sample { stack, .. } = &mut timed.event {
            let start = batch.branches.len();
            batch.branches.extend_from_slice(&old[stack.clone()]);
            *stack = start..batch.branches.len();
        }
    }
}

/// The ways to open an event, best first: with less skid, and with a count of lost records, where the host has it.
fn flavours(method: Method) -> Vec<Builder<'static>> {
    let mut base = match method {
        Method::Clock => Builder::new(Software::CPU_CLOCK),
        _ => Builder::new(Hardware::CPU_CYCLES),
    };
    let mut sample = SampleFlag::IP | SampleFlag::TID | SampleFlag::TIME;
    if method == Method::Lbr {
        sample |= SampleFlag::BRANCH_STACK;
        base.branch_sample_type(SampleBranchFlag::ANY | SampleBranchFlag::USER);
    }
    base.sample(sample)
        .sample_id_all(true)
        .clockid(Clock::MONOTONIC)
        .inherit(true)
        .exclude_kernel(true)
        .exclude_hv(true)
        .mmap(true)
        .mmap2(true)
        .comm(true)
        .comm_exec(true)
        .task(true)
        .enabled(false);
    let skids: &[SampleSkid] = match method {
        Method::Cycles => &[SampleSkid::RequestZero, SampleSkid::Constant, SampleSkid::Arbitrary],
        _ => &[SampleSkid::Arbitrary],
    };
    let mut ways = Vec::new();
    for &skid in skids {
        for format in [ReadFormat::LOST, ReadFormat::empty()] {
            let mut way = base.clone();
            way.precise_ip(skid).read_format(format);
            ways.push(way);
        }
    }
    ways
}

/// Opens one event in the first way that works; ways that do not are dropped, so that later events try one only.
fn open_one(flavours: &mut Vec<Builder<'static>>, thread: i32, cpu: usize, frequency_hz: u64) -> io::Result<Counter> {
    loop {
        let way = &mut flavours[0];
        if thread < 0 {
            way.any_pid()
        } else {
            way.observe_pid(thread)
        };
        match way.one_cpu(cpu).sample_frequency(frequency_hz).build() {
            Err(e) if flavours.len() > 1 && is_about_the_way(&e) => drop(flavours.remove(0)),
            other => return other,
        }
    }
}

/// Whether an error can come from the way in which an event is opened rather than from the event.
fn is_about_the_way(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), None | Some(libc::EINVAL | libc::EOPNOTSUPP | libc::E2BIG))
}

/// Maps a ring for an event, no larger than anyone may lock: the limit is per CPU and the same for all.
fn map_ring(counter: Counter, size: usize) -> io::Result<Sampler> {
    counter.sampled(size.min(mlock_limit()).max(RING_LEAST)).map_err(|e| match e.raw_os_error() {
        // The event was allowed, so this is not about permission: other rings of this user have used up the limit.
        Some(libc::EPERM) => io::Error::from_raw_os_error(libc::ENOMEM),
        _ => e,
    })
}

/// Bytes that an unprivileged user's ring of one CPU may have, as a power of two, the kernel's own page apart.
fn mlock_limit() -> usize {
    let text = fs::read_to_string("/proc/sys/kernel/perf_event_mlock_kb").unwrap_or_default();
    let kilobytes: usize = text.trim().parse().unwrap_or(516);
    let data = (kilobytes << 10).saturating_sub(4096).max(1);
    1 << data.ilog2()
}

fn set_output(counter: &Counter, ring: &Counter) -> io::Result<()> {
    // _IO('$', 5)
    const SET_OUTPUT: libc::Ioctl = 0x2405;
    // SAFETY: both descriptors are open perf events for as long as the borrows last; the request takes an integer and
    // touches no memory of ours.
    match unsafe { libc::ioctl(counter.as_raw_fd(), SET_OUTPUT, ring.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The clock that the events are stamped with, ns.
fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to, and CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn max_sample_rate() -> u64 {
    let text = fs::read_to_string("/proc/sys/kernel/perf_event_max_sample_rate").unwrap_or_default();
    text.trim().parse().unwrap_or(100_000).max(1)
}

/// The CPUs that are running, by number.
pub(crate) fn online_cpus() -> Vec<usize> {
    let text = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let cpus = parse_cpu_list(&text);
    if cpus.is_empty() { (0..std::thread::available_parallelism().map_or(1, usize::from)).collect() } else { cpus }
}

fn parse_cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok().filter(|&l| l < 1 << 16)?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// Raises the soft limit of open files to `needed` if the hard limit lets it; returns the limit that holds then.
fn raise_open_files(needed: u64) -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    if soft >= needed {
        return soft;
    }
    let wanted = needed.min(hard);
    match setrlimit(Resource::RLIMIT_NOFILE, wanted, hard) {
        Ok(()) => wanted,
        Err(_) => soft,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_system_shows_us_too() {
        let opened = Session::open_scope(&[], &online_cpus(), Scope::System, Method::Clock, 999);
        let mut session = match opened {
            Ok(session) => session,
            Err(e) => return println!("skipped: {e}"),
        };
        let us = std::process::id() as i32;
        let (mut ours, mut last) = (0, 0);
        let begin = std::time::Instant::now();
        while ours < 20 {
            assert!(begin.elapsed().as_secs() < 20, "{ours} samples");
            last = std::hint::black_box((0..1_000_000u64).fold(last, |a, b| a ^ b.wrapping_mul(a | 1)));
            session.drain(&mut |event, _| {
                ours += u32::from(matches!(event, Event::Sample { pid, .. } if *pid == us));
            });
        }
        assert_eq!(session.finish(&mut |_, _| ()).malformed, 0);
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0-2,5,7-8\n"), [0, 1, 2, 5, 7, 8]);
        assert_eq!(parse_cpu_list("\n"), [0usize; 0]);
        assert_eq!(parse_cpu_list("0-99999999999"), [0usize; 0]);
    }

    #[test]
    fn errors_name_cause_and_remedy() {
        let text = |method, errno| OpenError { method, errno, paranoid: Some(3) }.to_string();
        assert!(text(Method::Cycles, libc::ENOENT).contains("no counters"));
        assert!(text(Method::Lbr, libc::EOPNOTSUPP).contains("no branch stacks"));
        assert!(text(Method::Clock, libc::EACCES).contains("perf_event_paranoid is 3"));
        assert!(text(Method::Clock, libc::EMFILE).contains("ulimit"));
    }

    #[test]
    fn pending_samples_keep_their_branches() {
        let branch = |n| Branch { from: dyni_schema::RunAddr(n), to: dyni_schema::RunAddr(n), mispredicted: false };
        let event = Event::Sample { pid: 1, tid: 1, ip: dyni_schema::RunAddr(1), stack: 2..4 };
        let mut batch = Batch {
            timed: vec![Timed { time_ns: 1, event: Event::Lost(1) }, Timed { time_ns: 2, event }],
            branches: (0..6).map(branch).collect(),
        };
        keep_pending(&mut batch);
        assert_eq!(batch.branches, [branch(2), branch(3)]);
        assert!(matches!(&batch.timed[1].event, Event::Sample { stack, .. } if *stack == (0..2)));
    }
}
