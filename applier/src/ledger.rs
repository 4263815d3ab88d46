//! The ledger: what was done to a process, kept in that process, so that a later dyni can tell and undo it.
//!
//! One ledger describes one generation: one module's code cache and the patches that lead into it. It lies in a
//! read-only private mapping of its own: a [`Journal`] of a few numbers, then the sealed [`Ledger`], which never changes
//! once written. **What is in force is not written anywhere: the text says it.** A patch is in force if the bytes at its
//! place are its own; so a dyni that died between two patches leaves nothing untrue behind.
//!
//! A ledger is found by looking for its first bytes in the private, read-only, anonymous mappings of the process. It is
//! as untrusted as any file: the process could have written it (invariant 9).

use crate::lower::{COUNTER, CopiedBlock, CounterMap};
use crate::remote::{Memory, RemoteError};
use crate::shortcuts::Shortcuts;
use crate::unwind::register::{self, Place};
use dyni_collector::maps::Mapping;
use dyni_schema::envelope::{self, Kind, OpenError, Record, SealError, decode_only_version, encode};
use dyni_schema::{BuildId, CacheAddr, Invalid, LinkAddr, RunAddr};
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// The length in bytes of a patch: `jmp rel32`.
pub const PATCH: usize = 5;
/// The first bytes of a ledger's mapping, written last.
pub(crate) const MAGIC: [u8; 8] = *b"\x7fdyniLDG";
/// Where the sealed ledger starts, in bytes from the mapping's start.
const SEALED_AT: u64 = 128;
/// Where in it the name of the mapping is, for people who read `/proc/PID/maps`. The cache has none: of a named mapping
/// perf does not know that it is anonymous, and looks for no names in it.
const NAME_AT: u64 = 96;
const NAME: &[u8] = b"dyni ledger\0";
/// Where two more numbers are, behind the name: how far its release has come ([`Release`]), and why it was kept when it
/// was last tried ([`Entry::kept_by`]).
const RELEASE_AT: u64 = 112;
const KEPT_AT: u64 = 120;
const PAGE: u64 = 4096;
/// The most places that are remembered where caches have been.
const MAX_VACATED: usize = 256;
/// The most counters of a generation.
const MAX_COUNTERS: u64 = 1 << 22;

/// What was done to one module in one process. Addresses are link addresses unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Ledger {
    /// The id of the plan (BLAKE3 of its sealed bytes).
    pub plan: [u8; 32],
    /// The program's name in the plan.
    pub program: String,
    /// Which module.
    pub build_id: BuildId,
    /// Its base name.
    pub module: String,
    /// Its load bias in this process.
    pub bias: u64,
    /// Where its code cache is: a run address.
    pub cache: u64,
    /// How many bytes are mapped there.
    pub cache_size: u64,
    /// How many of them, from the first, are code.
    pub code_size: u64,
    /// How many of those, from the first, are hot.
    pub hot_size: u64,
    /// BLAKE3 of the code.
    pub code_hash: [u8; 32],
    /// The first byte of each copied function, rising.
    pub functions: Vec<u64>,
    /// Its length in bytes.
    pub function_sizes: Vec<u32>,
    /// Where each patch is, rising.
    pub patches: Vec<u64>,
    /// What was there.
    pub originals: Vec<[u8; PATCH]>,
    /// What is there while the generation is in force.
    pub replacements: Vec<[u8; PATCH]>,
    /// Copied blocks: where the original is, rising.
    pub block_original: Vec<u64>,
    /// Its length in bytes.
    pub block_size: Vec<u32>,
    /// The copy's offset in the cache.
    pub block_copy: Vec<u32>,
    /// The copy's length in bytes.
    pub block_copy_size: Vec<u32>,
    /// Whether it is there to count, not to be fast.
    pub counting: bool,
    /// Where the counters are mapped that the copies raise: a run address; 0 if they raise none.
    pub counters: u64,
    /// The blocks that are counted, one for each counter, rising.
    pub counted: Vec<u64>,
    /// The calls through pointers whose targets are recorded behind the counters, rising.
    pub recorded: Vec<u64>,
    /// Where copies go past what only leads on.
    pub shortcuts: Shortcuts,
    /// Where copies may jump to in the original, rising.
    pub escapes: Vec<u64>,
    /// Pages of the process (run addresses) that dyni wrote to and put back: they are private since, but unchanged.
    pub borrowed_pages: Vec<u64>,
    /// Where in the cache the unwind data are that the process's unwinder is told of, as a run address; 0 if none.
    pub unwind: u64,
    /// Where the writable memory for that is mapped: a run address; 0 if none.
    pub unwind_data: u64,
    /// Why functions of the plan are not in the generation: the reason, and how many.
    pub refused: Vec<(String, u32)>,
}

/// The numbers of a ledger that are written as things happen, each by one write of eight bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Journal {
    /// Not zero once a thread may have been in the cache: from then on it stays mapped.
    pub entered: u64,
    /// How many patches were put in force by the last apply; 0 until it was done.
    pub applied: u64,
    /// How long all threads were stopped for it, ns.
    pub stop_ns: u64,
    /// How many threads there were.
    pub threads: u64,
    /// When, seconds since 1970-01-01 UTC.
    pub applied_at_s: u64,
    /// How many bytes of the cache lie in huge pages.
    pub huge_bytes: u64,
    /// What the program was measured to gain by it, and the ends of the 95 % interval: work per CPU time, as parts per
    /// million of what it was without; 0 if that was not measured.
    pub gain_ppm: [u64; 3],
}

impl Journal {
    const LEN: usize = 72;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let [gain, low, high] = self.gain_ppm;
        let fields = [
            self.entered,
            self.applied,
            self.stop_ns,
            self.threads,
            self.applied_at_s,
            self.huge_bytes,
            gain,
            low,
            high,
        ];
        let bytes: Vec<u8> = fields.iter().flat_map(|f| f.to_le_bytes()).collect();
        bytes.try_into().expect("nine fields of eight bytes")
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let field = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().expect("eight bytes"));
        Self {
            entered: field(0),
            applied: field(1),
            stop_ns: field(2),
            threads: field(3),
            applied_at_s: field(4),
            huge_bytes: field(5),
            gain_ppm: [field(6), field(7), field(8)],
        }
    }
}

impl Record for Ledger {
    const KIND: Kind = Kind::Ledger;
    const VERSION: u16 = 1;

    fn to_payload(&self) -> Result<AlignedVec, SealError> {
        encode(self)
    }

    fn open_version(version: u16, payload: &AlignedVec) -> Result<Self, OpenError> {
        decode_only_version(version, payload)
    }

    fn validate(&self) -> Result<(), Invalid> {
        let rule = |ok: bool, what: &str| if ok { Ok(()) } else { Err(Invalid(format!("ledger: {what}"))) };
        let rising = |list: &[u64]| list.windows(2).all(|w| w[0] < w[1]);
        rule(self.functions.len() == self.function_sizes.len() && rising(&self.functions), "bad function table")?;
        let n = self.patches.len();
        rule(n == self.originals.len() && n == self.replacements.len(), "patch columns differ in length")?;
        rule(self.patches.windows(2).all(|w| w[1] - w[0].min(w[1]) >= PATCH as u64), "patches overlap")?;
        rule(self.replacements.iter().all(|r| r[0] == 0xe9), "a patch is not a jump")?;
        let n = self.block_original.len();
        let columns = [self.block_size.len(), self.block_copy.len(), self.block_copy_size.len()];
        rule(columns == [n; 3] && self.block_original.is_sorted(), "bad block table")?;
        let end = |i: usize| u64::from(self.block_copy[i]) + u64::from(self.block_copy_size[i]);
        rule((0..n).all(|i| end(i) <= self.code_size), "a block lies outside the code")?;
        rule(self.hot_size <= self.code_size && self.code_size <= self.cache_size, "bad sizes")?;
        rule(self.cache_size <= 1 << 31 && self.cache.checked_add(self.cache_size).is_some(), "bad cache")?;
        let all = (self.counted.len() + self.recorded.len()) as u64;
        let counters_end = self.counters.checked_add(all * COUNTER);
        let counted = all <= MAX_COUNTERS && rising(&self.counted) && rising(&self.recorded);
        rule(self.shortcuts.is_sound(self.code_size), "bad shortcuts")?;
        rule(counters_end.is_some() && counted, "bad counters")?;
        rule(rising(&self.escapes), "escapes are not sorted")
    }
}

impl Ledger {
    /// Where its patches are in the process, each with the original bytes and the jump.
    pub fn patches(&self) -> impl Iterator<Item = (RunAddr, [u8; PATCH], [u8; PATCH])> + '_ {
        let at = self.patches.iter().map(|&at| LinkAddr(at).run(self.bias));
        at.zip(&self.originals).zip(&self.replacements).map(|((at, &original), &jump)| (at, original, jump))
    }

    /// The block map, by rising original.
    #[must_use]
    pub fn blocks(&self) -> Vec<CopiedBlock> {
        (0..self.block_original.len())
            .map(|i| CopiedBlock {
                original: LinkAddr(self.block_original[i]),
                size: self.block_size[i],
                copy: CacheAddr(u64::from(self.block_copy[i])),
                copy_size: self.block_copy_size[i],
            })
            .collect()
    }

    /// Stores the block map.
    pub fn set_blocks(&mut self, blocks: &[CopiedBlock]) {
        self.block_original = blocks.iter().map(|b| b.original.0).collect();
        self.block_size = blocks.iter().map(|b| b.size).collect();
        self.block_copy = blocks.iter().map(|b| u32::try_from(b.copy.0).expect("a cache is below 2 GB")).collect();
        self.block_copy_size = blocks.iter().map(|b| b.copy_size).collect();
    }

    /// The link address of the cache.
    #[must_use]
    pub fn cache_link(&self) -> LinkAddr {
        RunAddr(self.cache).link(self.bias)
    }

    /// Its counters, as link addresses.
    #[must_use]
    pub fn counter_map(&self) -> CounterMap {
        let link = |list: &[u64]| list.iter().map(|&at| LinkAddr(at)).collect();
        let at = RunAddr(self.counters).link(self.bias);
        CounterMap { at, blocks: link(&self.counted), sites: link(&self.recorded) }
    }

    /// How many bytes are mapped for its counters.
    #[must_use]
    pub fn counters_size(&self) -> u64 {
        ((self.counted.len() + self.recorded.len()) as u64 * COUNTER).next_multiple_of(PAGE)
    }

    /// The run addresses of the pages that are private to the process because dyni wrote to them.
    pub fn written_pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.patches().map(|(at, _, _)| at.0 & !(PAGE - 1)).chain(self.borrowed_pages.iter().copied())
    }

    /// Whether it has no copies: it is what is left of generations that were freed, and knows the pages that they wrote to.
    #[must_use]
    pub fn only_remembers(&self) -> bool {
        self.cache_size == 0
    }

    /// Of one that only remembers: where caches have been that were freed, as run addresses. They are kept where others
    /// keep their functions.
    pub(crate) fn vacated(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        let ranges =
            self.functions.iter().zip(&self.function_sizes).map(|(&at, &size)| at..at.saturating_add(size.into()));
        ranges.filter(|_| self.only_remembers())
    }

    /// What has to be remembered of generations that are gone: the pages that they wrote to, and where they were. Where
    /// they were is forgotten all at once when it becomes too much.
    pub(crate) fn of_gone(build_id: BuildId, pages: Vec<u64>, mut vacated: Vec<std::ops::Range<u64>>) -> Self {
        vacated.sort_by_key(|range| range.start);
        let mut ledger = Self { build_id, borrowed_pages: pages, ..Self::default() };
        let mut merged: Vec<std::ops::Range<u64>> = Vec::new();
        for range in vacated {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        let size = |range: &std::ops::Range<u64>| u32::try_from(range.end - range.start).ok();
        if merged.len() <= MAX_VACATED && merged.iter().all(|range| size(range).is_some()) {
            ledger.functions = merged.iter().map(|range| range.start).collect();
            ledger.function_sizes = merged.iter().filter_map(size).collect();
        }
        ledger
    }

    /// What has to be remembered of a generation whose release has begun.
    pub(crate) fn remembered(&self) -> Self {
        let mut pages: Vec<u64> = self.written_pages().collect();
        pages.sort_unstable();
        pages.dedup();
        Self::of_gone(self.build_id.clone(), pages, Vec::new())
    }

    /// Whether this run address lies in its code.
    #[must_use]
    pub fn holds(&self, at: RunAddr) -> bool {
        at.0.checked_sub(self.cache).is_some_and(|offset| offset < self.code_size)
    }
}

/// How far the release of a generation has come that nothing in the process can refer to any more (`retire`). Each step
/// is written down before it is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Release {
    /// It is in force, or something may refer to it.
    #[default]
    No,
    /// It was proven that nothing does. From here on it must not be put in force again.
    Proven,
    /// The unwinder is being told to forget it.
    Forgetting,
    /// The unwinder does not know it.
    Forgotten,
    /// Its code is being unmapped; a thread can't be in it any more.
    UnmappingCode,
    /// Its code is unmapped, its other memory is being unmapped.
    UnmappingRest,
}

impl Release {
    fn from_number(number: u64) -> Self {
        match number {
            0 => Self::No,
            1 => Self::Proven,
            2 => Self::Forgetting,
            3 => Self::Forgotten,
            4 => Self::UnmappingCode,
            // A number that a later dyni may give: leave all of it alone but the cache.
            _ => Self::UnmappingRest,
        }
    }
}

/// A ledger in a process.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Where its mapping starts.
    pub at: RunAddr,
    /// The length of the mapping in bytes.
    pub size: u64,
    /// What it says.
    pub ledger: Ledger,
    /// Its numbers, as they were when it was read.
    pub journal: Journal,
    /// How far its release has come.
    pub release: Release,
    /// Why it was not freed when that was last tried, as `retire` writes it; 0 if it was not tried.
    pub kept_by: u64,
}

impl Entry {
    /// How many of its patches are in force.
    #[must_use]
    pub fn in_force(&self, memory: &Memory) -> usize {
        let patches: Vec<_> = self.ledger.patches().map(|(at, _, jump)| (at, jump)).collect();
        // A page at a time: there are thousands of patches, and no process need be read as often.
        let of_page = |page: &[(RunAddr, [u8; PATCH])]| {
            let (start, last) = (page[0].0, page[page.len() - 1].0);
            let mut bytes = vec![0; last.distance(start) as usize + PATCH];
            let n = memory.read_some(start, &mut bytes);
            let live = |at: RunAddr| bytes[..n].get(at.distance(start) as usize..)?.get(..PATCH);
            page.iter().filter(|(at, jump)| live(*at) == Some(jump)).count()
        };
        patches.chunk_by(|a, b| a.0.0 / PAGE == b.0.0 / PAGE).map(of_page).sum()
    }

    /// The original bytes of the module from `at`, whether its patches are in force or not.
    pub(crate) fn original_bytes(&self, memory: &Memory, at: LinkAddr, len: usize) -> Option<Vec<u8>> {
        let mut bytes = memory.read_vec(at.run(self.ledger.bias), len).ok()?;
        self.without_patches(at, &mut bytes);
        Some(bytes)
    }

    /// Makes of these bytes of the module, from `at`, what they are while its patches are not in force.
    pub(crate) fn without_patches(&self, at: LinkAddr, bytes: &mut [u8]) {
        let end = at.plus(bytes.len() as u64);
        let first = self.ledger.patches.partition_point(|&p| p + PATCH as u64 <= at.0);
        let patches = self.ledger.patches[first..].iter().zip(&self.ledger.originals[first..]);
        for (&place, original) in patches.take_while(|(p, _)| LinkAddr(**p) < end) {
            for (i, &byte) in original.iter().enumerate() {
                let offset = (place + i as u64).wrapping_sub(at.0) as usize;
                if let Some(slot) = bytes.get_mut(offset) {
                    *slot = byte;
                }
            }
        }
    }

    /// Where the things lie that telling the unwinder needs; `None` if it is not told.
    pub(crate) fn unwind_place(&self) -> Option<Place> {
        let ledger = &self.ledger;
        (ledger.unwind != 0).then(|| Place {
            code: RunAddr(ledger.cache + ledger.cache_size - register::CODE_LEN),
            data: RunAddr(ledger.unwind_data),
            section: RunAddr(ledger.unwind),
        })
    }

    /// Where the name of its mapping is written, for the kernel to copy.
    pub(crate) fn name(&self) -> RunAddr {
        self.at.plus(NAME_AT)
    }

    /// Notes how far its release has come.
    pub(crate) fn write_release(&mut self, memory: &Memory, release: Release) -> Result<(), RemoteError> {
        self.release = release;
        memory.write(self.at.plus(RELEASE_AT), &(release as u64).to_le_bytes())
    }

    /// Notes why it was kept.
    pub(crate) fn write_kept_by(&mut self, memory: &Memory, why: u64) -> Result<(), RemoteError> {
        self.kept_by = why;
        memory.write(self.at.plus(KEPT_AT), &why.to_le_bytes())
    }

    /// Writes the numbers, the one at `entered` first.
    pub(crate) fn write_journal(&mut self, memory: &Memory, journal: Journal) -> Result<(), RemoteError> {
        self.journal = journal;
        memory.write(self.at.plus(MAGIC.len() as u64 + 16), &journal.to_bytes())
    }
}

/// The bytes of a mapping that holds this ledger, but for [`MAGIC`], which makes it one and is written last.
pub(crate) fn seal(ledger: &Ledger) -> Result<Vec<u8>, SealError> {
    let sealed = envelope::seal(ledger)?;
    let mut bytes = vec![0; SEALED_AT as usize];
    bytes[8..16].copy_from_slice(&1u64.to_le_bytes());
    bytes[16..24].copy_from_slice(&(sealed.len() as u64).to_le_bytes());
    bytes[NAME_AT as usize..NAME_AT as usize + NAME.len()].copy_from_slice(NAME);
    bytes.extend(sealed);
    Ok(bytes)
}

/// Makes what was written at `at` a ledger.
pub(crate) fn publish(memory: &Memory, at: RunAddr) -> Result<(), RemoteError> {
    memory.write(at, &MAGIC)
}

/// Makes what is at `at` a ledger no more.
pub(crate) fn revoke(memory: &Memory, at: RunAddr) -> Result<(), RemoteError> {
    memory.write(at, &[0; MAGIC.len()])
}

/// The mappings in which dyni may have left a record of what it did: private, read-only, anonymous memory.
pub(crate) fn may_hold_records(maps: &[Mapping]) -> impl Iterator<Item = &Mapping> {
    maps.iter().filter(|m| {
        let name = m.path.as_os_str().as_encoded_bytes();
        let anonymous = m.file.inode == 0 && (name.is_empty() || name.starts_with(b"[anon:"));
        let read_only = m.readable && !m.writable && !m.executable && !m.shared;
        anonymous && read_only && m.range.end - m.range.start <= 64 << 20
    })
}

/// Every ledger among these mappings of process `pid`, oldest first, and a line for each that can't be read. Of a
/// generation whose release has begun only the pages are known that it wrote to: its cache may be gone, and another one
/// be in its place.
#[must_use]
pub fn find(pid: i32, maps: &[Mapping], memory: &Memory) -> (Vec<Entry>, Vec<String>) {
    let (mut entries, damaged) = find_all(pid, maps, memory);
    for entry in entries.iter_mut().filter(|e| e.release != Release::No) {
        entry.ledger = entry.ledger.remembered();
    }
    (entries, damaged)
}

/// The same with all that is known of generations whose release has begun.
#[must_use]
pub(crate) fn find_all(pid: i32, maps: &[Mapping], memory: &Memory) -> (Vec<Entry>, Vec<String>) {
    let (mut entries, mut damaged) = (Vec::new(), Vec::new());
    for map in may_hold_records(maps) {
        // Neighbours with equal protection are one mapping to the kernel, so a ledger may start at any page of it.
        let mut at = map.range.start;
        while at < map.range.end {
            let mut size = PAGE;
            let mut magic = [0; MAGIC.len()];
            if memory.read_some(RunAddr(at), &mut magic) == magic.len() && magic == MAGIC {
                match read(memory, RunAddr(at), map.range.end - at) {
                    Ok(entry) => {
                        size = entry.size;
                        entries.push(entry);
                    }
                    Err(why) => damaged.push(format!("the ledger at {at:#x} of process {pid} can't be used: {why}")),
                }
            }
            at += size;
        }
    }
    entries.sort_by_key(|e| (e.journal.applied_at_s, e.at));
    (entries, damaged)
}

/// The ledgers that were opened last, by the hash of their sealed bytes: the processes of a group have many in common,
/// and all are looked at again at every change.
static OPENED: Mutex<Vec<([u8; 32], Ledger)>> = Mutex::new(Vec::new());
/// How many are kept.
const KEPT: usize = 64;

fn open(sealed: &[u8]) -> Result<Ledger, String> {
    let id = *blake3::hash(sealed).as_bytes();
    let opened = || OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, ledger)) = opened().iter().find(|(known, _)| *known == id) {
        return Ok(ledger.clone());
    }
    let ledger = envelope::open::<Ledger>(sealed).map_err(|e| e.to_string())?;
    let mut opened = opened();
    if opened.len() == KEPT {
        opened.remove(0);
    }
    opened.push((id, ledger.clone()));
    Ok(ledger)
}

fn read(memory: &Memory, at: RunAddr, room: u64) -> Result<Entry, String> {
    let head = memory.read_vec(at, SEALED_AT as usize).map_err(|e| e.to_string())?;
    let number = |i: usize| u64::from_le_bytes(head[i..i + 8].try_into().expect("eight bytes"));
    if number(8) != 1 {
        return Err(format!("it has layout {}, this dyni knows layout 1; use a newer dyni", number(8)));
    }
    let len = number(16);
    if len > Kind::Ledger.max_sealed() || SEALED_AT + len > room {
        return Err("it claims more bytes than its mapping has".to_owned());
    }
    let sealed = memory.read_vec(at.plus(SEALED_AT), len as usize).map_err(|e| e.to_string())?;
    let ledger = open(&sealed)?;
    let journal = Journal::from_bytes(&head[24..24 + Journal::LEN]);
    let release = Release::from_number(number(RELEASE_AT as usize));
    let size = (SEALED_AT + len).next_multiple_of(PAGE);
    Ok(Entry { at, size, ledger, journal, release, kept_by: number(KEPT_AT as usize) })
}
