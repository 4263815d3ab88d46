//! Which pages of a process can hold a word that the process wrote.
//!
//! Of private mappings, whatever their protection is now: pages that are the process's own, in memory or swapped out. A
//! page that was never written to is the file's, or zero. Of shared mappings that may be written to: all pages, those that
//! are not in the process's page table through the file, as to read them from the process would put them there, and
//! allocate what was never allocated. What lies in shared mappings that the process may only read was written by others,
//! or by system calls, and is not its memory (see [`super`]).

use super::kept::Kept;
use dyni_collector::maps::Mapping;
use dyni_schema::RunAddr;
use nix::errno::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub(super) const PAGE: u64 = 4096;

/// A stretch of one mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Area {
    pub range: Range<u64>,
    pub shared: bool,
    /// Whether it is the main thread's stack.
    pub stack: bool,
    /// All of the mapping.
    map: Range<u64>,
    /// Where the mapping begins in its file, bytes.
    offset: u64,
}

/// What of the process's mappings is to be looked through, without what is dyni's own.
pub(super) fn areas(maps: &[Mapping], ours: &[Range<u64>]) -> Vec<Area> {
    let mut areas = Vec::new();
    for map in maps {
        let name = map.path.as_os_str().as_encoded_bytes();
        let kernels = [&b"[vdso]"[..], b"[vvar", b"[vsyscall]"].iter().any(|k| name.starts_with(k));
        if kernels || (map.shared && !map.writable) {
            continue;
        }
        let stack = map.path == Path::new("[stack]");
        let area = |range| Area { range, shared: map.shared, stack, map: map.range.clone(), offset: map.offset };
        // Neighbours with equal protection are one mapping to the kernel: some of it may be ours.
        areas.extend(without(&map.range, ours).into_iter().map(area));
    }
    areas
}

/// A range without others.
fn without(range: &Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut holes: Vec<&Range<u64>> = holes.iter().filter(|h| h.start < range.end && range.start < h.end).collect();
    holes.sort_by_key(|h| h.start);
    let (mut left, mut at) = (Vec::new(), range.start);
    for hole in holes {
        if at < hole.start {
            left.push(at..hole.start);
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

// include/uapi/linux/fs.h
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// The ranges must all be watched (`watch`), or it is an error.
const CHECK_WATCHED: u64 = 1 << 1;
/// What was written is watched from now on again.
const WATCH_AGAIN: u64 = 1 << 0;
const IS_WRITTEN: u64 = 1 << 1;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO: u64 = 1 << 5;
const IS_GUARD: u64 = 1 << 8;

/// `struct pm_scan_arg`
#[derive(Default)]
#[repr(C)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    answer: u64,
}

/// `struct page_region`
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

// Documentation/admin-guide/mm/pagemap.rst
const BIT_GUARD: u64 = 1 << 58;
const BIT_FILE: u64 = 1 << 61;
const BIT_SWAPPED: u64 = 1 << 62;
const BIT_PRESENT: u64 = 1 << 63;
/// How much address space is gone through page by page on a kernel that has nothing better (before Linux 6.7), bytes.
const MOST_BY_PAGE: u64 = 16 << 30;

/// What the kernel says of a process's pages.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    pid: i32,
}

impl Pagemap {
    pub fn open(pid: i32) -> Result<Self, Kept> {
        let file = File::open(format!("/proc/{pid}/pagemap")).map_err(|_| Kept::Unreadable(RunAddr(0)))?;
        Ok(Self { file, pid })
    }

    /// The pages of an area that are in the process's page table and may hold what it wrote, as rising runs.
    pub fn runs(&self, area: &Area) -> Result<Vec<Range<u64>>, Kept> {
        match self.scan(area, 0, 0) {
            Ok(runs) => Ok(runs),
            Err(_) => self.by_page(area),
        }
    }

    /// Those of an area's [`Self::runs`] that were written since they are watched (`watch`).
    ///
    /// # Errors
    /// Some of the area is not watched, the kernel is too old, the process is gone.
    pub fn written(&self, area: &Area) -> Result<Vec<Range<u64>>, Errno> {
        self.scan(area, CHECK_WATCHED, IS_WRITTEN)
    }

    /// The same, and from then on they count as not written until they are again.
    ///
    /// # Errors
    /// As [`Self::written`].
    pub fn written_till_now(&self, area: &Area) -> Result<Vec<Range<u64>>, Errno> {
        self.scan(area, CHECK_WATCHED | WATCH_AGAIN, IS_WRITTEN)
    }

    /// By the kernel's own walk, which skips what is not there (Linux 6.7).
    fn scan(&self, area: &Area, flags: u64, all_of: u64) -> Result<Vec<Range<u64>>, Errno> {
        match self.scan_with(area, IS_GUARD, flags, all_of) {
            // The category is younger than the call.
            Err(Errno::EINVAL) => self.scan_with(area, 0, flags, all_of),
            done => done,
        }
    }

    fn scan_with(&self, area: &Area, guard: u64, flags: u64, all_of: u64) -> Result<Vec<Range<u64>>, Errno> {
        let (mut runs, mut at) = (Vec::new(), area.range.start);
        let mut regions = vec![Region::default(); 512];
        let not = if area.shared { guard } else { IS_FILE | IS_ZERO | guard };
        while at < area.range.end {
            let mut arguments = ScanArguments {
                size: size_of::<ScanArguments>() as u64,
                flags,
                start: at,
                end: area.range.end,
                regions: regions.as_mut_ptr().expose_provenance() as u64,
                regions_len: regions.len() as u64,
                inverted: not,
                all_of: not | all_of,
                any_of: IS_PRESENT | IS_SWAPPED,
                answer: IS_PRESENT | IS_SWAPPED,
                ..ScanArguments::default()
            };
            // SAFETY: the kernel reads and writes one `pm_scan_arg`, which lives on this frame, and writes at most
            // `regions_len` regions to a live buffer of that length.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
            let count = Errno::result(count)? as usize;
            for region in &regions[..count.min(regions.len())] {
                push(&mut runs, region.start..region.end);
            }
            if arguments.walk_end <= at {
                break;
            }
            at = arguments.walk_end;
        }
        Ok(runs)
    }

    fn by_page(&self, area: &Area) -> Result<Vec<Range<u64>>, Kept> {
        if area.range.end - area.range.start > MOST_BY_PAGE {
            return Err(Kept::TooMuch);
        }
        let mut runs = Vec::new();
        for start in area.range.clone().step_by((1 << 14) * PAGE as usize) {
            let end = area.range.end.min(start + (1 << 14) * PAGE);
            let mut bits = vec![0; ((end - start) / PAGE * 8) as usize];
            let read = self.file.read_exact_at(&mut bits, start / PAGE * 8);
            read.map_err(|_| Kept::Unreadable(RunAddr(start)))?;
            for (i, word) in bits.chunks_exact(8).enumerate() {
                let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                let there = word & (BIT_PRESENT | BIT_SWAPPED) != 0 && word & BIT_GUARD == 0;
                if there && (area.shared || word & BIT_FILE == 0 || word & BIT_SWAPPED != 0) {
                    let page = start + i as u64 * PAGE;
                    push(&mut runs, page..page + PAGE);
                }
            }
        }
        Ok(runs)
    }

    /// Calls `look` with the address and the bytes of everything that a shared area holds outside of `runs`, the pages
    /// that are in the page table.
    pub fn rest_of_shared(
        &self,
        area: &Area,
        runs: &[Range<u64>],
        mut look: impl FnMut(u64, &[u8]) -> Result<(), Kept>,
    ) -> Result<(), Kept> {
        let absent = without(&area.range, runs);
        let Some(first) = absent.first() else { return Ok(()) };
        let unreadable = Kept::Unreadable(RunAddr(first.start));
        let path = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, area.map.start, area.map.end);
        let file = File::open(path).map_err(|_| unreadable)?;
        let mut bytes = vec![0; 1 << 16];
        for run in absent {
            let in_file = |at: u64| at - area.map.start + area.offset;
            let mut at = run.start;
            while at < run.end {
                // SAFETY: lseek takes three integers and touches no memory of ours.
                let data = unsafe { libc::lseek(file.as_raw_fd(), in_file(at) as i64, libc::SEEK_DATA) };
                match Errno::result(data) {
                    // Nothing from here to the end.
                    Err(Errno::ENXIO) => break,
                    Err(_) => return Err(unreadable),
                    Ok(data) => at += (data as u64).saturating_sub(in_file(at)),
                }
                if at >= run.end {
                    break;
                }
                let wanted = (run.end - at).min(bytes.len() as u64) as usize;
                match file.read_at(&mut bytes[..wanted], in_file(at)) {
                    Ok(0) => break,
                    Ok(n) => {
                        look(at, &bytes[..n])?;
                        at += n as u64;
                    }
                    Err(_) => return Err(unreadable),
                }
            }
        }
        Ok(())
    }
}

fn push(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_collector::maps;

    #[test]
    fn what_is_ours_is_left_out_even_of_the_middle() {
        let text = "1000-9000 rw-p 00000000 00:00 0 \nf000-10000 r-xp 00000000 00:00 0 [vdso]\n\
                    20000-21000 r--s 00000000 00:05 7 /shared\n30000-31000 rw-s 00001000 00:05 7 /shared\n";
        let found = areas(&maps::parse(text.as_bytes()), &[0x3000..0x4000, 0x8000..0xa000, 0x0..0x2000]);
        let ranges: Vec<_> = found.iter().map(|a| (a.range.clone(), a.shared)).collect();
        assert_eq!(ranges, [(0x2000..0x3000, false), (0x4000..0x8000, false), (0x30000..0x31000, true)]);
    }

    /// Both ways to ask say the same, and find what was written and nothing that was not.
    #[test]
    fn written_pages_are_found() {
        const PAGES: usize = 64;
        for (shared, kind) in [(false, libc::MAP_PRIVATE), (true, libc::MAP_SHARED)] {
            let len = PAGES * PAGE as usize;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new anonymous mapping, which nobody else knows.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, kind | libc::MAP_ANONYMOUS, -1, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            for page in [3, 4, 40] {
                // SAFETY: inside the mapping.
                unsafe { at.cast::<u8>().add(page * PAGE as usize + 9).write_volatile(1) };
            }
            let start = at.expose_provenance() as u64;
            let range = start..start + len as u64;
            let area = Area { range: range.clone(), shared, stack: false, map: range, offset: 0 };
            let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
            let by_page = pagemap.by_page(&area).unwrap();
            let page = |i: u64| start + i * PAGE;
            assert_eq!(by_page, [page(3)..page(5), page(40)..page(41)], "shared: {shared}");
            assert_eq!(pagemap.runs(&area).unwrap(), by_page);
            // SAFETY: the mapping of above, which nobody uses any more.
            unsafe { libc::munmap(at, len) };
        }
    }
}
