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

use crate::check::{Originals, pairs};
use crate::error::ApplyError;
use crate::generation::Generation;
use crate::ledger::{self, Entry, Journal, Ledger, PATCH};
use crate::lock::Lock;
use crate::patch::{self, Edit};
use crate::place::AddressSpace;
use crate::remote::function::CallError;
use crate::remote::{Caller, Memory, RemoteError, Stopped, in_own_thread};
use crate::unwind::register::{self, RegisterError};
use crate::unwind::unwinder;
use crate::{failpoint, huge, room, written};
use dyni_collector::maps::{self, MappedModule, Mapping};
use dyni_schema::{BuildId, LinkAddr, RunAddr};
use std::collections::{BTreeMap, BTreeSet};
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

/// Which of a generation's patches are to be put in force.
#[derive(Debug, Clone)]
pub enum Choice {
    /// All.
    All,
    /// Those at the entries of functions.
    Entries,
    /// All of the functions that hold any of these places, by module; none of the others.
    FunctionsWith(BTreeMap<BuildId, BTreeSet<LinkAddr>>),
}

impl Choice {
    /// Whether each patch of a ledger is chosen.
    fn of(&self, ledger: &Ledger) -> Vec<bool> {
        let function = |at: u64| ledger.functions.partition_point(|&f| f <= at).checked_sub(1);
        let chosen = |&at: &u64| match self {
            Self::All => true,
            Self::Entries => ledger.functions.binary_search(&at).is_ok(),
            Self::FunctionsWith(places) => function(at).is_some_and(|f| {
                let range =
                    LinkAddr(ledger.functions[f])..LinkAddr(ledger.functions[f] + u64::from(ledger.function_sizes[f]));
                places.get(&ledger.build_id).is_some_and(|places| places.range(range).next().is_some())
            }),
        };
        ledger.patches.iter().map(chosen).collect()
    }
}

/// A generation in the process at hand.
struct Site<'a> {
    generation: &'a Generation,
    bias: u64,
    entry: Entry,
}

/// Installs generations in process `pid`, all of them in one stop.
///
/// # Errors
/// [`ApplyError::Changed`] if the process is not as the generations were prepared for (its text differs, or the place
/// for a cache is taken): prepare them for this process and try again. Otherwise why it can't be done.
pub(crate) fn install(pid: i32, generations: &[Generation], choice: &Choice) -> Result<Applied, ApplyError> {
    in_own_thread(|| install_here(pid, generations, choice))
}

fn install_here(pid: i32, generations: &[Generation], choice: &Choice) -> Result<Applied, ApplyError> {
    let _lock = Lock::take(pid)?.ok_or(ApplyError::Locked(pid))?;
    failpoint::pass("apply:locked", pid);
    let memory = Memory::open(pid)?;
    let maps = maps::mappings(pid)?;
    let modules = maps::ModuleReader::default().of(pid, &maps);
    let (entries, _) = ledger::find(pid, &maps, &memory);
    let old_escapes: BTreeSet<RunAddr> = entries.iter().flat_map(escapes).collect();
    let room = room::find(pid, &memory)?;
    let caller = Caller::new(pid, &memory, room.at);

    let mut sites = Vec::new();
    for generation in generations {
        let Some(module) = modules.iter().find(|m| m.build_id == generation.build_id) else { continue };
        if !text_is_original(pid, generation, module, &memory, &maps, &entries)? {
            return Err(ApplyError::Changed(pid));
        }
        let wanted = generation.ledger(module, room.page());
        let mut entry = match entries.iter().find(|e| is_same(e, &wanted, &memory)) {
            Some(entry) => entry.clone(),
            None => map_in(wanted, generation, &maps, &memory, &caller, pid)?,
        };
        tell_unwinder(pid, &modules, &memory, &mut entry)?;
        failpoint::pass("apply:unwinder-told", pid);
        sites.push(Site { generation, bias: module.bias, entry });
    }

    let mut edits: Vec<(usize, Edit)> = Vec::new();
    let mut dropped = vec![0u32; sites.len()];
    for (index, site) in sites.iter().enumerate() {
        let chosen = choice.of(&site.entry.ledger);
        for (at, from, to) in site.entry.ledger.patches().zip(&chosen).filter(|c| *c.1).map(|c| c.0) {
            // Copies of an earlier generation may still run, and escape to the middle of this patch.
            if old_escapes.range(at.plus(1)..at.plus(PATCH as u64)).next().is_some() {
                dropped[index] += 1;
            } else {
                edits.push((index, Edit { at, from, to }));
            }
        }
    }
    edits.sort_by_key(|(_, edit)| edit.at);
    // From here on the ledger stays: it tells which pages are private because of us.
    for site in &mut sites {
        let entered = Journal { entered: 1, ..site.entry.journal };
        site.entry.write_journal(&memory, entered)?;
    }
    patch::touch(&memory, &edits.iter().map(|(_, edit)| *edit).collect::<Vec<_>>())?;
    failpoint::pass("apply:pages-touched", pid);

    let mut stopped = Stopped::all(pid, STOP_PATIENCE)?;
    failpoint::pass("apply:stopped", pid);
    for site in &sites {
        if !stopped.still_has(site.entry.at, &ledger::MAGIC)? {
            return Err(ApplyError::Changed(pid));
        }
    }
    let places: Vec<RunAddr> = edits.iter().map(|(_, edit)| edit.at).collect();
    let mut unsafe_now = patch::pointed_into(&stopped, &memory, &maps, &places);
    let moved = move_in(&mut stopped, &sites, &memory, &places, &mut unsafe_now)?;
    failpoint::pass("apply:threads-moved", pid);
    for (index, _) in edits.extract_if(.., |(_, edit)| unsafe_now.contains(&edit.at)) {
        dropped[index] += 1;
    }
    let flat: Vec<Edit> = edits.iter().map(|(_, edit)| *edit).collect();
    let written = patch::write(&stopped, &memory, &flat, "apply:half-patched")?;
    failpoint::pass("apply:patched", pid);
    let threads = stopped.threads.len();
    let stop = stopped.resume();
    failpoint::pass("apply:resumed", pid);

    let mut applied = Applied { pid, modules: Vec::new(), stop, threads, moved };
    for (index, site) in sites.iter_mut().enumerate() {
        let patches = edits.iter().zip(&written).filter(|((i, _), done)| *i == index && **done).count();
        let journal = Journal {
            applied: patches as u64,
            stop_ns: stop.as_nanos() as u64,
            threads: threads as u64,
            applied_at_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            ..site.entry.journal
        };
        site.entry.write_journal(&memory, journal)?;
        let mut refused = site.entry.ledger.refused.clone();
        if dropped[index] > 0 {
            refused.push((
                "a thread or an older copy was about to return into the patched bytes".to_owned(),
                dropped[index],
            ));
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

/// The run addresses to which the copies of a generation in the process may jump.
fn escapes(entry: &Entry) -> impl Iterator<Item = RunAddr> + '_ {
    entry.ledger.escapes.iter().map(|&at| LinkAddr(at).run(entry.ledger.bias))
}

/// Whether this process has, for every function of the generation, the very bytes that the copies were made from, in
/// pages that nobody else has ever written to.
fn text_is_original(
    pid: i32,
    generation: &Generation,
    module: &MappedModule,
    memory: &Memory,
    maps: &[Mapping],
    entries: &[Entry],
) -> Result<bool, ApplyError> {
    let written = written::pages(pid, &module.text, maps, entries);
    let same = |(start, bytes): (LinkAddr, &[u8])| {
        let at = start.run(module.bias);
        let mut live = vec![0; bytes.len()];
        memory.read_some(at, &mut live) == bytes.len() && live == bytes && !written.touches(at, bytes.len() as u64)
    };
    Ok(generation.originals.iter().all(same))
}

/// Whether this generation of the process is the one wanted, whole, so that only its patches have to be written again.
fn is_same(entry: &Entry, wanted: &Ledger, memory: &Memory) -> bool {
    let has = &entry.ledger;
    let same = (has.plan, &has.build_id, has.bias, has.code_hash, has.code_size, &has.patches)
        == (wanted.plan, &wanted.build_id, wanted.bias, wanted.code_hash, wanted.code_size, &wanted.patches);
    let code = || memory.read_vec(RunAddr(has.cache), has.code_size as usize).ok();
    same && code().is_some_and(|code| *blake3::hash(&code).as_bytes() == wanted.code_hash)
}

/// Tells the process's unwinder of the copies of a generation that has unwind data.
fn tell_unwinder(pid: i32, modules: &[MappedModule], memory: &Memory, entry: &mut Entry) -> Result<(), ApplyError> {
    let Some(place) = entry.unwind_place() else { return Ok(()) };
    if register::is_registered(memory, &place)? {
        return Ok(());
    }
    let failed = |e: RegisterError| match e {
        RegisterError::Remote(e) => e.into(),
        e => ApplyError::UnwinderNotTold { pid, why: e.to_string() },
    };
    let unwinder = unwinder::find(pid, modules).map_err(|e| failed(RegisterError::NoUnwinder(e)))?;
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
    let mut entry = Entry { at, size, ledger: wanted, journal: Journal::default() };
    let cache_size = entry.ledger.cache_size;
    let name = |name: RunAddr, at: RunAddr, size: u64| {
        // For people who read /proc/PID/maps; kernels without CONFIG_ANON_VMA_NAME refuse it.
        let _ = caller.call("prctl", libc::SYS_prctl, [PR_SET_VMA, 0, at.0, size, name.0, 0]);
    };
    name(entry.name_of_ledger(), at, size);

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
    let code = &generation.emission.code;
    memory.write(cache, &code[..code.len() / 2])?;
    failpoint::pass("apply:code-half-written", pid);
    memory.write(cache, code)?;
    failpoint::pass("apply:code-written", pid);
    name(entry.name_of_cache(), cache, cache_size);
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

/// Moves each thread that stands in a copied block to the same place in the copy; how many. A thread that stands inside
/// bytes to be patched and can't be moved makes that patch unsafe.
fn move_in(
    stopped: &mut Stopped,
    sites: &[Site<'_>],
    memory: &Memory,
    places: &[RunAddr],
    unsafe_now: &mut BTreeSet<RunAddr>,
) -> Result<usize, RemoteError> {
    let mut moved = 0;
    for thread in &mut stopped.threads {
        let rip = thread.rip();
        // After a system call that may be restarted, RIP goes back over the instruction; patches leave those alone.
        let copy = (!thread.in_syscall()).then(|| sites.iter().find_map(|s| s.copy_of(rip, memory))).flatten();
        if let Some(copy) = copy {
            thread.set_rip(copy)?;
            moved += 1;
        } else if let Some(&place) = places.get(places.partition_point(|p| *p < rip).wrapping_sub(1))
            && rip.distance(place) < PATCH as i64
        {
            unsafe_now.insert(place);
        }
    }
    Ok(moved)
}

impl Site<'_> {
    /// The place in the copy that means the same as `rip`, if `rip` is in a copied block and the block is there: the
    /// module may have been unloaded since, and another one mapped at its place.
    fn copy_of(&self, rip: RunAddr, memory: &Memory) -> Option<RunAddr> {
        let at = rip.link(self.bias);
        let blocks = &self.generation.emission.blocks;
        let block = &blocks[blocks.partition_point(|b| b.original <= at).checked_sub(1)?];
        if at >= block.original.plus(u64::from(block.size)) {
            return None;
        }
        let original = self.generation.originals.bytes(block.original, block.size as usize)?;
        if memory.read_vec(block.original.run(self.bias), original.len()).ok()? != original {
            return None;
        }
        let cache = self.generation.cache;
        let emission = &self.generation.emission;
        let (code, counters) = (&emission.code, &emission.counters);
        let pairs = pairs(code, cache, blocks, block, counters, &self.generation.originals).ok()?;
        let pair = pairs.iter().find(|p| p.original == at)?;
        Some(cache.plus(pair.copy.0).run(self.bias))
    }
}

/// The bytes of the functions that were copied, by start.
#[derive(Debug, Default)]
pub(crate) struct FunctionBytes(Vec<(LinkAddr, Vec<u8>)>);

impl FunctionBytes {
    /// Takes them in any order.
    pub fn new(mut functions: Vec<(LinkAddr, Vec<u8>)>) -> Self {
        functions.sort_unstable_by_key(|(start, _)| *start);
        Self(functions)
    }

    /// Each function's start and bytes, rising.
    pub fn iter(&self) -> impl Iterator<Item = (LinkAddr, &[u8])> {
        self.0.iter().map(|(start, bytes)| (*start, bytes.as_slice()))
    }
}

impl Originals for FunctionBytes {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        let i = self.0.partition_point(|(start, _)| *start <= at).checked_sub(1)?;
        let (start, bytes) = &self.0[i];
        let from = at.distance(*start) as usize;
        bytes.get(from..from.checked_add(len)?)
    }
}
