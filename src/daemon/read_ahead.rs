//! Reading ahead for programs as they start, for every program of the host that the archive has a working set of, whether or
//! not it is one that the daemon optimises. A thread of its own does it, as the daemon must never wait for a disk.
//!
//! It stays cheap where programs start by the thousand: what the archive has is listed every ten seconds, a file that is
//! known needs one system call a start, and a program that starts over and over has its pages in memory.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dyni_pbitmap::{Budget, files, prefetch};
use dyni_profiles::Archive;
use dyni_schema::{FileKey, InodeKey};

use super::protocol::ReadAheadStatus;
use crate::exec::watch_use;

/// How often the archive is asked what it has.
const REFRESH: Duration = Duration::from_secs(10);
/// Nothing is read again for a file that was started so shortly before.
const AGAIN: Duration = Duration::from_secs(1);
/// How many starts may wait for their turn; more are let go.
const WAITING: usize = 256;
/// At how many starts at a time it is looked what they use, and for how long.
const WATCHED: usize = 4;
const WATCH: Duration = Duration::from_secs(10);
/// How many executables are remembered.
const REMEMBERED: usize = 4096;

/// The thread, as the daemon has it.
pub struct ReadAhead {
    starts: SyncSender<i32>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    starts: AtomicU64,
    pages: AtomicU64,
    missed: AtomicU64,
    stopped: Mutex<Vec<String>>,
    watched: AtomicUsize,
}

impl ReadAhead {
    /// Begins to wait for starts.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn begin(archive: &Path) -> io::Result<Self> {
        let (starts, receive) = sync_channel(WAITING);
        let counts = Arc::new(Counts::default());
        let reader = Reader {
            archive: archive.to_owned(),
            counts: counts.clone(),
            asked: None,
            opened: None,
            sets: HashSet::new(),
            executables: HashMap::new(),
        };
        std::thread::Builder::new().name("read-ahead".to_owned()).spawn(move || reader.run(&receive))?;
        Ok(Self { starts, counts })
    }

    /// A process has just become another program. Never waits.
    pub fn started(&self, pid: i32) {
        if self.starts.try_send(pid).is_err() {
            self.counts.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What has been done.
    pub fn status(&self) -> ReadAheadStatus {
        let of = |n: &AtomicU64| n.load(Ordering::Acquire);
        let stopped = self.counts.stopped.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Counts { starts, pages, missed, .. } = &*self.counts;
        ReadAheadStatus { starts: of(starts), pages: of(pages), missed: of(missed), stopped }
    }
}

/// What is remembered of an executable.
#[derive(Debug)]
struct Executable {
    key: FileKey,
    read: Option<Instant>,
}

/// In the thread.
struct Reader {
    archive: PathBuf,
    counts: Arc<Counts>,
    asked: Option<Instant>,
    /// As it was when it was asked; `None` if it can't be read.
    opened: Option<Archive>,
    /// The executables for which it has something, as the text of their keys.
    sets: HashSet<String>,
    executables: HashMap<InodeKey, Executable>,
}

impl Reader {
    fn run(mut self, starts: &Receiver<i32>) {
        for pid in starts {
            if self.asked.is_none_or(|at| at.elapsed() >= REFRESH) {
                self.ask();
            }
            if !self.sets.is_empty() {
                // A program that is gone, or that can't be looked at, needs nothing.
                let _ = self.read_for(pid);
            }
        }
    }

    /// Lists what the archive has. Where it can't be read, that is nothing.
    fn ask(&mut self) {
        self.asked = Some(Instant::now());
        self.sets.clear();
        let mut stopped = Vec::new();
        // Opened anew each time: another may lie there by now.
        self.opened = Archive::open_read_only(&self.archive).ok();
        let entries = self.opened.as_ref().and_then(|archive| archive.working_sets(None).ok());
        for entry in entries.unwrap_or_default() {
            match entry.helps {
                true => drop(self.sets.insert(entry.executable)),
                false => stopped.push(entry.program),
            }
        }
        stopped.sort_unstable();
        *self.counts.stopped.lock().unwrap_or_else(PoisonError::into_inner) = stopped;
    }

    fn read_for(&mut self, pid: i32) -> io::Result<()> {
        let link = PathBuf::from(format!("/proc/{pid}/exe"));
        let place = files::place(&std::fs::metadata(&link)?);
        if !self.executables.contains_key(&place) {
            if self.executables.len() >= REMEMBERED {
                self.executables.clear();
            }
            let (file, metadata) = files::open(&link)?;
            let key = files::key(&file, &metadata);
            self.executables.insert(place.clone(), Executable { key, read: None });
        }
        let Some(executable) = self.executables.get_mut(&place) else { return Ok(()) };
        let is_recent = executable.read.is_some_and(|at| at.elapsed() < AGAIN);
        if is_recent || !self.sets.contains(&executable.key.text()) {
            return Ok(());
        }
        executable.read = Some(Instant::now());
        let newest = self.opened.as_ref().and_then(|archive| archive.working_set_of(&executable.key).ok().flatten());
        let Some(set) = newest.filter(|set| set.usefulness.helps()) else { return Ok(()) };
        let fetched = prefetch(&set, Budget::of_host());
        // In this order: a start that is counted has its pages counted.
        self.counts.pages.fetch_add(fetched.pages(), Ordering::Relaxed);
        self.counts.starts.fetch_add(1, Ordering::Release);
        let one_more = |n| (fetched.pages() > 0 && n < WATCHED).then_some(n + 1);
        if self.counts.watched.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok() {
            let (archive, counts) = (self.archive.clone(), self.counts.clone());
            let watch = move || {
                watch_use(pid, set, &fetched, WATCH, &archive);
                counts.watched.fetch_sub(1, Ordering::Relaxed);
            };
            if std::thread::Builder::new().spawn(watch).is_err() {
                self.counts.watched.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
