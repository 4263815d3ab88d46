//! Working sets: which pages of its files a program touches after its start, and reading them before they are missed.
//!
//! - [`record`]: which pages a process has touched, by looks at its page tables;
//! - [`mod@merge`]: several recordings as one, the newer ones counting for more;
//! - [`mod@prefetch`]: reading what is not in memory yet, in file order, within a budget;
//! - [`files`]: whether a file is still the one that was learned;
//! - [`strip`]: a working set as people see it.
//!
//! Nothing here ever maps a file of the program's: one that is truncated meanwhile can do no harm.

pub mod files;
pub mod merge;
pub mod prefetch;
pub mod record;
pub mod strip;

pub use merge::merge;
pub use prefetch::{Budget, Fetched, prefetch};
pub use record::Recording;
