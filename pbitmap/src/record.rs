//! Recording by looks at the page tables of a process (`/proc/PID/pagemap`), which everybody may do with programs of their
//! own and which does not stop them.
//!
//! A page of a mapped file counts as touched when the process has it mapped (or had, and it was swapped out). That has a
//! precision: where the page cache holds the neighbours, one fault maps up to 64 KB around what was touched, or
//! a whole huge page; the recording says which. Pages that are only read by `read` are not seen. When something was first touched is known as far as the looks
//! are apart.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dyni_collector::maps::{self, FileId, Mapping};
use dyni_schema::working_set::{ALWAYS, PAGE};
use dyni_schema::{FileKey, FileSet, Recorder, Runs, Usefulness, WorkingSet};

use crate::files;

/// A page is in memory, or in swap (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
/// Larger files have no bitmap, in pages: 16 GiB.
const MAX_PAGES: u64 = 1 << 22;
/// The most files of one process.
const MAX_FILES: usize = 4096;
/// How many pages a huge page has.
const HUGE_PAGES: u32 = 512;
/// How many entries are read at once.
const CHUNK: usize = 8192;

/// What is being recorded of one process.
#[derive(Debug)]
pub struct Recording {
    pid: i32,
    looks: u16,
    files: BTreeMap<FileId, Seen>,
    granule: u32,
}

/// What was seen of one file.
#[derive(Debug)]
struct Seen {
    key: FileKey,
    path: String,
    size: u64,
    /// By page: the number of the look that saw it first, from 1; 0 if none did.
    first: Vec<u16>,
}

impl Recording {
    /// Of process `pid`; nothing has been looked at yet.
    #[must_use]
    pub fn new(pid: i32) -> Self {
        Self { pid, looks: 0, files: BTreeMap::new(), granule: fault_around() }
    }

    /// Looks which pages the process has mapped now.
    ///
    /// # Errors
    /// The process has ended, or may not be looked at.
    pub fn look(&mut self) -> io::Result<()> {
        let maps = maps::mappings(self.pid).map_err(io::Error::other)?;
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))?;
        self.looks = self.looks.saturating_add(1);
        if self.granule < HUGE_PAGES && has_huge_pages(self.pid) {
            self.granule = HUGE_PAGES;
        }
        for mapping in maps.iter().filter(|m| m.file.inode != 0 && m.path.as_os_str().as_bytes().starts_with(b"/")) {
            if !self.files.contains_key(&mapping.file) {
                let Some(seen) = self.meet(mapping).filter(|_| self.files.len() < MAX_FILES) else { continue };
                self.files.insert(mapping.file, seen);
            }
            if let Some(seen) = self.files.get_mut(&mapping.file) {
                seen.look_at(mapping, &pagemap, self.looks)?;
            }
        }
        Ok(())
    }

    /// Opens the file of a mapping: that very file, or none.
    fn meet(&self, mapping: &Mapping) -> Option<Seen> {
        let (pid, range) = (self.pid, &mapping.range);
        let very = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end));
        let mut by_name = PathBuf::from(format!("/proc/{pid}/root"));
        by_name.push(mapping.path.strip_prefix("/").ok()?);
        let opened = files::open(&very).or_else(|_| {
            let (file, metadata) = files::open(&by_name)?;
            // Another file may have taken the name.
            let same = FileId::of(&metadata).inode == mapping.file.inode;
            if same { Ok((file, metadata)) } else { Err(io::Error::from(io::ErrorKind::NotFound)) }
        });
        let (file, metadata) = opened.ok()?;
        let pages = metadata.len().div_ceil(PAGE);
        (pages <= MAX_PAGES).then(|| Seen {
            key: files::key(&file, &metadata),
            path: mapping.path.to_string_lossy().into_owned(),
            size: metadata.len(),
            first: vec![0; pages as usize],
        })
    }

    /// What was recorded until `deadline` after the start, as a working set of one recording; `None` if the process never
    /// had `executable` mapped: then it was another program.
    #[must_use]
    pub fn finish(self, program: &str, executable: &FileKey, deadline: Duration) -> Option<WorkingSet> {
        let mut files: BTreeMap<FileKey, FileSet> = BTreeMap::new();
        for seen in self.files.into_values() {
            let mut runs = Runs::default();
            for (page, &look) in (0u32..).zip(&seen.first) {
                if look > 0 {
                    runs.push(page, ALWAYS, look - 1);
                }
            }
            if !runs.first.is_empty() {
                let Seen { key, path, size, .. } = seen;
                // Two names of one build: the first is as good as the second.
                files.entry(key.clone()).or_insert(FileSet { key, path, size, runs });
            }
        }
        files.contains_key(executable).then(|| WorkingSet {
            program: program.to_owned(),
            executable: executable.clone(),
            mode: String::new(),
            recordings: 1,
            recorder: Recorder::Pagemap,
            granule: self.granule,
            deadline_ns: u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX),
            updated_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            usefulness: Usefulness::default(),
            files: files.into_values().collect(),
        })
    }

    /// How many of these pages of a file the process has touched so far.
    #[must_use]
    pub fn touched(&self, key: &FileKey, pages: impl Iterator<Item = u32>) -> u64 {
        let Some(seen) = self.files.values().find(|s| s.key == *key) else { return 0 };
        pages.filter(|&page| seen.first.get(page as usize).is_some_and(|&look| look > 0)).count() as u64
    }
}

impl Seen {
    fn look_at(&mut self, mapping: &Mapping, pagemap: &File, look: u16) -> io::Result<()> {
        let first = (mapping.offset / PAGE) as usize;
        let count = ((mapping.range.end - mapping.range.start) / PAGE) as usize;
        let Some(marks) = self.first.get_mut(first..) else { return Ok(()) };
        // What is mapped beyond the file's end is no page of it.
        let count = count.min(marks.len());
        let mut bytes = vec![0; 8 * CHUNK.min(count)];
        for (i, marks) in marks[..count].chunks_mut(CHUNK).enumerate() {
            let at = (mapping.range.start / PAGE + (i * CHUNK) as u64) * 8;
            let bytes = &mut bytes[..8 * marks.len()];
            // The process may have unmapped it, or ended.
            pagemap.read_exact_at(bytes, at)?;
            for (mark, entry) in marks.iter_mut().zip(bytes.chunks_exact(8)) {
                let entry = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
                if *mark == 0 && entry & PRESENT_OR_SWAPPED != 0 {
                    *mark = look;
                }
            }
        }
        Ok(())
    }
}

/// Whether files of a process are mapped by whole huge pages, which then count as touched as a whole.
fn has_huge_pages(pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let kb =
        |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    ["FilePmdMapped:", "ShmemPmdMapped:"].into_iter().any(|name| kb(name) > Some(0))
}

/// How many neighbouring pages a fault may map (fault-around): what the kernel says, or its default of 64 KB.
fn fault_around() -> u32 {
    let said = fs::read_to_string("/sys/kernel/debug/fault_around_bytes").ok();
    let bytes: u64 = said.and_then(|text| text.trim().parse().ok()).unwrap_or(64 << 10);
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_see_ourselves() {
        let pid = std::process::id() as i32;
        let mut recording = Recording::new(pid);
        recording.look().unwrap();
        let (file, metadata) = files::open(std::path::Path::new("/proc/self/exe")).unwrap();
        let executable = files::key(&file, &metadata);
        let set = recording.finish("test", &executable, Duration::from_secs(1)).unwrap();
        set.validate().unwrap();
        let own = set.files.iter().find(|f| f.key == executable).unwrap();
        assert!(own.runs.pages() > 10 && own.runs.pages() < own.size.div_ceil(PAGE), "{}", own.runs.pages());
    }

    #[test]
    fn another_program_is_no_recording_of_this_one() {
        let mut recording = Recording::new(std::process::id() as i32);
        recording.look().unwrap();
        let other = FileKey::Build(dyni_schema::BuildId(vec![1; 20]));
        assert_eq!(recording.finish("other", &other, Duration::from_secs(1)), None);
    }
}
