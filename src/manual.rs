//! What is printed from the command line's own definition, for packagers: man pages, completions, fail points.

use std::io::{self, Write};

use clap::Command;

use crate::cli::{CompletionsArgs, ManArgs};
use crate::errors::Failure;

/// Prints the man page, or writes all pages into a folder.
///
/// # Errors
/// If they can't be written.
pub fn man(args: &ManArgs, command: Command) -> Result<(), Failure> {
    let broken = |e: io::Error| Failure::failed("write the man pages", e);
    match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(broken)?;
            clap_mangen::generate_to(command, dir).map_err(broken)
        }
        None => clap_mangen::Man::new(command).render(&mut io::stdout().lock()).map_err(broken),
    }
}

/// Prints a shell's completion script.
///
/// # Errors
/// Never; a closed stdout has ended the program already.
pub fn completions(args: &CompletionsArgs, mut command: Command) -> Result<(), Failure> {
    clap_complete::generate(args.shell, &mut command, "dyni", &mut io::stdout().lock());
    Ok(())
}

/// Prints the names of the fail points, one a line.
///
/// # Errors
/// If stdout is closed.
pub fn failpoints() -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    dyni_applier::FAILPOINTS
        .iter()
        .try_for_each(|name| writeln!(out, "{name}"))
        .map_err(|e| Failure::failed("print the fail points", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::CommandFactory;

    #[test]
    fn there_is_a_page_for_every_subcommand_people_use() {
        let dir = tempfile::tempdir().unwrap();
        man(&ManArgs { dir: Some(dir.path().into()) }, Cli::command()).unwrap();
        for page in ["dyni.1", "dyni-demo.1", "dyni-optimize.1", "dyni-undo.1"] {
            assert!(dir.path().join(page).is_file(), "{page}");
        }
        assert!(!dir.path().join("dyni-demo-target.1").exists());
    }
}
