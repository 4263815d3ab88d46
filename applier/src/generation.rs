//! Generations: a plan made into code for one module, checked, at one distance from that module, ready to be installed.
//!
//! At a fixed distance every displacement is the same under any load address, so a generation serves every process that
//! runs the same build and has the same hole free: all members of a process group as a rule.

use crate::apply::Prepared;
use crate::check::check;
use crate::error::ApplyError;
use crate::ledger::{self, Ledger, PATCH};
use crate::lower::{COUNTER, Emission, Source, Unlowered, lower};
use crate::originals::FunctionBytes;
use crate::place::{AddressSpace, HUGE};
use crate::remote::{Memory, function};
use crate::shortcuts::Stub;
use crate::unwind::unwinder::{NoUnwinder, Unwinders};
use crate::unwind::{self, UnwindRefusal};
use crate::written;
use dyni_analyzer::cfg::{self, Block, Cfg, GiveUp, Terminator};
use dyni_analyzer::functions::{Functions, function_hash};
use dyni_analyzer::image::Image;
use dyni_analyzer::passes::Pass;
use dyni_analyzer::refuse::{self, FunctionSet};
use dyni_analyzer::table_loads;
use dyni_analyzer::targets::TargetIndex;
use dyni_collector::maps::{self, MappedModule};
use dyni_schema::{BuildId, CacheAddr, FunctionPlan, LinkAddr, ModulePlan, Plan, PlanKind, RunAddr};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

/// The largest cache of one module, in bytes.
const MAX_CACHE: u64 = 64 << 20;

/// A module as the applier needs it: its file and what was recovered from it.
#[derive(Debug)]
pub(crate) struct Recovered {
    image: Image,
    functions: Functions,
    targets: TargetIndex,
    /// The functions that may be on the stack of a throw, if anybody throws; asked for only where the unwinder can't be
    /// told of copies.
    may_unwind: OnceLock<FunctionSet>,
}

/// What happens when somebody throws in the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unwinding {
    /// The unwinder is told of the copies.
    Told,
    /// It is not: copies must not be on the stack then. Whether modules throw that are there only to be called back from.
    NotTold { others_throw: bool },
}

/// One module's part of a plan as machine code.
#[derive(Debug)]
pub(crate) struct Generation {
    pub plan: [u8; 32],
    pub program: String,
    /// Whether it is there to count, not to be fast.
    pub counting: bool,
    pub build_id: BuildId,
    pub name: String,
    /// The cache's link address.
    pub cache: LinkAddr,
    pub cache_size: u64,
    /// The copies; behind them, where the unwinder is told of copies, the unwind data.
    pub emission: Emission,
    /// Where in the cache the unwind data are that the unwinder is to be told of.
    pub unwind: Option<CacheAddr>,
    /// The functions that were copied, and their bytes.
    pub originals: FunctionBytes,
    /// Place, bytes there, jump to the copy; by rising place.
    patches: Vec<(LinkAddr, [u8; PATCH], [u8; PATCH])>,
    refused: Vec<(String, u32)>,
}

/// Why functions and patches of a plan are left out, counted.
#[derive(Debug, Default)]
struct Refused(BTreeMap<String, u32>);

impl Refused {
    fn add(&mut self, reason: &str) {
        *self.0.entry(reason.to_owned()).or_default() += 1;
    }
}

/// What was recovered from each build that has been met: files are read once for a whole process group.
#[derive(Debug, Default)]
pub(crate) struct Library {
    modules: HashMap<BuildId, Recovered>,
    pub unwinders: Unwinders,
}

impl Library {
    fn get(&mut self, pid: i32, module: &MappedModule) -> Result<&Recovered, ApplyError> {
        if !self.modules.contains_key(&module.build_id) {
            let fail = |why: String| ApplyError::Module { module: module.name.clone(), why };
            let file = module.file.as_ref().ok_or_else(|| fail("its file can't be opened".to_owned()))?;
            let bytes = std::fs::read(file).map_err(|e| match e.kind() {
                // It is read by way of the mapping, and the process has unmapped it.
                std::io::ErrorKind::NotFound => ApplyError::Changed(pid),
                _ => fail(e.to_string()),
            })?;
            let image = Image::parse(bytes, &module.name).map_err(|e| fail(e.to_string()))?;
            if *image.build_id() != module.build_id {
                return Err(fail("it was replaced while it was read".to_owned()));
            }
            let functions = Functions::find(&image);
            let targets = TargetIndex::build(&image, &functions);
            let may_unwind = OnceLock::new();
            self.modules.insert(module.build_id.clone(), Recovered { image, functions, targets, may_unwind });
        }
        Ok(&self.modules[&module.build_id])
    }
}

/// Makes the generations of a plan for process `pid`: one for each module of the plan that it has mapped and of which
/// anything can be applied. `fuel` bounds the number of functions, to find one that is at fault. With `tell_unwinder`,
/// copies get unwind data if the process has an unwinder that can be told of them.
pub(crate) fn prepare(
    pid: i32,
    plan: &Plan,
    plan_id: [u8; 32],
    library: &mut Library,
    fuel: Option<usize>,
    tell_unwinder: bool,
) -> Result<Vec<Generation>, ApplyError> {
    let memory = Memory::open(pid)?;
    let maps = maps::mappings(pid)?;
    let modules = maps::ModuleReader::default().of(pid, &maps);
    let (entries, _) = ledger::find(pid, &maps, &memory);
    let mut space = AddressSpace::of(&maps);
    // What is left on a stack of a cache that was freed must not look like a reference to a new one (`retire`).
    let mut fresh = space.clone();
    entries.iter().flat_map(|e| e.ledger.vacated()).for_each(|range| fresh.take(range));
    let mut generations = Vec::new();
    let mut met = false;
    let mut reasons = Refused::default();
    let mut fuel = fuel.unwrap_or(usize::MAX);
    let unwinding = match library.unwinders.find(pid, &modules) {
        Ok(_) if tell_unwinder => Unwinding::Told,
        Err(NoUnwinder::NotThere) => Unwinding::NotTold { others_throw: false },
        _ => Unwinding::NotTold { others_throw: true },
    };
    let passes = Shortened::of(plan);
    for part in &plan.modules {
        let Some(module) = modules.iter().find(|m| m.build_id == part.build_id) else { continue };
        met = true;
        let recovered = library.get(pid, module)?;
        let mut refused = Refused::default();
        if let Some(runtime) = refuse::module_refusal(&recovered.image) {
            reasons.add(runtime.reason);
            continue;
        }
        let written = written::pages(pid, &module.text, &maps, &entries);
        let count = part.functions.len().min(fuel);
        fuel -= count;
        let hot = part.functions[..count].par_iter();
        let read: Vec<_> =
            hot.map(|f| read_function(f, recovered, module, &memory, &written, unwinding, passes)).collect();
        let sources: Vec<Source<'_>> =
            read.into_iter().filter_map(|r| r.map_err(|reason| refused.add(reason)).ok()).collect();
        if sources.is_empty() {
            refused.0.into_iter().for_each(|(reason, n)| *reasons.0.entry(reason).or_default() += n);
            continue;
        }
        // An earlier generation of the same code is found again at its own place, so that it can be used again.
        let known = entries.iter().filter(|e| e.ledger.plan == plan_id && e.ledger.build_id == part.build_id);
        let known: Vec<_> = known.map(|e| (RunAddr(e.ledger.cache), e.ledger.cache_size, e.ledger.code_hash)).collect();
        let generation = place(
            plan,
            plan_id,
            part,
            module,
            recovered,
            sources,
            refused,
            &known,
            [&fresh, &space],
            unwinding,
            passes,
        )?
        .ok_or_else(|| ApplyError::NoRoom { pid, module: module.name.clone() })?;
        let start = generation.cache.run(module.bias).0;
        space.take(start..start + generation.span());
        fresh.take(start..start + generation.span());
        generations.push(generation);
    }
    if !met {
        let wanted = plan.modules.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(ApplyError::OtherBuild { pid, wanted });
    }
    if generations.is_empty() {
        let reasons: Vec<_> = reasons.0.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
        return Err(ApplyError::NothingApplicable { pid, reasons: reasons.join("; ") });
    }
    Ok(generations)
}

/// A function of the plan as the process has it, or why it is left out.
fn read_function<'p>(
    plan: &'p FunctionPlan,
    recovered: &Recovered,
    module: &MappedModule,
    memory: &Memory,
    written: &written::Written,
    unwinding: Unwinding,
    passes: Shortened,
) -> Result<Source<'p>, &'static str> {
    let Recovered { image, functions, targets, may_unwind } = recovered;
    let start = plan.start();
    let mismatch = Unlowered::PlanMismatch.text();
    let index = functions.index_at(start).ok_or(mismatch)?;
    let function = &functions.all()[index];
    let size = u64::from(function.size);
    if function.start != start || size != u64::from(plan.size) || function_hash(image, function) != plan.hash {
        return Err(mismatch);
    }
    let file = image.bytes(start, size as usize).ok_or(mismatch)?;
    let at = start.run(module.bias);
    let mut code = vec![0; size as usize];
    if memory.read_some(at, &mut code) != code.len() || code != file {
        return Err("differs from its file in the process");
    }
    if written.touches(at, size) {
        return Err(GiveUp::SelfModifying.text());
    }
    match unwinding {
        Unwinding::Told => unwind::examine(image, functions, function).map_err(UnwindRefusal::text)?,
        Unwinding::NotTold { others_throw } => {
            let options = refuse::Options { unwind_registered: false, others_throw };
            if may_unwind.get_or_init(|| refuse::may_unwind(image, functions, targets, options)).has(index) {
                return Err(GiveUp::MayUnwind.text());
            }
        }
    }
    let mut cfg = cfg::build(image, functions, targets, function).map_err(GiveUp::text)?;
    // Whether these are calls that may be promoted, lowering finds out.
    for call in plan.calls.iter().filter(|c| c.callee != 0) {
        let at = start.plus(u64::from(call.at));
        let i = Decoder::with_ip(64, &code[call.at as usize..], at.0, DecoderOptions::NONE).decode();
        if i.flow_control() == FlowControl::IndirectCall {
            cfg.part(LinkAddr(i.next_ip()), at);
        }
    }
    let stubs = if passes.stubs { Stub::all(image, &cfg, &code) } else { Vec::new() };
    let table_loads = if passes.tables { table_loads::all(image, &cfg) } else { Vec::new() };
    Ok(Source { cfg, plan, code, stubs, table_loads })
}

/// What a plan says is to be gone past.
#[derive(Debug, Clone, Copy)]
struct Shortened {
    stubs: bool,
    tables: bool,
}

impl Shortened {
    fn of(plan: &Plan) -> Self {
        let has = |pass: Pass| plan.passes.iter().any(|p| p == pass.name());
        Self { stubs: has(Pass::Plt), tables: has(Pass::Tables) }
    }
}

/// Lowers and checks at the first hole that serves.
#[expect(clippy::too_many_arguments, reason = "called once; a struct for it would be read once")]
fn place(
    plan: &Plan,
    plan_id: [u8; 32],
    part: &ModulePlan,
    module: &MappedModule,
    recovered: &Recovered,
    mut sources: Vec<Source<'_>>,
    mut refused: Refused,
    known: &[(RunAddr, u64, [u8; 32])],
    spaces: [&AddressSpace; 2],
    unwinding: Unwinding,
    passes: Shortened,
) -> Result<Option<Generation>, ApplyError> {
    let span = module.span.start.0..module.span.end.0;
    // Branches grow in a copy and parts are aligned: a quarter and some more than the original is always enough. So is
    // as much again for unwind data.
    // A probe takes at most 18 bytes.
    let probes: u64 = sources.iter().map(|s| s.plan.probes.len() as u64).sum();
    // A call through a pointer takes at most 48 more, and an entry of a table 8.
    let calls: u64 = sources.iter().map(|s| s.plan.calls.len() as u64).sum();
    let entries: u64 = sources.iter().flat_map(|s| &s.cfg.jump_tables).map(|t| t.targets.len() as u64).sum();
    let code: u64 = sources.iter().map(|s| s.code.len() as u64 * 5 / 4 + 64).sum();
    let bytes = code + probes * 18 + calls * 48 + if passes.tables { entries * 8 } else { 0 };
    let counters = ((probes + calls) * COUNTER).next_multiple_of(4096);
    let tables = if unwinding == Unwinding::Told { bytes } else { 0 };
    let size = (bytes + tables + function::CODE_LEN).next_multiple_of(HUGE).min(MAX_CACHE);
    let again = known.iter().map(|&(at, size, _)| (at, size));
    // Less room than all of it is better than none: the hottest functions go in.
    let hole = |n: u64| spaces.iter().find_map(|space| space.holes(&span, n, counters, 1).first().copied());
    let fresh = (1..=size / HUGE).rev().map(|n| n * HUGE).find_map(|n| Some((hole(n)?, n)));
    let mut made = None;
    for (at, size) in again.chain(fresh) {
        let cache = at.link(module.bias);
        let (emission, unlowered, unwind) = emit(&mut sources, recovered, cache, size, unwinding, &mut refused)?;
        let hash = *blake3::hash(&emission.code).as_bytes();
        if Some((at, size)) == fresh || known.contains(&(at, size, hash)) {
            made = Some((cache, size, emission, unlowered, unwind));
            break;
        }
    }
    let Some((cache, size, emission, unlowered, unwind)) = made else { return Ok(None) };
    for &(_, reason) in &unlowered {
        refused.add(reason.text());
    }
    let left_out: Vec<usize> = unlowered.iter().map(|&(i, _)| i).collect();
    let kept: Vec<_> = (0..sources.len()).filter(|i| !left_out.contains(i)).map(|i| &sources[i]).collect();
    let patches = patches(&kept, recovered, &emission, cache, &mut refused);
    let originals = FunctionBytes::of(kept.iter().copied(), &recovered.image);
    Ok(Some(Generation {
        plan: plan_id,
        program: plan.program.clone(),
        counting: plan.kind == PlanKind::Counting,
        build_id: part.build_id.clone(),
        name: module.name.clone(),
        cache,
        cache_size: size,
        emission,
        unwind,
        originals,
        patches,
        refused: refused.0.into_iter().collect(),
    }))
}

/// The copies; the sources that have none, and why; where the unwind data are.
type Emitted = (Emission, Vec<(usize, Unlowered)>, Option<CacheAddr>);

/// The copies, and the unwind data behind them, for a cache at link address `cache`, both checked. A source for whose
/// copy no unwind data can be made is taken out.
fn emit(
    sources: &mut Vec<Source<'_>>,
    recovered: &Recovered,
    cache: LinkAddr,
    size: u64,
    unwinding: Unwinding,
    refused: &mut Refused,
) -> Result<Emitted, ApplyError> {
    let Recovered { image, functions, .. } = recovered;
    let mut room = size - function::CODE_LEN;
    loop {
        let (mut emission, unlowered) = lower(sources, cache, room, cache.plus(size));
        let originals = FunctionBytes::of(sources.iter(), image);
        check(&emission, cache, &originals)?;
        if unwinding != Unwinding::Told {
            return Ok((emission, unlowered, None));
        }
        let offset = (emission.code.len() as u64).next_multiple_of(8);
        let at = cache.plus(offset);
        let section = match unwind::build(image, functions, &emission, &originals, cache, at) {
            Ok(section) => section,
            Err(e) => {
                sources.retain(|s| s.cfg.start != e.function);
                refused.add(e.refusal.text());
                continue;
            }
        };
        let end = offset + section.bytes.len() as u64;
        if end > size - function::CODE_LEN {
            room = room.saturating_sub(end - (size - function::CODE_LEN));
            continue;
        }
        unwind::check(image, functions, &emission, &originals, &section, cache, at)?;
        emission.code.resize(offset as usize, 0);
        emission.code.extend(&section.bytes);
        return Ok((emission, unlowered, (section.entries > 0).then_some(CacheAddr(offset))));
    }
}

/// The places that lead into the copies: each function's entry and the other entries of the plan, as far as five bytes
/// can be overwritten there (invariant 5).
fn patches(
    sources: &[&Source<'_>],
    recovered: &Recovered,
    emission: &Emission,
    cache: LinkAddr,
    refused: &mut Refused,
) -> Vec<(LinkAddr, [u8; PATCH], [u8; PATCH])> {
    let mut patches = Vec::new();
    for source in sources {
        let sound = sound_blocks(&source.cfg, &recovered.targets);
        let entries = std::iter::once(0).chain(source.plan.entries.iter().copied().filter(|&e| e != 0));
        for (number, offset) in entries.enumerate() {
            let at = source.cfg.start.plus(u64::from(offset));
            let Some(block) = emission.block_at(at) else { continue };
            if !source.cfg.block_at(at).is_some_and(|i| sound[i]) {
                continue;
            }
            if let Err(reason) = recovered.targets.patchable(&recovered.image, &source.cfg, at) {
                // A loop header that can't be patched costs nothing: the function's entry still leads into the copy.
                if number == 0 {
                    refused.add(reason.text());
                }
                continue;
            }
            let inside = at.plus(1)..at.plus(PATCH as u64);
            let escape = emission.escapes.partition_point(|e| *e < inside.start);
            if emission.escapes.get(escape).is_some_and(|e| *e < inside.end) {
                if number == 0 {
                    refused.add("has an escape into the bytes of its own entry patch");
                }
                continue;
            }
            let original = source.code[offset as usize..offset as usize + PATCH].try_into().expect("five bytes");
            patches.push((at, original, jump(at, cache.plus(block.copy.0))));
        }
    }
    patches.sort_unstable();
    // Entries of the plan are block heads, so two can lie closer than a patch is long; the first one counts.
    let mut end = None;
    patches.retain(|&(at, ..)| {
        let free = end.is_none_or(|end| at >= end);
        if free {
            end = Some(at.plus(PATCH as u64));
        }
        free
    });
    patches
}

/// Which blocks are certainly code: those that the entry leads to by branches and checked jump tables, and, if there is an
/// indirect jump among them that was not understood, those whose address data hold. To copy what was data is harmless; to
/// patch it is not, so a label that is only computed, or read from what might be a table, is not enough.
fn sound_blocks(cfg: &Cfg, targets: &TargetIndex) -> Vec<bool> {
    let mut sound = vec![false; cfg.blocks.len()];
    let mut todo = vec![0];
    let mut labels_added = false;
    while let Some(i) = todo.pop() {
        let block: &Block = &cfg.blocks[i];
        if std::mem::replace(&mut sound[i], true) {
            continue;
        }
        match block.terminator {
            Terminator::Indirect { table: Some(t) } if !cfg.jump_tables[t as usize].exact => {}
            Terminator::Indirect { table: None } if !labels_added => {
                labels_added = true;
                todo.extend((0..cfg.blocks.len()).filter(|&l| targets.is_observed(cfg.blocks[l].start)));
            }
            _ => todo.extend(block.successors.iter().map(|&s| s as usize)),
        }
    }
    sound
}

/// `jmp rel32` from `at` to `to`, which is in reach.
fn jump(at: LinkAddr, to: LinkAddr) -> [u8; PATCH] {
    let distance = i32::try_from(to.distance(at.plus(PATCH as u64))).expect("a cache is within reach of its module");
    let [a, b, c, d] = distance.to_le_bytes();
    [0xe9, a, b, c, d]
}

impl Generation {
    /// How many bytes of the address space it takes, counters included.
    fn span(&self) -> u64 {
        self.cache_size + self.emission.counters.len().next_multiple_of(4096)
    }

    /// The ledger of this generation for a process that has the module mapped as `module` says.
    pub fn ledger(&self, module: &MappedModule, borrowed_page: RunAddr) -> Ledger {
        let links = |list: &[LinkAddr]| list.iter().map(|at| at.0).collect();
        let counters = &self.emission.counters;
        let mut ledger = Ledger {
            plan: self.plan,
            program: self.program.clone(),
            build_id: self.build_id.clone(),
            module: self.name.clone(),
            bias: module.bias,
            cache: self.cache.run(module.bias).0,
            cache_size: self.cache_size,
            code_size: self.emission.code.len() as u64,
            hot_size: self.emission.hot_size,
            code_hash: *blake3::hash(&self.emission.code).as_bytes(),
            functions: self.originals.iter().map(|(start, _)| start.0).collect(),
            function_sizes: self.originals.iter().map(|(_, bytes)| bytes.len() as u32).collect(),
            patches: self.patches.iter().map(|p| p.0.0).collect(),
            originals: self.patches.iter().map(|p| p.1).collect(),
            replacements: self.patches.iter().map(|p| p.2).collect(),
            escapes: self.emission.escapes.iter().map(|e| e.0).collect(),
            borrowed_pages: vec![borrowed_page.0],
            counting: self.counting,
            counters: if counters.is_empty() { 0 } else { counters.at.run(module.bias).0 },
            counted: links(&counters.blocks),
            recorded: links(&counters.sites),
            shortcuts: self.emission.shortcuts.clone(),
            unwind: self.unwind.map_or(0, |at| self.cache.plus(at.0).run(module.bias).0),
            refused: self.refused.clone(),
            ..Ledger::default()
        };
        ledger.set_blocks(&self.emission.blocks);
        ledger
    }

    /// What it is, for people.
    pub fn summary(&self) -> Prepared {
        Prepared {
            name: self.name.clone(),
            functions: self.originals.iter().count(),
            code_size: self.emission.code.len() as u64,
            hot_size: self.emission.hot_size,
            refused: self.refused.clone(),
        }
    }
}
