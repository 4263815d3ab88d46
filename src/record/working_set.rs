//! `dyni record --working-set`: which pages of its files a program has touched.

use std::time::{Duration, Instant};

use dyni_pbitmap::{Recording, files, merge};
use dyni_schema::envelope::BlobId;

use crate::archive::WorkingSetReport;
use crate::cli::RecordArgs;
use crate::errors::Failure;
use crate::interrupt::Interruptible;
use crate::output::Output;
use crate::store::Store;
use crate::targets::find;

/// How far apart the looks are.
const PAUSE: Duration = Duration::from_millis(250);

/// Looks at the program's first process for a time, and keeps what it has touched since it began.
///
/// # Errors
/// There is no such program, or the archive can't be written.
pub fn run(args: &RecordArgs, store: &Store, out: Output) -> Result<(), Failure> {
    let target = find(&args.pid)?.root;
    store.check_writable()?;
    let what = format!("record the working set of {}, pid: {}", target.name, target.pid);
    let failed = |e: &dyn std::fmt::Display| Failure::failed(what.clone(), e);
    let exe = format!("/proc/{}/exe", target.pid);
    let (file, metadata) = files::open(exe.as_ref()).map_err(|e| failed(&e))?;
    let key = files::key(&file, &metadata);
    let mut recording = Recording::new(target.pid);
    recording.look().map_err(|e| failed(&e))?;
    let interruptible = Interruptible::new();
    let bar = out.progress_of("recording", args.duration.as_millis() as u64);
    let start = Instant::now();
    while start.elapsed() < args.duration && !interruptible.asked() {
        std::thread::sleep(PAUSE.min(args.duration.saturating_sub(start.elapsed())));
        bar.set(start.elapsed().as_millis() as u64);
        if recording.look().is_err() {
            // It has ended; what was seen is worth as much.
            break;
        }
    }
    drop(bar);
    let set = recording.finish(&target.name, &key, args.duration);
    let set = set.ok_or_else(|| failed(&"it became another program meanwhile"))?;
    let known = store.working_set_of(&key)?;
    let set = known.map_or(set.clone(), |known| merge(&known, &set));
    let id: BlobId = store.keep_working_set(&set)?;
    out.report(&WorkingSetReport::new(id.hex(), &set));
    Ok(())
}
