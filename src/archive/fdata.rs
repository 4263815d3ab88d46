//! Profiles for BOLT, and of BOLT's: between [`dyni_profiles::fdata`], which has names, and a binary, which has addresses.

use std::fs;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::UNIX_EPOCH;

use dyni_analyzer::bolt::{self, Edge, FunctionNames};
use dyni_profiles::Category;
use dyni_profiles::fdata::{BranchRow, Fdata, FdataError, Names, Place, Rows, UNKNOWN};
use dyni_schema::profile::MAX_STRING;
use dyni_schema::{Host, LinkAddr, Method, ModuleProfile, Profile, Samples};
use std::collections::BTreeMap;

use super::exchange::ImportArgs;
use super::foreign::Recording;
use super::formats::{Written, cant_write};
use crate::errors::Failure;
use crate::modules::Binary;
use crate::output::thousands;

/// What stands for the event behind samples of time. BOLT divides the samples of a block by its instructions if an event is
/// called so, as is right for any that come at even times, and else takes a slow instruction for one that runs often.
const EVENT: &str = "cycles";

/// Leaves the module in which most was seen, or the only one: fdata is of one binary.
///
/// # Errors
/// Nothing was seen, or several modules are asked for.
pub fn choose_module(profile: &mut Profile, asked: usize, what: &str) -> Result<(), Failure> {
    if asked > 1 {
        return Err(Failure::usage(what, "fdata is of one binary").help("give --build-id once"));
    }
    let sum = |counts: &[u64]| counts.iter().fold(0u64, |sum, &c| sum.saturating_add(c));
    let weight = |m: &ModuleProfile| sum(&m.samples.count).max(sum(&m.branches.count));
    let most = profile.modules.iter().max_by_key(|m| weight(m)).cloned();
    let most = most.ok_or_else(|| Failure::refused(what, "nothing was seen"))?;
    profile.modules = vec![most];
    Ok(())
}

/// Writes what a profile saw of its only module.
///
/// # Errors
/// The binary is not here, or writing fails.
pub fn write(profile: &Profile, binaries: &[Binary], to: &mut dyn Write, what: &str) -> Result<Written, Failure> {
    let (Some(seen), Some(binary)) = (profile.modules.first(), binaries.first()) else {
        let name = profile.modules.first().map_or("", |m| m.name.as_str());
        return Err(Failure::failed(what, format!("the binary {name} is not where it was recorded"))
            .help("name it with --binary: function names are looked up in it"));
    };
    let mut places =
        Places { binary, names: FunctionNames::of(&binary.image, &binary.functions), text: Names::default() };
    let edges = bolt::edges(&binary.module(), seen, profile.method);
    let mut written = Written::default();
    let mut functions: Vec<LinkAddr> = Vec::new();
    let mut seen_in = |at: LinkAddr| functions.extend(binary.functions.at(at).map(|f| f.start));
    let rows = if edges.is_empty() {
        let mut rows = Vec::new();
        for (at, count) in seen.samples.iter() {
            seen_in(at);
            match places.of(at) {
                Some(place) => rows.push((place, count)),
                None => written.left_out = written.left_out.saturating_add(count),
            }
        }
        Rows::Samples { events: vec![EVENT.to_owned()], rows }
    } else {
        let mut rows = Vec::new();
        for edge in &edges {
            edge.from.into_iter().chain(edge.to).for_each(&mut seen_in);
            let (from, to) = (edge.from.and_then(|at| places.of(at)), edge.to.and_then(|at| places.of(at)));
            if from.is_none() && to.is_none() {
                written.left_out = written.left_out.saturating_add(edge.count);
                continue;
            }
            let (from, to) = (from.unwrap_or_else(|| places.unknown()), to.unwrap_or_else(|| places.unknown()));
            rows.push(BranchRow { from, to, mispredicted: edge.mispredicted, count: edge.count });
        }
        Rows::Branches { bolted: false, rows }
    };
    functions.sort_unstable();
    functions.dedup();
    written.functions = functions.len() as u64;
    let data = Fdata { names: places.text.into_names(), rows, memory_rows: 0 };
    written.rows = data.len() as u64;
    if written.rows == 0 {
        return Err(Failure::refused(what, "nothing that was seen lies in a function"));
    }
    data.write(to).map_err(|e| cant_write(what, &e))?;
    Ok(written)
}

/// Addresses of a binary as BOLT spells them.
struct Places<'a> {
    binary: &'a Binary,
    names: FunctionNames,
    text: Names,
}

impl Places<'_> {
    /// An address in a function.
    fn of(&mut self, at: LinkAddr) -> Option<Place> {
        let function = self.binary.functions.at(at)?;
        let (name, distance) = self.names.of_function(function.start);
        Some(Place { name: self.text.index(&name), is_symbol: true, offset: distance + (at.0 - function.start.0) })
    }

    /// Anywhere else.
    fn unknown(&mut self) -> Place {
        Place { name: self.text.index(UNKNOWN), is_symbol: false, offset: 0 }
    }
}

/// Makes a profile of a file of BOLT's.
///
/// Nothing in such a file tells which build it is of, not even its name: to look for a binary in which some of the names
/// are found would give a profile of whatever is at hand. So the binary has to be named.
///
/// # Errors
/// The file is damaged, the binary is not named or can't be read, or not one name of the file is in it.
pub fn import(
    file: &Path,
    from: &mut dyn BufRead,
    args: &ImportArgs,
    what: &str,
) -> Result<(Profile, Recording), Failure> {
    let [path] = args.binary.as_slice() else {
        return Err(Failure::usage(what, "it is fdata of BOLT, which does not say of which binary it is")
            .help("name the binary with --binary; one at a time"));
    };
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let data = Fdata::read(from).map_err(|e| failure(what, &e))?;
    let binary = Binary::read(path, &name)?;
    let found = Found::new(&data, &binary);
    let mut module = ModuleProfile {
        build_id: binary.image.build_id().clone(),
        path: fs::canonicalize(path).unwrap_or_else(|_| path.clone()).to_string_lossy().into_owned(),
        name,
        ..ModuleProfile::default()
    };
    let mut recording = Recording {
        file: file.display().to_string(),
        format: "fdata",
        program: module.name.clone(),
        ..Recording::default()
    };
    let (mut elsewhere, mut unknown, mut used) = (0u64, 0u64, 0u64);
    let add = |sum: &mut u64, count: u64| *sum = sum.saturating_add(count);
    let method = match &data.rows {
        Rows::Samples { events, rows } => {
            let mut samples: BTreeMap<LinkAddr, u64> = BTreeMap::new();
            for (place, count) in rows.iter().filter(|r| r.1 > 0) {
                match found.at(place) {
                    At::Code(at) => {
                        add(&mut used, *count);
                        add(samples.entry(at).or_default(), *count);
                    }
                    At::Elsewhere => add(&mut elsewhere, *count),
                    At::Unknown => add(&mut unknown, *count),
                }
            }
            module.samples =
                Samples { addr: samples.keys().map(|at| at.0).collect(), count: samples.values().copied().collect() };
            if events.iter().any(|e| e.contains("clock")) { Method::Clock } else { Method::Cycles }
        }
        Rows::Branches { bolted, rows } => {
            let mut edges = Vec::new();
            for row in rows.iter().filter(|r| r.count > 0) {
                let (from, to) = match (found.at(&row.from), found.at(&row.to)) {
                    (At::Unknown, _) | (_, At::Unknown) => {
                        add(&mut unknown, row.count);
                        continue;
                    }
                    (At::Elsewhere, At::Elsewhere) => {
                        add(&mut elsewhere, row.count);
                        continue;
                    }
                    (from, to) => (from.code(), to.code()),
                };
                add(&mut used, row.count);
                edges.push(Edge { from, to, count: row.count, mispredicted: row.mispredicted });
            }
            let evidence = bolt::evidence(&binary.module(), &edges, *bolted);
            (module.branches, module.ranges) = (evidence.branches, evidence.ranges);
            Method::Lbr
        }
    };
    if used == 0 {
        let names = thousands(data.names.len() as u64);
        return Err(Failure::refused(
            what,
            format!("not one of its {names} names leads to code of {}", path.display()),
        )
        .help("name the very binary that was profiled"));
    }
    recording.used = used;
    recording.method = method.name();
    recording.leave_out(unknown, found.missing(&data));
    recording.leave_out(elsewhere, "in what is not in the binary");
    recording.leave_out(data.memory_rows, "of memory accesses, which say nothing of layout");
    let mut profile = Profile {
        program: module.name.clone(),
        label: args.label.clone(),
        method,
        method_note: "imported from fdata of BOLT".to_owned(),
        host: Host::default(),
        start_s: modified(file),
        duration_ns: 0,
        frequency_hz: 0,
        processes: 0,
        threads: 0,
        samples: module.samples.total(),
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![module],
    };
    if profile.label.len() > MAX_STRING {
        return Err(Failure::usage(what, "the label is too long"));
    }
    dyni_analyzer::plan::annotate(&mut profile, &[binary.module()]);
    recording.functions = profile.modules[0].functions.start.len() as u64;
    Ok((profile, recording))
}

/// When the file was written, which is as much as is known of when it was recorded; seconds since 1970, 0 if of a pipe.
pub fn modified(file: &Path) -> u64 {
    let modified = fs::metadata(file).and_then(|m| m.modified()).ok();
    modified.and_then(|m| m.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs())
}

/// What a place is.
enum At {
    /// It is in a function.
    Code(LinkAddr),
    /// The file says that it is not in the binary.
    Elsewhere,
    /// The file says that it is, and it is not.
    Unknown,
}

impl At {
    const fn code(self) -> Option<LinkAddr> {
        match self {
            Self::Code(at) => Some(at),
            Self::Elsewhere | Self::Unknown => None,
        }
    }
}

/// Where the names of a file are in a binary.
struct Found<'a> {
    binary: &'a Binary,
    starts: Vec<Option<LinkAddr>>,
}

impl<'a> Found<'a> {
    fn new(data: &Fdata, binary: &'a Binary) -> Self {
        let names = FunctionNames::of(&binary.image, &binary.functions);
        Self { binary, starts: data.names.iter().map(|name| names.find(name)).collect() }
    }

    fn at(&self, place: &Place) -> At {
        if !place.is_symbol {
            return At::Elsewhere;
        }
        let start = self.starts.get(place.name as usize).copied().flatten();
        let at = start.and_then(|start| start.0.checked_add(place.offset)).map(LinkAddr);
        at.filter(|&at| self.binary.functions.at(at).is_some()).map_or(At::Unknown, At::Code)
    }

    /// Why what is unknown is so, with some of the names.
    fn missing(&self, data: &Fdata) -> String {
        const SHOWN: usize = 3;
        let absent: Vec<&str> = data
            .names
            .iter()
            .zip(&self.starts)
            .filter(|(name, start)| start.is_none() && *name != UNKNOWN)
            .map(|(name, _)| name.as_str())
            .collect();
        if absent.is_empty() {
            return "at places that lie outside their functions".to_owned();
        }
        let shown: Vec<String> = absent.iter().take(SHOWN).map(|n| n.chars().take(60).collect()).collect();
        let more = if absent.len() > SHOWN { ", …" } else { "" };
        format!(
            "at names that the binary does not have: {} of {} ({}{more})",
            absent.len(),
            data.names.len(),
            shown.join(", ")
        )
    }
}

fn failure(what: &str, e: &FdataError) -> Failure {
    match e.category() {
        Category::Failed => Failure::failed(what, e),
        Category::Usage => Failure::usage(what, e),
        Category::Refused => Failure::refused(what, e),
    }
    .help(e.help())
}
