//! The figures of a layout that builds are compared by, and the comparison.

use dyni_analyzer::stats::LayoutStats;
use serde::{Deserialize, Serialize};

/// What a layout of a module's hot functions is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The share of taken branches among all edges inside functions, 0 to 1.
    pub taken_branches: f64,
    /// The ext-TSP score for each execution of such an edge: 1 where every one falls through.
    pub ext_tsp: f64,
    /// Pages of 4096 bytes with any block that ran.
    pub pages: u64,
    /// The fewest of these pages in which 99.9 % of the time is spent.
    pub pages_999: u64,
    /// Bytes of blocks that ran.
    pub hot_bytes: u64,
}

impl Figures {
    /// Of an estimate.
    pub fn of(stats: &LayoutStats) -> Self {
        let edges = stats.edges.max(1) as f64;
        Self {
            taken_branches: stats.taken_branches as f64 / edges,
            ext_tsp: stats.ext_tsp / edges,
            pages: stats.pages,
            pages_999: stats.pages_999,
            hot_bytes: stats.hot_bytes,
        }
    }

    /// Whether they are numbers that could have been measured.
    pub fn are_sound(&self) -> bool {
        [self.taken_branches, self.ext_tsp].iter().all(|f| f.is_finite() && *f >= 0.0)
    }
}

/// One figure of two builds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Which.
    pub figure: String,
    /// The earlier build's.
    pub baseline: f64,
    /// This one's.
    pub now: f64,
    /// By how much this one is worse, per cent; less than 0 if it is better.
    pub worse: f64,
    /// Whether that is more than it may be.
    pub regressed: bool,
}

/// What may differ in the last digits once a figure has been written down and read again, per cent.
const ROUNDING: f64 = 1e-6;

/// What is compared of a build: as it was built, as planned, the share of the profile that still matches.
type Build<'a> = (&'a Figures, &'a Figures, f64);

/// Compares two builds; `newly_refused` is the share of what was seen in functions that only the second leaves out.
pub fn compare(was: Build<'_>, now: Build<'_>, newly_refused: f64, max_regress: f64) -> Vec<Comparison> {
    let mut all = Vec::new();
    for (what, was, now) in [("as built", was.0, now.0), ("planned", was.1, now.1)] {
        let taken = (was.taken_branches, now.taken_branches);
        all.push(smaller(format!("taken branches, {what}"), taken, 0.0, max_regress));
        all.push(larger(format!("ext-TSP score, {what}"), (was.ext_tsp, now.ext_tsp), max_regress));
        // Whether code straddles one page more is a matter of what lies before it.
        let pages = (was.pages as f64, now.pages as f64);
        all.push(smaller(format!("hot pages, {what}"), pages, 1.0, max_regress));
    }
    all.push(larger("profile that matches".into(), (was.2, now.2), max_regress));
    let worse = newly_refused * 100.0;
    all.push(Comparison {
        figure: "newly left out, of samples".into(),
        baseline: 0.0,
        now: newly_refused,
        worse,
        regressed: is_more(worse, max_regress),
    });
    all
}

fn is_more(worse: f64, max_regress: f64) -> bool {
    worse > max_regress + ROUNDING
}

/// A figure that is better the smaller it is; it may be larger by `slack` whatever that is in per cent.
fn smaller(figure: String, (baseline, now): (f64, f64), slack: f64, max_regress: f64) -> Comparison {
    let worse = match baseline {
        0.0 if now > 0.0 => 100.0,
        0.0 => 0.0,
        _ => (now - baseline) / baseline * 100.0,
    };
    Comparison { figure, baseline, now, worse, regressed: is_more(worse, max_regress) && now - baseline > slack }
}

/// A figure that is better the larger it is.
fn larger(figure: String, (baseline, now): (f64, f64), max_regress: f64) -> Comparison {
    let worse = if baseline == 0.0 { 0.0 } else { (baseline - now) / baseline * 100.0 };
    Comparison { figure, baseline, now, worse, regressed: is_more(worse, max_regress) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Figures = Figures { taken_branches: 0.2, ext_tsp: 0.8, pages: 10, pages_999: 8, hot_bytes: 9000 };

    fn worse(now: &Figures, share: f64, refused: f64, limit: f64) -> Vec<String> {
        let all = compare((&GOOD, &GOOD, 1.0), (now, &GOOD, share), refused, limit);
        all.into_iter().filter(|c| c.regressed).map(|c| c.figure).collect()
    }

    #[test]
    fn the_same_is_never_worse() {
        assert_eq!(worse(&GOOD, 1.0, 0.0, 0.0), Vec::<String>::new());
    }

    #[test]
    fn each_figure_alone_is_noticed() {
        let taken = Figures { taken_branches: 0.21, ..GOOD };
        assert_eq!(worse(&taken, 1.0, 0.0, 2.0), ["taken branches, as built"]);
        assert_eq!(worse(&taken, 1.0, 0.0, 6.0), Vec::<String>::new());
        assert_eq!(worse(&Figures { ext_tsp: 0.7, ..GOOD }, 1.0, 0.0, 2.0), ["ext-TSP score, as built"]);
        assert_eq!(worse(&Figures { pages: 12, ..GOOD }, 1.0, 0.0, 2.0), ["hot pages, as built"]);
        assert_eq!(worse(&GOOD, 0.9, 0.0, 2.0), ["profile that matches"]);
        assert_eq!(worse(&GOOD, 1.0, 0.03, 2.0), ["newly left out, of samples"]);
    }

    #[test]
    fn better_is_not_worse_and_one_page_is_chance() {
        let better = Figures { taken_branches: 0.1, ext_tsp: 0.9, pages: 5, ..GOOD };
        assert_eq!(worse(&better, 1.0, 0.0, 0.0), Vec::<String>::new());
        assert_eq!(worse(&Figures { pages: 11, ..GOOD }, 1.0, 0.0, 2.0), Vec::<String>::new());
    }

    #[test]
    fn nothing_of_it_divides_by_zero() {
        let none = Figures::default();
        let all = compare((&none, &none, 0.0), (&GOOD, &GOOD, 1.0), 0.0, 2.0);
        assert!(all.iter().all(|c| c.worse.is_finite()));
    }
}
