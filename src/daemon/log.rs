//! Where the daemon says what it does: a file with time stamps, or stderr, which under systemd is the journal (it has
//! stamps of its own).

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::archive::utc;
use crate::errors::Failure;
use crate::output::clean;

use super::server::with_suffix;

/// The log.
pub struct Log(To);

enum To {
    Stderr { stamps: bool },
    File { path: PathBuf, file: File, size: u64, max: u64 },
}

impl Log {
    /// To stderr; with time stamps unless the journal reads it.
    pub fn to_stderr() -> Self {
        let journal = std::env::var_os("JOURNAL_STREAM").is_some() && !io::stderr().is_terminal();
        Self(To::Stderr { stamps: !journal })
    }

    /// To a file that together with its `.old` stays below `max` bytes. What is there already stays.
    ///
    /// # Errors
    /// It can't be written.
    pub fn to_file(path: &Path, max: u64) -> Result<Self, Failure> {
        let broken = |e: io::Error| {
            Failure::failed(format!("write the log {}", path.display()), e).help("name another with --log")
        };
        if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            fs::create_dir_all(dir).map_err(broken)?;
        }
        let file = open(path).map_err(broken)?;
        let size = file.metadata().map_err(broken)?.len();
        Ok(Self(To::File { path: path.to_owned(), file, size, max }))
    }

    /// Where it goes, for people.
    pub fn place(&self) -> String {
        match &self.0 {
            To::Stderr { .. } => "stderr".to_owned(),
            To::File { path, .. } => path.display().to_string(),
        }
    }

    /// Writes a line. A disk that is full must not end the daemon.
    pub fn line(&mut self, text: &str) {
        let text = clean(text).replace('\n', " ");
        let stamped = || format!("{} {text}\n", now());
        match &mut self.0 {
            To::Stderr { stamps } => {
                let line = if *stamps { stamped() } else { format!("{text}\n") };
                let _ = io::stderr().lock().write_all(line.as_bytes());
            }
            To::File { path, file, size, max } => {
                let line = stamped();
                // Half for this one, half for the old one.
                if *size > 0 && *size + line.len() as u64 > *max / 2 {
                    let rotated = fs::rename(&*path, with_suffix(path, ".old")).and_then(|()| open(path));
                    if let Ok(fresh) = rotated {
                        (*file, *size) = (fresh, 0);
                    }
                }
                if file.write_all(line.as_bytes()).is_ok() {
                    *size += line.len() as u64;
                }
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).open(path)
}

fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    format!("{}:{:02} UTC", utc(seconds), seconds % 60)
}

/// Where a daemon in the background logs to if nothing else is said.
///
/// # Errors
/// The environment names no place.
pub fn usual_path() -> Result<PathBuf, Failure> {
    if nix::unistd::geteuid().is_root() {
        return Ok("/var/log/dyni.log".into());
    }
    let of = |variable: &str| std::env::var_os(variable).map(PathBuf::from).filter(|p| p.is_absolute());
    of("XDG_STATE_HOME")
        .or_else(|| of("HOME").map(|home| home.join(".local/state")))
        .map(|dir| dir.join("dyni.log"))
        .ok_or_else(|| {
            Failure::failed("find a place for the log", "neither XDG_STATE_HOME nor HOME is set")
                .help("name one with --log")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_stamps_and_nothing_that_takes_over_a_terminal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/dyni.log");
        Log::to_file(&path, 1 << 20).unwrap().line("nginx\x1b[2J, pid: 7\n, waiting");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.ends_with(" UTC nginx?[2J, pid: 7 , waiting\n"), "{text}");
        assert!(text.starts_with("20") && text.as_bytes()[4] == b'-', "{text}");
    }

    #[test]
    fn the_log_and_its_old_one_stay_within_their_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dyni.log");
        let mut log = Log::to_file(&path, 4096).unwrap();
        for n in 0..200 {
            log.line(&format!("line {n}"));
        }
        drop(log);
        // The next daemon goes on where the last one was.
        Log::to_file(&path, 4096).unwrap().line("line 200");
        let (new, old) = (fs::read_to_string(&path).unwrap(), fs::read_to_string(with_suffix(&path, ".old")).unwrap());
        assert!(new.len() <= 2048 && old.len() <= 2048 && new.len() + old.len() > 2048, "{} {}", new.len(), old.len());
        assert!(new.ends_with("line 200\n"));
        // Nothing is lost between the two.
        let first: u32 = new.lines().next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
        assert!(old.ends_with(&format!("line {}\n", first - 1)));
    }
}
