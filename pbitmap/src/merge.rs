//! Several recordings as one. The last run alone would forget what every other run needs; all runs together would grow until
//! they were the whole file. So each page has a weight, which rises a part of the way to the top when the page is touched and
//! falls by the same part when it is not; a page that is not touched for long is dropped.

use std::collections::BTreeMap;

use dyni_schema::working_set::ALWAYS;
use dyni_schema::{FileKey, FileSet, Runs, WorkingSet};

/// The newest recording counts for one part in this many, or for its share where there are fewer.
const SHARE: u32 = 4;
/// Pages of less weight are dropped: after five starts in a row without them.
const FORGOTTEN: u32 = 64;

/// The working set that was known, with one more recording, made later, taken into account. Of files of which the two know
/// different builds or states, the newer is kept with the weights that its recording gave it; a file that was not met again
/// fades.
#[must_use]
pub fn merge(known: &WorkingSet, newer: &WorkingSet) -> WorkingSet {
    let mut files: BTreeMap<&FileKey, (Option<&FileSet>, Option<&FileSet>)> = BTreeMap::new();
    for file in &known.files {
        files.entry(&file.key).or_default().0 = Some(file);
    }
    for file in &newer.files {
        files.entry(&file.key).or_default().1 = Some(file);
    }
    let parts = SHARE.min(known.recordings.saturating_add(1));
    let replaced = |old: &FileSet| newer.files.iter().any(|f| f.path == old.path && f.key != old.key);
    let merged = files.into_values().filter_map(|pair| match pair {
        // Its place has been taken by another build.
        (Some(old), None) if replaced(old) => None,
        (old, new) => {
            let file = new.or(old)?;
            let runs = merge_runs(old.map(|f| &f.runs), new.map(|f| &f.runs), parts);
            (!runs.first.is_empty()).then(|| FileSet { runs, ..file.clone() })
        }
    });
    WorkingSet {
        recordings: known.recordings.saturating_add(1),
        usefulness: known.usefulness,
        files: merged.collect(),
        ..newer.clone()
    }
}

fn merge_runs(old: Option<&Runs>, new: Option<&Runs>, parts: u32) -> Runs {
    // By page: the weight before, the look that saw it.
    let mut pages: BTreeMap<u32, (u32, u16, bool)> = BTreeMap::new();
    for run in old.into_iter().flat_map(Runs::iter) {
        pages.extend((run.first..run.first + run.count).map(|page| (page, (run.weight.into(), run.seen, false))));
    }
    for run in new.into_iter().flat_map(Runs::iter) {
        for page in run.first..run.first + run.count {
            let before = pages.get(&page).map_or(0, |p| p.0);
            pages.insert(page, (before, run.seen, true));
        }
    }
    let mut runs = Runs::default();
    for (page, (before, seen, touched)) in pages {
        let top = u32::from(ALWAYS);
        let weight = if touched { before + (top - before).div_ceil(parts) } else { before - before.div_ceil(parts) };
        // What was just seen is kept, however rare it has been.
        if touched || weight >= FORGOTTEN {
            runs.push(page, u8::try_from(weight.clamp(1, top)).unwrap_or(ALWAYS), seen);
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_schema::{BuildId, Recorder, Usefulness};

    fn set(build: u8, pages: &[u32]) -> WorkingSet {
        let key = FileKey::Build(BuildId(vec![build; 20]));
        let mut runs = Runs::default();
        pages.iter().for_each(|&page| runs.push(page, ALWAYS, 0));
        WorkingSet {
            program: "p".into(),
            executable: key.clone(),
            mode: String::new(),
            recordings: 1,
            recorder: Recorder::Pagemap,
            granule: 16,
            deadline_ns: 1,
            updated_s: 1,
            usefulness: Usefulness::default(),
            files: vec![FileSet { key, path: "/p".into(), size: 1 << 20, runs }],
        }
    }

    fn weight(set: &WorkingSet, page: u32) -> u8 {
        let runs = set.files.iter().flat_map(|f| f.runs.iter());
        runs.filter(|r| (r.first..r.first + r.count).contains(&page)).map(|r| r.weight).next().unwrap_or(0)
    }

    #[test]
    fn what_is_touched_each_time_stays_and_what_is_not_fades() {
        let mut known = set(1, &[1, 2, 3]);
        let mut weights = Vec::new();
        for _ in 0..8 {
            known = merge(&known, &set(1, &[2, 3, 9]));
            known.validate().unwrap();
            weights.push((weight(&known, 1), weight(&known, 2), weight(&known, 9)));
        }
        assert!(weights.windows(2).all(|w| w[1].0 <= w[0].0 && w[1].2 >= w[0].2), "{weights:?}");
        assert!(weights[0].0 > 0, "it is not forgotten at once: {weights:?}");
        assert_eq!(weights[7].0, 0, "it is forgotten at last: {weights:?}");
        assert!(weights.iter().all(|w| w.1 == ALWAYS), "{weights:?}");
        assert!(weights[7].2 > 200, "{weights:?}");
        assert_eq!(known.recordings, 9);
    }

    #[test]
    fn one_odd_start_does_not_make_a_page_regular() {
        let mut known = set(1, &[1]);
        for _ in 0..4 {
            known = merge(&known, &set(1, &[1]));
        }
        let known = merge(&known, &set(1, &[1, 7]));
        assert!(weight(&known, 7) > 0 && weight(&known, 7) < 96, "{}", weight(&known, 7));
    }

    #[test]
    fn a_new_build_takes_the_place_of_the_old_one() {
        let merged = merge(&set(1, &[1, 2]), &set(2, &[5]));
        merged.validate().unwrap();
        assert_eq!(merged.files.len(), 1);
        assert_eq!(merged.files[0].key, FileKey::Build(BuildId(vec![2; 20])));
    }
}
