//! What the kernel writes into a perf ring buffer, parsed: a pure function over byte slices.
//!
//! Every event here is opened with `sample_type` = IP | TID | TIME, plus BRANCH_STACK with LBR, and with
//! `sample_id_all`, so a sample begins with those fields and every other record ends with (pid, tid, time).

use dyni_schema::RunAddr;
use std::ops::Range;

/// The record types of `perf_event_open(2)` that are understood.
const LOST: u32 = 1;
const COMM: u32 = 3;
const EXIT: u32 = 4;
const FORK: u32 = 7;
const SAMPLE: u32 = 9;
const MMAP2: u32 = 10;

/// In `misc` of a COMM record: the name changed because of an `execve`.
pub(crate) const MISC_COMM_EXEC: u16 = 1 << 13;
/// In `misc`: where the sample was taken.
pub(crate) const MISC_CPUMODE: u16 = 7;
const MISC_KERNEL: u16 = 1;
const MISC_USER: u16 = 2;
/// In `prot` of an MMAP2 record: executable.
pub(crate) const PROT_EXEC: u32 = 4;

/// The length of what `sample_id_all` appends to a record: pid, tid, time.
const TRAILER: usize = 16;
/// The most entries that a branch stack is believed to have; processors have 8 to 64.
pub(crate) const MAX_BRANCHES: u64 = 512;

/// One entry of a branch stack, newest first in its stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch {
    /// The branch instruction's address.
    pub from: RunAddr,
    /// Where it went.
    pub to: RunAddr,
    /// Whether the processor had predicted something else.
    pub mispredicted: bool,
}

/// One record of a ring buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread was seen running.
    Sample {
        /// Its process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Where its instruction pointer was.
        ip: RunAddr,
        /// Its branch stack, as a range of the branches parsed so far.
        stack: Range<usize>,
    },
    /// A sample in the kernel or elsewhere below the user's code.
    Kernel,
    /// The buffer was full and this many records are missing.
    Lost(u64),
    /// A process replaced its program.
    Exec {
        /// The process.
        pid: i32,
    },
    /// A process mapped a file executable.
    Mapped {
        /// The process.
        pid: i32,
    },
    /// A thread or a process was born.
    Fork {
        /// The process that it belongs to, or is.
        pid: i32,
        /// The process that made it; the same for a thread.
        parent: i32,
        /// The thread.
        tid: i32,
    },
    /// A thread ended; the last one ends its process.
    Exit {
        /// Its process.
        pid: i32,
        /// The thread.
        tid: i32,
    },
    /// A record that is of no use here.
    Other,
}

/// An event and when it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed {
    /// When, ns of `CLOCK_MONOTONIC`.
    pub time_ns: u64,
    /// What.
    pub event: Event,
}

/// A record that is shorter than its type says or contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a ring buffer record of type {0} is malformed")]
pub struct Malformed(pub u32);

/// What is left to be read of some bytes.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    /// A process or thread ID; the kernel writes -1 for one outside our PID namespace.
    pub fn id(&mut self) -> Option<i32> {
        self.u32().map(u32::cast_signed)
    }

    /// A word if the event has it.
    pub fn word_if(&mut self, has: bool) -> Option<u64> {
        if has { self.u64() } else { Some(0) }
    }

    /// An entry of a branch stack.
    pub fn branch(&mut self) -> Option<Branch> {
        let (from, to, flags) = (RunAddr(self.u64()?), RunAddr(self.u64()?), self.u64()?);
        Some(Branch { from, to, mispredicted: flags & 1 != 0 })
    }
}

/// Parses one record, given its header's type and `misc` and the bytes after the header. Branch stacks are appended to
/// `branches`. `with_stack` says whether the event was opened with branch stacks.
///
/// # Errors
/// [`Malformed`]; `branches` is then as it was.
pub fn parse(
    kind: u32,
    misc: u16,
    body: &[u8],
    with_stack: bool,
    branches: &mut Vec<Branch>,
) -> Result<Timed, Malformed> {
    let before = branches.len();
    let parsed = if kind == SAMPLE { sample(misc, body, with_stack, branches) } else { side_band(kind, misc, body) };
    parsed.ok_or_else(|| {
        branches.truncate(before);
        Malformed(kind)
    })
}

fn sample(misc: u16, body: &[u8], with_stack: bool, branches: &mut Vec<Branch>) -> Option<Timed> {
    let mut r = Reader(body);
    let (ip, pid, tid, time_ns) = (RunAddr(r.u64()?), r.id()?, r.id()?, r.u64()?);
    let start = branches.len();
    if with_stack {
        let count = r.u64()?;
        if count > MAX_BRANCHES {
            return None;
        }
        for _ in 0..count {
            branches.push(r.branch()?);
        }
    }
    let event = match misc & MISC_CPUMODE {
        // 0 is "unknown": told apart by the address.
        MISC_USER | 0 if is_user(ip) => Event::Sample { pid, tid, ip, stack: start..branches.len() },
        MISC_KERNEL | MISC_USER | 0 => Event::Kernel,
        _ => Event::Other,
    };
    Some(Timed { time_ns, event })
}

fn side_band(kind: u32, misc: u16, body: &[u8]) -> Option<Timed> {
    let (body, trailer) = body.split_at(body.len().checked_sub(TRAILER)?);
    let time_ns = Reader(&trailer[8..]).u64()?;
    let mut r = Reader(body);
    let event = match kind {
        LOST => {
            r.u64()?;
            Event::Lost(r.u64()?)
        }
        COMM => {
            let pid = r.id()?;
            if misc & MISC_COMM_EXEC != 0 { Event::Exec { pid } } else { Event::Other }
        }
        EXIT | FORK => {
            let (pid, parent, tid) = (r.id()?, r.id()?, r.id()?);
            if kind == FORK { Event::Fork { pid, parent, tid } } else { Event::Exit { pid, tid } }
        }
        MMAP2 => {
            let pid = r.id()?;
            // tid, addr, len, pgoff, device or build-id (24 bytes), then prot: what is mapped is read from the process.
            let mut r = Reader(body.get(4 + 4 + 24 + 24..)?);
            if r.u32()? & PROT_EXEC != 0 { Event::Mapped { pid } } else { Event::Other }
        }
        _ => Event::Other,
    };
    Some(Timed { time_ns, event })
}

/// True for an address in the half of the address space that user code can have.
#[must_use]
pub const fn is_user(addr: RunAddr) -> bool {
    addr.0 < 1 << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn pair(low: u32, high: u32) -> u64 {
        u64::from(high) << 32 | u64::from(low)
    }

    fn one(kind: u32, misc: u16, body: &[u8], with_stack: bool) -> Result<(Timed, Vec<Branch>), Malformed> {
        let mut branches = Vec::new();
        parse(kind, misc, body, with_stack, &mut branches).map(|t| (t, branches))
    }

    #[test]
    fn a_sample_without_and_with_its_branch_stack() {
        let plain = words(&[0x40_1000, pair(7, 8), 99]);
        let (timed, _) = one(SAMPLE, MISC_USER, &plain, false).unwrap();
        let expected = Event::Sample { pid: 7, tid: 8, ip: RunAddr(0x40_1000), stack: 0..0 };
        assert_eq!(timed, Timed { time_ns: 99, event: expected });

        let stacked = words(&[0x40_1000, pair(7, 8), 99, 2, 0x40_0100, 0x40_0ff0, 1, 0x40_0200, 0x40_00f0, 2]);
        let (timed, branches) = one(SAMPLE, MISC_USER, &stacked, true).unwrap();
        assert!(matches!(timed.event, Event::Sample { stack: Range { start: 0, end: 2 }, .. }));
        assert!(branches[0].mispredicted && !branches[1].mispredicted);
        assert_eq!((branches[1].from, branches[1].to), (RunAddr(0x40_0200), RunAddr(0x40_00f0)));
    }

    #[test]
    fn kernel_samples_are_told_apart() {
        let body = words(&[0xffff_ffff_8100_0000, pair(7, 8), 99]);
        assert_eq!(one(SAMPLE, MISC_KERNEL, &body, false).unwrap().0.event, Event::Kernel);
        assert_eq!(one(SAMPLE, MISC_USER, &body, false).unwrap().0.event, Event::Kernel);
        assert_eq!(one(SAMPLE, 5, &body, false).unwrap().0.event, Event::Other);
    }

    #[test]
    fn side_band_records() {
        let trailer = [pair(7, 8), 1234];
        let body = |head: &[u64]| words(&[head, &trailer].concat());
        let event = |kind, misc, head: &[u64]| {
            let (timed, _) = one(kind, misc, &body(head), true).unwrap();
            assert_eq!(timed.time_ns, 1234);
            timed.event
        };
        assert_eq!(event(LOST, 0, &[1, 55]), Event::Lost(55));
        assert_eq!(event(FORK, 0, &[pair(9, 7), pair(9, 8), 1]), Event::Fork { pid: 9, parent: 7, tid: 9 });
        assert_eq!(event(EXIT, 0, &[pair(9, 7), pair(10, 8), 1]), Event::Exit { pid: 9, tid: 10 });
        assert_eq!(event(COMM, MISC_COMM_EXEC, &[pair(9, 9), 0]), Event::Exec { pid: 9 });
        assert_eq!(event(COMM, 0, &[pair(9, 9), 0]), Event::Other);
        let map = |prot| [pair(9, 9), 0x7000, 0x1000, 0, pair(8, 1), 5, 0, pair(prot, 2), 0];
        assert_eq!(event(MMAP2, 0, &map(5)), Event::Mapped { pid: 9 });
        assert_eq!(event(MMAP2, 0, &map(1)), Event::Other);
        assert_eq!(event(4711, 0, &[]), Event::Other);
    }

    #[test]
    fn truncated_records_are_refused_at_every_length() {
        let stacked = words(&[0x40_1000, pair(7, 8), 99, 1, 0x40_0100, 0x40_0ff0, 1]);
        for cut in 0..stacked.len() {
            assert_eq!(one(SAMPLE, MISC_USER, &stacked[..cut], true), Err(Malformed(SAMPLE)), "{cut}");
        }
        let trailer = [pair(7, 8), 1234];
        for (kind, need) in [(LOST, 2), (FORK, 2), (EXIT, 2), (COMM, 1), (MMAP2, 8)] {
            for words_left in 0..need {
                let body = words(&[&vec![0; words_left][..], &trailer].concat());
                let result = one(kind, MISC_COMM_EXEC, &body, false);
                assert_eq!(result, Err(Malformed(kind)), "type {kind} with {words_left} words");
            }
            assert_eq!(one(kind, 0, &[0; 15], false), Err(Malformed(kind)));
        }
    }

    #[test]
    fn a_hostile_count_reserves_nothing_and_leaves_no_branches_behind() {
        for count in [2, MAX_BRANCHES, MAX_BRANCHES + 1, u64::MAX] {
            let body = words(&[0x40_1000, pair(7, 8), 99, count, 0x40_0100, 0x40_0ff0, 1]);
            let mut branches = vec![Branch { from: RunAddr(1), to: RunAddr(2), mispredicted: false }];
            assert!(parse(SAMPLE, MISC_USER, &body, true, &mut branches).is_err());
            assert_eq!(branches.len(), 1);
        }
    }
}
