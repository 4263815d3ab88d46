//! `dyni exec`: this process becomes the command, and a helper does for it what the archive knows.
//!
//! Where the archive knows nothing of a program, there is no helper: one look, and the command runs.

mod before;
mod helper;
mod program;

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use dyni_applier::Applier;
use dyni_applier::start::Starting;
use dyni_collector::Target;
use dyni_profiles::Archive;
use dyni_schema::envelope::BlobId;
use nix::errno::Errno;

use crate::apply::patiently;
use crate::cli::ExecArgs;
use crate::errors::Failure;
use crate::output::Output;
use crate::store::Store;
use crate::symbols::write_perf_maps;
use program::{Command, Program};

/// What `env` and shells answer when a command can't be run: it is not there, or it can't be executed.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
/// How long a loader may take from the exec to the program's entry point.
const LOADING: Duration = Duration::from_secs(60);

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

fn become_command(words: &[std::ffi::OsString]) -> Result<Infallible, Errno> {
    let words: Vec<CString> =
        words.iter().map(|w| CString::new(w.as_bytes())).collect::<Result<_, _>>().map_err(|_| Errno::EINVAL)?;
    before::restore();
    nix::unistd::execvp(&words[0], &words)
}

/// Starts the helper if there is anything for it to do. Whatever goes wrong, the command is run.
fn prepare(program: &Program, args: &ExecArgs, store: &Store, out: Output) {
    let plan = match known(program, store) {
        Ok(Some(plan)) => plan,
        Ok(None) => return out.detail(&format!("the archive knows nothing of {}", program.name)),
        Err(e) => return out.detail(&format!("the archive is not used: {e}")),
    };
    let Ok(archive) =
        store.path().and_then(|p| std::path::absolute(&p).map_err(|e| Failure::failed("find the archive", e)))
    else {
        return;
    };
    let pid = std::process::id() as i32;
    let started = helper::start(out.verbose() > 0, |link| {
        let work = std::panic::AssertUnwindSafe(|| {
            let store = Store::at(Some(&archive));
            help(pid, plan, args.wait, &store, link)
        });
        match std::panic::catch_unwind(work) {
            Ok(Ok(done)) => out.detail(&format!("{}, pid: {pid}, {done}", program.name)),
            Ok(Err(e)) => out.detail(&format!("{}, pid: {pid}, is left as it is: {e}", program.name)),
            Err(_) => {}
        }
    });
    if let Err(e) = started {
        out.detail(&format!("{} is started as it is: {e}", program.name));
    }
}

fn known(program: &Program, store: &Store) -> Result<Option<BlobId>, Failure> {
    let (path, Some(build_id)) = (store.path()?, &program.build_id) else { return Ok(None) };
    if !path.exists() {
        return Ok(None);
    }
    Ok(Archive::open_read_only(&path)?.plan_to_start(&program.name, build_id)?)
}

/// In the helper: waits for the command, and has its plan in force before it begins, if that does not take too long.
fn help(pid: i32, plan: BlobId, wait: Duration, store: &Store, link: helper::Link) -> Result<String, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::failed("prepare its start", e);
    let starting = Starting::watch(pid).map_err(|e| failed(&e))?;
    link.ready();
    let gate = starting.put_up_gate(wait).map_err(|e| failed(&e))?;
    // While the loader is at work.
    let stored = store.plan_of(plan)?;
    let mut applier = Applier::new(&stored.plan, None)?;
    if !gate.reached(LOADING) {
        return Err(failed(&"it did not come to its first instruction"));
    }
    let applied = patiently(&mut applier, pid, &dyni_applier::Choice::All);
    let in_time = gate.open();
    let applied = applied?;
    if let Ok(target) = Target::by_pid(pid) {
        write_perf_maps(&[target]);
    }
    let functions: usize = applied.modules.iter().map(|m| m.functions).sum();
    let when = if in_time.is_ok_and(|held| held) { "before its first instruction" } else { "while it ran" };
    Ok(format!("dynimized {when}: {functions} functions"))
}
