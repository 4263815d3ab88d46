//! Learning what a command touches, in the helper: looks that become rarer, and one at its end.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dyni_applier::start::{Moment, Starting};
use dyni_pbitmap::{Fetched, Recording, files, merge};
use dyni_profiles::Archive;
use dyni_schema::{FileKey, WorkingSet};

use super::helper::Link;
use super::{failed, keep};
use crate::errors::Failure;
use crate::output::plural;

/// The first looks follow each other as closely as this, later ones twice as far apart each time, up to the second.
const CLOSE: Duration = Duration::from_millis(1);
const FAR: Duration = Duration::from_millis(500);

/// What is recorded, and of which program.
#[derive(Debug)]
struct Subject {
    recording: Recording,
    /// Its name and its executable; `None` for one that can't be read.
    program: Option<(String, FileKey)>,
}

impl Subject {
    /// The program that process `pid` has just become.
    fn of(pid: i32) -> Self {
        let link = PathBuf::from(format!("/proc/{pid}/exe"));
        let name = std::fs::read_link(&link).ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let key = files::open(&link).ok().map(|(file, metadata)| files::key(&file, &metadata));
        Self { recording: Recording::new(pid), program: name.zip(key) }
    }
}

/// Records the command from its exec to its end or the deadline, and keeps what was seen. Of a command that becomes another
/// program (a script of `env`'s, a wrapper), that is recorded.
///
/// # Errors
/// Nothing was kept, and why.
pub fn learn(pid: i32, deadline: Duration, archive: &Path, link: Link) -> Result<String, Failure> {
    let subject = Arc::new(Mutex::new(Subject { recording: Recording::new(pid), program: None }));
    let moments = follow(pid, subject.clone(), link);
    // Until the exec.
    match moments.recv() {
        Ok(Ok(Moment::Begins)) => {}
        Ok(Err(e)) => return Err(failed(&e)),
        Ok(_) | Err(_) => return Err(failed(&"it did not start")),
    }
    look_until(&subject, &moments, deadline);
    let Subject { recording, program } =
        std::mem::replace(&mut *locked(&subject), Subject { recording: Recording::new(pid), program: None });
    let (name, key) = program.ok_or_else(|| failed(&"its executable can't be read"))?;
    let set = recording.finish(&name, &key, deadline);
    let set = set.ok_or_else(|| failed(&"it ended before anything was seen"))?;
    // Where nothing can be read of an archive, there is none yet, or this could not be kept either.
    let known = Archive::open_read_only(archive).ok().and_then(|a| a.working_set_of(&key).ok().flatten());
    let set = known.map_or(set.clone(), |known| merge(&known, &set));
    let id = keep(&set, archive)?;
    let (pages, files) = (plural(set.pages(), "page", "pages"), plural(set.files.len() as u64, "file", "files"));
    Ok(format!("{pages} of {files} of {name} learned, working set {}", id.short()))
}

/// Looks which of the pages that were read ahead the command touches, and keeps that beside its working set. It is not
/// traced for that, as it could see it: what it touches after the last look before its end is not counted.
pub fn watch_use(pid: i32, set: WorkingSet, fetched: &Fetched, deadline: Duration, archive: &Path) {
    let subject = Mutex::new(Subject::of(pid));
    let (_nobody, moments) = channel();
    look_until(&subject, &moments, deadline);
    let recording = &locked(&subject).recording;
    let used = |(key, runs): &(_, Vec<(u32, u32)>)| {
        recording.touched(key, runs.iter().flat_map(|&(first, count)| first..first + count))
    };
    let used: u64 = fetched.runs.iter().map(used).sum();
    // It may have been learned anew meanwhile.
    let now = Archive::open_read_only(archive).ok().and_then(|a| a.working_set_of(&set.executable).ok().flatten());
    let mut set = now.unwrap_or(set);
    let usefulness = &mut set.usefulness;
    usefulness.starts = usefulness.starts.saturating_add(1);
    usefulness.read = usefulness.read.saturating_add(fetched.pages());
    usefulness.used = usefulness.used.saturating_add(used);
    // Nobody waits for it, and the next start will tell as much.
    let _ = keep(&set, archive);
}

fn locked(subject: &Mutex<Subject>) -> MutexGuard<'_, Subject> {
    subject.lock().unwrap_or_else(PoisonError::into_inner)
}

type Told = Result<Moment, String>;

/// Traces the command in a thread of its own, which takes the last look while the command is about to end. The thread is
/// not waited for: at the deadline this process ends, and the kernel lets go of the command. Who waits until it may exec is
/// told by `link`.
fn follow(pid: i32, subject: Arc<Mutex<Subject>>, link: Link) -> Receiver<Told> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let followed = Starting::watch(pid).and_then(|starting| {
            link.ready();
            starting.follow(|moment| {
                match moment {
                    // What can't be seen any more was seen before, or is lost.
                    Moment::Ends => drop(locked(&subject).recording.look()),
                    Moment::Begins | Moment::Replaced => *locked(&subject) = Subject::of(pid),
                }
                // Nobody listens after the deadline.
                send.send(Ok(moment)).is_ok() && moment != Moment::Ends
            })
        });
        if let Err(e) = followed {
            let _ = send.send(Err(e.to_string()));
        }
    });
    receive
}

/// Looks again and again, until the command ends or the deadline has come.
fn look_until(subject: &Mutex<Subject>, moments: &Receiver<Told>, deadline: Duration) {
    let (start, mut pause) = (Instant::now(), CLOSE);
    while start.elapsed() < deadline {
        match moments.recv_timeout(pause.min(deadline.saturating_sub(start.elapsed()))) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Ok(Moment::Begins | Moment::Replaced)) => pause = CLOSE,
            // It can't be followed, so nobody says when it ends.
            Ok(Ok(Moment::Ends) | Err(_)) | Err(RecvTimeoutError::Disconnected) => return,
        }
        if locked(subject).recording.look().is_err() {
            return;
        }
        pause = (2 * pause).min(FAR);
    }
}
