//! The commands that talk to the daemon: `dyni start`, `stop`, `redo`, and `undo` as far as the daemon does it.

use std::ffi::OsString;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::protocol::{Contact, Reply, Request};
use crate::cli::{DaemonArgs, OptimizeArgs, RedoArgs, UndoArgs};
use crate::config::Settings;
use crate::errors::Failure;
use crate::optimize;
use crate::output::{Output, Paint, Report};
use crate::store::Store;

/// A daemon begins in a fraction of a second; on a machine that is busy beyond measure it takes longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Stopping takes out what is half-way.
const STOPPING: Duration = Duration::from_secs(40);

/// `dyni start --json`, `dyni stop --json`.
#[derive(Debug, Serialize)]
struct DaemonReport {
    /// The daemon's process.
    pid: i32,
    /// `running` or `stopped`.
    daemon: &'static str,
    #[serde(skip)]
    text: String,
}

/// `dyni redo --json` where the daemon does it.
#[derive(Debug, Serialize)]
struct LinesReport {
    lines: Vec<String>,
}

impl Report for DaemonReport {
    fn text(&self, _paint: Paint) -> String {
        format!("{}\n", self.text)
    }
}

impl Report for LinesReport {
    fn text(&self, _paint: Paint) -> String {
        if self.lines.is_empty() {
            return "no program is followed\n".to_owned();
        }
        self.lines.iter().map(|l| format!("{l}\n")).collect()
    }
}

/// Starts the daemon in the background and comes back when it runs.
///
/// # Errors
/// It can't begin, for the reason that it gives.
pub fn start(
    args: &DaemonArgs,
    config: Option<&Path>,
    contact: &Contact,
    archive: &Path,
    out: Output,
) -> Result<(), Failure> {
    let broken = |e: std::io::Error| Failure::failed("start the daemon", e);
    let mut complaints = tempfile::tempfile().map_err(broken)?;
    let mut child = Command::new("/proc/self/exe")
        .args(words(args, config, &contact.own()?, archive).map_err(broken)?)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaints.try_clone().map_err(broken)?)
        .spawn()
        .map_err(broken)?;
    let pid = child.id() as i32;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().map_err(broken)? {
            complaints.rewind().map_err(broken)?;
            let mut text = String::new();
            // What it said is all that is known.
            let _ = complaints.take(64 << 10).read_to_string(&mut text);
            return Err(its_own_words(&text, status.code()));
        }
        if contact.status().ok().flatten().is_some_and(|s| s.pid == pid) {
            break;
        }
        if Instant::now() > deadline {
            // It is our own child, and nobody has heard of it yet.
            let _ = child.kill();
            let _ = child.wait();
            return Err(Failure::failed("start the daemon", format!("it does not answer after {PATIENCE:?}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let text = format!("dyni runs in the background, pid: {pid}");
    out.report(&DaemonReport { pid, daemon: "running", text });
    Ok(())
}

/// The command line of a daemon in the background that has another working directory.
fn words(args: &DaemonArgs, config: Option<&Path>, socket: &Path, archive: &Path) -> std::io::Result<Vec<OsString>> {
    let mut words: Vec<OsString> = vec!["daemon".into(), "--background".into()];
    let mut path = |option: &str, path: &Path| -> std::io::Result<()> {
        words.push(option.into());
        words.push(std::path::absolute(path)?.into());
        Ok(())
    };
    path("--socket", socket)?;
    path("--archive", archive)?;
    config.map_or(Ok(()), |file| path("--config", file))?;
    args.limits.log.as_deref().map_or(Ok(()), |log| path("--log", log))?;
    let limits = &args.limits;
    let ms = |d: Duration| format!("{}ms", d.as_millis());
    let mut option = |option: &str, value: Option<String>| {
        if let Some(value) = value {
            words.push(format!("--{option}={value}").into());
        }
    };
    limits.pid.iter().for_each(|pid| option("pid", Some(pid.to_string())));
    limits.exe.iter().for_each(|exe| option("exe", Some(exe.clone())));
    option("n-programs", limits.n_programs.map(|n| n.to_string()));
    option("delay", limits.delay.map(|d| if d.is_zero() { "0".to_owned() } else { ms(d) }));
    option("window", limits.window.map(ms));
    option("cpu-usage", limits.cpu_usage.map(|p| p.to_string()));
    option("metrics", args.metrics.clone());
    option("cpu-window", Some(ms(args.cpu_window)));
    option("watch-every", Some(ms(args.watch_every)));
    let flags = [("--reoptimize", limits.reoptimize), ("--once", args.once), ("--no-read-ahead", args.no_read_ahead)];
    words.extend(flags.into_iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| flag.into()));
    Ok(words)
}

/// What a daemon that could not begin has printed, as this command's own failure.
fn its_own_words(text: &str, code: Option<i32>) -> Failure {
    let line = |mark: &str| text.lines().find_map(|l| l.strip_prefix(mark)).map(str::to_owned);
    let what = line("dyni: ").unwrap_or_else(|| "the daemon has ended without a word".to_owned());
    let failure = match code {
        Some(2) => Failure::usage(what, ""),
        Some(3) => Failure::refused(what, ""),
        _ => Failure::failed(what, ""),
    };
    line("  help: ").into_iter().fold(failure, Failure::help)
}

/// Ends the daemon and comes back when it has. Programs stay as they are.
///
/// # Errors
/// None runs, or it is another user's.
pub fn stop(contact: &Contact, out: Output) -> Result<(), Failure> {
    let none = || Failure::failed("stop the daemon", "none runs").help("`dyni start` starts it");
    let status = contact.status()?.ok_or_else(none)?;
    let text = match contact.ask(&Request::Stop {})?.ok_or_else(none)? {
        Reply::Done { lines } => lines.join("\n"),
        other => return Err(other.into_failure()),
    };
    let deadline = Instant::now() + STOPPING;
    while contact.status().ok().flatten().is_some_and(|s| s.pid == status.pid) {
        if Instant::now() > deadline {
            return Err(Failure::failed("stop the daemon", format!("it still runs after {STOPPING:?}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    out.report(&DaemonReport { pid: status.pid, daemon: "stopped", text });
    Ok(())
}

/// Lets the daemon undo a program, or all; whether one runs that follows the program. Its output is passed on.
///
/// # Errors
/// Why it could not be done.
pub fn undo(args: &UndoArgs, contact: &Contact, out: Output) -> Result<bool, Failure> {
    let request = Request::Undo { program: args.pid.clone(), json: out.json() };
    match contact.ask(&request)? {
        None | Some(Reply::Unknown {}) => Ok(false),
        Some(Reply::Ran { stdout, stderr, status: 0 }) => {
            out.raw(&stdout);
            // What it complained about without failing.
            let _ = std::io::stderr().lock().write_all(stderr.as_bytes());
            Ok(true)
        }
        Some(Reply::Ran { stderr, status, .. }) => Err(its_own_words(&stderr, Some(status.into()))),
        Some(other) => Err(other.into_failure()),
    }
}

/// Optimises a program anew: the daemon if it follows it, else this process, in the foreground.
///
/// # Errors
/// Why it could not be done.
pub fn redo(
    args: &RedoArgs,
    config: Option<&Path>,
    contact: Option<&Contact>,
    store: &Store,
    out: Output,
) -> Result<(), Failure> {
    let request = Request::Redo { program: args.pid.clone() };
    let reply = contact.map(|c| c.ask(&request)).transpose()?.flatten();
    match (reply, &args.pid) {
        (Some(Reply::Done { lines }), _) => {
            out.report(&LinesReport { lines });
            Ok(())
        }
        (None | Some(Reply::Unknown {}), Some(pid)) => {
            let settings = Settings::load(config, &crate::cli::LimitArgs::default())?;
            let window = args.window.unwrap_or(settings.limit.window);
            optimize::run(&OptimizeArgs { pid: pid.clone(), duration: window, phases: false }, store, out)
        }
        (None | Some(Reply::Unknown {}), None) => {
            Err(Failure::failed("redo every program", "no daemon runs").help("name one with -p, or `dyni start`"))
        }
        (Some(other), _) => Err(other.into_failure()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command as Sub, LimitArgs};
    use crate::errors::Status;
    use clap::Parser;

    #[test]
    fn a_daemon_in_the_background_is_told_everything() {
        let line = "dyni --config c --socket s start -p 7 --n-programs 3 --delay 0 --window 1500ms --cpu-usage 2.5 \
                    --reoptimize --log l --metrics 127.0.0.1:1 --no-read-ahead --cpu-window 2s --watch-every 3s";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Some(Sub::Start(args)) = cli.command else { panic!() };
        let words = words(&args, cli.global.config.as_deref(), Path::new("s"), Path::new("a")).unwrap();
        let again = Cli::try_parse_from(std::iter::once("dyni".into()).chain(words)).unwrap();
        let Some(Sub::Daemon(daemon)) = again.command else { panic!() };
        let LimitArgs { log, .. } = &daemon.limits;
        assert!(log.as_ref().unwrap().is_absolute() && again.global.config.unwrap().is_absolute());
        assert_eq!((daemon.limits.pid, daemon.limits.n_programs), (vec![7], Some(3)));
        assert_eq!((daemon.limits.delay, daemon.limits.window), (args.limits.delay, args.limits.window));
        assert_eq!((daemon.limits.cpu_usage, daemon.limits.reoptimize), (Some(2.5), true));
        assert_eq!((daemon.cpu_window, daemon.watch_every), (args.cpu_window, args.watch_every));
        assert!(daemon.background && daemon.no_read_ahead && !daemon.once);
    }

    #[test]
    fn what_a_daemon_complains_about_is_passed_on() {
        let failure = its_own_words("dyni: start the daemon: another one runs already\n  help: ask it\n", Some(3));
        assert_eq!(failure.to_string(), "start the daemon: another one runs already");
        assert_eq!((failure.status(), failure.helps()), (Status::Refused, Some("ask it")));
    }
}
