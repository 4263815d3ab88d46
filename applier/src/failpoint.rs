//! Named steps at which a test may end dyni, or the target, to prove that nothing depends on either living on.
//!
//! `DYNI_FAILPOINT=name` makes dyni kill itself with SIGKILL when it reaches that step; `name:kill-target` makes it kill
//! the target instead and go on; `name:hang-up-target` sends it SIGHUP and gives it time for whatever it does then. Without the
//! variable a fail point is one comparison.

use std::sync::LazyLock;
use std::time::Duration;

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

/// Those that freeing what is out of force passes in a process with much memory besides.
pub const WATCH_FAILPOINTS: &[&str] = &["free:watch-opened", "free:watching", "free:looked"];

/// How long a target has after `hang-up-target`.
const HANG_UP: Duration = Duration::from_millis(100);

#[derive(PartialEq)]
enum Action {
    Die,
    KillTarget,
    HangUpTarget,
}

struct Armed {
    name: String,
    action: Action,
}

static ARMED: LazyLock<Option<Armed>> = LazyLock::new(|| {
    let value = std::env::var("DYNI_FAILPOINT").ok()?;
    let actions = [(":kill-target", Action::KillTarget), (":hang-up-target", Action::HangUpTarget)];
    let named = actions.into_iter().find_map(|(end, action)| Some((value.strip_suffix(end)?.to_owned(), action)));
    let (name, action) = named.unwrap_or((value, Action::Die));
    Some(Armed { name, action })
});

/// Passes the step called `name`, which must be one of those listed above, while working on process `pid`.
pub(crate) fn pass(name: &str, pid: i32) {
    debug_assert!([FAILPOINTS, TEXT_FAILPOINTS, WATCH_FAILPOINTS].concat().contains(&name), "{name} is not in a list");
    let Some(armed) = ARMED.as_ref().filter(|a| a.name == name) else { return };
    let (victim, signal) = match armed.action {
        Action::Die => (std::process::id() as i32, libc::SIGKILL),
        Action::KillTarget => (pid, libc::SIGKILL),
        Action::HangUpTarget => (pid, libc::SIGHUP),
    };
    // SAFETY: kill takes two integers and touches no memory of ours.
    unsafe { libc::kill(victim, signal) };
    if armed.action == Action::HangUpTarget {
        std::thread::sleep(HANG_UP);
    }
}
