//! Named steps at which a test may end dyni, or the target, to prove that nothing depends on either living on.
//!
//! `DYNI_FAILPOINT=name` makes dyni kill itself with SIGKILL when it reaches that step; `name:kill-target` makes it kill
//! the target instead and go on. Without the variable a fail point is one comparison.

use std::sync::LazyLock;

/// Every fail point, in the order in which an apply, a change to another plan and then an undo pass them.
pub const FAILPOINTS: &[&str] = &[
    "apply:locked",
    "remote:stopped",
    "remote:trampoline-written",
    "remote:registers-set",
    "remote:syscall-entered",
    "remote:syscall-left",
    "remote:registers-restored",
    "apply:cache-mapped",
    "apply:code-half-written",
    "apply:code-written",
    "apply:huge-page-made",
    "apply:ledger-mapped",
    "apply:ledger-half-written",
    "apply:ledger-written",
    "apply:unwinder-told",
    "apply:pages-touched",
    "apply:stopped",
    "apply:threads-moved",
    "apply:half-patched",
    "apply:patched",
    "apply:resumed",
    "apply:done",
    "swap:stopped",
    "swap:half-out",
    "swap:out",
    "swap:in",
    "undo:locked",
    "undo:stopped",
    "undo:half-restored",
    "undo:restored",
    "undo:threads-moved",
    "undo:resumed",
    "free:stopped",
    "free:proven",
    "free:remembered",
    "free:forgotten",
    "free:code-unmapped",
    "free:half-unmapped",
    "free:done",
];

/// Those that text on its way to huge pages and back passes, besides the steps of remote calls.
pub const TEXT_FAILPOINTS: &[&str] = &[
    "text:recorded",
    "text:copy-mapped",
    "text:copy-written",
    "text:parked",
    "text:parked-read-only",
    "text:moved",
    "text:done",
    "text:parked-executable",
    "text:put-back",
];

struct Armed {
    name: String,
    kill_target: bool,
}

static ARMED: LazyLock<Option<Armed>> = LazyLock::new(|| {
    let value = std::env::var("DYNI_FAILPOINT").ok()?;
    Some(match value.strip_suffix(":kill-target") {
        Some(name) => Armed { name: name.to_owned(), kill_target: true },
        None => Armed { name: value, kill_target: false },
    })
});

/// Passes the step called `name`, which must be one of [`FAILPOINTS`] or [`TEXT_FAILPOINTS`], while working on process `pid`.
pub(crate) fn pass(name: &str, pid: i32) {
    debug_assert!(FAILPOINTS.contains(&name) || TEXT_FAILPOINTS.contains(&name), "{name} is not in the list");
    let Some(armed) = ARMED.as_ref().filter(|a| a.name == name) else { return };
    let victim = if armed.kill_target { pid } else { std::process::id() as i32 };
    // SAFETY: kill takes two integers and touches no memory of ours.
    unsafe { libc::kill(victim, libc::SIGKILL) };
}
