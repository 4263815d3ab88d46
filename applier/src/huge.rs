//! A code cache on huge pages: one iTLB entry for all of a module's hot code.
//!
//! `MADV_COLLAPSE` (Linux 6.1) makes a huge page of what is mapped, whatever `transparent_hugepage/enabled` says, from
//! outside through `process_madvise`. A process may have forbidden itself huge pages (`PR_SET_THP_DISABLE`; MariaDB does,
//! for its heap); then the prohibition is lifted around the collapse and put back.

use crate::place::HUGE;
use crate::remote::{Caller, RemoteError};
use dyni_schema::RunAddr;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const MADV_COLLAPSE: i32 = 25;
const PR_SET_THP_DISABLE: u64 = 41;
const PR_GET_THP_DISABLE: u64 = 42;

fn collapse_from_outside(pid: i32, at: RunAddr, size: u64) -> Result<(), Errno> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or an error.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let range = libc::iovec { iov_base: std::ptr::without_provenance_mut(at.0 as usize), iov_len: size as usize };
    // SAFETY: the vector of one element outlives the call; the range it names is in the target, not here.
    let done =
        unsafe { libc::syscall(libc::SYS_process_madvise, pidfd.as_raw_fd(), &raw const range, 1, MADV_COLLAPSE, 0) };
    Errno::result(done).map(drop)
}

/// Puts the mapping of `size` bytes at `at` on huge pages as far as the kernel gives any; how many bytes are on them.
pub(crate) fn collapse(pid: i32, caller: &Caller<'_>, at: RunAddr, size: u64) -> Result<u64, RemoteError> {
    let each = |f: &dyn Fn(RunAddr) -> bool| (0..size / HUGE).filter(|i| f(at.plus(i * HUGE))).count() as u64 * HUGE;
    let outside = each(&|at| collapse_from_outside(pid, at, HUGE).is_ok());
    if outside > 0 {
        return Ok(outside);
    }
    let prctl = |args: [u64; 3]| caller.call("prctl", libc::SYS_prctl, [args[0], args[1], args[2], 0, 0, 0]);
    let disabled = prctl([PR_GET_THP_DISABLE, 0, 0]).unwrap_or(0);
    if disabled & 1 != 0 {
        prctl([PR_SET_THP_DISABLE, 0, 0])?;
    }
    // By the target itself: from outside it takes CAP_SYS_NICE.
    let advise =
        |at: RunAddr| caller.call("madvise", libc::SYS_madvise, [at.0, HUGE, MADV_COLLAPSE as u64, 0, 0, 0]).is_ok();
    let inside = each(&advise);
    if disabled & 1 != 0 {
        // Bits above the first are the flags it was set with (PR_THP_DISABLE_EXCEPT_ADVISED, Linux 6.18).
        prctl([PR_SET_THP_DISABLE, 1, disabled & !1])?;
    }
    Ok(inside)
}
