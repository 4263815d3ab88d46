//! The names that BOLT gives to the functions of a binary, by which its profiles find them again.
//!
//! BOLT looks at `.symtab` alone. A global symbol keeps its name. A local one gets a number, counted by rising address over
//! all local symbols of that name (`init/1`), and a second name with the file's before the number (`init/main.c/1`), counted
//! on its own. A function without a symbol, as all are in a stripped binary, is called after the address that its FDE
//! gives: `__BOLT_FDE_FUNCat3d120`. (BOLT: `RewriteInstance::discoverFileObjects`.)
//!
//! The symbol table is untrusted: what does not fit is as if it were not there, and a name that leads nowhere is a name that
//! is not found.

use crate::functions::Functions;
use crate::image::Image;
use dyni_schema::LinkAddr;
use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, SectionHeader, Sym};
use std::cmp::Reverse;
use std::collections::HashMap;

/// What BOLT calls a function that it knows from its FDE alone, before the address in hexadecimal.
const BY_FDE: &str = "__BOLT_FDE_FUNCat";

/// The longest name that is looked at, in bytes.
const MAX_NAME: usize = 1 << 14;

/// A symbol that lies in text.
#[derive(Clone, Debug)]
struct Symbol {
    at: LinkAddr,
    size: u64,
    is_function: bool,
    name: String,
}

/// The names of a binary's functions, there and back.
#[derive(Clone, Debug, Default)]
pub struct FunctionNames {
    /// By rising address, a function before what else has its address.
    symbols: Vec<Symbol>,
    by_name: HashMap<String, LinkAddr>,
}

impl FunctionNames {
    /// The names in a binary.
    #[must_use]
    pub fn of(image: &Image, functions: &Functions) -> Self {
        let mut names = Self::default();
        // The weakest first: a later one with the same name replaces it. A profile of a build that was not stripped may
        // use what a stripped one still exports.
        for (at, _, name) in image.symbols().filter(|s| image.is_executable(s.0) && !s.2.is_empty()) {
            names.by_name.insert(name.to_owned(), at);
        }
        for function in functions.all() {
            names.by_name.insert(by_fde(function.start), function.start);
        }
        names.read_symbols(image);
        names
    }

    /// What BOLT calls the code at a function's first byte: a name, and the distance from where that name is, in bytes.
    #[must_use]
    pub fn of_function(&self, start: LinkAddr) -> (String, u64) {
        let first = self.symbols.partition_point(|s| s.at < start);
        let before = self.symbols[..first].iter().rev().find(|s| s.is_function);
        match (self.symbols.get(first), before) {
            (Some(symbol), _) if symbol.at == start => (symbol.name.clone(), 0),
            // To BOLT it is a piece of that function, whatever the FDEs say.
            (_, Some(symbol)) if start.0 - symbol.at.0 < symbol.size => (symbol.name.clone(), start.0 - symbol.at.0),
            _ => (by_fde(start), 0),
        }
    }

    /// Where the function of this name is.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<LinkAddr> {
        self.by_name.get(name).copied()
    }

    fn read_symbols(&mut self, image: &Image) {
        let data = image.file();
        let Ok(header) = elf::FileHeader64::<LE>::parse(data) else { return };
        let Ok(sections) = header.sections(LE, data) else { return };
        let Ok(table) = sections.symbols(LE, data, elf::SHT_SYMTAB) else { return };
        let mut file = String::new();
        // (address, order, symbol, name, is local, the name with the file's)
        let mut found: Vec<(LinkAddr, u8, Symbol, bool, Option<String>)> = Vec::new();
        for (index, symbol) in table.enumerate() {
            let Some(name) = symbol.name(LE, table.strings()).ok().filter(|n| n.len() <= MAX_NAME) else { continue };
            let name = String::from_utf8_lossy(name).into_owned();
            if symbol.st_type() == elf::STT_FILE {
                file = name;
                continue;
            }
            let at = LinkAddr(symbol.st_value(LE));
            let Ok(Some(section)) = table.symbol_section(LE, symbol, index) else { continue };
            let Ok(section) = sections.section(section) else { continue };
            let range = section.sh_addr(LE)..=section.sh_addr(LE).saturating_add(section.sh_size(LE));
            let end = at.0.saturating_add(symbol.st_size(LE));
            let is_loaded = section.sh_flags(LE).contains(elf::SHF_ALLOC);
            let is_kept = is_loaded && at.0 != 0 && range.contains(&at.0) && range.contains(&end);
            if !is_kept || name.is_empty() || symbol.st_type() == elf::STT_SECTION {
                continue;
            }
            let is_function = symbol.st_type() == elf::STT_FUNC;
            let is_local = symbol.st_bind() == elf::STB_LOCAL;
            let with_file = (is_local && is_function && !file.is_empty()).then(|| format!("{name}/{file}"));
            let size = symbol.st_size(LE);
            found.push((at, u8::from(!is_function), Symbol { at, size, is_function, name }, is_local, with_file));
        }
        found.sort_by_key(|f| (f.0, f.1));
        let mut counts: HashMap<String, u64> = HashMap::new();
        let mut numbered = |name: String| {
            let count = counts.entry(name.clone()).or_default();
            *count += 1;
            format!("{name}/{count}")
        };
        for (at, _, mut symbol, is_local, with_file) in found {
            let with_file = with_file.map(&mut numbered);
            if is_local {
                symbol.name = numbered(symbol.name);
            }
            if image.is_executable(at) {
                self.by_name.extend(with_file.map(|name| (name, at)));
                self.by_name.insert(symbol.name.clone(), at);
                self.symbols.push(symbol);
            }
        }
        self.symbols.sort_by_key(|s| (s.at, Reverse(s.is_function)));
    }
}

fn by_fde(start: LinkAddr) -> String {
    format!("{BY_FDE}{:x}", start.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{LEAF, WORK, program};

    #[test]
    fn symbols_of_the_table_go_before_names_made_of_addresses() {
        let p = program();
        let names = FunctionNames::of(&p.image, &p.functions);
        assert_eq!(names.of_function(LinkAddr(WORK)), ("work".into(), 0));
        assert_eq!(names.of_function(LinkAddr(LEAF + 1)), ("leaf".into(), 1));
        assert_eq!(names.of_function(LinkAddr(LEAF + 7)), ("__BOLT_FDE_FUNCat1027".into(), 0));
        assert_eq!(names.find("leaf"), Some(LinkAddr(LEAF)));
        assert_eq!(names.find("__BOLT_FDE_FUNCat1000"), Some(LinkAddr(WORK)));
        assert_eq!(names.find("main"), None);
    }

    #[test]
    fn a_damaged_symbol_table_gives_other_names_and_no_panic() {
        let p = program();
        let whole = p.image.file().to_vec();
        for at in 0x1032..whole.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                let Ok(image) = Image::parse(damaged, "tiny") else { continue };
                let names = FunctionNames::of(&image, &Functions::find(&image));
                assert!(!names.of_function(LinkAddr(WORK)).0.is_empty());
            }
        }
    }
}
