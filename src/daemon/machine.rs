//! What is to be done with which program, and what it is called meanwhile. Pure: time comes in as a number, work goes out
//! as [`Action`]s, and what came of it comes back as an [`Outcome`].
//!
//! ```text
//!     waiting → profiling → dynimizing → dynimized ⇄ (drift) profiling …
//!        └── reuse ───────────┘     └→ undynimized: it did not pay, was refused, or a user has undone it
//! ```
//!
//! A program is one `execve` and what was forked from it. Everything about one is forgotten when it ends; that it was
//! undone, or does not pay, is kept beside the socket for the next daemon ([`Machine::held`]), and that it is dynimized
//! stands in the program itself.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::drift::{Drift, Watch};
use crate::config::Limit;
use crate::targets::state_line;

/// The longest pause before something that failed is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// One program for good: PIDs come again, and a process may call `execve` again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// The PID of its first process.
    pub pid: i32,
    /// When that started, clock ticks since boot.
    pub start_ticks: u64,
    /// Where `execve` has put its code and its stack; 0 where that is hidden.
    pub layout: (u64, u64),
}

/// What a program is, in Dynimize's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is too young, does too little, or others are before it.
    Waiting,
    /// It is being recorded.
    Profiling,
    /// Code is being made for it and put into it, and it is measured whether that pays.
    Dynimizing,
    /// It runs in that code.
    Dynimized,
    /// It runs as it was, and is left alone.
    Undynimized,
    /// Some of its processes, or some of its code.
    #[serde(rename = "partly dynimized")]
    PartlyDynimized,
}

impl State {
    /// All of them, in the order of a program's life.
    pub const ALL: [Self; 6] =
        [Self::Waiting, Self::Profiling, Self::Dynimizing, Self::Dynimized, Self::Undynimized, Self::PartlyDynimized];

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Profiling => "profiling",
            Self::Dynimizing => "dynimizing",
            Self::Dynimized => "dynimized",
            Self::Undynimized => "undynimized",
            Self::PartlyDynimized => "partly dynimized",
        }
    }
}

/// A program as it was just seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sighting {
    /// Which.
    pub id: Id,
    /// The base name of its executable.
    pub name: String,
    /// Whose it is.
    pub uid: u32,
    /// How many processes it has.
    pub processes: usize,
    /// How long ago it was started.
    pub age: Duration,
    /// How much of one processor it has used since it was last looked at, percent; `None` the first time.
    pub cpu_percent: Option<f64>,
    /// What it takes to be worth the work.
    pub limit: Limit,
}

/// What the ledgers in a program say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Found {
    /// Nothing is in force.
    Nothing,
    /// It is dynimized, with the gain that was measured.
    Dynimized(Option<f64>),
    /// A dyni has left it half-way, or another one is at work.
    Partly,
}

/// A piece of work, done by a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Apply the newest plan of the archive for its builds.
    Reuse,
    /// Record, analyze, apply, check.
    Optimize {
        /// For how long it is recorded.
        window: Duration,
    },
    /// Take out what is in force.
    Undo,
    /// See where a dynimized program spends its time.
    Watch,
}

/// What the machine wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin this; one [`Machine::finished`] is owed for it.
    Run(Id, Job),
    /// End what was begun.
    Kill(Id),
}

/// What a user has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Take it out and leave the program alone.
    Undo {
        /// Who.
        uid: u32,
    },
    /// Do it anew.
    Redo,
}

/// How a job has ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It did its work.
    Done(Report),
    /// There is no plan for what the program runs.
    NoPlan,
    /// It did not work; the text says why.
    Failed(String),
    /// It was refused, and would be again.
    Refused(String),
    /// It was killed.
    Killed,
}

/// What a job has found out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Whether anything was left out of the program's processes.
    pub partly: bool,
    /// Whether it was taken out again because it does not pay.
    pub taken_out: bool,
    /// Work per CPU time, divided by that of the original code, if it was measured.
    pub gain: Option<f64>,
    /// The longest stop of a process, ns.
    pub stop_ns: u64,
    /// Functions that were left out.
    pub refused: u64,
    /// What a watch has seen.
    pub watch: Option<Watch>,
}

/// A program.
#[derive(Clone, Debug)]
pub struct Program {
    /// As it was last seen.
    pub seen: Sighting,
    /// What it is.
    pub state: State,
    /// Since when.
    pub since: Duration,
    /// Why, where that is not plain.
    pub reason: String,
    /// What it gains.
    pub gain: Option<f64>,
    /// The longest stop of the newest change, ns.
    pub stop_ns: u64,
    /// Functions that were left out.
    pub refused: u64,
    /// How far it has moved from what it was optimised for.
    pub drift: Drift,
    job: Option<Job>,
    wish: Option<Wish>,
    /// Whether the archive is still to be asked for a plan.
    reuse: bool,
    /// Whether what is half done is to be put right.
    repair: bool,
    tries: u32,
    not_before: Duration,
    watch_at: Duration,
    seen_at: Duration,
}

/// What the machine goes by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// How many programs are profiled or dynimized at once.
    pub n_programs: usize,
    /// Whether drift leads to a new optimisation.
    pub reoptimize: bool,
    /// How long after one watch comes the next.
    pub watch_every: Duration,
}

/// All programs.
#[derive(Debug)]
pub struct Machine {
    /// What it goes by; may change at any time.
    pub rules: Rules,
    programs: BTreeMap<Id, Program>,
    changes: Vec<String>,
}

impl Machine {
    /// Without any program.
    pub fn new(rules: Rules) -> Self {
        Self { rules, programs: BTreeMap::new(), changes: Vec::new() }
    }

    /// The programs by PID.
    pub fn programs(&self) -> impl Iterator<Item = &Program> {
        self.programs.values()
    }

    /// One of them.
    pub fn program(&self, id: &Id) -> Option<&Program> {
        self.programs.get(id)
    }

    /// What has changed since this was last asked, a line each, for the log.
    pub fn take_changes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.changes)
    }

    /// Programs that are to be left alone, and why, for the next daemon.
    pub fn held(&self) -> impl Iterator<Item = (&Id, &str)> {
        let held = self.programs.iter().filter(|(_, p)| p.state == State::Undynimized && p.job.is_none());
        held.map(|(id, p)| (id, p.reason.as_str()))
    }

    /// All programs that run now. `found` is asked about each that is new: what its ledgers say, and why it is held, if so.
    pub fn seen(
        &mut self,
        now: Duration,
        all: Vec<Sighting>,
        mut found: impl FnMut(&Sighting) -> (Found, Option<String>),
    ) {
        let gone: Vec<Id> = self.programs.keys().filter(|id| !all.iter().any(|s| s.id == **id)).copied().collect();
        for id in gone {
            let program = self.programs.remove(&id).expect("it was listed a moment ago");
            self.changes.push(format!("{}, pid: {}, has ended or is no longer listed", program.seen.name, id.pid));
        }
        for sighting in all {
            match self.programs.get_mut(&sighting.id) {
                Some(known) => {
                    known.seen_at = now;
                    known.seen = sighting;
                }
                None => {
                    let (found, held) = found(&sighting);
                    self.add(now, sighting, found, held);
                }
            }
        }
    }

    fn add(&mut self, now: Duration, seen: Sighting, found: Found, held: Option<String>) {
        let id = seen.id;
        let (state, reason) = match (found, held) {
            (Found::Nothing, None) => (State::Waiting, String::new()),
            (Found::Nothing, Some(why)) => (State::Undynimized, why),
            (Found::Dynimized(_), _) => (State::Dynimized, "it was so before this daemon".to_owned()),
            (Found::Partly, _) => (State::PartlyDynimized, "another dyni was or is at work on it".to_owned()),
        };
        let program = Program {
            state,
            since: now,
            reason,
            gain: if let Found::Dynimized(gain) = found { gain } else { None },
            stop_ns: 0,
            refused: 0,
            drift: Drift::default(),
            job: None,
            wish: None,
            reuse: state == State::Waiting,
            repair: found == Found::Partly,
            tries: 0,
            not_before: if found == Found::Partly { now + seen.limit.delay } else { now },
            watch_at: now + self.rules.watch_every,
            seen_at: now,
            seen,
        };
        self.changes.push(program.line());
        self.programs.insert(id, program);
    }

    /// What the ledgers of a program say now, which another dyni may have changed.
    pub fn found(&mut self, now: Duration, id: &Id, found: Found) {
        let Some(p) = self.programs.get_mut(id).filter(|p| p.job.is_none()) else { return };
        match (p.state, found) {
            (State::Dynimized | State::PartlyDynimized, Found::Nothing) => {
                p.repair = false;
                p.become_state(now, State::Undynimized, "taken out by another dyni; `dyni redo` does it anew");
            }
            // A program with processes that were left alone looks dynimized in its first one.
            (State::PartlyDynimized, Found::Dynimized(_)) if !p.repair => return,
            (State::Waiting | State::Undynimized | State::PartlyDynimized, Found::Dynimized(gain)) => {
                p.repair = false;
                p.gain = gain;
                p.drift = Drift::default();
                p.watch_at = now + self.rules.watch_every;
                p.become_state(now, State::Dynimized, "by another dyni");
            }
            (State::Waiting | State::Undynimized, Found::Partly) => {
                p.repair = true;
                p.not_before = now + p.seen.limit.delay;
                p.become_state(now, State::PartlyDynimized, "another dyni was or is at work on it");
            }
            _ => return,
        }
        self.changes.push(p.line());
    }

    /// Everything was taken out of a program that nothing is being done to, by order of a user; it is left alone then. One
    /// that waits goes on waiting: there was nothing to take out.
    pub fn undone(&mut self, now: Duration, id: &Id, uid: u32) {
        let Some(p) = self.programs.get_mut(id).filter(|p| p.job.is_none() && p.state != State::Waiting) else {
            return;
        };
        (p.gain, p.repair, p.wish) = (None, false, None);
        p.become_state(now, State::Undynimized, &undone_by(uid));
        self.changes.push(p.line());
    }

    /// Takes up a user's wish; what comes of it is in the program's state.
    pub fn ask(&mut self, now: Duration, id: &Id, wish: Wish) {
        let Some(p) = self.programs.get_mut(id) else { return };
        match (wish, p.job) {
            // That is what it is doing.
            (Wish::Redo, Some(Job::Optimize { .. })) => {}
            _ => p.wish = Some(wish),
        }
        p.tries = 0;
        p.not_before = now;
    }

    /// A job's word about how far it is.
    pub fn phase(&mut self, now: Duration, id: &Id, state: State) {
        let Some(p) = self.programs.get_mut(id) else { return };
        if matches!(p.job, Some(Job::Optimize { .. })) && p.state != state {
            p.become_state(now, state, "");
            self.changes.push(p.line());
        }
    }

    /// A job has ended.
    pub fn finished(&mut self, now: Duration, id: &Id, outcome: &Outcome) {
        let Some(p) = self.programs.get_mut(id) else { return };
        let Some(job) = p.job.take() else { return };
        let before = (p.state, p.reason.clone());
        let watch_at = now + self.rules.watch_every;
        match (job, outcome) {
            (Job::Watch, Outcome::Done(report)) => {
                p.watch_at = watch_at;
                if let Some(watch) = &report.watch {
                    p.drift.add(watch);
                }
            }
            // A program that idles can't be watched, and is as good as it was.
            (Job::Watch, _) => p.watch_at = watch_at,
            (Job::Undo, Outcome::Done(_)) => {
                p.gain = None;
                match (p.repair, p.wish) {
                    (_, Some(Wish::Undo { uid })) => {
                        p.wish = None;
                        p.become_state(now, State::Undynimized, &undone_by(uid));
                    }
                    // What was left half-way is out: it is a program like any other.
                    _ => p.become_state(now, State::Waiting, ""),
                }
                p.repair = false;
            }
            (Job::Undo, Outcome::Failed(why) | Outcome::Refused(why)) => {
                p.wish = None;
                p.repair = true;
                p.become_state(now, State::PartlyDynimized, why);
                p.pause(now);
            }
            (Job::Reuse, Outcome::Done(report)) => {
                p.take(now, report);
                p.reason = "with the plan of the archive".to_owned();
                // Whether that plan is still the right one is looked into at once.
                p.watch_at = now;
                p.drift.of_archive = true;
            }
            // Then it is recorded like any other.
            (Job::Reuse, Outcome::NoPlan | Outcome::Failed(_) | Outcome::Refused(_)) => {
                let why = if let Outcome::Failed(why) | Outcome::Refused(why) = outcome { why.as_str() } else { "" };
                p.become_state(now, State::Waiting, why);
            }
            (Job::Optimize { .. }, Outcome::Done(report)) => {
                p.tries = 0;
                p.watch_at = watch_at;
                p.take(now, report);
            }
            (Job::Optimize { .. }, Outcome::Refused(why)) => p.become_state(now, State::Undynimized, why),
            (Job::Optimize { .. }, Outcome::Failed(why)) => {
                p.become_state(now, State::Waiting, why);
                p.pause(now);
            }
            // What a job has left that did not come to its end is taken out, whatever it is.
            (Job::Reuse | Job::Optimize { .. } | Job::Undo, Outcome::Killed | Outcome::NoPlan) => {
                p.repair = true;
                p.not_before = now;
                p.become_state(now, State::PartlyDynimized, "interrupted half-way");
            }
        }
        if before != (p.state, p.reason.clone()) {
            self.changes.push(p.line());
        }
    }

    /// What is to be begun or ended now.
    pub fn due(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        let mut slots =
            self.rules.n_programs.saturating_sub(self.programs.values().filter(|p| p.takes_a_slot()).count());
        let mut watching = self.programs.values().any(|p| p.job == Some(Job::Watch));
        let mut order: Vec<Id> = self.programs.keys().copied().collect();
        // Whoever a user has asked for comes first, then the busiest.
        let rank = |p: &Program| (p.wish.is_none(), -(p.seen.cpu_percent.unwrap_or(0.0) * 1000.0) as i64);
        order.sort_by_key(|id| rank(&self.programs[id]));
        for id in order {
            let p = self.programs.get_mut(&id).expect("it was listed a moment ago");
            if let Some(job) = p.job {
                if p.wish.is_some() && job != Job::Undo {
                    actions.push(Action::Kill(id));
                }
                continue;
            }
            let Some(job) = p.wanted(now, self.rules) else { continue };
            match job {
                Job::Undo => {}
                Job::Watch if watching => continue,
                Job::Watch => watching = true,
                Job::Reuse | Job::Optimize { .. } if slots == 0 => continue,
                Job::Reuse | Job::Optimize { .. } => slots -= 1,
            }
            let before = p.state;
            p.begin(now, job);
            if p.state != before {
                self.changes.push(p.line());
            }
            actions.push(Action::Run(id, job));
        }
        actions
    }

    /// When [`Machine::due`] may have something next that does not come of any event, at the earliest.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        let idle = self.programs.values().filter(|p| p.job.is_none());
        let each = idle.filter_map(|p| match p.state {
            State::Waiting => Some(p.not_before.max(p.seen_at + p.seen.limit.delay.saturating_sub(p.seen.age))),
            State::Dynimized => Some(p.watch_at),
            State::PartlyDynimized if p.repair => Some(p.not_before),
            _ => None,
        });
        each.filter(|at| *at > now).min()
    }
}

impl Program {
    /// The line that says what it is.
    pub fn line(&self) -> String {
        let line = state_line(&self.seen.name, self.seen.id.pid, self.seen.processes, self.state.name());
        let gain = self.gain.filter(|_| self.state == State::Dynimized).map(|g| format!("gain {g:.3}"));
        let reason = Some(self.reason.clone()).filter(|r| !r.is_empty());
        let more: Vec<_> = gain.into_iter().chain(reason).collect();
        if more.is_empty() { line } else { format!("{line} ({})", more.join(", ")) }
    }

    /// What it is being worked on for.
    pub const fn job(&self) -> Option<Job> {
        self.job
    }

    /// Whether nothing more is to come unless something changes.
    pub fn is_settled(&self) -> bool {
        self.job.is_none() && matches!(self.state, State::Dynimized | State::Undynimized)
    }

    const fn takes_a_slot(&self) -> bool {
        matches!(self.job, Some(Job::Reuse | Job::Optimize { .. }))
    }

    fn become_state(&mut self, now: Duration, state: State, reason: &str) {
        if self.state != state {
            self.since = now;
        }
        self.state = state;
        reason.clone_into(&mut self.reason);
    }

    /// Waits before the next try, twice as long each time.
    fn pause(&mut self, now: Duration) {
        let pause = self.seen.limit.delay.max(Duration::from_secs(1)) * (1 << self.tries.min(12));
        self.tries += 1;
        self.not_before = now + pause.min(LONGEST_PAUSE);
    }

    /// What a job has made of it.
    fn take(&mut self, now: Duration, report: &Report) {
        self.gain = report.gain.filter(|_| !report.taken_out);
        (self.stop_ns, self.refused) = (report.stop_ns, report.refused);
        self.drift = Drift::default();
        match (report.taken_out, report.partly) {
            (true, _) => {
                let gain = report.gain.map_or_else(String::new, |g| format!(": gain {g:.3}"));
                self.become_state(now, State::Undynimized, &format!("it did not pay and was taken out{gain}"));
            }
            (false, true) => self.become_state(now, State::PartlyDynimized, "some of its processes were left alone"),
            (false, false) => self.become_state(now, State::Dynimized, ""),
        }
    }

    fn age(&self, now: Duration) -> Duration {
        self.seen.age + now.saturating_sub(self.seen_at)
    }

    /// What should be done with it, if there is room.
    fn wanted(&self, now: Duration, rules: Rules) -> Option<Job> {
        let optimize = Job::Optimize { window: self.seen.limit.window };
        match self.wish {
            Some(Wish::Undo { .. }) => return Some(Job::Undo),
            Some(Wish::Redo) => return Some(if self.repair { Job::Undo } else { optimize }),
            None if now < self.not_before => return None,
            None => {}
        }
        match self.state {
            State::Waiting if self.age(now) < self.seen.limit.delay => None,
            State::Waiting if self.reuse => Some(Job::Reuse),
            State::Waiting => self.seen.cpu_percent.is_some_and(|p| p >= self.seen.limit.cpu_usage).then_some(optimize),
            // A plan of the archive that does not fit was made for other work: that is no re-optimisation.
            State::Dynimized if self.drift.is_far() && (rules.reoptimize || self.drift.of_archive) => Some(optimize),
            State::Dynimized => (now >= self.watch_at).then_some(Job::Watch),
            State::PartlyDynimized => self.repair.then_some(Job::Undo),
            _ => None,
        }
    }

    fn begin(&mut self, now: Duration, job: Job) {
        self.job = Some(job);
        match job {
            Job::Reuse => {
                self.reuse = false;
                self.become_state(now, State::Dynimizing, "with the plan of the archive");
            }
            Job::Optimize { .. } => {
                (self.reuse, self.gain) = (false, None);
                if self.wish == Some(Wish::Redo) {
                    self.wish = None;
                }
                self.become_state(now, State::Profiling, "");
            }
            Job::Undo | Job::Watch => {}
        }
    }
}

fn undone_by(uid: u32) -> String {
    let who = if uid == 0 { "root".to_owned() } else { format!("user {uid}") };
    format!("undone by {who}; `dyni redo` does it anew")
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
