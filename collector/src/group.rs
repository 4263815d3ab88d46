//! A process group: the processes that are one program.
//!
//! A postmaster and its backends, a web server's master and its workers: one executable, one `execve`, then forks. They
//! share a profile and a plan. Membership is decided by two facts: the same main executable (device and inode), and the
//! same layout (`execve` places stack and code at random, `fork` keeps the places). The second keeps a login shell out of
//! the group of a script that the same shell binary runs.

use crate::target::{Target, TargetError, all_pids};
use std::collections::HashMap;

/// One program: a root process and everything forked from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The topmost process of the program.
    pub root: Target,
    /// Every live process of the program, the root included, by rising PID.
    pub members: Vec<Target>,
}

/// What a [`Group::refresh`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// PIDs that are new.
    pub born: Vec<i32>,
    /// PIDs that are gone.
    pub gone: Vec<i32>,
}

impl Group {
    /// The group of which `target` is a member, whichever one.
    ///
    /// # Errors
    /// `Exited` if the target ended meanwhile; what reading /proc gives.
    pub fn of(target: &Target) -> Result<Self, TargetError> {
        let root = root_of(target);
        let members = members(&root, &[])?;
        if members.is_empty() {
            return Err(TargetError::Exited(target.pid));
        }
        Ok(Self { root, members })
    }

    /// A group of one: this process alone, without its relatives.
    #[must_use]
    pub fn alone(target: &Target) -> Self {
        Self { root: target.clone(), members: vec![target.clone()] }
    }

    /// Looks again: who was born, who is gone. The root stays the group's name even after its own death, as long as
    /// members live.
    ///
    /// # Errors
    /// `Exited` once no member is left; what reading /proc gives.
    pub fn refresh(&mut self) -> Result<Changes, TargetError> {
        let now = members(&self.root, &self.members)?;
        let key = |t: &Target| (t.pid, t.start_ticks);
        let missing_in = |from: &[Target], other: &[Target]| -> Vec<i32> {
            from.iter().filter(|t| !other.iter().any(|o| key(o) == key(t))).map(|t| t.pid).collect()
        };
        let changes = Changes { born: missing_in(&now, &self.members), gone: missing_in(&self.members, &now) };
        self.members = now;
        if self.members.is_empty() { Err(TargetError::Exited(self.root.pid)) } else { Ok(changes) }
    }

    /// The member with this PID.
    #[must_use]
    pub fn member(&self, pid: i32) -> Option<&Target> {
        self.members.iter().find(|m| m.pid == pid)
    }

    /// How many threads the members had when they were last looked at.
    #[must_use]
    pub fn threads(&self) -> u32 {
        self.members.iter().map(|m| m.threads).sum()
    }
}

/// The topmost ancestor that is the same program; the target itself if its parent is another.
pub(crate) fn root_of(target: &Target) -> Target {
    let mut root = target.clone();
    // A bound, not a depth anyone has: parents can change while they are walked.
    for _ in 0..1024 {
        match Target::examine(root.parent) {
            Ok(parent) if parent.same_program(&root) && parent.pid != root.pid => root = parent,
            _ => break,
        }
    }
    root
}

/// The live processes of the root's program: its descendants, the descendants of `known` members (whose own parents may
/// have ended), and, for those that were orphaned before anyone looked, the members of the root's session.
fn members(root: &Target, known: &[Target]) -> Result<Vec<Target>, TargetError> {
    let all: HashMap<i32, Target> = all_pids()?
        .into_iter()
        .filter(|&pid| pid != std::process::id() as i32)
        .filter_map(|pid| Target::examine(pid).ok())
        .map(|t| (t.pid, t))
        .collect();
    let is_known = |t: &Target| known.iter().chain([root]).any(|k| (k.pid, k.start_ticks) == (t.pid, t.start_ticks));
    let descends = |t: &Target| {
        let mut at = t;
        for _ in 0..1024 {
            if is_known(at) {
                return true;
            }
            match all.get(&at.parent) {
                Some(parent) => at = parent,
                None => return false,
            }
        }
        false
    };
    let mut members: Vec<Target> =
        all.values().filter(|t| t.same_program(root) && (t.session == root.session || descends(t))).cloned().collect();
    members.sort_unstable_by_key(|t| t.pid);
    Ok(members)
}
