//! A process group: the processes that are one program.
//!
//! A postmaster and its backends, a web server's master and its workers: one executable, one `execve`, then forks. They
//! share a profile and a plan. Membership is decided by two facts: the same main executable (device and inode), and the
//! same layout (`execve` places stack and code at random, `fork` keeps the places). The second keeps a login shell out of
//! the group of a script that the same shell binary runs.

use crate::cpu_time::cpu_time;
use crate::target::{Target, TargetError, all_pids};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::Duration;

/// One program: a root process and everything forked from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The topmost process of the program.
    pub root: Target,
    /// Every live process of the program, the root included, by rising PID.
    pub members: Vec<Target>,
    /// Processes of the program that are left out ([`Group::busiest`]).
    aside: Vec<Target>,
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
        Ok(Self { root, members, aside: Vec::new() })
    }

    /// The programs that these processes make up, by rising PID of their roots: the same question as [`Group::of`], for
    /// whoever knows already which processes matter. A process whose parent is not among them belongs to a program of the
    /// same `execve` in its session.
    #[must_use]
    pub fn all_of(mut processes: Vec<Target>) -> Vec<Self> {
        // A parent has a lower start time than its children, and is looked at before them.
        processes.sort_by_key(|t| (t.start_ticks, t.pid));
        let mut groups: Vec<Self> = Vec::new();
        for process in processes {
            let belongs = |g: &&mut Self| {
                let kin = |m: &Target| m.pid == process.parent || m.session == process.session;
                g.root.same_program(&process) && g.members.iter().any(kin)
            };
            match groups.iter_mut().find(belongs) {
                Some(group) => group.members.push(process),
                None => groups.push(Self::alone(&process)),
            }
        }
        for group in &mut groups {
            group.members.sort_unstable_by_key(|t| t.pid);
        }
        groups.sort_unstable_by_key(|g| g.root.pid);
        groups
    }

    /// A group of one: this process alone, without its relatives.
    #[must_use]
    pub fn alone(target: &Target) -> Self {
        Self { root: target.clone(), members: vec![target.clone()], aside: Vec::new() }
    }

    /// The same program without all but `count` of its processes: the root, whose children are to come, and those that
    /// use the most processor time during `window`. Whoever is born later belongs to it.
    #[must_use]
    pub fn busiest(&self, count: usize, window: Duration) -> Self {
        let mut busiest = self.clone();
        if self.members.len() <= count {
            return busiest;
        }
        let used = || self.members.iter().map(|m| cpu_time(m.pid).unwrap_or_default()).collect::<Vec<_>>();
        let before = used();
        std::thread::sleep(window);
        let used: Vec<_> = used().iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect();
        let mut order: Vec<usize> = (0..self.members.len()).collect();
        order.sort_by_key(|&i| (self.members[i].pid != self.root.pid, Reverse(used[i]), self.members[i].pid));
        busiest.aside.extend(order.split_off(count).into_iter().map(|i| self.members[i].clone()));
        busiest.members.retain(|m| !busiest.aside.contains(m));
        busiest
    }

    /// Looks again: who was born, who is gone. The root stays the group's name even after its own death, as long as
    /// members live.
    ///
    /// # Errors
    /// `Exited` once no member is left; what reading /proc gives.
    pub fn refresh(&mut self) -> Result<Changes, TargetError> {
        let known: Vec<Target> = self.members.iter().chain(&self.aside).cloned().collect();
        let mut now = members(&self.root, &known)?;
        let key = |t: &Target| (t.pid, t.start_ticks);
        self.aside.retain(|a| now.iter().any(|t| key(t) == key(a)));
        now.retain(|t| !self.aside.iter().any(|a| key(a) == key(t)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::FileId;

    fn process(pid: i32, parent: i32, session: i32, layout: u64) -> Target {
        Target {
            pid,
            parent,
            session,
            exe: "/usr/sbin/nginx".into(),
            exe_deleted: false,
            exe_id: FileId { dev: (0, 1), inode: 2 },
            name: "nginx".into(),
            start_ticks: pid as u64,
            uid: 0,
            threads: 1,
            state: 'S',
            layout: (layout, layout),
        }
    }

    #[test]
    fn processes_make_up_programs() {
        let pids = |g: &Group| (g.root.pid, g.members.iter().map(|m| m.pid).collect::<Vec<_>>());
        let all = vec![
            process(23, 10, 23, 1), // a backend: its own session, a child of the root
            process(10, 1, 10, 1),
            process(40, 1, 10, 1),  // an orphan in the root's session
            process(50, 23, 50, 1), // a grandchild
            process(60, 10, 10, 2), // another execve, though forked from it
            process(70, 1, 70, 1),  // the same places by chance, or without randomisation, and no kin
        ];
        let groups = Group::all_of(all);
        let wanted = [(10, vec![10, 23, 40, 50]), (60, vec![60]), (70, vec![70])];
        assert_eq!(groups.iter().map(pids).collect::<Vec<_>>(), wanted);
    }
}
