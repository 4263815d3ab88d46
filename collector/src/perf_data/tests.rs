//! Files made here, byte by byte: there is no machine with branch stacks to record on. And what damage does to them.

use super::*;

/// `perf_event_attr` with this type, config and sample type.
pub(crate) fn attr(kind: u32, config: u64, sample_type: u64) -> Vec<u8> {
    let mut attr = Vec::new();
    attr.extend(kind.to_le_bytes());
    attr.extend(128u32.to_le_bytes());
    for word in [config, 1999, sample_type, 0, FLAG_FREQ | FLAG_SAMPLE_ID_ALL] {
        attr.extend(word.to_le_bytes());
    }
    attr.resize(128, 0);
    attr[72..80].copy_from_slice(&BRANCH_HW_INDEX.to_le_bytes());
    attr
}

/// A record of these bytes.
pub(crate) fn raw(kind: u32, misc: u16, body: &[u8]) -> Vec<u8> {
    let mut record = kind.to_le_bytes().to_vec();
    record.extend(misc.to_le_bytes());
    record.extend(((body.len() + 8) as u16).to_le_bytes());
    record.extend(body);
    record
}

/// A record of words, and a path if there is one.
pub(crate) fn record(kind: u32, misc: u16, words: &[u64], path: &str) -> Vec<u8> {
    let mut body: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    if !path.is_empty() {
        body.extend(path.as_bytes());
        body.resize((body.len() + 1).next_multiple_of(8), 0);
    }
    raw(kind, misc, &body)
}

/// A file and its build-id, as perf notes them at the end.
pub(crate) fn noted(path: &str, build_id: [u8; 20]) -> Vec<u8> {
    let body = [&[0; 4][..], &build_id, &[20, 0, 0, 0], path.as_bytes(), &[0; 4]].concat();
    raw(kind::BUILD_ID, MISC_BUILD_ID_SIZE | 2, &body)
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// What `sample_id_all` appends with [`STACKED`].
fn trailer(mut record: Vec<u8>, time: u64) -> Vec<u8> {
    record.extend(pair(7, 7).to_le_bytes());
    record.extend(time.to_le_bytes());
    let size = record.len() as u16;
    record[6..8].copy_from_slice(&size.to_le_bytes());
    record
}

pub(crate) const STACKED: u64 = sample::IP | sample::TID | sample::TIME | sample::PERIOD | sample::BRANCHES;

/// A mapping of an executable file by process 7.
pub(crate) fn mapped(time: u64, start: u64, length: u64, offset: u64, path: &str, build_id: &[u8]) -> Vec<u8> {
    let mut id = [0u8; 24];
    id[0] = build_id.len() as u8;
    id[4..4 + build_id.len()].copy_from_slice(build_id);
    let words: Vec<u64> = id.chunks(8).map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes"))).collect();
    let head = [pair(7, 7), start, length, offset, words[0], words[1], words[2], pair(5, 2)];
    let misc = if build_id.is_empty() { 2 } else { 2 | MISC_MMAP_BUILD_ID };
    trailer(record(kind::MMAP2, misc, &head, path), time)
}

/// A sample of process 7 with a branch stack.
pub(crate) fn stacked(time: u64, mode: u16, ip: u64, stack: &[(u64, u64)]) -> Vec<u8> {
    let mut words = vec![ip, pair(7, 8), time, 1, stack.len() as u64, 0];
    stack.iter().for_each(|&(from, to)| words.extend([from, to, 1]));
    record(kind::SAMPLE, mode, &words, "")
}

/// Process 7 has a child.
pub(crate) fn forked(time: u64, child: u32) -> Vec<u8> {
    trailer(record(kind::FORK, 0, &[pair(child, 7), pair(child, 7), time], ""), time)
}

/// A file with one event and these records.
pub(crate) fn file(attr: &[u8], records: &[Vec<u8>], build_ids: &[u8]) -> Vec<u8> {
    let data: Vec<u8> = records.concat();
    let attrs = HEADER_LEN;
    let start = attrs + attr.len() as u64 + 16;
    let features = start + data.len() as u64;
    let mut file = MAGIC.to_vec();
    let attr_size = attr.len() as u64 + 16;
    let bits = 1 << feature::BUILD_ID | 1 << feature::OS_RELEASE;
    for word in [HEADER_LEN, attr_size, attrs, attr_size, start, data.len() as u64, 0, 0, bits, 0, 0, 0] {
        file.extend(u64::to_le_bytes(word));
    }
    file.extend(attr);
    file.extend([0; 16]);
    file.extend(data);
    let kernel = b"\x08\0\0\x006.1.0\0\0\0";
    let at = features + 32;
    for word in [at, build_ids.len() as u64, at + build_ids.len() as u64, kernel.len() as u64] {
        file.extend(word.to_le_bytes());
    }
    file.extend(build_ids);
    file.extend(kernel);
    file
}

fn whole() -> Vec<u8> {
    let records = [
        mapped(1, 0x40_0000, 0x2000, 0x1000, "/opt/main", &[0xab; 20]),
        // Later, and before in the file: perf sorts, and so does this.
        stacked(30, 2, 0x40_0100, &[(0x40_0120, 0x40_0100), (0x40_0120, 0x40_0100)]),
        stacked(20, 1, 0xffff_ffff_8100_0000, &[]),
        forked(25, 9),
        trailer(record(kind::COMM, MISC_COMM_EXEC, &[pair(9, 9)], "other"), 26),
        trailer(record(kind::LOST, 0, &[1, 55], ""), 27),
        record(4711, 0, &[1, 2, 3], ""),
    ];
    file(&attr(0, 0, STACKED), &records, &noted("/opt/noted", [0xcd; 20]))
}

#[test]
fn records_come_by_time_with_what_they_say() {
    let bytes = whole();
    let data = PerfData::parse(&bytes).unwrap();
    assert_eq!((data.kernel.as_str(), data.span_ns()), ("6.1.0", 29));
    assert_eq!(data.build_ids, [(&b"/opt/noted"[..], BuildId(vec![0xcd; 20]))]);
    assert!(data.events[0].has_stacks() && data.events[0].has_addresses() && data.events[0].is_frequency);
    let records: Vec<_> = data.records().map(Result::unwrap).collect();
    let branch = Branch { from: RunAddr(0x40_0120), to: RunAddr(0x40_0100), mispredicted: true };
    let sample = |ip, mode, stack| PerfRecord::Sample { event: 0, pid: 7, tid: 8, ip: RunAddr(ip), mode, stack };
    let expected = [
        PerfRecord::Mapped {
            pid: 7,
            range: RunAddr(0x40_0000)..RunAddr(0x40_2000),
            offset: FileOffset(0x1000),
            path: b"/opt/main",
            build_id: Some(BuildId(vec![0xab; 20])),
        },
        sample(0xffff_ffff_8100_0000, 1, vec![]),
        PerfRecord::Fork { pid: 9, parent: 7, inherits: true },
        PerfRecord::Exec { pid: 9 },
        PerfRecord::Lost(55),
        sample(0x40_0100, 2, vec![branch, branch]),
    ];
    assert_eq!(records, expected);
}

#[test]
fn what_a_sample_has_besides_is_passed_over() {
    let all = STACKED | sample::IDENTIFIER | sample::CALLCHAIN | sample::RAW | sample::READ | sample::CPU;
    let mut one = attr(1, 0, all);
    // value, time enabled, id
    one[32..40].copy_from_slice(&0b101u64.to_le_bytes());
    let raw = 4 | 0xaabb_ccdd << 32;
    let words =
        [77, 0x40_0100, pair(7, 8), 5, 0, 1, 9, 9, 9, 2, 0x40_0100, 0x40_0200, raw, 1, 0, 0x40_0120, 0x40_0100, 0];
    let bytes = file(&one, &[record(kind::SAMPLE, 2, &words, "")], &[]);
    let records: Vec<_> = PerfData::parse(&bytes).unwrap().records().map(Result::unwrap).collect();
    let PerfRecord::Sample { ip, ref stack, .. } = records[0] else { panic!("{records:?}") };
    assert_eq!((ip, stack.len(), stack[0].from), (RunAddr(0x40_0100), 1, RunAddr(0x40_0120)));
}

#[test]
fn a_pipe_has_all_of_it_as_records() {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(PIPE_HEADER_LEN.to_le_bytes());
    let words: Vec<u64> =
        attr(1, 0, STACKED).chunks(8).map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes"))).collect();
    bytes.extend(record(kind::HEADER_ATTR, 0, &[&words[..], &[5, 6]].concat(), ""));
    bytes.extend(record(kind::FEATURE, 0, &[u64::from(feature::CPU), u64::from_le_bytes(*b"\x04\0\0\0cpu\0")], ""));
    bytes.extend(stacked(30, 2, 0x40_0100, &[]));
    let data = PerfData::parse(&bytes).unwrap();
    assert_eq!((data.cpu.as_str(), data.records().count()), ("cpu", 1));
}

#[test]
fn what_can_t_be_used_is_said() {
    let error = |bytes: &[u8]| PerfData::parse(bytes).unwrap_err();
    assert_eq!(error(b"PERFFILE"), PerfDataError::NotPerfData);
    assert!(matches!(error(b"2ELIFREP"), PerfDataError::OtherMachine(_)));
    let mut unfinished = whole();
    unfinished[48..56].fill(0);
    assert_eq!(error(&unfinished), PerfDataError::Unfinished);
    let compressed = file(&attr(1, 0, STACKED), &[record(81, 0, &[1], "")], &[]);
    assert_eq!(error(&compressed), PerfDataError::Compressed);
}

/// Whatever is done to a file, it is used or refused, and never makes anything wait or grow.
#[test]
fn damage_is_an_error_or_another_recording() {
    let bytes = whole();
    let read = |bytes: &[u8]| {
        if let Ok(data) = PerfData::parse(bytes) {
            data.records().for_each(drop);
        }
    };
    for cut in 0..bytes.len() {
        assert!(PerfData::parse(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    for at in 0..bytes.len() {
        for byte in [0, 1, 0x7f, 0x80, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x40] {
            let mut flipped = bytes.clone();
            flipped[at] = byte;
            read(&flipped);
            // Numbers that are as large as they can be.
            let end = (at + 8).min(flipped.len());
            flipped[at..end].fill(byte);
            read(&flipped);
        }
    }
}
