//! What was observed: where a program's time went, by module and link address.
//!
//! A profile has no process, no time of day that matters and no run address in it: it fits every process of the same
//! builds. Bulk data is a struct of arrays, sorted, so that two profiles merge by one walk.

pub(crate) mod v1;

use crate::shapes::Shapes;
use crate::{BuildId, FunctionHash, Invalid, LinkAddr};
use rkyv::{Archive, Deserialize, Serialize};

/// How a profile was taken, from the best evidence to the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub enum Method {
    /// Exact counts from an instrumented generation.
    Count,
    /// Branch stacks of the hardware (LBR, BRS).
    Lbr,
    /// Instruction addresses at every N hardware cycles.
    Cycles,
    /// Instruction addresses at a rate of the kernel's clock.
    Clock,
    /// Instruction addresses read by stopping threads with ptrace.
    Ptrace,
}

impl Method {
    /// Every method, best first.
    pub const ALL: [Self; 5] = [Self::Count, Self::Lbr, Self::Cycles, Self::Clock, Self::Ptrace];

    /// The word for it on the command line and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Lbr => "lbr",
            Self::Cycles => "cycles",
            Self::Clock => "clock",
            Self::Ptrace => "ptrace",
        }
    }
}

/// The host on which a profile was taken, as far as it matters to layout.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Host {
    /// The processor's model name, as /proc/cpuinfo gives it.
    pub cpu: String,
    /// The kernel release, as `uname -r` gives it.
    pub kernel: String,
}

/// Samples of the instruction pointer: `addr` (link addresses) strictly increasing, `count` beside it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Samples {
    /// Link addresses, strictly increasing.
    pub addr: Vec<u64>,
    /// How many samples hit that address; not zero.
    pub count: Vec<u64>,
}

impl Samples {
    /// Address and count of each sampled instruction, by rising address.
    pub fn iter(&self) -> impl Iterator<Item = (LinkAddr, u64)> + '_ {
        self.addr.iter().zip(&self.count).map(|(&a, &c)| (LinkAddr(a), c))
    }

    /// The sum of all counts.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.count.iter().fold(0, |sum, &c| sum.saturating_add(c))
    }
}

/// Control transfers: from a branch instruction (its own address, not the one after it) to its target, link addresses
/// of the same module; sorted by (from, to), each pair once. A target of 0 is any outside the module: of imported profiles,
/// and from counters ([`Method::Count`]), which know calls through pointers alone, how often each callee was found to be the
/// last one.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Branches {
    /// The address of the branch instruction.
    pub from: Vec<u64>,
    /// The address that it went to.
    pub to: Vec<u64>,
    /// How often; not zero.
    pub count: Vec<u64>,
    /// How many of these the processor had predicted wrongly.
    pub mispredicted: Vec<u64>,
}

/// Stretches of straight-line execution, sorted by (start, end), each pair once. From branch stacks: what lies between two
/// taken branches; every instruction from `start` to `end` (the branch that ended it, inclusive) ran `count` times. From
/// counters ([`Method::Count`]): blocks that were watched, from their first instruction to their last.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Ranges {
    /// The first instruction's address.
    pub start: Vec<u64>,
    /// The last instruction's address.
    pub end: Vec<u64>,
    /// How often; zero for a block that was watched and never ran.
    pub count: Vec<u64>,
}

/// The functions that were hit, with their hashes, so that the profile still serves a rebuilt binary; sorted by start.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct FunctionIndex {
    /// The function's first byte, a link address.
    pub start: Vec<u64>,
    /// Its length in bytes.
    pub size: Vec<u32>,
    /// Its position-independent hash.
    pub hash: Vec<FunctionHash>,
}

/// What was observed in one module.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct ModuleProfile {
    /// Which file.
    pub build_id: BuildId,
    /// Its base name, for people.
    pub name: String,
    /// The path it was mapped from, for people and for finding it again; never trusted.
    pub path: String,
    /// Where the instruction pointer was.
    pub samples: Samples,
    /// Taken branches (LBR), or calls through pointers ([`Method::Count`]).
    pub branches: Branches,
    /// Straight-line stretches (LBR) or counted blocks ([`Method::Count`]).
    pub ranges: Ranges,
    /// The functions in which anything was seen; empty until the analyzer has filled it in.
    pub functions: FunctionIndex,
    /// What these functions look like inside, so that what was seen can be found again in another build.
    pub shapes: Shapes,
}

/// One recording of one program (a process group) or the merge of several.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Profile {
    /// The program's name: the base name of the main executable.
    pub program: String,
    /// What the user called this recording; may be empty.
    pub label: String,
    /// How it was taken.
    pub method: Method,
    /// The samplers that were better and why each did not work, for people.
    pub method_note: String,
    /// Where it was taken.
    pub host: Host,
    /// When it began, seconds since 1970-01-01 UTC.
    pub start_s: u64,
    /// How long it took, ns.
    pub duration_ns: u64,
    /// Samples a second a thread that was running (0 where that means nothing).
    pub frequency_hz: u64,
    /// How many processes and threads were seen.
    pub processes: u32,
    /// How many threads were seen.
    pub threads: u32,
    /// Samples that fell in user code of a known module.
    pub samples: u64,
    /// Samples in user code that belongs to no file (JIT regions, vDSO).
    pub outside: u64,
    /// Samples in the kernel, where the sampler can tell; user samples are what counts.
    pub kernel: u64,
    /// Samples that dyni's own code cache took, by then resolved to the original address or not.
    pub in_cache: u64,
    /// Samples that were lost by the ring buffer.
    pub lost: u64,
    /// By module, sorted by build-id, each once.
    pub modules: Vec<ModuleProfile>,
}

/// The most modules a profile or plan may have.
pub const MAX_MODULES: usize = 4096;
/// The longest string in a profile or plan, in bytes.
pub const MAX_STRING: usize = 4096;
/// The most rows of any table in a profile.
pub const MAX_ROWS: usize = 1 << 24;

pub(crate) fn check(ok: bool, what: &str, name: &str) -> Result<(), Invalid> {
    if ok {
        return Ok(());
    }
    // The name may be what is wrong: a message is read on a terminal, so it takes neither a megabyte nor an escape code.
    let name: String = name.chars().take(80).flat_map(char::escape_debug).collect();
    Err(Invalid(format!("{name}: {what}")))
}

fn strictly_rising<T: PartialOrd>(items: impl Iterator<Item = T> + Clone) -> bool {
    items.clone().zip(items.skip(1)).all(|(a, b)| a < b)
}

impl ModuleProfile {
    fn validate(&self) -> Result<(), Invalid> {
        let n = self.name.as_str();
        check(
            !self.build_id.0.is_empty() && self.build_id.0.len() <= crate::build_id::MAX_BUILD_ID,
            "bad build-id",
            n,
        )?;
        check(n.len() <= MAX_STRING && self.path.len() <= MAX_STRING, "a string is too long", n)?;
        let s = &self.samples;
        check(s.addr.len() == s.count.len() && s.addr.len() <= MAX_ROWS, "sample columns differ in length", n)?;
        check(strictly_rising(s.addr.iter()), "samples are not sorted", n)?;
        check(s.count.iter().all(|&c| c > 0), "a sample count is zero", n)?;
        let b = &self.branches;
        let rows = b.from.len();
        check(
            b.to.len() == rows && b.count.len() == rows && b.mispredicted.len() == rows && rows <= MAX_ROWS,
            "branch columns differ in length",
            n,
        )?;
        check(strictly_rising(b.from.iter().zip(&b.to)), "branches are not sorted", n)?;
        check(b.count.iter().all(|&c| c > 0), "a branch count is zero", n)?;
        let r = &self.ranges;
        let rows = r.start.len();
        check(r.end.len() == rows && r.count.len() == rows && rows <= MAX_ROWS, "range columns differ in length", n)?;
        check(strictly_rising(r.start.iter().zip(&r.end)), "ranges are not sorted", n)?;
        check(r.start.iter().zip(&r.end).all(|(s, e)| s <= e), "a range ends before it starts", n)?;
        let f = &self.functions;
        let rows = f.start.len();
        check(
            f.size.len() == rows && f.hash.len() == rows && rows <= MAX_ROWS,
            "function columns differ in length",
            n,
        )?;
        check(strictly_rising(f.start.iter()), "functions are not sorted", n)?;
        let mut ends = f.start.iter().zip(&f.size).map(|(&start, &size)| start.checked_add(u64::from(size)));
        check(ends.all(|end| end.is_some()), "a function wraps around", n)?;
        self.shapes.validate(&self.functions, n)
    }
}

impl Profile {
    /// Checks what every reader may rely on: columns of equal length, sorted tables, bounded strings.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn validate(&self) -> Result<(), Invalid> {
        check(self.modules.len() <= MAX_MODULES, "too many modules", &self.program)?;
        for text in [&self.program, &self.label, &self.method_note, &self.host.cpu, &self.host.kernel] {
            check(text.len() <= MAX_STRING, "a string is too long", "profile")?;
        }
        check(strictly_rising(self.modules.iter().map(|m| &m.build_id)), "modules are not sorted", &self.program)?;
        self.modules.iter().try_for_each(ModuleProfile::validate)
    }

    /// What was observed in the module with this identity.
    #[must_use]
    pub fn module(&self, id: &BuildId) -> Option<&ModuleProfile> {
        self.modules.binary_search_by(|m| m.build_id.cmp(id)).ok().map(|i| &self.modules[i])
    }
}
