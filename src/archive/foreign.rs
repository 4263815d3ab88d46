//! `dyni archive import` of what other tools have recorded. What a file is, it says itself.

use std::io::BufRead;
use std::path::Path;

use dyni_collector::perf_data;
use dyni_profiles::fdata::Fdata;
use dyni_schema::Profile;
use serde::Serialize;

use super::exchange::ImportArgs;
use super::{clean, fdata};
use crate::errors::Failure;
use crate::output::{Paint, plural};

/// A format that is recognised by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// BOLT's profile in text.
    Fdata,
    /// What `perf record` writes.
    PerfData,
}

/// What a file is that begins so; `None` if it is none of other tools'.
pub fn format_of(begins: &[u8]) -> Option<Foreign> {
    // Those of another byte order are known, too, to be told from what is no recording at all.
    if [perf_data::MAGIC, *b"2ELIFREP"].iter().any(|magic| begins.starts_with(magic)) {
        return Some(Foreign::PerfData);
    }
    Fdata::looks_like(begins).then_some(Foreign::Fdata)
}

/// What became of a recording of another tool.
#[derive(Debug, Default, Serialize)]
pub struct Recording {
    /// The file.
    pub file: String,
    /// Its format.
    pub format: &'static str,
    /// The id of the profile that was made of it.
    pub profile: String,
    pub program: String,
    /// How the profile counts as taken.
    pub method: &'static str,
    /// Functions in which anything was seen.
    pub functions: u64,
    /// What was used of it, in samples or executions of branches.
    pub used: u64,
    /// What was not, and why.
    pub unused: Vec<Unused>,
    /// What else is to be known, a line each.
    pub notes: Vec<String>,
}

/// What a recording tells and a profile of a program does not.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Unused {
    /// One line for people, to follow the count.
    pub reason: String,
    /// How many samples, or executions of branches.
    pub count: u64,
}

impl Recording {
    /// Says of what is left out why it is, if there is any.
    pub fn leave_out(&mut self, count: u64, reason: impl Into<String>) {
        if count > 0 {
            self.unused.push(Unused { reason: reason.into(), count });
        }
    }

    /// For people.
    pub fn text(&self, paint: Paint) -> String {
        let mut text = format!(
            "{}: {}, profile {} of {}, {}: {} in {}\n",
            clean(&self.file),
            self.format,
            paint.bold(&format!("{:.12}", self.profile)),
            clean(&self.program),
            self.method,
            plural(self.used, "count", "counts"),
            plural(self.functions, "function", "functions"),
        );
        for unused in &self.unused {
            text.push_str(&format!(
                "  not used: {} {}\n",
                plural(unused.count, "count", "counts"),
                clean(&unused.reason)
            ));
        }
        text.extend(self.notes.iter().map(|note| format!("  {}\n", clean(note))));
        text
    }
}

/// Makes a profile of a file, and says what it is made of.
///
/// # Errors
/// It is damaged, or the binary that it is of can't be used or is another.
pub fn read(
    format: Foreign,
    file: &Path,
    from: &mut dyn BufRead,
    args: &ImportArgs,
    what: &str,
) -> Result<(Profile, Recording), Failure> {
    match format {
        Foreign::Fdata => fdata::import(file, from, args, what),
        Foreign::PerfData => super::perf_data::read(file, from, args, what),
    }
}
