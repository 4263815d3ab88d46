//! MariaDB: sysbench reads and writes, and a query whose answer is known.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::Signal;

use crate::common::{find_program, is_root};
use crate::service::{Service, client, cycle, folder};
use crate::skip;

/// A table that nobody writes, and a question that takes joining, grouping, sorting, strings and a window.
const FIXED: &str = "create table t.fixed (id int primary key, v int, s varchar(64), key (v)) engine=innodb; insert into \
     t.fixed select seq, seq * 7919 % 10007, md5(seq) from t.seq_1_to_8000";
const QUESTION: &str = "select a.v % 13 as k, count(*), sum(b.id), bit_xor(crc32(a.s)), max(concat(a.s, '-', b.v)), \
     round(avg(sqrt(a.v)), 6), rank() over (order by sum(b.id)) from t.fixed a join t.fixed b on b.v = a.id \
     where a.s like '%7%' and a.v between 100 and 9000 group by k order by k";

fn sql(dir: &Path, text: &str) -> Result<String, String> {
    let mut c = Command::new("mariadb");
    c.args(["--no-defaults", "-uroot", "-N", "-B", "-S"]).arg(dir.join("s")).arg("-e").arg(text);
    client(&mut c)
}

fn sysbench(dir: &Path, script: &str, time: &str, verb: &str) -> Result<(), String> {
    let mut c = Command::new("sysbench");
    c.arg(script).arg(format!("--mysql-socket={}", dir.join("s").display())).arg("--mysql-user=root");
    c.args(["--mysql-db=t", "--tables=2", "--table-size=10000", "--threads=2"]);
    // Two transactions that lock the same rows in turn are a deadlock in any MariaDB; the client repeats one of them.
    c.arg("--mysql-ignore-errors=1213");
    let out = client(c.arg(format!("--time={time}")).arg(verb))?;
    if out.contains("FATAL") || out.contains("ALERT") { Err(out) } else { Ok(()) }
}

#[test]
fn mariadb() {
    let programs = ["mariadbd", "mariadb-install-db", "mariadb", "sysbench"];
    if let Some(absent) = programs.iter().find(|p| find_program(p).is_none()) {
        skip!("{absent} is not installed");
    }
    let dir = folder("mariadb");
    let data = dir.path().join("data");
    let mut init = Command::new("mariadb-install-db");
    init.args(["--no-defaults", "--auth-root-authentication-method=normal"])
        .arg(format!("--datadir={}", data.display()));
    let user = is_root().then_some("--user=root");
    client(init.args(user)).expect("mariadb-install-db");
    let mut command = Command::new(find_program("mariadbd").expect("it was there a moment ago"));
    command.arg("--no-defaults").args(user).arg(format!("--datadir={}", data.display()));
    command.arg(format!("--socket={}", dir.path().join("s").display())).arg("--skip-networking");
    command.arg(format!("--pid-file={}", dir.path().join("pid").display()));
    command.args(["--innodb-buffer-pool-size=128M", "--innodb-flush-log-at-trx-commit=0"]);
    let mut service = Service::start("mariadb", dir, &mut command, Signal::SIGTERM);
    let path = service.path().to_owned();
    let dir = path.as_path();
    service.wait_ready(|| sql(dir, "select 1").is_ok());
    sql(dir, "create database t").and_then(|_| sql(dir, FIXED)).expect("fill the fixed table");
    sysbench(dir, "oltp_read_write", "1", "prepare").expect("fill the tables");
    let answer = sql(dir, QUESTION).expect("the question");
    assert!(answer.lines().count() == 13, "the question has another answer: {answer}");

    let turn = AtomicU64::new(0);
    let load = || match turn.fetch_add(1, Ordering::Relaxed) % 3 {
        0 => sysbench(dir, "oltp_read_only", "2", "run"),
        1 => sysbench(dir, "oltp_read_write", "2", "run"),
        _ => sysbench(dir, "oltp_point_select", "2", "run"),
    };
    cycle(&mut service, load, &mut |n, _, _| {
        assert_eq!(sql(dir, QUESTION).as_ref(), Ok(&answer), "cycle {n}");
    });
    assert_eq!(sql(dir, QUESTION).as_ref(), Ok(&answer), "at the end");
    let check = sql(dir, "check table t.fixed, t.sbtest1, t.sbtest2").expect("check the tables");
    assert!(check.lines().all(|l| l.ends_with("OK")), "damaged tables: {check}");
}
