//! nginx: a master that only forks and workers that only serve, reloaded on the way; no request may fail.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::process::descendants;
use crate::service::{client, cycle};
use crate::skip;
use crate::stock;

/// A request on a kept connection, or on a new one where the server has said that it closes.
struct Browser {
    port: u16,
    kept: Option<BufReader<TcpStream>>,
}

impl Browser {
    fn get(&mut self, path: &str) -> (String, String) {
        let mut stream = self.kept.take().unwrap_or_else(|| {
            let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("connect");
            stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
            BufReader::new(stream)
        });
        write!(stream.get_mut(), "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("send a request");
        let (mut head, mut length, mut close) = (String::new(), 0, false);
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).expect("an answer");
            let lower = line.trim_end().to_lowercase();
            if lower.is_empty() {
                break;
            }
            if let Some(n) = lower.strip_prefix("content-length: ") {
                length = n.parse().expect("a length");
            }
            close |= lower == "connection: close";
            if head.is_empty() {
                line.trim_end().clone_into(&mut head);
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).expect("the body");
        if !close {
            self.kept = Some(stream);
        }
        (head, String::from_utf8_lossy(&body).into_owned())
    }

    fn expect(&mut self, path: &str, status: &str, body: &str) {
        let (head, got) = self.get(path);
        assert!(head.contains(status), "{path}: {head}");
        assert!(body.is_empty() || got == body, "{path}: {} bytes that are not the {} wanted", got.len(), body.len());
    }
}

#[test]
fn nginx() {
    let map = "map $uri $kind { ~^/r/(?<n>\\d+) number; default other; }";
    let started = stock::nginx(None, map, |port| {
        format!(
            "    add_header X-Kind $kind;\n    location / {{ rewrite ^/r/(.*)$ /$1 last; }}\n    \
             location = /up {{ proxy_pass http://127.0.0.1:{port}/big.txt; proxy_http_version 1.1; }}\n    \
             location = /text {{ default_type text/plain; return 200 \"$request_method $uri $kind\"; }}\n"
        )
    });
    let (mut stock, port) = match started {
        Ok(started) => started,
        Err(reason) => skip!("{reason}"),
    };
    let service = &mut stock.service;
    let page = stock::page();
    let big: String = (0..9000).map(|i| format!("line {}\n", i * 7 % 1013)).collect();
    fs::write(service.file("big.txt"), &big).expect("write a page");
    let mut browser = Browser { port, kept: None };
    let visit = |b: &mut Browser| {
        b.expect("/index.html", "200", &page);
        b.expect("/r/index.html", "200", &page);
        b.expect("/big.txt", "200", &big);
        b.expect("/text", "200", "GET /text other");
        b.expect("/absent", "404", "");
        // Through the proxy module, to itself. The length is known, so it is passed on.
        b.expect("/up", "200", &big);
    };
    visit(&mut browser);

    let (reloads, seen, seen_before) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let load = || {
        let url = format!("http://127.0.0.1:{port}/r/index.html");
        let out = client(Command::new("wrk").args(["-t1", "-c8", "-d2s", &url]))?;
        // A reload closes the connections that the old workers keep, which wrk counts as read errors: as many as that, and
        // if it came at the end of one run, maybe in the next.
        let now = reloads.load(Ordering::SeqCst);
        let last = seen.swap(now, Ordering::SeqCst);
        let closed = 8 * (now - seen_before.swap(last, Ordering::SeqCst));
        let wrong = out.lines().find_map(|l| l.trim().strip_prefix("Socket errors: "));
        let excused = |w: &str| (1..=closed).any(|n| w == format!("connect 0, read {n}, write 0, timeout 0"));
        if out.contains("Non-2xx") || wrong.is_some_and(|w| !excused(w)) { Err(out) } else { Ok(()) }
    };
    let master = service.pid();
    cycle(service, load, &mut |n, text, _| {
        visit(&mut browser);
        if n % 10 == 0 {
            let workers = descendants(master);
            let patched = workers.iter().filter(|w| !text.patches(**w).is_empty()).count();
            assert!(patched > 0, "cycle {n}: no worker of {workers:?} runs patched text");
        }
        if n % 17 == 16 {
            // New workers are born from a patched master, old ones end. What they hold open, they finish.
            browser.kept = None;
            reloads.fetch_add(1, Ordering::SeqCst);
            kill(Pid::from_raw(master), Signal::SIGHUP).expect("reload");
        }
    });
    visit(&mut browser);
    let errors = fs::read_to_string(service.file("errors")).unwrap_or_default();
    let bad: Vec<_> =
        errors.lines().filter(|l| l.contains("[alert]") || l.contains("[emerg]") || l.contains("[crit]")).collect();
    assert!(bad.is_empty(), "nginx complains: {bad:?}");
}
