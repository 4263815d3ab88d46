//! A daemon and three stock servers under load for as long as one wants, while both are killed at random moments (by their
//! recorded PIDs). No query may fail but those of a server that was killed, and in the end every byte of code is as it was.
//!
//!     tests/soak 30m

#[path = "../common/mod.rs"]
mod common;
#[path = "../daemon/place.rs"]
#[allow(dead_code)]
mod place;
#[path = "../servers/service.rs"]
#[allow(dead_code)]
mod service;
#[path = "../servers/stock.rs"]
#[allow(dead_code)]
mod stock;

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::dyni::{BINARY, run};
use common::memory::Text;
use common::process::descendants;
use common::rng::Rng;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use place::{Daemon, PATIENCE, Place, copy};
use stock::Stock;

/// A server, its load, and whether the load has to rest because the server is being killed.
struct Subject {
    name: String,
    stock: Mutex<Stock>,
    probe: Box<dyn Fn() -> bool + Sync>,
    load: Box<dyn Fn(u64) -> Result<(), String> + Sync>,
    rest: AtomicBool,
    resting: AtomicBool,
    loads: AtomicU64,
}

impl Subject {
    fn new(
        name: String,
        stock: Stock,
        probe: impl Fn() -> bool + Sync + 'static,
        load: impl Fn(u64) -> Result<(), String> + Sync + 'static,
    ) -> Self {
        let no = || AtomicBool::new(false);
        let (probe, load) = (Box::new(probe), Box::new(load));
        Self { name, stock: Mutex::new(stock), probe, load, rest: no(), resting: no(), loads: AtomicU64::new(0) }
    }

    fn pid(&self) -> i32 {
        self.stock.lock().expect("no panic here").service.pid()
    }

    /// Loads it until told to stop; every load must do well.
    fn run(&self, stop: &AtomicBool) -> Result<(), String> {
        while !stop.load(Ordering::SeqCst) {
            let rest = self.rest.load(Ordering::SeqCst);
            self.resting.store(rest, Ordering::SeqCst);
            if rest {
                thread::sleep(Duration::from_millis(20));
                continue;
            }
            let turn = self.loads.fetch_add(1, Ordering::Relaxed);
            (self.load)(turn).map_err(|e| format!("{}, load {turn}: {e}\n{}", self.name, self.log()))?;
        }
        Ok(())
    }

    /// What the server said last, for whoever looks for the cause of a failed query.
    fn log(&self) -> String {
        let path = self.stock.lock().expect("no panic here").service.file("log");
        let text = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let tail: Vec<_> = text.lines().rev().take(40).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Kills it, the hard way or not, and starts it again.
    fn restart(&self, hard: bool) {
        self.rest.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + PATIENCE;
        while !self.resting.load(Ordering::SeqCst) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let mut stock = self.stock.lock().expect("no panic here");
        let pid = stock.service.pid();
        if hard {
            // The children first: they would hold the port or the shared memory that the next one needs. And the parent must
            // not put others in their place meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
            let family: Vec<i32> = descendants(pid).into_iter().chain([pid]).collect();
            for &process in &family {
                let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
            }
            // On a crowded machine it takes time until they are dead, and their shared memory is free.
            let deadline = Instant::now() + PATIENCE;
            while family.iter().any(|&process| is_alive(process)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
        stock.restart();
        stock.service.wait_ready(|| (self.probe)());
        drop(stock);
        self.rest.store(false, Ordering::SeqCst);
    }
}

/// Whether a process is there and no zombie: one gives back its memory before it becomes that.
fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn duration() -> Duration {
    let text = std::env::var("DYNI_SOAK").unwrap_or_else(|_| "2m".to_owned());
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = number.parse().unwrap_or_else(|_| panic!("DYNI_SOAK={text}: as in 90s, 30m or 2h"));
    Duration::from_secs(
        number * [("", 1), ("s", 1), ("m", 60), ("h", 3600)].iter().find(|u| u.0 == unit).map_or(1, |u| u.1),
    )
}

fn subjects(place: &Place) -> Result<Vec<Subject>, String> {
    stock::need(&["mariadbd", "nginx", "wrk"])?;
    let bin = stock::postgres_programs().ok_or("postgresql is not installed")?;
    let of = |path: &Path, tag| copy(path, place.folder.path(), tag);
    let (exe, name) = of(&common::find_program("mariadbd").expect("it is there"), "mariadbd");
    let mariadb = stock::mariadb(Some(&exe))?;
    let dir = mariadb.service.path().to_owned();
    stock::sysbench(&dir, "oltp_read_write", "1", "prepare")?;
    let (a, b) = (dir.clone(), dir);
    let scripts = ["oltp_read_only", "oltp_read_write", "oltp_point_select"];
    // The work changes every while, so that there is something to drift from.
    let load = move |turn: u64| stock::sysbench(&a, scripts[(turn / 20 % 3) as usize], "1", "run");
    let mariadb = Subject::new(name, mariadb, move || stock::sql(&b, "select 1").is_ok(), load);

    let (exe, name) = of(&bin.join("postgres"), "postgres");
    let postgres = stock::postgres(Some(&exe))?;
    let dir = postgres.service.path().to_owned();
    let (a, b) = (dir.clone(), dir);
    let load = move |turn: u64| {
        stock::pgbench(&a, if (turn / 20).is_multiple_of(2) { &["-S", "-T", "1"] } else { &["-T", "1"] })
    };
    let postgres = Subject::new(name, postgres, move || stock::ask(&b, "select 1").is_ok(), load);

    let (exe, name) = of(&common::find_program("nginx").expect("it is there"), "nginx");
    let (nginx, port) = stock::nginx(Some(&exe), "", |_| String::new())?;
    let load = move |turn: u64| {
        let url = format!("http://127.0.0.1:{port}/index.html");
        let out = service::client(Command::new("wrk").args(["-t1", "-c4", "-d1s", "--timeout", "20s", &url]))?;
        // What a crowded machine does to a request is worth knowing, and no failure.
        if let Some(latency) = out.lines().find(|l| l.trim().starts_with("Latency")) {
            println!("nginx, load {turn}: {}", latency.trim());
        }
        if out.contains("Non-2xx") || out.contains("Socket errors") { Err(out) } else { Ok(()) }
    };
    let nginx = Subject::new(name, nginx, move || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), load);
    Ok(vec![mariadb, postgres, nginx])
}

#[test]
fn soak() {
    let place = Place::new();
    let subjects = match subjects(&place) {
        Ok(subjects) => subjects,
        Err(reason) => skip!("{reason}"),
    };
    let list: String = subjects.iter().map(|s| format!("{} -delay=1 -window=3s -cpu-usage=1\n", s.name)).collect();
    place.configure(&format!("[options]\nnPrograms=2\nreoptimize\n[exeList]\n{list}"));
    let (length, began) = (duration(), Instant::now());
    let stop = AtomicBool::new(false);
    let mut counts = [0_u64; 5];
    thread::scope(|s| {
        let loaders: Vec<_> = subjects.iter().map(|subject| s.spawn(|| subject.run(&stop))).collect();
        let survived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut rng = Rng::new("soak");
            let mut daemon = place.daemon();
            while began.elapsed() < length {
                rng.sleep(Duration::from_secs(12));
                assert!(!loaders.iter().any(std::thread::ScopedJoinHandle::is_finished), "a load has failed");
                let subject = &subjects[rng.below(3) as usize];
                let what = rng.below(5);
                counts[what as usize] += 1;
                match what {
                    0 => daemon = again(&place, daemon),
                    1 => subject.restart(false),
                    2 => subject.restart(true),
                    // It may be new to the daemon or in the middle of something: what counts is that all go on.
                    3 => place.run(&["undo", "-p", &subject.pid().to_string()]).expect(&[0, 1, 3]),
                    _ => place.run(&["redo", "-p", &subject.pid().to_string()]).expect(&[0, 1, 3]),
                }
            }
            daemon.stop();
        }));
        stop.store(true, Ordering::SeqCst);
        for loader in loaders {
            let done = loader.join().expect("a load does not panic");
            assert!(done.is_ok(), "{}\n{}", done.unwrap_err(), place.log());
        }
        if let Err(panic) = survived {
            std::panic::resume_unwind(panic);
        }
    });
    for subject in &subjects {
        let pid = subject.pid();
        run(Command::new(BINARY).args(["undo", "--direct", "-p", &pid.to_string()])).expect_done();
        // What the patches say that are left, by the files alone.
        Text::new(pid).assert_pristine(pid, &subject.name);
        let loads = subject.loads.load(Ordering::Relaxed);
        println!("{}: {loads} loads, none failed", subject.name);
        assert!(loads > 0, "{} was never asked", subject.name);
    }
    let [killed, restarts, crashes, undone, redone] = counts;
    println!(
        "{:.0} s: dyni killed {killed} times, servers restarted {restarts} and killed {crashes} times, {undone} undos, \
         {redone} redos",
        began.elapsed().as_secs_f64()
    );
}

fn again(place: &Place, daemon: Daemon) -> Daemon {
    daemon.kill();
    place.daemon()
}
