//! `dyni optimize`: record, analyze, apply, check that it pays.

use dyni_applier::{Applier, Choice, State};
use serde::Serialize;
use std::time::Duration;

use crate::analyze::{Analyzed, Layout, for_program};
use crate::apply::{ApplyReport, apply_group_with};
use crate::cli::{MethodArg, OptimizeArgs};
use crate::errors::Failure;
use crate::gain::Estimate;
use crate::output::{Output, Paint, Report};
use crate::pays::{self, Verdict};
use crate::record::{RecordReport, keep, profile_group};
use crate::store::Store;
use crate::symbols::write_perf_maps;
use crate::targets::{Refused, StateWord, find, root_first};
use crate::undo::{KEPT, sweep_group, undo_group};

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
    /// What it was measured to gain; null if that could not be measured.
    gain: Option<Estimate>,
    /// Why not.
    not_measured: Option<String>,
}

/// The check takes its time from the recording's, but what it finds out is as good after this.
const CHECK: Duration = Duration::from_secs(10);

/// Does all of it.
///
/// # Errors
/// What did not work; the program is then as it was, or, if it was dynimized before, undynimized.
pub fn run(args: &OptimizeArgs, store: &Store, out: Output) -> Result<(), Failure> {
    let phase = |name: &str| {
        if args.phases {
            println!("{}", serde_json::json!({ "phase": name }));
        }
    };
    let mut group = find(&args.pid)?;
    store.check_writable()?;
    // Another generation would hide where the time goes in the original code, and one process holds one plan.
    if dyni_applier::status(group.root.pid)?.state != State::Undynimized {
        out.detail("it is dynimized already: undone first");
        undo_group(&mut group)?;
    }
    phase("profiling");
    let (mut recording, binaries) = profile_group(&mut group, args.duration, MethodArg::Auto, "", out)?;
    let id = keep(&mut recording.profile, &binaries, store)?;
    let record = RecordReport::new(&group, &recording, id);
    phase("dynimizing");
    let Analyzed { stored, before, after, refused, .. } = for_program(&recording.profile, &binaries, out)?;
    store.keep_plan(&stored)?;
    // Children that were forked while it was recorded.
    group.refresh()?;
    let mut applier = Applier::new(&stored.plan, None)?;
    let mut applied = apply_group_with(&mut applier, &Choice::All, &stored, &mut group, out)?;
    let (gain, not_measured) = match pays::check(&mut applier, &stored, &mut group, args.duration.min(CHECK), out)? {
        Verdict::Pays(gain) => (Some(gain), None),
        Verdict::TakenOut(gain) => {
            applied.state = StateWord(State::Undynimized);
            // Or the next process of this build would be given it.
            store.forget_plan(&stored)?;
            (Some(gain), None)
        }
        Verdict::Unknown(why) => (None, Some(why)),
    };
    // What served to count and to compare, and the generation before: threads have had time to leave them.
    sweep_group(&mut group, KEPT);
    // Children that were forked while it was checked.
    applied.notes = write_perf_maps(&root_first(&group));
    out.report(&OptimizeReport { applied, record, before, after, refused, gain, not_measured });
    Ok(())
}

impl Report for OptimizeReport {
    fn text(&self, paint: Paint) -> String {
        let pages = format!("  hot code on {} pages before, {} after\n", self.before.pages, self.after.pages);
        let undone = self.applied.state.0 == State::Undynimized;
        let gain = match (&self.gain, &self.not_measured) {
            (Some(gain), _) if undone => {
                let line = format!("it did not pay and was taken out again: gain {}", gain.ratio);
                format!("  {}\n", paint.warn(&line))
            }
            (Some(gain), _) => format!("  gain {}\n", gain.ratio),
            (None, why) => {
                let why = why.as_deref().unwrap_or_default();
                format!("  {}\n", paint.warn(&format!("whether it pays could not be measured: {why}")))
            }
        };
        format!("{}{}{pages}{gain}", self.record.summary(paint), self.applied.text(paint))
    }
}
