//! Which pages of a running process are written after they were looked at, by the kernel's own account.
//!
//! The kernel can make pages read-only behind a program's back and note the first write to each, without anybody having to
//! wait for it (userfaultfd's asynchronous write protection, Linux 6.7; Documentation/admin-guide/mm/pagemap.rst, "PAGEMAP_SCAN").
//! So most of a big process can be looked through while it runs, and the stop has to look again at what was written since
//! alone. A page is as it was looked at if at the stop
//!
//! - its mapping is one that was watched from before it was looked at (a mapping made or moved since is not, and the kernel
//!   says so: [`Pagemap::written`]),
//! - and it still carries the mark that was set before it was read, which any write takes off: the program's, a system
//!   call's, a debugger's. (What a device writes into memory that was pinned for it before does not; that came from outside
//!   the process's memory, see [`super`].)
//!
//! **What the process sees of it**: nothing. Its first write to each page takes about a microsecond longer. The descriptor
//! is made by one of its threads, because it belongs to the memory of whoever makes it, and is closed there again at once; a
//! dyni that is killed between these two calls leaves it open, and nothing is watched by it. From then on it is dyni's alone,
//! and with it, however dyni ends, the kernel forgets the whole watch. (A child that is forked between the two has it, too, until
//! it executes a program or ends; all that follows is that the kernel goes on noting first writes.)

use super::pages::{Area, Pagemap};
use crate::failpoint;
use crate::remote::{Caller, RemoteError};
use nix::errno::Errno;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

// include/uapi/linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const USER_MODE_ONLY: u64 = 1;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;

/// `struct uffdio_api`
#[repr(C)]
struct ApiArguments {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`
#[repr(C)]
struct RegisterArguments {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`
#[repr(C)]
struct ProtectArguments {
    start: u64,
    len: u64,
    mode: u64,
}

/// A process whose writes are being noted; no longer, when this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    descriptor: OwnedFd,
    /// Rising, apart from each other: what is watched and was looked through since.
    watched: Vec<Range<u64>>,
}

impl Watch {
    /// Begins one, of nothing yet; `None` where the kernel can't.
    ///
    /// # Errors
    /// The process is gone, or none of its threads can be borrowed.
    pub fn begin(pid: i32, caller: &Caller) -> Result<Option<Self>, RemoteError> {
        let flags = USER_MODE_ONLY | (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let theirs = match caller.call("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]) {
            Ok(number) => number,
            // No such call, not allowed, no descriptor left.
            Err(RemoteError::Call { .. }) => return Ok(None),
            Err(e) => return Err(e),
        };
        failpoint::pass("free:watch-opened", pid);
        let ours = take(pid, theirs);
        caller.call("close", libc::SYS_close, [theirs, 0, 0, 0, 0, 0])?;
        Ok(ours.ok().and_then(Self::with))
    }

    fn with(descriptor: OwnedFd) -> Option<Self> {
        let watch = Self { descriptor, watched: Vec::new() };
        let mut arguments = ApiArguments { api: UFFD_API, features: FEATURE_WP_ASYNC, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `uffdio_api`.
        unsafe { watch.control(UFFDIO_API, &mut arguments) }.ok()?;
        Some(watch)
    }

    /// Calls `look` with each run of pages of an area, the writes to which are noted from before that; so an area that was
    /// looked through to its end need not be looked at again where [`Self::written`] is silent.
    ///
    /// # Errors
    /// Those of `look`. An area that can't be watched is none: it is not looked at, and is not [`Self::covers`]ed.
    pub fn through<E>(
        &mut self,
        pagemap: &Pagemap,
        area: &Area,
        mut look: impl FnMut(&Range<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        if area.shared || area.stack || self.register(&area.range).is_err() {
            return Ok(());
        }
        let Ok(runs) = pagemap.runs(area) else { return Ok(()) };
        for run in &runs {
            if self.protect(run).is_err() {
                return Ok(());
            }
            look(run)?;
        }
        self.add(area.range.clone());
        Ok(())
    }

    /// Calls `look` with each run of a covered area that was written since it was looked through last, and watches it on; how
    /// many bytes that were. Where it can't be told any more, or `look` fails, the area is not covered from then on: the kernel
    /// may have forgotten some of what was written when it says that it can't tell the rest.
    pub fn again<E>(
        &mut self,
        pagemap: &Pagemap,
        area: &Area,
        mut look: impl FnMut(&Range<u64>) -> Result<(), E>,
    ) -> u64 {
        if !self.covers(area) {
            return 0;
        }
        let written = pagemap.written_till_now(area);
        let looked = written.as_ref().is_ok_and(|runs| runs.iter().all(|run| look(run).is_ok()));
        if !looked {
            self.watched.retain(|w| w.end <= area.range.start || area.range.end <= w.start);
        }
        written.iter().flatten().map(|run| run.end - run.start).sum()
    }

    fn add(&mut self, range: Range<u64>) {
        match self.watched.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.watched.push(range),
        }
    }

    /// Whether all of an area was looked through since it is watched.
    pub fn covers(&self, area: &Area) -> bool {
        !area.shared && self.watched.iter().any(|w| w.start <= area.range.start && area.range.end <= w.end)
    }

    fn register(&self, range: &Range<u64>) -> Result<(), Errno> {
        let len = range.end - range.start;
        let mut arguments = RegisterArguments { start: range.start, len, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `uffdio_register`.
        unsafe { self.control(UFFDIO_REGISTER, &mut arguments) }
    }

    fn protect(&self, run: &Range<u64>) -> Result<(), Errno> {
        let len = run.end - run.start;
        let mut arguments = ProtectArguments { start: run.start, len, mode: WRITEPROTECT_MODE_WP };
        loop {
            // SAFETY: the kernel reads and writes one `uffdio_writeprotect`.
            match unsafe { self.control(UFFDIO_WRITEPROTECT, &mut arguments) } {
                // Another thread maps or unmaps.
                Err(Errno::EAGAIN) => {}
                done => return done,
            }
        }
    }

    /// # Safety
    /// `T` is what the kernel reads and writes for `request`, and no more.
    unsafe fn control<T>(&self, request: libc::c_ulong, arguments: &mut T) -> Result<(), Errno> {
        // SAFETY: `arguments` lives and is ours alone; the rest is the caller's promise.
        Errno::result(unsafe { libc::ioctl(self.descriptor.as_raw_fd(), request, std::ptr::from_mut(arguments)) })
            .map(drop)
    }
}

/// A descriptor of another process, as one of ours.
fn take(pid: i32, number: u64) -> Result<OwnedFd, Errno> {
    // SAFETY: takes two integers and touches no memory of ours.
    let process = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just made it for us.
    let process = unsafe { OwnedFd::from_raw_fd(process as i32) };
    // SAFETY: takes three integers and touches no memory of ours.
    let taken = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })?;
    // SAFETY: the same.
    Ok(unsafe { OwnedFd::from_raw_fd(taken as i32) })
}

#[cfg(test)]
mod tests {
    use super::super::pages::{PAGE, areas};
    use super::*;
    use dyni_collector::maps;
    use std::ffi::c_void;

    const PAGES: u64 = 64;

    /// A new mapping of our own; at `at` in the place of what is there, if that is not null.
    fn map(at: *mut c_void) -> *mut c_void {
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if at.is_null() { 0 } else { libc::MAP_FIXED };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: anonymous, and only over what `map` made before.
        let made = unsafe { libc::mmap(at, (PAGES * PAGE) as usize, protection, how, -1, 0) };
        assert_ne!(made, libc::MAP_FAILED);
        made
    }

    fn write(at: *mut c_void, page: u64) {
        // SAFETY: inside a mapping of `map`.
        unsafe { at.cast::<u8>().add((page * PAGE) as usize + 9).write_volatile(1) };
    }

    /// Of this process itself; `None` on a kernel that can't.
    fn watch() -> Option<Watch> {
        let flags = USER_MODE_ONLY as i32 | libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes an integer and touches no memory of ours.
        let made = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }).ok()?;
        // SAFETY: the kernel has just made it for us.
        Watch::with(unsafe { OwnedFd::from_raw_fd(made as i32) })
    }

    #[test]
    fn what_is_written_after_the_look_is_told_and_nothing_else() {
        let Some(mut watch) = watch() else {
            println!("skipped: this kernel does not tell what a process has written (Linux 6.7 does)");
            return;
        };
        let at = map(std::ptr::null_mut());
        let start = at.expose_provenance() as u64;
        let page = |i: u64| start + i * PAGE;
        (0..8).for_each(|i| write(at, i));
        let pid = std::process::id() as i32;
        let pagemap = Pagemap::open(pid).unwrap();
        let ours = [0..start, start + PAGES * PAGE..u64::MAX];
        let area = areas(&maps::mappings(pid).unwrap(), &ours).remove(0);
        assert!(pagemap.written(&area).is_err(), "it is not watched yet");

        let mut looked = Vec::new();
        let look = |run: &Range<u64>| -> Result<(), ()> {
            looked.push((run.start, run.end));
            Ok(())
        };
        watch.through(&pagemap, &area, look).unwrap();
        assert_eq!(looked, [(page(0), page(8))]);
        assert!(watch.covers(&area));
        assert_eq!(pagemap.written(&area).unwrap(), []);

        // One that was there, and one that was not.
        write(at, 3);
        write(at, 40);
        let written = [page(3)..page(4), page(40)..page(41)];
        assert_eq!(pagemap.written(&area).unwrap(), written);
        assert_eq!(pagemap.written_till_now(&area).unwrap(), written);
        assert_eq!(pagemap.written(&area).unwrap(), []);
        write(at, 40);
        assert_eq!(pagemap.written(&area).unwrap(), written[1..]);
        assert_eq!(watch.again(&pagemap, &area, |_| -> Result<(), ()> { Ok(()) }), PAGE);
        assert!(watch.covers(&area));

        // A new mapping in the place of some of the old one: what was written before it may be forgotten, so nothing counts.
        write(at, 3);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: over the last page of the mapping above.
        let last =
            unsafe { libc::mmap(at.byte_add(((PAGES - 1) * PAGE) as usize), PAGE as usize, protection, how, -1, 0) };
        assert_ne!(last, libc::MAP_FAILED);
        watch.again(&pagemap, &area, |_| -> Result<(), ()> { Ok(()) });
        let head = areas(&maps::mappings(pid).unwrap(), &[0..start, page(PAGES - 1)..u64::MAX]).remove(0);
        assert!(!watch.covers(&area) && !watch.covers(&head));

        // A new mapping at the old place is not what was looked through.
        map(at);
        write(at, 5);
        assert!(pagemap.written(&area).is_err());
        drop(watch);
        // SAFETY: the mapping of above, which nobody uses any more.
        unsafe { libc::munmap(at, (PAGES * PAGE) as usize) };
    }
}
