//! A part of an archive as a file: there and back, the same bytes for the same records, and nothing of a file that is cut off,
//! damaged or hostile.

mod common;

use common::{build, large_profile, plan, profile, working_set};
use dyni_profiles::bundle::{HEADER_LEN, MAGIC, Version};
use dyni_profiles::{Archive, ArchiveError, BundleError, Category, Entry, ImportReport, Imported, Incoming, Selection};
use dyni_schema::envelope::{self, BlobId, Kind, OpenError, seal};
use dyni_schema::{BuildId, FileKey, InodeKey, Plan, Usefulness, WorkingSet};
use std::io::{self, Read};
use std::path::Path;

fn archive(dir: &tempfile::TempDir, name: &str) -> Archive {
    Archive::open(&dir.path().join(name)).expect("open")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary folder")
}

fn set(n: u8, recordings: u32) -> WorkingSet {
    working_set(&build(n), "", recordings, Usefulness::default())
}

fn inode() -> FileKey {
    FileKey::Inode(InodeKey { device: (8, 1), inode: 5, size: 9, modified_ns: 3 })
}

/// A plan that was made from a profile.
fn plan_of(program: &str, number: u64) -> Plan {
    let profile = BlobId::of(&seal(&profile(program, number)).expect("seal")).0;
    Plan { profile, ..plan(program, number) }
}

/// Some of everything, stored in this order or its reverse.
fn fill(archive: &mut Archive, reverse: bool) {
    type Put = fn(&mut Archive) -> Result<BlobId, ArchiveError>;
    let mut puts: [Put; 7] = [
        |a| a.put_profile(&profile("postgres", 1)),
        |a| a.put_profile(&profile("postgres", 2)),
        |a| a.put_profile(&profile("nginx", 3)),
        |a| a.put_plan(&plan_of("postgres", 1)),
        |a| a.put_plan(&plan_of("postgres", 2)),
        |a| a.put_working_set(&set(1, 2)),
        |a| a.put_working_set(&set(2, 1)),
    ];
    if reverse {
        puts.reverse();
    }
    for put in puts {
        put(archive).expect("put");
    }
}

fn export(archive: &Archive, selection: &Selection) -> Vec<u8> {
    let mut bytes = Vec::new();
    let report = archive.export(selection, &mut bytes).expect("export");
    assert_eq!(report.bytes, bytes.len() as u64);
    bytes
}

fn import(archive: &mut Archive, bytes: &[u8]) -> ImportReport {
    let incoming = Incoming::new().expect("spool").read(bytes).expect("read");
    archive.import(&incoming).expect("import")
}

/// Why a bundle is not taken.
fn refusal(bytes: impl Read) -> BundleError {
    Incoming::new().expect("spool").read(bytes).expect_err("must be refused")
}

fn ids(archive: &Archive) -> Vec<BlobId> {
    archive.list(None).expect("list").iter().map(Entry::id).collect()
}

fn counts(new: u64, known: u64, left_out: u64) -> Imported {
    Imported { new, known, left_out }
}

/// A bundle of any bytes, as a stranger may make one.
fn forge(needed: [u8; 6], records: &[&[u8]]) -> Vec<u8> {
    let header = [&MAGIC[..], &[1, 0], &needed].concat();
    let mut covered = header.clone();
    let mut bytes = header;
    for record in records {
        bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
        bytes.extend_from_slice(record);
        covered.extend_from_slice(&BlobId::of(record).0);
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&(records.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&envelope::content_id(&covered));
    bytes
}

const NOW: [u8; 6] = [0, 0, 1, 0, 0, 0];

#[test]
fn what_is_exported_is_imported_once() {
    let dir = folder();
    let (mut from, mut to) = (archive(&dir, "from.db"), archive(&dir, "to.db"));
    fill(&mut from, false);
    let bytes = export(&from, &Selection::default());
    let report = import(&mut to, &bytes);
    let all_new =
        [(Kind::Profile, counts(3, 0, 0)), (Kind::WorkingSet, counts(2, 0, 0)), (Kind::Plan, counts(2, 0, 0))];
    assert_eq!(report, ImportReport::from(all_new));
    let sorted = |archive: &Archive| {
        let mut ids = ids(archive);
        ids.sort_unstable();
        ids
    };
    assert_eq!(sorted(&to), sorted(&from));
    let newest = to.find_profile("postgres").expect("a profile");
    assert_eq!(
        to.profile(&newest.into()).expect("open").1,
        profile("postgres", 2),
        "the newest recording is the newest"
    );

    let before = ids(&to);
    let again = import(&mut to, &bytes);
    let all_known =
        [(Kind::Profile, counts(0, 3, 0)), (Kind::WorkingSet, counts(0, 2, 0)), (Kind::Plan, counts(0, 2, 0))];
    assert_eq!(again, ImportReport::from(all_known));
    assert_eq!(ids(&to), before, "what is known does not become newer");
    assert_eq!(export(&to, &Selection::default()), bytes);
}

#[test]
fn the_order_of_storing_is_not_seen() {
    let dir = folder();
    let (mut one, mut other) = (archive(&dir, "one.db"), archive(&dir, "other.db"));
    fill(&mut one, false);
    fill(&mut other, true);
    assert_eq!(export(&one, &Selection::default()), export(&other, &Selection::default()));
}

#[test]
fn a_selection_takes_what_has_to_do_with_it() {
    let dir = folder();
    let mut archive = archive(&dir, "a.db");
    fill(&mut archive, false);
    let records = |program: Option<&str>, build_ids: &[u8]| {
        let build_ids = build_ids.iter().map(|&n| BuildId(vec![n; 20])).collect();
        let selection = Selection { program: program.map(str::to_owned), build_ids };
        match archive.export(&selection, io::sink()) {
            Ok(report) => [Kind::Profile, Kind::Plan, Kind::WorkingSet]
                .map(|kind| report.records.get(&kind).copied().unwrap_or(0)),
            Err(BundleError::Nothing) => [0; 3],
            Err(e) => panic!("{e}"),
        }
    };
    assert_eq!(records(None, &[]), [3, 2, 2]);
    assert_eq!(records(Some("nginx"), &[]), [1, 0, 0]);
    assert_eq!(records(Some("clang"), &[]), [0, 0, 2]);
    assert_eq!(records(None, &[1]), [3, 2, 1], "a library of all");
    assert_eq!(records(None, &[108]), [2, 2, 0], "an executable");
    assert_eq!(records(None, &[105, 2]), [1, 0, 1]);
    assert_eq!(records(Some("nginx"), &[108]), [0, 0, 0]);
    assert_eq!(records(Some("mysqld"), &[]), [0, 0, 0]);
}

#[test]
fn nothing_to_export_writes_nothing() {
    let dir = folder();
    let mut archive = archive(&dir, "a.db");
    let mut bytes = Vec::new();
    assert_eq!(archive.export(&Selection::default(), &mut bytes), Err(BundleError::Nothing));
    let here = working_set(&inode(), "", 1, Usefulness::default());
    archive.put_working_set(&here).expect("put");
    assert_eq!(archive.export(&Selection::default(), &mut bytes), Err(BundleError::Nothing));
    assert!(bytes.is_empty());
    archive.put_profile(&profile("clang", 1)).expect("put");
    let report = archive.export(&Selection::default(), &mut bytes).expect("export");
    assert_eq!((report.left_out, report.records.len()), (1, 1), "what only this host can use stays here");
}

#[test]
fn the_better_working_set_stays() {
    let dir = folder();
    let mut archive = archive(&dir, "a.db");
    archive.put_working_set(&set(1, 5)).expect("put");
    let bundle = |recordings| forge(NOW, &[&seal(&set(1, recordings)).expect("seal")]);
    let recordings = |archive: &Archive| archive.working_set_of(&build(1)).expect("read").map(|s| s.recordings);
    assert_eq!(import(&mut archive, &bundle(4))[&Kind::WorkingSet], counts(0, 0, 1));
    assert_eq!(import(&mut archive, &bundle(5))[&Kind::WorkingSet], counts(0, 1, 0));
    assert_eq!(recordings(&archive), Some(5));
    assert_eq!(import(&mut archive, &bundle(6))[&Kind::WorkingSet], counts(1, 0, 0));
    assert_eq!(recordings(&archive), Some(6));
    assert_eq!(archive.list(None).expect("list").len(), 1);
}

#[test]
fn a_record_that_is_twice_in_a_bundle_counts_once() {
    let dir = folder();
    let mut archive = archive(&dir, "a.db");
    let sealed = seal(&profile("p", 1)).expect("seal");
    assert_eq!(import(&mut archive, &forge(NOW, &[&sealed, &sealed]))[&Kind::Profile], counts(1, 1, 0));
    let twice = Incoming::new().expect("spool");
    let bundle = forge(NOW, &[&seal(&plan("p", 1)).expect("seal")]);
    let twice = twice.read(&bundle[..]).and_then(|i| i.read(&bundle[..])).expect("read");
    assert_eq!(archive.import(&twice).expect("import")[&Kind::Plan], counts(1, 1, 0));
}

#[test]
fn an_older_version_keeps_its_bytes_and_its_id() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../schema/tests/golden/plan-v1.dyni");
    let old = std::fs::read(golden).expect("read");
    let dir = folder();
    let mut archive = archive(&dir, "a.db");
    import(&mut archive, &forge(NOW, &[&old]));
    assert_eq!(ids(&archive), [BlobId::of(&old)]);
    assert_eq!(export(&archive, &Selection::default()), forge(NOW, &[&old]));
}

#[test]
fn a_damaged_record_is_mended_and_never_exported() {
    let dir = folder();
    let path = dir.path().join("a.db");
    let mut archive = Archive::open(&path).expect("open");
    let id = archive.put_profile(&profile("p", 1)).expect("put");
    let bundle = export(&archive, &Selection::default());
    let raw = rusqlite::Connection::open(&path).expect("open");
    raw.execute("UPDATE blobs SET bytes = zeroblob(100)", []).expect("update");
    let refused = archive.export(&Selection::default(), io::sink()).expect_err("damaged");
    assert!(
        matches!(&refused, BundleError::Archive(ArchiveError::BadRecord { id: bad, .. }) if *bad == id),
        "{refused}"
    );
    assert!(refused.help().is_some_and(|help| help.contains("dyni archive rm")));
    assert_eq!(import(&mut archive, &bundle)[&Kind::Profile], counts(1, 0, 0));
    assert_eq!(export(&archive, &Selection::default()), bundle);
}

/// Bytes that come in pieces, as through a pipe.
struct Drops<'a>(&'a [u8]);

impl Read for Drops<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = into.len().min(7);
        self.0.read(&mut into[..n])
    }
}

#[test]
fn a_slow_pipe_and_a_large_record() {
    let dir = folder();
    let (mut from, mut to) = (archive(&dir, "from.db"), archive(&dir, "to.db"));
    from.put_profile(&large_profile(1)).expect("put");
    let bytes = export(&from, &Selection::default());
    let incoming = Incoming::new().expect("spool").read(Drops(&bytes)).expect("read");
    to.import(&incoming).expect("import");
    assert_eq!(export(&to, &Selection::default()), bytes);
}

fn small() -> Vec<u8> {
    let records = [seal(&profile("p", 1)).expect("seal"), seal(&plan("p", 1)).expect("seal")];
    forge(NOW, &[&records[0], &records[1]])
}

#[test]
fn cut_off_anywhere() {
    let whole = small();
    for len in 0..whole.len() {
        assert_eq!(refusal(&whole[..len]), BundleError::Truncated { have: len as u64 });
    }
    assert!(Incoming::new().expect("spool").read(&whole[..]).is_ok());
}

#[test]
fn every_single_bit_flipped() {
    let whole = small();
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            let error = refusal(&bytes[..]);
            let right = match at {
                0..8 => error == BundleError::NotABundle,
                8..10 => matches!(error, BundleError::Damaged(_) | BundleError::Newer { .. }),
                _ => matches!(error, BundleError::Damaged(_) | BundleError::Truncated { .. }),
            };
            assert!(right, "byte {at}, bit {bit}: {error}");
        }
    }
}

/// Bytes, and for how many there was room when they were read.
struct Asked<'a> {
    bytes: &'a [u8],
    most: usize,
}

impl Read for Asked<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.most = self.most.max(into.len());
        self.bytes.read(into)
    }
}

#[test]
fn lengths_that_lie() {
    let header = &small()[..HEADER_LEN];
    for length in [1_u32, 4096, 200 << 20] {
        let bytes = [header, &length.to_le_bytes()].concat();
        let mut asked = Asked { bytes: &bytes, most: 0 };
        assert_eq!(refusal(&mut asked), BundleError::Truncated { have: 20 });
        assert!(asked.most < 1 << 20, "memory for {} bytes on a stranger's word", asked.most);
    }
    for length in [Kind::Profile.max_sealed() as u32 + 1, u32::MAX] {
        let bytes = [header, &length.to_le_bytes()].concat();
        assert!(matches!(refusal(bytes.as_slice().chain(io::repeat(0))), BundleError::Damaged(_)));
    }
    // Tiny records that claim to unpack to 256 MB each.
    let mut bomb = seal(&profile("p", 1)).expect("seal")[..57].to_vec();
    bomb[16..24].copy_from_slice(&Kind::Profile.max_payload().to_le_bytes());
    let endless = forge(NOW, &[bomb.as_slice(); 257]);
    assert!(matches!(refusal(&endless[..]), BundleError::TooLarge(_)));
}

#[test]
fn records_that_no_dyni_has_written() {
    let good = seal(&profile("p", 1)).expect("seal");
    let cut = refusal(&forge(NOW, &[&good, &good[..good.len() - 1]])[..]);
    assert!(matches!(&cut, BundleError::BadRecord { number: 2, why: OpenError::Truncated { .. } }), "{cut}");
    assert_eq!(cut.category(), Category::Refused);
    let junk = refusal(&forge(NOW, &[b"junk"])[..]);
    assert_eq!(junk, BundleError::BadRecord { number: 1, why: OpenError::NotDyni });
    let mut ledger = good.clone();
    ledger[8] = Kind::Ledger.code() as u8;
    ledger[16..24].fill(0);
    assert_eq!(refusal(&forge(NOW, &[&ledger])[..]), BundleError::Misplaced { number: 1, kind: Kind::Ledger });
    let tail = [small(), vec![0]].concat();
    assert_eq!(refusal(&tail[..]), BundleError::Damaged("something follows its end"));
}

#[test]
fn what_a_newer_dyni_wrote_says_which_is_needed() {
    let needed = [3, 0, 14, 0, 1, 0];
    let good = seal(&profile("p", 1)).expect("seal");
    let (mut kind, mut version) = (good.clone(), good.clone());
    kind[8] = 9;
    version[10] = 7;
    let mut format = forge(needed, &[&good]);
    format[8] = 2;
    for bytes in [forge(needed, &[&good, &kind]), forge(needed, &[&version, &good]), format] {
        let error = refusal(&bytes[..]);
        assert!(matches!(&error, BundleError::Newer { needed: Version([3, 14, 1]), .. }), "{error}");
        assert!(error.to_string().starts_with("it needs dyni 3.14.1 or newer, this is "), "{error}");
        assert_eq!((error.category(), error.help()), (Category::Refused, Some("update dyni")));
    }
    // All of it is known here: who wrote it does not matter.
    assert!(Incoming::new().expect("spool").read(&forge(needed, &[&good])[..]).is_ok());
    // A damaged record of a known kind is not taken for one of a newer kind.
    let mut damaged = forge(NOW, &[&good]);
    damaged[HEADER_LEN + 4 + 8] = 9;
    assert!(matches!(refusal(&damaged[..]), BundleError::Damaged(_)));
}

#[test]
fn other_files() {
    let dir = folder();
    let path = dir.path().join("a.db");
    drop(Archive::open(&path).expect("open"));
    assert_eq!(refusal(std::fs::File::open(&path).expect("open")), BundleError::Database);
    assert_eq!(refusal(&b"a shopping list"[..]), BundleError::NotABundle);
    assert_eq!(refusal(&seal(&profile("p", 1)).expect("seal")[..]), BundleError::NotABundle);
    assert_eq!(refusal(&[][..]), BundleError::Truncated { have: 0 });
    assert!(matches!(refusal(std::fs::File::open(dir.path()).expect("open")), BundleError::Read(_)));
}

#[test]
fn what_the_index_can_not_hold_rolls_everything_back() {
    let dir = folder();
    let mut archive = archive(&dir, "a.db");
    let mut beyond = profile("p", 2);
    beyond.start_s = u64::MAX;
    let bundle = forge(NOW, &[&seal(&profile("p", 1)).expect("seal"), &seal(&beyond).expect("seal")]);
    let incoming = Incoming::new().expect("spool").read(&bundle[..]).expect("read");
    assert_eq!(archive.import(&incoming), Err(ArchiveError::OutOfRange("start")));
    assert_eq!(ids(&archive), []);
}
