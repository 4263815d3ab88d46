//! A live process, from outside: its memory, its threads, and system calls made in its name.
//!
//! Three rules hold in everything below, because dyni may be killed at any instruction of its own (invariant 2):
//!
//! 1. **A thread is never left in a state that needs dyni.** A system call in the target is made by code that puts every
//!    register back by itself and jumps to where the thread was (`trampoline`). If dyni dies half-way, the kernel
//!    detaches and the thread walks home alone.
//! 2. **A signal is never held.** When one arrives while a thread is borrowed, the thread gets its own registers back
//!    first, then the signal, and the system call is tried again.
//! 3. **The death of the target is a value** ([`RemoteError::Died`]), met at every step.

mod backtrace;
mod call;
pub(crate) mod function;
mod memory;
mod stop;
pub(crate) mod trace;
pub(crate) mod trampoline;

pub(crate) use call::Caller;
pub use memory::Memory;
pub(crate) use stop::come_to_rest;
pub use stop::{Stopped, StoppedThread};
pub(crate) use trace::is_ending;

use nix::errno::Errno;

/// Runs `work`, which traces threads, in a thread of its own. When a tracer's thread ends the kernel lets go of all that
/// it still holds, so nothing that goes wrong in `work` can leave the target in our hands.
pub(crate) fn in_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// What can go wrong with a live process.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The process is gone.
    #[error("process {0} ended")]
    Died(i32),
    /// Memory that was there is there no more.
    #[error("process {0} unmapped what was being worked on")]
    Unmapped(i32),
    /// The kernel does not let us at it.
    #[error("process {pid}: {what} is not permitted ({errno})")]
    NotPermitted {
        /// The process.
        pid: i32,
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
    /// Somebody else is tracing it.
    #[error("process {pid} is being traced by process {tracer}")]
    Traced {
        /// The process.
        pid: i32,
        /// Its tracer.
        tracer: i32,
    },
    /// A thread did not stop in time: it sleeps where the kernel can't be interrupted (`vfork`, a dead disk).
    #[error("process {pid}: thread {tid} can't be stopped: it is in an uninterruptible wait")]
    Unstoppable {
        /// The process.
        pid: i32,
        /// The thread that did not stop.
        tid: i32,
    },
    /// Another process runs in the same memory (between `vfork` and `exec`, or by `clone(CLONE_VM)`).
    #[error("process {pid} shares its memory with process {other}")]
    SharedMemory {
        /// The process.
        pid: i32,
        /// The one that shares.
        other: i32,
    },
    /// Signals kept coming and no system call got through.
    #[error("process {0}: signals arrive faster than a system call can be made")]
    Interrupted(i32),
    /// No executable page of the process has room for the trampoline.
    #[error("process {0}: no unused bytes at the end of any executable segment for a system call")]
    NoRoom(i32),
    /// A system call made in the target failed.
    #[error("process {pid}: {call} in the target failed: {errno}")]
    Call {
        /// The process.
        pid: i32,
        /// The system call.
        call: &'static str,
        /// What it answered.
        errno: Errno,
    },
    /// Anything else that the kernel answered.
    #[error("process {pid}: {what}: {errno}")]
    System {
        /// The process.
        pid: i32,
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
}

impl RemoteError {
    /// Sorts a kernel answer to `what` into the kinds that callers tell apart.
    pub(crate) fn from_errno(pid: i32, what: &'static str, errno: Errno) -> Self {
        match errno {
            Errno::ESRCH => Self::Died(pid),
            // Reading or writing where nothing is mapped (any more).
            Errno::EIO | Errno::EFAULT => Self::Unmapped(pid),
            Errno::EPERM | Errno::EACCES => Self::NotPermitted { pid, what, errno },
            _ => Self::System { pid, what, errno },
        }
    }

    /// Whether trying again a little later may help.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Unstoppable { .. } | Self::SharedMemory { .. } | Self::Interrupted(_))
    }
}
