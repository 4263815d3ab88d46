//! A server under test: started in its own folder, put under load, cycled, stopped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::dyni::{Dyni, Outcome, run};
use crate::common::memory::{RwxGuard, Text};
use crate::common::process::{PATIENCE, descendants};
use crate::common::rng::Rng;

/// How long the load runs before the profile, and the profile.
const RECORD: &str = "2s";

/// A server's process, ended when dropped.
pub struct Service {
    name: &'static str,
    child: Child,
    folder: TempDir,
    /// The signal that ends it in good order.
    quit: Signal,
}

/// A folder that other users can look into, as servers change theirs.
pub fn folder(name: &str) -> TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = TempDir::with_prefix(format!("dyni-{name}-")).expect("create a folder");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    dir
}

impl Service {
    /// Starts a server in its folder. Its output goes to `log` there.
    pub fn start(name: &'static str, folder: TempDir, command: &mut Command, quit: Signal) -> Self {
        let log = File::create(folder.path().join("log")).expect("create the log");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("start {name}: {e}"));
        Self { name, child, folder, quit }
    }

    /// Ends it in good order and runs a command in its place.
    // The daemon's tests do.
    #[allow(dead_code)]
    pub fn restart(&mut self, command: &mut Command) {
        self.end();
        let log = File::options().append(true).open(self.file("log")).expect("open the log");
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log).spawn();
        self.child = child.unwrap_or_else(|e| panic!("start {} again: {e}", self.name));
    }

    fn end(&mut self) {
        // It may be dead already; then there is nothing to stop.
        let _ = kill(Pid::from_raw(self.pid()), self.quit);
        let deadline = Instant::now() + Duration::from_secs(20);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file in its folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits until a probe succeeds.
    pub fn wait_ready(&mut self, mut probe: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !probe() {
            self.assert_alive("while starting");
            assert!(Instant::now() < deadline, "{} does not serve: {}", self.name, self.log());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Panics with the log if it has ended.
    pub fn assert_alive(&mut self, when: &str) {
        if let Some(status) = self.child.try_wait().expect("wait") {
            panic!("{} has ended {when} ({status}): {}", self.name, self.log());
        }
    }

    fn log(&self) -> String {
        let text = std::fs::read(self.file("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().rev().take(40).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs a client and returns its output; an exit status other than 0 is an error with everything it said.
pub fn client(command: &mut Command) -> Result<String, String> {
    let out = run(command);
    let all = format!("{}{}", out.stdout, out.stderr);
    if out.code() == Some(0) { Ok(all) } else { Err(format!("{}: {:?}: {all}", out.line, out.status)) }
}

/// Looks at the server between apply and undo, or after it.
pub type Look<'a> = &'a mut dyn FnMut(u32, &Text, &Outcome);

/// Cycles a server while `load` runs over and over in a thread of its own. `look` is called while patches are in.
pub fn cycle(service: &mut Service, load: impl Fn() -> Result<(), String> + Sync, look: Look<'_>) {
    let (name, pid) = (service.name, service.pid());
    let cycles = std::env::var("DYNI_TEST_CYCLES").ok().and_then(|v| v.parse().ok()).unwrap_or(50);
    let text = Text::new(pid);
    let (dyni, mut rng) = (Dyni::new(), Rng::new(name));
    let guard = RwxGuard::start(pid);
    let stop = AtomicBool::new(false);
    let mut stops = Vec::new();
    let (mut functions, began) = (0, Instant::now());
    let loads = thread::scope(|s| {
        let loader = s.spawn(|| {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                load().inspect_err(|e| println!("{name}, load {n}: {e}"))?;
                n += 1;
            }
            Ok::<_, String>(n)
        });
        // Whatever panics here must not leave the loader running, for the scope waits for it.
        let cycled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            thread::sleep(Duration::from_millis(300));
            dyni.make_plan(pid, RECORD);
            for n in 0..cycles {
                let when = format!("{name}, cycle {n}");
                assert!(!loader.is_finished(), "{when}: the load has failed");
                rng.sleep(Duration::from_millis(100));
                let with_huge_text = n % 5 == 2;
                if with_huge_text {
                    // A server may have less than 2 MB of text in one piece, or a kernel no huge pages.
                    dyni.run(&["apply", "-p", &pid.to_string(), "--only", "huge-text"]).expect(&[0, 3]);
                    rng.sleep(Duration::from_millis(50));
                }
                let out = dyni.apply(pid);
                out.expect_done();
                assert!(out.functions(None) > 0, "{when}: nothing was patched: {out:#?}");
                functions = functions.max(out.functions(None));
                stops.push(out.stop_ns());
                rng.sleep(Duration::from_millis(100));
                if n % 10 == 0 {
                    let state = dyni.state(pid);
                    assert!(state == "dynimized" || state == "partly dynimized", "{when}: the state is {state:?}");
                    assert!(!text.patches(pid).is_empty(), "{when}: apply has changed nothing");
                    println!("{when}: refused: {}", out.refused());
                }
                look(n, &text, &out);
                dyni.undo(pid).expect_done();
                service.assert_alive(&when);
                text.assert_pristine(pid, &when);
                text.assert_protections(pid, &when);
                assert_group_is_pristine(pid, &text, &when);
                if with_huge_text {
                    let status = dyni.run(&["status", "-v", "-p", &pid.to_string()]).stdout;
                    assert!(!status.contains("huge pages"), "{when}: {status}");
                }
                if n % 10 == 0 {
                    assert_eq!(dyni.state(pid), "undynimized", "{when}, after undo");
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        let loads = loader.join().expect("the load does not panic");
        if let Err(panic) = cycled {
            if let Err(e) = &loads {
                println!("{name}: the load: {e}");
            }
            std::panic::resume_unwind(panic);
        }
        loads.unwrap_or_else(|e| panic!("{name}: {e}"))
    });
    guard.assert_none();
    service.assert_alive("at the end");
    stops.sort_unstable();
    let ms = |i: usize| stops.get(i).copied().unwrap_or(0) as f64 / 1e6;
    let (median, most) = (ms(stops.len() / 2), ms(stops.len().saturating_sub(1)));
    let took = began.elapsed().as_secs_f64();
    println!(
        "{name}: {cycles} cycles, {functions} functions, stop median {median:.2} ms max {most:.2} ms, {loads} loads, {took:.0} s"
    );
}

/// The group's other processes too; one that was forked while the undo ran may take a moment.
fn assert_group_is_pristine(pid: i32, text: &Text, when: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let dirty: Vec<_> = descendants(pid).into_iter().filter(|p| !text.patches(*p).is_empty()).collect();
        if dirty.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{when}: processes {dirty:?} of the group still have patched text");
        thread::sleep(Duration::from_millis(50));
    }
}
