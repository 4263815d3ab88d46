//! The data that dyni's crates share, and nothing else.
//!
//! The ground floor of the house: addresses ([`addr`]), what a module is ([`build_id`]), what was observed
//! ([`profile`]), what is to be done ([`plan`]), and how both are kept in a file or a database ([`envelope`]).
//! Depends on no other crate of the project.
//!
//! Everything here is *plain*: integers, vectors, strings, enums. A profile or a plan may come from another host or from
//! a stranger, so each type has a `validate` that states what readers may rely on, and [`envelope::open`] runs it.

pub mod addr;
pub mod build_id;
pub mod envelope;
pub mod plan;
pub mod profile;
pub mod shapes;
pub mod working_set;

pub use addr::{CacheAddr, FileOffset, LinkAddr, RunAddr};
pub use build_id::{BuildId, FunctionHash};
pub use plan::{CallSite, FunctionPlan, ModulePlan, Plan, PlanKind};
pub use profile::{Branches, FunctionIndex, Host, Method, ModuleProfile, Profile, Ranges, Samples};
pub use shapes::{BlockShape, FunctionShape, Shapes};
pub use working_set::{FileKey, FileSet, InodeKey, Recorder, Runs, Usefulness, WorkingSet};

/// A record that breaks a rule its type states: which record, and which rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);
