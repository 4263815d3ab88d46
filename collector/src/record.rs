//! A recording: the best sampler that works, for a while, as a [`Profile`].

use crate::attribution::{Attribution, Image, Resolve, Totals, bounded};
use crate::cpu_time::cpu_time;
use crate::group::Group;
use crate::host;
use crate::maps::ModuleReader;
use crate::perf::{OpenError, Scope, Session};
use crate::ptrace_sampler::PtraceSession;
use crate::records::{Branch, Event};
use crate::target::{ErrorKind, Target, TargetError};
use dyni_schema::{Method, Profile};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The default rate of a sampler, per second and running thread. Not a multiple of any timer's rate, so that samples do
/// not fall in step with the program.
///
/// A counter's interrupt costs about a microsecond. A cpu-clock sample arms a timer, which in a virtual machine is an exit
/// to the hypervisor: 16 µs where it was measured, so 8 % of the target at 4999 Hz and 3 % at this rate. With ptrace each
/// sample stops a thread.
#[must_use]
pub const fn default_frequency_hz(method: Method) -> u64 {
    match method {
        Method::Lbr | Method::Cycles | Method::Count => 4999,
        Method::Clock => 1999,
        Method::Ptrace => 97,
    }
}

/// How often the rings are read and progress is told.
const DRAIN_EVERY: Duration = Duration::from_millis(60);

/// Which sampler to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum MethodChoice {
    /// The best that works here: LBR, cycles, clock, ptrace.
    #[default]
    Auto,
    /// This one or none.
    Only(Method),
}

/// What to record.
pub struct RecordOptions<'a> {
    /// For how long.
    pub duration: Duration,
    /// With which sampler.
    pub method: MethodChoice,
    /// Samples a second and running thread; `None` for the sampler's default.
    pub frequency_hz: Option<u64>,
    /// What the user calls it.
    pub label: String,
    /// From an address in dyni's own code cache of a process (PID) to the original; `None` if there is no cache.
    pub resolve: Option<&'a Resolve<'a>>,
}

impl Default for RecordOptions<'_> {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(10),
            method: MethodChoice::Auto,
            frequency_hz: None,
            label: String::new(),
            resolve: None,
        }
    }
}

/// How a recording is coming along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The sampler in use.
    pub method: Method,
    /// Since the recording began.
    pub elapsed: Duration,
    /// As asked for.
    pub duration: Duration,
    /// What was counted so far.
    pub totals: Totals,
}

/// Why a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The time was over.
    Complete,
    /// Every process of the group ended.
    TargetExited,
    /// The caller wanted no more.
    Interrupted,
}

/// A recording that has something in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// What was observed.
    pub profile: Profile,
    /// Why it ended.
    pub stopped: StopReason,
    /// Records of the kernel that made no sense and were dropped.
    pub malformed: u64,
}

/// Why there is no recording. Each text is one line.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The target can't be looked at.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// No sampler works here; what each said.
    #[error("no sampler works here ({0}): `dyni doctor` says what to change")]
    NoSampler(String),
    /// The method is not a sampler: exact counts come from an instrumented generation.
    #[error("`{}` is not a sampler: it needs an instrumented generation", .0.name())]
    NotASampler(Method),
    /// The target ended before anything was seen.
    #[error("the target exited before anything was sampled: record it while it works")]
    TargetExited,
    /// The time was over and nothing was seen in user code.
    #[error("no samples in {} ms: the target was idle, record it under load", .0.as_millis())]
    NoSamples(Duration),
    /// The same, though the target worked for this long.
    #[error(
        "no samples, though the target used {} ms of processor time: in the kernel, or in threads that live too briefly to be \
         seen one by one; record it as root or with CAP_PERFMON", .0.as_millis()
    )]
    Unseen(Duration),
    /// The sampler itself failed half-way.
    #[error("sampling failed: {0}")]
    Sampler(std::io::Error),
}

impl RecordError {
    /// What it means to whoever asked.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Target(e) => e.kind(),
            Self::NoSampler(_) => ErrorKind::Refused,
            Self::NotASampler(_) => ErrorKind::Usage,
            Self::TargetExited | Self::NoSamples(_) | Self::Unseen(_) | Self::Sampler(_) => ErrorKind::Failed,
        }
    }
}

/// The samplers in the order in which [`MethodChoice::Auto`] tries them.
const AUTO: [Method; 4] = [Method::Lbr, Method::Cycles, Method::Clock, Method::Ptrace];

/// Opens the chosen sampler, or the first that works; beside it the note of why the better ones did not.
fn choose<T>(
    choice: MethodChoice,
    mut open: impl FnMut(Method) -> Result<T, OpenError>,
) -> Result<(T, String), RecordError> {
    let only;
    let candidates: &[Method] = match choice {
        MethodChoice::Auto => &AUTO,
        MethodChoice::Only(Method::Count) => return Err(RecordError::NotASampler(Method::Count)),
        MethodChoice::Only(method) => {
            only = [method];
            &only
        }
    };
    let mut notes: Vec<String> = Vec::new();
    for &method in candidates {
        match open(method) {
            Ok(opened) => return Ok((opened, notes.join("; "))),
            // It would be the same with every sampler.
            Err(e) if e.errno == libc::ESRCH => return Err(RecordError::TargetExited),
            Err(e) => notes.push(e.to_string()),
        }
    }
    Err(RecordError::NoSampler(notes.join("; ")))
}

enum Sampler {
    Perf(Session),
    Ptrace(PtraceSession),
}

impl Sampler {
    fn open(group: &Group, method: Method, frequency_hz: Option<u64>) -> Result<Self, OpenError> {
        let frequency_hz = frequency_hz.unwrap_or(default_frequency_hz(method));
        match method {
            Method::Ptrace => PtraceSession::open(group, frequency_hz).map(Self::Ptrace),
            _ => Session::open(&group.members, method, frequency_hz).map(Self::Perf),
        }
    }

    fn method(&self) -> Method {
        match self {
            Self::Perf(session) => session.method(),
            Self::Ptrace(_) => Method::Ptrace,
        }
    }

    fn frequency_hz(&self) -> u64 {
        match self {
            Self::Perf(session) => session.frequency_hz(),
            Self::Ptrace(session) => session.frequency_hz(),
        }
    }

    /// Whether it can only see the group and its descendants.
    fn sees_only_ours(&self) -> bool {
        !matches!(self, Self::Perf(session) if session.scope() == Scope::System)
    }

    fn drain(&mut self, attribution: &mut Attribution) {
        let mut event = |event: &Event, branches: &[Branch]| attribution.event(event, branches);
        match self {
            Self::Perf(session) => session.drain(&mut event),
            Self::Ptrace(session) => session.drain(&mut event),
        }
    }

    /// Ends sampling; returns how many records made no sense.
    fn finish(self, attribution: &mut Attribution) -> u64 {
        let mut event = |event: &Event, branches: &[Branch]| attribution.event(event, branches);
        match self {
            Self::Perf(session) => {
                let end = session.finish(&mut event);
                attribution.event(&Event::Lost(end.lost), &[]);
                end.malformed
            }
            Self::Ptrace(session) => {
                session.finish(&mut event);
                0
            }
        }
    }
}

/// Records a group for a while. `progress` is called some ten times a second; when it returns `false` the recording ends
/// there and keeps what it has.
///
/// # Errors
/// Why there is nothing recorded: see [`RecordError`]. A target that exits half-way is an error only if nothing was
/// sampled.
pub fn record(
    group: &Group,
    options: &RecordOptions,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Recording, RecordError> {
    let started = SystemTime::now();
    let (mut sampler, note) = choose(options.method, |method| Sampler::open(group, method, options.frequency_hz))?;
    let begin = Instant::now();
    let used = || -> Duration { group.members.iter().filter_map(|m| cpu_time(m.pid)).sum() };
    let used_before = used();
    let (method, frequency_hz) = (sampler.method(), sampler.frequency_hz());
    let load = Box::new(loader(&group.root));
    let mut attribution = Attribution::new(load, options.resolve, sampler.sees_only_ours());
    for member in &group.members {
        attribution.add_process(member.pid, &member.thread_ids());
    }
    let mut stopped = StopReason::Complete;
    loop {
        let left = options.duration.saturating_sub(begin.elapsed());
        if left.is_zero() {
            break;
        }
        std::thread::sleep(left.min(DRAIN_EVERY));
        sampler.drain(&mut attribution);
        let elapsed = begin.elapsed();
        if !progress(Progress { method, elapsed, duration: options.duration, totals: attribution.totals() }) {
            stopped = StopReason::Interrupted;
            break;
        }
        if !group.root.still_there() && !attribution.members().any(is_alive) {
            stopped = StopReason::TargetExited;
            break;
        }
    }
    let malformed = sampler.finish(&mut attribution);
    let elapsed = begin.elapsed();
    let totals = attribution.totals();
    if totals.samples + totals.outside == 0 {
        return Err(match stopped {
            StopReason::TargetExited => RecordError::TargetExited,
            _ => match used().saturating_sub(used_before) {
                busy if busy * 10 > elapsed => RecordError::Unseen(busy),
                _ => RecordError::NoSamples(elapsed),
            },
        });
    }
    let profile = Profile {
        program: bounded(&group.root.name),
        label: bounded(&options.label),
        method,
        method_note: bounded(&note),
        host: host::identity(&host::Source::default()),
        start_s: started.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        duration_ns: u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX),
        frequency_hz,
        processes: totals.processes,
        threads: totals.threads,
        samples: totals.samples,
        outside: totals.outside,
        kernel: totals.kernel,
        in_cache: totals.in_cache,
        lost: totals.lost,
        modules: attribution.into_modules(),
    };
    Ok(Recording { profile, stopped, malformed })
}

/// Whether a process exists and has not ended.
fn is_alive(pid: i32) -> bool {
    procfs::process::Process::new(pid).and_then(|p| p.stat()).is_ok_and(|s| !matches!(s.state, 'Z' | 'X' | 'x'))
}

/// Looks at a process for the attribution: is it the group's program, and what has it loaded?
fn loader(root: &Target) -> impl FnMut(i32) -> Image + 'static {
    let program = root.exe_id;
    let mut reader = ModuleReader::default();
    move |pid| match Target::examine(pid) {
        // Started anew by a member it is still this program, though no fork of it: only the file counts here.
        Ok(target) if target.exe_id == program => reader.read(pid).map_or(Image::Gone, Image::Modules),
        Ok(_) => Image::Other,
        Err(_) => Image::Gone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel answered to each method on some host.
    fn host(answers: [i32; 4]) -> impl FnMut(Method) -> Result<Method, OpenError> {
        move |method| {
            let at = AUTO.iter().position(|&m| m == method).unwrap();
            match answers[at] {
                0 => Ok(method),
                errno => Err(OpenError { method, errno, paranoid: Some(2) }),
            }
        }
    }

    #[test]
    fn the_best_that_works_is_taken_and_says_why() {
        let auto = |answers| choose(MethodChoice::Auto, host(answers));
        let (method, note) = auto([0; 4]).unwrap();
        assert_eq!((method, note.as_str()), (Method::Lbr, ""));
        let (method, note) = auto([libc::EOPNOTSUPP, 0, 0, 0]).unwrap();
        assert_eq!(method, Method::Cycles);
        assert_eq!(note, "lbr: the processor or the virtual machine offers no branch stacks");
        let (method, note) = auto([libc::ENOENT, libc::ENOENT, 0, 0]).unwrap();
        assert_eq!(method, Method::Clock);
        assert!(note.starts_with("lbr: ") && note.contains("; cycles: "), "{note}");
        let (method, note) = auto([libc::EACCES, libc::EACCES, libc::EACCES, 0]).unwrap();
        assert_eq!(method, Method::Ptrace);
        assert!(note.contains("clock: not permitted (kernel.perf_event_paranoid is 2"), "{note}");
    }

    #[test]
    fn one_method_is_that_one_or_none() {
        let only = |method, answers| choose(MethodChoice::Only(method), host(answers));
        assert_eq!(only(Method::Clock, [0; 4]).unwrap().0, Method::Clock);
        let error = only(Method::Cycles, [0, libc::ENOENT, 0, 0]).unwrap_err();
        assert!(matches!(error, RecordError::NoSampler(_)) && error.kind() == ErrorKind::Refused);
        assert!(matches!(only(Method::Count, [0; 4]), Err(RecordError::NotASampler(_))));
    }

    #[test]
    fn a_target_that_is_gone_is_not_a_missing_sampler() {
        let gone = choose(MethodChoice::Auto, host([libc::ESRCH; 4]));
        assert!(matches!(gone, Err(RecordError::TargetExited)));
        let refused = choose(MethodChoice::Auto, host([libc::EPERM; 4])).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused);
        assert!(!refused.to_string().contains('\n'));
    }
}
