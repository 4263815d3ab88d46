//! What is to be done: decisions, never machine code.
//!
//! A plan names blocks by their offset in a function and says in which order they are to lie. The host that applies it
//! finds the function in its own copy of the binary, checks the hash, makes its own control-flow graph and refuses what
//! does not fit. So a wrong, stale or hostile plan can make code slow, never wrong.

pub(crate) mod v1;

use crate::profile::{MAX_MODULES, MAX_STRING, check};
use crate::{BuildId, FunctionHash, Invalid, LinkAddr};
use rkyv::{Archive, Deserialize, Serialize};

/// What the generation that a plan makes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub enum PlanKind {
    /// Better placed code.
    Layout,
    /// Copies that count their edges.
    Counting,
}

/// The decisions for one function (one FDE: a GCC `.cold` part is a function of its own).
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FunctionPlan {
    /// The first byte, a link address.
    pub start: u64,
    /// Length in bytes.
    pub size: u32,
    /// The hash that the function must have.
    pub hash: FunctionHash,
    /// The blocks to copy in their new order, each as the offset in bytes of its first instruction from `start`. The
    /// first is 0, the entry. A block that is not listed stays in the original: an edge to it is an escape.
    pub blocks: Vec<u32>,
    /// How many of `blocks`, from the front, are hot; the others are placed at the far end of the cache.
    pub hot: u32,
    /// Blocks of `blocks` whose originals are patched to jump to their copy, besides the entry: loop headers (so that
    /// code that never returns is caught) and targets of indirect jumps (so that an escape comes back). Sorted offsets.
    pub entries: Vec<u32>,
    /// Blocks of `blocks` whose executions are counted: in a layout plan at most a few, by which it is measured whether
    /// the plan pays. Sorted offsets.
    pub probes: Vec<u32>,
    /// Calls and jumps at the function's end through pointers. In a layout plan, what each mostly goes to: the copy compares
    /// the pointer with that function and calls its copy. In a counting plan, sites whose targets are recorded. By rising
    /// site.
    pub calls: Vec<CallSite>,
    /// How hot: the execution count (or samples) of the whole function. Decides who goes first when room runs out.
    pub weight: u64,
}

/// A call, or a jump at a function's end, through a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CallSite {
    /// The instruction, as the offset in bytes from the function's first.
    pub at: u32,
    /// The first byte of the function that it is to be compared with, a link address of the same module; in a counting plan
    /// 0.
    pub callee: u64,
}

/// The decisions for one module.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct ModulePlan {
    /// Which file.
    pub build_id: BuildId,
    /// Its base name, for people.
    pub name: String,
    /// Functions in the order in which their hot parts are to lie.
    pub functions: Vec<FunctionPlan>,
}

/// A plan for a program: one per (profile, binaries, passes), byte-identical wherever it is made.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Plan {
    /// The program's name.
    pub program: String,
    /// What it is for.
    pub kind: PlanKind,
    /// The passes that made it, in the order in which they ran.
    pub passes: Vec<String>,
    /// BLAKE3 of the profile's sealed bytes that it was made from; zero if none.
    pub profile: [u8; 32],
    /// By module, sorted by build-id, each once.
    pub modules: Vec<ModulePlan>,
}

/// The most functions in a module's plan.
pub const MAX_FUNCTIONS: usize = 1 << 20;
/// The most blocks in a function's plan.
pub const MAX_BLOCKS: usize = 1 << 20;

impl FunctionPlan {
    /// The first byte's link address.
    #[must_use]
    pub fn start(&self) -> LinkAddr {
        LinkAddr(self.start)
    }

    fn validate(&self, n: &str) -> Result<(), Invalid> {
        check(self.blocks.first() == Some(&0), "the first block is not the entry", n)?;
        check(self.blocks.len() <= MAX_BLOCKS, "too many blocks", n)?;
        check(self.hot as usize <= self.blocks.len() && self.hot > 0, "more hot blocks than blocks", n)?;
        check(self.blocks.iter().all(|&b| b < self.size), "a block lies outside its function", n)?;
        let mut sorted = self.blocks.clone();
        sorted.sort_unstable();
        check(sorted.windows(2).all(|w| w[0] < w[1]), "a block is listed twice", n)?;
        check(self.entries.windows(2).all(|w| w[0] < w[1]), "entries are not sorted", n)?;
        check(self.entries.iter().all(|e| sorted.binary_search(e).is_ok()), "an entry is not a copied block", n)?;
        check(self.probes.windows(2).all(|w| w[0] < w[1]), "probes are not sorted", n)?;
        check(self.probes.iter().all(|p| sorted.binary_search(p).is_ok()), "a probe is not in a copied block", n)?;
        check(self.calls.windows(2).all(|w| w[0].at < w[1].at), "call sites are not sorted", n)?;
        check(self.calls.iter().all(|c| c.at < self.size), "a call site lies outside its function", n)?;
        check(self.start.checked_add(u64::from(self.size)).is_some(), "a function wraps around", n)
    }
}

impl Plan {
    /// Checks what every reader may rely on.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn validate(&self) -> Result<(), Invalid> {
        check(self.program.len() <= MAX_STRING, "a string is too long", "plan")?;
        check(self.passes.len() <= 64 && self.passes.iter().all(|p| p.len() <= MAX_STRING), "bad pass list", "plan")?;
        check(self.modules.len() <= MAX_MODULES, "too many modules", &self.program)?;
        check(self.modules.windows(2).all(|w| w[0].build_id < w[1].build_id), "modules are not sorted", &self.program)?;
        for m in &self.modules {
            let n = m.name.as_str();
            check(!m.build_id.0.is_empty() && m.build_id.0.len() <= crate::build_id::MAX_BUILD_ID, "bad build-id", n)?;
            check(n.len() <= MAX_STRING, "a string is too long", "plan")?;
            check(m.functions.len() <= MAX_FUNCTIONS, "too many functions", n)?;
            let mut spans: Vec<_> = m.functions.iter().map(|f| (f.start, u64::from(f.size))).collect();
            spans.sort_unstable();
            m.functions.iter().try_for_each(|f| f.validate(n))?;
            check(spans.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "two functions overlap", n)?;
        }
        Ok(())
    }

    /// How many functions it names, over all modules.
    #[must_use]
    pub fn function_count(&self) -> usize {
        self.modules.iter().map(|m| m.functions.len()).sum()
    }
}
