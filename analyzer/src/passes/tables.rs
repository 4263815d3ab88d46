//! Pass `tables`: jumps through tables go through tables of the copies.
//!
//! Without it such a jump arrives in the original, where a patch, if there is room for one, leads back to the copy. A table
//! is cloned if the code checks its length, nobody writes to it, and nobody sees that another one is read
//! ([`crate::table_loads`]).

use super::{FunctionLayout, Pass, PassStats};
use crate::cfg::Terminator;
use crate::image::Image;
use crate::table_loads;

/// Fills `layout.cloned`.
pub fn run(layout: &mut FunctionLayout, image: &Image) -> PassStats {
    let (mut all, mut cloned, mut entries, mut jumps) = (0, 0, 0, 0u64);
    for &b in &layout.order {
        let block = &layout.cfg.blocks[b as usize];
        let Terminator::Indirect { table: Some(t) } = block.terminator else { continue };
        let table = &layout.cfg.jump_tables[t as usize];
        all += 1;
        if table_loads::load(image, &layout.cfg, block).is_some() {
            layout.cloned[b as usize] = true;
            cloned += 1;
            entries += table.targets.len() as u64;
            jumps = jumps.saturating_add(layout.flow.nodes[b as usize]);
        }
    }
    let numbers = [
        ("jumps through tables", all),
        ("of them through tables of the copies", cloned),
        ("entries", entries),
        ("times jumped", jumps),
    ];
    PassStats { pass: Pass::Tables, numbers }
}
