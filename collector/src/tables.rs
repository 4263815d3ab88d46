//! The tables of a profile while they grow: samples, taken branches and straight stretches by module and link address.

use crate::branch::Proof;
use dyni_schema::{Branches, LinkAddr, ModuleProfile, Ranges, Samples};
use std::collections::HashMap;

/// Where an address is: the module, as whoever keeps the tables counts them, and the link address there.
pub type Place = (u32, LinkAddr);

/// What was seen so far.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    samples: HashMap<Place, u64>,
    taken: HashMap<(u32, u64, u64), (u64, u64)>,
    straight: HashMap<(u32, u64, u64), u64>,
}

impl Tables {
    /// An instruction was running.
    pub fn sample(&mut self, place: Place) {
        *self.samples.entry(place).or_default() += 1;
    }

    /// What a branch stack proves, with where its two addresses are. Whether it was a branch that was counted: those between
    /// modules have no place in a module's table.
    pub fn proof(&mut self, proof: Proof, (m, a): Place, (n, b): Place) -> bool {
        if m != n {
            return false;
        }
        match proof {
            Proof::Taken(taken) => {
                let row = self.taken.entry((m, a.0, b.0)).or_default();
                row.0 += 1;
                row.1 += u64::from(taken.mispredicted);
                true
            }
            // The two may be of different mappings of the file.
            Proof::Straight { .. } if a <= b => {
                *self.straight.entry((m, a.0, b.0)).or_default() += 1;
                false
            }
            Proof::Straight { .. } => false,
        }
    }

    /// Fills the tables of these modules, which are those that places named, by their index, and sorts them by build-id;
    /// modules in which nothing was seen are left out.
    #[must_use]
    pub fn into_modules(self, mut modules: Vec<ModuleProfile>) -> Vec<ModuleProfile> {
        for ((module, link), count) in sorted(self.samples) {
            let Samples { addr, count: counts } = &mut modules[module as usize].samples;
            addr.push(link.0);
            counts.push(count);
        }
        for ((module, a, b), (count, wrong)) in sorted(self.taken) {
            let Branches { from, to, count: counts, mispredicted } = &mut modules[module as usize].branches;
            from.push(a);
            to.push(b);
            counts.push(count);
            mispredicted.push(wrong);
        }
        for ((module, a, b), count) in sorted(self.straight) {
            let Ranges { start, end, count: counts } = &mut modules[module as usize].ranges;
            start.push(a);
            end.push(b);
            counts.push(count);
        }
        modules.retain(|m| !m.samples.addr.is_empty() || !m.branches.from.is_empty());
        modules.sort_by(|a, b| a.build_id.cmp(&b.build_id));
        modules
    }
}

fn sorted<K: Ord, V>(table: HashMap<K, V>) -> Vec<(K, V)> {
    let mut rows: Vec<_> = table.into_iter().collect();
    rows.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    rows
}
