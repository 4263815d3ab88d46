//! Text on huge pages: the original code of a module, moved as it is to anonymous memory of the same content at the same
//! addresses, which the kernel can back with huge pages where it can't do that for files.
//!
//! Nothing changes but the pages behind the addresses, so no thread has to be moved and none has to stand still: each
//! step is one system call, which the kernel makes whole before any page fault of the process can see the address space
//! again (`mmap_lock`, Documentation/mm/process_addrs.rst). In this order, so that dyni may die after any of them:
//!
//! 1. the record of what is about to be done ([`Record`]) is in the process;
//! 2. a range of twice the size is mapped somewhere; the file's bytes are written to its first half, which becomes huge
//!    pages;
//! 3. `mremap` with `MREMAP_DONTUNMAP` moves the pages of the text to the second half, with their mapping of the file, and
//!    leaves at the text's place an empty mapping of the same file, into which the kernel faults the same bytes again.
//!    So the file stays mapped whatever becomes of its name, and nobody has to open it to put it back;
//! 4. `mremap` moves the copy over the text.
//!
//! To undo is to move the mapping of the file back, by one `mremap`.
//!
//! Only whole 2 MB inside the text are moved. They cost memory: what was shared with every process that runs the file, and
//! could be dropped and read again, is then this process's own (its children share it).
//!
//! What is lost meanwhile: uprobes in moved text do not fire, and perf takes it for memory without a file (it finds its
//! names in the perf map). Debuggers see no difference. A page of the text that somebody has written to (a breakpoint, a
//! uprobe, a patch) is refused with its 2 MB; so huge text comes first and patches after it.

mod memory;
mod record;
mod regions;

pub use record::HugeTextStatus;
pub(crate) use record::{Moved, status};

use crate::error::ApplyError;
use crate::lock::Lock;
use crate::place::{AddressSpace, HUGE};
use crate::remote::{Caller, Memory, RemoteError, in_own_thread};
use crate::{failpoint, huge, ledger, room, written};
use dyni_collector::maps::{self, Mapping};
use dyni_schema::{Plan, RunAddr};
use record::{Record, find};
use regions::Region;
use std::fs::File;
use std::os::unix::fs::FileExt;

const READ_EXECUTE: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const NO_FILE: u64 = u64::MAX;

/// What was moved in one process.
#[derive(Debug, Clone)]
pub struct HugeTextApplied {
    /// The process.
    pub pid: i32,
    /// What lies in huge pages now, by module.
    pub modules: Vec<HugeTextStatus>,
    /// Private memory of the process before and after, bytes.
    pub private_bytes: [u64; 2],
    /// Why ranges of 2 MB were left alone: the reason, and how many.
    pub refused: Vec<(String, u32)>,
}

/// Moves text of process `pid` to huge pages: what holds functions of the plan, or all of it where there is no plan. What
/// lies there already stays.
///
/// # Errors
/// The process is gone, not ours, or at work under another dyni. What can't be moved is no error but refused.
pub fn apply_huge_text(pid: i32, plan: Option<&Plan>) -> Result<HugeTextApplied, ApplyError> {
    in_own_thread(|| apply_here(pid, plan)).map_err(|e| e.or_death(pid))
}

fn apply_here(pid: i32, plan: Option<&Plan>) -> Result<HugeTextApplied, ApplyError> {
    let _lock = Lock::take(pid)?.ok_or(ApplyError::Locked(pid))?;
    let memory = Memory::open(pid)?;
    let before = private_bytes(pid);
    let maps = maps::mappings(pid)?;
    let modules = maps::ModuleReader::default().of(pid, &maps);
    let mut refused: Vec<(String, u32)> = Vec::new();
    for (module, region) in regions::of(&modules, plan) {
        match move_region(pid, module, &region, &memory) {
            Ok(()) => {}
            Err(MoveError::Refused(why)) => {
                let count = (region.size() / HUGE) as u32;
                match refused.iter_mut().find(|(known, _)| known == why) {
                    Some((_, n)) => *n += count,
                    None => refused.push((why.to_owned(), count)),
                }
            }
            Err(MoveError::Apply(e)) => return Err(e),
        }
    }
    let modules = status(&in_force(&maps::mappings(pid)?, &memory));
    Ok(HugeTextApplied { pid, modules, private_bytes: [before, private_bytes(pid)], refused })
}

/// What of a process's text lies on huge pages now.
pub(crate) fn in_force(maps: &[Mapping], memory: &Memory) -> Vec<Moved> {
    let mut all = find(maps, memory);
    all.retain(|moved| moved.state(maps).text_is_copy);
    all
}

/// Why a region was not moved.
enum MoveError {
    /// It stays as it was, for this reason.
    Refused(&'static str),
    /// The process can't be worked on.
    Apply(ApplyError),
}

impl<E: Into<ApplyError>> From<E> for MoveError {
    fn from(e: E) -> Self {
        Self::Apply(e.into())
    }
}

fn move_region(pid: i32, module: &maps::MappedModule, region: &Region, memory: &Memory) -> Result<(), MoveError> {
    let maps = maps::mappings(pid)?;
    let (start, size) = (region.start, region.size());
    let Some(text) = holding(&maps, start, size).filter(|m| m.executable && !m.writable) else {
        return Err(MoveError::Refused("its mapping has a border inside"));
    };
    if text.file.inode == 0 {
        return Ok(()); // Moved already.
    }
    if text.file != module.file_id || text.shared {
        return Err(MoveError::Refused("its mapping is not a private one of the module's file"));
    }
    let bytes = file_bytes(module, text, region).ok_or(MoveError::Refused("its file can't be read"))?;
    let (entries, _) = ledger::find(pid, &maps, memory);
    let live = |memory: &Memory| {
        let mut live = vec![0; bytes.len()];
        memory.read_some(start, &mut live) == live.len() && live == bytes
    };
    if !live(memory) {
        return Err(MoveError::Refused(
            "its bytes are not the file's: a plan is in force, or somebody else patches it",
        ));
    }
    if written::pages(pid, &[start..start.plus(size)], &maps, &entries).touches(start, size) {
        return Err(MoveError::Refused("somebody has written to it"));
    }
    if !memory::has_room(pid, size) {
        return Err(MoveError::Refused("there is too little memory left for it"));
    }
    let room = room::find(pid, memory)?;
    if (start.0..start.0 + size).contains(&room.at.0) {
        return Err(MoveError::Refused("dyni needs a page of it for itself"));
    }
    let holes = AddressSpace::of(&maps).holes(&(module.span.start.0..module.span.end.0), 2 * size, 0, 1);
    let Some(&copy) = holes.first() else {
        return Err(MoveError::Refused("the address space has no room for it"));
    };

    let record = Record {
        build_id: module.build_id.clone(),
        module: module.name.clone(),
        bias: module.bias,
        start: start.0,
        size,
        copy: copy.0,
        device: text.file.dev,
        inode: text.file.inode,
        offset: text.offset + (start.0 - text.range.start),
    };
    let caller = Caller::new(pid, memory, room.at);
    let mut moved = record::write(record, memory, &caller, pid)?;
    let taken = make_copy(pid, memory, &caller, &mut moved, &bytes).and_then(|()| {
        park(memory, &caller, &moved, &bytes, pid)?;
        move_over(&caller, moved.record.copy(), start, size)?;
        failpoint::pass("text:moved", pid);
        Ok(())
    });
    match taken {
        Ok(()) => {
            moved.write_step(memory, record::MOVED)?;
            // A move may leave a huge page in pieces, where a page table of the old mapping was still there.
            let huge_bytes = huge::collapse(pid, &caller, start, size)?;
            moved.write_huge_bytes(memory, huge_bytes)?;
            failpoint::pass("text:done", pid);
            Ok(())
        }
        // As if we had never come: what was half done is what an undo finds.
        Err(e) => match put_back(pid, memory, &caller, &moved) {
            Err(worse @ ApplyError::Remote(RemoteError::Died(_))) => Err(worse.into()),
            _ => Err(e),
        },
    }
}

/// Maps the range of twice the size, writes the file's bytes into its first half and makes huge pages of it.
fn make_copy(pid: i32, memory: &Memory, caller: &Caller<'_>, moved: &mut Moved, bytes: &[u8]) -> Result<(), MoveError> {
    let (copy, size) = (moved.record.copy(), moved.record.size);
    let fixed = PRIVATE | libc::MAP_FIXED_NOREPLACE as u64;
    match caller.call("mmap", libc::SYS_mmap, [copy.0, 2 * size, READ_EXECUTE, fixed, NO_FILE, 0]) {
        Err(RemoteError::Call { errno: nix::errno::Errno::EEXIST, .. }) => {
            return Err(MoveError::Refused("the process maps too much in this moment"));
        }
        done => done?,
    };
    moved.write_step(memory, record::MAPPED)?;
    failpoint::pass("text:copy-mapped", pid);
    memory.write(copy, bytes)?;
    failpoint::pass("text:copy-written", pid);
    if huge::collapse(pid, caller, copy, size)? == 0 {
        return Err(MoveError::Refused("the kernel gives no huge pages"));
    }
    Ok(())
}

/// Moves the text's mapping of the file aside; an empty one of the same file stays in its place.
fn park(memory: &Memory, caller: &Caller<'_>, moved: &Moved, bytes: &[u8], pid: i32) -> Result<(), MoveError> {
    let Record { start, size, .. } = moved.record;
    let parked = moved.record.parked();
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) as u64;
    match caller.call("mremap", libc::SYS_mremap, [start, size, size, flags, parked.0, 0]) {
        Err(RemoteError::Call { errno: nix::errno::Errno::EINVAL, .. }) => {
            return Err(MoveError::Refused("the kernel can't move the mapping of a file (Linux 5.13 can)"));
        }
        done => done?,
    };
    failpoint::pass("text:parked", pid);
    // What somebody wrote to it since we looked went with the pages, so it can't be lost unseen.
    let mut parked_bytes = vec![0; bytes.len()];
    memory.read(parked, &mut parked_bytes)?;
    if parked_bytes != bytes {
        return Err(MoveError::Refused("somebody has written to it"));
    }
    // Pages that were private hold what the file has: they would only take memory. It may be locked; then they stay.
    let _ = caller.call("madvise", libc::SYS_madvise, [parked.0, size, libc::MADV_DONTNEED as u64, 0, 0, 0]);
    // One text of the module is enough, for the process's security as for those who look for modules.
    caller.call("mprotect", libc::SYS_mprotect, [parked.0, size, libc::PROT_READ as u64, 0, 0, 0])?;
    failpoint::pass("text:parked-read-only", pid);
    Ok(())
}

/// Puts the file's own mapping back, as far as it is away, and unmaps what was needed for it, the record last; how many
/// bytes of text were a copy.
///
/// # Errors
/// [`ApplyError::Module`] if the text is not what was put there: somebody patches it.
pub(crate) fn put_back(pid: i32, memory: &Memory, caller: &Caller<'_>, moved: &Moved) -> Result<u64, ApplyError> {
    let record = &moved.record;
    let (start, size) = (RunAddr(record.start), record.size);
    let now = moved.state(&maps::mappings(pid)?);
    let parked = record.parked();
    let changed = now.parked_is_file && !same_bytes(memory, start, parked, size);
    if now.text_is_copy && changed {
        let why = "its text on huge pages was changed by somebody: it stays there".to_owned();
        return Err(ApplyError::Module { module: record.module.clone(), why });
    }
    // Whoever wrote to the text in the moment in which it was moved aside gets it back, written.
    if now.parked_is_file && (now.text_is_copy || changed) {
        caller.call("mprotect", libc::SYS_mprotect, [parked.0, size, READ_EXECUTE, 0, 0, 0])?;
        failpoint::pass("text:parked-executable", pid);
        move_over(caller, parked, start, size)?;
    } else if !now.text_is_copy && (now.parked_is_file || now.parked_is_reserved) {
        caller.call("munmap", libc::SYS_munmap, [parked.0, size, 0, 0, 0, 0])?;
    }
    if now.copy_is_ours {
        caller.call("munmap", libc::SYS_munmap, [record.copy, size, 0, 0, 0, 0])?;
    }
    failpoint::pass("text:put-back", pid);
    moved.unmap(memory, caller);
    Ok(if now.text_is_copy { size } else { 0 })
}

/// Moves a mapping over what lies at another place.
fn move_over(caller: &Caller<'_>, from: RunAddr, to: RunAddr, size: u64) -> Result<(), RemoteError> {
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    caller.call("mremap", libc::SYS_mremap, [from.0, size, size, flags, to.0, 0]).map(drop)
}

/// Puts back all moved text of the process; how many bytes, and a line for each region that has to stay.
pub(crate) fn undo(pid: i32, memory: &Memory) -> Result<(u64, Vec<String>), ApplyError> {
    let all = find(&maps::mappings(pid)?, memory);
    let (mut bytes, mut left) = (0, Vec::new());
    if all.is_empty() {
        return Ok((0, left));
    }
    let room = room::find(pid, memory)?;
    let caller = Caller::new(pid, memory, room.at);
    for moved in &all {
        match put_back(pid, memory, &caller, moved) {
            Ok(size) => bytes += size,
            Err(e @ ApplyError::Module { .. }) => left.push(e.to_string()),
            Err(e) => return Err(e),
        }
    }
    Ok((bytes, left))
}

/// The mapping that holds this range, if it is one.
fn holding(maps: &[Mapping], start: RunAddr, size: u64) -> Option<&Mapping> {
    maps.iter().find(|m| m.range.start <= start.0 && start.0 + size <= m.range.end)
}

/// The bytes of the file for a region of its text.
fn file_bytes(module: &maps::MappedModule, text: &Mapping, region: &Region) -> Option<Vec<u8>> {
    let file = File::open(module.file.as_ref()?).ok()?;
    let mut bytes = vec![0; region.size() as usize];
    file.read_exact_at(&mut bytes, text.offset + (region.start.0 - text.range.start)).ok()?;
    Some(bytes)
}

fn same_bytes(memory: &Memory, a: RunAddr, b: RunAddr, size: u64) -> bool {
    const AT_ONCE: usize = 1 << 20;
    let (mut left, mut right) = (vec![0; AT_ONCE], vec![0; AT_ONCE]);
    (0..size).step_by(AT_ONCE).all(|done| {
        let len = AT_ONCE.min((size - done) as usize);
        let read = |at: RunAddr, into: &mut [u8]| memory.read(at.plus(done), into).is_ok();
        read(a, &mut left[..len]) && read(b, &mut right[..len]) && left[..len] == right[..len]
    })
}

/// The anonymous memory of a process, bytes (`RssAnon`, Documentation/filesystems/proc.rst); 0 if it is not told.
fn private_bytes(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) << 10
}
