//! `dyni exec`: this process becomes the command, and a helper does for it what the archive knows.
//!
//! Where the archive knows nothing of a program, there is no helper: one look, and the command runs.

mod before;
mod helper;
mod learn;
mod program;

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fmt::Display;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use dyni_applier::start::Starting;
use dyni_applier::{Applier, Choice};
use dyni_collector::Target;
use dyni_pbitmap::{Budget, Fetched, prefetch};
use dyni_profiles::{Archive, ForStart};
use dyni_schema::WorkingSet;
use dyni_schema::envelope::BlobId;
use nix::errno::Errno;

use crate::apply::patiently;
use crate::cli::ExecArgs;
use crate::errors::Failure;
use crate::output::{Output, plural};
use crate::store::Store;
use crate::symbols::write_perf_maps;
use helper::Link;
pub use learn::watch_use;
use program::{Command, Program};

/// What `env` and shells answer when a command can't be run: it is not there, or it can't be executed.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
/// How long a loader may take from the exec to the program's entry point.
const LOADING: Duration = Duration::from_secs(60);

/// The command of a line that is no more than `dyni exec -- COMMAND …`, which need not be parsed.
pub fn in_short(words: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut words = words.into_iter().skip(1);
    let is_it = words.next().is_some_and(|w| w == "exec") && words.next().is_some_and(|w| w == "--");
    let command: Vec<OsString> = words.collect();
    (is_it && !command.is_empty()).then_some(command)
}

/// Becomes the command. It comes back only if that can't be.
///
/// # Errors
/// None: a command that can't be run ends this process as `env` would.
pub fn run(args: &ExecArgs, store: &Store, out: Output) -> Result<(), Failure> {
    match program::of(&args.command[0]) {
        Command::Program(program) => prepare(&program, args, store, out),
        Command::Untouched(why) => out.detail(&format!("{} is started as it is: {why}", name(&args.command[0]))),
        Command::NotFound => {}
    }
    let errno = match become_command(&args.command) {
        Err(errno) => errno,
        Ok(never) => match never {},
    };
    let status = if errno == Errno::ENOENT { NOT_FOUND } else { NOT_EXECUTABLE };
    Failure::failed(format!("run {}", name(&args.command[0])), errno.desc()).print(out.json());
    std::process::exit(status)
}

fn name(command: &OsStr) -> String {
    command.to_string_lossy().into_owned()
}

fn become_command(words: &[OsString]) -> Result<Infallible, Errno> {
    let words: Vec<CString> =
        words.iter().map(|w| CString::new(w.as_bytes())).collect::<Result<_, _>>().map_err(|_| Errno::EINVAL)?;
    before::restore();
    nix::unistd::execvp(&words[0], &words)
}

/// Starts the helper if there is anything for it to do. Whatever goes wrong, the command is run.
fn prepare(program: &Program, args: &ExecArgs, store: &Store, out: Output) {
    let found = match known(program, store) {
        Ok(found) => found,
        Err(e) if args.learn => return out.note(&format!("dyni: nothing can be learned: {e}")),
        Err(e) => return out.detail(&format!("the archive is not used: {e}")),
    };
    if !args.learn && found == ForStart::default() {
        return out.detail(&format!("the archive knows nothing of {}", program.name));
    }
    let path = store.path().map(std::path::absolute);
    let Ok(Ok(archive)) = path else { return out.detail("the archive is not used: it is nowhere") };
    let pid = std::process::id() as i32;
    let started = helper::start(out.verbose() > 0, |link| {
        let work = || match args.learn {
            true => learn::learn(pid, args.duration, &archive, link),
            false => help(pid, found, args, &archive, link),
        };
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(done)) => out.detail(&format!("{}, pid: {pid}: {done}", program.name)),
            Ok(Err(e)) => out.detail(&format!("{}, pid: {pid}, is left as it is: {e}", program.name)),
            // The panic hook has printed it, if anybody listens.
            Err(_) => {}
        }
    });
    if let Err(e) = started {
        out.detail(&format!("{} is started as it is: {e}", program.name));
    }
}

fn known(program: &Program, store: &Store) -> Result<ForStart, Failure> {
    let path = store.path()?;
    if !path.exists() {
        return Ok(ForStart::default());
    }
    Ok(Archive::open_for_a_look(&path)?.for_start(&program.name, program.build_id(), &program.key)?)
}

fn failed(e: &dyn Display) -> Failure {
    Failure::failed("prepare its start", e)
}

/// In the helper: does for the command what is known of it.
fn help(pid: i32, found: ForStart, args: &ExecArgs, archive: &Path, link: Link) -> Result<String, Failure> {
    let starting = found.plan.map(|_| Starting::watch(pid)).transpose().map_err(|e| failed(&e))?;
    // The command is more important than its plan: whatever can't be read of the archive, it has not to wait for.
    let fetch = || {
        let set = found.working_set.and_then(|id| Archive::open_read_only(archive).ok()?.working_set(&id.into()).ok());
        set.map(|(_, set)| (prefetch(&set, Budget::of_host()), set))
    };
    let early = if args.early { fetch() } else { None };
    link.ready();
    let (done, fetched) = std::thread::scope(|scope| {
        let reading = (!args.early).then(|| scope.spawn(fetch));
        let done = starting.zip(found.plan).map(|(starting, plan)| apply(pid, starting, plan, args.wait, archive));
        (done, early.or_else(|| reading.and_then(|r| r.join().ok().flatten())))
    });
    let read = fetched.map(|(fetched, set)| (fetched_line(&fetched), fetched, set));
    let line = read.as_ref().map(|r| r.0.clone());
    if let Some((_, fetched, set)) = read.filter(|r| r.1.pages() > 0) {
        learn::watch_use(pid, set, &fetched, args.duration, archive);
    }
    let done = done.transpose()?;
    Ok(done.into_iter().chain(line).collect::<Vec<_>>().join("; "))
}

fn fetched_line(fetched: &Fetched) -> String {
    let mut line = format!("{} read ahead", plural(fetched.pages(), "page", "pages"));
    if fetched.unsure > 0 {
        line += &format!(", {} as far as they were not in memory", plural(fetched.unsure, "more page", "more pages"));
    }
    if fetched.changed > 0 {
        line += &format!(", {} changed since", plural(fetched.changed as u64, "file", "files"));
    }
    if fetched.exhausted {
        line += ", the rest is beyond the budget";
    }
    line
}

/// Has the plan in force before the command begins, if that does not take too long.
fn apply(pid: i32, starting: Starting, plan: BlobId, wait: Duration, archive: &Path) -> Result<String, Failure> {
    let gate = starting.put_up_gate(wait).map_err(|e| failed(&e))?;
    let bound = helper::end_with(pid);
    // While the loader is at work.
    let stored = Store::at(Some(archive)).plan_of(plan)?;
    let mut applier = Applier::new(&stored.plan, None)?;
    if !gate.reached(LOADING) {
        return Err(failed(&"it did not come to its first instruction"));
    }
    let applied = patiently(&mut applier, pid, &Choice::All);
    drop(bound);
    let in_time = gate.open();
    let applied = applied?;
    if let Ok(target) = Target::by_pid(pid) {
        write_perf_maps(&[target]);
    }
    let functions: usize = applied.modules.iter().map(|m| m.functions).sum();
    let when = if in_time.is_ok_and(|held| held) { "before its first instruction" } else { "while it ran" };
    Ok(format!("dynimized {when}, {}", plural(functions as u64, "function", "functions")))
}

/// What a working set lacks to be kept: a place in the archive. The newer of two that were learned at once wins.
fn keep(set: &WorkingSet, archive: &Path) -> Result<BlobId, Failure> {
    Ok(Archive::open(archive)?.put_working_set(set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_without_options_are_short() {
        let of = |words: &[&str]| in_short(words.iter().map(OsString::from));
        assert_eq!(of(&["dyni", "exec", "--", "ls", "--", "x"]), Some(["ls", "--", "x"].map(OsString::from).to_vec()));
        for words in
            [&["dyni", "exec", "ls"][..], &["dyni", "exec", "--"], &["dyni", "exec", "-v", "--", "ls"], &["dyni"]]
        {
            assert_eq!(of(words), None, "{words:?}");
        }
    }
}
