//! What a command is: which file the kernel will run for it, and whether dyni can do anything for that.

use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use dyni_collector::elf;
use dyni_schema::{BuildId, FileKey};

/// How many scripts may be each other's interpreters, as in the kernel (fs/exec.c).
const MAX_SCRIPTS: usize = 5;
/// The longest first line of a script that the kernel reads (include/uapi/linux/binfmts.h).
const MAX_LINE: u64 = 256;

/// A program for which something may be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The file that the kernel will run, without symbolic links: of a script, its interpreter.
    pub path: PathBuf,
    /// Its base name, as a process has it.
    pub name: String,
    /// Which file it is.
    pub key: FileKey,
}

impl Program {
    /// Its build; `None` if it has no note of it.
    pub const fn build_id(&self) -> Option<&BuildId> {
        match &self.key {
            FileKey::Build(id) => Some(id),
            FileKey::Inode(_) => None,
        }
    }
}

/// What a command is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A program that a loader starts.
    Program(Program),
    /// It is started as if dyni were not there, for this reason.
    Untouched(&'static str),
    /// There is nothing of this name; whoever executes it says so.
    NotFound,
}

/// Finds out what a command is, without running anything.
pub fn of(command: &OsStr) -> Command {
    let Some(mut path) = find(command) else { return Command::NotFound };
    for _ in 0..MAX_SCRIPTS {
        let Ok(metadata) = fs::metadata(&path) else { return Command::NotFound };
        if !metadata.is_file() {
            return Command::NotFound;
        }
        let Ok(mut file) = File::open(&path) else { return Command::Untouched("its file can't be read") };
        match interpreter(&mut file) {
            Ok(Some(next)) => path = next,
            Ok(None) => return program(&path, &file, &metadata),
            Err(_) => return Command::Untouched("its file can't be read"),
        }
    }
    Command::Untouched("its interpreter is a script, too")
}

fn program(path: &Path, file: &File, metadata: &Metadata) -> Command {
    if metadata.mode() & (libc::S_ISUID | libc::S_ISGID) != 0 || has_capabilities(path) {
        // Under a tracer the kernel would start it without the rights that its file gives it.
        return Command::Untouched("its file gives it rights of its own (set-user-id, set-group-id or capabilities)");
    }
    match elf::start_facts(file) {
        Ok(facts) if facts.has_loader => {
            let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            Command::Program(Program { path, name, key: dyni_pbitmap::files::key(file, metadata) })
        }
        Ok(_) => Command::Untouched("it is statically linked"),
        Err(_) => Command::Untouched("it is no 64-bit x86-64 program"),
    }
}

/// Where `execvp` finds it.
fn find(command: &OsStr) -> Option<PathBuf> {
    if command.is_empty() {
        return None;
    }
    if command.as_bytes().contains(&b'/') {
        return Some(command.into());
    }
    // What the C library takes for want of a variable.
    let path = env::var_os("PATH").unwrap_or_else(|| OsString::from("/bin:/usr/bin"));
    let runs = |p: &PathBuf| fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    env::split_paths(&path).map(|dir| dir.join(command)).find(runs)
}

/// The interpreter of a script.
fn interpreter(file: &mut File) -> io::Result<Option<PathBuf>> {
    let mut start = Vec::new();
    file.take(MAX_LINE).read_to_end(&mut start)?;
    Ok(named_in(&start))
}

/// The interpreter that a script's first bytes name.
fn named_in(start: &[u8]) -> Option<PathBuf> {
    let line = start.strip_prefix(b"#!")?.split(|&b| b == b'\n').next()?;
    let word = line.split(|b| b" \t".contains(b)).find(|word| !word.is_empty())?;
    Some(PathBuf::from(OsString::from_vec(word.to_vec())))
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: both strings end in zero and outlive the call; with a length of 0 nothing is written.
    unsafe { libc::getxattr(path.as_ptr(), c"security.capability".as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_is_the_first_word_after_the_mark() {
        assert_eq!(named_in(b"#!/bin/sh\necho"), Some("/bin/sh".into()));
        assert_eq!(named_in(b"#! \t/usr/bin/env -S python3 -u\n"), Some("/usr/bin/env".into()));
        assert_eq!(named_in(b"#!\n"), None);
        assert_eq!(named_in(b"\x7fELF"), None);
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for name in ["", "/nonexistent/program", "no-program-has-this-name", "/"] {
            assert_eq!(of(OsStr::new(name)), Command::NotFound, "{name}");
        }
    }

    #[test]
    fn a_shell_is_a_program_and_has_a_name_without_links() {
        let Command::Program(program) = of(OsStr::new("sh")) else { panic!("sh is a program") };
        assert!(!fs::symlink_metadata(&program.path).unwrap().is_symlink());
        assert_eq!(program.name, program.path.file_name().unwrap().to_str().unwrap());
    }

    #[test]
    fn files_with_rights_of_their_own_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("copy");
        fs::copy("/bin/sh", &copy).unwrap();
        assert!(matches!(of(copy.as_os_str()), Command::Program(_)));
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o4755)).unwrap();
        assert!(matches!(of(copy.as_os_str()), Command::Untouched(why) if why.contains("rights")));
    }
}
