//! Debian's python3, which is not position-independent, under the victims' protocol.

use std::path::Path;
use std::process::Command;

use crate::common::cycles::{Effort, Expect, Run};
use crate::common::process::Victim;
use crate::skip;

#[test]
fn python() {
    let Ok(real) = std::fs::canonicalize("/usr/bin/python3") else {
        skip!("python3 is not installed");
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/loop.py");
    let started = Victim::start_with(&script, Command::new(&real).arg("-I").arg(&script).arg("--forever"));
    let mut victim = started.expect("python3 needs nothing special");
    real.file_name().and_then(|n| n.to_str()).expect("a plain name").clone_into(&mut victim.module);
    Run::new("python".into(), victim, Expect::Served, Effort { record: "2s", ..Effort::FULL }).run();
}
