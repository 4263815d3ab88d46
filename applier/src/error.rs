//! What can go wrong when a process is changed, in words for people.

use crate::check::Mismatch;
use crate::remote::{RemoteError, is_ending};
use crate::unwind::UnwindMismatch;
use dyni_collector::TargetError;
use dyni_schema::envelope::SealError;

/// Why nothing was applied or undone. In every case the target is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The process could not be worked on.
    #[error(transparent)]
    Remote(RemoteError),
    /// The process is no target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Another dyni is at work on it.
    #[error("process {0} is being changed by another dyni: try again when that one is done")]
    Locked(i32),
    /// No module of the process is one of the plan's.
    #[error("the plan is for other builds than process {pid} runs ({wanted}): record and analyze this build")]
    OtherBuild {
        /// The process.
        pid: i32,
        /// The modules that the plan is for.
        wanted: String,
    },
    /// Nothing of the plan can be applied, with the reasons and how many functions each refused.
    #[error("no function of the plan can be applied to process {pid}: {reasons}")]
    NothingApplicable {
        /// The process.
        pid: i32,
        /// The reasons, joined.
        reasons: String,
    },
    /// A module has no free address range within reach.
    #[error("no room for {module}'s code cache within 2 GB of it in process {pid}")]
    NoRoom {
        /// The process.
        pid: i32,
        /// The module.
        module: String,
    },
    /// It is dynimized with another plan.
    #[error("process {0} is dynimized already, with another plan: undo that first")]
    OtherPlan(i32),
    /// The process has changed since it was looked at (a library was unloaded, a program exec'ed).
    #[error("process {0} has changed meanwhile: try again")]
    Changed(i32),
    /// The module's file could not be read.
    #[error("can't read the code of {module}: {why}")]
    Module {
        /// The module.
        module: String,
        /// Why.
        why: String,
    },
    /// The checker found a copy that is not its original. Nothing of it was installed.
    #[error("a bug in dyni was caught before it could do harm: {0}; please report it")]
    Miscompiled(#[from] Mismatch),
    /// The checker found unwind data of a copy that are not its original's. Nothing of it was installed.
    #[error("a bug in dyni was caught before it could do harm: {0}; please report it")]
    Misdescribed(#[from] UnwindMismatch),
    /// The process's unwinder could not be told of the copies.
    #[error("process {pid}: its unwinder could not be told of copies: {why}")]
    UnwinderNotTold {
        /// The process.
        pid: i32,
        /// Why.
        why: String,
    },
    /// The ledger could not be written down.
    #[error(transparent)]
    Ledger(#[from] SealError),
}

impl From<RemoteError> for ApplyError {
    fn from(e: RemoteError) -> Self {
        match e {
            RemoteError::Unmapped(pid) => Self::Changed(pid),
            e => Self::Remote(e),
        }
    }
}

impl ApplyError {
    /// This error, or the death of the process if that is what is behind it.
    #[must_use]
    pub(crate) fn or_death(self, pid: i32) -> Self {
        if !matches!(self, Self::Target(_)) && is_ending(pid) { Self::Remote(RemoteError::Died(pid)) } else { self }
    }

    /// Whether the process has ended.
    #[must_use]
    pub fn is_death(&self) -> bool {
        matches!(
            self,
            Self::Remote(RemoteError::Died(_))
                | Self::Target(TargetError::NoSuchProcess(_) | TargetError::Exited(_) | TargetError::Zombie { .. })
        )
    }

    /// Whether this is a refusal with a reason (exit status 3) rather than a failure (1).
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Remote(e) => {
                matches!(e, RemoteError::NotPermitted { .. } | RemoteError::Traced { .. } | RemoteError::NoRoom(_))
            }
            Self::Target(e) => e.kind() == dyni_collector::ErrorKind::Refused,
            Self::Locked(_)
            | Self::OtherBuild { .. }
            | Self::NothingApplicable { .. }
            | Self::NoRoom { .. }
            | Self::OtherPlan(_) => true,
            Self::Changed(_)
            | Self::Module { .. }
            | Self::Miscompiled(_)
            | Self::Misdescribed(_)
            | Self::UnwinderNotTold { .. }
            | Self::Ledger(_) => false,
        }
    }
}
