//! What the daemon is told: the file, the command line, and which of them wins.
//!
//! A program's own options in `[exeList]` beat the command line, that beats `[options]` of the file, and that beats the
//! defaults. [`parse`] reads the file's format; here it becomes [`Settings`], which nothing else has to look behind.

pub mod check;
pub mod parse;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::LimitArgs;
use crate::errors::Failure;
use parse::{Limits, Parsed};

/// The file that is read if no other is named.
pub const DEFAULT_PATH: &str = "/etc/dyni.conf";
/// What holds where that file does not exist: the file that dyni is shipped with.
const SHIPPED: &str = include_str!("../packaging/dyni.conf");
/// No configuration is larger; whatever is, is another file.
const MAX_FILE: u64 = 1 << 20;
/// So many wrong lines are named.
const MAX_ERRORS: usize = 16;

const DELAY: Duration = Duration::from_secs(60);
const CPU_USAGE: f64 = 10.0;
const N_PROGRAMS: usize = 1;
const MAX_LOG: u64 = 1 << 20;

/// When a program is worth being optimised, and how long it is profiled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// For how long it is profiled.
    pub window: Duration,
    /// How old it must be.
    pub delay: Duration,
    /// How much of one processor it must use, percent.
    pub cpu_usage: f64,
}

/// A program that may be optimised.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// The base name of its executable, or the whole path.
    pub name: String,
    /// When it is worth it.
    pub limit: Limit,
}

/// Which processes may be chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// Those that run one of these executables.
    Exes(Vec<Listed>),
    /// Only these processes, by PID.
    Pids(Vec<i32>),
}

/// Everything that the daemon goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Where the file's part comes from; `None` for what dyni is shipped with.
    pub file: Option<PathBuf>,
    /// Which processes may be chosen.
    pub choice: Choice,
    /// What holds for a program that has no options of its own.
    pub limit: Limit,
    /// User IDs whose programs may be optimised; empty for everybody's.
    pub users: Vec<u32>,
    /// How many programs are worked on at once.
    pub n_programs: usize,
    /// Whether a program is optimised anew when its work has changed.
    pub reoptimize: bool,
    /// The log file; `None` for the default of whoever starts the daemon.
    pub log: Option<PathBuf>,
    /// How large the log and its `.old` may be together, bytes.
    pub max_log_size: u64,
    /// What the file has that means nothing here, a line each.
    pub notes: Vec<String>,
}

impl Settings {
    /// For how long a program is profiled if nothing else is said.
    pub const DEFAULT_WINDOW: Duration = Duration::from_secs(90);

    /// Reads the file (the usual one if `file` is `None`; where that does not exist, what dyni is shipped with) and lays
    /// the command line over it.
    ///
    /// # Errors
    /// The file can't be read, or has a line that means nothing: exit status 2, with the line's number.
    pub fn load(file: Option<&Path>, args: &LimitArgs) -> Result<Self, Failure> {
        let (path, text) = match file {
            Some(path) => (Some(path), read(path)?),
            None => match read(Path::new(DEFAULT_PATH)) {
                Ok(text) => (Some(Path::new(DEFAULT_PATH)), text),
                Err(_) if !Path::new(DEFAULT_PATH).exists() => (None, SHIPPED.to_owned()),
                Err(e) => return Err(e),
            },
        };
        let shown = path.map_or_else(|| "dyni's own configuration".to_owned(), |p| p.display().to_string());
        let parsed = Parsed::of(&text).map_err(|errors| {
            let first: Vec<_> = errors.iter().take(MAX_ERRORS).map(ToString::to_string).collect();
            let more = errors.len().saturating_sub(MAX_ERRORS);
            let more = if more > 0 { format!("; and {more} more") } else { String::new() };
            Failure::usage(shown, format!("{}{more}", first.join("; ")))
                .help("correct that and try it with `dyni config check`")
        })?;
        Self::over(path, parsed, args)
    }

    /// The same from a file that was read already.
    fn over(path: Option<&Path>, parsed: Parsed, args: &LimitArgs) -> Result<Self, Failure> {
        let own = Limits { window: args.window, delay: args.delay, cpu_usage: args.cpu_usage };
        let base = own.or(parsed.limits);
        let limit = base.or_default();
        let named = |name: &String| Listed { name: name.clone(), limit };
        let choice = match (&args.pid[..], &args.exe[..]) {
            ([], []) => {
                let listed = parsed.exes.into_iter();
                Choice::Exes(listed.map(|e| Listed { limit: e.limits.or(base).or_default(), name: e.name }).collect())
            }
            ([], names) => {
                // A program that the file lists keeps its own options there.
                let of_file = |name: &String| parsed.exes.iter().find(|e| e.name == *name).map(|e| e.limits);
                let listed = |name| {
                    of_file(name).map_or_else(
                        || named(name),
                        |own| Listed { limit: own.or(base).or_default(), name: name.clone() },
                    )
                };
                Choice::Exes(names.iter().map(listed).collect())
            }
            (pids, _) => Choice::Pids(pids.to_vec()),
        };
        Ok(Self {
            file: path.map(Path::to_owned),
            choice,
            limit,
            users: parsed.users.iter().map(|u| user_id(u)).collect::<Result<_, _>>()?,
            n_programs: args.n_programs.or(parsed.n_programs).unwrap_or(N_PROGRAMS),
            reoptimize: args.reoptimize || parsed.reoptimize.unwrap_or(false),
            log: args.log.clone().or(parsed.log),
            max_log_size: parsed.max_log_size.unwrap_or(MAX_LOG),
            notes: parsed.notes,
        })
    }

    /// What holds for a process, by its PID, the path of its executable and the name it was started by; `None` if it may
    /// not be chosen.
    pub fn limit_of(&self, pid: i32, exe: &Path, comm: &str) -> Option<Limit> {
        match &self.choice {
            Choice::Pids(pids) => pids.contains(&pid).then_some(self.limit),
            Choice::Exes(listed) => listed.iter().find(|l| l.means(exe, comm)).map(|l| l.limit),
        }
    }
}

impl Listed {
    /// Whether a process is one of these. The kernel keeps 15 bytes of the name that a process was started by.
    pub fn means(&self, exe: &Path, comm: &str) -> bool {
        if self.name.starts_with('/') {
            return exe == Path::new(&self.name);
        }
        exe.file_name().is_some_and(|n| n == self.name.as_str())
            || self.name.as_bytes().get(..self.name.len().min(15)).is_some_and(|cut| cut == comm.as_bytes())
    }
}

impl Limits {
    /// What is not said here is taken from there.
    fn or(self, other: Self) -> Self {
        Self {
            window: self.window.or(other.window),
            delay: self.delay.or(other.delay),
            cpu_usage: self.cpu_usage.or(other.cpu_usage),
        }
    }

    fn or_default(self) -> Limit {
        Limit {
            window: self.window.unwrap_or(Settings::DEFAULT_WINDOW),
            delay: self.delay.unwrap_or(DELAY),
            cpu_usage: self.cpu_usage.unwrap_or(CPU_USAGE),
        }
    }
}

/// A file's text, if it is one that can be a configuration.
fn read(path: &Path) -> Result<String, Failure> {
    let broken = |why: &dyn std::fmt::Display| {
        Failure::usage(format!("read {}", path.display()), why).help("`--config FILE` names another configuration")
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| broken(&e))?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| broken(&e))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(broken(&"it is larger than 1 MB, which no configuration is"));
    }
    String::from_utf8(bytes).map_err(|_| broken(&"it is no text (not UTF-8)"))
}

/// A user by name or number.
fn user_id(name: &str) -> Result<u32, Failure> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let found = nix::unistd::User::from_name(name).ok().flatten();
    found.map(|u| u.uid.as_raw()).ok_or_else(|| {
        Failure::usage("[users]", format!("there is no user `{name}` on this host"))
            .help("remove the line, or add the user")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str, args: &LimitArgs) -> Settings {
        Settings::over(None, Parsed::of(text).unwrap(), args).unwrap()
    }

    fn limit_of(settings: &Settings, name: &str) -> Limit {
        let Choice::Exes(listed) = &settings.choice else { panic!("{settings:?}") };
        listed.iter().find(|l| l.name == name).unwrap().limit
    }

    #[test]
    fn a_programs_own_options_beat_the_command_line_that_the_file_that_the_defaults() {
        let text = "[options]\nwindow=50\ndelay=40\n[exeList]\nmariadbd -window=10\nnginx\n";
        let args = LimitArgs { window: Some(Duration::from_secs(20)), ..LimitArgs::default() };
        let s = settings(text, &args);
        let mariadbd = limit_of(&s, "mariadbd");
        assert_eq!((mariadbd.window.as_secs(), mariadbd.delay.as_secs(), mariadbd.cpu_usage), (10, 40, 10.0));
        let nginx = limit_of(&s, "nginx");
        assert_eq!((nginx.window.as_secs(), nginx.delay.as_secs(), nginx.cpu_usage), (20, 40, 10.0));
        assert_eq!(
            settings("", &LimitArgs::default()).limit,
            Limit { window: Settings::DEFAULT_WINDOW, delay: DELAY, cpu_usage: CPU_USAGE }
        );
    }

    #[test]
    fn what_the_command_line_names_is_chosen_and_nothing_else() {
        let text = "[exeList]\nmariadbd -delay=5\npostgres\n";
        let by_name = LimitArgs { exe: vec!["mariadbd".into(), "other".into()], ..LimitArgs::default() };
        let s = settings(text, &by_name);
        assert_eq!(limit_of(&s, "mariadbd").delay.as_secs(), 5);
        assert_eq!(limit_of(&s, "other").delay, DELAY);
        let by_pid = LimitArgs { pid: vec![9618], ..LimitArgs::default() };
        assert_eq!(settings(text, &by_pid).choice, Choice::Pids(vec![9618]));
    }

    #[test]
    fn names_paths_and_links_mean_a_program() {
        let listed = |name: &str| Listed { name: name.into(), limit: Limits::default().or_default() };
        let exe = Path::new("/usr/bin/redis-check-rdb");
        assert!(listed("redis-check-rdb").means(exe, "redis-server"));
        assert!(listed("redis-server").means(exe, "redis-server"));
        assert!(listed("a-name-of-more-than-15-bytes").means(exe, "a-name-of-more-"));
        assert!(listed("/usr/bin/redis-check-rdb").means(exe, ""));
        assert!(!listed("/bin/redis-check-rdb").means(exe, "redis-server"));
        assert!(!listed("redis").means(exe, "redis-server"));
    }

    #[test]
    fn the_shipped_file_is_right_and_lists_what_is_tested() {
        let s = settings(SHIPPED, &LimitArgs::default());
        assert!(s.notes.is_empty() && s.users.is_empty() && !s.reoptimize);
        for name in ["mariadbd", "postgres", "nginx", "redis-server"] {
            assert_eq!(limit_of(&s, name).window, Settings::DEFAULT_WINDOW, "{name}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_or_wrong_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dyni.conf");
        let load = || Settings::load(Some(&path), &LimitArgs::default()).unwrap_err().to_string();
        assert!(load().contains("dyni.conf"));
        std::fs::write(&path, "[options]\nlog=/x\nnonsense\n").unwrap();
        assert!(load().contains("line 3"), "{}", load());
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(load().contains("UTF-8"), "{}", load());
        std::fs::write(&path, "#".repeat(MAX_FILE as usize + 1)).unwrap();
        assert!(load().contains("1 MB"), "{}", load());
        std::fs::write(&path, "[users]\nno-such-user-here\n").unwrap();
        assert!(load().contains("no-such-user-here"), "{}", load());
    }
}
