//! `dyni optimize`: record, analyze, apply.

use dyni_applier::State;
use serde::Serialize;

use crate::analyze::{Analyzed, Layout, for_program};
use crate::apply::{ApplyReport, apply_group};
use crate::cli::{MethodArg, OptimizeArgs};
use crate::errors::Failure;
use crate::output::{Output, Paint, Report};
use crate::record::{RecordReport, keep, profile_group};
use crate::store::Store;
use crate::targets::{Refused, find};
use crate::undo::undo_group;

/// `dyni optimize --json`: the fields of `dyni apply --json` and these.
#[derive(Debug, Serialize)]
struct OptimizeReport {
    #[serde(flatten)]
    applied: ApplyReport,
    record: RecordReport,
    before: Layout,
    after: Layout,
    /// Hot functions that the plan leaves out.
    refused: Vec<Refused>,
}

/// Does all of it.
///
/// # Errors
/// What did not work; the program is then as it was, or, if it was dynimized before, undynimized.
pub fn run(args: &OptimizeArgs, store: &Store, out: Output) -> Result<(), Failure> {
    let mut group = find(&args.pid)?;
    store.check_writable()?;
    // Another generation would hide where the time goes in the original code, and one process holds one plan.
    if dyni_applier::status(group.root.pid)?.state != State::Undynimized {
        out.detail("it is dynimized already: undone first");
        undo_group(&mut group)?;
    }
    let (mut recording, binaries) = profile_group(&mut group, args.duration, MethodArg::Auto, "", out)?;
    let id = keep(&mut recording.profile, &binaries, store)?;
    let record = RecordReport::new(&group, &recording, id);
    let Analyzed { stored, before, after, refused, .. } = for_program(&recording.profile, &binaries, out)?;
    store.keep_plan(&stored)?;
    // Children that were forked while it was recorded.
    group.refresh()?;
    let applied = apply_group(&stored, &mut group, None, out)?;
    out.report(&OptimizeReport { applied, record, before, after, refused });
    Ok(())
}

impl Report for OptimizeReport {
    fn text(&self, paint: Paint) -> String {
        let pages = format!("  hot code on {} pages before, {} after\n", self.before.pages, self.after.pages);
        format!("{}{}{pages}", self.record.summary(paint), self.applied.text(paint))
    }
}
