//! The daemon from its start to its end: on victims, whose every result is checked, and on stock servers under load.
//!
//! A daemon under test may choose copies of programs under names that only the test runs, and nothing else on the machine.
//! `undo --all` is tried only where the test's own processes are all there is.

mod common;
#[path = "daemon/place.rs"]
#[allow(dead_code)]
mod place;
#[path = "servers/service.rs"]
#[allow(dead_code)]
mod service;
#[path = "servers/stock.rs"]
#[allow(dead_code)]
mod stock;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::build::{self, variant};
use common::dyni::{BINARY, run};
use common::is_root;
use common::memory::Text;
use common::process::{Victim, descendants, verify};
use common::rng::Rng;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::Signal;
use place::{Daemon, PATIENCE, Place, copy, copy_to};
use serde_json::Value;

/// A victim under a name of its own, whose results are verified by the original.
fn start_victim(name: &str, place: &Place, tag: &str) -> Result<(Victim, PathBuf, String), String> {
    let exe = build::victim(name, &variant::gcc_o2)?;
    let (copy, name) = copy(&exe, place.folder.path(), tag);
    Ok((Victim::start(&copy)?, exe, name))
}

fn finish(victim: Victim, exe: &Path) {
    let tally = victim.finish();
    assert_eq!(tally, verify(exe, tally.rounds));
}

/// Waiting, dynimized from the archive, stop, restart, undo, restart, redo: what a user of the manual does in a day.
#[test]
fn the_life_of_a_program() {
    let place = Place::new();
    let (victim, exe, name) = match start_victim("switches", &place, "life") {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    let text = Text::new(pid);
    // The archive knows this build, as after a day of work.
    let record = ["record", "--direct", "-p", &pid.to_string(), "--duration", "500ms"];
    run(Command::new(BINARY).args(record).arg("--archive").arg(place.file("archive.db"))).expect_done();
    run(Command::new(BINARY).args(["analyze", "--archive"]).arg(place.file("archive.db"))).expect_done();

    place.configure(&format!("[exeList]\n{name} -delay=3600 -window=1s -cpu-usage=1\n"));
    let daemon = place.daemon();
    place.until_state(pid, &["waiting"]);
    let out = place.run(&["status"]);
    assert!(out.stdout.starts_with(&format!("{name}, pid: {pid}, waiting\n")), "{out:#?}");
    text.assert_pristine(pid, "while it waits");

    // A shorter delay, by a reload.
    place.configure(&format!("[exeList]\n{name} -delay=0 -window=1s -cpu-usage=1\n"));
    daemon.signal(Signal::SIGHUP);
    place.until_state(pid, &["dynimized"]);
    // Unless that plan, which was made in half a second, was found not to fit, and it is profiled anew already.
    let ledger = place.ledger(pid);
    assert!(ledger == "dynimized" || place.log().contains(", profiling"), "{ledger}: {}", place.log());
    place.assert_logged(&["started", "options: ", ", waiting", "read again", "dynimizing", ", dynimized"]);

    // A wrong configuration changes nothing.
    place.configure("[exeLits]\n");
    daemon.signal(Signal::SIGHUP);
    place.until("the log names the wrong line", || place.log().contains("stays as it was"));
    place.assert_logged(&["stays as it was", "line 1"]);
    assert_ne!(place.state(pid), "unknown");

    place.configure(&format!("[exeList]\n{name} -delay=0 -window=1s -cpu-usage=1\n"));
    let stopped = place.run(&["stop"]);
    stopped.expect_done();
    drop(daemon);
    // Unless it was profiled anew in that moment, for a plan of the archive that does not fit.
    let left = place.ledger(pid);
    assert!(left == "dynimized" || left == "undynimized", "stop has left it {left}");

    let daemon = place.daemon();
    place.until_state(pid, &["dynimized", "waiting", "profiling", "dynimizing"]);
    let undone = place.run(&["undo", "-p", &name, "--json"]);
    undone.expect_done();
    assert_eq!(undone.json()["state"], "undynimized");
    assert_eq!(place.state(pid), "undynimized");
    text.assert_pristine(pid, "after undo");

    // The next daemon leaves it alone, too.
    daemon.kill();
    let daemon = place.daemon();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(place.state(pid), "undynimized", "{}", place.log());
    text.assert_pristine(pid, "under the next daemon");

    place.run(&["redo", "-p", &name]).expect_done();
    place.until_state(pid, &["profiling", "dynimizing"]);
    place.until_decided(pid);
    daemon.stop();
    run(Command::new(BINARY).args(["undo", "--direct", "-p", &pid.to_string()])).expect_done();
    text.assert_pristine(pid, "after the last undo");
    finish(victim, &exe);
}

/// Whatever the daemon is doing when it is killed, the program goes on, and the next daemon puts right what was half done.
#[test]
fn a_killed_daemon_leaves_nothing_half_done() {
    let place = Place::new();
    let (mut victim, exe, name) = match start_victim("switches", &place, "kill") {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    let text = Text::new(pid);
    place.configure(&format!("[exeList]\n{name} -delay=0 -window=600ms -cpu-usage=1\n"));
    let mut rng = Rng::new("a_killed_daemon");
    for n in 0..8 {
        let daemon = place.daemon();
        if n > 0 {
            place.run(&["redo"]).expect_done();
        }
        place.until_state(pid, &["profiling", "dynimizing"]);
        rng.sleep(Duration::from_millis(2500));
        daemon.kill();
        // Its job does not outlive it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !run(Command::new(BINARY).args(["undo", "--direct", "-p", &pid.to_string(), "--json"]))
            .stdout
            .contains("state")
        {
            assert!(Instant::now() < deadline, "kill {n}: somebody still holds the program");
            thread::sleep(Duration::from_millis(20));
        }
        text.assert_pristine(pid, "after an undo");
        victim.assert_serving("after a kill");
    }
    // And without an undo in between: the next daemon finds what was left.
    let daemon = place.daemon();
    place.run(&["redo"]).expect_done();
    place.until_state(pid, &["dynimizing"]);
    daemon.kill();
    let daemon = place.daemon();
    place.until("it is in order again", || !["unknown", "partly dynimized"].contains(&place.state(pid).as_str()));
    place.run(&["undo", "-p", &name]).expect_done();
    assert_eq!(place.state(pid), "undynimized", "{}", place.log());
    text.assert_pristine(pid, "after the last undo");
    daemon.stop();
    finish(victim, &exe);
}

/// A user may look at everything and change what is its own.
#[test]
fn who_may_do_what() {
    if !is_root() {
        skip!("only root can be two users");
    }
    let place = Place::new();
    let exe = match build::victim("switches", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let (copied, name) = copy(&exe, place.folder.path(), "may");
    let as_user = |user: u32| {
        let mut c = Command::new("setpriv");
        c.args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".to_owned()]);
        c
    };
    let (owner, other) = (54_321, 54_322);
    let victim =
        Victim::start_with(&copied, as_user(owner).arg(&copied).arg("--forever")).expect("switches runs anywhere");
    let pid = victim.pid();
    // The command lies in a folder that other users may not look into.
    let dyni = place.file("dyni");
    copy_to(Path::new(BINARY), &dyni);
    let ask = |user: u32, args: &[&str]| {
        run(as_user(user).arg(&dyni).args(args).arg("--socket").arg(place.file("control.sock")))
    };
    place.configure(&format!("[exeList]\n{name} -delay=3600\n[users]\n{owner}\n"));
    let daemon = place.daemon();
    place.until_state(pid, &["waiting"]);
    for user in [owner, other] {
        let out = ask(user, &["status"]);
        out.expect_done();
        assert!(out.stdout.starts_with(&format!("{name}, pid: {pid}, waiting\n")), "{out:#?}");
    }
    let spec = pid.to_string();
    for args in [&["undo", "-p", &spec][..], &["redo", "-p", &spec], &["redo"], &["undo", "--all"], &["stop"]] {
        ask(other, args).expect_clear_error(&[3], &["may only change programs of its own"]);
    }
    assert_eq!(place.state(pid), "waiting");
    ask(owner, &["stop"]).expect_clear_error(&[3], &["user 54321"]);
    let out = ask(owner, &["undo", "-p", &name]);
    out.expect_done();
    assert!(out.stdout.starts_with(&format!("{name}, pid: {pid}, undynimized\n")), "{out:#?}");
    assert_eq!(place.state(pid), "undynimized");
    // Those of other users are none of the daemon's business.
    place.configure(&format!("[exeList]\n{name}\n[users]\n{other}\n"));
    daemon.signal(Signal::SIGHUP);
    place.until("it is no longer followed", || place.program(pid).is_null());
    daemon.stop();
    finish(victim, &exe);
}

/// One daemon; nonsense on its socket does not disturb it; its metrics are there; systemd hears of it.
#[test]
fn sockets() {
    let place = Place::new();
    place.configure("[exeList]\n");
    let notify = UnixDatagram::bind(place.file("notify")).expect("a socket");
    let mut command = place.daemon_command();
    command.arg(format!("--metrics=unix:{}", place.file("metrics").display()));
    command.env("NOTIFY_SOCKET", place.file("notify")).env("WATCHDOG_USEC", "2000000");
    let daemon = place.daemon_with(&mut command);
    let (send, words) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok(n) = notify.recv(&mut buffer) {
            if send.send(String::from_utf8_lossy(&buffer[..n]).into_owned()).is_err() {
                return;
            }
        }
    });
    let mut heard = String::new();
    let mut hear = |word: &str| {
        while !heard.contains(word) {
            let more = words.recv_timeout(PATIENCE);
            heard += &more.unwrap_or_else(|e| panic!("no {word} in {heard}: {e}"));
        }
    };
    hear("READY=1");
    hear("WATCHDOG=1");

    let second = place.run(&["daemon"]);
    second.expect_clear_error(&[3], &["another one runs"]);
    place.run(&["start"]).expect_clear_error(&[3], &["another one runs"]);

    let mut rng = Rng::new("sockets");
    for n in 0..60_u64 {
        let mut peer = UnixStream::connect(place.file("control.sock")).expect("connect");
        peer.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut bytes: Vec<u8> = (0..rng.below(20_000)).map(|_| rng.next() as u8).collect();
        if n % 2 == 0 {
            bytes.push(b'\n');
        }
        // It may hang up in the middle.
        let _ = peer.write_all(&bytes);
        let _ = peer.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        if peer.read_to_string(&mut answer).is_ok() && !answer.is_empty() {
            assert!(answer.contains("\"error\""), "{answer}");
        }
    }
    // Those who say nothing keep nobody else from being heard.
    let idle: Vec<_> = (0..40).map(|_| UnixStream::connect(place.file("control.sock")).expect("connect")).collect();
    assert_eq!(place.status()["daemon"]["pid"], daemon.pid());
    drop(idle);

    let mut scraper = UnixStream::connect(place.file("metrics")).expect("connect");
    scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("ask");
    let mut answer = String::new();
    scraper.read_to_string(&mut answer).expect("an answer");
    assert!(
        answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("\ndyni_daemon_cpu_seconds_total "),
        "{answer}"
    );
    // The metrics' socket takes no orders.
    let mut scraper = UnixStream::connect(place.file("metrics")).expect("connect");
    scraper.write_all(b"{\"ask\":\"stop\"}\n\r\n\r\n").expect("ask");
    let mut answer = String::new();
    scraper.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");

    daemon.stop();
    hear("STOPPING=1");
    assert!(!place.file("control.sock").exists() && !place.file("metrics").exists());
    // Without one, `status` works as before.
    assert!(place.status()["daemon"].is_null());
    place.run(&["stop"]).expect_clear_error(&[1], &["none runs"]);
}

/// A daemon in the background, which a failed test must not leave running.
struct Background(i32);

impl Drop for Background {
    fn drop(&mut self) {
        // It is no child of ours: its number may name another process once it has ended.
        let exe = std::fs::read_link(format!("/proc/{}/exe", self.0));
        if exe.is_ok_and(|exe| exe == Path::new(BINARY)) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), Signal::SIGKILL);
        }
    }
}

/// In the background, and by Dynimize's own words.
#[test]
fn dynimizes_own_words() {
    let place = Place::new();
    let (victim, exe, name) = match start_victim("switches", &place, "words") {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    place.configure("");
    let log = format!("-log={}", place.file("log").display());
    let out = place.run(&["-start", &format!("-exe={name}"), "-delay=3600", "-window=1", &log, "-license=none"]);
    out.expect_done();
    let background = out.stdout.trim_end().strip_prefix("dyni runs in the background, pid: ").map(str::parse);
    let Some(Ok(background)) = background else { panic!("{out:#?}") };
    let _background = Background(background);
    place.until_state(pid, &["waiting"]);
    // After it may come what others do on this machine.
    assert!(place.run(&["-status"]).stdout.starts_with(&format!("{name}, pid: {pid}, waiting\n")));
    place.assert_logged(&["options: ", "delay 3600.0 s, window 1.0 s", "programs", &name]);
    place.run(&["-stop"]).expect_done();
    assert!(place.status()["daemon"].is_null());
    let out = place.run(&[&format!("-pid={pid}"), "-window=500ms"]);
    out.expect_done();
    // What does not pay is taken out again, and on a busy machine that may be measured: both ends are right.
    let done = out.stdout.contains(&format!("{name}, pid: {pid}, dynimized\n"));
    assert!(done || out.stdout.contains("it did not pay"), "{out:#?}");
    place.run(&["-undo", &format!("-pid={pid}")]).expect_done();
    assert_eq!(place.ledger(pid), "undynimized");
    let out = place.run(&["-update"]);
    out.expect(&[0]);
    assert!(out.stdout.contains("free software"), "{out:#?}");
    finish(victim, &exe);
}

/// A program whose work changes is profiled anew if that is wanted.
#[test]
fn drift_leads_to_a_new_profile() {
    let place = Place::new();
    let (victim, exe, name) = match start_victim("phases", &place, "drift") {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let pid = victim.pid();
    place.configure(&format!("[options]\nreoptimize\n[exeList]\n{name} -delay=0 -window=1s -cpu-usage=1\n"));
    let daemon = place.daemon();
    place.until_dynimized(pid);
    place.until("it was watched", || place.program(pid)["drift"].is_number());
    assert!(place.program(pid)["drift"].as_f64() < Some(0.25), "{}", place.program(pid));
    assert_eq!(place.state(pid), "dynimized");
    victim.signal(Signal::SIGUSR1);
    place.until("the drift is seen and leads to a new profile", || {
        ["profiling", "dynimizing"].contains(&place.state(pid).as_str())
    });
    place.until_dynimized(pid);
    daemon.stop();
    run(Command::new(BINARY).args(["undo", "--direct", "-p", &pid.to_string()])).expect_done();
    finish(victim, &exe);
}

/// A program in a container is seen and served from the host.
#[test]
fn a_program_in_other_namespaces() {
    let place = Place::new();
    let exe = match build::victim("switches", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let possible = Command::new("unshare").args(["--pid", "--mount", "--fork", "true"]).output();
    if !possible.is_ok_and(|o| o.status.success()) {
        skip!("unshare can't make PID and mount namespaces here");
    }
    let (copied, name) = copy(&exe, place.folder.path(), "ns");
    let mut container = Command::new("unshare");
    container.args(["--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]).arg(&copied).arg("--forever");
    let child = Daemon(container.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("run unshare"));
    place.configure(&format!("[exeList]\n{name} -delay=0 -window=1s -cpu-usage=1\n"));
    let daemon = place.daemon();
    let mut inner = 0;
    place.until("the program in the container is followed", || {
        inner = descendants(child.pid()).into_iter().next().unwrap_or(0);
        inner != 0 && !place.program(inner).is_null()
    });
    place.until_decided(inner);
    place.run(&["undo", "-p", &name]).expect_done();
    assert_eq!(place.ledger(inner), "undynimized");
    daemon.stop();
}

/// What a program is known to touch is read when it starts, whoever starts it; no more once that has not helped.
#[test]
fn programs_that_start_are_read_ahead_for() {
    let place = Place::new();
    let exe = match build::victim("pages", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let (exe, name) = copy(&exe, place.folder.path(), "pages");
    let data = place.file("data");
    fs::write(&data, vec![1; 512 * 4096]).expect("write");
    let archive = place.file("archive.db");
    let mut learn = Command::new(BINARY);
    learn.env("DYNI_ARCHIVE", &archive).args(["exec", "--learn", "--"]).arg(&exe).arg(&data).args(["0", "200", "400"]);
    assert!(learn.stdout(Stdio::null()).status().expect("run").success());
    let entry = || {
        let out = place.run(&["archive", "ls", "--program", &name, "--json"]);
        let entries = if out.code() == Some(0) { out.json()["entries"].clone() } else { Value::Null };
        entries[0]["id"].as_str().map(str::to_owned)
    };
    let deadline = Instant::now() + PATIENCE;
    while entry().is_none() {
        assert!(Instant::now() < deadline, "nothing is learned");
        thread::sleep(Duration::from_millis(30));
    }
    place.configure("[exeList]\nnobody-has-this-name\n");
    let daemon = place.daemon();
    let read_ahead = || place.status()["daemon"]["read_ahead"].clone();
    if read_ahead().is_null() {
        skip!("this kernel or this user has no proc connector");
    }
    // The program touches none of what it touched when it was learned: of one page the kernel may read far around.
    for starts in 1..=3 {
        let file = fs::File::open(&data).expect("open");
        file.sync_all().expect("write back");
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("drop from memory");
        assert!(Command::new(&exe).arg(&data).arg("1.1").stdout(Stdio::null()).status().expect("run").success());
        place.until("the start is seen", || read_ahead()["starts"].as_u64() >= Some(starts));
        if read_ahead()["pages"] == 0 {
            skip!("this file system keeps its pages in memory");
        }
        let seen = |id: &str| place.run(&["archive", "show", id, "--json"]).json()["starts_read_for"].as_u64();
        place.until("it is known what it used", || entry().is_some_and(|id| seen(&id) >= Some(starts)));
    }
    // The daemon asks the archive again when a program starts.
    place.until("nothing is read any more", || {
        assert!(Command::new("true").status().expect("run").success());
        read_ahead()["stopped"] == serde_json::json!([name])
    });
    assert!(place.run(&["status"]).stdout.contains(&format!("did not help: {name}")));
    daemon.stop();
}

/// `undo --all`, where a daemon and one program are alone: the daemon sees no other process.
#[test]
fn undo_of_everything() {
    let place = Place::new();
    let exe = match build::victim("switches", &variant::gcc_o2) {
        Ok(exe) => exe,
        Err(reason) => skip!("{reason}"),
    };
    let alone = ["--pid", "--mount", "--mount-proc", "--fork", "--kill-child"];
    let possible = Command::new("unshare").args(alone).arg("true").output();
    if !possible.is_ok_and(|o| o.status.success()) {
        skip!("unshare can't make PID and mount namespaces here");
    }
    let (copied, name) = copy(&exe, place.folder.path(), "all");
    place.configure(&format!("[exeList]\n{name} -delay=0 -window=1s -cpu-usage=1\n"));
    let daemon = place.daemon_command();
    let mut inside = Command::new("unshare");
    inside.args(alone).args(["sh", "-c", "\"$0\" --forever & exec \"$@\""]).arg(&copied);
    inside.arg(daemon.get_program()).args(daemon.get_args()).stdin(Stdio::null()).stdout(Stdio::null());
    let _inside = Daemon(inside.spawn().expect("run unshare"));
    let program = || {
        let out = place.run(&["status", "--json"]);
        out.json()["daemon"]["programs"][0].clone()
    };
    // What it is called inside; 1 is the daemon, which has taken the shell's place.
    place.until("the program is worked on", || program()["state"] == "profiling");
    // In the middle of it: what is under way is ended first.
    let out = place.run(&["undo", "--all", "--json"]);
    out.expect_done();
    assert_eq!(out.json()["state"], "undynimized");
    assert_eq!(program()["state"], "undynimized", "{}", place.log());
    thread::sleep(Duration::from_secs(2));
    assert_eq!(program()["state"], "undynimized", "it was chosen again\n{}", place.log());
    place.run(&["redo"]).expect_done();
    place.until("it is worked on again", || program()["state"] == "profiling");
    place.run(&["stop"]).expect_done();
}

/// The life cycle of the manual on three stock servers at once, each under load the whole time.
#[test]
fn stock_servers() {
    let place = Place::new();
    let bin = match stock::need(&["mariadbd", "nginx"])
        .and(stock::postgres_programs().ok_or("postgresql is not installed".into()))
    {
        Ok(bin) => bin,
        Err(reason) => skip!("{reason}"),
    };
    let of = |path: &str, tag| copy(Path::new(path), place.folder.path(), tag);
    let (mariadbd, mariadb_name) = of("/usr/sbin/mariadbd", "mariadbd");
    let (nginxd, nginx_name) = of("/usr/sbin/nginx", "nginx");
    let (postgresd, postgres_name) = copy(&bin.join("postgres"), place.folder.path(), "postgres");
    let started = (|| {
        Ok::<_, String>((
            stock::mariadb(Some(&mariadbd))?,
            stock::postgres(Some(&postgresd))?,
            stock::nginx(Some(&nginxd), "", |_| String::new())?,
        ))
    })();
    let (mut mariadb, postgres, (nginx, port)) = match started {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let (maria_dir, postgres_dir) = (mariadb.service.path().to_owned(), postgres.service.path().to_owned());
    stock::sysbench(&maria_dir, "oltp_read_write", "1", "prepare").expect("fill the tables");
    place.configure(&format!(
        "[options]\nnPrograms=3\n[exeList]\n{mariadb_name} -delay=1 -window=3s -cpu-usage=2\n\
         {postgres_name} -delay=1 -window=3s -cpu-usage=2\n{nginx_name} -delay=1 -window=3s -cpu-usage=2\n"
    ));
    let pids = [mariadb.service.pid(), postgres.service.pid(), nginx.service.pid()];

    let (stop, pause, at_rest, loads) =
        (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let load = |one: &dyn Fn() -> Result<(), String>| {
        while !stop.load(Ordering::Relaxed) {
            one()?;
            loads.fetch_add(1, Ordering::Relaxed);
        }
        Ok::<_, String>(())
    };
    thread::scope(|s| {
        let ask_maria = || {
            at_rest.store(pause.load(Ordering::SeqCst), Ordering::SeqCst);
            if pause.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(50));
                return Ok(());
            }
            stock::sysbench(&maria_dir, "oltp_read_only", "1", "run")
        };
        let loaders = [
            s.spawn(move || load(&ask_maria)),
            s.spawn(|| load(&|| stock::pgbench(&postgres_dir, &["-S", "-T", "1"]))),
            s.spawn(|| {
                load(&|| {
                    let url = format!("http://127.0.0.1:{port}/index.html");
                    let out = service::client(Command::new("wrk").args(["-t1", "-c4", "-d1s", &url]))?;
                    if out.contains("Non-2xx") || out.contains("Socket errors") { Err(out) } else { Ok(()) }
                })
            }),
        ];
        // Whatever panics here must not leave the loaders running, for the scope waits for them.
        let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let began = Instant::now();
            let daemon = place.daemon();
            pids.iter().for_each(|pid| place.until_dynimized(*pid));
            println!("three servers dynimized in {:.1} s", began.elapsed().as_secs_f64());
            place.assert_logged(&[", waiting", ", profiling", ", dynimizing", ", dynimized"]);
            let status = place.run(&["status"]).stdout;
            assert!(status.contains(&format!("{mariadb_name}, pid: {}, dynimized\n", pids[0])), "{status}");
            for (name, pid) in [(&postgres_name, pids[1]), (&nginx_name, pids[2])] {
                assert!(
                    status.contains(&format!("{name}, parent pid {pid} and its children, dynimized\n")),
                    "{status}"
                );
            }

            // dyni goes and comes; they stay as they are.
            daemon.stop();
            for pid in pids {
                let ledgers =
                    run(Command::new(BINARY).args(["status", "--direct", "-v", "-p", &pid.to_string()])).stdout;
                assert_eq!(place.ledger(pid), "dynimized", "{}\n{ledgers}", place.log());
            }
            let daemon = place.daemon();
            pids.iter().for_each(|pid| drop(place.until_state(*pid, &["dynimized"])));

            // Undo and redo.
            place.run(&["undo", "-p", &nginx_name]).expect_done();
            assert_eq!(place.state(pids[2]), "undynimized");
            place.run(&["redo", "-p", &nginx_name]).expect_done();
            place.until_dynimized(pids[2]);

            // A server that starts again is given the plan of the archive, without a new profile.
            pause.store(true, Ordering::SeqCst);
            place.until("MariaDB's clients rest", || at_rest.load(Ordering::SeqCst));
            mariadb.restart();
            mariadb.service.wait_ready(|| stock::sql(&maria_dir, "select 1").is_ok());
            let (pid, ready) = (mariadb.service.pid(), Instant::now());
            pause.store(false, Ordering::SeqCst);
            place.until_state(pid, &["dynimized"]);
            println!("MariaDB dynimized {:.1} s after its restart", ready.elapsed().as_secs_f64());
            place.assert_logged(&[&format!("{mariadb_name}, pid: {pid}, dynimized (with the plan of the archive)")]);
            thread::sleep(Duration::from_secs(1));
            for name in [&mariadb_name, &postgres_name, &nginx_name] {
                place.run(&["undo", "-p", name]).expect_done();
            }
            daemon.stop();
        }));
        stop.store(true, Ordering::Relaxed);
        for loader in loaders {
            let done = loader.join().expect("a load does not panic");
            if let (Err(e), Ok(())) = (&done, &lived) {
                panic!("a query failed: {e}\n{}", place.log());
            }
        }
        if let Err(panic) = lived {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok(), "nginx does not serve any more");
    println!("{} loads, none failed", loads.load(Ordering::Relaxed));
}
