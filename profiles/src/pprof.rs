//! Writing a profile for `go tool pprof` and what else reads `profile.proto`, compressed with gzip.
//!
//! Addresses are link addresses. Modules that may be loaded anywhere would lie on top of each other, as all begin at zero: so
//! each gets a place of its own, and its mappings tell which one and which bytes of the file are there, as after loading.
//! The messages are those fields of google/pprof's `profile.proto` that are written here; their numbers are fixed for ever.

use crate::view::{Drawn, NamedModule, Seen, Unit, View};
use dyni_schema::LinkAddr;
use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;
use std::collections::HashMap;
use std::io::{self, Write};

/// The first bytes of a file of this format: those of gzip.
pub const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Where the first module is put that may be loaded anywhere, as Linux puts programs.
const FIRST_PLACE: u64 = 0x5555_0000_0000;
/// From one such place to the next, in bytes: a module spans less ([`dyni_schema::addr`]).
const PLACE: u64 = 1 << 32;
/// The page size of x86-64, bytes.
const PAGE: u64 = 4096;

#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "3")]
    mapping: Vec<Mapping>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
    #[prost(int64, repeated, tag = "13")]
    comment: Vec<i64>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct Mapping {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    memory_start: u64,
    #[prost(uint64, tag = "3")]
    memory_limit: u64,
    #[prost(uint64, tag = "4")]
    file_offset: u64,
    #[prost(int64, tag = "5")]
    filename: i64,
    #[prost(int64, tag = "6")]
    build_id: i64,
    #[prost(bool, tag = "7")]
    has_functions: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    mapping_id: u64,
    #[prost(uint64, tag = "3")]
    address: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
}

/// Strings, each once; the first is the empty one.
#[derive(Default)]
struct Strings {
    all: Vec<String>,
    index: HashMap<String, i64>,
}

impl Strings {
    fn index(&mut self, text: &str) -> i64 {
        if let Some(&known) = self.index.get(text) {
            return known;
        }
        let new = self.all.len() as i64;
        self.all.push(text.to_owned());
        self.index.insert(text.to_owned(), new);
        new
    }
}

/// Writes a profile; how much of it.
///
/// # Errors
/// What writing gave.
pub fn write(view: &View<'_>, to: impl Write) -> io::Result<Drawn> {
    let (profile, drawn) = message(view);
    // The same profile gives the same bytes: there is no time in the header.
    let mut gzip = GzEncoder::new(to, Compression::default());
    gzip.write_all(&profile.encode_to_vec())?;
    gzip.finish()?.flush()?;
    Ok(drawn)
}

fn message(view: &View<'_>) -> (Profile, Drawn) {
    let mut strings = Strings::default();
    strings.index("");
    let mut out = Profile::default();
    let mut drawn = Drawn::default();
    let mut kind = |kind: &str, unit: &str| ValueType { kind: strings.index(kind), unit: strings.index(unit) };
    out.sample_type.push(match view.unit() {
        Unit::Samples => kind("samples", "count"),
        Unit::Branches => kind("branches", "count"),
    });
    if let Some(period) = view.period_ns() {
        let cpu = kind("cpu", "nanoseconds");
        out.sample_type.push(cpu);
        (out.period_type, out.period) = (Some(cpu), signed(period));
    }
    let p = view.profile;
    out.time_nanos = signed(p.start_s.saturating_mul(1_000_000_000));
    out.duration_nanos = signed(p.duration_ns);
    for comment in [
        format!("{}: profile {} of dyni, taken by {}", p.program, view.id, p.method.name()),
        format!("not in it: {} in code of no file, {} in the kernel, {} lost", p.outside, p.kernel, p.lost),
    ] {
        out.comment.push(strings.index(&comment));
    }
    for (number, Seen { module, known, rows }) in view.seen().into_iter().enumerate() {
        let is_fixed = known.is_some_and(|k| k.is_fixed);
        let place = if is_fixed { 0 } else { FIRST_PLACE.wrapping_add(PLACE.wrapping_mul(number as u64)) };
        let first_mapping = out.mapping.len();
        for (start, limit, offset) in mappings(known, &rows) {
            let id = out.mapping.len() as u64 + 1;
            out.mapping.push(Mapping {
                id,
                memory_start: start.wrapping_add(place),
                memory_limit: limit.wrapping_add(place),
                file_offset: offset,
                filename: strings.index(&module.path),
                build_id: strings.index(&module.build_id.hex()),
                has_functions: known.is_some(),
            });
        }
        let mut ids: HashMap<usize, u64> = HashMap::new();
        for (at, count) in rows {
            let address = at.0.wrapping_add(place);
            let holds = |m: &&Mapping| (m.memory_start..m.memory_limit).contains(&address);
            let mapping_id = out.mapping[first_mapping..].iter().find(holds).map_or(0, |m| m.id);
            let found = known.and_then(|k| Some((&k.functions, k.function_at(at)?)));
            let line = found.map(|(functions, index)| {
                let function_id = *ids.entry(index).or_insert_with(|| {
                    let id = out.function.len() as u64 + 1;
                    let (name, system_name) =
                        (strings.index(&functions[index].name), strings.index(&functions[index].symbol));
                    out.function.push(Function { id, name, system_name });
                    id
                });
                Line { function_id }
            });
            if line.is_none() {
                drawn.unnamed = drawn.unnamed.saturating_add(count);
            }
            let id = out.location.len() as u64 + 1;
            out.location.push(Location { id, mapping_id, address, line: line.into_iter().collect() });
            let time = view.period_ns().map(|period| signed(count.saturating_mul(period)));
            out.sample.push(Sample { location_id: vec![id], value: [signed(count)].into_iter().chain(time).collect() });
            drawn.rows += 1;
        }
    }
    drawn.functions = out.function.len() as u64;
    out.string_table = strings.all;
    (out, drawn)
}

/// What of a module is mapped where: first address, the one behind the last, offset in the file. Of a module that is not at
/// hand, as much as what was seen needs.
fn mappings(known: Option<&NamedModule>, rows: &[(LinkAddr, u64)]) -> Vec<(u64, u64, u64)> {
    let (floor, ceil) = (|at: u64| at & !(PAGE - 1), |at: u64| at.saturating_add(PAGE - 1) & !(PAGE - 1));
    match known {
        Some(known) => {
            let text = known.text.iter();
            text.map(|t| (floor(t.address.0), ceil(t.address.0.saturating_add(t.size)), floor(t.offset.0))).collect()
        }
        None => {
            let ends = rows.first().zip(rows.last());
            ends.map(|(first, last)| (floor(first.0.0), ceil(last.0.0.saturating_add(1)), 0)).into_iter().collect()
        }
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{known, profile};
    use flate2::read::GzDecoder;
    use std::io::Read;

    fn decoded(view: &View<'_>) -> (Profile, Drawn) {
        let mut file = Vec::new();
        let drawn = write(view, &mut file).unwrap();
        assert_eq!(file[..2], MAGIC);
        let mut bytes = Vec::new();
        GzDecoder::new(&file[..]).read_to_end(&mut bytes).unwrap();
        (Profile::decode(&bytes[..]).unwrap(), drawn)
    }

    #[test]
    fn what_is_written_says_all_that_the_profile_says() {
        let profile = profile();
        let view = View { profile: &profile, id: "ab", modules: vec![known()] };
        let (p, drawn) = decoded(&view);
        let text = |i: i64| p.string_table[i as usize].as_str();
        assert_eq!(p.string_table[0], "");
        let types: Vec<_> = p.sample_type.iter().map(|t| (text(t.kind), text(t.unit))).collect();
        assert_eq!(types, [("samples", "count"), ("cpu", "nanoseconds")]);
        assert_eq!((p.period, p.duration_nanos, p.time_nanos), (1_000_000, 2_000_000_000, 1_700_000_000_000_000_000));
        assert_eq!(drawn, Drawn { functions: 1, rows: 5, unnamed: 15 });

        // pprof takes the first mapping for the program.
        let main = &p.mapping[0];
        assert_eq!((text(main.filename), text(main.build_id)), ("/opt/main", "02".repeat(20).as_str()));
        assert_eq!(
            (main.memory_start, main.memory_limit, main.file_offset),
            (FIRST_PLACE + 0x1000, FIRST_PLACE + 0x2000, 0)
        );
        let values: Vec<_> = p.sample.iter().map(|s| s.value.clone()).collect();
        assert_eq!(values[0], [70, 70_000_000]);
        assert_eq!(p.sample.iter().map(|s| s.value[0]).sum::<i64>(), 115);
        for (sample, location) in p.sample.iter().zip(&p.location) {
            assert_eq!(sample.location_id, [location.id]);
        }
        let first = &p.location[0];
        assert_eq!((first.address, first.mapping_id), (FIRST_PLACE + 0x1004, 1));
        let function = &p.function[first.line[0].function_id as usize - 1];
        assert_eq!((text(function.name), text(function.system_name)), ("work", "_work"));
        assert!(text(p.comment[1]).contains("3 in code of no file, 4 in the kernel"));
    }

    #[test]
    fn ids_and_strings_are_all_there_and_modules_lie_apart() {
        let profile = profile();
        let mut fixed = known();
        fixed.is_fixed = true;
        let (p, _) = decoded(&View { profile: &profile, id: "", modules: vec![fixed] });
        assert_eq!(p.location[0].address, 0x1004);
        for location in &p.location {
            assert!(location.mapping_id as usize <= p.mapping.len());
            assert!(location.line.iter().all(|l| l.function_id as usize <= p.function.len()));
        }
        assert!(p.mapping[0].memory_limit <= p.mapping[1].memory_start);
        assert!(p.function.iter().all(|f| (f.name as usize) < p.string_table.len()));
    }

    #[test]
    fn numbers_beyond_the_format_are_cut() {
        let mut profile = profile();
        profile.modules[1].samples.count[0] = u64::MAX;
        profile.start_s = u64::MAX;
        let (p, _) = decoded(&View { profile: &profile, id: "", modules: vec![known()] });
        assert_eq!(p.sample[0].value, [i64::MAX, i64::MAX]);
        assert_eq!(p.time_nanos, i64::MAX);
    }
}
