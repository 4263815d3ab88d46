//! What the end-to-end tests share: building victims, running them and dyni, and looking at a process from outside.
//!
//! Nothing here uses dyni's own libraries. A test that asked the code under test whether it had put the text back would
//! believe whatever that code believes.

// Every test binary uses a part of this only.
#![allow(dead_code)]

pub mod build;
pub mod cycles;
pub mod dyni;
pub mod memory;
pub mod process;
pub mod rng;
pub mod tools;

/// Prints why a test can't run here and leaves it. `tests/run` counts these lines.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        println!("SKIPPED: {}", format_args!($($reason)*));
        return;
    }};
}

/// Whether the tests run as root, which some of them need.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Finds a program in PATH and in the places where Debian keeps servers.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(Into::into))
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}
