//! Stock servers of the distribution, started in a folder of their own on Unix sockets or loopback, and their clients.
//!
//! Each can be run from a copy of its executable under another name, for tests that choose programs by name.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::{find_program, is_root};
use crate::service::{Service, client, folder};

/// A server and how to start it again.
pub struct Stock {
    /// Its process.
    pub service: Service,
    // It is the daemon's tests that start one again.
    #[allow(dead_code)]
    command: Command,
}

impl Stock {
    fn start(name: &'static str, dir: tempfile::TempDir, mut command: Command, quit: Signal) -> Self {
        Self { service: Service::start(name, dir, &mut command, quit), command }
    }

    /// Ends it in good order and starts it again.
    #[allow(dead_code)]
    pub fn restart(&mut self) {
        self.service.restart(&mut self.command);
    }
}

/// What of this is not installed.
///
/// # Errors
/// The first that is absent, as a reason.
pub fn need(programs: &[&str]) -> Result<(), String> {
    match programs.iter().find(|p| find_program(p).is_none()) {
        Some(absent) => Err(format!("{absent} is not installed")),
        None => Ok(()),
    }
}

fn exe_or(exe: Option<&Path>, name: &str) -> PathBuf {
    exe.map_or_else(|| find_program(name).expect("it was there a moment ago"), Path::to_owned)
}

/// MariaDB with an empty database `t`.
///
/// # Errors
/// What is not installed.
pub fn mariadb(exe: Option<&Path>) -> Result<Stock, String> {
    need(&["mariadbd", "mariadb-install-db", "mariadb", "sysbench"])?;
    let dir = folder("mariadb");
    let data = dir.path().join("data");
    let mut init = Command::new("mariadb-install-db");
    init.args(["--no-defaults", "--auth-root-authentication-method=normal"])
        .arg(format!("--datadir={}", data.display()));
    let user = is_root().then_some("--user=root");
    client(init.args(user)).expect("mariadb-install-db");
    let mut command = Command::new(exe_or(exe, "mariadbd"));
    command.arg("--no-defaults").args(user).arg(format!("--datadir={}", data.display()));
    command.arg(format!("--socket={}", dir.path().join("s").display())).arg("--skip-networking");
    command.arg(format!("--pid-file={}", dir.path().join("pid").display()));
    command.args(["--innodb-buffer-pool-size=128M", "--innodb-flush-log-at-trx-commit=0"]);
    let mut stock = Stock::start("mariadb", dir, command, Signal::SIGTERM);
    let path = stock.service.path().to_owned();
    stock.service.wait_ready(|| sql(&path, "select 1").is_ok());
    sql(&path, "create database t").expect("create a database");
    Ok(stock)
}

/// Asks MariaDB.
pub fn sql(dir: &Path, text: &str) -> Result<String, String> {
    let mut c = Command::new("mariadb");
    c.args(["--no-defaults", "-uroot", "-N", "-B", "-S"]).arg(dir.join("s")).arg("-e").arg(text);
    client(&mut c)
}

/// sysbench on database `t`.
pub fn sysbench(dir: &Path, script: &str, time: &str, verb: &str) -> Result<(), String> {
    let mut c = Command::new("sysbench");
    c.arg(script).arg(format!("--mysql-socket={}", dir.join("s").display())).arg("--mysql-user=root");
    c.args(["--mysql-db=t", "--tables=2", "--table-size=10000", "--threads=2"]);
    // Two transactions that lock the same rows in turn are a deadlock in any MariaDB; the client repeats one of them.
    c.arg("--mysql-ignore-errors=1213");
    let out = client(c.arg(format!("--time={time}")).arg(verb))?;
    if out.contains("FATAL") || out.contains("ALERT") { Err(out) } else { Ok(()) }
}

/// The newest installed PostgreSQL's programs; the ones in PATH are wrappers.
pub fn postgres_programs() -> Option<PathBuf> {
    let mut found: Vec<_> = fs::read_dir("/usr/lib/postgresql").ok()?.flatten().map(|e| e.path()).collect();
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

/// PostgreSQL with pgbench's tables.
///
/// # Errors
/// What is not installed.
pub fn postgres(exe: Option<&Path>) -> Result<Stock, String> {
    need(&["psql"])?;
    let bin = postgres_programs().ok_or("postgresql is not installed")?;
    if !bin.join("pgbench").is_file() {
        return Err("pgbench (postgresql-contrib) is not installed".to_owned());
    }
    let dir = folder("postgres");
    let data = dir.path().join("data");
    fs::create_dir(&data).expect("create the data folder");
    if is_root() {
        let user = nix::unistd::User::from_name("postgres").ok().flatten().expect("the package makes this user");
        for p in [dir.path(), data.as_path()] {
            nix::unistd::chown(p, Some(user.uid), Some(user.gid)).expect("chown");
        }
    }
    let mut init = as_postgres(&bin.join("initdb"));
    init.current_dir("/").args(["-A", "trust", "-U", "postgres", "--no-sync", "-D"]).arg(&data);
    client(&mut init).expect("initdb");
    let server = exe.map_or_else(|| bin.join("postgres"), Path::to_owned);
    let mut command = as_postgres(&server);
    command.current_dir("/").arg("-D").arg(&data).args(["-c", "listen_addresses=", "-c", "fsync=off", "-c"]);
    command.arg(format!("unix_socket_directories={}", dir.path().display())).args(["-c", "shared_buffers=64MB"]);
    // SIGINT is postgres's fast shutdown.
    let mut stock = Stock::start("postgres", dir, command, Signal::SIGINT);
    let path = stock.service.path().to_owned();
    stock.service.wait_ready(|| ask(&path, "select 1").is_ok());
    let mut fill = Command::new(bin.join("pgbench"));
    fill.args(["-i", "-q", "-s", "3", "-U", "postgres", "-h"]).arg(&path).arg("postgres");
    client(&mut fill).expect("fill the database");
    Ok(stock)
}

/// `psql` without anything of the user's.
pub fn psql(dir: &Path) -> Command {
    let mut c = Command::new("psql");
    c.args(["-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres", "-h"]).arg(dir);
    c
}

/// Asks PostgreSQL.
pub fn ask(dir: &Path, question: &str) -> Result<String, String> {
    client(psql(dir).arg("-c").arg(question)).map(|t| t.trim().to_owned())
}

/// `pgbench` with these options; a failed transaction is an error even where pgbench ends well.
pub fn pgbench(dir: &Path, args: &[&str]) -> Result<(), String> {
    let bin = postgres_programs().ok_or("postgresql is not installed")?;
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

/// A page that every nginx here has.
pub fn page() -> String {
    format!("<p>{}</p>\n", "x".repeat(700))
}

/// nginx with two workers on a loopback port. `server` makes the lines inside its `server { … }` from the port.
///
/// # Errors
/// What is not installed.
pub fn nginx(exe: Option<&Path>, http: &str, server: impl Fn(u16) -> String) -> Result<(Stock, u16), String> {
    need(&["nginx", "wrk"])?;
    let dir = folder("nginx");
    // The port is free now; nobody else on this machine has a reason to take it in the next moment.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let path = dir.path().display().to_string();
    fs::write(dir.path().join("index.html"), page()).expect("write a page");
    fs::write(
        dir.path().join("conf"),
        format!(
            "worker_processes 2; daemon off; pid {path}/pid; error_log {path}/errors;\n\
             events {{ worker_connections 256; }}\n\
             http {{\n  access_log {path}/access; keepalive_requests 1000000; client_body_temp_path {path}/t1;\n  \
             proxy_temp_path {path}/t2; fastcgi_temp_path {path}/t3; uwsgi_temp_path {path}/t4; scgi_temp_path {path}/t5;\n  \
             {http}\n  server {{ listen 127.0.0.1:{port}; root {path};\n{}  }}\n}}\n",
            server(port)
        ),
    )
    .expect("write the configuration");
    let mut command = Command::new(exe_or(exe, "nginx"));
    command.arg("-c").arg(dir.path().join("conf")).arg("-p").arg(dir.path());
    let mut stock = Stock::start("nginx", dir, command, Signal::SIGTERM);
    stock.service.wait_ready(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
    Ok((stock, port))
}
