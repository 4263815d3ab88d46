//! What `-p` names, and how processes and groups are called when they are shown.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use dyni_applier::{ApplyError, State};
use dyni_collector::{ErrorKind, Group, RecordError, Target, TargetError};
use serde::{Serialize, Serializer};

use crate::errors::Failure;

/// How many processes of a program are counted or compared at most: of hundreds of alike workers a few tell as much, and
/// what is put into a process for that may stay mapped.
const FEW: usize = 8;
/// How long it is looked which ones are busy.
const BUSY_WINDOW: Duration = Duration::from_millis(100);

/// The processes of a program that stand for all: its root and the busiest ones.
pub fn few_of(group: &Group) -> Group {
    group.busiest(FEW, BUSY_WINDOW)
}

/// The group that a PID or a name means.
///
/// # Errors
/// There is no such process, or it can't be a target.
pub fn find(spec: &str) -> Result<Group, Failure> {
    let target = Target::find(spec)?;
    Ok(Group::of(&target)?)
}

/// The members in the order in which they are changed: the root first, so that a child that is born meanwhile inherits.
pub fn root_first(group: &Group) -> Vec<Target> {
    let (mut first, rest): (Vec<_>, Vec<_>) = group.members.iter().cloned().partition(|m| m.pid == group.root.pid);
    first.extend(rest);
    first
}

/// How often a group is looked at again for children that were forked while others were changed.
pub const ROUNDS: usize = 16;

/// The members that are new since the group was last looked at, in the order in which they are changed.
pub fn born(group: &mut Group) -> Result<Vec<Target>, TargetError> {
    let changes = group.refresh()?;
    Ok(root_first(group).into_iter().filter(|m| changes.born.contains(&m.pid)).collect())
}

/// Whether a member of a group failed because it has ended or is about to: it is no part of the program any more.
pub fn has_ended(member: &Target, e: &ApplyError) -> bool {
    // The kernel takes a process's memory away before it calls it a zombie: then only the error tells.
    e.is_death() || !member.still_there()
}

fn of_kind(kind: ErrorKind, text: &dyn fmt::Display) -> Failure {
    // Their texts are whole sentences already: what happened, why, what to do.
    match kind {
        ErrorKind::Failed => Failure::failed(text.to_string(), ""),
        ErrorKind::Usage => Failure::usage(text.to_string(), ""),
        ErrorKind::Refused => Failure::refused(text.to_string(), ""),
    }
}

/// What an unfit target means here: 2 is for command lines that make no sense whatever runs on the host.
fn kind_of_target(e: &TargetError) -> ErrorKind {
    match e {
        TargetError::NoSuchProcess(_) | TargetError::NoSuchName(_) => ErrorKind::Failed,
        TargetError::Ourselves(_) => ErrorKind::Refused,
        _ => e.kind(),
    }
}

impl From<TargetError> for Failure {
    fn from(e: TargetError) -> Self {
        of_kind(kind_of_target(&e), &e)
    }
}

impl From<RecordError> for Failure {
    fn from(e: RecordError) -> Self {
        match &e {
            RecordError::Target(inner) => of_kind(kind_of_target(inner), &e),
            _ => of_kind(e.kind(), &e),
        }
    }
}

impl From<ApplyError> for Failure {
    fn from(e: ApplyError) -> Self {
        match &e {
            ApplyError::Target(inner) => of_kind(kind_of_target(inner), &e),
            _ if e.is_refusal() => of_kind(ErrorKind::Refused, &e),
            _ => of_kind(ErrorKind::Failed, &e),
        }
    }
}

/// A state as its word, in text and in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateWord(pub State);

impl fmt::Display for StateWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name())
    }
}

impl Serialize for StateWord {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.name())
    }
}

/// The state of a program from the states of its processes.
pub fn combined(states: impl IntoIterator<Item = State>) -> State {
    let mut states = states.into_iter();
    let first = states.next().unwrap_or(State::Undynimized);
    if states.all(|state| state == first) { first } else { State::PartlyDynimized }
}

/// The line that says how a program is: `mariadbd, pid: 8375, dynimized`, or for several processes
/// `nginx, parent pid 11468 and its children, dynimized`.
pub fn state_line(name: &str, pid: i32, processes: usize, state: &str) -> String {
    match processes {
        0 | 1 => format!("{name}, pid: {pid}, {state}"),
        _ => format!("{name}, parent pid {pid} and its children, {state}"),
    }
}

/// A reason for which functions or patches were left out, and how many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// One line for people.
    pub reason: String,
    /// How many.
    pub count: u64,
}

impl Refused {
    /// From the applier's pairs, the most frequent first.
    pub fn of(pairs: &[(String, u32)]) -> Vec<Self> {
        Self::summed(pairs.iter().map(|(reason, count)| (reason.clone(), u64::from(*count))))
    }

    /// Each reason once, the most frequent first.
    pub fn summed(pairs: impl IntoIterator<Item = (String, u64)>) -> Vec<Self> {
        let mut sums: BTreeMap<String, u64> = BTreeMap::new();
        for (reason, count) in pairs {
            *sums.entry(reason).or_default() += count;
        }
        let mut all: Vec<_> = sums.into_iter().map(|(reason, count)| Self { reason, count }).collect();
        all.sort_by_key(|r| std::cmp::Reverse(r.count));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_dynimizes() {
        assert_eq!(state_line("mariadbd", 8375, 1, "dynimized"), "mariadbd, pid: 8375, dynimized");
        assert_eq!(state_line("nginx", 11468, 3, "dynimized"), "nginx, parent pid 11468 and its children, dynimized");
    }

    #[test]
    fn a_group_is_what_all_its_members_are() {
        use State::{Dynimized, PartlyDynimized, Undynimized};
        assert_eq!(combined([Dynimized, Dynimized]), Dynimized);
        assert_eq!(combined([Dynimized, Undynimized]), PartlyDynimized);
        assert_eq!(combined([]), Undynimized);
    }

    #[test]
    fn a_member_without_memory_has_ended_though_it_is_no_zombie_yet() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let alive = Target::by_pid(pid).unwrap();
        assert!(has_ended(&alive, &ApplyError::Target(TargetError::Exited(pid))));
        assert!(!has_ended(&alive, &ApplyError::Locked(pid)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&alive, &ApplyError::Locked(pid)));
    }

    #[test]
    fn exit_statuses_follow_the_libraries() {
        use crate::errors::Status;
        assert_eq!(Failure::from(TargetError::NoSuchProcess(7)).status(), Status::Failed);
        assert_eq!(Failure::from(TargetError::KernelThread { pid: 2, name: "k".into() }).status(), Status::Refused);
        assert_eq!(Failure::from(RecordError::TargetExited).status(), Status::Failed);
        assert_eq!(Failure::from(ApplyError::Locked(7)).status(), Status::Refused);
        assert_eq!(Failure::from(ApplyError::Target(TargetError::Ourselves(7))).status(), Status::Refused);
        let ambiguous = TargetError::Ambiguous { name: "x".into(), processes: Vec::new() };
        assert_eq!(Failure::from(ambiguous).status(), Status::Usage);
    }

    #[test]
    fn the_most_frequent_reason_comes_first() {
        let refused = Refused::of(&[("a".into(), 3), ("b".into(), 5), ("a".into(), 1)]);
        let wanted = [("b", 5), ("a", 4)].map(|(reason, count)| Refused { reason: reason.into(), count });
        assert_eq!(refused, wanted);
    }
}
