//! The layout passes, in the order in which they run, and what they work on.
//!
//! | pass | works on | source |
//! |---|---|---|
//! | [`infer`] | one function: evidence to counts | He et al. 2022, see [`crate::infer`] |
//! | [`split`] | one function: which blocks are hot | ours: cold only with evidence |
//! | [`exttsp`] | one function: the order of its hot blocks | Newell and Pupyrev, see [`crate::exttsp`] |
//! | [`entries`] | one function: which originals are patched besides the entry | ours |
//! | [`plt`] | one function: calls past the procedure linkage table | BOLT's PLT pass |
//! | [`tables`] | one function: which jump tables are cloned | BOLT's jump tables, in ours without moving the old |
//! | [`promote`] | one function: which calls through pointers are compared with their usual target | BOLT's ICP |
//! | [`dispatch`] | one function: whether it is worth a copy | ours |
//! | [`cdsort`] | one module: the order of its functions | LLVM's CDSort, see [`crate::cdsort`] |
//!
//! Each can be left out by name; the next ones then work on what is there.

pub mod blocks;
pub mod cdsort;
pub mod dispatch;
pub mod entries;
pub mod exttsp;
pub mod infer;
pub mod plt;
pub mod promote;
pub mod split;
pub mod tables;

pub use blocks::{BlockInfo, Edge, FunctionLayout};

use std::fmt;

/// A pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pass {
    /// Profile inference.
    Infer,
    /// Hot/cold splitting.
    Split,
    /// Block ordering.
    ExtTsp,
    /// Choice of patched blocks.
    Entries,
    /// Calls past the procedure linkage table.
    Plt,
    /// Jump tables of the copies.
    Tables,
    /// Promotion of calls through pointers.
    Promote,
    /// Choice of functions.
    Dispatch,
    /// Function ordering.
    CdSort,
}

impl Pass {
    /// Every pass in the order in which they run.
    pub const ALL: [Self; 9] = [
        Self::Infer,
        Self::Split,
        Self::ExtTsp,
        Self::Entries,
        Self::Plt,
        Self::Tables,
        Self::Promote,
        Self::Dispatch,
        Self::CdSort,
    ];

    /// The word for it in `--passes` and in a plan.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Infer => "infer",
            Self::Split => "split",
            Self::ExtTsp => "exttsp",
            Self::Entries => "entries",
            Self::Plt => "plt",
            Self::Tables => "tables",
            Self::Promote => "promote",
            Self::Dispatch => "dispatch",
            Self::CdSort => "cdsort",
        }
    }
}

/// Which passes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassSet(u16);

impl Default for PassSet {
    fn default() -> Self {
        Self::ALL
    }
}

/// A word in a pass list that is no pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no pass \"{0}\"; the passes are infer, split, exttsp, entries, plt, tables, promote, dispatch and cdsort"
)]
pub struct UnknownPass(pub String);

impl PassSet {
    /// All of them.
    pub const ALL: Self = Self((1 << Pass::ALL.len()) - 1);
    /// None: hot functions are copied as they are.
    pub const NONE: Self = Self(0);

    /// The passes of a comma-separated list of names; `all` and `none` are names too.
    ///
    /// # Errors
    /// The first word that is no pass.
    pub fn parse(list: &str) -> Result<Self, UnknownPass> {
        let mut set = Self::NONE;
        for word in list.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            match (word, Pass::ALL.into_iter().find(|p| p.name() == word)) {
                (_, Some(pass)) => set = set.with(pass),
                ("all", _) => set = Self::ALL,
                ("none", _) => {}
                _ => return Err(UnknownPass(word.to_owned())),
            }
        }
        Ok(set)
    }

    /// This set and one more.
    #[must_use]
    pub const fn with(self, pass: Pass) -> Self {
        Self(self.0 | 1 << pass as u8)
    }

    /// This set without one.
    #[must_use]
    pub const fn without(self, pass: Pass) -> Self {
        Self(self.0 & !(1 << pass as u8))
    }

    /// Whether a pass runs.
    #[must_use]
    pub const fn has(self, pass: Pass) -> bool {
        self.0 & 1 << pass as u8 != 0
    }

    /// The passes that run, in order.
    pub fn iter(self) -> impl Iterator<Item = Pass> {
        Pass::ALL.into_iter().filter(move |&p| self.has(p))
    }
}

impl fmt::Display for PassSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().map(Pass::name).collect::<Vec<_>>().join(","))
    }
}

/// What a pass did, summed over functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassStats {
    /// Which pass.
    pub pass: Pass,
    /// Numbers with the words that go with them, always the same ones in the same order for a pass.
    pub numbers: [(&'static str, u64); 4],
}

impl PassStats {
    /// Adds another function's numbers of the same pass.
    pub fn add(&mut self, other: &Self) {
        debug_assert_eq!(self.pass, other.pass);
        for (mine, theirs) in self.numbers.iter_mut().zip(&other.numbers) {
            mine.1 = mine.1.saturating_add(theirs.1);
        }
    }
}

impl fmt::Display for PassStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.pass.name())?;
        for (i, (word, number)) in self.numbers.iter().filter(|(w, _)| !w.is_empty()).enumerate() {
            write!(f, "{} {number} {word}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_parse_and_print() {
        assert_eq!(PassSet::parse("all").unwrap(), PassSet::ALL);
        assert_eq!(PassSet::parse("cdsort, infer").unwrap().to_string(), "infer,cdsort");
        assert_eq!(PassSet::parse("none").unwrap(), PassSet::NONE);
        assert_eq!(PassSet::parse("infer,hfsort"), Err(UnknownPass("hfsort".into())));
        assert!(!PassSet::ALL.without(Pass::Split).has(Pass::Split));
    }
}
