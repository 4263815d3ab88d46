//! One process: finding it, its facts, and why it may not be touched.
//!
//! A PID is a name that the kernel reuses. A [`Target`] holds the start time beside it, and [`Target::still_there`] says
//! whether the two still belong together.

use procfs::process::{Process, StatFlags};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::elf;

/// What a failure means to whoever asked: the command's exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Something went wrong; the target is as it was (exit status 1).
    Failed,
    /// The request made no sense: no such process, an ambiguous name (exit status 2).
    Usage,
    /// dyni does not do this to such a process, or the host does not let it (exit status 3).
    Refused,
}

impl ErrorKind {
    /// The exit status of the command for it.
    #[must_use]
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
        }
    }
}

/// Why a process can't be a target. Each text is one line: what happened, why, what to do.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The PID names no process.
    #[error("no process {0}: it has ended or never was; look for the PID with `ps -e`")]
    NoSuchProcess(i32),
    /// No process runs an executable of this name.
    #[error("no process runs an executable named `{0}`: start it first, or give its PID")]
    NoSuchName(String),
    /// Several unrelated processes run an executable of this name.
    #[error("`{name}` names {} unrelated processes ({}): give the PID of one of them", .processes.len(), list(.processes))]
    Ambiguous {
        /// The name that was asked for.
        name: String,
        /// Their PIDs (of each group's root) and executables.
        processes: Vec<(i32, String)>,
    },
    /// The process belongs to somebody else, or the host forbids looking at it.
    #[error("not permitted to look into process {pid}, which belongs to {owner}: {remedy}")]
    NotPermitted {
        /// The process.
        pid: i32,
        /// The user that it runs as.
        owner: String,
        /// What to do about it.
        remedy: String,
    },
    /// A 32-bit program.
    #[error("process {pid} ({name}) is a 32-bit program: only 64-bit x86-64 programs can be optimised")]
    ThirtyTwoBit {
        /// The process.
        pid: i32,
        /// Its program's name.
        name: String,
    },
    /// A program for another machine, under an emulator.
    #[error("process {pid} ({name}) does not run an x86-64 ELF file: only those can be optimised")]
    NotX86 {
        /// The process.
        pid: i32,
        /// Its program's name.
        name: String,
    },
    /// A thread of the kernel.
    #[error("process {pid} ({name}) is a kernel thread and has no user code: give the PID of a program")]
    KernelThread {
        /// The process.
        pid: i32,
        /// Its name.
        name: String,
    },
    /// A process that has ended and waits for its parent.
    #[error(
        "process {pid} ({name}) has ended and is a zombie until its parent {parent} collects it: nothing is left to optimise"
    )]
    Zombie {
        /// The process.
        pid: i32,
        /// Its name.
        name: String,
        /// The PID of its parent.
        parent: i32,
    },
    /// dyni itself.
    #[error("process {0} is this dyni itself: give the PID of another process")]
    Ourselves(i32),
    /// A debugger or tracer holds the process.
    #[error("process {pid} is traced by process {tracer} ({tracer_name}): detach that (gdb, strace, …) first")]
    Traced {
        /// The process.
        pid: i32,
        /// The tracer's PID.
        tracer: i32,
        /// The tracer's name.
        tracer_name: String,
    },
    /// The process ended while it was looked at.
    #[error("process {0} ended while it was looked at: start it again and retry")]
    Exited(i32),
    /// A file under /proc could not be read, for a reason of its own.
    #[error("can't read {}: {source}; is /proc mounted?", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn list(processes: &[(i32, String)]) -> String {
    let shown: Vec<_> = processes.iter().take(8).map(|(pid, exe)| format!("{pid} {exe}")).collect();
    let more = processes.len().saturating_sub(8);
    if more > 0 { format!("{}, and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

impl TargetError {
    /// What it means to whoever asked.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSuchProcess(_) | Self::NoSuchName(_) | Self::Ambiguous { .. } | Self::Ourselves(_) => {
                ErrorKind::Usage
            }
            Self::NotPermitted { .. }
            | Self::ThirtyTwoBit { .. }
            | Self::NotX86 { .. }
            | Self::KernelThread { .. }
            | Self::Zombie { .. }
            | Self::Traced { .. } => ErrorKind::Refused,
            Self::Exited(_) | Self::Io { .. } => ErrorKind::Failed,
        }
    }
}

/// What identifies a file on a host: the device as (major, minor), and the inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Major and minor device number.
    pub dev: (u32, u32),
    /// Inode number.
    pub inode: u64,
}

impl FileId {
    /// The identity of the file that this metadata is of.
    #[must_use]
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self { dev: (libc::major(metadata.dev()), libc::minor(metadata.dev())), inode: metadata.ino() }
    }
}

/// A process that may be looked at: 64-bit, alive, a program, and not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The process ID, in the PID namespace of this process.
    pub pid: i32,
    /// The parent's process ID.
    pub parent: i32,
    /// The session's ID.
    pub session: i32,
    /// The path of its main executable, without the kernel's ` (deleted)`.
    pub exe: PathBuf,
    /// True if that path no longer names the running file: it was removed or replaced.
    pub exe_deleted: bool,
    /// The main executable as a file.
    pub exe_id: FileId,
    /// The base name of the main executable.
    pub name: String,
    /// When the process started, in clock ticks since boot; with `pid` it names one process for good.
    pub start_ticks: u64,
    /// The effective user ID.
    pub uid: u32,
    /// How many threads it had.
    pub threads: u32,
    /// The state letter of its main thread, as `ps` shows it (R, S, D, T, …).
    pub state: char,
    /// Where the program's code begins and where its stack was put, run addresses chosen at random by each `execve` and
    /// inherited by each `fork`: the sign of having been forked rather than started. 0 where the host hides them.
    pub layout: (u64, u64),
}

impl Target {
    /// The process that `spec` names: a PID, or the name (or absolute path) of an executable, or, where no process runs
    /// one of that name, the name that it was started by (a link to the executable, a script). A name shared by the
    /// processes of one group gives the group's root.
    ///
    /// # Errors
    /// Any [`TargetError`] but `Exited`.
    pub fn find(spec: &str) -> Result<Self, TargetError> {
        match spec.parse::<i32>() {
            Ok(pid) => Self::by_pid(pid),
            Err(_) => Self::by_name(spec),
        }
    }

    /// The process with this PID.
    ///
    /// # Errors
    /// Any [`TargetError`] but those of names. A thread's ID that is not a process's is `NoSuchProcess`.
    pub fn by_pid(pid: i32) -> Result<Self, TargetError> {
        if pid == std::process::id() as i32 {
            return Err(TargetError::Ourselves(pid));
        }
        let target = Self::examine(pid)?;
        check_class(&target)?;
        if let Some((tracer, tracer_name)) = tracer(pid)? {
            return Err(TargetError::Traced { pid, tracer, tracer_name });
        }
        Ok(target)
    }

    /// The facts of any live user process, whatever its class or tracer; what groups are made of.
    pub(crate) fn examine(pid: i32) -> Result<Self, TargetError> {
        let process = Process::new(pid).map_err(|e| proc_error(pid, e))?;
        let stat = process.stat().map_err(|e| proc_error(pid, e))?;
        let status = process.status().map_err(|e| proc_error(pid, e))?;
        if status.tgid != pid {
            // /proc/TID exists for every thread, though it is not listed.
            return Err(TargetError::NoSuchProcess(pid));
        }
        let name = stat.comm.clone();
        if matches!(stat.state, 'Z' | 'X' | 'x') {
            return Err(TargetError::Zombie { pid, name, parent: stat.ppid });
        }
        if StatFlags::from_bits_truncate(stat.flags).contains(StatFlags::PF_KTHREAD) {
            return Err(TargetError::KernelThread { pid, name });
        }
        let link = PathBuf::from(format!("/proc/{pid}/exe"));
        let denied = |e: io::Error| exe_error(pid, status.euid, &link, e);
        let path = fs::read_link(&link).map_err(denied)?;
        let exe_id = FileId::of(&fs::metadata(&link).map_err(denied)?);
        let (exe, exe_deleted) = strip_deleted(&path, pid, exe_id);
        let name = exe.file_name().map_or(name, |n| n.to_string_lossy().into_owned());
        Ok(Self {
            pid,
            parent: stat.ppid,
            session: stat.session,
            exe,
            exe_deleted,
            exe_id,
            name,
            start_ticks: stat.starttime,
            uid: status.euid,
            threads: u32::try_from(stat.num_threads).unwrap_or(0),
            state: stat.state,
            layout: (stat.startcode, stat.startstack),
        })
    }

    fn by_name(name: &str) -> Result<Self, TargetError> {
        let mut found: Vec<Self> = Vec::new();
        let mut refused = None;
        let mut others = all_pids()?;
        others.retain(|&pid| pid != std::process::id() as i32);
        let mut named: Vec<i32> = others.iter().copied().filter(|&pid| may_be_named(pid, name)).collect();
        if named.is_empty() {
            // Debian's redis-server is a link to redis-check-rdb.
            named = others.into_iter().filter(|&pid| is_called(pid, name)).collect();
        }
        for pid in named {
            match Self::examine(pid) {
                Ok(target) => found.push(target),
                Err(TargetError::NoSuchProcess(_) | TargetError::Exited(_)) => {}
                Err(e) => refused = Some(e),
            }
        }
        let mut roots: Vec<Self> = Vec::new();
        for target in &found {
            let root = crate::group::root_of(target);
            if !roots.iter().any(|r| r.pid == root.pid) {
                roots.push(root);
            }
        }
        match (roots.len(), refused) {
            (0, Some(e)) => Err(e),
            (0, None) => Err(TargetError::NoSuchName(name.to_owned())),
            (1, _) => Self::by_pid(roots[0].pid),
            _ => Err(TargetError::Ambiguous {
                name: name.to_owned(),
                processes: roots.iter().map(|r| (r.pid, r.exe.display().to_string())).collect(),
            }),
        }
    }

    /// True while this PID still names the process that it named when this target was made, and the process has not
    /// become a zombie.
    #[must_use]
    pub fn still_there(&self) -> bool {
        Process::new(self.pid)
            .and_then(|p| p.stat())
            .is_ok_and(|s| s.starttime == self.start_ticks && !matches!(s.state, 'Z' | 'X' | 'x'))
    }

    /// The IDs of its threads at this moment, in rising order; empty once it has ended.
    #[must_use]
    pub fn thread_ids(&self) -> Vec<i32> {
        numeric_names(Path::new(&format!("/proc/{}/task", self.pid))).unwrap_or_default()
    }

    /// True if `other` runs the same executable file and the two share one `execve`: one was forked from the other, or
    /// both from a third.
    #[must_use]
    pub fn same_program(&self, other: &Self) -> bool {
        self.exe_id == other.exe_id && self.layout == other.layout
    }
}

/// The number-named entries of a directory, in rising order: processes or threads.
fn numeric_names(directory: &Path) -> io::Result<Vec<i32>> {
    let mut ids: Vec<i32> =
        fs::read_dir(directory)?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// The PIDs of all processes, in rising order.
pub(crate) fn all_pids() -> Result<Vec<i32>, TargetError> {
    let path = Path::new("/proc");
    numeric_names(path).map_err(|source| TargetError::Io { path: path.to_owned(), source })
}

/// Whether a process runs an executable of this name; where its link can't be read, its `comm` decides, so that the
/// error can say who owns it instead of "no such process".
fn may_be_named(pid: i32, name: &str) -> bool {
    let wanted = name.as_bytes();
    match fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(path) => {
            let bytes = path.as_os_str().as_bytes();
            let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
            bytes == wanted || bytes.rsplit(|&b| b == b'/').next() == Some(wanted)
        }
        Err(_) => is_called(pid, name),
    }
}

/// Whether this is what the kernel calls a process: the file that it was started by, or what it has called itself since,
/// cut to 15 bytes.
fn is_called(pid: i32, name: &str) -> bool {
    let wanted = &name.as_bytes()[..name.len().min(15)];
    fs::read(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.strip_suffix(b"\n") == Some(wanted))
}

/// The path that `/proc/PID/exe` shows, without the kernel's mark, and whether the file is gone. A file whose name really
/// ends in ` (deleted)` is still there under that name.
fn strip_deleted(path: &Path, pid: i32, id: FileId) -> (PathBuf, bool) {
    let mut seen = PathBuf::from(format!("/proc/{pid}/root"));
    seen.push(path.strip_prefix("/").unwrap_or(path));
    let exists = fs::metadata(&seen).is_ok_and(|m| FileId::of(&m) == id);
    match path.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(bare) if !exists => (PathBuf::from(std::ffi::OsStr::from_bytes(bare)), true),
        _ => (path.to_owned(), false),
    }
}

fn check_class(target: &Target) -> Result<(), TargetError> {
    let (pid, name) = (target.pid, target.name.clone());
    let path = PathBuf::from(format!("/proc/{pid}/exe"));
    let file = fs::File::open(&path).map_err(|e| exe_error(pid, target.uid, &path, e))?;
    match elf::class(&file) {
        Ok(()) => Ok(()),
        Err(elf::ElfError::Class32) => Err(TargetError::ThirtyTwoBit { pid, name }),
        Err(elf::ElfError::Io(source)) => Err(TargetError::Io { path, source }),
        Err(_) => Err(TargetError::NotX86 { pid, name }),
    }
}

/// Who traces a process: PID and name.
fn tracer(pid: i32) -> Result<Option<(i32, String)>, TargetError> {
    let status = Process::new(pid).and_then(|p| p.status()).map_err(|e| proc_error(pid, e))?;
    // What the kernel names is the tracing thread.
    let thread = status.tracerpid;
    let tracer = Process::new(thread).and_then(|p| p.status()).map_or(thread, |s| s.tgid);
    let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
    Ok((tracer != 0).then(|| (tracer, name.trim_end().to_owned())))
}

fn exe_error(pid: i32, uid: u32, path: &Path, e: io::Error) -> TargetError {
    match e.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => not_permitted(pid, uid),
        // The link of a process that is just ending is gone before the process is.
        Some(libc::ENOENT | libc::ESRCH) => TargetError::Exited(pid),
        _ => TargetError::Io { path: path.to_owned(), source: e },
    }
}

/// The refusal for a process that belongs to `uid`.
pub(crate) fn not_permitted(pid: i32, uid: u32) -> TargetError {
    let owner = user_name(uid);
    // SAFETY: geteuid has no preconditions and never fails.
    let ours = unsafe { libc::geteuid() };
    let remedy = if ours == uid {
        "it has made itself undumpable or runs in another user namespace; run dyni as root".to_owned()
    } else if ours == 0 {
        "this root lacks CAP_SYS_PTRACE; run dyni on the host, or give the container that capability".to_owned()
    } else {
        format!("run dyni as {owner} or as root")
    };
    TargetError::NotPermitted { pid, owner, remedy }
}

/// The name of a user, or its number where it has none.
fn user_name(uid: u32) -> String {
    nix::unistd::User::from_uid(uid.into()).ok().flatten().map_or_else(|| format!("user {uid}"), |u| u.name)
}

fn proc_error(pid: i32, e: procfs::ProcError) -> TargetError {
    match e {
        procfs::ProcError::NotFound(_) => TargetError::NoSuchProcess(pid),
        procfs::ProcError::PermissionDenied(_) => {
            let uid = fs::metadata(format!("/proc/{pid}")).map_or(0, |m| m.uid());
            not_permitted(pid, uid)
        }
        procfs::ProcError::Io(source, path) => match source.raw_os_error() {
            Some(libc::ESRCH) => TargetError::NoSuchProcess(pid),
            _ => TargetError::Io { path: path.unwrap_or_else(|| format!("/proc/{pid}").into()), source },
        },
        other => TargetError::Io { path: format!("/proc/{pid}").into(), source: io::Error::other(other.to_string()) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_the_exit_statuses() {
        assert_eq!(TargetError::NoSuchProcess(1).kind().exit_status(), 2);
        assert_eq!(TargetError::Exited(1).kind().exit_status(), 1);
        assert_eq!(TargetError::KernelThread { pid: 2, name: "kthreadd".into() }.kind().exit_status(), 3);
    }

    #[test]
    fn an_ambiguous_name_lists_its_processes_and_not_all_of_a_thousand() {
        let processes = (1..=1000).map(|pid| (pid, "/bin/x".to_owned())).collect();
        let text = TargetError::Ambiguous { name: "x".into(), processes }.to_string();
        assert!(text.contains("1 /bin/x, 2 /bin/x") && text.contains("and 992 more"), "{text}");
        assert!(!text.contains('\n'));
    }

    #[test]
    fn we_are_no_target_of_ours() {
        let pid = std::process::id() as i32;
        assert!(matches!(Target::by_pid(pid), Err(TargetError::Ourselves(p)) if p == pid));
    }

    #[test]
    fn nonsense_names_nothing() {
        for pid in [0, -1, i32::MAX] {
            let error = Target::by_pid(pid).unwrap_err();
            assert!(matches!(error, TargetError::NoSuchProcess(_)), "{error}");
        }
        assert!(matches!(Target::find("no/such/name at all"), Err(TargetError::NoSuchName(_))));
    }
}
