//! The helper: a process beside the command that does what is to be done for it, and is gone.
//!
//! The process that the user has started becomes the command, so that its PID, parent, session and terminal are what they
//! would be without dyni. The helper is its grandchild, whose parent has ended, and so nobody's child that the command
//! could meet in a `wait`; it is in a session of its own and holds none of the command's files. If it dies, the command goes
//! on, at any time ([`dyni_applier::start`]).

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::{ForkResult, fork, setsid};

/// How long the command is held up by a helper that does not answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// The helper's end of the connection to the process that is going to be the command.
pub struct Link(UnixStream);

impl Link {
    /// Tells the other side that it may become the command.
    pub fn ready(mut self) {
        // If nobody hears it, there is no command to wait for.
        let _ = self.0.write_all(&[1]);
    }
}

/// Starts a helper that does `work` with a link to this process, and waits until it is ready. This process must have no
/// second thread.
///
/// # Errors
/// There is no helper; the command can do without.
pub fn start(keep_stderr: bool, work: impl FnOnce(Link)) -> io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let children = Children::quiet();
    // SAFETY: this process has one thread, so the child may do whatever this one may.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(ours);
            // SAFETY: as above.
            if let Ok(ForkResult::Child) = unsafe { fork() } {
                run(theirs, keep_stderr, work);
            }
            // SAFETY: ends this process without running anything of its parent's.
            unsafe { libc::_exit(0) };
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let reaped = nix::sys::wait::waitpid(child, None);
            children.restore();
            // With SIGCHLD ignored the kernel collects children itself.
            if !matches!(reaped, Ok(_) | Err(nix::errno::Errno::ECHILD)) {
                return Err(io::Error::other("the helper was not started"));
            }
        }
    }
    ours.set_read_timeout(Some(PATIENCE))?;
    let mut pid = [0; 4];
    ours.read_exact(&mut pid)?;
    // Yama lets only ancestors trace; the permission ends with the helper. Without Yama the call fails, which is as good.
    let pid = libc::c_ulong::from(u32::from_ne_bytes(pid));
    // SAFETY: takes and gives integers.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, pid, 0, 0, 0) };
    ours.write_all(&[1])?;
    ours.read_exact(&mut [0])
}

/// As long as it lives, the helper ends with a process.
#[derive(Debug, Default)]
pub struct Bound(Arc<AtomicBool>);

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Ends this helper when process `pid` ends, until the result is dropped: what is being made for it is of no use then, and thousands of short programs
/// must not leave thousands of helpers at work.
pub fn end_with(pid: i32) -> Bound {
    let bound = Bound(Arc::new(AtomicBool::new(true)));
    let is_bound = bound.0.clone();
    // SAFETY: takes and gives integers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    // Without it, the helper ends a little later.
    let Some(fd) = c_int::try_from(pidfd).ok().filter(|&fd| fd >= 0) else { return bound };
    std::thread::spawn(move || {
        let mut ended = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        loop {
            // SAFETY: poll reads and writes the one structure, which lives on this thread's stack.
            match unsafe { libc::poll(&raw mut ended, 1, -1) } {
                // SAFETY: ends this process; there is nothing in it that anybody waits for.
                1 if is_bound.load(Ordering::Relaxed) => unsafe { libc::_exit(0) },
                1 => return,
                _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    });
    bound
}

/// In the helper.
fn run(mut link: UnixStream, keep_stderr: bool, work: impl FnOnce(Link)) {
    let _ = setsid();
    let _ = std::env::set_current_dir("/");
    let kept = [Some(link.as_raw_fd()), keep_stderr.then_some(2)];
    let_go_of_files(&kept.into_iter().flatten().collect::<Vec<_>>());
    let told = link.write_all(&std::process::id().to_ne_bytes()).and_then(|()| link.read_exact(&mut [0]));
    if told.is_ok() {
        work(Link(link));
    }
}

/// Closes every descriptor but these: what reads from a pipe of the command's must not wait for the helper's end.
fn let_go_of_files(kept: &[RawFd]) {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        for fd in (0..3).filter(|fd| !kept.contains(fd)) {
            // SAFETY: both are integers; what fd was is nobody's in this process any more.
            unsafe { libc::dup2(null.as_raw_fd(), fd) };
        }
    }
    let mut kept: Vec<u32> = kept.iter().filter_map(|&fd| u32::try_from(fd).ok()).filter(|&fd| fd > 2).collect();
    kept.sort_unstable();
    let mut first: u32 = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if first < fd {
            // SAFETY: takes integers; the descriptors closed belong to values of the parent's that this process never uses
            // nor drops: it ends by `_exit`.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
}

/// Keeps the end of our one child from being noticed by the command, which inherits what is pending.
struct Children {
    mask: Option<SigSet>,
    pending: bool,
}

impl Children {
    fn quiet() -> Self {
        let mut mask = SigSet::empty();
        let pending = is_pending();
        let set = SigSet::from(Signal::SIGCHLD);
        let blocked = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut mask));
        Self { mask: blocked.ok().map(|()| mask), pending }
    }

    fn restore(self) {
        let Some(mask) = self.mask else { return };
        if !self.pending && is_pending() {
            let set: libc::sigset_t = *SigSet::from(Signal::SIGCHLD).as_ref();
            let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: both structures live on this frame; nothing is written.
            let _: c_int = unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) };
        }
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None);
    }
}

fn is_pending() -> bool {
    // SAFETY: sigpending fills the set that it is given, which is plain integers.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&raw mut set) == 0 && libc::sigismember(&raw const set, libc::SIGCHLD) == 1
    }
}
