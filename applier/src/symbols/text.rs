//! The names of text that was moved to huge pages: every function of the module's file that lies in it.

use super::{Symbol, name};
use crate::huge_text;
use crate::remote::Memory;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_collector::maps::Mapping;
use dyni_schema::{BuildId, LinkAddr, RunAddr};

/// A region of text that was moved.
pub(super) struct MovedText {
    pub build_id: BuildId,
    module: String,
    bias: u64,
    start: RunAddr,
    end: RunAddr,
}

impl MovedText {
    /// What was moved in a process with these mappings.
    pub fn find(maps: &[Mapping], memory: &Memory) -> Vec<Self> {
        let record = |moved: huge_text::Moved| {
            let record = moved.record;
            let (start, end) = (RunAddr(record.start), RunAddr(record.start + record.size));
            Self { build_id: record.build_id, module: record.module, bias: record.bias, start, end }
        };
        huge_text::in_force(maps, memory).into_iter().map(record).collect()
    }

    /// Its functions, as far as the file is there to tell.
    pub fn symbols(&self, image: Option<&Image>) -> Vec<Symbol> {
        let Some(image) = image else { return Vec::new() };
        let inside = |at: LinkAddr| (self.start..self.end).contains(&at.run(self.bias));
        let functions = Functions::find(image);
        let of_region = functions.all().iter().filter(|f| inside(f.start));
        of_region
            .map(|f| {
                let start = f.start.run(self.bias);
                let end = f.start.plus(u64::from(f.size)).run(self.bias).min(self.end);
                Symbol { start, size: end.distance(start) as u64, name: name(Some(image), &self.module, f.start) }
            })
            .collect()
    }
}
