//! A profile with names, for tools that draw it: what [`crate::pprof`] and [`crate::firefox`] are written from.
//!
//! A profile has no stacks, no run addresses and no moments, so neither have these: a sample is one instruction with a count.

use dyni_schema::{BuildId, FileOffset, LinkAddr, ModuleProfile, Profile};

/// A part of a module's file that is loaded and executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Where it begins.
    pub address: LinkAddr,
    /// Where it begins in the file.
    pub offset: FileOffset,
    /// Its length in bytes.
    pub size: u64,
}

/// A function and what to call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFunction {
    /// Its first byte.
    pub start: LinkAddr,
    /// Its length in bytes.
    pub size: u32,
    /// Its name for people.
    pub name: String,
    /// Its name as the file spells it.
    pub symbol: String,
}

/// What is known of a module's file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamedModule {
    /// Which build.
    pub build_id: BuildId,
    /// The lowest address that it is loaded to.
    pub base: LinkAddr,
    /// Whether it is loaded where its addresses say, and nowhere else.
    pub is_fixed: bool,
    /// Its executable parts.
    pub text: Vec<Text>,
    /// Functions in which anything was seen, by rising address, none overlapping another.
    pub functions: Vec<NamedFunction>,
}

/// What the numbers of a profile are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Samples, which stand for time where their rate is known.
    Samples,
    /// Executions of branches that were taken: there are no samples.
    Branches,
}

/// A profile with names.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// The profile.
    pub profile: &'a Profile,
    /// Its id, hexadecimal.
    pub id: &'a str,
    /// What is known of its modules; a module of which nothing is known has no names.
    pub modules: Vec<NamedModule>,
}

/// A module in which anything was seen.
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    /// Which.
    pub module: &'a ModuleProfile,
    /// What is known of its file.
    pub known: Option<&'a NamedModule>,
    /// Where and how much, by rising address.
    pub rows: Vec<(LinkAddr, u64)>,
}

/// How much of a view was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drawn {
    /// Functions with anything in them.
    pub functions: u64,
    /// Instructions that were seen.
    pub rows: u64,
    /// What was seen in code that has no function: it is there, without a name.
    pub unnamed: u64,
}

impl View<'_> {
    /// What the numbers are.
    #[must_use]
    pub fn unit(&self) -> Unit {
        let sampled = self.profile.modules.iter().any(|m| !m.samples.addr.is_empty());
        if sampled { Unit::Samples } else { Unit::Branches }
    }

    /// How long one sample stands for, in ns; `None` if that means nothing.
    #[must_use]
    pub fn period_ns(&self) -> Option<u64> {
        let hz = self.profile.frequency_hz;
        (self.unit() == Unit::Samples && hz > 0).then(|| (1_000_000_000 / hz).max(1))
    }

    /// The modules in which anything was seen, with what is known of each, the most important first.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen<'_>> {
        let known = |m: &ModuleProfile| self.modules.iter().find(|n| n.build_id == m.build_id);
        let seen = |m| Seen { module: m, known: known(m), rows: self.rows(m) };
        let mut seen: Vec<_> = self.profile.modules.iter().map(seen).collect();
        seen.retain(|s| !s.rows.is_empty());
        let total = |rows: &[(LinkAddr, u64)]| rows.iter().fold(0u64, |sum, r| sum.saturating_add(r.1));
        // Sorting is stable: of equals the smaller build-id goes first.
        seen.sort_by_key(|s| std::cmp::Reverse(total(&s.rows)));
        seen
    }

    /// Where anything was seen in a module and how much, by rising address.
    fn rows(&self, module: &ModuleProfile) -> Vec<(LinkAddr, u64)> {
        if self.unit() == Unit::Samples {
            return module.samples.iter().collect();
        }
        let mut rows: Vec<(LinkAddr, u64)> = Vec::new();
        for (&from, &count) in module.branches.from.iter().zip(&module.branches.count) {
            match rows.last_mut().filter(|last| last.0.0 == from) {
                Some(last) => last.1 = last.1.saturating_add(count),
                None => rows.push((LinkAddr(from), count)),
            }
        }
        rows
    }
}

impl NamedModule {
    /// The function that holds this address, as an index.
    #[must_use]
    pub fn function_at(&self, at: LinkAddr) -> Option<usize> {
        let i = self.functions.partition_point(|f| f.start <= at).checked_sub(1)?;
        (at.0 - self.functions[i].start.0 < u64::from(self.functions[i].size)).then_some(i)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use dyni_schema::{Branches, Host, Method, Samples};

    /// Two modules: `main` of which all is known, and one of which nothing is.
    pub(crate) fn profile() -> Profile {
        let module = |id: u8, name: &str, addr: &[u64], count: &[u64]| ModuleProfile {
            build_id: BuildId(vec![id; 20]),
            name: name.into(),
            path: format!("/opt/{name}"),
            samples: Samples { addr: addr.to_vec(), count: count.to_vec() },
            ..ModuleProfile::default()
        };
        Profile {
            program: "main".into(),
            label: String::new(),
            method: Method::Clock,
            method_note: String::new(),
            host: Host { cpu: "a processor".into(), kernel: "6.1".into() },
            start_s: 1_700_000_000,
            duration_ns: 2_000_000_000,
            frequency_hz: 1000,
            processes: 1,
            threads: 2,
            samples: 115,
            outside: 3,
            kernel: 4,
            in_cache: 0,
            lost: 0,
            modules: vec![
                module(1, "other.so", &[0x5000, u64::MAX], &[10, 1]),
                module(2, "main", &[0x1004, 0x1010, 0x1100], &[70, 30, 4]),
            ],
        }
    }

    pub(crate) fn known() -> NamedModule {
        let function = |start, name: &str| NamedFunction {
            start: LinkAddr(start),
            size: 0x20,
            name: name.into(),
            symbol: format!("_{name}"),
        };
        NamedModule {
            build_id: BuildId(vec![2; 20]),
            base: LinkAddr(0),
            is_fixed: false,
            text: vec![Text { address: LinkAddr(0x1000), offset: FileOffset(0x800), size: 0x234 }],
            functions: vec![function(0x1000, "work"), function(0x2000, "idle")],
        }
    }

    #[test]
    fn the_most_important_module_first_and_names_where_they_are_known() {
        let profile = profile();
        let view = View { profile: &profile, id: "ab", modules: vec![known()] };
        let seen = view.seen();
        assert_eq!(seen.iter().map(|s| s.module.name.as_str()).collect::<Vec<_>>(), ["main", "other.so"]);
        assert!(seen[1].known.is_none());
        assert_eq!(seen[0].known.unwrap().function_at(LinkAddr(0x101f)), Some(0));
        assert_eq!(seen[0].known.unwrap().function_at(LinkAddr(0x1020)), None);
        assert_eq!((view.unit(), view.period_ns()), (Unit::Samples, Some(1_000_000)));
    }

    #[test]
    fn without_samples_branches_are_what_there_is() {
        let mut profile = profile();
        profile.modules.truncate(1);
        profile.modules[0].samples = Samples::default();
        profile.modules[0].branches =
            Branches { from: vec![4, 4, 9], to: vec![1, 2, 1], count: vec![5, u64::MAX, 7], mispredicted: vec![0; 3] };
        let view = View { profile: &profile, id: "", modules: Vec::new() };
        assert_eq!((view.unit(), view.period_ns()), (Unit::Branches, None));
        assert_eq!(view.seen()[0].rows, [(LinkAddr(4), u64::MAX), (LinkAddr(9), 7)]);
    }
}
