//! Patches: which places of a stopped process may be overwritten now, and the writing.

use crate::failpoint;
use crate::ledger::PATCH;
use crate::remote::{Memory, RemoteError, Stopped};
use dyni_collector::maps::Mapping;
use dyni_schema::RunAddr;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

const PAGE: u64 = 4096;
/// How much of a stack is looked at, from the stack pointer up, in bytes. Deeper than any default thread stack.
const STACK_LIMIT: u64 = 64 << 20;
/// The same where the stack lies inside a larger mapping (a coroutine on the heap).
const HEAP_STACK_LIMIT: u64 = 1 << 20;
/// Places that are further apart, in bytes, are looked for apart.
const FAR: u64 = 64 << 20;
/// Bytes below the stack pointer that belong to the running function (System V ABI, 3.2.2).
const RED_ZONE: u64 = 128;

/// Five bytes to be replaced by five others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edit {
    pub at: RunAddr,
    pub from: [u8; PATCH],
    pub to: [u8; PATCH],
}

/// Makes the pages of these edits private to the process now, so that it does not happen while its threads stand still.
/// A byte is replaced by itself; threads that run see nothing.
pub(crate) fn touch(memory: &Memory, edits: &[Edit]) -> Result<(), RemoteError> {
    let pages: BTreeSet<u64> = edits.iter().map(|e| e.at.0 & !(PAGE - 1)).collect();
    for page in pages {
        let mut byte = [0];
        memory.read(RunAddr(page), &mut byte)?;
        memory.write(RunAddr(page), &byte)?;
    }
    Ok(())
}

/// Writes the edits whose place holds what they expect, a page at a time; for each whether it was written. All threads
/// are stopped. Edits are sorted by address and none crosses a page, so each is written by one copy in the kernel: a
/// dyni that dies here leaves every edit whole, done or not done.
pub(crate) fn write(
    stopped: &Stopped,
    memory: &Memory,
    edits: &[Edit],
    half: &'static str,
) -> Result<Vec<bool>, RemoteError> {
    let mut done = Vec::with_capacity(edits.len());
    let mut pages = edits.chunk_by(|a, b| a.at.0 / PAGE == b.at.0 / PAGE).peekable();
    while let Some(page) = pages.next() {
        if done.len() * 2 >= edits.len() || pages.peek().is_none() {
            failpoint::pass(half, stopped.pid);
        }
        let start = page[0].at;
        let len = page[page.len() - 1].at.distance(start) as usize + PATCH;
        let mut bytes = vec![0; len];
        // A module that was unmapped since is no error: it has no code any more that could go anywhere.
        if memory.read_some(start, &mut bytes) < len {
            done.extend(page.iter().map(|_| false));
            continue;
        }
        let mut changed = false;
        for edit in page {
            let offset = edit.at.distance(start) as usize;
            let place = &mut bytes[offset..offset + PATCH];
            let ours = *place == edit.from;
            if ours {
                place.copy_from_slice(&edit.to);
            }
            changed |= ours;
            done.push(ours);
        }
        if changed {
            memory.write(start, &bytes)?;
        }
    }
    Ok(done)
}

/// Which of these sorted places of [`PATCH`] bytes have a word of some thread's stack, a signal frame's saved RIP among
/// them, pointing inside them (not at their start): those must not be patched now.
pub(crate) fn pointed_into(
    stopped: &Stopped,
    memory: &Memory,
    maps: &[Mapping],
    places: &[RunAddr],
) -> BTreeSet<RunAddr> {
    let mut found = BTreeSet::new();
    // Modules lie far apart, and much of what is on a stack lies between them.
    let modules: Vec<Range<u64>> = places
        .chunk_by(|a, b| b.0 - a.0 < FAR)
        .map(|of_one| of_one[0].0 + 1..of_one[of_one.len() - 1].0 + PATCH as u64)
        .collect();
    let mut seen = BTreeSet::new();
    for thread in &stopped.threads {
        for region in stacks(thread.rsp(), thread.thread_area(), maps) {
            if !seen.insert((region.start, region.end)) {
                continue;
            }
            let mut bytes = vec![0; (region.end - region.start) as usize];
            let n = memory.read_some(RunAddr(region.start), &mut bytes);
            for word in bytes[..n].chunks_exact(8) {
                let value = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                if !modules.iter().any(|m| m.contains(&value)) {
                    continue;
                }
                let before = places.partition_point(|p| p.0 < value);
                let place = places[before - 1];
                if value < place.0 + PATCH as u64 {
                    found.insert(place);
                }
            }
        }
    }
    found
}

/// The stretches of memory to look at for one thread: from its stack pointer up; and, where that is not in the thread's
/// usual stack (an alternate signal stack, a coroutine), the usual one as well, whole.
fn stacks(rsp: RunAddr, thread_area: RunAddr, maps: &[Mapping]) -> Vec<Range<u64>> {
    let holding = |at: u64| maps.iter().find(|m| m.range.contains(&at));
    let is_main = |m: &Mapping| m.path == Path::new("[stack]");
    let start = rsp.0.saturating_sub(RED_ZONE) & !7;
    let mut regions = Vec::new();
    // The main stack may have grown since the maps were read.
    let current = holding(rsp.0).or_else(|| maps.iter().find(|m| is_main(m) && m.range.start > rsp.0));
    let Some(current) = current else { return regions };
    let whole = is_main(current) || current.range.end - current.range.start <= STACK_LIMIT;
    let limit = if whole { STACK_LIMIT } else { HEAP_STACK_LIMIT };
    let above = start..current.range.end.min(start + limit);
    // glibc and musl keep a thread's control block at the top of its stack; the main thread's lies elsewhere. Mappings
    // that touch each other are one to the kernel, so a heap may follow the stack, and hold another one.
    let top = thread_area.0;
    match holding(top) {
        _ if is_main(current) => return vec![above],
        Some(m) if m.range == current.range && m.writable && rsp.0 < top => {
            regions.push(start..top.min(start + STACK_LIMIT));
            return regions;
        }
        Some(m) if m.writable && m.file.inode == 0 && !is_main(m) => {
            regions.push(above);
            // How far down it is in use is not known here.
            regions.push(m.range.start.max(top.saturating_sub(STACK_LIMIT))..top);
        }
        _ => regions.push(above),
    }
    let main = maps.iter().filter(|m| is_main(m) && m.range != current.range);
    regions.extend(main.map(|m| m.range.clone()));
    regions
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_collector::maps;

    fn regions(rsp: u64, thread_area: u64, text: &str) -> Vec<Range<u64>> {
        stacks(RunAddr(rsp), RunAddr(thread_area), &maps::parse(text.as_bytes()))
    }

    const MAIN: &str = "7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]\n";

    #[test]
    fn the_main_stack_is_looked_at_from_its_pointer() {
        let found = regions(0x7ffc_0002_0100, 0x1000, MAIN);
        assert_eq!((found.len(), &found[0]), (1, &(0x7ffc_0002_0080..0x7ffc_0002_1000)));
    }

    #[test]
    fn a_thread_s_stack_ends_at_its_control_block_whatever_follows() {
        let merged = format!("7f0000000000-7f0003000000 rw-p 00000000 00:00 0 \n{MAIN}");
        let found = regions(0x7f00_0000_f080, 0x7f00_0001_0000, &merged);
        assert_eq!((found.len(), &found[0]), (1, &(0x7f00_0000_f000..0x7f00_0001_0000)));
    }

    #[test]
    fn a_handler_s_stack_does_not_hide_the_thread_s_own() {
        // The alternate stack lies above the thread's in the same mapping, or in another one.
        let merged = format!("7f0000000000-7f0000300000 rw-p 00000000 00:00 0 \n{MAIN}");
        // A main thread has its control block in some mapping, and no stack there.
        assert_eq!(regions(0x7ffc_0002_0100, 0x7f00_0001_0000, &merged).len(), 1);
        let apart = format!(
            "7e0000000000-7e0000300000 rw-p 00000000 00:00 0 \n7f0000000000-7f0000300000 rw-p 00000000 00:00 0 \n{MAIN}"
        );
        for (text, rsp, top) in
            [(merged, 0x7f00_0020_0080, 0x7f00_0001_0000u64), (apart, 0x7f00_0020_0080, 0x7e00_0001_0000)]
        {
            let found = regions(rsp, top, &text);
            assert!(found.contains(&(0x7f00_0020_0000..0x7f00_0030_0000)), "{found:x?}");
            assert!(found.contains(&(top & !0xfff_ffff..top)), "{found:x?}");
        }
    }
}
