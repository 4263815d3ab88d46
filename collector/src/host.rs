//! What this host offers and how to change it: the table behind `dyni doctor`.
//!
//! Each line of the table is one check: it reads a file or two and says what it found, what that means for dyni, and what
//! would change it. Files are read below roots that are parameters, so that other hosts can be looked at in tests.

use crate::attribution::bounded;
use crate::perf::{self, OpenError};
use dyni_schema::{Host, Method};
use std::fs;
use std::path::{Path, PathBuf};

/// What a finding means for dyni.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// As good as it gets.
    Ok,
    /// It works, but less well or not for every process.
    Limited,
    /// What depends on it does not work.
    Missing,
}

impl Verdict {
    /// The word for it in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// The outcome of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// A stable word for scripts.
    pub id: &'static str,
    /// What was looked at, for people.
    pub title: &'static str,
    /// What it was found to be.
    pub found: String,
    /// What that means.
    pub verdict: Verdict,
    /// What follows from it and how to change it; empty where there is nothing to change.
    pub remedy: String,
}

/// Where a host's facts come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// What is mounted at /proc.
    pub proc_root: PathBuf,
    /// What is mounted at /sys.
    pub sys_root: PathBuf,
    /// Tries to open a sampler on this very thread.
    pub open: fn(Method) -> Result<(), OpenError>,
}

impl Default for Source {
    /// This host.
    fn default() -> Self {
        Self { proc_root: "/proc".into(), sys_root: "/sys".into(), open: perf::probe }
    }
}

impl Source {
    fn proc(&self, path: &str) -> Option<String> {
        read(&self.proc_root, path)
    }

    fn sys(&self, path: &str) -> Option<String> {
        read(&self.sys_root, path)
    }

    fn number(&self, path: &str) -> Option<i64> {
        self.proc(path)?.parse().ok()
    }

    /// A field of our own `status`.
    fn status(&self, field: &str) -> Option<String> {
        let text = self.proc("self/status")?;
        text.lines().find_map(|l| Some(l.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned()))
    }

    /// Whether we have a capability; `None` where that can't be read.
    fn capable(&self, bit: u32) -> Option<bool> {
        u64::from_str_radix(&self.status("CapEff")?, 16).ok().map(|set| set >> bit & 1 == 1)
    }
}

fn read(root: &Path, path: &str) -> Option<String> {
    fs::read(root.join(path)).ok().map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// The word in brackets, in a file that lists all choices and marks one.
fn chosen(text: &str) -> &str {
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(text, |(word, _)| word)
}

/// Found, verdict, remedy.
type Finding = (String, Verdict, String);

fn fine(found: impl Into<String>) -> Finding {
    (found.into(), Verdict::Ok, String::new())
}

fn limited(found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    (found.into(), Verdict::Limited, remedy.into())
}

fn missing(found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    (found.into(), Verdict::Missing, remedy.into())
}

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;

/// Every check, in the order in which they are shown.
type Row = (&'static str, &'static str, fn(&Source) -> Finding);
const TABLE: &[Row] = &[
    ("cpu", "Processor", cpu),
    ("kernel", "Kernel", kernel),
    ("cap_sys_ptrace", "Capability to trace any process", cap_sys_ptrace),
    ("cap_perfmon", "Capability to sample any process", cap_perfmon),
    ("cap_sys_admin", "Capability to open mapped files", cap_sys_admin),
    ("ptrace_scope", "Yama's ptrace scope", ptrace_scope),
    ("perf_event_paranoid", "Who may use perf events", perf_event_paranoid),
    ("lbr", "Branch stacks (LBR)", |s| sampler(s, Method::Lbr)),
    ("cycles", "Hardware counters", |s| sampler(s, Method::Cycles)),
    ("clock", "cpu-clock sampler", |s| sampler(s, Method::Clock)),
    ("perf_event_mlock_kb", "Memory for ring buffers", perf_event_mlock_kb),
    ("thp", "Transparent huge pages", thp),
    ("thp_shmem", "Huge pages for shared memory", thp_shmem),
    ("pages_2m", "2 MB pages", pages_2m),
    ("overcommit", "Memory overcommit", overcommit),
    ("proc_mem", "Writing code through /proc/PID/mem", proc_mem),
    ("lockdown", "Kernel lockdown", lockdown),
    ("seccomp", "Seccomp filter on dyni itself", seccomp),
    ("selinux", "SELinux", selinux),
    ("apparmor", "AppArmor", apparmor),
];

/// Runs every check of the table.
#[must_use]
pub fn checks(source: &Source) -> Vec<Check> {
    let run = |&(id, title, check): &Row| {
        let (found, verdict, remedy) = check(source);
        Check { id, title, found, verdict, remedy }
    };
    TABLE.iter().map(run).collect()
}

/// The host as far as profiles care: its processor and kernel.
#[must_use]
pub fn identity(source: &Source) -> Host {
    let cpuinfo = source.proc("cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let kernel = source.proc("sys/kernel/osrelease").unwrap_or_default();
    Host { cpu: bounded(model.map_or("", |(_, name)| name.trim())), kernel: bounded(&kernel) }
}

fn cpu(s: &Source) -> Finding {
    let cpuinfo = s.proc("cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    let virtual_machine = flags.split_whitespace().any(|f| f == "hypervisor");
    match identity(s).cpu {
        model if model.is_empty() => limited("unknown", "mount /proc"),
        model if virtual_machine => fine(format!("{model}, in a virtual machine")),
        model => fine(model),
    }
}

fn kernel(s: &Source) -> Finding {
    let release = identity(s).kernel;
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok());
    match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) if (major, minor) >= (6, 1) => fine(release),
        (Some(major), Some(minor)) if (major, minor) >= (4, 17) => {
            limited(release, "code caches can't be collapsed into huge pages before Linux 6.1")
        }
        (Some(_), Some(_)) => {
            missing(release, "code caches can't be placed safely (MAP_FIXED_NOREPLACE) before Linux 4.17")
        }
        _ => limited("unknown", "mount /proc"),
    }
}

fn capability(s: &Source, bit: u32, without: Verdict, remedy: &str) -> Finding {
    match s.capable(bit) {
        Some(true) => fine("held"),
        Some(false) => ("not held".to_owned(), without, remedy.to_owned()),
        None => limited("unknown", "mount /proc"),
    }
}

fn cap_sys_ptrace(s: &Source) -> Finding {
    capability(s, CAP_SYS_PTRACE, Verdict::Limited, "only your own processes can be optimised; run as root")
}

fn cap_perfmon(s: &Source) -> Finding {
    // CAP_SYS_ADMIN includes it, for older kernels.
    if s.capable(CAP_SYS_ADMIN) == Some(true) {
        return fine("held");
    }
    let remedy = "only your own processes can be sampled, and only where perf_event_paranoid lets you; run as root";
    capability(s, CAP_PERFMON, Verdict::Limited, remedy)
}

fn cap_sys_admin(s: &Source) -> Finding {
    let remedy = "libraries that were replaced on disk can't be read; run as root or restart their programs";
    capability(s, CAP_SYS_ADMIN, Verdict::Limited, remedy)
}

fn ptrace_scope(s: &Source) -> Finding {
    let all = s.capable(CAP_SYS_PTRACE) == Some(true);
    match s.number("sys/kernel/yama/ptrace_scope") {
        None => fine("no Yama: your own processes may be traced"),
        Some(0) => fine("0: your own processes may be traced"),
        Some(n @ 1..=2) if all => fine(format!("{n}: does not bind CAP_SYS_PTRACE")),
        Some(1) => limited(
            "1: only your own children may be traced",
            "run as root, or `sysctl kernel.yama.ptrace_scope=0`, or start programs with `dyni exec`",
        ),
        Some(2) => missing("2: only root may trace", "run as root, or `sysctl kernel.yama.ptrace_scope=0`"),
        Some(n) => missing(
            format!("{n}: nobody may trace until the next boot"),
            "set kernel.yama.ptrace_scope to 1 in /etc/sysctl.d and boot again",
        ),
    }
}

fn perf_event_paranoid(s: &Source) -> Finding {
    let all = s.capable(CAP_PERFMON) == Some(true) || s.capable(CAP_SYS_ADMIN) == Some(true);
    match s.number("sys/kernel/perf_event_paranoid") {
        None => missing("no perf events in this kernel", "ptrace samples instead, coarsely"),
        Some(n) if all => fine(format!("{n}: does not bind CAP_PERFMON")),
        Some(n) if n <= 2 => fine(format!("{n}: your own programs may be sampled")),
        Some(n) => limited(
            format!("{n}: only root may sample"),
            "run as root, or `sysctl kernel.perf_event_paranoid=2`; else ptrace samples, coarsely",
        ),
    }
}

fn sampler(s: &Source, method: Method) -> Finding {
    match (s.open)(method) {
        Ok(()) => fine("works"),
        Err(e) => {
            let instead = match method {
                Method::Lbr => "counting (`--method count`) gives exact edges instead",
                Method::Cycles => "the clock samples instead",
                _ => "ptrace samples instead, coarsely",
            };
            let verdict = if method == Method::Clock { Verdict::Missing } else { Verdict::Limited };
            (e.cause(), verdict, instead.to_owned())
        }
    }
}

fn perf_event_mlock_kb(s: &Source) -> Finding {
    match s.number("sys/kernel/perf_event_mlock_kb") {
        None => fine("no limit is stated"),
        Some(kb) if kb >= 516 || s.capable(CAP_SYS_ADMIN) == Some(true) => fine(format!("{kb} KB a CPU")),
        Some(kb) => limited(
            format!("{kb} KB a CPU"),
            "branch stacks may be lost under load; `sysctl kernel.perf_event_mlock_kb=516`",
        ),
    }
}

fn thp(s: &Source) -> Finding {
    let text = s.sys("kernel/mm/transparent_hugepage/enabled");
    match text.as_deref().map(chosen) {
        None => missing("not in this kernel", "hot code can't lie on a huge page; a kernel with THP would be faster"),
        Some("never") => {
            limited("never", "huge pages may be refused; `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`")
        }
        Some(mode) => fine(mode),
    }
}

fn thp_shmem(s: &Source) -> Finding {
    let text = s.sys("kernel/mm/transparent_hugepage/shmem_enabled");
    match text.as_deref().map(chosen) {
        None => limited("not in this kernel", "a code cache that processes share has small pages"),
        Some("deny") => limited(
            "deny",
            "a code cache that processes share has small pages; `echo never > \
             /sys/kernel/mm/transparent_hugepage/shmem_enabled` is enough",
        ),
        // An explicit collapse works with `never` as well.
        Some(mode) => fine(mode),
    }
}

fn pages_2m(s: &Source) -> Finding {
    let size = s.sys("kernel/mm/transparent_hugepage/hpage_pmd_size");
    let pool = s.sys_root.join("kernel/mm/hugepages/hugepages-2048kB").is_dir();
    match size.as_deref() {
        Some("2097152") => fine("supported"),
        _ if pool => fine("supported by hugetlbfs only"),
        Some(other) => limited(format!("huge pages have {other} bytes here"), "hot code stays on small pages"),
        None => limited("not supported", "hot code stays on small pages"),
    }
}

fn overcommit(s: &Source) -> Finding {
    match s.number("sys/vm/overcommit_memory") {
        Some(2) => limited(
            "2: strict",
            "a code cache counts against the limit of all memory; raise vm.overcommit_ratio if mapping fails",
        ),
        Some(n) => fine(n.to_string()),
        None => limited("unknown", "mount /proc"),
    }
}

fn proc_mem(s: &Source) -> Finding {
    let line = s.proc("cmdline").unwrap_or_default();
    let set = line.split_whitespace().rev().find_map(|w| w.strip_prefix("proc_mem.force_override="));
    match set {
        None => fine("not restricted on the kernel's command line"),
        Some("never") => missing(
            "never",
            "code can't be patched; boot with proc_mem.force_override=ptrace (or without that parameter)",
        ),
        Some(mode) => fine(mode),
    }
}

fn lockdown(s: &Source) -> Finding {
    let text = s.sys("kernel/security/lockdown");
    match text.as_deref().map(chosen) {
        None => fine("not in force"),
        Some("confidentiality") => {
            limited("confidentiality", "perf events may be refused; boot with lockdown=integrity")
        }
        Some(mode) => fine(mode),
    }
}

fn seccomp(s: &Source) -> Finding {
    match s.status("Seccomp").as_deref() {
        Some("0") | None => fine("none"),
        Some(_) => limited(
            "a filter is in force",
            "system calls may be refused; start the container with a profile that allows ptrace and perf_event_open, \
             or run dyni on the host",
        ),
    }
}

fn selinux(s: &Source) -> Finding {
    let denies = s.sys("fs/selinux/booleans/deny_ptrace").is_some_and(|t| t.starts_with('1'));
    match s.sys("fs/selinux/enforce").as_deref() {
        None => fine("not in force"),
        Some("1") if denies => missing("enforcing, ptrace denied", "`setsebool deny_ptrace 0`"),
        Some("1") => limited("enforcing", "if a process is refused, look for `avc: denied` in the audit log"),
        Some(_) => fine("permissive"),
    }
}

fn apparmor(s: &Source) -> Finding {
    match s.sys("module/apparmor/parameters/enabled").as_deref() {
        Some("Y") => match s.proc("self/attr/current").as_deref() {
            None | Some("unconfined" | "") => fine("in force, dyni is not confined"),
            Some(profile) => limited(
                format!("confines dyni ({profile})"),
                "tracing may be refused; run dyni outside that profile or container",
            ),
        },
        _ => fine("not in force"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up host: files below a temporary /proc and /sys.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new(files: &[(&str, &str)]) -> Self {
            let this = Self(tempfile::tempdir().unwrap());
            for (path, text) in files {
                let path = this.0.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            this
        }

        fn checks(&self, open: fn(Method) -> Result<(), OpenError>) -> Vec<Check> {
            let (proc_root, sys_root) = (self.0.path().join("proc"), self.0.path().join("sys"));
            checks(&Source { proc_root, sys_root, open })
        }
    }

    fn nothing_opens(method: Method) -> Result<(), OpenError> {
        Err(OpenError { method, errno: libc::ENOENT, paranoid: None })
    }

    fn verdict<'a>(checks: &'a [Check], id: &str) -> (Verdict, &'a str) {
        let check = checks.iter().find(|c| c.id == id).unwrap();
        (check.verdict, &check.found)
    }

    #[test]
    fn a_locked_up_container() {
        let fake = Fake::new(&[
            ("proc/self/status", "Name:\tdyni\nCapEff:\t0000000000000000\nSeccomp:\t2\nSeccomp_filters:\t1\n"),
            ("proc/sys/kernel/osrelease", "5.10.0-32-amd64\n"),
            ("proc/sys/kernel/yama/ptrace_scope", "3\n"),
            ("proc/sys/kernel/perf_event_paranoid", "3\n"),
            ("proc/sys/kernel/perf_event_mlock_kb", "64\n"),
            ("proc/sys/vm/overcommit_memory", "2\n"),
            ("proc/cmdline", "quiet proc_mem.force_override=ptrace proc_mem.force_override=never\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("sys/kernel/security/lockdown", "none integrity [confidentiality]\n"),
            ("sys/fs/selinux/enforce", "1"),
            ("sys/fs/selinux/booleans/deny_ptrace", "1 1"),
            ("sys/module/apparmor/parameters/enabled", "Y\n"),
            ("proc/self/attr/current", "docker-default (enforce)\n"),
        ]);
        let checks = fake.checks(nothing_opens);
        for check in &checks {
            assert!(check.verdict != Verdict::Ok || check.id == "cpu", "{check:?}");
            assert!(!check.remedy.is_empty() && !check.found.contains('\n'), "{check:?}");
        }
        assert_eq!(verdict(&checks, "proc_mem"), (Verdict::Missing, "never"));
        assert_eq!(verdict(&checks, "ptrace_scope").0, Verdict::Missing);
        assert_eq!(verdict(&checks, "kernel").0, Verdict::Limited);
    }

    #[test]
    fn a_host_with_everything() {
        let fake = Fake::new(&[
            ("proc/self/status", "CapEff:\t000001ffffffffff\nSeccomp:\t0\n"),
            ("proc/cpuinfo", "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu pse\n"),
            ("proc/sys/kernel/osrelease", "6.12.0\n"),
            ("proc/sys/kernel/yama/ptrace_scope", "1\n"),
            ("proc/sys/kernel/perf_event_paranoid", "3\n"),
            ("proc/sys/kernel/perf_event_mlock_kb", "516\n"),
            ("proc/sys/vm/overcommit_memory", "0\n"),
            ("proc/cmdline", "quiet\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always [never] deny\n"),
            ("sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "2097152\n"),
        ]);
        let checks = fake.checks(|_| Ok(()));
        for check in &checks {
            assert!(check.verdict == Verdict::Ok && check.remedy.is_empty(), "{check:?}");
        }
        assert_eq!(verdict(&checks, "cpu").1, "A CPU");
    }

    #[test]
    fn this_host_and_no_host_at_all() {
        assert_eq!(checks(&Source::default()).len(), TABLE.len());
        assert!(!identity(&Source::default()).kernel.is_empty());
        assert_eq!(Fake::new(&[]).checks(nothing_opens).len(), TABLE.len());
        let mut ids: Vec<_> = TABLE.iter().map(|row| row.0).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), TABLE.len());
    }
}
