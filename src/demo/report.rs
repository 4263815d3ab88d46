//! What the demo found out.

use dyni_schema::Profile;
use serde::Serialize;

use super::measure::Measured;
use crate::analyze::Layout;
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::output::{Align, Paint, Report, Table, human_bytes, thousands};
use crate::targets::{Refused, StateWord, state_line};

/// `dyni demo --json`.
#[derive(Debug, Serialize)]
pub struct DemoReport {
    /// B's state while it was measured for the second time.
    pub state: StateWord,
    /// The plan's id.
    pub plan: String,
    /// The recording.
    pub recorded: Recorded,
    /// Functions with a copy.
    pub functions: usize,
    /// Places that lead into the copies.
    pub patches: usize,
    /// Size of the copies' hot part.
    pub hot_bytes: u64,
    /// Whether it lies in a huge page.
    pub huge_page: bool,
    /// Functions left out, and why.
    pub refused: Vec<Refused>,
    /// Where the hot code lies in the files, by the profile.
    pub layout_before: Layout,
    /// Where it lies in the copies.
    pub layout_after: Layout,
    /// How long B was stopped.
    pub stop_ns: u64,
    /// Both as they are.
    pub before: Figures,
    /// With B dynimized.
    pub after: Figures,
    /// How many times as much CPU time an operation took before: the second ratio A/B over the first.
    pub gain: f64,
    /// Operations that A and B did.
    pub operations: [u64; 2],
    /// Answers that were not the expected ones.
    pub wrong_answers: u64,
    /// Whether A and B gave the same answers.
    pub answers_agree: bool,
    /// Whether B's code was its files' after the undo, byte for byte.
    pub text_restored: bool,
    /// How much was compared.
    pub text_bytes: u64,
    /// B.
    #[serde(skip)]
    pub pid: i32,
    /// Its name.
    #[serde(skip)]
    pub name: String,
}

/// The recording.
#[derive(Debug, Serialize)]
pub struct Recorded {
    method: &'static str,
    samples: u64,
    duration_ns: u64,
}

impl Recorded {
    /// Of this profile.
    pub fn of(profile: &Profile) -> Self {
        Self { method: profile.method.name(), samples: profile.samples, duration_ns: profile.duration_ns }
    }
}

/// A measurement of both, medians.
#[derive(Debug, Serialize)]
pub struct Figures {
    a_ns_per_operation: f64,
    b_ns_per_operation: f64,
    ratio: f64,
    lowest: f64,
    highest: f64,
}

impl Figures {
    /// Of this measurement.
    pub const fn of(m: &Measured) -> Self {
        Self {
            a_ns_per_operation: m.a,
            b_ns_per_operation: m.b,
            ratio: m.ratio,
            lowest: m.spread.0,
            highest: m.spread.1,
        }
    }
}

impl DemoReport {
    /// The demo is a test as well: nothing may be wrong with the answers or the code.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verdict(&self) -> Result<(), Failure> {
        let wrong = if self.wrong_answers > 0 {
            "a query gave a wrong answer"
        } else if !self.answers_agree {
            "A and B gave different answers"
        } else if !self.text_restored {
            "B's code is not what its files hold"
        } else {
            return Ok(());
        };
        Err(Failure::failed("the demo went wrong", wrong)
            .help("this is a bug in dyni: please report it, with this output"))
    }
}

impl Report for DemoReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = format!("\n{}\n", state_line(&self.name, self.pid, 1, &self.state.to_string()));
        let mut did = Table::new(&[("", Align::Left), ("", Align::Left)]);
        let r = &self.recorded;
        did.row([
            "recorded".into(),
            format!("{} samples in {} with `{}`", thousands(r.samples), human_ns(r.duration_ns), r.method),
        ]);
        did.row(["functions".into(), format!("{} copied", thousands(self.functions as u64))]);
        let huge = if self.huge_page { "in a huge page" } else { "without a huge page" };
        did.row(["hot code".into(), format!("{} of copies, {huge}", human_bytes(self.hot_bytes))]);
        let (before, after) = (&self.layout_before, &self.layout_after);
        did.row(["pages with hot code".into(), format!("{} before, {} after", before.pages, after.pages)]);
        let taken = |l: &Layout| format!("{:.0} %", l.taken_branches * 100.0);
        did.row(["taken branches".into(), format!("{} of all edges before, {} after", taken(before), taken(after))]);
        did.row(["patches".into(), thousands(self.patches as u64)]);
        did.row(["stopped for".into(), human_ns(self.stop_ns)]);
        text.push_str(&did.render("  ", paint));
        for refused in &self.refused {
            text.push_str(&paint.dim(&format!("  left out: {} {}\n", thousands(refused.count), refused.reason)));
        }

        text.push_str("\nCPU time per operation, medians of slices in which both ran at once:\n");
        let mut table = Table::new(&[
            ("", Align::Left),
            ("A, as it is", Align::Right),
            ("B", Align::Right),
            ("A/B", Align::Right),
            ("lowest to highest", Align::Left),
        ]);
        for (when, f) in [("before", &self.before), ("B dynimized", &self.after)] {
            table.row([
                when.into(),
                human_ns(f.a_ns_per_operation as u64),
                human_ns(f.b_ns_per_operation as u64),
                format!("{:.3}", f.ratio),
                format!("{:.3} to {:.3}", f.lowest, f.highest),
            ]);
        }
        text.push_str(&table.render("  ", paint));
        let gain = format!("gain {:.3}", self.gain);
        text.push_str(&format!("  {}\n\n", if self.gain > 1.0 { paint.good(&gain) } else { paint.warn(&gain) }));

        text.push_str(&state_line(&self.name, self.pid, 1, "undynimized"));
        text.push('\n');
        let good = |ok: bool, text: String| if ok { paint.good(&text) } else { paint.bad(&text) };
        let same = if self.text_restored { "is" } else { "is NOT" };
        let line = format!("  B's code {same} what its files hold again ({} compared)", human_bytes(self.text_bytes));
        text.push_str(&(good(self.text_restored, line) + "\n"));
        let all: u64 = self.operations.iter().sum();
        let right = self.wrong_answers == 0 && self.answers_agree;
        let line = if right {
            format!("  every answer of {} operations was right, and A and B agree", thousands(all))
        } else {
            format!("  WRONG: {} answers of {} operations", thousands(self.wrong_answers), thousands(all))
        };
        text.push_str(&(good(right, line) + "\n"));
        text
    }
}
