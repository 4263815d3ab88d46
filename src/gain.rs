//! How much an optimisation gains, from slices with it and without it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use dyni_applier::Gain;
use dyni_schema::{BuildId, LinkAddr};
use serde::Serialize;

/// How often a block must have run in a slice to say anything.
const MIN_COUNT: u64 = 20;
/// How many pairs make an estimate at least.
const MIN_PAIRS: usize = 4;

/// What a program did in a slice of time.
#[derive(Clone, Debug, Default)]
pub struct Slice {
    /// How often each counted block ran.
    pub counts: BTreeMap<(BuildId, LinkAddr), u64>,
    /// The processor time that it took.
    pub cpu: Duration,
}

impl Slice {
    /// The work per processor time in this slice to that in another, as a logarithm: the median over the blocks that were
    /// counted in both. A block that runs by the clock, or while waiting, is outvoted. `None` if none ran enough.
    pub fn against(&self, other: &Self) -> Option<f64> {
        let rate = |slice: &Self, count: u64| count as f64 / slice.cpu.as_secs_f64();
        let enough = |count: &&u64| **count >= MIN_COUNT;
        let ratio = |(block, count): (&_, &u64)| {
            let there = other.counts.get(block).filter(enough)?;
            Some((rate(self, *count) / rate(other, *there)).ln())
        };
        let mut ratios: Vec<f64> = self.counts.iter().filter(|(_, c)| enough(c)).filter_map(ratio).collect();
        ratios.retain(|r| r.is_finite());
        ratios.sort_by(f64::total_cmp);
        let middle = ratios.len() / 2;
        match ratios.len() {
            0 => None,
            n if n % 2 == 1 => Some(ratios[middle]),
            _ => Some(f64::midpoint(ratios[middle - 1], ratios[middle])),
        }
    }
}

/// Work per processor time with the optimisation, divided by that without: `1.053 (1.041 to 1.066)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// The best estimate.
    pub ratio: f64,
    /// The lower end of its 95 % interval.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} ({:.3} to {:.3})", self.ratio, self.low, self.high)
    }
}

impl From<Gain> for Ratio {
    fn from(gain: Gain) -> Self {
        let of = |ppm: u64| ppm as f64 / 1e6;
        Self { ratio: of(gain.ratio_ppm), low: of(gain.low_ppm), high: of(gain.high_ppm) }
    }
}

impl From<Ratio> for Gain {
    fn from(r: Ratio) -> Self {
        let ppm = |x: f64| (x * 1e6).round() as u64;
        Self { ratio_ppm: ppm(r.ratio), low_ppm: ppm(r.low), high_ppm: ppm(r.high) }
    }
}

/// What pairs of slices say together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// What they say.
    #[serde(flatten)]
    pub ratio: Ratio,
    /// How many they were.
    pub pairs: usize,
}

impl Estimate {
    /// From the logarithms of the pairs' ratios; `None` if they are too few.
    ///
    /// The mean of the middle half, and Student's t interval around it (a trimmed mean with Winsorized variance; Tukey and
    /// McLaughlin 1963): whatever else runs on the machine makes some pairs wild.
    pub fn of(logs: &[f64]) -> Option<Self> {
        if logs.len() < MIN_PAIRS {
            return None;
        }
        let mut sorted = logs.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let cut = n / 4;
        let kept = &sorted[cut..n - cut];
        let h = kept.len() as f64;
        let mean = kept.iter().sum::<f64>() / h;
        let winsorized: Vec<f64> = sorted.iter().map(|x| x.clamp(kept[0], kept[kept.len() - 1])).collect();
        let centre = winsorized.iter().sum::<f64>() / n as f64;
        let variance = winsorized.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / (n as f64 - 1.0);
        let error = (variance * (n as f64 - 1.0) / (h * (h - 1.0))).sqrt() * student(kept.len() - 1);
        let ratio = Ratio { ratio: mean.exp(), low: (mean - error).exp(), high: (mean + error).exp() };
        Some(Self { ratio, pairs: n })
    }

    /// How far the ends of the interval are from the estimate.
    pub fn error(&self) -> f64 {
        (self.ratio.high - self.ratio.low) / 2.0
    }
}

/// The factor of the 95 % interval for so many degrees of freedom (Student 1908; tables), from below rounded up.
fn student(freedom: usize) -> f64 {
    const TABLE: [f64; 12] = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18];
    match freedom {
        0 => f64::INFINITY,
        n @ 1..=12 => TABLE[n - 1],
        13..=19 => 2.16,
        20..=39 => 2.09,
        _ => 2.02,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(cpu_ms: u64, counts: &[u64]) -> Slice {
        let counts = counts.iter().enumerate().map(|(i, &n)| ((BuildId(vec![7]), LinkAddr(i as u64)), n));
        Slice { counts: counts.collect(), cpu: Duration::from_millis(cpu_ms) }
    }

    #[test]
    fn the_median_of_the_blocks_is_the_work() {
        let before = slice(100, &[1000, 2000, 50, 5]);
        // Half the processor time for the same work; a timer's block ran as often as the clock said.
        let after = slice(50, &[1000, 2000, 25, 5]);
        assert!((after.against(&before).unwrap() - 2f64.ln()).abs() < 1e-9);
        assert_eq!(slice(100, &[3]).against(&before), None, "too few to say anything");
        assert_eq!(slice(0, &[1000]).against(&before), None, "no processor time, no rate");
    }

    #[test]
    fn an_interval_holds_what_made_it() {
        let logs: Vec<f64> = (0..20).map(|i| 1.05f64.ln() + f64::from(i % 5 - 2) * 0.01).collect();
        let e = Estimate::of(&logs).unwrap();
        let r = e.ratio;
        assert!((r.ratio - 1.05).abs() < 1e-6 && r.low < 1.05 && r.high > 1.05 && e.error() < 0.012, "{e:?}");
        assert_eq!(e.pairs, 20);
        assert_eq!(Estimate::of(&logs[..3]), None);
        let mut wild = logs.clone();
        wild[3] = 4.0;
        let e = Estimate::of(&wild).unwrap();
        assert!(e.error() < 0.02 && (e.ratio.ratio - 1.05).abs() < 0.01, "{e:?}");
    }

    #[test]
    fn people_read_a_gain_with_its_interval() {
        let ratio = Ratio { ratio: 1.053, low: 1.0411, high: 1.066 };
        assert_eq!(ratio.to_string(), "1.053 (1.041 to 1.066)");
        assert_eq!(Ratio::from(Gain::from(ratio)), ratio);
    }
}
