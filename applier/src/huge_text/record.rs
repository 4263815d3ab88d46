//! What was done to one region of text, kept in the process, so that a later dyni can tell and undo it. As with the ledger,
//! what is in force is not written anywhere: the mappings say it.

use crate::ledger::may_hold_records;
use crate::remote::{Caller, Memory, RemoteError};
use crate::{error::ApplyError, failpoint};
use dyni_collector::maps::{FileId, Mapping};
use dyni_schema::envelope::{self, Kind, OpenError, SealError, decode_only_version, encode};
use dyni_schema::{BuildId, Invalid, RunAddr};
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

/// The first bytes of a record's mapping, written last.
const MAGIC: [u8; 8] = *b"\x7fdyniTXT";
/// Where the step is, the bytes on huge pages, and the sealed record's length; then the sealed record.
const STEP_AT: u64 = 8;
const HUGE_BYTES_AT: u64 = 16;
const LEN_AT: u64 = 24;
const SEALED_AT: u64 = 64;
const PAGE: u64 = 4096;
/// The step at which the range for the copy is mapped. (One that is mapped without this having been written is empty and
/// stays so.)
pub(super) const MAPPED: u64 = 1;
/// The step at which the copy has left the place where it was made.
pub(super) const MOVED: u64 = 2;

/// What was to be done: run addresses, and which part of which file was there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Record {
    pub build_id: BuildId,
    /// The module's base name.
    pub module: String,
    /// Its load bias.
    pub bias: u64,
    /// The text that is moved.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where the copy is made: as many bytes; as many behind it are for the file's mapping.
    pub copy: u64,
    /// The file's device, major and minor.
    pub device: (u32, u32),
    pub inode: u64,
    /// Where in the file the text begins, bytes.
    pub offset: u64,
}

impl envelope::Record for Record {
    const KIND: Kind = Kind::HugeText;
    const VERSION: u16 = 1;

    fn to_payload(&self) -> Result<AlignedVec, SealError> {
        encode(self)
    }

    fn open_version(version: u16, payload: &AlignedVec) -> Result<Self, OpenError> {
        decode_only_version(version, payload)
    }

    fn validate(&self) -> Result<(), Invalid> {
        let user_half = |start: u64, size: u64| start.checked_add(size).is_some_and(|end| end < 1 << 47);
        let aligned = [self.start, self.size, self.copy, self.offset].iter().all(|n| n % PAGE == 0);
        let sane = aligned && self.size > 0 && self.size < 1 << 32;
        let apart = self.copy >= self.start + self.size || self.start >= self.copy.saturating_add(2 * self.size);
        if sane && user_half(self.start, self.size) && user_half(self.copy, 2 * self.size) && apart {
            Ok(())
        } else {
            Err(Invalid("huge text: bad ranges".to_owned()))
        }
    }
}

impl Record {
    pub fn copy(&self) -> RunAddr {
        RunAddr(self.copy)
    }

    /// Where the file's own mapping lies meanwhile.
    pub fn parked(&self) -> RunAddr {
        RunAddr(self.copy + self.size)
    }
}

/// A record in a process.
#[derive(Debug, Clone)]
pub(crate) struct Moved {
    at: RunAddr,
    len: u64,
    pub record: Record,
    step: u64,
    huge_bytes: u64,
}

/// What of it is there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    /// Anonymous memory lies where the text was.
    pub text_is_copy: bool,
    /// The file's mapping is aside.
    pub parked_is_file: bool,
    /// Its place is reserved and nothing else.
    pub parked_is_reserved: bool,
    /// The copy is where it was made.
    pub copy_is_ours: bool,
}

impl Moved {
    /// What the mappings of the process say.
    pub(super) fn state(&self, maps: &[Mapping]) -> Now {
        let Record { start, size, copy, device, inode, offset, .. } = self.record;
        let file = FileId { dev: device, inode };
        let covered = |at: u64, ours: &dyn Fn(&Mapping) -> bool| {
            let mut next = at;
            for m in maps.iter().filter(|m| m.range.start < at + size && at < m.range.end) {
                if m.range.start > next || !ours(m) {
                    return false;
                }
                next = m.range.end;
            }
            next >= at + size
        };
        let anonymous = |m: &Mapping| m.file.inode == 0 && m.executable && !m.writable && !m.shared;
        let parked = copy + size;
        let parked_file = |m: &Mapping| {
            m.file == file && !m.shared && m.offset.wrapping_sub(m.range.start) == offset.wrapping_sub(parked)
        };
        let text_is_copy = covered(start, &anonymous);
        // Until it has left, nobody else can have mapped anything there.
        let copy_is_ours = self.step == MAPPED && !text_is_copy && covered(copy, &anonymous);
        Now {
            text_is_copy,
            parked_is_file: covered(parked, &parked_file),
            parked_is_reserved: copy_is_ours && covered(parked, &anonymous),
            copy_is_ours,
        }
    }

    /// Writes down how far it is.
    pub(super) fn write_step(&mut self, memory: &Memory, step: u64) -> Result<(), RemoteError> {
        self.step = step;
        memory.write(self.at.plus(STEP_AT), &step.to_le_bytes())
    }

    /// Writes down how many bytes of it the kernel has put on huge pages.
    pub(super) fn write_huge_bytes(&mut self, memory: &Memory, bytes: u64) -> Result<(), RemoteError> {
        self.huge_bytes = bytes;
        memory.write(self.at.plus(HUGE_BYTES_AT), &bytes.to_le_bytes())
    }

    /// Makes an end of the record. If that fails, an empty read-only mapping stays; it means nothing.
    pub(super) fn unmap(&self, memory: &Memory, caller: &Caller<'_>) {
        let _ = memory.write(self.at, &[0; MAGIC.len()]);
        let _ = caller.call("munmap", libc::SYS_munmap, [self.at.0, self.len, 0, 0, 0, 0]);
    }
}

/// Maps and writes a record.
pub(super) fn write(record: Record, memory: &Memory, caller: &Caller<'_>, pid: i32) -> Result<Moved, ApplyError> {
    let sealed = envelope::seal(&record)?;
    let len = (SEALED_AT + sealed.len() as u64).next_multiple_of(PAGE);
    let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let at = caller.call("mmap", libc::SYS_mmap, [0, len, libc::PROT_READ as u64, private, u64::MAX, 0])?;
    let at = RunAddr(at);
    memory.write(at.plus(LEN_AT), &(sealed.len() as u64).to_le_bytes())?;
    memory.write(at.plus(SEALED_AT), &sealed)?;
    memory.write(at, &MAGIC)?;
    failpoint::pass("text:recorded", pid);
    Ok(Moved { at, len, record, step: 0, huge_bytes: 0 })
}

/// Every record among these mappings of a process. What can't be read is none.
pub(crate) fn find(maps: &[Mapping], memory: &Memory) -> Vec<Moved> {
    let mut found = Vec::new();
    for map in may_hold_records(maps) {
        let pages = (map.range.start..map.range.end).step_by(PAGE as usize);
        found.extend(pages.filter_map(|at| read(memory, RunAddr(at), map.range.end - at)));
    }
    found.sort_by_key(|moved| moved.record.start);
    found
}

fn read(memory: &Memory, at: RunAddr, room: u64) -> Option<Moved> {
    let mut head = [0; SEALED_AT as usize];
    if memory.read_some(at, &mut head) < head.len() || head[..MAGIC.len()] != MAGIC {
        return None;
    }
    let number = |i: u64| u64::from_le_bytes(head[i as usize..i as usize + 8].try_into().expect("eight bytes"));
    let len = number(LEN_AT);
    if len > Kind::HugeText.max_sealed() || SEALED_AT + len > room {
        return None;
    }
    let sealed = memory.read_vec(at.plus(SEALED_AT), len as usize).ok()?;
    let record = envelope::open::<Record>(&sealed).ok()?;
    let len = (SEALED_AT + len).next_multiple_of(PAGE);
    Some(Moved { at, len, record, step: number(STEP_AT), huge_bytes: number(HUGE_BYTES_AT) })
}

/// Text of one module on huge pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugeTextStatus {
    /// The module's base name.
    pub module: String,
    /// Its build-id, in hexadecimal.
    pub build_id: String,
    /// How many bytes of its text were moved.
    pub bytes: u64,
    /// How many of them the kernel had put on huge pages.
    pub huge_bytes: u64,
}

/// What lies on huge pages, by module.
pub(crate) fn status(all: &[Moved]) -> Vec<HugeTextStatus> {
    let mut modules: Vec<HugeTextStatus> = Vec::new();
    for moved in all {
        let build_id = moved.record.build_id.hex();
        match modules.iter_mut().find(|m| m.build_id == build_id) {
            Some(module) => {
                module.bytes += moved.record.size;
                module.huge_bytes += moved.huge_bytes;
            }
            None => modules.push(HugeTextStatus {
                module: moved.record.module.clone(),
                build_id,
                bytes: moved.record.size,
                huge_bytes: moved.huge_bytes,
            }),
        }
    }
    modules
}
