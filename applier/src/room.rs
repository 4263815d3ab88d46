//! Room for one trampoline: the unused tail of the last page of an executable segment.
//!
//! The kernel maps whole pages, so the page that holds the end of a segment also holds some bytes after it, which no
//! program runs, and which a linker that separates code (`-z separate-code`) fills with nothing. Any module's will do.

use crate::patch;
use crate::remote::{Memory, RemoteError, Stopped, trampoline};
use crate::start;
use dyni_collector::maps::{Mapping, mappings};
use dyni_schema::RunAddr;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const PAGE: u64 = 4096;
/// From one place for a trampoline to the next, in bytes.
const STEP: u64 = (trampoline::LEN as u64).next_multiple_of(16);

/// Where a trampoline may be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// The first of [`trampoline::LEN`] bytes.
    pub at: RunAddr,
}

impl Room {
    /// The page that is written to, for a while (it becomes private memory of the process and stays so).
    pub fn page(self) -> RunAddr {
        RunAddr(self.at.0 & !(PAGE - 1))
    }
}

/// Finds room in some module of the process. A trampoline or gate that is there is passed over: a thread may
/// still come to it.
///
/// # Errors
/// [`RemoteError::NoRoom`] if all segments happen to end flush with a page; [`RemoteError::Died`] if nothing is left of it.
pub(crate) fn find(pid: i32, memory: &Memory) -> Result<Room, RemoteError> {
    match rooms(pid, memory).into_iter().find(|(_, left, ..)| !left) {
        Some((room, ..)) => Ok(room),
        // A process that ends loses its memory first and is listed, as a zombie at last, for some time yet.
        None if memory.is_gone() => Err(RemoteError::Died(pid)),
        None => Err(RemoteError::NoRoom(pid)),
    }
}

/// All the room there is, the best first: whether a trampoline lies there, and of which file and offset the bytes are.
fn rooms(pid: i32, memory: &Memory) -> Vec<(Room, bool, PathBuf, u64)> {
    let mut rooms = Vec::new();
    let Ok(mut maps) = mappings(pid) else { return rooms };
    // The page becomes private to the process: better one of the loader's, which nobody wants to optimise.
    maps.sort_by_key(|m| !m.path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"ld-")));
    // A module's ELF header is at the start of the mapping of its file at offset 0.
    let mut headers = Vec::new();
    for map in maps.iter().filter(|m| m.file.inode != 0) {
        if map.offset == 0 && !headers.iter().any(|&(_, file)| file == map.file) {
            headers.push((map.range.start, map.file));
        }
        if !map.executable || map.writable || map.shared {
            continue;
        }
        let Some(&(header, _)) = headers.iter().find(|&&(_, file)| file == map.file) else { continue };
        let Some(end) = executable_end(memory, header, &map.range) else { continue };
        let page_end = end.next_multiple_of(PAGE).min(map.range.end);
        let first = page_end.checked_sub(trampoline::LEN as u64).map_or(0, |at| at & !15);
        let count = first.checked_sub(end + 16).map_or(0, |room| room / STEP + 1);
        for at in (0..count).map(|i| first - i * STEP) {
            let Ok(bytes) = memory.read_vec(RunAddr(at), trampoline::LEN) else { break };
            let offset = map.offset + (at - map.range.start);
            let file = format!("/proc/{pid}/map_files/{:x}-{:x}", map.range.start, map.range.end);
            rooms.push((Room { at: RunAddr(at) }, is_ours(&bytes), file.into(), offset));
        }
    }
    rooms
}

/// Whether a dyni has left these bytes: a trampoline, or the gate of a program that starts.
fn is_ours(bytes: &[u8]) -> bool {
    trampoline::is_one(bytes) || start::is_gate(bytes)
}

/// Puts back what a trampoline that a killed dyni left has overwritten, unless a thread is in it or may yet come back to
/// it from a signal handler. All threads are stopped.
pub(crate) fn clean(stopped: &Stopped, memory: &Memory, maps: &[Mapping]) -> Result<(), RemoteError> {
    for (room, left, file, offset) in rooms(stopped.pid, memory) {
        let Some(file) = left.then(|| File::open(file).ok()).flatten() else { continue };
        let range = room.at..room.at.plus(trampoline::LEN as u64);
        // Each place stands for the four addresses behind it.
        let places: Vec<RunAddr> =
            (0..trampoline::LEN as u64 / 4 + 1).map(|i| room.at.plus(4 * i).offset(-1)).collect();
        let in_use = stopped.threads.iter().any(|t| range.contains(&t.rip()))
            || !patch::pointed_into(stopped, memory, maps, &places).is_empty();
        if !in_use {
            // What lies behind the end of the file is zero.
            let mut original = [0; trampoline::LEN];
            let mut done = 0;
            while let Ok(n @ 1..) = file.read_at(&mut original[done..], offset + done as u64) {
                done += n;
            }
            memory.write(room.at, &original)?;
        }
    }
    Ok(())
}

/// Whether there is anything for [`clean`] to do.
pub(crate) fn has_leftovers(pid: i32, memory: &Memory) -> bool {
    rooms(pid, memory).iter().any(|(_, left, ..)| *left)
}

/// The run address after the last byte of the executable segment that is mapped at `map`, from the module's program
/// headers in memory (ELF-64 object file format, figures 3 and 6).
fn executable_end(memory: &Memory, header: u64, map: &Range<u64>) -> Option<u64> {
    let elf = memory.read_vec(RunAddr(header), 64).ok()?;
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let u16_at = |bytes: &[u8], at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let u64_at = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let (offset, size, count) = (u64_at(&elf, 32), u16_at(&elf, 54), u16_at(&elf, 56));
    if size != 56 || count > 128 {
        return None;
    }
    let table = memory.read_vec(RunAddr(header.checked_add(offset)?), (size * count) as usize).ok()?;
    let loads = || table.chunks_exact(56).filter(|p| p[..4] == 1u32.to_le_bytes());
    let first = loads().next()?;
    let bias = header.wrapping_sub(u64_at(first, 16).wrapping_sub(u64_at(first, 8)));
    let ends = loads().filter(|p| p[4] & 1 != 0).map(|p| bias.wrapping_add(u64_at(p, 16)).wrapping_add(u64_at(p, 32)));
    // The end inside this mapping; one at its very end leaves no tail.
    ends.into_iter().find(|&end| map.start < end && end < map.end)
}
