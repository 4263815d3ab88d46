//! Writing a part of the archive as a [bundle], for other hosts.
//!
//! Equal records give equal bytes, in whatever order they were stored: they are sorted, and nothing in the bundle tells of
//! the host, the archive or the day. Sorted by age, as far as records know it: an import makes the last one the newest, and
//! of several profiles of a program that is to be the one that was recorded last.

use crate::archive::Archive;
use crate::bundle::{self, BundleError, Writer};
use crate::db::sql;
use crate::entry::Entry;
use crate::error::Result;
use dyni_schema::BuildId;
use dyni_schema::envelope::{BlobId, Kind, OpenError};
use rusqlite::{Transaction, TransactionBehavior};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

/// Which records to export. The default is all of them; what is given must all hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Those of the program with this name.
    pub program: Option<String>,
    /// Those that have to do with any of these modules: profiles and plans that it is a part of, working sets of which it is
    /// the executable. If there are none given, any.
    pub build_ids: Vec<BuildId>,
}

/// What was exported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportReport {
    /// How many records of each kind.
    pub records: BTreeMap<Kind, u64>,
    /// Working sets that are known by an inode of this host, which no other can use.
    pub left_out: u64,
    /// The length of the bundle in bytes.
    pub bytes: u64,
}

impl Archive {
    /// Writes what `selection` says, each record opened and checked first. Nothing is written if there is nothing.
    ///
    /// # Errors
    /// [`BundleError::Nothing`], [`BundleError::Write`], [`BundleError::TooLarge`], or if the archive or a record can't be
    /// read. What was written by then is no bundle.
    pub fn export(&self, selection: &Selection, to: impl Write) -> std::result::Result<ExportReport, BundleError> {
        // What is listed is there until it is written, whatever other processes remove.
        let snapshot = Transaction::new_unchecked(&self.conn, TransactionBehavior::Deferred);
        let _snapshot = sql(self.path(), snapshot)?;
        let selected = self.select(selection)?;
        let (here, shared): (Vec<Entry>, Vec<Entry>) = selected.into_iter().partition(is_of_this_host);
        if shared.is_empty() {
            return Err(BundleError::Nothing);
        }
        let mut report = ExportReport { left_out: here.len() as u64, ..ExportReport::default() };
        let mut writer = Writer::new(to)?;
        for (kind, _, id) in sorted(&shared) {
            let (_, sealed) = self.open_with(id, kind, |sealed| match bundle::check(sealed)? {
                found if found == kind => Ok(()),
                found => Err(OpenError::WrongKind { found, wanted: kind }),
            })?;
            writer.record(&sealed)?;
            *report.records.entry(kind).or_default() += 1;
        }
        report.bytes = writer.finish()?;
        Ok(report)
    }

    fn select(&self, selection: &Selection) -> Result<Vec<Entry>> {
        let mut entries = self.list(selection.program.as_deref())?;
        let wanted = &selection.build_ids;
        if !wanted.is_empty() {
            let profiles: BTreeSet<BlobId> = self.profiles_for(wanted)?.iter().map(|p| p.id).collect();
            entries.retain(|entry| match entry {
                Entry::Profile(p) => profiles.contains(&p.id),
                Entry::Plan(p) => p.build_ids.iter().any(|id| wanted.contains(id)),
                Entry::WorkingSet(w) => wanted.iter().any(|id| id.hex() == w.executable),
            });
        }
        Ok(entries)
    }
}

fn is_of_this_host(entry: &Entry) -> bool {
    matches!(entry, Entry::WorkingSet(w) if BuildId::from_hex(&w.executable).is_none())
}

/// By kind, by when the recording began from which a record was made, then by id.
fn sorted(entries: &[Entry]) -> BTreeSet<(Kind, u64, BlobId)> {
    let starts: BTreeMap<BlobId, u64> = entries
        .iter()
        .filter_map(|entry| if let Entry::Profile(p) = entry { Some((p.id, p.start_s)) } else { None })
        .collect();
    let key = |entry: &Entry| {
        let recording = if let Entry::Plan(p) = entry { p.profile } else { Some(entry.id()) };
        let start = recording.and_then(|id| starts.get(&id)).copied().unwrap_or(0);
        (entry.kind(), start, entry.id())
    };
    entries.iter().map(key).collect()
}
