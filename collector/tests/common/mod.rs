//! Small C programs to look at: compiled into a temporary directory, started, and ended with the test.
#![allow(dead_code, reason = "each test file uses its part of this")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

/// A program that does what its argument says. Every mode prints `ready` once it works and ends when its input does.
const VICTIM: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <dlfcn.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/wait.h>

volatile unsigned long sink;
__attribute__((noinline)) void hot_one(unsigned long n) { for (unsigned long i = 0; i < n; i++) sink += i * i; }
__attribute__((noinline)) void hot_two(unsigned long n) { for (unsigned long i = 0; i < n; i++) sink ^= i + 7; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static void ready(void) { puts("ready"); fflush(stdout); }
static double cpu(void) { struct timespec t; clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static void burn(double seconds) { for (double end = cpu() + seconds; cpu() < end;) hot_one(200000); }
static void *burn_one(void *unused) { for (;;) hot_one(1000000); return unused; }
static void *burn_two(void *unused) { for (;;) hot_two(1000000); return unused; }
static void *briefly(void *unused) { hot_two(100000); return unused; }
static void *until_eof(void *unused) { char c; while (read(0, &c, 1) > 0); _exit(0); return unused; }
static volatile sig_atomic_t signals;
static void count_signal(int s) { (void)s; signals++; }

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "burn";
    pthread_t t;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (strcmp(mode, "sleep")) pthread_create(&t, 0, until_eof, 0);
    if (!strcmp(mode, "burn")) { ready(); burn_one(0); }
    if (!strcmp(mode, "sleep")) { ready(); until_eof(0); }
    if (!strcmp(mode, "threads")) {
        pthread_create(&t, 0, burn_one, 0);
        ready();
        usleep(300000);
        pthread_create(&t, 0, burn_two, 0); /* born during the recording */
        burn_one(0);
    }
    if (!strcmp(mode, "brief")) { /* no thread lives for a period of the sampler */
        for (int i = 0; ; i++) {
            if (i == 200) ready();
            pthread_create(&t, 0, briefly, 0);
            pthread_join(t, 0);
        }
    }
    if (!strcmp(mode, "forks")) { /* a master that forks workers all the time */
        ready();
        for (;;) {
            pid_t p = fork();
            if (!p) { prctl(PR_SET_PDEATHSIG, SIGKILL); burn(0.05); _exit(0); }
            usleep(50000);
            while (waitpid(-1, 0, WNOHANG) > 0);
        }
    }
    if (!strcmp(mode, "workers")) { /* a master with two lasting workers */
        for (int i = 0; i < 2; i++)
            if (!fork()) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) { hot_one(100000); usleep(1000); } }
        usleep(20000);
        ready();
        for (;;) pause();
    }
    if (!strcmp(mode, "exit")) { ready(); burn(argc > 2 ? atof(argv[2]) : 0.4); _exit(0); }
    if (!strcmp(mode, "shell")) { /* a child that runs another program */
        ready();
        for (;;) if (system("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done") < 0) return 1;
    }
    if (!strcmp(mode, "dlopen")) {
        ready();
        usleep(300000);
        void *lib = dlopen(argv[2], RTLD_NOW);
        void (*hot)(unsigned long) = lib ? (void (*)(unsigned long))dlsym(lib, "hot_library") : 0;
        if (!hot) { fputs(dlerror(), stderr); return 1; }
        for (;;) hot(1000000);
    }
    if (!strcmp(mode, "signals")) { /* counts its own timer's signals; argv[2] seconds, then prints the count */
        struct sigaction a = { .sa_handler = count_signal };
        sigaction(SIGUSR1, &a, 0);
        ready();
        int sent = 0;
        for (double end = now() + atof(argv[2]); now() < end;) {
            hot_one(200000);
            kill(getpid(), SIGUSR1);
            sent++;
        }
        usleep(50000);
        printf("%d %d\n", sent, (int)signals);
        fflush(stdout);
        return 0;
    }
    if (!strcmp(mode, "epoll")) { /* short waits that only a stop can end with EINTR; prints how many it did */
        int ep = epoll_create1(0), waits = 0, failed = 0;
        struct epoll_event e;
        ready();
        for (double end = now() + atof(argv[2]); now() < end; waits++) {
            hot_one(20000);
            failed += epoll_wait(ep, &e, 1, 1) != 0;
        }
        printf("%d %d\n", waits, failed);
        fflush(stdout);
        return 0;
    }
    if (!strcmp(mode, "zombie")) { /* prints the PID of a child that nobody collects */
        pid_t p = fork();
        if (!p) _exit(0);
        usleep(50000);
        printf("%d\n", (int)p);
        ready();
        for (;;) pause();
    }
    return 2;
}
"#;

const LIBRARY: &str = r#"
static volatile unsigned long sink;
__attribute__((noinline)) void hot_library(unsigned long n) { for (unsigned long i = 0; i < n; i++) sink += i; }
"#;

/// The compiled programs; gone when dropped.
pub struct Workshop {
    directory: tempfile::TempDir,
}

impl Workshop {
    /// `None`, with a line that says so, where there is no C compiler.
    pub fn open() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let this = Self { directory };
        let built = this.compile("victim", VICTIM, &["-pthread", "-ldl"])
            && this.compile("library.so", LIBRARY, &["-shared", "-fPIC"]);
        if !built {
            println!("skipped: no C compiler");
        }
        built.then_some(this)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Compiles a program; false if that did not work.
    pub fn compile(&self, name: &str, source: &str, flags: &[&str]) -> bool {
        let file = self.path(&format!("{name}.c"));
        std::fs::write(&file, source).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-g", "-o"]).arg(self.path(name)).arg(&file).args(flags);
        cc.stderr(Stdio::null()).status().is_ok_and(|s| s.success())
    }

    pub fn start(&self, arguments: &[&str]) -> Victim {
        Victim::start(&self.path("victim"), arguments)
    }

    /// Link addresses and size of a function of a compiled program.
    pub fn function(&self, file: &str, name: &str) -> std::ops::Range<u64> {
        let output = Command::new("nm").args(["-S", "--defined-only"]).arg(self.path(file)).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|l| l.split_whitespace().nth(3) == Some(name)).expect("the function is there");
        let hex = |i| u64::from_str_radix(line.split_whitespace().nth(i).unwrap(), 16).unwrap();
        hex(0)..hex(0) + hex(1)
    }
}

/// A running program; ended when dropped.
pub struct Victim {
    pub child: Child,
    pub output: BufReader<std::process::ChildStdout>,
    pub input: Option<ChildStdin>,
    /// What it printed before `ready`.
    pub said: Vec<String>,
}

impl Victim {
    pub fn start(program: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let input = child.stdin.take();
        let mut said = Vec::new();
        loop {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "the victim ended early");
            if line.trim() == "ready" {
                break;
            }
            said.push(line.trim().to_owned());
        }
        Self { child, output, input, said }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        if let Some(mut input) = self.input.take() {
            let _ = input.flush();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this host lets us sample with the kernel's clock; says so if not.
pub fn has_clock() -> bool {
    let me = perf_event::Builder::new(perf_event::events::Software::CPU_CLOCK).build();
    if let Err(e) = &me {
        println!("skipped: no perf events here ({e})");
    }
    me.is_ok()
}
