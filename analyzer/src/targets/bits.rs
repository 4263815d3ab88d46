//! One bit for each byte of a module's text.

use crate::image::Image;
use dyni_schema::LinkAddr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Which bytes are text and which bit stands for each: the ranges one after the other, each from a new word on.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// (first address, address after the last, number of the first word), by rising address.
    ranges: Vec<(u64, u64, usize)>,
    words: usize,
}

impl Layout {
    pub fn of(image: &Image) -> Self {
        let mut layout = Self::default();
        for r in image.text_ranges() {
            layout.ranges.push((r.start.0, r.end.0, layout.words));
            layout.words += (r.end.0 - r.start.0).div_ceil(64) as usize;
        }
        layout
    }

    /// The bit for an address; `None` outside the text.
    pub fn bit(&self, at: LinkAddr) -> Option<usize> {
        let i = self.ranges.partition_point(|r| r.0 <= at.0).checked_sub(1)?;
        let (start, end, word) = self.ranges[i];
        (at.0 < end).then(|| word * 64 + (at.0 - start) as usize)
    }

    pub fn ranges(&self) -> impl Iterator<Item = (LinkAddr, LinkAddr)> + '_ {
        self.ranges.iter().map(|r| (LinkAddr(r.0), LinkAddr(r.1)))
    }
}

/// A set of text addresses that many threads fill. Setting a bit twice is the same as once, in any order, so the result
/// does not depend on how the work was divided.
pub(super) struct Filling(Vec<AtomicU64>);

impl Filling {
    pub fn new(layout: &Layout) -> Self {
        Self((0..layout.words).map(|_| AtomicU64::new(0)).collect())
    }

    pub fn set(&self, layout: &Layout, at: LinkAddr) {
        if let Some(bit) = layout.bit(at) {
            self.0[bit / 64].fetch_or(1 << (bit % 64), Ordering::Relaxed);
        }
    }

    pub fn done(self) -> Bits {
        Bits(self.0.into_iter().map(AtomicU64::into_inner).collect())
    }
}

/// A set of text addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    pub fn has(&self, layout: &Layout, at: LinkAddr) -> bool {
        layout.bit(at).is_some_and(|bit| self.0[bit / 64] >> (bit % 64) & 1 == 1)
    }

    /// The members from `start` to before `end`, both in one range of the layout (a function), rising.
    pub fn within<'a>(
        &'a self,
        layout: &Layout,
        start: LinkAddr,
        end: LinkAddr,
    ) -> impl Iterator<Item = LinkAddr> + 'a {
        let first = layout.bit(start).unwrap_or(0);
        let last = layout.bit(start).map_or(0, |b| (b + (end.0 - start.0) as usize).min(self.0.len() * 64));
        let words = first / 64..last.div_ceil(64);
        words.flat_map(move |w| {
            let mut word = self.0[w];
            std::iter::from_fn(move || {
                let bit = w * 64 + word.trailing_zeros() as usize;
                (word != 0).then(|| {
                    word &= word - 1;
                    bit
                })
            })
            .filter(move |bit| (first..last).contains(bit))
            .map(move |bit| start.plus((bit - first) as u64))
        })
    }

    pub fn count(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }
}
