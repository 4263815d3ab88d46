//! Builds the demo's target: a C program of its own, with the SQLite that the archive is built with anyway.
//!
//! It is a separate program and not a part of `dyni`, because dyni itself unwinds: where a module has frames that an
//! exception may pass, much of it can't be optimised, and the demo would show that instead of what servers see.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src/demo/target.c");
    println!("cargo::rerun-if-env-changed=CC");
    // Both come from libsqlite3-sys, which builds SQLite from its own copy of the source.
    let sqlite = |what: &str| env::var(format!("DEP_SQLITE3_{what}")).expect("libsqlite3-sys is a direct dependency");
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("demo-target");
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let status = Command::new(&compiler)
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIE", "-pie", "-s", "src/demo/target.c"])
        .arg(format!("-I{}", sqlite("INCLUDE")))
        .arg(format!("{}/libsqlite3.a", sqlite("LIB_DIR")))
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(&target)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{compiler} could not build the demo's target ({status})"),
        Err(e) => panic!("the C compiler {compiler} can't be run: {e}"),
    }
}
