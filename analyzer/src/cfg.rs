//! The control-flow graph of one function, recovered from its bytes.
//!
//! What is not understood is left out: an edge to it is an escape to the original code, which is always correct. So the
//! graph need not be complete, but what is in it must be right: every block is a run of instructions that the processor
//! executes as they stand here.

mod build;

use crate::image::Image;
use dyni_schema::LinkAddr;

pub use build::{MAX_FUNCTION, build};

/// How a basic block ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminator {
    /// No branch: execution runs on into the instruction at [`Block::end`].
    FallThrough,
    /// A conditional branch (`jcc`, `loop*`, `jrcxz`) to `taken`, else on to [`Block::end`].
    Conditional {
        /// Where it goes when the condition holds, in this function or anywhere else.
        taken: LinkAddr,
    },
    /// A direct jump, in this function or anywhere else (a tail call).
    Jump {
        /// Where it goes.
        target: LinkAddr,
    },
    /// An indirect jump. `table` is an index into [`Cfg::jump_tables`] if its targets are known.
    Indirect {
        /// The recognised jump table, if any.
        table: Option<u32>,
    },
    /// `ret`, `iretq`, `ud2`, `hlt`: execution does not go on here.
    Stop,
}

/// A basic block: instructions from `start` to `end`, entered only at the start, left only at the end. A call does not
/// end a block, except a call that must be made from the original (see [`Block::keep_original`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The first instruction's address.
    pub start: LinkAddr,
    /// The address after the last instruction.
    pub end: LinkAddr,
    /// The address of the last instruction.
    pub last: LinkAddr,
    /// How it ends.
    pub terminator: Terminator,
    /// Successors inside the function as block indices (into [`Cfg::blocks`]): for a conditional the taken one, then the
    /// fall-through; for a recognised jump table its distinct targets, ascending. Edges that leave the function are not here.
    pub successors: Vec<u32>,
    /// Never to be copied, and why: a call whose callee looks at its return address, `call next` and its like.
    pub keep_original: Option<KeepOriginal>,
    /// Has a call (direct or indirect).
    pub calls: bool,
    /// Is entered by an indirect jump or by code elsewhere (jump-table target, label whose address is taken, landing pad).
    pub address_taken: bool,
}

/// Why one block must stay in the original code (an escape to it is always correct).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeepOriginal {
    /// It calls a function that finds its caller by the return address (`dlopen`, `dlsym`, `mcount`, …).
    CallerIsObserved,
    /// It calls into this very function at another place than the entry: `call next; pop` reads its own address.
    ReadsOwnAddress,
    /// It is a landing pad of an exception: the unwinder enters the original.
    LandingPad,
    /// It has an instruction whose copy would not be state-equivalent (`xbegin`, `fnstenv`, …).
    Instruction,
}

/// Why a whole function is not optimised. Shown to users: `dyni analyze --explain`, `dyni doctor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GiveUp {
    /// Bytes that are not an instruction on a path from the entry.
    BadInstruction,
    /// An instruction runs over the function's end, or two paths disagree on where instructions begin.
    OverlappingInstructions,
    /// Shorter than the five bytes of an entry patch.
    TooSmall,
    /// An interior label is known elsewhere though the function has no indirect jump: somebody may compare PCs with it.
    InteriorLabelObserved,
    /// It writes to, or lies in, text that the program rewrites.
    SelfModifying,
    /// It may be on the stack of a C++ throw, and unwind data can't be registered yet.
    MayUnwind,
    /// It belongs to a runtime that keeps tables keyed by return address (Go, OCaml, …).
    Runtime,
    /// Named by an rseq critical section.
    Rseq,
    /// Larger than the analyzer's limit.
    TooLarge,
}

impl GiveUp {
    /// Every reason, for tables and documentation.
    pub const ALL: [Self; 9] = [
        Self::BadInstruction,
        Self::OverlappingInstructions,
        Self::TooSmall,
        Self::InteriorLabelObserved,
        Self::SelfModifying,
        Self::MayUnwind,
        Self::Runtime,
        Self::Rseq,
        Self::TooLarge,
    ];

    /// One line for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::BadInstruction => "has bytes that are not an instruction",
            Self::OverlappingInstructions => "has overlapping instructions",
            Self::TooSmall => "is shorter than an entry patch (5 bytes)",
            Self::InteriorLabelObserved => "has an interior label that other code knows",
            Self::SelfModifying => "is rewritten by the program itself",
            Self::MayUnwind => "may be on the stack of a C++ throw (unwind data not registered)",
            Self::Runtime => "belongs to a runtime with tables keyed by return address",
            Self::Rseq => "is named by an rseq critical section",
            Self::TooLarge => "is larger than the analyzer's limit",
        }
    }
}

/// A recognised jump table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JumpTable {
    /// Where the table lies.
    pub address: LinkAddr,
    /// `true`: 8-byte absolute entries; `false`: 4-byte offsets from the table's own address (PIC).
    pub absolute: bool,
    /// The targets in table order: block starts of this function, or (a GCC `.cold` part, an entry that is never used)
    /// addresses that are not, to which the jump escapes.
    pub targets: Vec<LinkAddr>,
    /// Its length is what the code checks the index against, and the program can't write into it. Otherwise it was read
    /// until an entry made no sense: it may have more entries than the code's table, or fewer, or change.
    pub exact: bool,
}

impl JumpTable {
    /// Its bytes in the file; addresses in it as link addresses.
    #[must_use]
    pub fn bytes(&self, image: &Image) -> Option<Vec<u8>> {
        if !self.absolute {
            return image.bytes(self.address, self.targets.len() * 4).map(<[u8]>::to_vec);
        }
        let slots = (0..self.targets.len() as u64).map(|i| image.pointer_at(self.address.plus(8 * i)));
        Some(slots.collect::<Option<Vec<_>>>()?.iter().flat_map(|to| to.0.to_le_bytes()).collect())
    }
}

/// The control-flow graph of one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cfg {
    /// The first byte.
    pub start: LinkAddr,
    /// The byte after the last.
    pub end: LinkAddr,
    /// Blocks by rising address; the entry is the first. Bytes that no path reaches belong to no block.
    pub blocks: Vec<Block>,
    /// The recognised jump tables.
    pub jump_tables: Vec<JumpTable>,
}

impl Cfg {
    /// The block that starts at this address.
    #[must_use]
    pub fn block_at(&self, start: LinkAddr) -> Option<usize> {
        self.blocks.binary_search_by_key(&start, |b| b.start).ok()
    }

    /// Parts the block that holds this instruction boundary there, if it is inside one: the first part runs on into the
    /// second.
    pub fn part(&mut self, at: LinkAddr, last_before: LinkAddr) {
        let Some(index) = self.block_holding(at).filter(|&i| self.blocks[i].start < at) else { return };
        let whole = &mut self.blocks[index];
        let mut rest = whole.clone();
        (rest.start, rest.address_taken) = (at, false);
        (whole.end, whole.last, whole.terminator) = (at, last_before, Terminator::FallThrough);
        whole.successors = vec![index as u32 + 1];
        self.blocks.insert(index + 1, rest);
        for (i, block) in self.blocks.iter_mut().enumerate() {
            let moved = |s: &mut u32| *s += u32::from(*s as usize > index);
            if i != index {
                block.successors.iter_mut().for_each(moved);
            }
        }
    }

    /// The block that holds the byte at this address.
    #[must_use]
    pub fn block_holding(&self, at: LinkAddr) -> Option<usize> {
        let i = self.blocks.partition_point(|b| b.start <= at).checked_sub(1)?;
        (at < self.blocks[i].end).then_some(i)
    }
}
