//! The file that `perf record` writes: its records in the order of time, of the events that it was recorded with.
//!
//! A file begins with a header that says where attributes, records and *features* (facts about the host, build-ids) lie. One that
//! went through a pipe has them all as records. What a record holds besides its own fields depends on the event's
//! `sample_type`. (perf: `tools/perf/Documentation/perf.data-file-format.txt`, `perf_event_open(2)`.)
//!
//! **Untrusted.** A pure function over the bytes: every offset and every count is checked against what is there, and nothing is
//! reserved for what is merely claimed. A record of a known type that is too short for it is an error; those of unknown types are
//! passed over.

mod error;

use crate::records::{Branch, MAX_BRANCHES, MISC_COMM_EXEC, MISC_CPUMODE, PROT_EXEC, Reader};
use dyni_schema::{BuildId, FileOffset, RunAddr};
use std::collections::HashMap;
use std::ops::Range;

pub use error::PerfDataError;

/// The first bytes of such a file, on machines like those that dyni runs on.
pub const MAGIC: [u8; 8] = *b"PERFILE2";
/// The same from a machine of the other byte order.
const SWAPPED: [u8; 8] = *b"2ELIFREP";

/// The longest file that is read, bytes.
pub const MAX_BYTES: u64 = 1 << 30;
/// The most records of one file.
const MAX_RECORDS: usize = 1 << 25;
/// The most events of one file.
const MAX_EVENTS: usize = 1 << 10;

const HEADER_LEN: u64 = 104;
const PIPE_HEADER_LEN: u64 = 16;
/// The shortest `perf_event_attr` there ever was.
const MIN_ATTR: u32 = 64;

mod kind {
    pub const MMAP: u32 = 1;
    pub const LOST: u32 = 2;
    pub const COMM: u32 = 3;
    pub const FORK: u32 = 7;
    pub const SAMPLE: u32 = 9;
    pub const MMAP2: u32 = 10;
    pub const LOST_SAMPLES: u32 = 13;
    // From here on perf's own, which have no time.
    pub const HEADER_ATTR: u32 = 64;
    pub const BUILD_ID: u32 = 67;
    pub const AUXTRACE: u32 = 71;
    pub const FEATURE: u32 = 80;
    pub const COMPRESSED: [u32; 2] = [81, 83];
}

mod feature {
    pub const BUILD_ID: u32 = 2;
    pub const OS_RELEASE: u32 = 4;
    pub const ARCH: u32 = 6;
    pub const CPU: u32 = 8;
}

mod sample {
    pub const IP: u64 = 1 << 0;
    pub const TID: u64 = 1 << 1;
    pub const TIME: u64 = 1 << 2;
    pub const ADDR: u64 = 1 << 3;
    pub const READ: u64 = 1 << 4;
    pub const CALLCHAIN: u64 = 1 << 5;
    pub const ID: u64 = 1 << 6;
    pub const CPU: u64 = 1 << 7;
    pub const PERIOD: u64 = 1 << 8;
    pub const STREAM_ID: u64 = 1 << 9;
    pub const RAW: u64 = 1 << 10;
    pub const BRANCHES: u64 = 1 << 11;
    pub const IDENTIFIER: u64 = 1 << 16;
}

/// In the attribute's flags: the period is a frequency; records have what `sample_id_all` appends.
const FLAG_FREQ: u64 = 1 << 10;
const FLAG_SAMPLE_ID_ALL: u64 = 1 << 18;
/// In `branch_sample_type`: a word stands before the entries.
const BRANCH_HW_INDEX: u64 = 1 << 17;
/// In `misc`: the mapping is not executable; a build-id stands instead of an inode, and its
/// length is told.
const MISC_MMAP_DATA: u16 = 1 << 13;
const MISC_MMAP_BUILD_ID: u16 = 1 << 14;
const MISC_BUILD_ID_SIZE: u16 = 1 << 15;

/// What samples were taken at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerfEvent {
    /// `type` of the attribute.
    pub kind: u32,
    /// `config` of the attribute.
    pub config: u64,
    /// Every how many events, or how many samples a second.
    pub period: u64,
    /// Whether that is a frequency.
    pub is_frequency: bool,
    sample_type: u64,
    read_format: u64,
    branch_type: u64,
    has_trailer: bool,
}

/// A record, as far as it is of use here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PerfRecord<'a> {
    /// A thread was seen running.
    Sample {
        /// Of which event, an index into [`PerfData::events`].
        event: usize,
        /// Its process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Where its instruction pointer was.
        ip: RunAddr,
        /// Where that is, by what the record says: 1 the kernel, 2 user code, 0 unknown, others a virtual machine.
        mode: u16,
        /// Its branch stack, newest first.
        stack: Vec<Branch>,
    },
    /// A process has a file mapped.
    Mapped {
        /// The process.
        pid: i32,
        /// Where.
        range: Range<RunAddr>,
        /// From which byte of the file on.
        offset: FileOffset,
        /// The file, as the process saw it.
        path: &'a [u8],
        /// Its identity, if the record says it.
        build_id: Option<BuildId>,
    },
    /// A process replaced its program.
    Exec {
        /// The process.
        pid: i32,
    },
    /// A thread or a process was born.
    Fork {
        /// The process that it belongs to, or is.
        pid: i32,
        /// The process that made it; the same for a thread.
        parent: i32,
        /// Whether that happened, so that it has what its parent had. perf also writes such a record for each process that
        /// was there before, and then all that this one has.
        inherits: bool,
    },
    /// So many records are missing.
    Lost(u64),
}

/// A file.
#[derive(Clone, Debug)]
pub struct PerfData<'a> {
    /// What it was recorded with.
    pub events: Vec<PerfEvent>,
    /// Identities of files, as perf noted them at the end.
    pub build_ids: Vec<(&'a [u8], BuildId)>,
    /// The processor's model.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
    bytes: &'a [u8],
    ids: HashMap<u64, usize>,
    /// Time and place of every record that may be of use, by time; without one they come as they lie.
    order: Vec<(u64, u32)>,
}

/// Up to the first zero.
fn string(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

/// A part of the file.
fn section(bytes: &[u8], offset: u64, size: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(size).ok()?)?)
}

struct RecordHeader {
    kind: u32,
    misc: u16,
    size: usize,
}

fn header(reader: &mut Reader<'_>) -> Option<RecordHeader> {
    Some(RecordHeader { kind: reader.u32()?, misc: reader.u16()?, size: usize::from(reader.u16()?) })
}

const HEADER: usize = 8;

impl<'a> PerfData<'a> {
    /// Takes a whole file apart.
    ///
    /// # Errors
    /// [`PerfDataError`]: what is wrong with it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PerfDataError> {
        if bytes.starts_with(&SWAPPED) {
            return Err(PerfDataError::OtherMachine("of the other byte order".to_owned()));
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(PerfDataError::NotPerfData);
        }
        // Places of records are kept in 32 bits.
        if bytes.len() as u64 > MAX_BYTES {
            return Err(PerfDataError::TooLarge("1 GiB"));
        }
        let mut data = Self {
            events: Vec::new(),
            build_ids: Vec::new(),
            cpu: String::new(),
            kernel: String::new(),
            bytes,
            ids: HashMap::new(),
            order: Vec::new(),
        };
        let size = Reader(&bytes[8..]).u64().ok_or(PerfDataError::Truncated("its first bytes"))?;
        let records = match size {
            PIPE_HEADER_LEN => PIPE_HEADER_LEN as usize..bytes.len(),
            HEADER_LEN.. => data.file_header()?,
            _ => return Err(PerfDataError::Damaged("its header has an unknown length")),
        };
        data.index(records)?;
        if data.events.is_empty() {
            return Err(PerfDataError::Damaged("it does not say what was recorded"));
        }
        Ok(data)
    }

    /// Reads what the header leads to; where the records are.
    fn file_header(&mut self) -> Result<Range<usize>, PerfDataError> {
        let cut = PerfDataError::Truncated;
        let mut r = Reader(&self.bytes[16..]);
        let mut words = [0; 11];
        for word in &mut words {
            *word = r.u64().ok_or(cut("its first bytes"))?;
        }
        let [attr_size, attrs, attrs_size, data, data_size, _, _, features @ ..] = words;
        if data_size == 0 {
            return Err(PerfDataError::Unfinished);
        }
        section(self.bytes, data, data_size).ok_or(cut("its records"))?;
        let end = data + data_size;
        let attrs = section(self.bytes, attrs, attrs_size).ok_or(cut("its events"))?;
        // Each is followed by where its ids are.
        let size = usize::try_from(attr_size).ok().filter(|&n| n >= MIN_ATTR as usize + 16);
        let size = size.ok_or(PerfDataError::Damaged("its events have an unknown length"))?;
        for attr in attrs.chunks_exact(size) {
            let (attr, place) = attr.split_at(size - 16);
            let mut place = Reader(place);
            let (at, length) = (place.u64().unwrap_or(0), place.u64().unwrap_or(0));
            let ids = section(self.bytes, at, length).ok_or(cut("the ids of its events"))?;
            self.event(attr, ids)?;
        }
        // In the order of their bits, behind the records.
        let mut table = Reader(&self.bytes[end as usize..]);
        let bits = (0..256u32).filter(|bit| features[*bit as usize / 64] >> (bit % 64) & 1 != 0);
        for bit in bits {
            let (at, length) = table.u64().zip(table.u64()).ok_or(cut("its facts about the host"))?;
            let content = section(self.bytes, at, length).ok_or(cut("its facts about the host"))?;
            self.feature(bit, content)?;
        }
        Ok(data as usize..end as usize)
    }

    fn event(&mut self, attr: &[u8], ids: &[u8]) -> Result<(), PerfDataError> {
        let event = attribute(attr).ok_or(PerfDataError::Damaged("one of its events is too short"))?;
        if self.events.len() >= MAX_EVENTS {
            return Err(PerfDataError::TooLarge("1024 events"));
        }
        let mut ids = Reader(ids);
        while let Some(id) = ids.u64() {
            self.ids.insert(id, self.events.len());
        }
        self.events.push(event);
        Ok(())
    }

    fn feature(&mut self, bit: u32, content: &'a [u8]) -> Result<(), PerfDataError> {
        let text = || {
            let mut r = Reader(content);
            let length = r.u32()?;
            let text = r.take((length as usize).min(r.0.len()))?;
            Some(String::from_utf8_lossy(string(text)).chars().take(200).collect::<String>())
        };
        match bit {
            feature::BUILD_ID => {
                let mut r = Reader(content);
                while let Some(header) = header(&mut r) {
                    let body = header.size.checked_sub(HEADER).and_then(|n| r.take(n));
                    let body = body.ok_or(PerfDataError::Damaged("its list of build-ids is cut off"))?;
                    self.build_id(header.misc, body);
                }
            }
            feature::OS_RELEASE => self.kernel = text().unwrap_or_default(),
            feature::CPU => self.cpu = text().unwrap_or_default(),
            feature::ARCH => {
                if let Some(arch) = text().filter(|arch| arch != "x86_64") {
                    return Err(PerfDataError::OtherMachine(arch));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Process, 20 bytes of build-id, its length and padding, the path.
    fn build_id(&mut self, misc: u16, body: &'a [u8]) {
        let (Some(id), Some(path)) = (body.get(4..28), body.get(28..)) else { return };
        // Before it was told, shorter ones ended in zeros.
        let told = usize::from(id[20]).min(20);
        let length = if misc & MISC_BUILD_ID_SIZE != 0 { told } else { trimmed(&id[..20]) };
        if length > 0 {
            self.build_ids.push((string(path), BuildId(id[..length].to_vec())));
        }
    }

    /// Finds every record and its time.
    fn index(&mut self, records: Range<usize>) -> Result<(), PerfDataError> {
        let mut at = records.start;
        while at < records.end {
            let mut r = Reader(&self.bytes[at..records.end]);
            let whole = header(&mut r).and_then(|h| Some((r.take(h.size.checked_sub(HEADER)?)?, h)));
            let (body, header) = whole.ok_or(PerfDataError::Truncated("its records"))?;
            let mut next = at + header.size;
            match header.kind {
                kind if kind::COMPRESSED.contains(&kind) => return Err(PerfDataError::Compressed),
                kind::HEADER_ATTR => {
                    let size = Reader(body.get(4..).unwrap_or_default()).u32().unwrap_or(0) as usize;
                    let ids = body.get(size..).ok_or(PerfDataError::Damaged("one of its events is too short"))?;
                    self.event(&body[..size], ids)?;
                }
                kind::BUILD_ID => self.build_id(header.misc, body),
                kind::FEATURE => {
                    let bit = Reader(body).u64().and_then(|bit| u32::try_from(bit).ok());
                    self.feature(bit.unwrap_or(0), body.get(8..).unwrap_or_default())?;
                }
                kind::AUXTRACE => {
                    // The record tells how much follows it.
                    let more = Reader(body).u64().and_then(|n| usize::try_from(n).ok());
                    let end = more.and_then(|n| next.checked_add(n)).filter(|&end| end <= records.end);
                    next = end.ok_or(PerfDataError::Truncated("its records"))?;
                }
                kind::MMAP | kind::LOST | kind::COMM | kind::FORK | kind::SAMPLE | kind::MMAP2 | kind::LOST_SAMPLES => {
                    if self.order.len() >= MAX_RECORDS {
                        return Err(PerfDataError::TooLarge("33 million records"));
                    }
                    let time = self.time(header.kind, body).unwrap_or(0);
                    self.order.push((time, at as u32));
                }
                _ => {}
            }
            at = next;
        }
        self.order.sort_unstable();
        Ok(())
    }

    /// Which event a record is of: what an id in it says, if there are several.
    fn event_of(&self, kind: u32, body: &[u8]) -> usize {
        let Some(first) = self.events.first().filter(|_| self.events.len() > 1) else { return 0 };
        let t = first.sample_type;
        let has = |bit: u64| usize::from(t & bit != 0);
        let at = if kind == kind::SAMPLE {
            let before = has(sample::IP) + has(sample::TID) + has(sample::TIME) + has(sample::ADDR);
            if t & sample::IDENTIFIER != 0 { 0 } else { 8 * before }
        } else {
            let behind = 1 + if t & sample::IDENTIFIER != 0 { 0 } else { has(sample::STREAM_ID) + has(sample::CPU) };
            body.len().saturating_sub(8 * behind)
        };
        if t & (sample::IDENTIFIER | sample::ID) == 0 {
            return 0;
        }
        let id = Reader(body.get(at..).unwrap_or_default()).u64();
        id.and_then(|id| self.ids.get(&id)).copied().unwrap_or(0)
    }

    fn time(&self, kind: u32, body: &[u8]) -> Option<u64> {
        let event = self.events.get(self.event_of(kind, body))?;
        let has = |bit: u64| usize::from(event.sample_type & bit != 0);
        if has(sample::TIME) == 0 {
            return None;
        }
        let at = if kind == kind::SAMPLE {
            8 * (has(sample::IDENTIFIER) + has(sample::IP) + has(sample::TID))
        } else if event.has_trailer {
            let behind = has(sample::ID) + has(sample::STREAM_ID) + has(sample::CPU) + has(sample::IDENTIFIER);
            body.len().checked_sub(8 * (1 + behind))?
        } else {
            return None;
        };
        Reader(body.get(at..)?).u64()
    }

    /// When the first and the last record were made, ns; of those that say so.
    #[must_use]
    pub fn span_ns(&self) -> u64 {
        let first = self.order.iter().find(|r| r.0 > 0).map_or(0, |r| r.0);
        self.order.last().map_or(0, |r| r.0.saturating_sub(first))
    }

    /// The records, by time.
    ///
    /// # Errors
    /// A record is too short for what it should hold.
    pub fn records(&self) -> impl Iterator<Item = Result<PerfRecord<'a>, PerfDataError>> + '_ {
        let timed = self.events.iter().any(|e| e.sample_type & sample::TIME != 0);
        self.order.iter().filter_map(move |&(time, at)| {
            let mut r = Reader(&self.bytes[at as usize..]);
            let record = header(&mut r).and_then(|h| Some((h.kind, h.misc, r.take(h.size.checked_sub(HEADER)?)?)));
            let (kind, misc, body) = record?;
            let parsed = match kind {
                kind::SAMPLE => self.sample(misc, body),
                _ => side_band(kind, misc, body, time > 0 || !timed),
            };
            parsed.ok_or(PerfDataError::Damaged("a record is shorter than its type")).transpose()
        })
    }

    #[allow(clippy::option_option, reason = "too short is not the same as of no use")]
    fn sample(&self, misc: u16, body: &[u8]) -> Option<Option<PerfRecord<'a>>> {
        let index = self.event_of(kind::SAMPLE, body);
        let event = self.events.get(index)?;
        let has = |bit: u64| event.sample_type & bit != 0;
        let mut r = Reader(body);
        r.word_if(has(sample::IDENTIFIER))?;
        let ip = RunAddr(r.word_if(has(sample::IP))?);
        let (pid, tid) = if has(sample::TID) { (r.id()?, r.id()?) } else { (-1, -1) };
        for bit in [sample::TIME, sample::ADDR, sample::ID, sample::STREAM_ID, sample::CPU, sample::PERIOD] {
            r.word_if(has(bit))?;
        }
        if has(sample::READ) {
            let bit = |bit: u32| event.read_format >> bit & 1;
            let (times, each) = (bit(0) + bit(1), 1 + bit(2) + bit(4));
            let words = if bit(3) == 1 { r.u64()?.checked_mul(each)?.checked_add(times)? } else { times + each };
            r.take(usize::try_from(words.checked_mul(8)?).ok()?)?;
        }
        if has(sample::CALLCHAIN) {
            let words = r.u64()?;
            r.take(usize::try_from(words.checked_mul(8)?).ok()?)?;
        }
        if has(sample::RAW) {
            let length = r.u32()? as usize;
            r.take(length)?;
        }
        let mut stack = Vec::new();
        if has(sample::BRANCHES) {
            let count = r.u64().filter(|&n| n <= MAX_BRANCHES)?;
            r.word_if(event.branch_type & BRANCH_HW_INDEX != 0)?;
            for _ in 0..count {
                stack.push(r.branch()?);
            }
        }
        Some(Some(PerfRecord::Sample { event: index, pid, tid, ip, mode: misc & MISC_CPUMODE, stack }))
    }
}

impl PerfEvent {
    /// Whether its samples say where they were taken, and of whom.
    #[must_use]
    pub const fn has_addresses(&self) -> bool {
        self.sample_type & sample::IP != 0 && self.sample_type & sample::TID != 0
    }

    /// Whether its samples have branch stacks.
    #[must_use]
    pub const fn has_stacks(&self) -> bool {
        self.sample_type & sample::BRANCHES != 0
    }
}

fn attribute(attr: &[u8]) -> Option<PerfEvent> {
    let mut r = Reader(attr);
    let (kind, _size, config, period) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?);
    let (sample_type, read_format, flags) = (r.u64()?, r.u64()?, r.u64()?);
    // Wake-up and breakpoint words, then what later kernels added.
    let branch_type = attr.get(72..80).and_then(|b| Reader(b).u64()).unwrap_or(0);
    Some(PerfEvent {
        kind,
        config,
        period,
        is_frequency: flags & FLAG_FREQ != 0,
        sample_type,
        read_format,
        branch_type,
        has_trailer: flags & FLAG_SAMPLE_ID_ALL != 0,
    })
}

#[allow(clippy::option_option, reason = "too short is not the same as of no use")]
fn side_band(kind: u32, misc: u16, body: &[u8], inherits: bool) -> Option<Option<PerfRecord<'_>>> {
    let mut r = Reader(body);
    Some(match kind {
        kind::MMAP | kind::MMAP2 => {
            let (pid, _tid) = (r.id()?, r.id()?);
            let (start, length, offset) = (r.u64()?, r.u64()?, r.u64()?);
            let mut build_id = None;
            let executable = if kind == kind::MMAP2 {
                let id = r.take(24)?;
                let (prot, _flags) = (r.u32()?, r.u32()?);
                // Its length, three bytes of padding, then the id.
                let length = usize::from(id[0]).min(20);
                if misc & MISC_MMAP_BUILD_ID != 0 && length > 0 {
                    build_id = Some(BuildId(id[4..4 + length].to_vec()));
                }
                prot & PROT_EXEC != 0
            } else {
                misc & MISC_MMAP_DATA == 0
            };
            let range = RunAddr(start)..RunAddr(start.saturating_add(length));
            let path = string(r.0);
            executable.then_some(PerfRecord::Mapped { pid, range, offset: FileOffset(offset), path, build_id })
        }
        kind::COMM => {
            let pid = r.id()?;
            (misc & MISC_COMM_EXEC != 0).then_some(PerfRecord::Exec { pid })
        }
        kind::FORK => Some(PerfRecord::Fork { pid: r.id()?, parent: r.id()?, inherits }),
        kind::LOST => {
            r.u64()?;
            Some(PerfRecord::Lost(r.u64()?))
        }
        kind::LOST_SAMPLES => Some(PerfRecord::Lost(r.u64()?)),
        _ => None,
    })
}

/// The length without zeros at the end, in whole words.
fn trimmed(id: &[u8]) -> usize {
    id.chunks(4).rposition(|word| word.iter().any(|&b| b != 0)).map_or(0, |last| 4 * (last + 1))
}

#[cfg(test)]
pub(crate) mod tests;
