//! Pages of text that somebody wrote to: private memory where the file's own page should be.
//!
//! A program that rewrites its own code, a debugger's breakpoint, another patcher: whoever writes to a text page leaves
//! it private for good, even if the bytes are as before. What lies there is not copied, as it may be written again. The
//! pages that dyni itself wrote to are told by the ledgers.

use crate::ledger::Entry;
use dyni_collector::maps::Mapping;
use dyni_schema::RunAddr;
use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
// Documentation/admin-guide/mm/pagemap.rst
const FILE_OR_SHARED: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

/// A set of pages, and of ranges that are writable now.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pages: BTreeSet<u64>,
}

impl Written {
    /// Whether any byte of `[at, at + len)` lies in such a page.
    pub fn touches(&self, at: RunAddr, len: u64) -> bool {
        self.pages.range(at.0 & !(PAGE - 1)..at.0 + len).next().is_some()
    }
}

/// The pages of these text ranges that were written to, or that are mapped writable.
pub(crate) fn pages(pid: i32, text: &[Range<RunAddr>], maps: &[Mapping], ledgers: &[Entry]) -> Written {
    let mut ours = BTreeSet::new();
    for entry in ledgers {
        ours.extend(entry.ledger.written_pages());
    }
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).ok();
    let mut written = Written::default();
    for range in text {
        for map in maps.iter().filter(|m| m.range.start < range.end.0 && range.start.0 < m.range.end) {
            let (start, end) = (map.range.start.max(range.start.0), map.range.end.min(range.end.0));
            if map.writable {
                written.pages.extend((start..end).step_by(PAGE as usize));
                continue;
            }
            // Text that was moved to anonymous memory as a whole (for huge pages) has no file page to differ from.
            if map.file.inode == 0 {
                continue;
            }
            let mut bits = vec![0; ((end - start) / PAGE * 8) as usize];
            let Some(Ok(())) = pagemap.as_ref().map(|f| f.read_exact_at(&mut bits, start / PAGE * 8)) else { continue };
            for (i, word) in bits.chunks_exact(8).enumerate() {
                let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                let page = start + i as u64 * PAGE;
                let private = word & SWAPPED != 0 || (word & PRESENT != 0 && word & FILE_OR_SHARED == 0);
                if private && !ours.contains(&page) {
                    written.pages.insert(page);
                }
            }
        }
    }
    written
}
