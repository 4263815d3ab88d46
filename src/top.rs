//! `dyni top`: the daemon's programs, live. Plain escape sequences: a table that is drawn anew each second is all there is.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

use crate::cli::TopArgs;
use crate::daemon::protocol::{Contact, DaemonStatus, ProgramStatus, Reply, Request, State};
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::output::{Align, Output, Paint, Table, clean, plural};

/// The alternate screen without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// To the upper left corner; whatever is below the end.
const HOME: &str = "\x1b[H";
const CLEAR_BELOW: &str = "\x1b[J";

/// Shows the programs until `q` is typed; once if stdout is no terminal or `--once` is given.
///
/// # Errors
/// No daemon runs, or the terminal can't be had.
pub fn run(args: &TopArgs, contact: &Contact, out: Output) -> Result<(), Failure> {
    let status = ask(contact)?;
    if out.json() {
        // The same document as that of `dyni status`, without the ledgers.
        println!("{}", serde_json::to_string_pretty(&status).unwrap_or_default());
        return Ok(());
    }
    if args.once || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        print!("{}", screen(&status, None, "", out.paint()));
        return Ok(());
    }
    let screen_guard = Screen::enter()?;
    let shown = watch(contact, args.every, out.paint());
    drop(screen_guard);
    shown
}

fn ask(contact: &Contact) -> Result<DaemonStatus, Failure> {
    contact
        .status()?
        .ok_or_else(|| Failure::failed("show the programs", "no daemon runs").help("`dyni start` starts it"))
}

/// Draws and takes keys until there is no more to do.
fn watch(contact: &Contact, every: Duration, paint: Paint) -> Result<(), Failure> {
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, ended.clone()).map_err(|e| Failure::failed("catch signals", e))?;
    }
    // By PID, so that it stays with its program when others come and go.
    let (mut chosen, mut said) = (None, String::new());
    while !ended.load(Ordering::Relaxed) {
        let status = ask(contact)?;
        let at = status.programs.iter().position(|p| Some(p.pid) == chosen).unwrap_or(0);
        chosen = status.programs.get(at).map(|p| p.pid);
        let text = clean(&screen(&status, chosen, &said, paint)).replace('\n', "\x1b[K\r\n");
        let mut out = io::stdout().lock();
        write!(out, "{HOME}{text}{CLEAR_BELOW}").and_then(|()| out.flush()).map_err(|e| Failure::failed("draw", e))?;
        drop(out);
        match key(every) {
            Some(Key::Quit) => break,
            Some(Key::Up) => chosen = status.programs.get(at.saturating_sub(1)).map(|p| p.pid),
            Some(Key::Down) => chosen = status.programs.get(at + 1).map(|p| p.pid).or(chosen),
            Some(Key::Undo) => said = order(contact, chosen, |program| Request::Undo { program, json: false }),
            Some(Key::Redo) => said = order(contact, chosen, |program| Request::Redo { program }),
            None => {}
        }
    }
    Ok(())
}

/// Sends an order about a program; what the daemon says to it, in a line.
fn order(contact: &Contact, pid: Option<i32>, request: impl Fn(Option<String>) -> Request) -> String {
    let Some(pid) = pid else { return String::new() };
    match contact.ask(&request(Some(pid.to_string()))) {
        Ok(Some(Reply::Done { lines })) => lines.join("; "),
        Ok(Some(Reply::Ran { stdout, status: 0, .. })) => stdout.lines().collect::<Vec<_>>().join(";"),
        Ok(Some(Reply::Ran { stderr, .. })) => stderr.lines().next().unwrap_or_default().to_owned(),
        Ok(Some(other)) => other.into_failure().to_string(),
        Ok(None) => "the daemon has ended".to_owned(),
        Err(e) => e.to_string(),
    }
}

/// Everything that is shown.
fn screen(status: &DaemonStatus, chosen: Option<i32>, said: &str, paint: Paint) -> String {
    let mut text = format!(
        "{} {}, pid: {}, for {}, {} followed\n\n",
        paint.bold("dyni"),
        status.version,
        status.pid,
        human_ns(status.uptime_ns),
        plural(status.programs.len() as u64, "program", "programs"),
    );
    let mut table = Table::new(&[
        ("", Align::Left),
        ("program", Align::Left),
        ("pid", Align::Right),
        ("processes", Align::Right),
        ("state", Align::Left),
        ("for", Align::Right),
        ("cpu", Align::Right),
        ("gain", Align::Right),
        ("in cache", Align::Right),
        ("drift", Align::Right),
        ("stopped", Align::Right),
    ]);
    for p in &status.programs {
        let percent = |share: Option<f64>| share.map_or_else(String::new, |s| format!("{:.0} %", s * 100.0));
        table.row([
            if chosen == Some(p.pid) { ">" } else { "" }.to_owned(),
            p.name.clone(),
            p.pid.to_string(),
            p.processes.to_string(),
            coloured(p, paint),
            human_ns(p.for_ns),
            percent(p.cpu_percent.map(|c| c / 100.0)),
            p.gain.map_or_else(String::new, |g| format!("{g:.3}")),
            percent(p.in_cache),
            p.drift.map_or_else(String::new, |d| format!("{d:.2}")),
            if p.stop_ns > 0 { human_ns(p.stop_ns) } else { String::new() },
        ]);
    }
    text.push_str(&table.render("", paint));
    let reason = status.programs.iter().find(|p| Some(p.pid) == chosen).map_or("", |p| &p.reason);
    if !reason.is_empty() {
        text.push_str(&format!("\n{}\n", paint.dim(reason)));
    }
    if !said.is_empty() {
        text.push_str(&format!("\n{said}\n"));
    }
    if chosen.is_some() {
        text.push_str(&paint.dim("\narrows choose, u undo, r redo, q quit\n"));
    }
    text
}

fn coloured(program: &ProgramStatus, paint: Paint) -> String {
    let name = program.state.name();
    match program.state {
        State::Dynimized => paint.good(name),
        State::Profiling | State::Dynimizing => paint.bold(name),
        State::PartlyDynimized => paint.warn(name),
        State::Waiting | State::Undynimized => paint.dim(name),
    }
}

/// What was typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Quit,
    Up,
    Down,
    Undo,
    Redo,
}

impl Key {
    fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            b"q" | b"Q" | b"\x03" | b"\x04" => Some(Self::Quit),
            b"k" | b"\x1b[A" | b"\x1bOA" => Some(Self::Up),
            b"j" | b"\x1b[B" | b"\x1bOB" => Some(Self::Down),
            b"u" => Some(Self::Undo),
            b"r" => Some(Self::Redo),
            _ => None,
        }
    }
}

/// Waits so long for a key.
fn key(patience: Duration) -> Option<Key> {
    let stdin = io::stdin();
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, timeout).ok()? == 0 {
        return None;
    }
    let mut bytes = [0; 16];
    match stdin.lock().read(&mut bytes) {
        // The terminal is gone.
        Ok(0) | Err(_) => Some(Key::Quit),
        Ok(n) => Key::of(&bytes[..n]),
    }
}

/// A terminal that gives each key at once and shows none; as it was when dropped.
struct Screen(Termios);

impl Screen {
    fn enter() -> Result<Self, Failure> {
        let broken = |e: nix::Error| Failure::failed("use the terminal", e).help("`dyni top --once` needs none");
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).map_err(broken)?;
        let mut raw = before.clone();
        raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).map_err(broken)?;
        print!("{ENTER}");
        let _ = io::stdout().flush();
        Ok(Self(before))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        print!("{LEAVE}");
        let _ = io::stdout().flush();
        // Nothing better can be done about a terminal that is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_all_that_is_known_of_a_program() {
        let program = ProgramStatus {
            pid: 8375,
            name: "mariadbd".into(),
            uid: 0,
            processes: 1,
            state: State::Dynimized,
            for_ns: 5_000_000_000,
            reason: "with the plan of the archive".into(),
            cpu_percent: Some(151.0),
            gain: Some(1.07),
            stop_ns: 2_400_000,
            refused: 3,
            drift: Some(0.031),
            in_cache: Some(0.87),
        };
        let waiting = ProgramStatus {
            pid: 9,
            name: "nginx".into(),
            state: State::Waiting,
            cpu_percent: None,
            gain: None,
            stop_ns: 0,
            drift: None,
            in_cache: None,
            ..program.clone()
        };
        let status =
            DaemonStatus { pid: 7, version: "1".into(), programs: vec![program, waiting], ..DaemonStatus::default() };
        let text = screen(&status, Some(8375), "", Paint::PLAIN);
        let row = |n: usize| text.lines().nth(n).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(row(3), "> mariadbd 8375 1 dynimized 5.0 s 151 % 1.070 87 % 0.03 2.4 ms");
        assert_eq!(row(4), "nginx 9 1 waiting 5.0 s");
        assert!(text.contains("\nwith the plan of the archive\n"), "{text}");
        assert!(text.starts_with("dyni 1, pid: 7, for 0 ns, 2 programs followed\n"), "{text}");
    }

    #[test]
    fn keys_are_those_that_are_shown() {
        let keys: [(&[u8], Option<Key>); 6] = [
            (b"q", Some(Key::Quit)),
            (b"u", Some(Key::Undo)),
            (b"r", Some(Key::Redo)),
            (b"\x1b[A", Some(Key::Up)),
            (b"\x1b[B", Some(Key::Down)),
            (b"x", None),
        ];
        for (bytes, key) in keys {
            assert_eq!(Key::of(bytes), key);
        }
    }
}
