//! MariaDB: sysbench reads and writes, and a query whose answer is known.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::service::cycle;
use crate::skip;
use crate::stock::{self, sql, sysbench};

/// A table that nobody writes, and a question that takes joining, grouping, sorting, strings and a window.
const FIXED: &str = "create table t.fixed (id int primary key, v int, s varchar(64), key (v)) engine=innodb; insert into \
     t.fixed select seq, seq * 7919 % 10007, md5(seq) from t.seq_1_to_8000";
const QUESTION: &str = "select a.v % 13 as k, count(*), sum(b.id), bit_xor(crc32(a.s)), max(concat(a.s, '-', b.v)), \
     round(avg(sqrt(a.v)), 6), rank() over (order by sum(b.id)) from t.fixed a join t.fixed b on b.v = a.id \
     where a.s like '%7%' and a.v between 100 and 9000 group by k order by k";

#[test]
fn mariadb() {
    let mut stock = match stock::mariadb(None) {
        Ok(stock) => stock,
        Err(reason) => skip!("{reason}"),
    };
    let service = &mut stock.service;
    let path = service.path().to_owned();
    let dir = path.as_path();
    sql(dir, FIXED).expect("fill the fixed table");
    sysbench(dir, "oltp_read_write", "1", "prepare").expect("fill the tables");
    let answer = sql(dir, QUESTION).expect("the question");
    assert!(answer.lines().count() == 13, "the question has another answer: {answer}");

    let turn = AtomicU64::new(0);
    let load = || match turn.fetch_add(1, Ordering::Relaxed) % 3 {
        0 => sysbench(dir, "oltp_read_only", "2", "run"),
        1 => sysbench(dir, "oltp_read_write", "2", "run"),
        _ => sysbench(dir, "oltp_point_select", "2", "run"),
    };
    cycle(service, load, &mut |n, _, _| {
        assert_eq!(sql(dir, QUESTION).as_ref(), Ok(&answer), "cycle {n}");
    });
    assert_eq!(sql(dir, QUESTION).as_ref(), Ok(&answer), "at the end");
    let check = sql(dir, "check table t.fixed, t.sbtest1, t.sbtest2").expect("check the tables");
    assert!(check.lines().all(|l| l.ends_with("OK")), "damaged tables: {check}");
}
