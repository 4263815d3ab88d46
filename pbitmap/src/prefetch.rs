//! Reading ahead: the pages that a program is going to touch and that are not in memory, in file order, within a budget.
//!
//! `readahead` fills the page cache and touches nothing of the program's: it can't fault, whatever becomes of the file. What
//! is in memory already is asked of the kernel (`cachestat`, Linux 6.5); where it does not answer, everything is handed to
//! `readahead`, which passes over what is there, and it is not known whether it helped.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use dyni_schema::working_set::PAGE;
use dyni_schema::{FileKey, FileSet, Runs, WorkingSet};

use crate::files;

/// Pages of less weight are not read ahead: more often than not they would be read for nothing.
const PREDICTED: u8 = 128;
/// Runs that lie no further apart are read as one, in pages: a disk reads on sooner than it seeks.
const GAP: u32 = 16;
/// `SYS_cachestat`, which is the same on all machines.
const CACHESTAT: libc::c_long = 451;

/// How much may be read for one start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes.
    pub bytes: u64,
}

impl Budget {
    /// 256 MB, and no more than an eighth of what memory is free for it.
    #[must_use]
    pub fn of_host() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
        let kb: Option<u64> = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
        Self { bytes: (256 << 20).min(kb.unwrap_or(0) / 8 * 1024) }
    }
}

/// What was read for a start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// By file: the pages that were not in memory, as first page and count.
    pub runs: Vec<(FileKey, Vec<(u32, u32)>)>,
    /// Pages that were asked for without knowing whether they are in memory: the kernel tells only who may write to a file.
    pub unsure: u64,
    /// Files that are not what was learned: replaced, rewritten or gone.
    pub changed: usize,
    /// Whether the budget ended it.
    pub exhausted: bool,
}

impl Fetched {
    /// How many pages were read.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().flat_map(|(_, runs)| runs).map(|&(_, count)| u64::from(count)).sum()
    }
}

/// Has the kernel read what the working set predicts. The reading itself may go on after the return.
#[must_use]
pub fn prefetch(set: &WorkingSet, budget: Budget) -> Fetched {
    let mut fetched = Fetched::default();
    let mut left = budget.bytes / PAGE;
    for file in &set.files {
        let Some(open) = same_file(file) else {
            fetched.changed += 1;
            continue;
        };
        let mut missing = Vec::new();
        for (first, count) in predicted(&file.runs) {
            let absent = absent(&open, first, count);
            if absent == Some(0) {
                continue;
            }
            let count = count.min(u32::try_from(left).unwrap_or(u32::MAX));
            if count == 0 {
                fetched.exhausted = true;
                break;
            }
            let (offset, bytes) = (i64::from(first) * PAGE as i64, count as usize * PAGE as usize);
            // SAFETY: readahead takes integers; the descriptor is open.
            if unsafe { libc::readahead(open.as_raw_fd(), offset, bytes) } == 0 {
                left -= u64::from(count);
                match absent {
                    Some(_) => missing.push((first, count)),
                    None => fetched.unsure += u64::from(count),
                }
            }
        }
        if !missing.is_empty() {
            fetched.runs.push((file.key.clone(), missing));
        }
    }
    fetched
}

/// The file that was learned, if it still is that file.
fn same_file(file: &FileSet) -> Option<File> {
    let (open, metadata) = files::open(Path::new(&file.path)).ok()?;
    let same = metadata.len() == file.size && files::key(&open, &metadata) == file.key;
    same.then_some(open)
}

/// The pages that are likely to be touched, neighbours together: first page and count, rising.
fn predicted(runs: &Runs) -> Vec<(u32, u32)> {
    let mut merged: Vec<(u32, u32)> = Vec::new();
    for run in runs.iter().filter(|r| r.weight >= PREDICTED) {
        match merged.last_mut() {
            Some((first, count)) if run.first - (*first + *count) <= GAP => *count = run.first + run.count - *first,
            _ => merged.push((run.first, run.count)),
        }
    }
    merged
}

/// How many of these pages are not in memory; `None` if the kernel does not say.
fn absent(file: &File, first: u32, count: u32) -> Option<u32> {
    // struct cachestat_range and struct cachestat (include/uapi/linux/mman.h).
    let range = [u64::from(first) * PAGE, u64::from(count) * PAGE];
    let mut answer = [0u64; 5];
    // SAFETY: the kernel reads two words and writes five, both of which live on this frame.
    let done = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), answer.as_mut_ptr(), 0) };
    (done == 0).then(|| count.saturating_sub(u32::try_from(answer[0]).unwrap_or(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_schema::{Recorder, Usefulness};
    use std::os::unix::fs::FileExt;

    fn learned(path: &Path, pages: &[(u32, u8)]) -> WorkingSet {
        let (file, metadata) = files::open(path).unwrap();
        let key = files::key(&file, &metadata);
        let mut runs = Runs::default();
        pages.iter().for_each(|&(page, weight)| runs.push(page, weight, 0));
        let file = FileSet { key: key.clone(), path: path.display().to_string(), size: metadata.len(), runs };
        WorkingSet {
            program: "p".into(),
            executable: key,
            mode: String::new(),
            recordings: 1,
            recorder: Recorder::Pagemap,
            granule: 1,
            deadline_ns: 1,
            updated_s: 1,
            usefulness: Usefulness::default(),
            files: vec![file],
        }
    }

    const PLENTY: Budget = Budget { bytes: 64 << 20 };

    #[test]
    fn likely_neighbours_are_read_as_one() {
        let mut runs = Runs::default();
        for page in [1, 2, 10, 11, 40, 90] {
            runs.push(page, if page == 40 { 20 } else { 255 }, 0);
        }
        assert_eq!(predicted(&runs), [(1, 11), (90, 1)]);
    }

    #[test]
    fn what_is_in_memory_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, vec![7; 100 * PAGE as usize]).unwrap();
        let set = learned(&path, &[(3, 255), (50, 255)]);
        assert_eq!(prefetch(&set, PLENTY).pages(), 0, "it has just been written");
    }

    #[test]
    fn another_file_of_that_name_is_not_read_nor_a_shorter_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, vec![7; 100 * PAGE as usize]).unwrap();
        let set = learned(&path, &[(3, 255), (90, 255)]);
        File::options().write(true).open(&path).unwrap().set_len(5 * PAGE).unwrap();
        assert_eq!(prefetch(&set, PLENTY).changed, 1);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(prefetch(&set, PLENTY).changed, 1);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(prefetch(&set, PLENTY).changed, 1);
    }

    #[test]
    fn a_budget_is_kept() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("data");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        file.write_all_at(&vec![7; 100 * PAGE as usize], 0).unwrap();
        file.sync_all().unwrap();
        // SAFETY: takes integers; the descriptor is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let set = learned(&path, &[(3, 255), (50, 255), (90, 255)]);
        if [3, 50, 90].iter().any(|&page| absent(&file, page, 1) != Some(1)) {
            println!("SKIPPED: this file system keeps its pages in memory");
            return;
        }
        let fetched = prefetch(&set, Budget { bytes: PAGE });
        assert_eq!((fetched.pages(), fetched.exhausted), (1, true));
        assert_eq!(fetched.runs[0].1, [(3, 1)], "in file order");
        assert!(!prefetch(&set, PLENTY).exhausted);
    }
}
