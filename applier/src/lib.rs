//! Writing better placed code into a live process, and taking it out again.
//!
//! The stages, each a module, in the order in which a plan passes them:
//!
//! - [`lower`]: machine code for a plan's block order;
//! - [`check`]: every copy proven against its original;
//! - [`place`], `generation`: where the code cache goes, and all of that for one module;
//! - [`remote`]: a live process from outside: memory, threads, system calls in its name;
//! - [`ledger`]: what was done, kept in the target;
//! - `install`, `patch`, `huge`, `written`, `room`: mapping, the stop, the patches;
//! - `retire`: what nothing can refer to any more is unmapped;
//! - [`Applier`], [`undo`], [`sweep`], [`status`], [`counters`], [`Resolver`]: what the command calls;
//! - [`apply_huge_text`]: original code on huge pages;
//! - [`start`]: a program from its exec to its first instruction;
//! - [`symbols`]: what debuggers and profilers have to be told of the copies.

mod apply;
pub mod check;
mod counts;
mod enter;
mod error;
mod failpoint;
mod gain;
mod generation;
mod huge;
mod huge_text;
mod install;
pub mod ledger;
mod lock;
pub mod lower;
pub mod originals;
mod patch;
pub mod place;
pub mod remote;
mod resolve;
mod retire;
mod room;
pub mod shortcuts;
pub mod start;
mod status;
mod swap;
pub mod symbols;
mod undo;
pub mod unwind;
mod written;

pub use apply::{Applier, Prepared};
pub use counts::{CounterReader, Counters, Tally, counters};
pub use enter::Choice;
pub use error::ApplyError;
pub use failpoint::{FAILPOINTS, TEXT_FAILPOINTS, WATCH_FAILPOINTS};
pub use gain::Gain;
pub use huge_text::{HugeTextApplied, HugeTextStatus, apply_huge_text};
pub use install::{Applied, AppliedModule};
pub use resolve::Resolver;
pub use retire::{Kept, Retired, Swept, sweep};
pub use status::{ModuleStatus, State, Status, status};
pub use swap::Swap;
pub use undo::{Undone, undo};
