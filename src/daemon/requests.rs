//! What the daemon does with what it is asked on the control socket, and who may ask for it.

use std::sync::atomic::Ordering;

use dyni_collector::{Group, Target};

use super::machine::{Id, State, Wish};
use super::protocol::{DaemonStatus, ProgramStatus, Reply, Request};
use super::read_ahead::ReadAhead;
use super::server::{Incoming, Peer};
use super::{Asker, Daemon, UndoAll, metrics, worker};
use crate::errors::Failure;

impl Daemon<'_> {
    pub(super) fn answer_askers(&mut self, id: &Id, reply: &Reply) {
        for asker in self.askers.remove(id).unwrap_or_default() {
            self.answer(asker.number, reply);
        }
    }

    pub(super) fn answer(&mut self, number: u64, reply: &Reply) {
        let mut line = serde_json::to_vec(reply).unwrap_or_default();
        line.push(b'\n');
        self.server.answer(number, line);
    }

    /// Takes a request in, and answers it unless the answer comes later.
    pub(super) fn hear(&mut self, incoming: &Incoming) {
        let uid = match incoming.peer {
            Peer::User(uid) => uid,
            Peer::Scraper => {
                let text = metrics::http(&incoming.text, &self.status(), &self.totals);
                self.server.answer(incoming.number, text);
                return;
            }
        };
        let reply = match serde_json::from_slice::<Request>(&incoming.text) {
            Ok(request) => self.obey(request, uid, incoming.number).unwrap_or_else(|e| Some(Reply::of_failure(&e))),
            Err(e) => Some(Reply::of_failure(&Failure::usage("not understood", e))),
        };
        if let Some(reply) = reply {
            self.answer(incoming.number, &reply);
        }
    }

    fn obey(&mut self, request: Request, uid: u32, number: u64) -> Result<Option<Reply>, Failure> {
        let now = self.now();
        match request {
            Request::Status {} => return Ok(Some(Reply::Status(self.status()))),
            Request::Stop {} => {
                self.may(uid, None, "stop the daemon")?;
                self.log.line(&format!("told to stop by user {uid}"));
                self.signals.stop.store(true, Ordering::Relaxed);
                let line = "dyni stops; what is dynimized stays so".to_owned();
                return Ok(Some(Reply::Done { lines: vec![line] }));
            }
            Request::Undo { program: None, json } => {
                self.may(uid, None, "undo every program")?;
                if self.undo_all.is_some() {
                    return Err(Failure::refused("undo every program", "that is being done already"));
                }
                self.undo_all = Some(UndoAll { asker: Asker { number, json }, uid, worker: None });
            }
            Request::Undo { program: Some(spec), json } => {
                let Some(id) = self.find(&spec)? else { return Ok(Some(Reply::Unknown {})) };
                self.may(uid, Some(&id), "undo it")?;
                self.askers.entry(id).or_default().push(Asker { number, json });
                self.machine.ask(now, &id, Wish::Undo { uid });
            }
            Request::Redo { program } => {
                let ids: Vec<Id> = match &program {
                    Some(spec) => self.find(spec)?.into_iter().collect(),
                    None => self.machine.programs().map(|p| p.seen.id).collect(),
                };
                if program.is_some() && ids.is_empty() {
                    return Ok(Some(Reply::Unknown {}));
                }
                for id in &ids {
                    self.may(uid, Some(id), "redo it")?;
                }
                let mut lines = Vec::new();
                for id in &ids {
                    self.machine.ask(now, id, Wish::Redo);
                    let seen = self.machine.program(id).map(|p| (p.seen.name.clone(), p.seen.processes));
                    let (name, processes) = seen.unwrap_or_default();
                    lines.push(crate::targets::state_line(
                        &name,
                        id.pid,
                        processes,
                        "will be profiled and dynimized anew",
                    ));
                }
                return Ok(Some(Reply::Done { lines }));
            }
        }
        Ok(None)
    }

    /// Whether a user may change a program, or the daemon itself.
    fn may(&self, uid: u32, program: Option<&Id>, what: &str) -> Result<(), Failure> {
        let own = nix::unistd::geteuid().as_raw();
        let owner = program.and_then(|id| self.machine.program(id)).map(|p| p.seen.uid);
        if uid == 0 || uid == own || owner == Some(uid) {
            return Ok(());
        }
        let whose = owner.map_or_else(String::new, |o| format!(", which belongs to user {o}"));
        let target = program.map_or_else(String::new, |id| format!(" (pid {}{whose})", id.pid));
        Err(Failure::refused(format!("{what}{target}"), format!("user {uid} may only change programs of its own"))
            .help("run the command as its owner or as root"))
    }

    /// The program that a PID (of any of its processes), a name or a path means, if it is one that is followed.
    fn find(&self, spec: &str) -> Result<Option<Id>, Failure> {
        let known = |pid: i32| self.machine.programs().map(|p| p.seen.id).find(|id| id.pid == pid);
        let named: Vec<Id> = self.machine.programs().filter(|p| p.seen.name == spec).map(|p| p.seen.id).collect();
        match &named[..] {
            [one] => Ok(Some(*one)),
            [] => {
                let root = || Some(Group::of(&Target::find(spec).ok()?).ok()?.root.pid);
                Ok(spec.parse().ok().and_then(known).or_else(|| known(root()?)))
            }
            several => {
                let pids: Vec<_> = several.iter().map(|id| id.pid).collect();
                Err(Failure::usage(format!("`{spec}`"), format!("names several programs: {pids:?}"))
                    .help("give the PID of one"))
            }
        }
    }

    fn status(&self) -> DaemonStatus {
        let now = self.now();
        let programs = self.machine.programs().map(|p| ProgramStatus {
            pid: p.seen.id.pid,
            name: p.seen.name.clone(),
            uid: p.seen.uid,
            processes: p.seen.processes,
            state: p.state,
            for_ns: now.saturating_sub(p.since).as_nanos() as u64,
            reason: p.reason.clone(),
            cpu_percent: p.seen.cpu_percent,
            gain: p.gain,
            stop_ns: p.stop_ns,
            refused: p.refused,
            drift: p.drift.value(),
            in_cache: p.drift.in_cache().filter(|_| p.state == State::Dynimized),
        });
        let cpu = dyni_collector::cpu_time(std::process::id() as i32).unwrap_or_default();
        DaemonStatus {
            pid: std::process::id() as i32,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ns: now.as_nanos() as u64,
            cpu_ns: cpu.as_nanos() as u64,
            config: self.settings.file.as_ref().map(|f| f.display().to_string()),
            reoptimize: self.settings.reoptimize,
            n_programs: self.settings.n_programs,
            programs: programs.collect(),
            read_ahead: self.read_ahead.as_ref().map(ReadAhead::status),
        }
    }
}

/// What a worker has printed, for who asked for its work.
pub(super) fn ran(end: &worker::Ended) -> Reply {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let status = end.status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1);
    Reply::Ran { stdout: text(&end.stdout), stderr: text(&end.stderr), status }
}
