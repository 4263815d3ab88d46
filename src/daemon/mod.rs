//! `dyni daemon`: finds programs worth optimising, optimises them, follows their work, and gets out of the way.
//!
//! One thread waits for whatever comes first: a word on the control socket ([`server`], [`protocol`], [`requests`]), an `execve` somewhere ([`exec_events`]), a job that has something to say ([`worker`]), a signal, the time of
//! the next look at the host ([`scan`]). What to do then is decided by [`machine`], which is pure. A second thread reads ahead
//! for programs that start ([`read_ahead`]).

pub mod control;
pub mod drift;
mod exec_events;
mod held;
mod log;
mod machine;
mod metrics;
pub mod protocol;
mod read_ahead;
mod requests;
mod scan;
mod server;
mod worker;

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};

use crate::cli::DaemonArgs;
use crate::config::{Choice, Limit, Settings};
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::output::human_bytes;
use exec_events::ExecEvents;
use log::Log;
use machine::{Action, Id, Job, Machine, Outcome, Rules, State};
use metrics::Totals;
use protocol::{Contact, Reply};
use read_ahead::ReadAhead;
use requests::ran;
use scan::{Scanner, ledger_of};
use server::{Server, with_suffix};
use worker::Worker;

/// The daemon is awake at least so often.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// After so many looks at the host, ledgers and owners are read again, which may have changed.
const LOOKS_PER_LEDGER: u32 = 6;
/// How long a watch takes.
const WATCH: Duration = Duration::from_secs(5);
/// After an `execve` of interest, so long for others that come with it.
const GATHER: Duration = Duration::from_millis(100);
/// How long what was interrupted may take to be taken out at the end.
const LAST_UNDO: Duration = Duration::from_secs(20);

/// Which signals have come.
struct Signals {
    stop: Arc<AtomicBool>,
    reload: Arc<AtomicBool>,
    wake: UnixStream,
}

/// Somebody on the control socket who waits for an undo.
struct Asker {
    number: u64,
    json: bool,
}

/// `undo --all`: first what is under way is ended, then one worker undoes everything.
struct UndoAll {
    asker: Asker,
    uid: u32,
    worker: Option<Worker>,
}

struct Daemon<'a> {
    args: &'a DaemonArgs,
    file: Option<PathBuf>,
    archive: PathBuf,
    settings: Settings,
    machine: Machine,
    scanner: Scanner,
    events: Option<ExecEvents>,
    read_ahead: Option<ReadAhead>,
    server: Server,
    workers: HashMap<Id, (Job, Worker)>,
    askers: HashMap<Id, Vec<Asker>>,
    undo_all: Option<UndoAll>,
    held: (PathBuf, String),
    log: Log,
    totals: Totals,
    began: Instant,
    next_look: Instant,
    looks: u32,
    signals: Signals,
    watchdog: Option<Watchdog>,
}

/// systemd's, which ends a daemon that hangs.
struct Watchdog {
    /// How often it is fed: twice in its own time.
    every: Duration,
    fed: Option<Instant>,
}

/// Runs the daemon until it is told to end.
///
/// # Errors
/// It can't begin: the configuration is wrong, another daemon runs, the socket or the log can't be had.
pub fn run(args: &DaemonArgs, file: Option<&Path>, contact: &Contact, archive: PathBuf) -> Result<(), Failure> {
    let settings = Settings::load(file, &args.limits)?;
    if contact.roots_runs() {
        return Err(Failure::refused("start the daemon", "root's serves this host already, and your programs with it")
            .help("`dyni status` asks it"));
    }
    let socket = contact.own()?;
    let mut server = Server::open(&socket)?;
    if let Some(address) = &args.metrics {
        server.open_metrics(address)?;
    }
    let log = open_log(&settings, args.background)?;
    let signals = Signals::catch().map_err(|e| Failure::failed("catch signals", e))?;
    if args.background {
        // The one that has started it goes away, and with it maybe its terminal.
        let _ = nix::unistd::setsid();
    }
    let held = with_suffix(&socket, ".held");
    let mut daemon = Daemon {
        args,
        file: file.map(Path::to_owned),
        archive,
        machine: Machine::new(rules(&settings, args)),
        settings,
        scanner: Scanner::default(),
        events: None,
        read_ahead: None,
        server,
        workers: HashMap::new(),
        askers: HashMap::new(),
        undo_all: None,
        held: (held.clone(), String::new()),
        log,
        totals: Totals::default(),
        began: Instant::now(),
        next_look: Instant::now(),
        looks: 0,
        signals,
        watchdog: sd_notify::watchdog_enabled().map(|time| Watchdog { every: time / 2, fed: None }),
    };
    daemon.begin();
    let none = HashMap::new();
    let held = held::read(&fs::read_to_string(held).unwrap_or_default());
    // Whoever names a process wants it done.
    daemon.look(if matches!(daemon.settings.choice, Choice::Pids(_)) { &none } else { &held });
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    while !daemon.signals.stop.load(Ordering::Relaxed) && !daemon.has_done_its_task() {
        daemon.turn();
    }
    daemon.end();
    Ok(())
}

fn rules(settings: &Settings, args: &DaemonArgs) -> Rules {
    Rules { n_programs: settings.n_programs, reoptimize: settings.reoptimize, watch_every: args.watch_every }
}

fn open_log(settings: &Settings, background: bool) -> Result<Log, Failure> {
    match &settings.log {
        Some(path) => Log::to_file(path, settings.max_log_size),
        None if background => Log::to_file(&log::usual_path()?, settings.max_log_size),
        None => Ok(Log::to_stderr()),
    }
}

impl Signals {
    fn catch() -> std::io::Result<Self> {
        let (wake, bell) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (stop, reload) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        for (signal, flag) in [(SIGTERM, &stop), (SIGINT, &stop), (SIGHUP, &reload)] {
            signal_hook::flag::register(signal, flag.clone())?;
        }
        for signal in [SIGTERM, SIGINT, SIGHUP, SIGCHLD] {
            signal_hook::low_level::pipe::register(signal, bell.try_clone()?)?;
        }
        Ok(Self { stop, reload, wake })
    }
}

impl Daemon<'_> {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Says what it goes by, and finds out how it learns of new programs.
    fn begin(&mut self) {
        let version = env!("CARGO_PKG_VERSION");
        self.log.line(&format!(
            "dyni {version} started, pid: {}, archive {}",
            std::process::id(),
            self.archive.display()
        ));
        self.say_options();
        match ExecEvents::open() {
            Ok(events) => {
                self.events = Some(events);
                self.log.line("new programs are seen by the kernel's proc connector");
                if !self.args.no_read_ahead {
                    self.begin_to_read_ahead();
                }
            }
            Err(e) => {
                let every = human_ns(self.args.cpu_window.as_nanos() as u64);
                self.log.line(&format!("new programs are seen in /proc, every {every}: no proc connector ({e})"));
            }
        }
    }

    fn begin_to_read_ahead(&mut self) {
        match ReadAhead::begin(&self.archive) {
            Ok(reader) => self.read_ahead = Some(reader),
            Err(e) => self.log.line(&format!("nothing is read ahead for programs that start: {e}")),
        }
    }

    fn say_options(&mut self) {
        let s = &self.settings;
        let one = |l: &Limit| {
            let ns = |d: Duration| human_ns(d.as_nanos() as u64);
            format!("delay {}, window {}, cpu-usage {} %", ns(l.delay), ns(l.window), l.cpu_usage)
        };
        let chosen = match &s.choice {
            Choice::Pids(pids) => format!("only pids {pids:?}"),
            Choice::Exes(listed) => {
                let own = |l: &Limit| if *l == s.limit { String::new() } else { format!(" ({})", one(l)) };
                let names = listed.iter().map(|l| format!("{}{}", l.name, own(&l.limit)));
                format!("programs {}", names.collect::<Vec<_>>().join(", "))
            }
        };
        let line = format!(
            "options: configuration {}, {}, {} at once, reoptimize {}, users {}, log {} of {} at most, {chosen}",
            s.file.as_ref().map_or_else(|| "of dyni itself".to_owned(), |f| f.display().to_string()),
            one(&s.limit),
            s.n_programs,
            if s.reoptimize { "on" } else { "off" },
            if s.users.is_empty() { "all".to_owned() } else { format!("{:?}", s.users) },
            self.log.place(),
            human_bytes(s.max_log_size),
        );
        let notes = s.notes.clone();
        self.log.line(&line);
        for note in notes {
            self.log.line(&note);
        }
    }

    /// Does what is due, waits for what comes next, and takes that in.
    fn turn(&mut self) {
        if self.signals.reload.swap(false, Ordering::Relaxed) {
            self.reload();
        }
        if Instant::now() >= self.next_look {
            self.look(&HashMap::new());
        }
        self.do_what_is_due();
        self.tell();
        if let Some(dog) = self.watchdog.as_mut().filter(|d| d.fed.is_none_or(|fed| fed.elapsed() >= d.every)) {
            dog.fed = Some(Instant::now());
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
        self.wait();
        for incoming in self.server.turn() {
            self.hear(&incoming);
        }
        self.hear_workers();
        self.hear_execs();
    }

    fn wait(&mut self) {
        let now = self.now();
        let until = |at: Instant| at.saturating_duration_since(Instant::now());
        let mut longest = LONGEST_WAIT.min(until(self.next_look));
        if let Some(Watchdog { every, fed: Some(fed) }) = &self.watchdog {
            longest = longest.min(until(*fed + *every));
        }
        if let Some(next) = self.machine.next(now) {
            longest = longest.min(next.saturating_sub(now));
        }
        if let Some(deadline) = self.server.deadline() {
            longest = longest.min(until(deadline));
        }
        let mut fds = vec![PollFd::new(self.signals.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.server.waits().map(|(fd, flags)| PollFd::new(fd, flags)));
        fds.extend(self.events.iter().map(|e| PollFd::new(e.as_fd(), PollFlags::POLLIN)));
        let all = self.workers.values().map(|(_, w)| w).chain(self.undo_all.iter().filter_map(|u| u.worker.as_ref()));
        for worker in all.filter(|w| w.is_open()) {
            fds.extend(worker.fds().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        }
        // A little late rather than a little early, which would be a second turn.
        let timeout = PollTimeout::try_from(longest + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        // An interruption is as good as an event.
        let _ = poll(&mut fds, timeout);
        let mut sink = [0; 64];
        while matches!(self.signals.wake.read(&mut sink), Ok(n) if n > 0) {}
    }

    /// Looks at the host. `held` is what an earlier daemon has left to know.
    fn look(&mut self, held: &HashMap<Id, String>) {
        self.next_look = Instant::now() + self.args.cpu_window;
        self.looks += 1;
        let anew = self.looks.is_multiple_of(LOOKS_PER_LEDGER);
        if let Err(e) = self.scanner.look_at_all(anew, &self.settings) {
            self.log.line(&format!("can't look for programs: {e}"));
            return;
        }
        self.see(held);
        if anew {
            let now = self.now();
            // One that waits is looked into when its turn comes.
            let idle = self.machine.programs().filter(|p| p.job().is_none() && p.state != State::Waiting);
            let idle: Vec<Id> = idle.map(|p| p.seen.id).collect();
            for id in idle {
                self.machine.found(now, &id, ledger_of(id.pid));
            }
        }
    }

    fn see(&mut self, held: &HashMap<Id, String>) {
        let sightings = self.scanner.programs();
        let now = self.now();
        self.machine.seen(now, sightings, |s| (ledger_of(s.id.pid), held.get(&s.id).cloned()));
    }

    fn hear_execs(&mut self) {
        let Some(events) = &self.events else { return };
        let execs = events.read();
        if execs.lost {
            self.next_look = Instant::now();
            return;
        }
        if let Some(reader) = &self.read_ahead {
            execs.pids.iter().for_each(|&pid| reader.started(pid));
        }
        let settings = &self.settings;
        let listed = execs.pids.iter().filter(|pid| self.scanner.look_at_one(**pid, settings)).count();
        if listed > 0 {
            std::thread::sleep(GATHER);
            self.see(&HashMap::new());
        }
    }

    fn do_what_is_due(&mut self) {
        if self.undo_all.is_some() {
            self.undo_everything();
            return;
        }
        let now = self.now();
        for action in self.machine.due(now) {
            match action {
                Action::Kill(id) => {
                    if let Some((_, worker)) = self.workers.get_mut(&id) {
                        worker.kill();
                    }
                }
                Action::Run(id, job) => self.begin_job(id, job),
            }
        }
    }

    fn begin_job(&mut self, id: Id, job: Job) {
        let asker = self.askers.get(&id).and_then(|a| a.first()).filter(|_| job == Job::Undo);
        let worker = match asker {
            Some(asker) => Worker::undo(Some(id.pid), asker.json, &self.archive),
            None => Worker::job(job, id.pid, self.args.watch_every.min(WATCH), &self.archive),
        };
        match worker {
            Ok(worker) => drop(self.workers.insert(id, (job, worker))),
            Err(e) => {
                let why = format!("can't start a process for it: {e}");
                let now = self.now();
                self.machine.finished(now, &id, &Outcome::Failed(why.clone()));
                self.answer_askers(&id, &Reply::of_failure(&Failure::failed(why, "")));
            }
        }
    }

    fn hear_workers(&mut self) {
        let now = self.now();
        let mut ended = Vec::new();
        for (id, (job, worker)) in &mut self.workers {
            if let Some(state) = worker.read() {
                self.machine.phase(now, id, state);
            }
            match worker.ended() {
                Ok(None) => {}
                Ok(Some(end)) => ended.push((*id, *job, Some(end))),
                Err(_) => ended.push((*id, *job, None)),
            }
        }
        for (id, job, end) in ended {
            self.workers.remove(&id);
            let outcome = end.as_ref().map_or(Outcome::Killed, worker::Ended::outcome);
            self.totals.count(job, &outcome);
            self.machine.finished(now, &id, &outcome);
            if let (Job::Undo, Some(end)) = (job, end) {
                self.answer_askers(&id, &ran(&end));
            }
        }
    }

    /// One step of `undo --all`.
    fn undo_everything(&mut self) {
        for (_, worker) in self.workers.values_mut() {
            worker.kill();
        }
        let Some(all) = &mut self.undo_all else { return };
        if !self.workers.is_empty() {
            return;
        }
        let ended = match &mut all.worker {
            None => match Worker::undo(None, all.asker.json, &self.archive) {
                Ok(worker) => {
                    all.worker = Some(worker);
                    return;
                }
                Err(e) => Err(e),
            },
            Some(worker) => {
                worker.read();
                match worker.ended() {
                    Ok(None) => return,
                    Ok(Some(end)) => Ok(end),
                    Err(e) => Err(e),
                }
            }
        };
        let (number, uid) = (all.asker.number, all.uid);
        self.undo_all = None;
        let now = self.now();
        let ids: Vec<Id> = self.machine.programs().map(|p| p.seen.id).collect();
        for id in ids {
            match ledger_of(id.pid) {
                machine::Found::Nothing => self.machine.undone(now, &id, uid),
                other => self.machine.found(now, &id, other),
            }
        }
        let reply = match ended {
            Ok(end) => ran(&end),
            Err(e) => Reply::of_failure(&Failure::failed("undo every program", e)),
        };
        self.answer(number, &reply);
    }

    /// Reads the configuration again; a wrong one changes nothing.
    fn reload(&mut self) {
        let _ = sd_notify::notify(&[
            NotifyState::Reloading,
            NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Reloading),
        ]);
        match Settings::load(self.file.as_deref(), &self.args.limits) {
            Ok(settings) => {
                match open_log(&settings, self.args.background) {
                    Ok(log) => self.log = log,
                    Err(e) => self.log.line(&format!("the log stays where it is: {e}")),
                }
                self.machine.rules = rules(&settings, self.args);
                self.settings = settings;
                self.scanner.forget();
                self.next_look = Instant::now();
                self.log.line("the configuration was read again");
                self.say_options();
            }
            Err(e) => self.log.line(&format!("the configuration stays as it was: {e}")),
        }
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }

    /// Logs what has changed and keeps what the next daemon has to know.
    fn tell(&mut self) {
        for line in self.machine.take_changes() {
            self.log.line(&line);
        }
        let held = held::text(&self.machine);
        if held != self.held.1 {
            // Without it, a program that was undone would be chosen again by the next daemon; no more than that.
            if let Err(e) = fs::write(&self.held.0, &held) {
                self.log.line(&format!("can't keep {}: {e}", self.held.0.display()));
            }
            self.held.1 = held;
        }
    }

    /// Whether `--once` has nothing left to wait for.
    fn has_done_its_task(&self) -> bool {
        let settled = self.machine.programs().filter(|p| p.is_settled()).count();
        let all = self.machine.programs().count();
        let wanted = if let Choice::Pids(pids) = &self.settings.choice { pids.len() } else { self.settings.n_programs };
        let nobody = all == 0 && matches!(self.settings.choice, Choice::Pids(_));
        self.args.once && (nobody || settled >= wanted)
    }

    /// Ends what is under way and takes out what that leaves half-way. What is dynimized stays so.
    fn end(&mut self) {
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        let deadline = Instant::now() + LAST_UNDO;
        let mut half_way = Vec::new();
        for (id, (job, mut worker)) in std::mem::take(&mut self.workers) {
            worker.kill();
            finish(&mut worker, deadline);
            if job != Job::Watch {
                half_way.push(id);
            }
        }
        for id in half_way {
            if let Ok(mut undo) = Worker::undo(Some(id.pid), true, &self.archive) {
                finish(&mut undo, deadline);
            }
        }
        self.tell();
        self.log.line("dyni has stopped");
    }
}

/// Waits for a worker's end.
fn finish(worker: &mut Worker, deadline: Instant) {
    while matches!(worker.ended(), Ok(None)) {
        if Instant::now() > deadline {
            worker.kill();
        }
        worker.read();
        std::thread::sleep(Duration::from_millis(5));
    }
}
