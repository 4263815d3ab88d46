//! A fake clock and a fake host.

use super::*;

const S: Duration = Duration::from_secs(1);

fn limit() -> Limit {
    Limit { window: 90 * S, delay: 60 * S, cpu_usage: 10.0 }
}

fn id(pid: i32) -> Id {
    Id { pid, start_ticks: 1, layout: (0, 0) }
}

fn sighting(pid: i32, age: u32, cpu: f64) -> Sighting {
    Sighting {
        id: id(pid),
        name: "mariadbd".into(),
        uid: 1000,
        processes: 1,
        age: age * S,
        cpu_percent: Some(cpu),
        limit: limit(),
    }
}

fn machine() -> Machine {
    Machine::new(Rules { n_programs: 1, reoptimize: false, watch_every: 300 * S })
}

fn see(m: &mut Machine, now: u32, all: &[Sighting]) {
    m.seen(now * S, all.to_vec(), |_| (Found::Nothing, None));
}

fn state(m: &Machine, pid: i32) -> State {
    m.program(&id(pid)).unwrap().state
}

fn done(report: Report) -> Outcome {
    Outcome::Done(report)
}

const OPTIMIZE: Job = Job::Optimize { window: Duration::from_secs(90) };

/// A program that is dynimized at `now` seconds.
fn dynimized(m: &mut Machine, now: u32, pid: i32) {
    see(m, now, &[sighting(pid, 70, 50.0)]);
    assert_eq!(m.due(now * S), [Action::Run(id(pid), Job::Reuse)]);
    m.finished(now * S, &id(pid), &Outcome::NoPlan);
    assert_eq!(m.due(now * S), [Action::Run(id(pid), OPTIMIZE)]);
    m.finished(now * S, &id(pid), &done(Report { gain: Some(1.07), ..Report::default() }));
    assert_eq!(state(m, pid), State::Dynimized);
}

#[test]
fn the_life_of_the_manual() {
    let mut m = machine();
    see(&mut m, 0, &[sighting(7, 10, 50.0)]);
    assert_eq!(m.due(Duration::ZERO), []);
    assert_eq!(m.next(Duration::ZERO), Some(50 * S));
    assert_eq!(m.due(49 * S), []);
    assert_eq!(m.due(50 * S), [Action::Run(id(7), Job::Reuse)]);
    m.finished(51 * S, &id(7), &Outcome::NoPlan);
    assert_eq!(m.due(51 * S), [Action::Run(id(7), OPTIMIZE)]);
    assert_eq!(state(&m, 7), State::Profiling);
    m.phase(141 * S, &id(7), State::Dynimizing);
    assert_eq!(state(&m, 7), State::Dynimizing);
    m.finished(150 * S, &id(7), &done(Report { gain: Some(1.0712), ..Report::default() }));
    let said = m.take_changes();
    let wanted = [
        "mariadbd, pid: 7, waiting",
        "mariadbd, pid: 7, dynimizing (with the plan of the archive)",
        "mariadbd, pid: 7, waiting",
        "mariadbd, pid: 7, profiling",
        "mariadbd, pid: 7, dynimizing",
        "mariadbd, pid: 7, dynimized (gain 1.071)",
    ];
    assert_eq!(said, wanted);
    see(&mut m, 160, &[]);
    assert_eq!(m.take_changes(), ["mariadbd, pid: 7, has ended or is no longer listed"]);
}

#[test]
fn too_little_work_is_not_worth_it() {
    let mut m = machine();
    see(&mut m, 0, &[sighting(7, 70, 9.9)]);
    assert_eq!(m.due(Duration::ZERO), [Action::Run(id(7), Job::Reuse)]);
    m.finished(Duration::ZERO, &id(7), &Outcome::NoPlan);
    assert_eq!(m.due(S), []);
    see(&mut m, 10, &[sighting(7, 80, 10.0)]);
    assert_eq!(m.due(10 * S), [Action::Run(id(7), OPTIMIZE)]);
}

#[test]
fn so_many_at_once_and_the_busiest_first() {
    let mut m = machine();
    let all = [sighting(7, 70, 20.0), sighting(8, 70, 90.0), sighting(9, 70, 50.0)];
    see(&mut m, 0, &all);
    for pid in [8, 9, 7] {
        let mut actions = m.due(Duration::ZERO);
        actions.retain(|a| !matches!(a, Action::Run(_, Job::Watch)));
        assert_eq!(actions, [Action::Run(id(pid), Job::Reuse)]);
        assert_eq!(m.due(Duration::ZERO), []);
        m.finished(Duration::ZERO, &id(pid), &done(Report::default()));
    }
    let mut m = machine();
    m.rules.n_programs = 2;
    see(&mut m, 0, &all);
    assert_eq!(m.due(Duration::ZERO).len(), 2);
}

#[test]
fn a_plan_of_the_archive_is_looked_at_at_once() {
    let mut m = machine();
    see(&mut m, 0, &[sighting(7, 70, 0.0)]);
    m.due(Duration::ZERO);
    m.finished(S, &id(7), &done(Report::default()));
    assert_eq!(m.due(S), [Action::Run(id(7), Job::Watch)]);
    assert_eq!(state(&m, 7), State::Dynimized);
    // It was made for other work.
    let misfit = Watch { samples: 1000, in_cache: 100, ..Watch::default() };
    m.finished(5 * S, &id(7), &done(Report { watch: Some(misfit), ..Report::default() }));
    assert_eq!(m.due(5 * S), [Action::Run(id(7), OPTIMIZE)]);
}

#[test]
fn drift_leads_to_a_new_optimisation_only_if_that_is_wanted() {
    for reoptimize in [false, true] {
        let mut m = machine();
        m.rules.reoptimize = reoptimize;
        dynimized(&mut m, 0, 7);
        for (n, in_cache) in (1..).zip([900, 300, 300]) {
            let now = 300 * n;
            assert_eq!(m.next((now - 300) * S), Some(now * S));
            assert_eq!(m.due(now * S), [Action::Run(id(7), Job::Watch)]);
            let watch = Watch { samples: 1000, in_cache, ..Watch::default() };
            m.finished(now * S, &id(7), &done(Report { watch: Some(watch), ..Report::default() }));
        }
        let wanted: &[Action] = if reoptimize { &[Action::Run(id(7), OPTIMIZE)] } else { &[] };
        assert_eq!(m.due(901 * S), wanted);
    }
}

#[test]
fn undo_holds_until_redo() {
    let mut m = machine();
    dynimized(&mut m, 0, 7);
    m.ask(S, &id(7), Wish::Undo { uid: 1000 });
    assert_eq!(m.due(S), [Action::Run(id(7), Job::Undo)]);
    m.finished(S, &id(7), &done(Report::default()));
    assert_eq!(state(&m, 7), State::Undynimized);
    assert_eq!(m.held().count(), 1);
    see(&mut m, 1000, &[sighting(7, 1070, 99.0)]);
    assert_eq!(m.due(1000 * S), []);
    m.ask(1001 * S, &id(7), Wish::Redo);
    assert_eq!(m.due(1001 * S), [Action::Run(id(7), OPTIMIZE)]);
    assert_eq!(m.held().count(), 0);
}

#[test]
fn undo_ends_what_is_under_way() {
    let mut m = machine();
    see(&mut m, 0, &[sighting(7, 70, 50.0)]);
    m.due(Duration::ZERO);
    m.finished(Duration::ZERO, &id(7), &Outcome::NoPlan);
    m.due(Duration::ZERO);
    m.ask(S, &id(7), Wish::Undo { uid: 0 });
    assert_eq!(m.due(S), [Action::Kill(id(7))]);
    m.finished(2 * S, &id(7), &Outcome::Killed);
    assert_eq!(state(&m, 7), State::PartlyDynimized);
    assert_eq!(m.due(2 * S), [Action::Run(id(7), Job::Undo)]);
    m.finished(3 * S, &id(7), &done(Report::default()));
    assert_eq!(state(&m, 7), State::Undynimized);
    assert_eq!(m.due(1000 * S), []);
}

#[test]
fn what_a_killed_job_has_left_is_taken_out_and_it_is_tried_again() {
    let mut m = machine();
    see(&mut m, 0, &[sighting(7, 70, 50.0)]);
    m.due(Duration::ZERO);
    m.finished(Duration::ZERO, &id(7), &Outcome::Killed);
    assert_eq!(m.due(Duration::ZERO), [Action::Run(id(7), Job::Undo)]);
    m.finished(S, &id(7), &done(Report::default()));
    assert_eq!(state(&m, 7), State::Waiting);
    assert_eq!(m.due(S), [Action::Run(id(7), OPTIMIZE)]);
}

#[test]
fn failures_are_tried_again_later_and_refusals_are_not() {
    let mut m = machine();
    dynimized(&mut m, 0, 7);
    let (mut now, mut pauses) = (1, Vec::new());
    m.ask(now * S, &id(7), Wish::Redo);
    for _ in 0..8 {
        assert_eq!(m.due(now * S), [Action::Run(id(7), OPTIMIZE)]);
        m.finished(now * S, &id(7), &Outcome::Failed("no samples".into()));
        let next = m.next(now * S).unwrap().as_secs() as u32;
        pauses.push(next - now);
        assert_eq!(m.due((next - 1) * S), []);
        now = next;
    }
    assert_eq!(pauses, [60, 120, 240, 480, 960, 1920, 3600, 3600]);
    m.due(now * S);
    m.finished(now * S, &id(7), &Outcome::Refused("a debugger holds it".into()));
    assert_eq!((state(&m, 7), m.next(now * S)), (State::Undynimized, None));
}

#[test]
fn what_does_not_pay_is_left_alone() {
    let mut m = machine();
    see(&mut m, 0, &[sighting(7, 70, 50.0)]);
    m.due(Duration::ZERO);
    m.finished(Duration::ZERO, &id(7), &Outcome::NoPlan);
    m.due(Duration::ZERO);
    m.finished(Duration::ZERO, &id(7), &done(Report { gain: Some(0.98), taken_out: true, ..Report::default() }));
    assert_eq!(state(&m, 7), State::Undynimized);
    assert!(m.program(&id(7)).unwrap().reason.contains("0.980"));
    assert_eq!(m.due(10_000 * S), []);
}

#[test]
fn a_daemon_picks_up_from_the_ledgers() {
    let mut m = machine();
    let all = [sighting(7, 900, 50.0), sighting(8, 900, 50.0), sighting(9, 900, 50.0)];
    m.seen(Duration::ZERO, all.to_vec(), |s| match s.id.pid {
        7 => (Found::Dynimized(Some(1.1)), None),
        8 => (Found::Nothing, Some("undone by root".into())),
        _ => (Found::Partly, None),
    });
    assert_eq!(
        (state(&m, 7), state(&m, 8), state(&m, 9)),
        (State::Dynimized, State::Undynimized, State::PartlyDynimized)
    );
    assert_eq!(m.program(&id(7)).unwrap().gain, Some(1.1));
    // Whoever may be at work on the third has a while to come to an end.
    assert_eq!(m.due(59 * S), []);
    assert_eq!(m.due(60 * S), [Action::Run(id(9), Job::Undo)]);
    m.finished(61 * S, &id(9), &done(Report::default()));
    assert_eq!(state(&m, 9), State::Waiting);
}

#[test]
fn others_may_change_a_program_too() {
    let mut m = machine();
    dynimized(&mut m, 0, 7);
    m.found(S, &id(7), Found::Dynimized(Some(1.07)));
    assert_eq!(state(&m, 7), State::Dynimized);
    m.found(S, &id(7), Found::Nothing);
    assert_eq!(state(&m, 7), State::Undynimized);
    m.found(S, &id(7), Found::Dynimized(None));
    assert_eq!(state(&m, 7), State::Dynimized);
}

#[test]
fn a_pid_that_comes_again_is_another_program() {
    let mut m = machine();
    dynimized(&mut m, 0, 7);
    let mut other = sighting(7, 0, 0.0);
    other.id.start_ticks = 2;
    see(&mut m, 10, &[other.clone()]);
    assert!(m.program(&id(7)).is_none());
    assert_eq!(m.program(&other.id).unwrap().state, State::Waiting);
    // What was owed for the one that is gone concerns nobody.
    m.finished(11 * S, &id(7), &Outcome::Killed);
    assert_eq!(m.program(&other.id).unwrap().state, State::Waiting);
}

#[test]
fn groups_are_named_as_such() {
    let mut m = machine();
    see(&mut m, 0, &[Sighting { processes: 3, name: "nginx".into(), ..sighting(11468, 0, 0.0) }]);
    assert_eq!(m.take_changes(), ["nginx, parent pid 11468 and its children, waiting"]);
}
