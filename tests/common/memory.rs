//! A process's text and mappings, read from /proc and compared with the files: the judge of what dyni claims.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

/// A file, as the mappings name it: device and inode.
type FileId = (i32, i32, u64);

/// The mappings of a process. A process that is gone has none.
pub fn maps(pid: i32) -> Vec<MemoryMap> {
    Process::new(pid).and_then(|p| p.maps()).map(|m| m.into_iter().collect()).unwrap_or_default()
}

fn is_executable(m: &MemoryMap) -> bool {
    m.perms.contains(MMPermissions::EXECUTE)
}

fn is_kernels(m: &MemoryMap) -> bool {
    matches!(m.pathname, MMapPath::Vdso | MMapPath::Vsyscall | MMapPath::Vvar)
        || matches!(&m.pathname, MMapPath::Other(name) if name.starts_with("vvar"))
}

fn is_file(m: &MemoryMap) -> bool {
    m.inode != 0 && matches!(m.pathname, MMapPath::Path(_))
}

/// Mappings that are writable and executable at once.
pub fn rwx(pid: i32) -> Vec<String> {
    let both = MMPermissions::WRITE | MMPermissions::EXECUTE;
    maps(pid).iter().filter(|m| m.perms.contains(both)).map(|m| format!("{m:x?}")).collect()
}

/// What the text of a process's modules has to be: the files' bytes, kept since before anybody touched the process.
pub struct Text {
    files: BTreeMap<FileId, Vec<u8>>,
    /// Addresses that the program rewrites itself.
    own: Vec<Range<u64>>,
    layout: BTreeMap<String, Vec<(u64, u64, String)>>,
}

impl Text {
    /// Reads the files of all modules mapped now.
    pub fn new(pid: i32) -> Self {
        let mut files = BTreeMap::new();
        for m in maps(pid).iter().filter(|m| is_executable(m) && is_file(m)) {
            if let Some(bytes) = file_bytes(pid, m) {
                files.insert((m.dev.0, m.dev.1, m.inode), bytes);
            }
        }
        assert!(!files.is_empty(), "process {pid} maps no files");
        Self { files, own: Vec::new(), layout: layout(pid) }
    }

    /// Leaves out what the program rewrites itself.
    pub fn ignoring(mut self, own: Range<u64>) -> Self {
        self.own.push(own);
        self
    }

    /// Addresses at which the live text is not the file's, as runs; the unused rest of the last page included.
    pub fn differences(&self, pid: i32) -> Vec<Range<u64>> {
        self.compare(pid, |_, _| usize::MAX)
    }

    /// The same inside the modules' code alone. What a dyni that died has left in the unused rest of a page is no patch.
    pub fn patches(&self, pid: i32) -> Vec<Range<u64>> {
        self.compare(pid, code_end)
    }

    /// `limit` says at which offset in a file to stop, for a mapping that begins at another.
    fn compare(&self, pid: i32, limit: impl Fn(&[u8], usize) -> usize) -> Vec<Range<u64>> {
        let Ok(mem) = File::open(format!("/proc/{pid}/mem")) else { return Vec::new() };
        let mut found = Vec::new();
        for m in maps(pid).iter().filter(|m| is_executable(m) && is_file(m)) {
            // A module that came later (dlopen) is read now; its text is judged all the same.
            let late;
            let id = (m.dev.0, m.dev.1, m.inode);
            let file = match self.files.get(&id) {
                Some(bytes) => bytes,
                None => match file_bytes(pid, m) {
                    Some(bytes) => {
                        late = bytes;
                        &late
                    }
                    None => continue,
                },
            };
            let (start, end) = m.address;
            let from = (m.offset as usize).min(file.len());
            let want = &file[from..(from + (end - start) as usize).min(file.len()).min(limit(file, from)).max(from)];
            let mut live = vec![0; want.len()];
            // The mapping may have gone between the two looks.
            if mem.read_exact_at(&mut live, start).is_err() {
                continue;
            }
            if live != want {
                self.runs(start, &live, want, &mut found);
            }
        }
        found
    }

    fn runs(&self, start: u64, live: &[u8], want: &[u8], found: &mut Vec<Range<u64>>) {
        for (i, _) in live.iter().zip(want).enumerate().filter(|(_, (a, b))| a != b) {
            let at = start + i as u64;
            if self.own.iter().any(|r| r.contains(&at)) {
                continue;
            }
            match found.last_mut() {
                Some(last) if last.end == at => last.end = at + 1,
                _ => found.push(at..at + 1),
            }
        }
    }

    /// Panics unless the text is byte-identical to the files.
    pub fn assert_pristine(&self, pid: i32, when: &str) {
        let found = self.differences(pid);
        assert!(
            found.is_empty(),
            "{when}: the text of {pid} differs from its files at {:x?}",
            &found[..found.len().min(20)]
        );
    }

    /// Panics unless the modules that were there at the start have the page protections of the start.
    pub fn assert_protections(&self, pid: i32, when: &str) {
        // A plugin that is being loaded right now is half mapped: what is wrong has to stay wrong to count.
        for _ in 0..50 {
            if self.changed_protections(pid).is_none() {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        if let Some(change) = self.changed_protections(pid) {
            panic!("{when}: the page protections in {pid} have changed: {change}");
        }
    }

    fn changed_protections(&self, pid: i32) -> Option<String> {
        let now = layout(pid);
        self.layout.iter().find_map(|(path, want)| {
            // A module that was unloaded since, or loaded elsewhere, has no protections to keep.
            let have = now.get(path)?;
            let same_place = have.first().map(|h| h.0) == want.first().map(|w| w.0);
            (same_place && have != want).then(|| format!("{path}: {want:x?} has become {have:x?}"))
        })
    }

    /// Whether an address is in executable memory that belongs to no file of the start and not to the kernel: a copy.
    pub fn is_copy(&self, pid: i32, address: u64) -> bool {
        maps(pid).iter().any(|m| {
            (m.address.0..m.address.1).contains(&address)
                && is_executable(m)
                && !is_kernels(m)
                && !self.files.contains_key(&(m.dev.0, m.dev.1, m.inode))
        })
    }
}

/// Where the executable segment that holds this offset ends in an ELF file, which may be none or lie.
fn code_end(file: &[u8], offset: usize) -> usize {
    const EXECUTABLE: usize = 1;
    let number = |table: usize, at: usize, size: usize| {
        let from = table.saturating_add(at);
        let field = file.get(from..from.saturating_add(size)).unwrap_or_default();
        field.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b))
    };
    let (table, size, count) = (number(0, 0x20, 8), number(0, 0x36, 2), number(0, 0x38, 2));
    let segments = (0..count).map(|i| table.saturating_add(i * size));
    let code = segments.filter(|p| number(*p, 0, 4) == 1 && number(*p, 4, 4) & EXECUTABLE != 0);
    let ranges = code.map(|p| (number(p, 8, 8), number(p, 8, 8).saturating_add(number(p, 32, 8))));
    // A mapping begins at the page in which its segment does.
    ranges.filter(|(from, end)| from & !0xfff <= offset && offset < *end).map(|(_, end)| end).max().unwrap_or(0)
}

/// The file behind a mapping, also where it was deleted or replaced.
fn file_bytes(pid: i32, m: &MemoryMap) -> Option<Vec<u8>> {
    let (start, end) = m.address;
    let MMapPath::Path(path) = &m.pathname else { return None };
    fs::read(format!("/proc/{pid}/map_files/{start:x}-{end:x}")).or_else(|_| fs::read(path)).ok()
}

/// Start, end and permissions of every file-backed mapping, neighbours that differ in nothing merged.
fn layout(pid: i32) -> BTreeMap<String, Vec<(u64, u64, String)>> {
    let mut all: BTreeMap<String, Vec<(u64, u64, String)>> = BTreeMap::new();
    for m in maps(pid).iter().filter(|m| is_file(m)) {
        let MMapPath::Path(path) = &m.pathname else { continue };
        let list = all.entry(path.display().to_string()).or_default();
        let (start, end) = m.address;
        let perms = format!("{:?}", m.perms);
        match list.last_mut() {
            Some(last) if last.1 == start && last.2 == perms => last.1 = end,
            _ => list.push((start, end, perms)),
        }
    }
    all
}

/// The PC of every thread at one moment. Empty where the process is gone or already traced.
///
/// Stops the threads, which some system calls answer with EINTR: not for victims that watch for that.
pub fn program_counters(pid: i32) -> Vec<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|t| program_counter(Pid::from_raw(t.file_name().to_str()?.parse().ok()?))).collect()
}

/// Every error means that the thread has ended or is traced by somebody else.
fn program_counter(tid: Pid) -> Option<u64> {
    ptrace::seize(tid, ptrace::Options::empty()).ok()?;
    ptrace::interrupt(tid).ok()?;
    loop {
        match waitpid(tid, Some(WaitPidFlag::__WALL)).ok()? {
            WaitStatus::PtraceEvent(..) => break,
            // A signal was first. It belongs to the program: hand it over and wait for the stop that was asked for.
            WaitStatus::Stopped(_, signal) => ptrace::cont(tid, signal).ok()?,
            _ => return None,
        }
    }
    let rip = ptrace::getregs(tid).ok().map(|r| r.rip);
    let _ = ptrace::detach(tid, None);
    rip
}

/// Looks at a process's mappings all the time, for as long as it lives.
pub struct RwxGuard {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl RwxGuard {
    /// Starts looking.
    pub fn start(pid: i32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                let found = rwx(pid);
                if !found.is_empty() {
                    return found;
                }
                thread::sleep(Duration::from_micros(700));
            }
            Vec::new()
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops looking and panics if a mapping was ever both.
    pub fn assert_none(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let found = self.thread.take().expect("joined once").join().expect("the guard does not panic");
        assert!(found.is_empty(), "mappings were writable and executable at once: {found:?}");
    }
}

impl Drop for RwxGuard {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
