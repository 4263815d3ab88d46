//! Pass `promote`: calls through pointers are compared with what they mostly call.
//!
//! As BOLT's indirect call promotion, but what is saved is more: without it such a call arrives at the original's entry,
//! from where a patch leads to the copy. A site is promoted if it mostly goes to one function of its module, which is hot
//! itself; the applier takes it if that has a copy.

use super::infer::Evidence;
use super::{FunctionLayout, Pass, PassStats};
use crate::calls::{self, Site};
use crate::plan::Module;
use dyni_schema::{CallSite, LinkAddr};

/// A site's usual callee has at least this share of its calls, in per cent: another one takes two more branches, and the
/// usual one takes one less.
const SHARE: u64 = 67;

/// Fills `layout.calls`.
pub fn run(layout: &mut FunctionLayout, module: &Module<'_>, evidence: &Evidence<'_>) -> PassStats {
    let code = module.image.bytes(layout.cfg.start, layout.function.size as usize).unwrap_or(&[]);
    let mut hot = vec![false; layout.cfg.blocks.len()];
    layout.order[..layout.hot].iter().for_each(|&b| hot[b as usize] = true);
    let sites = calls::sites(&layout.cfg, code).into_iter().filter(|s| hot[s.block]);
    let (mut seen, mut observed, mut direct) = (0, 0u64, 0u64);
    for site in sites {
        let targets = evidence.branches_from(site.at, site.at.plus(1)).map(|(_, to, count)| (count, to));
        let targets: Vec<(u64, LinkAddr)> = targets.collect();
        let all = targets.iter().fold(0u64, |sum, t| sum.saturating_add(t.0));
        seen += u64::from(all > 0);
        observed = observed.saturating_add(all);
        let Some(&(count, callee)) = targets.iter().max() else { continue };
        let is_usual = u128::from(count) * 100 >= u128::from(all) * u128::from(SHARE);
        if is_usual && module.functions.starting_at(callee).is_some() {
            direct = direct.saturating_add(count);
            promote(layout, site, callee);
        }
    }
    let numbers = [
        ("call sites with known callees", seen),
        ("of them promoted", layout.calls.len() as u64),
        ("calls seen", observed),
        ("of them of the usual callee", direct),
    ];
    PassStats { pass: Pass::Promote, numbers }
}

fn promote(layout: &mut FunctionLayout, site: Site, callee: LinkAddr) {
    let offset = |at: LinkAddr| at.distance(layout.cfg.start) as u32;
    let block = &layout.cfg.blocks[site.block];
    let behind = site.at.plus(u64::from(site.len));
    // A call in the middle parts its block: the plain call, which lies elsewhere, comes back there.
    if !site.is_jump && behind < block.end {
        layout.parts.push((offset(block.start), offset(behind)));
    }
    layout.calls.push(CallSite { at: offset(site.at), callee: callee.0 });
}
