//! PostgreSQL: a postmaster whose backends are forked, some from patched text. (BOLT's version of the same binary gives
//! backends that crash.)

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::service::cycle;
use crate::skip;
use crate::stock::{self, ask, pgbench, psql};

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

#[test]
fn postgres() {
    let mut stock = match stock::postgres(None) {
        Ok(stock) => stock,
        Err(reason) => skip!("{reason}"),
    };
    let service = &mut stock.service;
    let path = service.path().to_owned();
    let dir = path.as_path();
    let answer = ask(dir, QUESTION).expect("the question");
    let mut session = Session::open(dir);
    assert_eq!(session.ask(QUESTION), answer);

    let turn = AtomicU64::new(0);
    let load = || match turn.fetch_add(1, Ordering::Relaxed) % 4 {
        0 => pgbench(dir, &["-S", "-T", "2"]),
        1 => pgbench(dir, &["-T", "2"]),
        2 => pgbench(dir, &["-S", "-M", "prepared", "-T", "1"]),
        // A connection for each transaction: backends are born all the time.
        _ => pgbench(dir, &["-S", "-C", "-T", "1"]),
    };
    cycle(service, load, &mut |n, text, _| {
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
