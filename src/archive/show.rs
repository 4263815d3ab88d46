//! `dyni archive show`: what one record holds.

use std::path::Path;

use dyni_profiles::{Archive, ArchiveError};
use dyni_schema::envelope::{BlobPrefix, Kind};
use dyni_schema::{ModulePlan, ModuleProfile, Plan, PlanKind, Profile};
use serde::Serialize;

use super::{WorkingSetReport, clean, heading, line, short, thousands, utc};
use crate::duration::human_ns;
use crate::errors::Failure;
use crate::output::{Align, Paint, Report, Table, human_bytes, plural};

/// How many functions or addresses are listed as the hottest.
const TOP: usize = 20;

/// What was asked for.
pub enum Shown {
    /// It is a profile.
    Profile(Box<ProfileReport>),
    /// It is a plan.
    Plan(Box<PlanReport>),
    /// It is a working set.
    WorkingSet(Box<WorkingSetReport>),
}

/// Opens the record whose id begins so.
///
/// # Errors
/// There is none, several, or it can't be used.
pub fn show(id: &str, path: &Path) -> Result<Shown, Failure> {
    let prefix: BlobPrefix = id.parse().map_err(ArchiveError::from)?;
    let archive = Archive::open_read_only(path)?;
    let (id, kind) = archive.identify(&prefix)?;
    Ok(match kind {
        Kind::Profile => Shown::Profile(Box::new(ProfileReport::new(id.hex(), &archive.profile(&id.into())?.1))),
        Kind::WorkingSet => {
            Shown::WorkingSet(Box::new(WorkingSetReport::new(id.hex(), &archive.working_set(&id.into())?.1)))
        }
        _ => Shown::Plan(Box::new(PlanReport::new(id.hex(), &archive.plan(&id.into())?.1))),
    })
}

/// `dyni archive show --json` of a profile.
#[derive(Debug, Serialize)]
pub struct ProfileReport {
    /// `"profile"`
    kind: &'static str,
    id: String,
    program: String,
    label: String,
    method: &'static str,
    method_note: String,
    cpu: String,
    kernel_release: String,
    start_s: u64,
    duration_ns: u64,
    frequency_hz: u64,
    processes: u32,
    threads: u32,
    /// Samples in modules that are known.
    samples: u64,
    outside: u64,
    kernel: u64,
    in_cache: u64,
    lost: u64,
    /// The most samples first.
    modules: Vec<ProfileModule>,
    /// The hottest functions, or single instructions in modules whose functions are not known yet.
    top: Vec<Hot>,
}

#[derive(Debug, Serialize)]
struct ProfileModule {
    name: String,
    path: String,
    build_id: String,
    /// The sum of its sample counts.
    samples: u64,
    /// How many instructions were sampled.
    addresses: usize,
    branches: usize,
    ranges: usize,
    functions: usize,
}

#[derive(Debug, Serialize)]
struct Hot {
    module: String,
    build_id: String,
    /// A link address, hexadecimal: JSON's numbers do not hold 64 bits everywhere.
    address: String,
    /// The function's length in bytes; null if this is one instruction.
    size: Option<u32>,
    samples: u64,
}

impl ProfileReport {
    fn new(id: String, p: &Profile) -> Self {
        let mut modules: Vec<_> = p.modules.iter().map(ProfileModule::new).collect();
        modules.sort_by(|a, b| b.samples.cmp(&a.samples).then_with(|| a.name.cmp(&b.name)));
        let mut top: Vec<_> = p.modules.iter().flat_map(hottest).collect();
        top.sort_by(|a, b| {
            b.samples.cmp(&a.samples).then_with(|| (&a.build_id, &a.address).cmp(&(&b.build_id, &b.address)))
        });
        top.truncate(TOP);
        Self {
            kind: "profile",
            id,
            program: p.program.clone(),
            label: p.label.clone(),
            method: p.method.name(),
            method_note: p.method_note.clone(),
            cpu: p.host.cpu.clone(),
            kernel_release: p.host.kernel.clone(),
            start_s: p.start_s,
            duration_ns: p.duration_ns,
            frequency_hz: p.frequency_hz,
            processes: p.processes,
            threads: p.threads,
            samples: p.samples,
            outside: p.outside,
            kernel: p.kernel,
            in_cache: p.in_cache,
            lost: p.lost,
            modules,
            top,
        }
    }
}

impl ProfileModule {
    fn new(m: &ModuleProfile) -> Self {
        Self {
            name: m.name.clone(),
            path: m.path.clone(),
            build_id: m.build_id.hex(),
            samples: m.samples.total(),
            addresses: m.samples.addr.len(),
            branches: m.branches.from.len(),
            ranges: m.ranges.start.len(),
            functions: m.functions.start.len(),
        }
    }
}

/// The hottest functions of a module, or its hottest instructions if nobody has looked for functions yet.
fn hottest(m: &ModuleProfile) -> Vec<Hot> {
    let mut found: Vec<(u64, Option<u32>, u64)> = if m.functions.start.is_empty() {
        m.samples.iter().map(|(addr, count)| (addr.0, None, count)).collect()
    } else {
        let functions = m.functions.start.iter().zip(&m.functions.size);
        functions.map(|(&start, &size)| (start, Some(size), samples_in(m, start, size))).collect()
    };
    found.sort_by(|a, b| b.2.cmp(&a.2).then_with(|| a.0.cmp(&b.0)));
    found.truncate(TOP);
    let hot = |(address, size, samples)| Hot {
        module: m.name.clone(),
        build_id: m.build_id.hex(),
        address: format!("{address:#x}"),
        size,
        samples,
    };
    found.into_iter().filter(|f| f.2 > 0).map(hot).collect()
}

/// The samples in `size` bytes from `start`; the addresses are sorted.
fn samples_in(m: &ModuleProfile, start: u64, size: u32) -> u64 {
    let (addr, end) = (&m.samples.addr, start.saturating_add(u64::from(size)));
    let (first, last) = (addr.partition_point(|&a| a < start), addr.partition_point(|&a| a < end));
    m.samples.count.get(first..last).unwrap_or_default().iter().fold(0, |sum, &c| sum.saturating_add(c))
}

impl Report for ProfileReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = heading(Kind::Profile, &self.id, paint);
        let seen = format!(
            "{}, {}",
            plural(self.processes.into(), "process", "processes"),
            plural(self.threads.into(), "thread", "threads")
        );
        let counted = format!(
            "{} in modules, {} in code of no file, {} in the kernel, {} in dyni's copies, {} lost",
            thousands(self.samples),
            thousands(self.outside),
            thousands(self.kernel),
            thousands(self.in_cache),
            thousands(self.lost)
        );
        let method = match self.frequency_hz {
            0 => self.method.to_owned(),
            hz => format!("{}, {} a second", self.method, thousands(hz)),
        };
        for (label, value) in [
            ("program", self.program.as_str()),
            ("label", &self.label),
            ("method", &method),
            ("not used", &self.method_note),
            ("taken", &format!("{} UTC, for {}", utc(self.start_s), human_ns(self.duration_ns))),
            ("processor", &self.cpu),
            ("kernel", &self.kernel_release),
            ("seen", &seen),
            ("samples", &counted),
        ] {
            text.push_str(&line(label, value));
        }
        let mut table = Table::new(&[
            ("module", Align::Left),
            ("samples", Align::Right),
            ("share", Align::Right),
            ("addresses", Align::Right),
            ("branches", Align::Right),
            ("functions", Align::Right),
            ("build-id", Align::Left),
        ]);
        let all = self.modules.iter().fold(0u64, |sum, m| sum.saturating_add(m.samples));
        for m in &self.modules {
            table.row([
                short(&m.name),
                thousands(m.samples),
                share(m.samples, all),
                thousands(m.addresses as u64),
                thousands(m.branches as u64),
                thousands(m.functions as u64),
                m.build_id.clone(),
            ]);
        }
        text.push_str(&table.render("  ", paint));
        if self.top.is_empty() {
            return text;
        }
        let mut table = Table::new(&[
            ("hottest", Align::Left),
            ("address", Align::Right),
            ("bytes", Align::Right),
            ("samples", Align::Right),
            ("share", Align::Right),
        ]);
        for hot in &self.top {
            let size = hot.size.map_or_else(String::new, |size| thousands(size.into()));
            let share = share(hot.samples, all);
            table.row([short(&hot.module), hot.address.clone(), size, thousands(hot.samples), share]);
        }
        text.push_str(&table.render("  ", paint));
        text
    }
}

fn share(part: u64, all: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / all.max(1) as f64)
}

/// `dyni archive show --json` of a plan.
#[derive(Debug, Serialize)]
pub struct PlanReport {
    /// `"plan"`
    kind: &'static str,
    id: String,
    program: String,
    /// `"layout"` or `"counting"`
    purpose: &'static str,
    passes: Vec<String>,
    /// The id of the profile that it was made from; null if from none.
    profile: Option<String>,
    /// In the plan's order: by build-id.
    modules: Vec<PlanModule>,
}

#[derive(Debug, Serialize)]
struct PlanModule {
    name: String,
    build_id: String,
    functions: usize,
    /// The bytes of these functions, as they are now.
    function_bytes: u64,
    blocks: usize,
    /// Blocks that lie in front.
    hot_blocks: u64,
    /// Patched places besides the entries.
    entries: usize,
    /// The hottest functions first.
    top: Vec<PlanFunction>,
}

#[derive(Debug, Serialize)]
struct PlanFunction {
    /// A link address, hexadecimal.
    address: String,
    size: u32,
    blocks: usize,
    hot_blocks: u32,
    weight: u64,
}

impl PlanReport {
    fn new(id: String, p: &Plan) -> Self {
        Self {
            kind: "plan",
            id,
            program: p.program.clone(),
            purpose: match p.kind {
                PlanKind::Layout => "layout",
                PlanKind::Counting => "counting",
            },
            passes: p.passes.clone(),
            profile: (p.profile != [0; 32]).then(|| dyni_schema::envelope::BlobId(p.profile).hex()),
            modules: p.modules.iter().map(PlanModule::new).collect(),
        }
    }
}

impl PlanModule {
    fn new(m: &ModulePlan) -> Self {
        let mut top: Vec<_> = m.functions.iter().collect();
        top.sort_by(|a, b| b.weight.cmp(&a.weight).then_with(|| a.start.cmp(&b.start)));
        let function = |f: &dyni_schema::FunctionPlan| PlanFunction {
            address: format!("{:#x}", f.start),
            size: f.size,
            blocks: f.blocks.len(),
            hot_blocks: f.hot,
            weight: f.weight,
        };
        Self {
            name: m.name.clone(),
            build_id: m.build_id.hex(),
            functions: m.functions.len(),
            function_bytes: m.functions.iter().map(|f| u64::from(f.size)).sum(),
            blocks: m.functions.iter().map(|f| f.blocks.len()).sum(),
            hot_blocks: m.functions.iter().map(|f| u64::from(f.hot)).sum(),
            entries: m.functions.iter().map(|f| f.entries.len()).sum(),
            top: top.into_iter().take(TOP).map(function).collect(),
        }
    }
}

impl Report for PlanReport {
    fn text(&self, paint: Paint) -> String {
        let mut text = heading(Kind::Plan, &self.id, paint);
        for (label, value) in [
            ("program", self.program.as_str()),
            ("purpose", self.purpose),
            ("passes", &self.passes.join(", ")),
            ("profile", self.profile.as_deref().unwrap_or_default()),
        ] {
            text.push_str(&line(label, value));
        }
        let mut table = Table::new(&[
            ("module", Align::Left),
            ("functions", Align::Right),
            ("size", Align::Right),
            ("blocks", Align::Right),
            ("hot", Align::Right),
            ("entries", Align::Right),
            ("build-id", Align::Left),
        ]);
        for m in &self.modules {
            table.row([
                short(&m.name),
                thousands(m.functions as u64),
                human_bytes(m.function_bytes),
                thousands(m.blocks as u64),
                thousands(m.hot_blocks),
                thousands(m.entries as u64),
                m.build_id.clone(),
            ]);
        }
        text.push_str(&table.render("  ", paint));
        for m in self.modules.iter().filter(|m| !m.top.is_empty()) {
            text.push_str(&format!("  {}\n", paint.bold(&clean(&m.name))));
            let mut table = Table::new(&[
                ("address", Align::Right),
                ("bytes", Align::Right),
                ("blocks", Align::Right),
                ("hot", Align::Right),
                ("weight", Align::Right),
            ]);
            for f in &m.top {
                table.row([
                    f.address.clone(),
                    thousands(f.size.into()),
                    thousands(f.blocks as u64),
                    thousands(f.hot_blocks.into()),
                    thousands(f.weight),
                ]);
            }
            text.push_str(&table.render("    ", paint));
        }
        text
    }
}
