//! One writer (invariant 10): whoever changes a process holds a lock on its `/proc/PID/mem`.
//!
//! The kernel keeps one inode for that file as long as somebody has it open, so `flock` on it excludes every other dyni
//! on this host that sees the same procfs, leaves no file behind, and ends with the holder.

use crate::remote::RemoteError;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;

/// The right to change one process.
#[derive(Debug)]
pub(crate) struct Lock {
    _held: Flock<File>,
}

impl Lock {
    /// Takes the lock on `pid`; `None` if another dyni holds it.
    pub fn take(pid: i32) -> Result<Option<Self>, RemoteError> {
        let file = File::open(format!("/proc/{pid}/mem")).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => RemoteError::Died(pid),
            raw => RemoteError::from_errno(pid, "opening its memory", Errno::from_raw(raw.unwrap_or(0))),
        })?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Some(Self { _held: held })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(RemoteError::from_errno(pid, "locking it", errno)),
        }
    }
}
