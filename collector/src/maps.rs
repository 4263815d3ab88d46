//! The modules of a process: which ELF files it has mapped, where, and which build each is.
//!
//! A module is named by its file (device and inode) and its load bias, so one file loaded twice is two modules. Its text
//! is where its program headers say, if something executable is mapped there: pages that were replaced by anonymous
//! memory (text on huge pages) still belong to it, and a library that is only read as data does not count.

use crate::elf::{self, ElfFacts};
pub use crate::target::FileId;
use crate::target::{TargetError, not_permitted};
use dyni_schema::{BuildId, LinkAddr, RunAddr};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The run addresses that it covers.
    pub range: Range<u64>,
    /// Whether it is readable.
    pub readable: bool,
    /// Whether it is writable.
    pub writable: bool,
    /// Whether it is executable.
    pub executable: bool,
    /// Whether writes to it reach others (`s`) or not (`p`).
    pub shared: bool,
    /// Where it begins in its file, bytes.
    pub offset: u64,
    /// Its file; the inode is 0 for anonymous memory.
    pub file: FileId,
    /// The path or the kernel's name in brackets; empty for anonymous memory.
    pub path: PathBuf,
}

/// The lines of a `/proc/PID/maps` text; a line of an unknown form is skipped. The kernel's own escape of a line feed in
/// a name (`\012`) is left as it is: the name is for people.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Mapping> {
    text.split(|&b| b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || {
        let end = rest.iter().position(|&b| b == b' ').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail.strip_prefix(b" ").unwrap_or(tail);
        std::str::from_utf8(word).ok()
    };
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = word()?.split_once('-')?;
    let range = hex(start)?..hex(end)?;
    let flags = word()?.as_bytes();
    let offset = hex(word()?)?;
    let (major, minor) = word()?.split_once(':')?;
    let dev = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = word()?.parse().ok()?;
    let path = rest.trim_ascii_start();
    let &[r, w, x, s] = flags else { return None };
    (range.start < range.end).then(|| Mapping {
        range,
        readable: r == b'r',
        writable: w == b'w',
        executable: x == b'x',
        shared: s == b's',
        offset,
        file: FileId { dev, inode },
        path: PathBuf::from(OsStr::from_bytes(path)),
    })
}

/// The mappings of a process, by rising address.
///
/// # Errors
/// `NoSuchProcess`, `NotPermitted`, or what reading gave.
pub fn mappings(pid: i32) -> Result<Vec<Mapping>, TargetError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    match fs::read(&path) {
        Ok(text) => Ok(parse(&text)),
        Err(e) => match e.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Err(TargetError::NoSuchProcess(pid)),
            Some(libc::EACCES | libc::EPERM) => {
                Err(not_permitted(pid, fs::metadata(format!("/proc/{pid}")).map_or(0, |m| m.uid())))
            }
            _ => Err(TargetError::Io { path, source: e }),
        },
    }
}

/// An ELF file as one process has loaded it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedModule {
    /// Which build.
    pub build_id: BuildId,
    /// The base name of its path.
    pub name: String,
    /// The path it was mapped from, as the process saw it, without ` (deleted)`; for people.
    pub path: PathBuf,
    /// True if that path no longer names this file.
    pub deleted: bool,
    /// A path that opens the very file, in this process, as long as the target has it mapped; `None` if the host lets
    /// nobody open it (then the identity was read from the target's memory).
    pub file: Option<PathBuf>,
    /// The file's device and inode, as the kernel's maps state them.
    pub file_id: FileId,
    /// The load bias, bytes, wrapping: `RunAddr = LinkAddr + bias`.
    pub bias: u64,
    /// Its executable segments in whole pages, run addresses, rising.
    pub text: Vec<Range<RunAddr>>,
    /// Everything that it was loaded to, from its first segment's first page to the last one's end, run addresses.
    pub span: Range<RunAddr>,
}

/// The modules of a process, by rising text address.
///
/// # Errors
/// `NoSuchProcess`, `NotPermitted`, or what reading /proc gave. A file that can't be understood is no error: it is not
/// among the modules.
pub fn modules(pid: i32) -> Result<Vec<MappedModule>, TargetError> {
    ModuleReader::default().read(pid)
}

/// Reads the modules of several processes and looks into each file once.
#[derive(Debug, Default)]
pub struct ModuleReader {
    /// What is known of each file; `None` for one that is no module. The change time guards against a file that was
    /// written over, or an inode number used again.
    known: HashMap<(FileId, i64, i64), Option<Arc<ElfFacts>>>,
}

impl ModuleReader {
    /// The modules of a process, by rising text address.
    ///
    /// # Errors
    /// As [`modules`].
    pub fn read(&mut self, pid: i32) -> Result<Vec<MappedModule>, TargetError> {
        let maps = mappings(pid)?;
        Ok(self.of(pid, &maps))
    }

    /// The modules among these mappings of a process.
    pub fn of(&mut self, pid: i32, maps: &[Mapping]) -> Vec<MappedModule> {
        let mut modules: Vec<MappedModule> = Vec::new();
        for mapping in (0..maps.len()).filter(|&i| may_hold_text(maps, i)).map(|i| &maps[i]) {
            if modules.iter().any(|m| m.file_id == mapping.file && m.text.iter().any(|t| holds(t, &mapping.range))) {
                continue;
            }
            let Some((file, facts)) = self.facts(pid, mapping, maps) else { continue };
            let Some(bias) = facts.bias(mapping.range.start, mapping.offset, mapping.executable) else { continue };
            if modules.iter().any(|m| m.file_id == mapping.file && m.bias == bias) {
                continue;
            }
            // Executable memory must really be there: most libraries that are mapped only to be read fail here.
            let text: Vec<_> = facts.text().map(|t| run_range(&t, bias)).collect();
            let mapped = |t: &Range<RunAddr>| maps.iter().any(|m| m.executable && overlaps(t, &m.range));
            if text.is_empty() || !text.iter().any(mapped) {
                continue;
            }
            let low = facts.segments.iter().map(|s| s.pages().start).min().unwrap_or(0);
            let high = facts.segments.iter().map(|s| s.pages().end).max().unwrap_or(0);
            let bytes = mapping.path.as_os_str().as_bytes();
            let bare = bytes.strip_suffix(b" (deleted)");
            let path = PathBuf::from(OsStr::from_bytes(bare.unwrap_or(bytes)));
            modules.push(MappedModule {
                build_id: facts.build_id.clone(),
                name: path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
                path,
                deleted: bare.is_some(),
                file,
                file_id: mapping.file,
                bias,
                text,
                span: run_range(&(low..high), bias),
            });
        }
        modules.sort_by_key(|m| m.text[0].start);
        modules
    }

    /// The file of a mapping: a path that opens it, and what it holds.
    fn facts(&mut self, pid: i32, mapping: &Mapping, maps: &[Mapping]) -> Option<(Option<PathBuf>, Arc<ElfFacts>)> {
        let Some((path, file)) = open(pid, mapping, maps) else {
            let facts = elf::facts_by_note(&|o, b: &mut [u8]| read_memory(pid, mapping.file, maps, o, b)).ok()?;
            return Some((None, Arc::new(facts)));
        };
        let metadata = file.metadata().ok()?;
        let key = (mapping.file, metadata.ctime(), metadata.ctime_nsec());
        let facts = self.known.entry(key).or_insert_with(|| elf::facts(&file).ok().map(Arc::new));
        Some((Some(path), facts.clone()?))
    }
}

fn run_range(link: &Range<u64>, bias: u64) -> Range<RunAddr> {
    LinkAddr(link.start).run(bias)..LinkAddr(link.end).run(bias)
}

fn holds(text: &Range<RunAddr>, range: &Range<u64>) -> bool {
    text.start.0 <= range.start && range.end <= text.end.0
}

fn overlaps(text: &Range<RunAddr>, range: &Range<u64>) -> bool {
    text.start.0 < range.end && range.start < text.end.0
}

/// A file mapping that can be the first sign of a module: it is executable, or executable memory follows it directly
/// that is not a file's own (text that was moved to huge pages).
fn may_hold_text(maps: &[Mapping], i: usize) -> bool {
    let this = &maps[i];
    if this.file.inode == 0 || this.path.as_os_str().as_bytes().first() != Some(&b'/') {
        return false;
    }
    this.executable
        || maps
            .get(i + 1)
            .is_some_and(|next| next.executable && next.range.start == this.range.end && next.file != this.file)
}

/// Opens the very file of a mapping. `map_files` does it for any file, the deleted ones too, but only for the
/// privileged; the path as the target sees it does it for everyone, if it still names the same file.
fn open(pid: i32, mapping: &Mapping, maps: &[Mapping]) -> Option<(PathBuf, File)> {
    let range = &mapping.range;
    let mut seen = PathBuf::from(format!("/proc/{pid}/root"));
    seen.push(mapping.path.strip_prefix("/").ok()?);
    let by_range = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end));
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    if let Ok(file) = File::open(&by_range) {
        return Some((by_range, file));
    }
    for path in [seen, exe] {
        // Opening a FIFO or a device that took the file's name could block or act: look before.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if !metadata.is_file() || metadata.ino() != mapping.file.inode {
            continue;
        }
        let Ok(file) = File::open(&path) else { continue };
        let Ok(metadata) = file.metadata() else { continue };
        if metadata.ino() != mapping.file.inode {
            continue;
        }
        // File systems with volumes of their own (btrfs, overlayfs) show another device in maps than in stat; there the
        // build-id in the target's memory is the proof.
        let same = FileId::of(&metadata) == mapping.file || {
            let live = elf::facts_by_note(&|o, b: &mut [u8]| read_memory(pid, mapping.file, maps, o, b));
            let disk = elf::facts(&file);
            matches!((live, disk), (Ok(l), Ok(d)) if l.build_id == d.build_id)
        };
        if same {
            return Some((path, file));
        }
    }
    None
}

/// Reads the bytes at an offset of a mapped file from the memory of the process that has it mapped.
fn read_memory(pid: i32, id: FileId, maps: &[Mapping], offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let shows = |m: &&Mapping| {
        m.file == id && !m.writable && (m.offset..m.offset + (m.range.end - m.range.start)).contains(&offset)
    };
    let Some(m) = maps.iter().find(shows) else { return Ok(0) };
    let into = offset - m.offset;
    let len = bytes.len().min((m.range.end - m.range.start - into) as usize);
    File::open(format!("/proc/{pid}/mem"))?.read_at(&mut bytes[..len], m.range.start + into)
}

/// From run addresses to modules and link addresses, by binary search.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressMap {
    /// Disjoint, by rising start.
    ranges: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    start: u64,
    end: u64,
    bias: u64,
    module: usize,
}

impl AddressMap {
    /// The map of these modules' text; the answers are indices into `modules`.
    #[must_use]
    pub fn new(modules: &[MappedModule]) -> Self {
        let mut map = Self::default();
        for (index, module) in modules.iter().enumerate() {
            for text in &module.text {
                map.insert(text.clone(), module.bias, index);
            }
        }
        map
    }

    /// Adds a text range of a module; what it covers of earlier ranges is cut from them, as `mmap` does.
    pub fn insert(&mut self, range: Range<RunAddr>, bias: u64, module: usize) {
        let (start, end) = (range.start.0, range.end.0);
        if start >= end {
            return;
        }
        self.remove(range);
        let at = self.ranges.partition_point(|e| e.start < start);
        self.ranges.insert(at, Entry { start, end, bias, module });
    }

    /// Forgets what lies in this range.
    pub fn remove(&mut self, range: Range<RunAddr>) {
        let (start, end) = (range.start.0, range.end.0);
        let mut kept = Vec::with_capacity(self.ranges.len() + 1);
        for e in self.ranges.drain(..) {
            if e.end <= start || end <= e.start {
                kept.push(e);
                continue;
            }
            if e.start < start {
                kept.push(Entry { end: start, ..e.clone() });
            }
            if end < e.end {
                kept.push(Entry { start: end, ..e });
            }
        }
        self.ranges = kept;
    }

    /// The module that has this address in its text, and the module's own address for it.
    #[must_use]
    pub fn lookup(&self, addr: RunAddr) -> Option<(usize, LinkAddr)> {
        let at = self.ranges.partition_point(|e| e.start <= addr.0).checked_sub(1)?;
        let e = &self.ranges[at];
        (addr.0 < e.end).then(|| (e.module, addr.link(e.bias)))
    }

    /// The text ranges that it knows, rising, each with its module.
    pub fn ranges(&self) -> impl Iterator<Item = (Range<RunAddr>, usize)> + '_ {
        self.ranges.iter().map(|e| (RunAddr(e.start)..RunAddr(e.end), e.module))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind() {
        let maps = parse(
            b"55d8a0000000-55d8a0001000 r-xp 00002000 fe:01 1234   /usr/bin/a b (deleted)\n\
              7f0000000000-7f0000001000 rw-s 00000000 00:00 0 \n\
              garbage\n\
              7fff00000000-7fff00001000 r-xp 00000000 00:00 0   [vdso]\n",
        );
        assert_eq!(maps.len(), 3);
        assert_eq!(maps[0].path, PathBuf::from("/usr/bin/a b (deleted)"));
        assert_eq!(maps[0].file, FileId { dev: (0xfe, 1), inode: 1234 });
        assert!(maps[0].executable && !maps[0].writable && maps[0].offset == 0x2000);
        assert!(maps[1].shared && maps[1].path.as_os_str().is_empty());
        assert!(!may_hold_text(&maps, 2));
    }

    #[test]
    fn later_ranges_cut_earlier_ones() {
        let mut map = AddressMap::default();
        map.insert(RunAddr(0x1000)..RunAddr(0x9000), 0x1000, 0);
        map.insert(RunAddr(0x3000)..RunAddr(0x4000), 0, 1);
        map.remove(RunAddr(0x8000)..RunAddr(0xa000));
        assert_eq!(map.lookup(RunAddr(0xfff)), None);
        assert_eq!(map.lookup(RunAddr(0x1000)), Some((0, LinkAddr(0))));
        assert_eq!(map.lookup(RunAddr(0x3fff)), Some((1, LinkAddr(0x3fff))));
        assert_eq!(map.lookup(RunAddr(0x4000)), Some((0, LinkAddr(0x3000))));
        assert_eq!(map.lookup(RunAddr(0x8000)), None);
        assert_eq!(map.ranges().count(), 3);
    }

    #[test]
    fn we_find_our_own_modules() {
        let pid = std::process::id() as i32;
        let modules = modules(pid).unwrap();
        let map = AddressMap::new(&modules);
        let here = RunAddr(we_find_our_own_modules as fn() as usize as u64);
        let (index, link) = map.lookup(here).expect("our own code is in a module");
        let exe = fs::read_link("/proc/self/exe").unwrap();
        assert_eq!(modules[index].path, exe);
        assert!(link.0 < fs::metadata(&exe).unwrap().len() * 2, "{link}");
        let libc = RunAddr(libc::getpid as *const () as usize as u64);
        let (index, _) = map.lookup(libc).expect("libc is a module");
        assert!(modules[index].name.starts_with("libc"), "{}", modules[index].name);
        assert_eq!(modules[index].build_id.0.len(), 20);
        // What opens the file opens the same file.
        let file = File::open(modules[index].file.as_ref().unwrap()).unwrap();
        assert_eq!(elf::facts(&file).unwrap().build_id, modules[index].build_id);
    }

    #[test]
    fn the_note_in_memory_is_the_one_in_the_file() {
        let pid = std::process::id() as i32;
        let maps = mappings(pid).unwrap();
        let modules = ModuleReader::default().of(pid, &maps);
        let libc = modules.iter().find(|m| m.name.starts_with("libc.so")).unwrap();
        let read = |o: u64, b: &mut [u8]| read_memory(pid, libc.file_id, &maps, o, b);
        let facts = elf::facts_by_note(&read).unwrap();
        assert_eq!(facts.build_id, libc.build_id);
    }
}
