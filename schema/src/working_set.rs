//! Which pages of which files a program touches after its start, learned from several starts.
//!
//! A page is 4096 bytes of a file, counted from the file's beginning. Pages are kept as runs of neighbours that are alike, so
//! that a bitmap of a hundred megabytes of text is some hundred rows.

use crate::profile::{MAX_MODULES, MAX_STRING, check};
use crate::{BuildId, Invalid};
use rkyv::{Archive, Deserialize, Serialize};

/// The size of a page in bytes.
pub const PAGE: u64 = 4096;
/// The most runs of one file.
pub const MAX_RUNS: usize = 1 << 20;
/// The weight of a page that was touched in every start.
pub const ALWAYS: u8 = 255;

/// What identifies a file, so that what was learned of one is never used for another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub enum FileKey {
    /// A build, by its build-id.
    Build(BuildId),
    /// Any other file, on one host, as long as nobody writes to it.
    Inode(InodeKey),
}

/// What identifies a file that is no build.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub struct InodeKey {
    /// Major and minor number of its device.
    pub device: (u32, u32),
    /// Its inode number.
    pub inode: u64,
    /// Its length in bytes.
    pub size: u64,
    /// When it was last modified, ns since 1970-01-01 UTC.
    pub modified_ns: i64,
}

impl FileKey {
    /// The key as text, for a database and for people.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Build(id) => id.hex(),
            Self::Inode(InodeKey { device: (major, minor), inode, size, modified_ns }) => {
                format!("{major}:{minor}:{inode}:{size}:{modified_ns}")
            }
        }
    }

    fn validate(&self, name: &str) -> Result<(), Invalid> {
        match self {
            Self::Build(id) => {
                check(!id.0.is_empty() && id.0.len() <= crate::build_id::MAX_BUILD_ID, "bad build-id", name)
            }
            Self::Inode(_) => Ok(()),
        }
    }
}

/// How a working set was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub enum Recorder {
    /// The pages that the process had mapped, looked at from time to time: mapped files only, and no more exact than the
    /// kernel's fault-around.
    Pagemap,
}

impl Recorder {
    /// The word for it in text and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pagemap => "pagemap",
        }
    }
}

/// Runs of pages, rising, disjoint: a struct of arrays.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Runs {
    /// The first page of each.
    pub first: Vec<u32>,
    /// How many pages each has; not zero.
    pub count: Vec<u32>,
    /// How regularly they are touched, of [`ALWAYS`]; not zero.
    pub weight: Vec<u8>,
    /// At which of the recorder's looks they were first seen, in the newest recording that saw them: an order in time.
    pub seen: Vec<u16>,
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: u32,
    /// How many pages.
    pub count: u32,
    /// How regularly they are touched.
    pub weight: u8,
    /// At which look they were first seen.
    pub seen: u16,
}

impl Runs {
    /// Every run.
    pub fn iter(&self) -> impl Iterator<Item = Run> + '_ {
        let columns = self.first.iter().zip(&self.count).zip(self.weight.iter().zip(&self.seen));
        columns.map(|((&first, &count), (&weight, &seen))| Run { first, count, weight, seen })
    }

    /// Adds a page behind all others; one that is like its neighbour joins it.
    pub fn push(&mut self, page: u32, weight: u8, seen: u16) {
        if let (Some(&first), Some(count)) = (self.first.last(), self.count.last_mut())
            && u64::from(first) + u64::from(*count) == u64::from(page)
            && (self.weight.last(), self.seen.last()) == (Some(&weight), Some(&seen))
        {
            *count += 1;
            return;
        }
        self.first.push(page);
        self.count.push(1);
        self.weight.push(weight);
        self.seen.push(seen);
    }

    /// How many pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.count.iter().map(|&n| u64::from(n)).sum()
    }

    fn validate(&self, size: u64, name: &str) -> Result<(), Invalid> {
        let rows = self.first.len();
        let even = self.count.len() == rows && self.weight.len() == rows && self.seen.len() == rows;
        check(even && rows <= MAX_RUNS, "run columns differ in length", name)?;
        check(self.iter().all(|r| r.count > 0 && r.weight > 0), "a run is empty", name)?;
        let end = |r: &Run| u64::from(r.first) + u64::from(r.count);
        let mut pairs = self.iter().zip(self.iter().skip(1));
        check(pairs.all(|(a, b)| end(&a) <= u64::from(b.first)), "runs are not sorted", name)?;
        check(self.iter().all(|r| end(&r) <= size.div_ceil(PAGE)), "a run lies outside its file", name)
    }
}

/// What is touched of one file.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FileSet {
    /// Which file.
    pub key: FileKey,
    /// The path it was mapped from, for finding it again; never trusted.
    pub path: String,
    /// Its length in bytes when it was last seen.
    pub size: u64,
    /// Its pages.
    pub runs: Runs,
}

/// What reading ahead was good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Usefulness {
    /// Starts for which anything was read.
    pub starts: u32,
    /// Pages that were read for them.
    pub read: u64,
    /// Those of them that the program then touched.
    pub used: u64,
}

impl Usefulness {
    /// How many starts are looked at before a program may be found not to be helped.
    const TRIALS: u32 = 3;

    /// Whether reading ahead has done any good, as far as that is known: at least every second page was touched.
    #[must_use]
    pub fn helps(&self) -> bool {
        self.starts < Self::TRIALS || self.used.saturating_mul(2) >= self.read
    }
}

/// What a program touches in the time after its start.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct WorkingSet {
    /// The program's name: the base name of its executable.
    pub program: String,
    /// Its executable.
    pub executable: FileKey,
    /// The class of arguments that it is for; empty if for any.
    pub mode: String,
    /// How many recordings it was learned from.
    pub recordings: u32,
    /// How they were made.
    pub recorder: Recorder,
    /// How many neighbouring pages one touch may have marked: the precision.
    pub granule: u32,
    /// Until when after the start pages were counted, ns.
    pub deadline_ns: u64,
    /// When it was last changed, seconds since 1970-01-01 UTC.
    pub updated_s: u64,
    /// What reading ahead by it was good for.
    pub usefulness: Usefulness,
    /// By file, sorted by key, each once.
    pub files: Vec<FileSet>,
}

impl WorkingSet {
    /// Checks what every reader may rely on.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn validate(&self) -> Result<(), Invalid> {
        let n = self.program.as_str();
        check(n.len() <= MAX_STRING && self.mode.len() <= MAX_STRING, "a string is too long", "working set")?;
        self.executable.validate(n)?;
        check(self.recordings > 0 && self.granule > 0, "it was learned from nothing", n)?;
        check(self.usefulness.used <= self.usefulness.read, "more pages were used than read", n)?;
        check(self.files.len() <= MAX_MODULES, "too many files", n)?;
        check(self.files.windows(2).all(|w| w[0].key < w[1].key), "files are not sorted", n)?;
        self.files.iter().try_for_each(|f| {
            check(f.path.len() <= MAX_STRING, "a string is too long", n)?;
            f.key.validate(&f.path)?;
            f.runs.validate(f.size, &f.path)
        })
    }

    /// How many pages it has, over all files.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.files.iter().map(|f| f.runs.pages()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_helped_is_given_up() {
        let of = |starts, read, used| Usefulness { starts, read, used }.helps();
        assert!(of(0, 0, 0) && of(2, 100, 0) && of(9, 100, 50));
        assert!(!of(3, 100, 49));
    }
}
