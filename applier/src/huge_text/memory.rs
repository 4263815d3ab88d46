//! Whether there is memory for a copy: a program that is close to its limit must not be killed for our pages.

use std::fs;
use std::path::{Path, PathBuf};

/// So many times what is taken must be there.
const MARGIN: u64 = 4;

/// Whether process `pid` may take `bytes` more, by what the host has available and by the limits of the control groups that
/// it is in (Documentation/admin-guide/cgroup-v2.rst, `memory.max`; cgroup-v1/memory.rst, `memory.limit_in_bytes`).
pub(super) fn has_room(pid: i32, bytes: u64) -> bool {
    let wanted = bytes * MARGIN;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    available().is_none_or(|free| free >= wanted)
        && groups.lines().filter_map(|line| left_in(Path::new("/sys/fs/cgroup"), line)).all(|left| left >= wanted)
}

/// `MemAvailable` of `/proc/meminfo`, bytes.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// What a control group and those above it leave, bytes; `None` if this line of `/proc/PID/cgroup` is about another
/// controller, or nothing is limited.
fn left_in(root: &Path, line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (root, limit, used) = match controllers {
        "" => (root.to_owned(), "memory.max", "memory.current"),
        list if list.split(',').any(|c| c == "memory") => {
            (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
        }
        _ => return None,
    };
    let number = |file: PathBuf| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let group = root.join(path.trim_start_matches('/'));
    let above = group.ancestors().take_while(|dir| dir.starts_with(&root));
    above.filter_map(|dir| Some(number(dir.join(limit))?.saturating_sub(number(dir.join(used))?))).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        let write = |dir: &Path, max: &str, current: &str| {
            fs::write(dir.join("memory.max"), max).unwrap();
            fs::write(dir.join("memory.current"), current).unwrap();
        };
        write(&inner, "max\n", "100\n");
        assert_eq!(left_in(root.path(), "0::/outer/inner"), None);
        write(inner.parent().unwrap(), "1000\n", "400\n");
        assert_eq!(left_in(root.path(), "0::/outer/inner"), Some(600));
        write(&inner, "500\n", "100\n");
        assert_eq!(left_in(root.path(), "0::/outer/inner"), Some(400));
        assert_eq!(left_in(root.path(), "4:cpu,cpuacct:/outer/inner"), None);
    }

    #[test]
    fn this_host_has_room_for_a_page_and_none_for_everything() {
        let pid = std::process::id() as i32;
        assert!(has_room(pid, 4096));
        assert!(!has_room(pid, u64::MAX / 8));
    }
}
