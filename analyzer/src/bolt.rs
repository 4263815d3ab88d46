//! What BOLT's profiles say of a binary, and how to say it to BOLT: the names that it gives to functions, and counts of the
//! ways between its basic blocks.

pub mod edges;
pub mod names;

pub use edges::{Edge, Evidence, edges, evidence};
pub use names::FunctionNames;
