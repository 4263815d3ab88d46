//! Perf maps: files in `/tmp` from which `perf report` learns the names of code that no file holds.
//!
//! perf looks for `/tmp/perf-PID.map` of the process in which a sample was taken, first in that process's own mount
//! namespace and then in perf's own, by the PID that perf sees; a child that is forked while perf records has its parent's.
//! It reads the file when the report is made, and ignores one that belongs neither to root nor to the user who runs perf.
//! So dyni writes into its own `/tmp`, as the user who runs it: a container's files are never touched.
//!
//! A map of which dyni is not the author belongs to a compiler of the program itself (a JIT), which may hold it open and
//! write on: it is left alone. dyni's own are known by their first line, which names the unused end of a cache. A map takes
//! its name by one rename (or a link, where there must be nothing yet), so that nobody ever reads a half one, and what others
//! have put in its place, a symbolic link say, is neither followed nor written to.
//!
//! A map outlives its process, as a recording may be looked at later; those of processes that are gone are removed by the
//! next dyni that writes one, a day later.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use dyni_applier::symbols::Symbol;

/// Where perf looks, whatever `TMPDIR` says.
const FOLDER: &str = "/tmp";
/// The name in the first line of a map of dyni's.
const MARK: &str = "[dyni code cache]";
/// What files are called that will be maps.
const UNFINISHED: &str = ".dyni-perf-";
/// How long the map of a process that has ended is kept.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// Who a perf map belongs to.
enum Author {
    Nobody,
    Dyni,
    Other,
}

/// The path of a process's perf map.
fn path_of(pid: i32) -> PathBuf {
    Path::new(FOLDER).join(format!("perf-{pid}.map"))
}

/// Writes the map of process `pid`, or makes dyni's earlier one be about these symbols; where it is.
///
/// # Errors
/// A line for people: it could not be written, or there is one that is not dyni's.
pub fn write(pid: i32, symbols: &[Symbol]) -> Result<PathBuf, String> {
    let path = path_of(pid);
    let author = author(&path);
    if matches!(author, Author::Other) {
        return Err(format!("{} is not dyni's and was left alone: perf will not name the copies", path.display()));
    }
    let make = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(FOLDER)?;
        file.write_all(text(symbols).as_bytes())?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        let kept = match author {
            Author::Dyni => file.persist(&path),
            _ => file.persist_noclobber(&path),
        };
        kept.map(drop).map_err(|e| e.error)
    };
    make().map_err(|e| format!("{} could not be written ({e}): perf will not name the copies", path.display()))?;
    Ok(path)
}

/// A line for each symbol: its start and length in hexadecimal, its name.
fn text(symbols: &[Symbol]) -> String {
    let end = symbols.last().map_or(0, |s| s.start.0 + s.size);
    let mark = format!("{end:x} 1 {MARK}\n");
    let lines = symbols.iter().map(|s| format!("{:x} {:x} {}\n", s.start.0, s.size, s.name));
    std::iter::once(mark).chain(lines).collect()
}

fn author(path: &Path) -> Author {
    match open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Author::Nobody,
        Ok(Some(file)) if has_mark(&file) => Author::Dyni,
        _ => Author::Other,
    }
}

/// Opens a plain file; `None` for anything else. Nothing is followed, and nobody is waited for.
fn open(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    Ok(file.metadata()?.is_file().then_some(file))
}

fn has_mark(file: &File) -> bool {
    let mut line = String::new();
    let read = BufReader::new(file.take(256)).read_line(&mut line);
    read.is_ok() && line.trim_end().split(' ').skip(2).collect::<Vec<_>>().join(" ") == MARK
}

/// Removes maps of dyni's, of this user, whose process ended more than a day ago. Where thousands of processes came and went
/// there are as many maps: most are too young, and no more is asked of those than their age.
pub fn sweep() {
    let Ok(list) = fs::read_dir(FOLDER) else { return };
    for entry in list.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let unfinished = name.starts_with(UNFINISHED);
        let pid = name.strip_prefix("perf-").and_then(|n| n.strip_suffix(".map")?.parse::<i32>().ok());
        if (!unfinished && pid.is_none()) || !entry.metadata().is_ok_and(|facts| is_old(&facts)) {
            continue;
        }
        let of_the_dead = pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if (unfinished || of_the_dead) && is_stale(&entry.path(), unfinished) {
            // Whoever was faster has removed it.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn is_old(facts: &fs::Metadata) -> bool {
    let age = facts.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    age.is_some_and(|age| age > KEPT)
}

fn is_stale(path: &Path, unfinished: bool) -> bool {
    let Ok(Some(file)) = open(path) else { return false };
    let Ok(facts) = file.metadata() else { return false };
    let ours = facts.uid() == nix::unistd::geteuid().as_raw() && facts.nlink() == 1;
    ours && is_old(&facts) && (unfinished || has_mark(&file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_schema::RunAddr;

    #[test]
    fn a_map_is_known_by_its_first_line_and_names_come_whole() {
        let symbol = |start, name: &str| Symbol { start: RunAddr(start), size: 0x20, name: name.to_owned() };
        let text = text(&[symbol(0x20_0000, "main"), symbol(0x20_0040, "foo(unsigned long, int).cold")]);
        let wanted = "200060 1 [dyni code cache]\n200000 20 main\n200040 20 foo(unsigned long, int).cold\n";
        assert_eq!(text, wanted);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("perf-1.map");
        assert!(matches!(author(&path), Author::Nobody));
        fs::write(&path, text).unwrap();
        assert!(matches!(author(&path), Author::Dyni));
        fs::write(&path, "200000 20 main\n").unwrap();
        assert!(matches!(author(&path), Author::Other));
        let link = dir.path().join("perf-2.map");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        assert!(matches!(author(&link), Author::Other), "what a link leads to is not asked");
    }

    #[test]
    fn no_file_is_stale_that_is_young_or_somebody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("perf-1.map");
        fs::write(&path, text(&[])).unwrap();
        assert!(!is_stale(&path, false), "it is young");
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - 2 * KEPT).unwrap();
        assert!(is_stale(&path, false));
        fs::write(&path, "1 1 f\n").unwrap();
        file.set_modified(SystemTime::now() - 2 * KEPT).unwrap();
        assert!(!is_stale(&path, false), "it is not dyni's");
    }
}
