//! Where the archive lies.

use crate::error::{ArchiveError, Result};
use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The archive's path when nobody names one: `DYNI_ARCHIVE`, else `/var/lib/dyni/archive.db` for root and
/// `$XDG_DATA_HOME/dyni/archive.db` (by default under `~/.local/share`) for others.
///
/// # Errors
/// [`ArchiveError::NoHome`] if the environment names no place.
pub fn default_path() -> Result<PathBuf> {
    archive_path(None)
}

/// The archive's path: what `--archive` says, else [`default_path`].
///
/// # Errors
/// [`ArchiveError::NoHome`] if the environment names no place.
pub fn archive_path(flag: Option<&Path>) -> Result<PathBuf> {
    path_from(flag, is_root(), |name| std::env::var_os(name))
}

fn path_from(flag: Option<&Path>, root: bool, env: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let set = |name| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification has relative paths ignored: they would name another archive in every directory.
    let absolute = |name| set(name).filter(|path| path.is_absolute());
    if let Some(path) = flag.map(Path::to_owned).or_else(|| set("DYNI_ARCHIVE")) {
        return Ok(path);
    }
    if root {
        return Ok("/var/lib/dyni/archive.db".into());
    }
    let data = absolute("XDG_DATA_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/share")));
    data.map(|dir| dir.join("dyni/archive.db")).ok_or(ArchiveError::NoHome)
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Makes the folder of the archive if it is not there: for everyone to read if it is root's, else private.
pub(crate) fn make_parent(path: &Path) -> Result<()> {
    let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) else { return Ok(()) };
    let mode = if is_root() { 0o755 } else { 0o700 };
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(parent).map_err(|e| {
        let why = format!("its folder could not be made: {e}");
        match e.raw_os_error() {
            Some(nix::libc::EROFS) => ArchiveError::ReadOnly(path.to_owned()),
            Some(nix::libc::ENOSPC | nix::libc::EDQUOT) => ArchiveError::Full(path.to_owned()),
            _ => ArchiveError::CannotOpen { path: path.to_owned(), why },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(flag: Option<&str>, root: bool, env: &[(&str, &str)]) -> Option<String> {
        let env = |name: &str| env.iter().find(|e| e.0 == name).map(|e| e.1.into());
        path_from(flag.map(Path::new), root, env).ok().map(|p| p.display().to_string())
    }

    #[test]
    fn the_nearest_word_wins() {
        let env = [("DYNI_ARCHIVE", "/env"), ("XDG_DATA_HOME", "/xdg"), ("HOME", "/home/me")];
        assert_eq!(path(Some("flag.db"), true, &env).as_deref(), Some("flag.db"));
        assert_eq!(path(None, true, &env).as_deref(), Some("/env"));
        assert_eq!(path(None, true, &env[1..]).as_deref(), Some("/var/lib/dyni/archive.db"));
        assert_eq!(path(None, false, &env[1..]).as_deref(), Some("/xdg/dyni/archive.db"));
        assert_eq!(path(None, false, &env[2..]).as_deref(), Some("/home/me/.local/share/dyni/archive.db"));
        let empty = [("DYNI_ARCHIVE", ""), ("XDG_DATA_HOME", "relative"), ("HOME", "/home/me")];
        assert_eq!(path(None, false, &empty).as_deref(), Some("/home/me/.local/share/dyni/archive.db"));
        assert_eq!(path(None, false, &[]), None);
    }
}
