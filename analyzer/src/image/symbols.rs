//! Names of addresses: `.dynsym` and, where there is one, `.symtab`.

use super::{Image, Inner, Name, string_at};
use dyni_schema::LinkAddr;

/// A defined symbol, 12 bytes: names stay in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Symbol {
    /// Offset from the module's base.
    pub offset: u32,
    /// Length in bytes; 0 if the table does not say.
    pub size: u32,
    /// Where the name lies.
    pub name: Name,
}

/// Sorts by address; of several names for one address the one with the largest size, then the first in the file, comes
/// first (aliases: the same one on every host).
pub(super) fn sort(symbols: &mut Vec<Symbol>) {
    symbols.sort_unstable_by_key(|s| (s.offset, std::cmp::Reverse(s.size), s.name));
    symbols.dedup();
    symbols.shrink_to_fit();
}

/// A name as people write it: C++ and Rust names demangled, others unchanged.
#[must_use]
pub fn demangle(name: &str) -> String {
    // A versioned or cold part: `_ZN1AC1Ev.cold`. The demanglers know some of these endings, not all.
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        return format!("{rust:#}");
    }
    let (stem, ending) = name.split_at(name.find('.').filter(|&i| i > 0).unwrap_or(name.len()));
    // A hostile name may demangle to gigabytes: only names of a plausible length are tried.
    if stem.starts_with("_Z") && stem.len() < 4096 {
        let options = cpp_demangle::DemangleOptions::new().recursion_limit(96);
        let parse = cpp_demangle::ParseOptions::default().recursion_limit(96);
        if let Ok(symbol) = cpp_demangle::Symbol::new_with_options(stem, &parse) {
            let mut out = Bounded(String::new());
            if symbol.structured_demangle(&mut out, &options).is_ok() {
                return out.0 + ending;
            }
        }
    }
    name.to_owned()
}

/// A string that refuses to grow past 64 KiB.
struct Bounded(String);

impl std::fmt::Write for Bounded {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        if self.0.len() + s.len() > 1 << 16 {
            return Err(std::fmt::Error);
        }
        self.0.push_str(s);
        Ok(())
    }
}

impl Inner {
    fn symbol_holding(&self, at: LinkAddr) -> Option<&Symbol> {
        let offset = self.offset_of(at.0)?;
        let symbols = &self.tables.symbols;
        let after = symbols.partition_point(|s| s.offset <= offset);
        let start = symbols[..after].last()?.offset;
        let first = symbols.partition_point(|s| s.offset < start);
        let symbol = &symbols[first];
        (start == offset || offset - start < symbol.size).then_some(symbol)
    }
}

impl Image {
    /// The symbol at or around an address, as the file spells it (mangled), and where it starts.
    #[must_use]
    pub fn symbol_at(&self, at: LinkAddr) -> Option<(&str, LinkAddr)> {
        let symbol = self.0.symbol_holding(at)?;
        let name = string_at(self.file(), symbol.name.0 as usize).filter(|n| !n.is_empty())?;
        Some((name, self.at_offset(symbol.offset)))
    }

    /// The demangled name of the symbol at or around an address, or of the import behind a PLT stub (`puts@plt`).
    #[must_use]
    pub fn name_of(&self, at: LinkAddr) -> Option<String> {
        if let Some((name, _)) = self.symbol_at(at) {
            return Some(demangle(name));
        }
        self.plt_name(at).map(|n| format!("{}@plt", demangle(n)))
    }

    /// Every defined symbol, as (start, size in bytes, name as spelt in the file), by rising address.
    pub fn symbols(&self) -> impl Iterator<Item = (LinkAddr, u32, &str)> + '_ {
        let symbols = self.0.tables.symbols.iter();
        symbols.map(|s| (self.at_offset(s.offset), s.size, string_at(self.file(), s.name.0 as usize).unwrap_or("")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_as_people_write_them() {
        assert_eq!(demangle("main"), "main");
        assert_eq!(demangle("_ZN3foo3barEi"), "foo::bar(int)");
        assert_eq!(demangle("_ZN3foo3barEi.cold"), "foo::bar(int).cold");
        assert_eq!(demangle("_RNvC6_123foo3bar"), "123foo::bar");
        assert_eq!(demangle("_Z"), "_Z");
    }
}
