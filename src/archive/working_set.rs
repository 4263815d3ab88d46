//! `dyni archive show` of a working set: each file's bitmap as a strip.

use dyni_pbitmap::strip;
use dyni_schema::WorkingSet;
use serde::Serialize;

use super::{clean, heading, line, short, thousands, utc};
use crate::duration::human_ns;
use crate::output::{Align, Paint, Report, Table, human_bytes, plural};
use dyni_schema::envelope::Kind;
use dyni_schema::working_set::PAGE;

/// How wide a strip is, in characters.
const WIDTH: usize = 48;

/// `dyni archive show --json` of a working set.
#[derive(Debug, Serialize)]
pub struct WorkingSetReport {
    /// `"working set"`
    kind: &'static str,
    /// Its id in the archive.
    pub id: String,
    program: String,
    /// What identifies the executable: a build-id, or device, inode, size and time.
    executable: String,
    mode: String,
    recordings: u32,
    recorder: &'static str,
    /// How many neighbouring pages one touch may have marked.
    granule_pages: u32,
    deadline_ns: u64,
    updated_s: u64,
    pages: u64,
    /// Whether reading ahead by it is still done.
    helps: bool,
    /// Starts for which anything was read, and how many pages; how many of those were then touched.
    starts_read_for: u32,
    pages_read: u64,
    pages_used: u64,
    /// The most pages first.
    files: Vec<FileReport>,
}

#[derive(Debug, Serialize)]
struct FileReport {
    path: String,
    key: String,
    file_bytes: u64,
    pages: u64,
    runs: usize,
    strip: String,
}

impl WorkingSetReport {
    /// What is kept under this id.
    pub fn new(id: String, set: &WorkingSet) -> Self {
        let file = |f: &dyni_schema::FileSet| FileReport {
            path: f.path.clone(),
            key: f.key.text(),
            file_bytes: f.size,
            pages: f.runs.pages(),
            runs: f.runs.first.len(),
            strip: strip::draw(f, WIDTH),
        };
        let mut files: Vec<_> = set.files.iter().map(file).collect();
        files.sort_by(|a, b| b.pages.cmp(&a.pages).then_with(|| a.path.cmp(&b.path)));
        Self {
            kind: Kind::WorkingSet.name(),
            id,
            program: set.program.clone(),
            executable: set.executable.text(),
            mode: set.mode.clone(),
            recordings: set.recordings,
            recorder: set.recorder.name(),
            granule_pages: set.granule,
            deadline_ns: set.deadline_ns,
            updated_s: set.updated_s,
            pages: set.pages(),
            helps: set.usefulness.helps(),
            starts_read_for: set.usefulness.starts,
            pages_read: set.usefulness.read,
            pages_used: set.usefulness.used,
            files,
        }
    }
}

impl Report for WorkingSetReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = heading(Kind::WorkingSet, &self.id, paint);
        let precision = u64::from(self.granule_pages) * PAGE;
        let learned = format!(
            "from {}, by {}, up to {} after the start; one touch may mark {}",
            plural(self.recordings.into(), "recording", "recordings"),
            self.recorder,
            human_ns(self.deadline_ns),
            human_bytes(precision)
        );
        let read = match (self.starts_read_for, self.helps) {
            (0, _) => "never yet: everything was in memory".to_owned(),
            (starts, helps) => format!(
                "{} pages for {}, {} of them used{}",
                thousands(self.pages_read),
                plural(starts.into(), "start", "starts"),
                thousands(self.pages_used),
                if helps { "" } else { ": it did not help and is no longer done" }
            ),
        };
        let pages = format!("{} ({})", thousands(self.pages), human_bytes(self.pages * PAGE));
        for (label, value) in [
            ("program", self.program.as_str()),
            ("file", &self.executable),
            ("mode", &self.mode),
            ("learned", &learned),
            ("changed", &format!("{} UTC", utc(self.updated_s))),
            ("pages", &pages),
            ("read", &read),
        ] {
            text.push_str(&line(label, value));
        }
        let mut table =
            Table::new(&[("file", Align::Left), ("size", Align::Right), ("pages", Align::Right), ("", Align::Left)]);
        for f in &self.files {
            let name = f.path.rsplit('/').next().unwrap_or_default();
            table.row([short(name), human_bytes(f.file_bytes), thousands(f.pages), clean(&f.strip)]);
        }
        text.push_str(&table.render("  ", paint));
        text
    }
}
