//! A profile for a binary that is at hand, which may be another build than the one that was recorded.

use std::path::Path;

use dyni_analyzer::stale::{Carried, Rule, carry_over};
use dyni_schema::{ModuleProfile, Profile};
use serde::{Deserialize, Serialize};

use crate::errors::Failure;
use crate::modules::Binary;
use crate::output::plural;

/// How a mapped file is marked in `/proc` that has been replaced since.
const DELETED: &str = " (deleted)";

/// How much of a profile of another build could be carried over. Part of JSON documents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Matched {
    /// The build that was recorded.
    pub recorded: String,
    /// The share of what was seen that has its place in this build, 0 to 1.
    pub share: f64,
    /// Functions in which anything was seen.
    pub functions: u64,
    /// Those of them that were found by the hash of their code.
    pub by_hash: u64,
    /// Those that were edited and found by name.
    pub by_name: u64,
    /// Those that were edited and found by what calls them.
    pub by_calls: u64,
    /// Those that were edited and found by their neighbours.
    pub by_place: u64,
}

impl Matched {
    fn new(carried: &Carried) -> Self {
        Self {
            recorded: carried.was.hex(),
            share: carried.share(),
            functions: carried.functions.len() as u64,
            by_hash: carried.found_by(Rule::Hash),
            by_name: carried.found_by(Rule::Name),
            by_calls: carried.found_by(Rule::Calls),
            by_place: carried.found_by(Rule::Place),
        }
    }

    /// One line for people.
    pub fn text(&self) -> String {
        let found = [
            (self.by_hash, "unchanged"),
            (self.by_name, "edited, found by name"),
            (self.by_calls, "edited, found by what calls them"),
            (self.by_place, "edited, found by their neighbours"),
        ];
        let found: Vec<String> = found.iter().filter(|f| f.0 > 0).map(|(n, how)| format!("{n} {how}")).collect();
        let of = plural(self.functions, "function", "functions");
        format!("{:.1} % of the profile still matches; of {of} {}", self.share * 100.0, found.join(", "))
    }
}

/// A profile that fits a binary.
#[derive(Debug)]
pub struct Fitting {
    /// The profile, as if it had been taken of this build.
    pub profile: Profile,
    /// What was carried over; `None` if it was taken of this very build.
    pub carried: Option<Carried>,
}

impl Fitting {
    /// How much of it could be carried over, if it is of another build.
    pub fn matched(&self) -> Option<Matched> {
        self.carried.as_ref().map(Matched::new)
    }
}

/// The base name that a module of a profile and a file at `path` have in common.
fn is_named(module: &ModuleProfile, path: &Path, binary: &Binary) -> bool {
    let name = module.name.strip_suffix(DELETED).unwrap_or(&module.name);
    path.file_name().is_some_and(|n| n == name) || binary.image.soname() == Some(name)
}

/// Whether a profile says anything of a binary: `Some(true)` of this very build, `Some(false)` of a module of its name.
pub fn concerns(profile: &Profile, binary: &Binary, path: &Path) -> Option<bool> {
    if profile.module(binary.image.build_id()).is_some() {
        return Some(true);
    }
    profile.modules.iter().any(|m| is_named(m, path, binary)).then_some(false)
}

/// The profile as it would be if it had been taken of this build.
///
/// # Errors
/// It has no module of this build, nor one of the file's name.
pub fn fit(profile: &Profile, binary: &Binary, path: &Path) -> Result<Fitting, Failure> {
    if profile.module(binary.image.build_id()).is_some() {
        return Ok(Fitting { profile: profile.clone(), carried: None });
    }
    // Several builds of one name are in a merged profile: the one in which most was seen.
    let named = profile.modules.iter().filter(|m| is_named(m, path, binary));
    let weight = |m: &ModuleProfile| m.samples.total().max(m.branches.count.len() as u64);
    let Some(module) = named.max_by_key(|m| (weight(m), m.build_id.clone())) else {
        let names: Vec<_> = profile.modules.iter().take(8).map(|m| m.name.as_str()).collect();
        let why = format!("it was taken of {}, and has {}", profile.program, names.join(", "));
        return Err(Failure::refused(format!("use the profile for {}", path.display()), why)
            .help("a binary is known by its build-id or else by its file name, which has to be the recorded one's"));
    };
    let (profile, mut carried) = carry_over(profile, &[(module.build_id.clone(), binary.module())]);
    Ok(Fitting { profile, carried: carried.pop() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_for_people_has_what_there_is() {
        let matched = Matched { share: 0.984, functions: 211, by_hash: 207, by_calls: 3, ..Matched::default() };
        assert_eq!(
            matched.text(),
            "98.4 % of the profile still matches; of 211 functions 207 unchanged, 3 edited, found by what calls them"
        );
    }
}
