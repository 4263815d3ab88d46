//! What this process was given at its start, before Rust's own start-up code changed it: a program that is started in its
//! place must find things as they were.
//!
//! That code ignores SIGPIPE and opens `/dev/null` where standard input, output or error are closed (library/std,
//! `sys/pal/unix/mod.rs`). So a function that the C library runs before `main` takes a note of both.

use std::sync::atomic::{AtomicU8, Ordering};

/// Bits 0 to 2: that descriptor was closed. Bit 3: SIGPIPE was ignored.
static NOTED: AtomicU8 = AtomicU8::new(0);
const PIPE_IGNORED: u8 = 1 << 3;

extern "C" fn note() {
    let mut noted = 0;
    for fd in 0..3 {
        // SAFETY: F_GETFD takes and gives integers.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            noted |= 1 << fd;
        }
    }
    // SAFETY: sigaction only writes what it is given to write into, a structure of integers that lives on this frame.
    let ignored = unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), &raw mut now) == 0 && now.sa_sigaction == libc::SIG_IGN
    };
    if ignored {
        noted |= PIPE_IGNORED;
    }
    NOTED.store(noted, Ordering::Relaxed);
}

// SAFETY: the C library calls what is in this section once, in the main thread, with arguments that `note` may ignore (System
// V ABI); `note` makes three kinds of system calls and uses nothing that Rust sets up first.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = note;

/// Makes things as they were. What is opened afterwards may get one of the closed descriptors.
pub fn restore() {
    let noted = NOTED.load(Ordering::Relaxed);
    if noted & PIPE_IGNORED == 0 {
        // SAFETY: the default action is no code of ours.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    for fd in (0..3).filter(|fd| noted & 1 << fd != 0) {
        // SAFETY: the descriptor is `/dev/null`, opened for nobody's use in place of a closed one.
        unsafe { libc::close(fd) };
    }
}
