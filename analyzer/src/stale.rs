//! Stale profiles: what was seen in one build of a module, carried over to another build of it.
//!
//! After Ayupov, Panchenko and Pupyrev, "Stale Profile Matching" (CC 2024), and BOLT's `--infer-stale-profile`: functions are
//! found again (`functions.rs`) by the hash of their code, by name, by who calls them, by their neighbours; in functions that
//! were edited blocks are found again (`blocks.rs`); counts move with them (`transfer.rs`), and those of blocks that are new
//! follow by profile inference, as for any profile with gaps ([`crate::passes::infer`]). What it takes is in the profile: the
//! old build's file is not needed.
//!
//! What comes out is a profile like any other. Where a match is wrong, so are some counts, and a layout made from them is
//! slower than it could be; it is never incorrect.

mod blocks;
mod functions;
mod shape;
mod transfer;

use crate::plan::{self, Module};
use dyni_schema::{BuildId, LinkAddr, ModuleProfile, Profile};

pub(crate) use shape::shapes;

/// How a function was found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Its code is what it was, but for addresses.
    Hash,
    /// Its code was edited; its name is what it was.
    Name,
    /// A function that calls it was found, and among those that this one calls now it is the most alike.
    Calls,
    /// Its neighbours were found, and among what lies between them now it is the most alike.
    Place,
}

impl Rule {
    /// Every rule, in the order in which they are tried.
    pub const ALL: [Self; 4] = [Self::Hash, Self::Name, Self::Calls, Self::Place];

    /// The word for it in JSON and in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hash => "hash",
            Self::Name => "name",
            Self::Calls => "calls",
            Self::Place => "place",
        }
    }
}

/// A function of the old build in which something was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarriedFunction {
    /// Its first byte in the old build.
    pub was: LinkAddr,
    /// Where it is now and how it was found; `None` if it was not.
    pub now: Option<(LinkAddr, Rule)>,
    /// How hot it was: samples, or branches where there are none; of a counted profile bytes that ran.
    pub weight: u64,
    /// How much of that has found its place.
    pub carried: u64,
}

/// What became of a module's part of a profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// The old build.
    pub was: BuildId,
    /// The new one.
    pub now: BuildId,
    /// The module's base name.
    pub name: String,
    /// The functions in which anything was seen, by their old address.
    pub functions: Vec<CarriedFunction>,
}

impl Carried {
    /// How much was seen in all functions.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.functions.iter().fold(0, |sum, f| sum.saturating_add(f.weight))
    }

    /// How much of it was carried over, by functions that were found by this rule.
    #[must_use]
    pub fn carried_by(&self, rule: Rule) -> u64 {
        let by = self.functions.iter().filter(|f| f.now.is_some_and(|n| n.1 == rule));
        by.fold(0, |sum, f| sum.saturating_add(f.carried))
    }

    /// How many functions were found by this rule.
    #[must_use]
    pub fn found_by(&self, rule: Rule) -> u64 {
        self.functions.iter().filter(|f| f.now.is_some_and(|n| n.1 == rule)).count() as u64
    }

    /// The share of what was seen that was carried over, 0 to 1; 1 if nothing was seen.
    #[must_use]
    pub fn share(&self) -> f64 {
        let (all, carried) = (self.weight(), self.functions.iter().fold(0u64, |sum, f| sum.saturating_add(f.carried)));
        if all == 0 { 1.0 } else { carried as f64 / all as f64 }
    }
}

/// The profile as it would be if it had been taken of other builds of some of its modules. `rebuilt` names these: the build
/// that the profile knows, and the one that is here. Modules that are not named, that the profile does not have, or of
/// which it has the new build too, stay as they are.
///
/// The samples of what has no place in the new build are lost; [`Profile::samples`] is less by them.
#[must_use]
pub fn carry_over(profile: &Profile, rebuilt: &[(BuildId, Module<'_>)]) -> (Profile, Vec<Carried>) {
    let mut new = profile.clone();
    let mut report = Vec::new();
    for (was, module) in rebuilt {
        let now = module.image.build_id();
        let Some(seen) = profile.module(was).filter(|_| profile.module(now).is_none()) else { continue };
        let (moved, carried) = carry_module(seen, profile, module);
        let lost = seen.samples.total().saturating_sub(moved.samples.total());
        new.samples = new.samples.saturating_sub(lost);
        new.modules.retain(|m| m.build_id != *was && m.build_id != *now);
        new.modules.push(moved);
        report.push(carried);
    }
    new.modules.sort_by(|a, b| a.build_id.cmp(&b.build_id));
    let modules: Vec<Module<'_>> = rebuilt.iter().map(|r| r.1).collect();
    plan::annotate(&mut new, &modules);
    debug_assert_eq!(new.validate(), Ok(()));
    (new, report)
}

fn carry_module(seen: &ModuleProfile, profile: &Profile, module: &Module<'_>) -> (ModuleProfile, Carried) {
    let shapes = seen.shapes.unpack();
    let weights = transfer::weights(seen, profile.method);
    let found = functions::pair(seen, &shapes, &weights, module);
    let transfer = transfer::Transfer::new(seen, &shapes, &found, module);
    let (moved, shares) = transfer.run(profile.method);
    let functions = found.iter().zip(&seen.functions.start).zip(weights.iter().zip(shares));
    let functions = functions.map(|((found, &start), (&weight, (placed, all)))| {
        let carried = u128::from(weight) * u128::from(placed) / u128::from(all.max(1));
        CarriedFunction {
            was: LinkAddr(start),
            now: found.map(|(index, rule)| (module.functions.all()[index].start, rule)),
            weight,
            carried: u64::try_from(carried).unwrap_or(u64::MAX).min(weight),
        }
    });
    let carried = Carried {
        was: seen.build_id.clone(),
        now: module.image.build_id().clone(),
        name: seen.name.clone(),
        functions: functions.collect(),
    };
    (moved, carried)
}

#[cfg(test)]
mod tests;
