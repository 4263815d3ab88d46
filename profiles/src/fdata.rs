//! BOLT's text format of profiles, *fdata*: how it is read and written. What its names mean is for whoever has the binary.
//!
//! A file with branches has a line for each pair of places between which execution went, fall-throughs into another block
//! included:
//!
//! ```text
//! 1 main 3fb 1 main 410 2 1001
//! 0 [unknown] 0 1 main 0 0 17
//! ```
//!
//! Each place is a kind (1 or 2: a symbol; 0: anything else), a name and an offset from it (hexadecimal); then follow, in
//! decimal, how many were mispredicted and how many there were. A first line `boltedcollection` says that BOLT's own output
//! was profiled: then the source may be any instruction of its block. A first line `no_lbr` with the names of the events says
//! that there are no branches but samples, a place and a number each. Lines that begin with 3, 4 or 5 tell of memory accesses.
//! In names a backslash stands before a space and before a backslash. (BOLT: `DataReader.cpp`, `DataAggregator.cpp`.)
//!
//! **Untrusted.** What is read is bounded by [`MAX_BYTES`], [`MAX_LINE`] and [`MAX_ROWS`]; a line of another form is an error
//! that names it. BOLT stops at such a line and goes on with what it has: half a profile is no profile here.

use crate::error::Category;
use dyni_schema::profile::MAX_ROWS;
use std::collections::HashMap;
use std::io::{self, BufRead, Read, Write};

/// The longest file that is read, in bytes.
pub const MAX_BYTES: u64 = 1 << 30;

/// The longest line that is read, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// What stands for a place of which nothing is known.
pub const UNKNOWN: &str = "[unknown]";

const NO_LBR: &str = "no_lbr";
const BOLTED: &str = "boltedcollection";

/// A place in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Whose name it is, an index into [`Fdata::names`].
    pub name: u32,
    /// Whether that is a symbol of the binary; anything else (another module, [`UNKNOWN`]) can't be looked up in it.
    pub is_symbol: bool,
    /// Distance from the symbol's first byte, in bytes.
    pub offset: u64,
}

/// How often execution went from one place to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BranchRow {
    /// The last instruction before.
    pub from: Place,
    /// The first instruction after.
    pub to: Place,
    /// How often the processor had predicted it wrongly.
    pub mispredicted: u64,
    /// How often.
    pub count: u64,
}

/// What a file tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Where execution went.
    Branches {
        /// It ran BOLT's output: sources are exact to the block only.
        bolted: bool,
        /// In the file's order.
        rows: Vec<BranchRow>,
    },
    /// Where execution was.
    Samples {
        /// The names of the events, as the file spells them.
        events: Vec<String>,
        /// The place and how many samples hit it, in the file's order.
        rows: Vec<(Place, u64)>,
    },
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fdata {
    /// Names as the binary spells them, each once.
    pub names: Vec<String>,
    /// What it tells.
    pub rows: Rows,
    /// How many lines of memory accesses it has, which nothing here is made of.
    pub memory_rows: u64,
}

/// Why a file can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FdataError {
    /// The file gave an error.
    #[error("it could not be read: {0}")]
    Read(String),
    /// A line is not of the format.
    #[error("it is damaged or no fdata: line {line}: {what}")]
    Line {
        /// Which one, counted from 1.
        line: u64,
        /// What does not fit.
        what: &'static str,
    },
    /// There is not one row in it.
    #[error("it holds no branch and no sample")]
    Empty,
    /// It is beyond what is read.
    #[error("it holds more than {0}")]
    TooLarge(&'static str),
}

impl FdataError {
    /// What the reader can do about it.
    #[must_use]
    pub const fn help(&self) -> &'static str {
        match self {
            Self::Read(_) => "check the path and its permissions",
            Self::Line { .. } => "write it again, with perf2bolt or `dyni archive export --format fdata`",
            Self::Empty => "record for longer, or while the program has work to do",
            Self::TooLarge(_) => "record for a shorter time",
        }
    }

    /// Which exit status it deserves.
    #[must_use]
    pub const fn category(&self) -> Category {
        match self {
            Self::TooLarge(_) => Category::Refused,
            _ => Category::Failed,
        }
    }
}

/// Collects names, each once.
#[derive(Debug, Default)]
pub struct Names {
    all: Vec<String>,
    index: HashMap<String, u32>,
}

impl Names {
    /// The index of a name, which is kept if it is new.
    pub fn index(&mut self, name: &str) -> u32 {
        if let Some(&known) = self.index.get(name) {
            return known;
        }
        let new = self.all.len() as u32;
        self.all.push(name.to_owned());
        self.index.insert(name.to_owned(), new);
        new
    }

    /// All of them, by index.
    #[must_use]
    pub fn into_names(self) -> Vec<String> {
        self.all
    }
}

impl Fdata {
    /// Whether a file that begins so is meant to be one: no other format that can be imported begins like that.
    #[must_use]
    pub fn looks_like(begins: &[u8]) -> bool {
        let word = begins.split(|b| b.is_ascii_whitespace()).next().unwrap_or_default();
        [NO_LBR.as_bytes(), BOLTED.as_bytes()].contains(&word) || matches!(begins, [b'0'..=b'5', b' ', ..])
    }

    /// How many branches, or samples, it tells of.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.rows {
            Rows::Branches { rows, .. } => rows.len(),
            Rows::Samples { rows, .. } => rows.len(),
        }
    }

    /// Whether it tells of none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads a file to its end.
    ///
    /// # Errors
    /// A [`FdataError`]: the first line that is not of the format, or what reading gave.
    pub fn read(from: impl BufRead) -> Result<Self, FdataError> {
        let mut from = from.take(MAX_BYTES + 1);
        let mut names = Names::default();
        let (mut branches, mut samples) = (Vec::new(), Vec::new());
        let mut events = None;
        let (mut bolted, mut memory_rows, mut number, mut bytes) = (false, 0, 0, 0);
        let mut line = Vec::new();
        loop {
            line.clear();
            // A file without line feeds must not become one line in memory.
            let read = (&mut from).take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line);
            bytes += read.map_err(|e| FdataError::Read(e.to_string()))? as u64;
            number += 1;
            let wrong = |what| FdataError::Line { line: number, what };
            if line.is_empty() {
                break;
            }
            if bytes > MAX_BYTES {
                return Err(FdataError::TooLarge("1 GiB"));
            }
            if line.len() > MAX_LINE {
                return Err(wrong("it is longer than any name"));
            }
            // A file that is cut off must not lose the last digits of its last count.
            let text = line.strip_suffix(b"\n").ok_or_else(|| wrong("it has no end"))?;
            let text = std::str::from_utf8(text).map_err(|_| wrong("it is not text"))?;
            let mut fields = Fields(text);
            let first = fields.next().ok_or_else(|| wrong("it is empty"))?;
            let nothing_yet = branches.is_empty() && samples.is_empty();
            match (first.as_str(), nothing_yet) {
                (NO_LBR, true) if number == 1 => events = Some(fields.collect()),
                (BOLTED, true) => bolted = true,
                ("0" | "1" | "2", _) => {
                    let from = fields.place(&first, &mut names).map_err(wrong)?;
                    if events.is_some() {
                        let count = fields.number().map_err(wrong)?;
                        samples.push((from, count));
                    } else {
                        let kind = fields.next().ok_or_else(|| wrong("it has no destination"))?;
                        let to = fields.place(&kind, &mut names).map_err(wrong)?;
                        let (mispredicted, count) = (fields.number().map_err(wrong)?, fields.number().map_err(wrong)?);
                        branches.push(BranchRow { from, to, mispredicted, count });
                    }
                    fields.end().map_err(wrong)?;
                    if branches.len().max(samples.len()).max(names.all.len()) > MAX_ROWS {
                        return Err(FdataError::TooLarge("16 million rows"));
                    }
                }
                ("3" | "4" | "5", _) => memory_rows += 1,
                _ => return Err(wrong("it begins with none of 0 to 5")),
            }
        }
        if branches.is_empty() && samples.is_empty() {
            return Err(FdataError::Empty);
        }
        let rows = match events {
            Some(events) => Rows::Samples { events, rows: samples },
            None => Rows::Branches { bolted, rows: branches },
        };
        Ok(Self { names: names.into_names(), rows, memory_rows })
    }

    /// Writes the file. Every place's name must be one of [`Fdata::names`].
    ///
    /// # Errors
    /// What writing gave.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let place = |p: &Place| {
            let name = self.names.get(p.name as usize).map_or(UNKNOWN, String::as_str);
            format!("{} {} {:x}", u8::from(p.is_symbol), escaped(name), p.offset)
        };
        match &self.rows {
            Rows::Branches { bolted, rows } => {
                if *bolted {
                    writeln!(to, "{BOLTED}")?;
                }
                for r in rows {
                    writeln!(to, "{} {} {} {}", place(&r.from), place(&r.to), r.mispredicted, r.count)?;
                }
            }
            Rows::Samples { events, rows } => {
                let events = events.iter().map(|e| format!(" {}", escaped(e))).collect::<String>();
                writeln!(to, "{NO_LBR}{events}")?;
                for (at, count) in rows {
                    writeln!(to, "{} {count}", place(at))?;
                }
            }
        }
        to.flush()
    }
}

fn escaped(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for c in name.chars() {
        if matches!(c, ' ' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

/// What is left of a line: fields with spaces between, unescaped.
struct Fields<'a>(&'a str);

impl Iterator for Fields<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let rest = self.0.trim_start_matches(' ');
        let mut field = String::new();
        let mut escape = false;
        let mut end = rest.len();
        for (at, c) in rest.char_indices() {
            match c {
                ' ' if !escape => {
                    end = at;
                    break;
                }
                '\\' if !escape => escape = true,
                c => {
                    escape = false;
                    field.push(c);
                }
            }
        }
        self.0 = &rest[end..];
        (!field.is_empty()).then_some(field)
    }
}

impl Fields<'_> {
    fn place(&mut self, kind: &str, names: &mut Names) -> Result<Place, &'static str> {
        let is_symbol = match kind {
            "0" => false,
            "1" | "2" => true,
            _ => return Err("it has a place of an unknown kind"),
        };
        let name = self.next().ok_or("it has a place without a name")?;
        let offset = self.next().ok_or("it has a place without an offset")?;
        // The standard library would take a sign, too.
        let digits = offset.bytes().all(|b| b.is_ascii_hexdigit());
        let offset = u64::from_str_radix(&offset, 16).ok().filter(|_| digits);
        Ok(Place {
            name: names.index(&name),
            is_symbol,
            offset: offset.ok_or("it has an offset that is not hexadecimal")?,
        })
    }

    fn number(&mut self) -> Result<u64, &'static str> {
        let field = self.next().ok_or("it has a count too few")?;
        // BOLT's counts are signed: what it can't hold, it can't have written.
        field.parse::<i64>().ok().and_then(|n| u64::try_from(n).ok()).ok_or("it has a count that is none")
    }

    fn end(&mut self) -> Result<(), &'static str> {
        if self.next().is_some() { Err("it goes on after its end") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BRANCHES: &str = "1 main 3fb 1 main 410 2 1001\n0 [unknown] 0 1 a\\ b\\\\c/1 0 0 17\n4 main 10 3 x 0 1\n";

    fn read(text: &str) -> Result<Fdata, FdataError> {
        Fdata::read(text.as_bytes())
    }

    fn line_of(text: &str) -> u64 {
        match read(text) {
            Err(FdataError::Line { line, .. }) => line,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn branches_there_and_back() {
        let data = read(BRANCHES).unwrap();
        assert_eq!(data.names, ["main", UNKNOWN, "a b\\c/1"]);
        assert_eq!(data.memory_rows, 1);
        let Rows::Branches { bolted: false, rows } = &data.rows else { panic!("{data:?}") };
        assert_eq!(rows[0].from, Place { name: 0, is_symbol: true, offset: 0x3fb });
        assert_eq!((rows[0].mispredicted, rows[0].count), (2, 1001));
        assert!(!rows[1].from.is_symbol);
        let mut out = Vec::new();
        data.write(&mut out).unwrap();
        let lines: Vec<_> = BRANCHES.lines().take(2).collect();
        assert_eq!(String::from_utf8(out).unwrap().lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn headers_of_both_kinds() {
        let text = "no_lbr cycles:u instructions\n1 main 0 5\n2 f 1f 7\n";
        let data = read(text).unwrap();
        let Rows::Samples { events, rows } = &data.rows else { panic!("{data:?}") };
        assert_eq!(events, &["cycles:u", "instructions"]);
        assert_eq!(rows[1], (Place { name: 1, is_symbol: true, offset: 0x1f }, 7));
        let bolted = read("boltedcollection\n1 f 0 1 f 8 0 1\n").unwrap();
        assert!(matches!(bolted.rows, Rows::Branches { bolted: true, .. }));
        let mut out = Vec::new();
        bolted.write(&mut out).unwrap();
        assert_eq!(Fdata::read(&out[..]).unwrap(), bolted);
    }

    #[test]
    fn what_it_is_shows_in_its_first_bytes() {
        for text in [BRANCHES, "no_lbr\n", "no_lbr cycles\n", "boltedcollection\n1 f", "0 [unknown] 0"] {
            assert!(Fdata::looks_like(text.as_bytes()), "{text}");
        }
        for bytes in [&b"PERFILE2"[..], b"---\nheader:", b"\x89dynb\r\n", b"", b"1", b"no_lbrs\n"] {
            assert!(!Fdata::looks_like(bytes), "{bytes:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_its_line() {
        assert_eq!(line_of("1 f 0 1 f 8 0 1\n1 f 0 1 f 8 0\n"), 2);
        assert_eq!(line_of("1 f 0 1 f 8 0 1\n1 f 0 1 f 8 0 1"), 2, "cut off");
        assert_eq!(line_of("1 f 0 1 f 8 0 -1\n"), 1);
        assert_eq!(line_of("1 f 0 1 f +8 0 1\n"), 1);
        assert_eq!(line_of("1 f 0 9 f 8 0 1\n"), 1);
        assert_eq!(line_of("1 f 0 1 f 8 0 1 1\n"), 1);
        assert_eq!(line_of("1 f 0 1 f 10000000000000000 0 1\n"), 1);
        assert_eq!(line_of("\n"), 1);
        assert_eq!(line_of("1 f 0 1 f 8 0 1\nno_lbr\n"), 2);
        assert_eq!(line_of(&"x".repeat(2 * MAX_LINE)), 1);
        assert_eq!(read(""), Err(FdataError::Empty));
        assert_eq!(read("no_lbr cycles\n"), Err(FdataError::Empty));
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_another_profile_and_never_a_panic(at in 0usize..72, byte: u8, cut in 0usize..80) {
            let mut bytes = BRANCHES.as_bytes().to_vec();
            let at = at.min(bytes.len() - 1);
            bytes[at] = byte;
            bytes.truncate(cut.max(1));
            if let Ok(data) = Fdata::read(&bytes[..]) {
                let mut out = Vec::new();
                data.write(&mut out).unwrap();
                let again = Fdata::read(&out[..]).unwrap();
                prop_assert_eq!(again.rows, data.rows);
            }
        }

        #[test]
        fn any_name_survives(name in "[^\n]{1,40}", offset: u64) {
            let mut names = Names::default();
            let at = Place { name: names.index(&name), is_symbol: true, offset };
            let data = Fdata { names: names.into_names(), rows: Rows::Samples { events: vec![], rows: vec![(at, 3)] }, memory_rows: 0 };
            let mut out = Vec::new();
            data.write(&mut out).unwrap();
            prop_assert_eq!(Fdata::read(&out[..]).unwrap(), data);
        }
    }
}
