//! What the tests of unwind data share: a module, all of its functions lowered with scrambled blocks.

use dyni_analyzer::cfg;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::targets::TargetIndex;
use dyni_applier::check::{Originals, check};
use dyni_applier::lower::{Emission, Source, lower};
use dyni_applier::unwind::{self, UnwindRefusal};
use dyni_schema::{FunctionHash, FunctionPlan, LinkAddr};
use rayon::prelude::*;

/// A file as the original code.
pub struct File<'a>(pub &'a Image);

impl Originals for File<'_> {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        self.0.bytes(at, len)
    }
}

/// A module and what is known of it.
pub struct Module {
    pub image: Image,
    pub functions: Functions,
    pub targets: TargetIndex,
}

/// Its copies.
pub struct Lowered {
    pub emission: Emission,
    pub copied: usize,
    /// Functions that have unwind data that are not understood.
    pub refused: Vec<UnwindRefusal>,
}

impl Module {
    pub fn parse(bytes: Vec<u8>, name: &str) -> Self {
        let image = Image::parse(bytes, name).unwrap();
        let functions = Functions::find(&image);
        let targets = TargetIndex::build(&image, &functions);
        Self { image, functions, targets }
    }

    /// Copies of every function for which unwind data can be made, to a cache at `cache`.
    pub fn lower(&self, cache: LinkAddr, room: u64) -> Lowered {
        let image = &self.image;
        let judged: Vec<_> =
            self.functions.all().par_iter().map(|f| (f, unwind::examine(image, &self.functions, f))).collect();
        let refused = judged.iter().filter_map(|(_, verdict)| verdict.err()).collect();
        let graphs: Vec<_> = judged
            .par_iter()
            .filter(|(_, verdict)| verdict.is_ok())
            .filter_map(|(f, _)| cfg::build(image, &self.functions, &self.targets, f).ok())
            .collect();
        let plans: Vec<FunctionPlan> = graphs
            .iter()
            .map(|cfg| {
                let mut blocks: Vec<u32> = cfg.blocks.iter().map(|b| b.start.distance(cfg.start) as u32).collect();
                blocks[1..].sort_by_key(|o| o.wrapping_mul(2_654_435_761));
                FunctionPlan {
                    start: cfg.start.0,
                    size: cfg.end.distance(cfg.start) as u32,
                    hash: FunctionHash::default(),
                    hot: blocks.len().div_ceil(2) as u32,
                    blocks,
                    entries: Vec::new(),
                    probes: Vec::new(),
                    calls: Vec::new(),
                    weight: 1,
                }
            })
            .collect();
        let sources: Vec<Source<'_>> = graphs
            .into_iter()
            .zip(&plans)
            .map(|(cfg, plan)| Source {
                code: image.bytes(cfg.start, plan.size as usize).unwrap().to_vec(),
                cfg,
                plan,
                stubs: Vec::new(),
                table_loads: Vec::new(),
            })
            .collect();
        let (emission, unlowered) = lower(&sources, cache, room, cache.plus(room));
        check(&emission, cache, &File(image)).unwrap();
        Lowered { emission, copied: sources.len() - unlowered.len(), refused }
    }
}
