//! The archive: where profiles and plans are kept, found, merged and thrown away.
//!
//! One SQLite file in WAL mode, so that a daemon, a recording and a listing can use it at once. A record is a *blob*:
//! sealed bytes under their own hash, never changed. The other tables are an index of the blobs, made from them and
//! written in the same transaction; what they say is for searching and for people, the blob is the truth.
//!
//! - [`archive`]: [`Archive`], put and get, list, remove
//! - [`entry`]: what is known of a record without opening it
//! - [`gc`]: what to throw away
//! - [`mod@merge`]: several recordings of a program as one
//! - [`working_sets`]: what is kept for programs that start
//! - [`bundle`], [`export`], [`import`]: a part of the archive as a file, there and back
//! - [`fdata`]: BOLT's text format of profiles
//! - [`view`], [`pprof`], [`firefox`]: a profile with names, for tools that draw it
//! - [`path`]: where the archive lies
//! - [`error`]: everything that can go wrong, with what to do about it
//!
//! Invariants:
//! 1. A record is in the archive with all of its rows or not at all, whenever the writer dies.
//! 2. Nothing that a file holds makes a reader panic, use unbounded memory or return what was not stored: an archive may
//!    come from another host. A damaged record is an error for whoever asks for it, and for nobody else.
//! 3. An archive of a newer dyni is never written to.

pub mod archive;
pub mod bundle;
mod db;
pub mod entry;
pub mod error;
pub mod export;
pub mod fdata;
pub mod firefox;
pub mod gc;
pub mod import;
pub mod merge;
pub mod path;
pub mod pprof;
pub mod view;
pub mod working_sets;

pub use archive::Archive;
pub use bundle::BundleError;
pub use entry::{Entry, PlanEntry, ProfileEntry, WorkingSetEntry};
pub use error::{ArchiveError, Category};
pub use export::{ExportReport, Selection};
pub use gc::{GcPolicy, GcReport};
pub use import::{ImportReport, Imported, Incoming};
pub use merge::{MergeError, merge};
pub use path::{archive_path, default_path};
pub use working_sets::ForStart;
