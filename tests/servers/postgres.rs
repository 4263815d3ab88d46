//! PostgreSQL: a postmaster whose backends are forked, some from patched text. (BOLT's version of the same binary gives
//! backends that crash.)

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::Signal;

use crate::common::{find_program, is_root};
use crate::service::{Service, client, cycle, folder};
use crate::skip;

/// The newest installed server's programs; the ones in PATH are wrappers.
fn bin_folder() -> Option<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten().map(|e| e.path()).collect();
    found.sort_by_key(|p| p.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<u32>().ok()));
    found.into_iter().rev().map(|p| p.join("bin")).find(|b| b.join("postgres").is_file())
}

/// postgres refuses to run as root.
fn as_postgres(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut c = Command::new("setpriv");
    c.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(program);
    c
}

/// An answer that takes sorting, hashing, joining, strings, numerics and expressions of every kind.
const QUESTION: &str = "select count(*), sum(a.i * 7 % 13), md5(string_agg(a.i::text || case when a.i % 3 = 0 then 'x' \
     when b.j is null then 'n' else upper(b.t) end, ',' order by a.i % 101, a.i)), round(sum(sqrt(a.i))::numeric, 4), \
     max(regexp_replace(b.t, '[0-4]', '-')) from generate_series(1, 4000) a(i) left join \
     (select j, 't' || j % 17 as t from generate_series(1, 9000, 3) j) b on b.j = a.i * 2";

/// One session that stays open over everything.
struct Session(Child, BufReader<std::process::ChildStdout>);

impl Session {
    fn open(dir: &Path) -> Self {
        let mut child = psql(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("run psql");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        Self(child, out)
    }

    fn ask(&mut self, question: &str) -> String {
        let to = self.0.stdin.as_mut().expect("piped");
        writeln!(to, "{question};").and_then(|()| to.flush()).expect("the session takes a question");
        let mut line = String::new();
        self.1.read_line(&mut line).expect("the session answers");
        assert!(!line.is_empty(), "the session has ended at: {question}");
        line.trim().to_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn psql(dir: &Path) -> Command {
    let mut c = Command::new("psql");
    c.args(["-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres", "-h"]).arg(dir);
    c
}

fn ask(dir: &Path, question: &str) -> Result<String, String> {
    client(psql(dir).arg("-c").arg(question)).map(|t| t.trim().to_owned())
}

/// `pgbench` with these options; a failed transaction is an error even where pgbench ends well.
fn pgbench(bin: &Path, dir: &Path, args: &[&str]) -> Result<(), String> {
    let mut c = Command::new(bin.join("pgbench"));
    c.args(["-n", "-c", "2", "-U", "postgres", "-h"]).arg(dir).args(args).arg("postgres");
    let out = client(&mut c)?;
    let failed = |l: &&str| {
        let l = l.to_lowercase();
        l.contains("error")
            || l.contains("fatal")
            || l.contains("aborted")
            || (l.contains("failed") && !l.contains(": 0 "))
    };
    out.lines().find(failed).map_or(Ok(()), |l| Err(format!("pgbench: {l}\n{out}")))
}

#[test]
fn postgres() {
    let (Some(bin), Some(_)) = (bin_folder(), find_program("psql")) else {
        skip!("postgresql is not installed");
    };
    if !bin.join("pgbench").is_file() {
        skip!("pgbench (postgresql-contrib) is not installed");
    }
    let dir = folder("postgres");
    let data = dir.path().join("data");
    std::fs::create_dir(&data).expect("create the data folder");
    if is_root() {
        let user = nix::unistd::User::from_name("postgres").ok().flatten().expect("the package makes this user");
        for p in [dir.path(), data.as_path()] {
            nix::unistd::chown(p, Some(user.uid), Some(user.gid)).expect("chown");
        }
    }
    let mut init = as_postgres(&bin.join("initdb"));
    init.current_dir("/").args(["-A", "trust", "-U", "postgres", "--no-sync", "-D"]).arg(&data);
    client(&mut init).expect("initdb");
    let mut command = as_postgres(&bin.join("postgres"));
    command.current_dir("/").arg("-D").arg(&data).args(["-c", "listen_addresses=", "-c", "fsync=off", "-c"]);
    command.arg(format!("unix_socket_directories={}", dir.path().display())).args(["-c", "shared_buffers=64MB"]);
    // SIGINT is postgres's fast shutdown.
    let mut service = Service::start("postgres", dir, &mut command, Signal::SIGINT);
    let path = service.path().to_owned();
    service.wait_ready(|| ask(&path, "select 1").is_ok());
    let dir = path.as_path();
    client(
        Command::new(bin.join("pgbench"))
            .args(["-i", "-q", "-s", "3", "-U", "postgres", "-h"])
            .arg(dir)
            .arg("postgres"),
    )
    .expect("fill the database");
    let answer = ask(dir, QUESTION).expect("the question");
    let mut session = Session::open(dir);
    assert_eq!(session.ask(QUESTION), answer);

    let turn = AtomicU64::new(0);
    let load = || match turn.fetch_add(1, Ordering::Relaxed) % 4 {
        0 => pgbench(&bin, dir, &["-S", "-T", "2"]),
        1 => pgbench(&bin, dir, &["-T", "2"]),
        2 => pgbench(&bin, dir, &["-S", "-M", "prepared", "-T", "1"]),
        // A connection for each transaction: backends are born all the time.
        _ => pgbench(&bin, dir, &["-S", "-C", "-T", "1"]),
    };
    cycle(&mut service, load, &mut |n, text, _| {
        assert_eq!(session.ask(QUESTION), answer, "cycle {n}: an old backend's answer");
        if n % 5 == 0 {
            let mut fresh = Session::open(dir);
            let backend: i32 = fresh.ask("select pg_backend_pid()").parse().expect("a PID");
            assert!(!text.patches(backend).is_empty(), "cycle {n}: backend {backend} does not run patched text");
            assert_eq!(fresh.ask(QUESTION), answer, "cycle {n}: a new backend's answer");
        }
    });

    // What TPC-B promises: the four sums are one.
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches), \
                (select sum(tbalance) from pgbench_tellers) = (select coalesce(sum(delta), 0) from pgbench_history), \
                (select sum(abalance) from pgbench_accounts) = (select sum(tbalance) from pgbench_tellers)";
    assert_eq!(ask(dir, sums).as_deref(), Ok("t|t|t"), "the books do not balance");
    assert_eq!(session.ask(QUESTION), answer, "at the end");
}
