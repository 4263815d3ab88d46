//! Redis: redis-benchmark for the load, and one connection that compares every answer with what it must be.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::find_program;
use crate::service::{Service, client, cycle, folder};
use crate::skip;

/// A connection that speaks just enough of the protocol.
struct Connection(BufReader<UnixStream>);

impl Connection {
    fn open(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        Some(Self(BufReader::new(stream)))
    }

    fn send(&mut self, words: &[&str]) {
        let mut bytes = format!("*{}\r\n", words.len());
        for w in words {
            bytes += &format!("${}\r\n{w}\r\n", w.len());
        }
        self.0.get_mut().write_all(bytes.as_bytes()).expect("the connection takes a command");
    }

    /// A reply as text: arrays as their members between brackets.
    fn reply(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the connection answers");
        let line = line.trim_end();
        assert!(!line.is_empty(), "the connection was closed");
        let (kind, rest) = line.split_at(1);
        match kind {
            "$" if rest == "-1" => "nil".into(),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().expect("a length") + 2];
                self.0.read_exact(&mut bytes).expect("the rest of the answer");
                String::from_utf8_lossy(&bytes[..bytes.len() - 2]).into_owned()
            }
            "*" => {
                let n: usize = rest.parse().expect("a length");
                let all: Vec<_> = (0..n).map(|_| self.reply()).collect();
                format!("[{}]", all.join(" "))
            }
            _ => line.to_owned(),
        }
    }

    fn ask(&mut self, words: &[&str]) -> String {
        self.send(words);
        self.reply()
    }

    fn expect(&mut self, words: &[&str], want: &str) {
        let got = self.ask(words);
        assert_eq!(got, want, "{words:?}");
    }
}

const SCRIPT: &str = "local s = 0 for i = 1, 2000 do s = (s * 31 + i) % 1000003 \
                      if i % 7 == 0 then s = s + #tostring(s) end end return {s, ARGV[1] .. s}";

/// The same sum as the script's.
fn script_sum() -> u64 {
    (1..=2000_u64).fold(0, |s, i| {
        let s = (s * 31 + i) % 1_000_003;
        if i % 7 == 0 { s + s.to_string().len() as u64 } else { s }
    })
}

/// One pass over the data types, with answers known from the arithmetic.
fn check(c: &mut Connection, n: u32) {
    let key = |k: &str| format!("check:{k}");
    c.expect(&["DEL", &key("h"), &key("z"), &key("l"), &key("n"), &key("s")], if n == 0 { ":0" } else { ":5" });
    c.expect(&["SET", &key("n"), "41"], "+OK");
    c.expect(&["INCRBY", &key("n"), &n.to_string()], &format!(":{}", 41 + n));
    for i in 0..60 {
        let (i, v) = (i.to_string(), (i * 7919 % 101).to_string());
        c.expect(&["HSET", &key("h"), &i, &v], ":1");
        c.expect(&["RPUSH", &key("l"), &v], &format!(":{}", i.parse::<u32>().expect("a number") + 1));
        c.send(&["ZADD", &key("z"), &v, &i]);
        assert!(c.reply().starts_with(':'));
        c.send(&["SADD", &key("s"), &v]);
        assert!(c.reply().starts_with(':'));
    }
    let values: Vec<u32> = (0..60).map(|i| i * 7919 % 101).collect();
    for i in (0..60).step_by(7) {
        c.expect(&["HGET", &key("h"), &i.to_string()], &values[i as usize].to_string());
    }
    let mut sorted = values.clone();
    sorted.sort_unstable();
    let join = |v: &[u32]| format!("[{}]", v.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    c.expect(&["LRANGE", &key("l"), "0", "-1"], &join(&values));
    c.expect(&["SORT", &key("l")], &join(&sorted));
    let mut by_score: Vec<(u32, String)> = values.iter().zip(0..).map(|(v, i)| (*v, i.to_string())).collect();
    by_score.sort();
    let names: Vec<_> = by_score.into_iter().map(|(_, name)| name).collect();
    c.expect(&["ZRANGE", &key("z"), "0", "-1"], &format!("[{}]", names.join(" ")));
    let sum = script_sum();
    c.expect(&["EVAL", SCRIPT, "0", "sum"], &format!("[:{sum} sum{sum}]"));
    c.expect(&["GET", "check:no-such-key"], "nil");
}

#[test]
fn redis() {
    let (Some(server), Some(bench)) = (find_program("redis-server"), find_program("redis-benchmark")) else {
        skip!("redis-server or redis-tools is not installed");
    };
    let dir = folder("redis");
    let socket = dir.path().join("s");
    let mut command = Command::new(server);
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(&socket);
    command.arg("--dir").arg(dir.path());
    let mut service = Service::start("redis", dir, &mut command, Signal::SIGTERM);
    service.wait_ready(|| Connection::open(&socket).is_some_and(|mut c| c.ask(&["PING"]) == "+PONG"));
    let mut connection = Connection::open(&socket).expect("it answered");
    check(&mut connection, 0);

    let load = || {
        let mut c = Command::new(&bench);
        c.arg("-s").arg(&socket).args(["-t", "get,set,incr,hset,lpush,rpop,zadd,mset", "-r", "10000"]);
        let out = client(c.args(["-n", "20000", "-c", "8", "-P", "8", "--csv"]))?;
        let rows = out.lines().filter(|l| l.starts_with('"') && !l.starts_with("\"test\"")).count();
        let bad = out.to_lowercase().contains("error") || rows < 8;
        if bad { Err(out) } else { Ok(()) }
    };
    cycle(&mut service, load, &mut |n, _, _| check(&mut connection, n + 1));
    check(&mut connection, 1000);
}
