//! Looks at live processes: which program is meant, what it has mapped, where its time goes, and what the host allows.
//!
//! - [`target`]: one process, found by PID or name, with the reasons why it may have to be refused;
//! - [`group`]: the processes that are one program (a postmaster and its backends);
//! - [`elf`], [`maps`]: the modules of a process, their load bias and build-id, and from a run address to a link address;
//! - [`mod@record`]: a recording, by the best sampler that works here, as a [`dyni_schema::Profile`];
//! - [`perf`], [`ptrace_sampler`]: the samplers; [`records`], [`branch`], [`attribution`], [`tables`]: their pure halves;
//! - [`perf_data`], [`perf_import`]: what `perf record` has written, as a profile;
//! - [`mod@cpu_time`]: what a process has used;
//! - [`host`]: what the host offers and how to change it, for `dyni doctor`.
//!
//! Nothing here changes a target. What a target says about itself (its ELF headers, its maps) is untrusted: readers are
//! bounded, and a record that makes no sense is counted and dropped.

pub mod attribution;
pub mod branch;
pub mod cpu_time;
pub mod elf;
pub mod group;
pub mod host;
pub mod interrupted;
pub mod maps;
pub mod perf;
pub mod perf_data;
pub mod perf_import;
pub mod ptrace_sampler;
pub mod record;
pub mod records;
pub mod tables;
pub mod target;

pub use cpu_time::{cpu_time, lives_are_brief};
pub use group::Group;
pub use maps::{AddressMap, MappedModule, modules as modules_of};
pub use record::{MethodChoice, Progress, RecordError, RecordOptions, Recording, StopReason, record};
pub use target::{ErrorKind, Target, TargetError};
