//! The score board: one page of memory that a demo target writes and the demo reads.
//!
//! The target publishes, after every operation, how many it has done and how much CPU time it has used *at that
//! instant*. So the figure is exact at any moment at which it is read: no operation is cut in half, and reading costs the
//! target nothing. The page is a memfd that the target gets as its standard input.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

/// What a target publishes, as target.c has it. `version` is odd while the others change (a sequence lock with one writer).
#[repr(C)]
struct Page {
    version: AtomicU64,
    operations: AtomicU64,
    cpu_ns: AtomicU64,
    answers: AtomicU64,
    wrong: AtomicU64,
    ready: AtomicU64,
    stop: AtomicU64,
}

/// A consistent reading of a board.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Score {
    /// Operations that were completed.
    pub operations: u64,
    /// CPU time of the target at the end of the last of them, ns.
    pub cpu_ns: u64,
    /// Hash of all answers of one whole period: equal in all targets.
    pub answers: u64,
    /// Answers that were not the expected ones.
    pub wrong: u64,
    /// Whether the database is filled and every query was asked once.
    pub ready: bool,
}

/// One side of a score board.
pub struct Board {
    map: MmapRaw,
}

impl Board {
    /// A new board, and the file to hand to the target as its standard input.
    ///
    /// # Errors
    /// If the kernel gives no memory file.
    pub fn create() -> io::Result<(Self, File)> {
        let fd = nix::sys::memfd::memfd_create(c"dyni-demo", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        let file = File::from(fd);
        file.set_len(size_of::<Page>() as u64)?;
        Ok((Self::map(&file)?, file))
    }

    fn map(file: &File) -> io::Result<Self> {
        Ok(Self { map: MmapOptions::new().len(size_of::<Page>()).map_raw(file)? })
    }

    fn page(&self) -> &Page {
        // SAFETY: the mapping is page-aligned, as long as a `Page` (see `create`), lives as long as `self`, and is
        // only ever accessed through atomics, for which every bit pattern is valid; the other process does the same.
        unsafe { &*self.map.as_ptr().cast::<Page>() }
    }

    /// The last published score.
    pub fn read(&self) -> Score {
        let page = self.page();
        let mut patience = 5000;
        loop {
            let before = page.version.load(Ordering::Acquire);
            let score = Score {
                operations: page.operations.load(Ordering::Relaxed),
                cpu_ns: page.cpu_ns.load(Ordering::Relaxed),
                answers: page.answers.load(Ordering::Relaxed),
                wrong: page.wrong.load(Ordering::Relaxed),
                ready: page.ready.load(Ordering::Relaxed) != 0,
            };
            fence(Ordering::Acquire);
            // A target that died in the middle of `publish` leaves the version odd for ever: then a torn reading is
            // better than an endless loop, and the caller notices a dead target by itself.
            let after = page.version.load(Ordering::Relaxed);
            patience -= 1;
            if (before == after && before.is_multiple_of(2)) || patience == 0 {
                return score;
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }

    /// Asks the target to end after the operation in hand.
    pub fn stop(&self) {
        self.page().stop.store(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_score_is_read_as_the_target_writes_it() {
        let (board, file) = Board::create().unwrap();
        assert_eq!(board.read(), Score::default());
        let words: Vec<u8> = [2u64, 3, 5, 7, 1, 1, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
        file.write_all_at(&words, 0).unwrap();
        assert_eq!(board.read(), Score { operations: 3, cpu_ns: 5, answers: 7, wrong: 1, ready: true });
        board.stop();
        let mut stop = [0; 8];
        file.read_exact_at(&mut stop, 48).unwrap();
        assert_eq!(u64::from_ne_bytes(stop), 1);
    }
}
