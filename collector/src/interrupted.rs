//! System calls that a ptrace stop interrupts, though no signal was delivered.
//!
//! Most calls that a stop interrupts are restarted by the kernel itself. Some answer `EINTR` instead, "even if no signal
//! handler" ran (signal(7), "Interruption of system calls by stop signals"): a program that we stop for a moment would
//! see an error that it never sees without us. Whoever stops a thread mends that before it goes on.

use std::fs;

/// System calls that say `EINTR` after any stop, handler or not (signal(7)), and have done nothing then. `close` and
/// `connect` are not among them: started again they would fail.
const INTERRUPTIBLE: [libc::c_long; 18] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_io_getevents,
    // On sockets with a timeout, and on inotify descriptors.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
];

/// Lets a system call that only our stop of thread `tid` has interrupted start again; whether `regs`, its registers, were
/// changed.
pub fn mend(tid: i32, regs: &mut libc::user_regs_struct) -> bool {
    mend_unless(regs, || has_signal(tid))
}

/// Lets a system call that only our stop has interrupted start again, as the kernel itself does with most: its number back
/// into RAX, RIP back to the `syscall` instruction. A signal that waits may be the true cause: then nothing is changed.
fn mend_unless(regs: &mut libc::user_regs_struct, has_signal: impl FnOnce() -> bool) -> bool {
    let interrupted = regs.rax.cast_signed() == -i64::from(libc::EINTR);
    if !interrupted || !INTERRUPTIBLE.contains(&regs.orig_rax.cast_signed()) || has_signal() {
        return false;
    }
    const SYSCALL_LENGTH: u64 = 2;
    regs.rax = regs.orig_rax;
    regs.rip -= SYSCALL_LENGTH;
    true
}

/// Whether a signal that is not blocked waits for a thread; true where that can't be read.
fn has_signal(tid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let set = |field: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    match (set("SigPnd"), set("ShdPnd"), set("SigBlk")) {
        (Some(own), Some(shared), Some(blocked)) => (own | shared) & !blocked != 0,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_eintr_is_mended() {
        let eintr = -i64::from(libc::EINTR);
        let mended = |call: libc::c_long, result: i64, signal: bool| {
            // SAFETY: a structure of integers, for which zero is a value.
            let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
            (regs.orig_rax, regs.rax, regs.rip) = (call.cast_unsigned(), result.cast_unsigned(), 0x1002);
            mend_unless(&mut regs, || signal).then_some((regs.rax, regs.rip))
        };
        let wait = libc::SYS_epoll_wait;
        assert_eq!(mended(wait, eintr, false), Some((wait.cast_unsigned(), 0x1000)));
        assert_eq!(mended(wait, eintr, true), None, "a handler will run");
        assert_eq!(mended(wait, 0, false), None, "it came back by itself");
        assert_eq!(mended(libc::SYS_close, eintr, false), None, "it must not be repeated");
    }
}
