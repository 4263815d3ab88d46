//! gdb and perf on a stock, stripped server that runs in its copies.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::dyni::Dyni;
use crate::common::find_program;
use crate::common::tools::{Gdb, Perf, assert_named, caches, in_caches, is_whole};
use crate::service::{Service, client, folder};
use crate::skip;

/// How often it is looked at.
const LOOKS: usize = 20;

#[test]
fn gdb_and_perf_see_through_copies_of_a_stripped_server() {
    let (Some(server), Some(bench)) = (find_program("redis-server"), find_program("redis-benchmark")) else {
        skip!("redis-server or redis-tools is not installed");
    };
    let (gdb, perf) = match (Gdb::find(), Perf::find()) {
        (Ok(gdb), Ok(perf)) => (gdb, perf),
        (Err(reason), _) | (_, Err(reason)) => skip!("{reason}"),
    };
    let dir = folder("redis-tools");
    let socket = dir.path().join("s");
    let mut command = Command::new(server);
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(&socket);
    command.arg("--dir").arg(dir.path());
    let mut service = Service::start("redis", dir, &mut command, Signal::SIGTERM);
    let load = |count: &str| {
        let mut c = Command::new(&bench);
        c.arg("-s").arg(&socket).args(["-t", "get,set,hset,zadd", "-n", count, "-c", "4", "-P", "8", "-q"]);
        client(&mut c)
    };
    service.wait_ready(|| load("1").is_ok());

    let (pid, d, stop) = (service.pid(), Dyni::new(), AtomicBool::new(false));
    thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // The tools stop the server for moments; what it answers is another test's matter.
                let _ = load("20000");
            }
        });
        let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            thread::sleep(Duration::from_millis(300));
            d.make_plan(pid, "2s");
            d.apply(pid).expect_done();
            let report = perf.record(Some(pid), 2, &d.folder().join("data"), None);
            assert_named(&report, 20);
            // Functions that the stripped file has no name for are named by their place in it.
            assert!(report.iter().any(|l| l.symbol.contains("+0x")), "{report:#?}");
            let caches = caches(pid);
            let mut most = 0;
            for look in 0..LOOKS {
                let frames = gdb.backtrace(pid);
                assert!(is_whole(&frames, pid), "look {look}: the backtrace is not whole: {frames:x?}");
                most = most.max(in_caches(&frames, &caches));
            }
            assert!(most >= 2, "never were two frames in copies");
            println!("{most} frames in copies");
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = looked {
            std::panic::resume_unwind(panic);
        }
    });
    service.assert_alive("at the end");
}
