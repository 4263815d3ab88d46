//! Ctrl-C during a recording: it ends there and keeps what it has, instead of throwing a minute of samples away.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// While it lives, an interrupt is noted; afterwards it ends the program again, as everybody expects.
pub struct Interruptible {
    before: Option<SigAction>,
}

impl Interruptible {
    /// Starts noting.
    pub fn new() -> Self {
        ASKED.store(false, Ordering::Relaxed);
        // The flag lets a second Ctrl-C end the program even if the first is never looked at.
        let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESETHAND, SigSet::empty());
        // SAFETY: the handler stores to an atomic, which is allowed in a signal handler.
        let before = unsafe { sigaction(Signal::SIGINT, &action) }.ok();
        Self { before }
    }

    /// Whether somebody asked to end.
    pub fn asked(&self) -> bool {
        ASKED.load(Ordering::Relaxed)
    }
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // SAFETY: `before` is what sigaction itself returned, so whatever handler it names is one that was valid.
            let _ = unsafe { sigaction(Signal::SIGINT, before) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::raise;

    #[test]
    fn the_first_interrupt_is_noted_and_not_deadly() {
        let interruptible = Interruptible::new();
        assert!(!interruptible.asked());
        raise(Signal::SIGINT).unwrap();
        assert!(interruptible.asked());
    }
}
