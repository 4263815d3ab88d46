//! A file's bitmap as a line of text: each character stands for an equal part of the file, the fuller the more of it is
//! touched.

use dyni_schema::working_set::{ALWAYS, PAGE};
use dyni_schema::{FileSet, Runs};

const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];

/// The strip of a file, at most `width` characters and no more than it has pages.
#[must_use]
pub fn draw(file: &FileSet, width: usize) -> String {
    let pages = file.size.div_ceil(PAGE);
    let cells = (width as u64).min(pages).max(1);
    (0..cells).map(|cell| shade(&file.runs, cell * pages / cells, (cell + 1) * pages / cells)).collect()
}

fn shade(runs: &Runs, from: u64, to: u64) -> char {
    let inside = |r: dyni_schema::working_set::Run| {
        let (first, end) = (u64::from(r.first), u64::from(r.first) + u64::from(r.count));
        end.min(to).saturating_sub(first.max(from)) * u64::from(r.weight)
    };
    let touched: u64 = runs.iter().map(inside).sum();
    let whole = (to - from).max(1) * u64::from(ALWAYS);
    // Anything at all shows.
    SHADES[if touched == 0 { 0 } else { (touched * 4).div_ceil(whole).clamp(1, 4) as usize }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyni_schema::{BuildId, FileKey};

    #[test]
    fn parts_are_as_full_as_they_are_touched() {
        let mut runs = Runs::default();
        (0..10).chain(20..25).chain([30]).for_each(|page| runs.push(page, ALWAYS, 0));
        let key = FileKey::Build(BuildId(vec![1]));
        let file = FileSet { key, path: String::new(), size: 40 * PAGE, runs };
        assert_eq!(draw(&file, 4), "█·▒░");
        assert_eq!(draw(&file, 1000).chars().count(), 40);
    }
}
