//! Drift: how far the work of a dynimized program has moved from what it was optimised for.
//!
//! Two signs, both from a few seconds of sampling at a low rate ([`Watch`]). The share of time in *original* code of
//! modules that have copies: work that the plan did not foresee. And the distance between the code that was busy
//! when it was first watched and that which is busy now: work that the plan foresaw, but not this mix of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A share of original code higher by so much than at first is drift …
const FAR: f64 = 0.25;
/// … and is none any more below this. In between it is what it was.
const NEAR: f64 = 0.15;
/// Distances between busy code that mean the same.
const FAR_APART: f64 = 0.5;
const NEAR_AGAIN: f64 = 0.35;
/// So much original code in a program that was given a plan of the archive means that the plan is for other work.
const MISFIT: f64 = 0.5;
/// So many watches in a row have to say so: a nightly job that runs for a minute is no change of work.
const IN_A_ROW: u32 = 2;
/// A watch with fewer samples says nothing.
const FEWEST: u64 = 50;

/// Where a dynimized program spends its time, from a few seconds of sampling.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// Samples in modules that have copies.
    pub samples: u64,
    /// Those of them in copies.
    pub in_cache: u64,
    /// The busiest pieces of code, by module and link address, with their samples.
    pub pieces: BTreeMap<String, u64>,
}

impl Watch {
    /// The share of the samples that is not in copies.
    pub fn in_original(&self) -> f64 {
        if self.samples == 0 { 0.0 } else { 1.0 - self.in_cache.min(self.samples) as f64 / self.samples as f64 }
    }

    /// How different the busy code of two watches is: 0 the same mix, 1 none in common. One minus the cosine of the two as
    /// vectors, so that the hottest pieces make it. A count of chance has a square that is too large by the count itself (as
    /// Poisson's has); without taking that off, two watches of the same flat mix would seem far apart.
    pub fn distance(&self, other: &Self) -> f64 {
        let length = |w: &Self| w.pieces.values().map(|&n| n as f64 * (n as f64 - 1.0)).sum::<f64>().sqrt();
        let product: f64 = self.pieces.iter().filter_map(|(f, n)| Some(*n as f64 * *other.pieces.get(f)? as f64)).sum();
        let lengths = length(self) * length(other);
        if lengths == 0.0 { 0.0 } else { (1.0 - product / lengths).clamp(0.0, 1.0) }
    }
}

/// What the watches of one generation say together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drift {
    /// Whether the plan was made for an earlier process of the program.
    pub of_archive: bool,
    first: Option<Watch>,
    last: Option<Watch>,
    far: bool,
    in_a_row: u32,
}

impl Drift {
    /// Takes a watch into account.
    pub fn add(&mut self, watch: &Watch) {
        if watch.samples < FEWEST {
            return;
        }
        self.last = Some(watch.clone());
        if self.first.is_none() {
            self.first = Some(watch.clone());
            // A plan from the archive has no first time at which it was known to fit.
            self.far = self.of_archive && watch.in_original() > MISFIT;
            return;
        }
        let (rise, distance) = (self.rise(), self.distance());
        if self.far {
            self.far = rise > NEAR || distance > NEAR_AGAIN;
            self.in_a_row = 0;
        } else {
            self.in_a_row = if rise > FAR || distance > FAR_APART { self.in_a_row + 1 } else { 0 };
            self.far = self.in_a_row >= IN_A_ROW;
        }
    }

    /// Whether the work is another one than that which the plan is for.
    pub const fn is_far(&self) -> bool {
        self.far
    }

    /// From 0 to 1: the larger of the two signs; `None` before there are two watches.
    pub fn value(&self) -> Option<f64> {
        (self.first.is_some() && self.last != self.first).then(|| self.rise().max(self.distance()).max(0.0))
    }

    /// The share of time in copies when it was last watched.
    pub fn in_cache(&self) -> Option<f64> {
        self.last.as_ref().map(|w| 1.0 - w.in_original())
    }

    fn rise(&self) -> f64 {
        let share = |w: &Option<Watch>| w.as_ref().map_or(0.0, Watch::in_original);
        share(&self.last) - share(&self.first)
    }

    fn distance(&self) -> f64 {
        match (&self.first, &self.last) {
            (Some(first), Some(last)) => first.distance(last),
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(in_cache: u64, pieces: &[(&str, u64)]) -> Watch {
        let pieces = pieces.iter().map(|(f, n)| ((*f).to_owned(), *n)).collect();
        Watch { samples: 1000, in_cache, pieces }
    }

    const SAME: [(&str, u64); 3] = [("a", 500), ("b", 300), ("c", 3)];

    #[test]
    fn more_original_code_is_drift_only_if_it_lasts() {
        let mut drift = Drift::default();
        for (in_cache, far) in [(900, false), (890, false), (500, false), (900, false), (500, false), (510, true)] {
            drift.add(&watch(in_cache, &SAME));
            assert_eq!(drift.is_far(), far, "{in_cache}");
        }
    }

    #[test]
    fn what_is_far_stays_so_until_it_is_near() {
        let mut drift = Drift::default();
        for (in_cache, far) in
            [(900, false), (600, false), (600, true), (700, true), (740, true), (800, false), (700, false)]
        {
            drift.add(&watch(in_cache, &SAME));
            assert_eq!(drift.is_far(), far, "{in_cache}");
        }
    }

    #[test]
    fn another_mix_of_the_same_code_is_drift() {
        let mut drift = Drift::default();
        drift.add(&watch(900, &SAME));
        for _ in 0..2 {
            drift.add(&watch(900, &[("a", 20), ("d", 500), ("b", 100)]));
        }
        assert!(drift.is_far() && drift.value().unwrap() > 0.5, "{drift:?}");
        // Chance alone is none.
        assert!(watch(0, &SAME).distance(&watch(0, &[("a", 480), ("b", 330), ("d", 4)])) < 0.01);
    }

    #[test]
    fn chance_alone_is_no_distance() {
        // Draws from a mix without any hot spot, as of a large server.
        let mut state = 1_u64;
        let mut draw = || {
            let mut watch = Watch { samples: 1500, ..Watch::default() };
            for _ in 0..1500 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *watch.pieces.entry((state >> 33).rem_euclid(250).to_string()).or_default() += 1;
            }
            watch
        };
        let first = draw();
        for _ in 0..20 {
            let distance = first.distance(&draw());
            assert!(distance < 0.1, "{distance}");
        }
    }

    #[test]
    fn a_plan_of_the_archive_must_fit_at_once() {
        for (in_cache, far) in [(600, false), (400, true)] {
            let mut drift = Drift { of_archive: true, ..Drift::default() };
            drift.add(&watch(in_cache, &SAME));
            assert_eq!(drift.is_far(), far);
        }
    }

    #[test]
    fn few_samples_say_nothing() {
        let mut drift = Drift::default();
        drift.add(&Watch { samples: FEWEST - 1, ..Watch::default() });
        assert_eq!((drift.in_cache(), drift.value()), (None, None));
    }
}
