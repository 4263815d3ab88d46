//! From what `perf record` has written to the profile of one program.
//!
//! perf may have looked at one process or at all of the system. A profile is of one program: the processes that run the same
//! executable. Which one a process runs is the first file that it mapped executable, since its birth or its last `execve`.
//!
//! The file says where modules lay, and which builds they were; from a byte of a file to its link address leads only the file
//! itself. It is looked for at the path that is recorded, which is anybody's word: nothing but a plain ELF file is opened, and
//! it is used only if it is the recorded build. What can't be used is counted, with the reason.

use crate::branch;
use crate::elf::{self, ElfFacts};
use crate::maps::AddressMap;
use crate::perf_data::{PerfData, PerfDataError, PerfEvent, PerfRecord};
use crate::records::{Branch, is_user};
use crate::tables::{Place, Tables};
use dyni_schema::{BuildId, FileOffset, Host, Method, ModuleProfile, Profile, RunAddr};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most files that are looked into.
const MAX_FILES: usize = 1 << 14;

/// What to make of a recording.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImportOptions<'a> {
    /// The program's name; by default the one with the most samples.
    pub program: Option<&'a str>,
    /// Files that no longer lie where they were, or never did on this host.
    pub binaries: &'a [PathBuf],
}

/// Samples that the profile is not made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Samples in modules of the program whose files can't be used: name and reason, and how many.
    pub modules: BTreeMap<(String, String), u64>,
    /// Samples of other programs, by name.
    pub programs: BTreeMap<String, u64>,
    /// Samples of processes of which nothing tells what they ran, the idle one among them.
    pub unknown: u64,
    /// Samples of other events than the first.
    pub events: u64,
    /// Modules that are used though nothing says that their files are still those of then.
    pub unproven: Vec<String>,
}

/// A mapped file.
struct Mapped {
    name: String,
    path: String,
    /// What is known of the file, or why it can't be used.
    facts: Result<Arc<ElfFacts>, String>,
    /// The first file of the same build, which may be mapped under several paths: that one's tables are filled.
    first: u32,
    unproven: bool,
}

#[derive(Clone, Default)]
struct Process {
    map: AddressMap,
    /// The name of its program.
    program: Option<String>,
}

/// What was seen of one program.
#[derive(Default)]
struct Program {
    tables: Tables,
    samples: u64,
    outside: u64,
    kernel: u64,
    branches: u64,
    /// By file.
    unusable: HashMap<u32, u64>,
    processes: HashSet<i32>,
    threads: HashSet<i32>,
}

struct Import<'a> {
    binaries: Vec<(PathBuf, ElfFacts)>,
    build_ids: HashMap<&'a [u8], &'a BuildId>,
    files: Vec<Mapped>,
    known: HashMap<(Vec<u8>, Option<BuildId>), u32>,
    processes: HashMap<i32, Process>,
    programs: BTreeMap<String, Program>,
    unknown: u64,
}

/// Makes the profile of a program, and tells what is not in it. Label and start are for whoever knows them.
///
/// # Errors
/// The file is damaged, its samples do not tell where time goes, or none is of the program.
pub fn import(data: &PerfData<'_>, options: &ImportOptions<'_>) -> Result<(Profile, LeftOut), PerfDataError> {
    // An event without samples of its own is there for the sake of mappings.
    let is_dummy = |e: &PerfEvent| e.kind == SOFTWARE && (e.config == 9 || e.config == 10);
    let event = data.events.iter().position(|e| !is_dummy(e)).ok_or(PerfDataError::Lacks("anything"))?;
    let method = method(&data.events[event])?;
    let facts = |path: &PathBuf| Some((path.clone(), elf::facts(&File::open(path).ok()?).ok()?));
    let mut import = Import {
        binaries: options.binaries.iter().filter_map(facts).collect(),
        build_ids: data.build_ids.iter().map(|(path, id)| (*path, id)).collect(),
        files: Vec::new(),
        known: HashMap::new(),
        processes: HashMap::new(),
        programs: BTreeMap::new(),
        unknown: 0,
    };
    let mut left_out = LeftOut::default();
    let mut lost = 0u64;
    for record in data.records() {
        match record? {
            PerfRecord::Sample { event: of, .. } if of != event => left_out.events += 1,
            PerfRecord::Sample { pid, tid, ip, mode, stack, .. } => import.sample(pid, tid, ip, mode, &stack),
            PerfRecord::Mapped { pid, range, offset, path, build_id } => {
                import.map(pid, range, offset, path, build_id)?;
            }
            PerfRecord::Exec { pid } => drop(import.processes.insert(pid, Process::default())),
            PerfRecord::Fork { pid, parent, inherits } if pid != parent => {
                let of_parent = import.processes.get(&parent).filter(|_| inherits).cloned();
                import.processes.insert(pid, of_parent.unwrap_or_default());
            }
            PerfRecord::Fork { .. } => {}
            PerfRecord::Lost(count) => lost = lost.saturating_add(count),
        }
    }
    let Import { files, mut programs, unknown, .. } = import;
    left_out.unknown = unknown;
    let most = programs.iter().max_by_key(|(_, p)| p.samples).map(|(name, _)| name.clone());
    let name = options.program.map(str::to_owned).or(most).unwrap_or_default();
    let wanted = || if name.is_empty() { "any program".to_owned() } else { name.clone() };
    let program = programs.remove(&name).filter(|p| p.samples + p.outside > 0);
    let program = program.ok_or_else(|| PerfDataError::NoSamples(wanted()))?;
    left_out.programs = programs.into_iter().map(|(n, p)| (n, p.samples + p.outside)).filter(|p| p.1 > 0).collect();
    let unusable: u64 = program.unusable.values().sum();
    for (&file, &count) in &program.unusable {
        let Mapped { name, facts, .. } = &files[file as usize];
        let reason = facts.as_ref().err().cloned().unwrap_or_default();
        *left_out.modules.entry((name.clone(), reason)).or_default() += count;
    }
    let module = |f: &Mapped| ModuleProfile {
        build_id: f.facts.as_ref().map(|f| f.build_id.clone()).unwrap_or_default(),
        name: f.name.clone(),
        path: f.path.clone(),
        ..ModuleProfile::default()
    };
    let modules = program.tables.into_modules(files.iter().map(module).collect());
    if modules.is_empty() {
        let reasons = left_out.modules.keys().map(|(name, reason)| format!("{name} ({reason})"));
        let reasons = reasons.take(3).collect::<Vec<_>>().join(", ");
        let which =
            if reasons.is_empty() { wanted() } else { format!("{}, of which there is no file: {reasons}", wanted()) };
        return Err(PerfDataError::NoSamples(which));
    }
    let used = |f: &&Mapped| f.unproven && modules.iter().any(|m| m.path == f.path);
    left_out.unproven = files.iter().filter(used).map(|f| f.name.clone()).collect();
    let profile = Profile {
        program: name,
        label: String::new(),
        method: if program.branches > 0 { Method::Lbr } else { method },
        method_note: "imported from a recording of perf".to_owned(),
        host: Host { cpu: data.cpu.clone(), kernel: data.kernel.clone() },
        start_s: 0,
        duration_ns: data.span_ns(),
        frequency_hz: frequency(&data.events[event]),
        processes: u32::try_from(program.processes.len()).unwrap_or(u32::MAX),
        threads: u32::try_from(program.threads.len()).unwrap_or(u32::MAX),
        samples: program.samples - unusable,
        outside: program.outside,
        kernel: program.kernel,
        in_cache: 0,
        lost,
        modules,
    };
    Ok((profile, left_out))
}

const HARDWARE: u32 = 0;
const SOFTWARE: u32 = 1;
const RAW: u32 = 4;
/// From here on types of processors' own units, by number.
const DYNAMIC: u32 = 6;

/// What samples of an event are worth.
fn method(event: &PerfEvent) -> Result<Method, PerfDataError> {
    if !event.has_addresses() {
        return Err(PerfDataError::Lacks("where the program was"));
    }
    match (event.kind, event.config & 0xffff_ffff) {
        // cycles, instructions, reference cycles
        (HARDWARE, 0 | 1 | 9) | (RAW | DYNAMIC.., _) => Ok(Method::Cycles),
        // cpu-clock, task-clock
        (SOFTWARE, 0 | 1) => Ok(Method::Clock),
        // Branch stacks tell where execution went, whatever they were taken at.
        _ if event.has_stacks() => Ok(Method::Lbr),
        (kind, config) => Err(PerfDataError::NotTime(format!("type {kind}, number {config}"))),
    }
}

/// Samples a second, if that is known.
fn frequency(event: &PerfEvent) -> u64 {
    match (event.is_frequency, event.kind) {
        (true, _) => event.period,
        // A clock's period is in nanoseconds.
        (false, SOFTWARE) => 1_000_000_000u64.checked_div(event.period).unwrap_or(0),
        _ => 0,
    }
}

impl Import<'_> {
    fn sample(&mut self, pid: i32, tid: i32, ip: RunAddr, mode: u16, stack: &[Branch]) {
        let process = self.processes.get(&pid);
        let Some((process, name)) = process.and_then(|p| Some((p, p.program.as_ref()?))) else {
            self.unknown += 1;
            return;
        };
        let program = self.programs.entry(name.clone()).or_default();
        program.processes.insert(pid);
        program.threads.insert(tid);
        // 0 is "unknown": told apart by the address.
        if !matches!(mode, 0 | 2) || !is_user(ip) {
            program.kernel += u64::from(mode < 3);
            return;
        }
        let files = &self.files;
        let place = |at: RunAddr| -> Result<Place, Option<u32>> {
            let (file, link) = process.map.lookup(at).ok_or(None)?;
            let file = file as u32;
            let mapped = &files[file as usize];
            if mapped.facts.is_ok() { Ok((mapped.first, link)) } else { Err(Some(file)) }
        };
        match place(ip) {
            Ok(place) => {
                program.samples += 1;
                program.tables.sample(place);
            }
            Err(Some(file)) => {
                program.samples += 1;
                *program.unusable.entry(file).or_default() += 1;
            }
            Err(None) => program.outside += 1,
        }
        branch::proofs(stack, |proof| {
            let (a, b) = proof.ends();
            if let (Ok(a), Ok(b)) = (place(a), place(b)) {
                program.branches += u64::from(program.tables.proof(proof, a, b));
            }
        });
    }

    fn map(
        &mut self,
        pid: i32,
        range: Range<RunAddr>,
        offset: FileOffset,
        path: &[u8],
        build_id: Option<BuildId>,
    ) -> Result<(), PerfDataError> {
        // Memory without a file has names of perf's own or of the kernel's; the kernel's own modules have no process.
        let is_file = pid >= 0
            && path.starts_with(b"/")
            && ![&b"//"[..], b"/memfd:", b"/dev/zero", b"/SYSV"].iter().any(|p| path.starts_with(p));
        if !is_file {
            self.processes.entry(pid).or_default().map.remove(range);
            return Ok(());
        }
        let file = self.file(path, build_id)?;
        let process = self.processes.entry(pid).or_default();
        let Mapped { name, facts, .. } = &self.files[file as usize];
        process.program.get_or_insert_with(|| name.clone());
        // Of a file that can't be used nothing but that it lies there is known.
        let bias = facts.as_ref().map_or(Some(0), |f| f.bias(range.start.0, offset.0, true));
        match bias {
            Some(bias) => process.map.insert(range, bias, file as usize),
            None => process.map.remove(range),
        }
        Ok(())
    }

    fn file(&mut self, path: &[u8], build_id: Option<BuildId>) -> Result<u32, PerfDataError> {
        let build_id = build_id.or_else(|| self.build_ids.get(path).map(|&id| id.clone()));
        let key = (path.to_vec(), build_id);
        if let Some(&known) = self.known.get(&key) {
            return Ok(known);
        }
        if self.files.len() >= MAX_FILES {
            return Err(PerfDataError::TooLarge("16,384 mapped files"));
        }
        let text = crate::attribution::bounded(&String::from_utf8_lossy(path));
        let bare = text.strip_suffix(" (deleted)").unwrap_or(&text);
        let name = bare.rsplit('/').next().unwrap_or(bare).to_owned();
        let (found_at, facts) = self.look(Path::new(bare), &name, key.1.as_ref());
        let found_at = found_at.map_or_else(|| bare.to_owned(), |p| p.to_string_lossy().into_owned());
        let index = self.files.len() as u32;
        let same = |f: &Mapped| matches!((&f.facts, &facts), (Ok(a), Ok(b)) if a.build_id == b.build_id);
        let first = self.files.iter().position(same).map_or(index, |i| i as u32);
        let file = Mapped { name, path: found_at, first, unproven: key.1.is_none() && facts.is_ok(), facts };
        self.files.push(file);
        self.known.insert(key, index);
        Ok(index)
    }

    /// Looks for a file: among those that were named, then where it was recorded. The first if it is elsewhere.
    fn look(
        &self,
        path: &Path,
        name: &str,
        build_id: Option<&BuildId>,
    ) -> (Option<PathBuf>, Result<Arc<ElfFacts>, String>) {
        let fits = |(path, facts): &&(PathBuf, ElfFacts)| match build_id {
            Some(id) => *id == facts.build_id,
            None => path.file_name().is_some_and(|n| n.to_string_lossy() == name),
        };
        if let Some((path, facts)) = self.binaries.iter().find(fits) {
            let path = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            return (Some(path), Ok(Arc::new(facts.clone())));
        }
        // Opening a FIFO or a device that took the file's name could block or act: look before.
        let facts = match fs::metadata(path) {
            Ok(found) if found.is_file() => {
                let facts = File::open(path).map_err(|e| e.to_string());
                facts.and_then(|file| elf::facts(&file).map_err(|e| e.to_string()))
            }
            Ok(_) => Err("it is no plain file".to_owned()),
            Err(_) => Err("its file is not here".to_owned()),
        };
        let facts = match (facts, build_id) {
            (Ok(facts), Some(id)) if facts.build_id != *id => Err("its file is another build now".to_owned()),
            (Ok(facts), _) => Ok(Arc::new(facts)),
            (Err(e), _) => Err(e),
        };
        (None, facts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf_data::tests::{STACKED, attr, file, forked, mapped, noted, stacked};

    /// This test's own executable as a module of process 7, and where its first executable segment was mapped.
    struct Own {
        path: String,
        facts: ElfFacts,
        text: elf::Segment,
    }

    const START: u64 = 0x5555_0000_0000;

    impl Own {
        fn new() -> Self {
            let path = std::env::current_exe().unwrap();
            let facts = elf::facts(&File::open(&path).unwrap()).unwrap();
            let text = *facts.segments.iter().find(|s| s.executable).unwrap();
            Self { path: path.to_string_lossy().into_owned(), facts, text }
        }

        fn map(&self, build_id: &[u8]) -> Vec<u8> {
            mapped(1, START, 0x10_0000, self.text.offset & !0xfff, &self.path, build_id)
        }

        /// The link address of what ran so many bytes behind the start of the mapping.
        fn link(&self, at: u64) -> u64 {
            (self.text.vaddr & !0xfff) + at
        }
    }

    /// The same sample of another process.
    fn of_process(mut sample: Vec<u8>, pid: u32) -> Vec<u8> {
        sample[16..20].copy_from_slice(&pid.to_le_bytes());
        sample
    }

    fn read(bytes: &[u8], options: &ImportOptions<'_>) -> Result<(Profile, LeftOut), PerfDataError> {
        import(&PerfData::parse(bytes).unwrap(), options)
    }

    #[test]
    fn branch_stacks_become_branches_and_stretches() {
        let own = Own::new();
        // A loop of two blocks: 100..110 jumps to 200, 200..220 jumps back.
        let stack = [(0x220, 0x100), (0x110, 0x200), (0x220, 0x100)].map(|(a, b)| (START + a, START + b));
        let records =
            [own.map(&own.facts.build_id.0), stacked(10, 2, START + 0x104, &stack), stacked(20, 1, u64::MAX, &[])];
        let bytes = file(&attr(0, 0, STACKED), &records, &[]);
        let (profile, left_out) = read(&bytes, &ImportOptions::default()).unwrap();
        assert_eq!(profile.validate(), Ok(()));
        assert_eq!(left_out, LeftOut::default());
        assert_eq!((profile.method, profile.samples, profile.kernel, profile.threads), (Method::Lbr, 1, 1, 1));
        let [module] = &profile.modules[..] else { panic!("{:?}", profile.modules) };
        let link = |offsets: &[u64]| offsets.iter().map(|&o| own.link(o)).collect::<Vec<_>>();
        assert_eq!(module.build_id, own.facts.build_id);
        assert_eq!((&module.branches.from, &module.branches.to), (&link(&[0x110, 0x220]), &link(&[0x200, 0x100])));
        assert_eq!((&module.branches.count, &module.branches.mispredicted), (&vec![1, 2], &vec![1, 2]));
        assert_eq!((&module.ranges.start, &module.ranges.end), (&link(&[0x100, 0x200]), &link(&[0x110, 0x220])));
        assert_eq!(module.samples.addr, link(&[0x104]));
    }

    #[test]
    fn a_build_is_known_by_what_perf_noted_at_the_end_or_by_its_path_alone() {
        let own = Own::new();
        let records = [own.map(&[]), stacked(10, 2, START + 0x104, &[])];
        let id: [u8; 20] = own.facts.build_id.0.clone().try_into().unwrap_or([7; 20]);
        let of_now = file(&attr(1, 0, STACKED), &records, &noted(&own.path, id));
        if own.facts.build_id.0.len() == 20 {
            let (profile, left_out) = read(&of_now, &ImportOptions::default()).unwrap();
            assert_eq!((profile.method, left_out.unproven.len()), (Method::Clock, 0));
        }
        let nameless = file(&attr(1, 0, STACKED), &records, &[]);
        assert_eq!(read(&nameless, &ImportOptions::default()).unwrap().1.unproven.len(), 1);
        let of_then = file(&attr(1, 0, STACKED), &records, &noted(&own.path, [9; 20]));
        let error = read(&of_then, &ImportOptions::default()).unwrap_err();
        assert!(error.to_string().contains("another build"), "{error}");
    }

    #[test]
    fn what_can_t_be_used_is_counted_with_its_reason() {
        let own = Own::new();
        let records = [
            own.map(&own.facts.build_id.0),
            mapped(2, 0x7f00_0000_0000, 0x1000, 0, "/nowhere/lib.so", &[1; 20]),
            mapped(2, 0x7f00_0001_0000, 0x1000, 0, "//anon", &[]),
            stacked(10, 2, START + 0x104, &[]),
            stacked(11, 2, 0x7f00_0000_0010, &[]),
            stacked(12, 2, 0x7f00_0001_0010, &[]),
            of_process(stacked(13, 2, START + 0x104, &[]), 8),
        ];
        let bytes = file(&attr(1, 0, STACKED), &records, &[]);
        let (profile, left_out) = read(&bytes, &ImportOptions::default()).unwrap();
        assert_eq!((profile.samples, profile.outside, left_out.unknown), (1, 1, 1));
        let reasons: Vec<_> =
            left_out.modules.iter().map(|((name, why), n)| (name.as_str(), why.as_str(), *n)).collect();
        assert_eq!(reasons, [("lib.so", "its file is not here", 1)]);
        let other = ImportOptions { program: Some("mariadbd"), ..ImportOptions::default() };
        assert_eq!(read(&bytes, &other).unwrap_err(), PerfDataError::NoSamples("mariadbd".into()));
    }

    /// perf writes for every process that is there a birth, and then what it has; a birth that it saw is another matter.
    #[test]
    fn a_child_has_what_its_parent_had_if_it_was_seen_to_be_born() {
        let own = Own::new();
        for (time, unknown) in [(0, 1), (5, 0)] {
            let records = [
                own.map(&own.facts.build_id.0),
                forked(time, 8),
                stacked(10, 2, START + 0x104, &[]),
                of_process(stacked(11, 2, START + 0x104, &[]), 8),
            ];
            // What has no time comes first.
            let records =
                if time == 0 { [&records[1..2], &records[..1], &records[2..]].concat() } else { records.to_vec() };
            let bytes = file(&attr(1, 0, STACKED), &records, &[]);
            let (profile, left_out) = read(&bytes, &ImportOptions::default()).unwrap();
            assert_eq!((profile.samples, left_out.unknown), (2 - unknown, unknown));
        }
    }

    #[test]
    fn events_that_tell_nothing_of_time_are_refused() {
        let plain = STACKED & !(1 << 11);
        let of = |kind, config, kinds| file(&attr(kind, config, kinds), &[stacked(10, 2, 0x1000, &[])], &[]);
        let error = |bytes: &[u8]| read(bytes, &ImportOptions::default()).unwrap_err();
        assert!(matches!(error(&of(0, 5, plain)), PerfDataError::NotTime(_)));
        assert!(matches!(error(&of(2, 77, plain)), PerfDataError::NotTime(_)));
        assert!(matches!(error(&of(0, 0, 1 << 2)), PerfDataError::Lacks(_)));
        assert!(matches!(error(&of(0, 5, STACKED)), PerfDataError::NoSamples(_)));
    }

    /// As in [`crate::perf_data`], with all that is made of it.
    #[test]
    fn damage_is_an_error_or_another_profile() {
        let own = Own::new();
        let stack = [(0x220, 0x100), (0x110, 0x200)].map(|(a, b)| (START + a, START + b));
        let records = [own.map(&own.facts.build_id.0), stacked(10, 2, START + 0x104, &stack)];
        let bytes = file(&attr(0, 0, STACKED), &records, &[]);
        for at in 0..bytes.len() {
            for byte in [0, 0x7f, 0xff, bytes[at] ^ 2] {
                let mut flipped = bytes.clone();
                flipped[at] = byte;
                let Ok(data) = PerfData::parse(&flipped) else { continue };
                if let Ok((profile, _)) = import(&data, &ImportOptions::default()) {
                    assert_eq!(profile.validate(), Ok(()), "byte {at}");
                }
            }
        }
    }
}
