//! Code recovery and layout: from an ELF image and a profile to a plan. Pure: no process, no database, no clock, the same
//! result on any host and any number of threads.

pub mod bolt;
pub mod calls;
pub mod cdsort;
pub mod cfg;
mod chains;
pub mod counting;
pub mod evaluate;
pub mod explain;
pub mod exttsp;
pub mod functions;
pub mod image;
pub mod infer;
mod jump_tables;
pub mod passes;
pub mod plan;
pub mod probes;
pub mod refuse;
pub mod simplex;
pub mod stale;
pub mod stats;
pub mod table_loads;
pub mod targets;
#[cfg(test)]
mod testing;
pub mod yardstick;
