//! Installing prepared generations in one process: mapping, writing, and the short stop in which patches are made.
//!
//! The order is what makes it safe to die at any step (invariant 2):
//!
//! 1. the ledger, which names the cache and every patch, is in the target before there is anything to tell of;
//! 2. the cache is mapped, written and put on huge pages while the program runs; nothing leads into it yet;
//! 3. all threads stop; each thread that stands in a copied block is moved to the same instruction in the copy;
//! 4. patches are written, each by one copy in the kernel, each valid without the others; the threads go on.
//!
//! Everything slow is in 1 and 2. In the stop there is no mapping, no allocation in the target and no system call of it.

use crate::enter::{Choice, Edits, Site, escapes};
use crate::error::ApplyError;
use crate::generation::Generation;
use crate::ledger::{self, Entry, Journal, Ledger, Release};
use crate::lock::Lock;
use crate::patch;
use crate::place::AddressSpace;
use crate::remote::function::CallError;
use crate::remote::{Caller, Memory, RemoteError, Stopped, in_own_thread};
use crate::unwind::register::{self, RegisterError};
use crate::unwind::unwinder::Unwinders;
use crate::{failpoint, huge, room, written};
use dyni_collector::maps::{self, MappedModule, Mapping};
use dyni_schema::{LinkAddr, RunAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long it is tried to stop a process that has threads in uninterruptible waits.
pub(crate) const STOP_PATIENCE: Duration = Duration::from_secs(5);
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What was installed of one module.
#[derive(Debug, Clone)]
pub struct AppliedModule {
    /// The module's base name.
    pub name: String,
    /// Its build-id, in hexadecimal.
    pub build_id: String,
    /// How many functions have a copy.
    pub functions: usize,
    /// How many places lead into the copies.
    pub patches: usize,
    /// The size of the code, bytes.
    pub code_size: u64,
    /// The size of its hot part, bytes.
    pub hot_size: u64,
    /// How many bytes of the cache lie in huge pages.
    pub huge_bytes: u64,
    /// Why functions and patches were left out: the reason, and how many.
    pub refused: Vec<(String, u32)>,
}

/// What was done to one process.
#[derive(Debug, Clone)]
pub struct Applied {
    /// The process.
    pub pid: i32,
    /// Its modules that have a generation now.
    pub modules: Vec<AppliedModule>,
    /// How long all its threads were stopped.
    pub stop: Duration,
    /// How many threads it had.
    pub threads: usize,
    /// How many of them were moved into a copy on the spot.
    pub moved: usize,
}

/// Installs generations in process `pid`, all of them in one stop.
///
/// # Errors
/// [`ApplyError::Changed`] if the process is not as the generations were prepared for (its text differs, or the place
/// for a cache is taken): prepare them for this process and try again. Otherwise why it can't be done.
pub(crate) fn install(
    pid: i32,
    generations: &[Generation],
    choice: &Choice,
    unwinders: &mut Unwinders,
) -> Result<Applied, ApplyError> {
    in_own_thread(|| install_here(pid, generations, choice, unwinders))
}

fn install_here(
    pid: i32,
    generations: &[Generation],
    choice: &Choice,
    unwinders: &mut Unwinders,
) -> Result<Applied, ApplyError> {
    let _lock = Lock::take(pid)?.ok_or(ApplyError::Locked(pid))?;
    failpoint::pass("apply:locked", pid);
    let memory = Memory::open(pid)?;
    let maps = maps::mappings(pid)?;
    let modules = maps::ModuleReader::default().of(pid, &maps);
    let (entries, _) = ledger::find(pid, &maps, &memory);
    let old_escapes = escapes(&entries);
    let room = room::find(pid, &memory)?;
    let caller = Caller::new(pid, &memory, room.at);

    let mut sites = Vec::new();
    for generation in generations {
        let Some(module) = modules.iter().find(|m| m.build_id == generation.build_id) else { continue };
        if !text_is_original(pid, generation, module, &memory, &maps, &entries, &[]) {
            return Err(ApplyError::Changed(pid));
        }
        let wanted = generation.ledger(module, room.page());
        let mut entry = match entries.iter().find(|e| is_same(e, &wanted, &memory)) {
            Some(entry) => entry.clone(),
            None => map_in(wanted, generation, &maps, &memory, &caller, pid)?,
        };
        tell_unwinder(pid, &modules, &memory, &mut entry, unwinders)?;
        failpoint::pass("apply:unwinder-told", pid);
        sites.push(Site { generation, bias: module.bias, entry });
    }

    let mut edits = Edits::of(&sites, choice, &old_escapes);
    // From here on the ledger stays: it tells which pages are private because of us.
    for site in &mut sites {
        let entered = Journal { entered: 1, ..site.entry.journal };
        site.entry.write_journal(&memory, entered)?;
    }
    patch::touch(&memory, &edits.all)?;
    failpoint::pass("apply:pages-touched", pid);

    let mut stopped = Stopped::all(pid, STOP_PATIENCE)?;
    failpoint::pass("apply:stopped", pid);
    for site in &sites {
        if !stopped.still_has(site.entry.at, &ledger::MAGIC)? {
            return Err(ApplyError::Changed(pid));
        }
    }
    let moved = edits.enter(&mut stopped, &sites, &memory, &maps)?;
    let threads = stopped.threads.len();
    let stop = stopped.resume();
    failpoint::pass("apply:resumed", pid);

    let mut applied = Applied { pid, modules: Vec::new(), stop, threads, moved };
    for (index, site) in sites.iter_mut().enumerate() {
        let patches = edits.in_force[index];
        let journal = Journal {
            applied: patches as u64,
            stop_ns: stop.as_nanos() as u64,
            threads: threads as u64,
            applied_at_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            ..site.entry.journal
        };
        site.entry.write_journal(&memory, journal)?;
        let mut refused = site.entry.ledger.refused.clone();
        if edits.dropped[index] > 0 {
            let reason = "a thread or an older copy was about to return into the patched bytes";
            refused.push((reason.to_owned(), edits.dropped[index]));
        }
        applied.modules.push(AppliedModule {
            name: site.generation.name.clone(),
            build_id: site.generation.build_id.hex(),
            functions: site.entry.ledger.functions.len(),
            patches,
            code_size: site.entry.ledger.code_size,
            hot_size: site.entry.ledger.hot_size,
            huge_bytes: site.entry.journal.huge_bytes,
            refused,
        });
    }
    failpoint::pass("apply:done", pid);
    Ok(applied)
}

/// Whether this process has, for every function of the generation, the very bytes that the copies were made from, in
/// pages that nobody else has ever written to. The patches of the generations in `patched` do not count.
pub(crate) fn text_is_original(
    pid: i32,
    generation: &Generation,
    module: &MappedModule,
    memory: &Memory,
    maps: &[Mapping],
    entries: &[Entry],
    patched: &[&Entry],
) -> bool {
    let written = written::pages(pid, &module.text, maps, entries);
    let same = |(start, bytes): (LinkAddr, &[u8])| {
        let at = start.run(module.bias);
        let mut live = vec![0; bytes.len()];
        let n = memory.read_some(at, &mut live);
        patched.iter().for_each(|entry| entry.without_patches(start, &mut live));
        n == bytes.len() && live == bytes && !written.touches(at, bytes.len() as u64)
    };
    generation.originals.iter().all(same) && generation.originals.what_leads_on_is_in(memory, module.bias)
}

/// Whether this generation of the process is the one wanted, whole, so that only its patches have to be written again.
pub(crate) fn is_same(entry: &Entry, wanted: &Ledger, memory: &Memory) -> bool {
    let has = &entry.ledger;
    let same = (has.plan, &has.build_id, has.bias, has.code_hash, has.code_size, &has.patches)
        == (wanted.plan, &wanted.build_id, wanted.bias, wanted.code_hash, wanted.code_size, &wanted.patches);
    let code = || memory.read_vec(RunAddr(has.cache), has.code_size as usize).ok();
    same && entry.release == Release::No
        && code().is_some_and(|mut code| {
            wanted.shortcuts.relocate(&mut code, has.bias.wrapping_neg());
            *blake3::hash(&code).as_bytes() == wanted.code_hash
        })
}

/// Tells the process's unwinder of the copies of a generation that has unwind data.
fn tell_unwinder(
    pid: i32,
    modules: &[MappedModule],
    memory: &Memory,
    entry: &mut Entry,
    unwinders: &mut Unwinders,
) -> Result<(), ApplyError> {
    let Some(place) = entry.unwind_place() else { return Ok(()) };
    if register::is_registered(memory, &place)? {
        return Ok(());
    }
    let failed = |e: RegisterError| match e {
        RegisterError::Remote(e) => e.into(),
        e => ApplyError::UnwinderNotTold { pid, why: e.to_string() },
    };
    let unwinder = unwinders.find(pid, modules).map_err(|e| failed(RegisterError::NoUnwinder(e)))?;
    // What the unwinder knows of must never be unmapped.
    let before = entry.journal;
    entry.write_journal(memory, Journal { entered: 1, ..before })?;
    let told = register::register(pid, memory, &unwinder, &place);
    if told.is_err()
        && register::is_registered(memory, &place).is_ok_and(|known| !known)
        && !matches!(told, Err(RegisterError::Call(CallError::Lost(_))))
    {
        entry.write_journal(memory, before)?;
    }
    told.map_err(failed)
}

/// Maps and writes a generation: the ledger, then the cache. Nothing leads into it yet.
fn map_in(
    mut wanted: Ledger,
    generation: &Generation,
    maps: &[Mapping],
    memory: &Memory,
    caller: &Caller<'_>,
    pid: i32,
) -> Result<Entry, ApplyError> {
    let cache = RunAddr(wanted.cache);
    if !AddressSpace::of(maps).is_free(&(cache.0..cache.0 + wanted.cache_size + wanted.counters_size())) {
        return Err(ApplyError::Changed(pid));
    }
    let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let read = libc::PROT_READ as u64;
    let no_file = u64::MAX;
    if wanted.unwind != 0 {
        let writable = read | libc::PROT_WRITE as u64;
        wanted.unwind_data =
            caller.call("mmap", libc::SYS_mmap, [0, register::data_len(), writable, private, no_file, 0])?;
    }
    let bytes = ledger::seal(&wanted)?;
    let size = (bytes.len() as u64).next_multiple_of(4096);
    let at = RunAddr(caller.call("mmap", libc::SYS_mmap, [0, size, read, private, no_file, 0])?);
    failpoint::pass("apply:ledger-mapped", pid);
    memory.write(at, &bytes[..bytes.len() / 2])?;
    failpoint::pass("apply:ledger-half-written", pid);
    memory.write(at, &bytes)?;
    ledger::publish(memory, at)?;
    failpoint::pass("apply:ledger-written", pid);
    let mut entry = Entry { at, size, ledger: wanted, journal: Journal::default(), release: Release::No, kept_by: 0 };
    let cache_size = entry.ledger.cache_size;
    // Kernels without CONFIG_ANON_VMA_NAME refuse it.
    let _ = caller.call("prctl", libc::SYS_prctl, [PR_SET_VMA, 0, at.0, size, entry.name().0, 0]);

    let fixed = private | libc::MAP_FIXED_NOREPLACE as u64;
    let executable = read | libc::PROT_EXEC as u64;
    let mapped = caller.call("mmap", libc::SYS_mmap, [cache.0, cache_size, executable, fixed, no_file, 0]);
    if let Err(e) = mapped {
        unmap_ledger(memory, caller, &entry);
        return match e {
            // Somebody mapped something there since the maps were read.
            RemoteError::Call { errno: nix::errno::Errno::EEXIST, .. } => Err(ApplyError::Changed(pid)),
            e => Err(e.into()),
        };
    }
    failpoint::pass("apply:cache-mapped", pid);
    if entry.ledger.counters != 0 {
        // Shared, so that a child that is forked meanwhile counts with its parent.
        let shared = (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let writable = read | libc::PROT_WRITE as u64;
        let (at, size) = (entry.ledger.counters, entry.ledger.counters_size());
        caller.call("mmap", libc::SYS_mmap, [at, size, writable, shared, no_file, 0])?;
    }
    let mut code = generation.emission.code.clone();
    generation.emission.shortcuts.relocate(&mut code, entry.ledger.bias);
    memory.write(cache, &code[..code.len() / 2])?;
    failpoint::pass("apply:code-half-written", pid);
    memory.write(cache, &code)?;
    failpoint::pass("apply:code-written", pid);
    let huge_bytes = huge::collapse(pid, caller, cache, cache_size)?;
    failpoint::pass("apply:huge-page-made", pid);
    entry.write_journal(memory, Journal { huge_bytes, ..Journal::default() })?;
    Ok(entry)
}

pub(crate) fn unmap_ledger(memory: &Memory, caller: &Caller<'_>, entry: &Entry) {
    // If this fails too, an empty read-only mapping stays; it means nothing.
    let _ = ledger::revoke(memory, entry.at);
    let _ = caller.call("munmap", libc::SYS_munmap, [entry.at.0, entry.size, 0, 0, 0, 0]);
    if entry.ledger.unwind_data != 0 {
        let data = [entry.ledger.unwind_data, register::data_len(), 0, 0, 0, 0];
        let _ = caller.call("munmap", libc::SYS_munmap, data);
    }
}
