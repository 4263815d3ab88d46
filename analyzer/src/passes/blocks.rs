//! One function on its way through the passes.

use crate::cfg::{Block, Cfg, Terminator};
use crate::exttsp::JumpKind;
use crate::functions::Function;
use crate::image::Image;
use crate::infer::{Flow, Quality};
use crate::probes;
use dyni_schema::{CallSite, LinkAddr};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

/// What a block holds.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BlockInfo {
    /// How many instructions.
    pub instructions: u32,
    /// Its direct calls: distance in bytes from the block's start, and the callee.
    pub calls: Vec<(u32, LinkAddr)>,
    /// It ends where execution can't go on (`ud2`, `hlt`, a call that does not return): code that runs when a program fails.
    pub fails: bool,
}

/// An edge inside the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// The source, an index into [`Cfg::blocks`].
    pub from: u32,
    /// The destination, an index into [`Cfg::blocks`].
    pub to: u32,
    /// What makes it.
    pub kind: JumpKind,
    /// It runs on into the next instruction in the original.
    pub fall_through: bool,
}

/// A function, what was seen in it, and what the passes decided so far.
#[derive(Clone, Debug)]
pub struct FunctionLayout {
    /// The function.
    pub function: Function,
    /// Its blocks.
    pub cfg: Cfg,
    /// By block: what it holds.
    pub info: Vec<BlockInfo>,
    /// The edges between its blocks, each pair once, by source.
    pub edges: Vec<Edge>,
    /// By block: samples that hit it, as they were taken.
    pub samples: Vec<u64>,
    /// Evidence of how hot the whole function is: samples, or branches where there are none.
    pub weight: u64,
    /// Counts for blocks and edges.
    pub flow: Flow,
    /// How many units of count, times instructions, stand for one sample; 0 if counts are exact and zero means never.
    pub units_per_sample: u64,
    /// The blocks to copy in their new order, indices into [`Cfg::blocks`]; the entry first.
    pub order: Vec<u32>,
    /// How many of `order`, from the front, are hot.
    pub hot: usize,
    /// Blocks to be patched besides the entry, ascending.
    pub entries: Vec<u32>,
    /// Blocks to be counted, ascending.
    pub probes: Vec<u32>,
    /// Calls through pointers to be promoted, or whose targets are to be recorded, by rising site.
    pub calls: Vec<CallSite>,
    /// Where promoted calls part blocks: the block, and behind the call, as offsets in the function, rising.
    pub parts: Vec<(u32, u32)>,
    /// By block: whether it ends with a jump that goes through a table of the copies.
    pub cloned: Vec<bool>,
}

impl FunctionLayout {
    /// A function with its graph and no evidence yet: all copiable blocks in their original order, all of them hot.
    #[must_use]
    pub fn new(image: &Image, function: Function, cfg: Cfg) -> Self {
        let info = cfg.blocks.iter().map(|b| BlockInfo::read(image, b)).collect();
        let edges = edges(&cfg);
        let n = cfg.blocks.len();
        let flow = Flow {
            nodes: vec![0; n],
            edges: vec![0; edges.len()],
            entered: vec![0; n],
            left: vec![0; n],
            quality: Quality::Optimal,
        };
        let mut layout = Self {
            function,
            info,
            edges,
            samples: vec![0; n],
            weight: 0,
            flow,
            units_per_sample: 0,
            order: Vec::new(),
            hot: 0,
            entries: Vec::new(),
            probes: Vec::new(),
            calls: Vec::new(),
            parts: Vec::new(),
            cloned: vec![false; n],
            cfg,
        };
        layout.order = layout.reachable();
        layout.hot = layout.order.len();
        layout
    }

    /// The length of a block in bytes.
    #[must_use]
    pub fn size(&self, block: u32) -> u32 {
        let b = &self.cfg.blocks[block as usize];
        (b.end.0 - b.start.0) as u32
    }

    /// Where a block lies in the function, in bytes from its start.
    #[must_use]
    pub fn offset(&self, block: u32) -> u32 {
        (self.cfg.blocks[block as usize].start.0 - self.cfg.start.0) as u32
    }

    /// Whether there is a place in a block where a counter can be raised unseen.
    #[must_use]
    pub fn can_count(&self, image: &Image, block: u32) -> bool {
        let start = self.cfg.blocks[block as usize].start;
        let bytes = image.bytes(start, self.size(block) as usize);
        bytes.is_some_and(|bytes| probes::place(bytes, start).is_some())
    }

    /// Whether the entry itself must stay in the original, so that there is nothing to copy.
    #[must_use]
    pub fn entry_stays(&self) -> bool {
        self.cfg.blocks.first().is_none_or(|b| b.keep_original.is_some())
    }

    /// Bytes of the hot blocks.
    #[must_use]
    pub fn hot_bytes(&self) -> u64 {
        self.order[..self.hot].iter().map(|&b| u64::from(self.size(b))).sum()
    }

    /// The copiable blocks that the entry, or a block that is entered by address, reaches through copiable blocks;
    /// ascending. Others could never run in a copy.
    fn reachable(&self) -> Vec<u32> {
        let copiable = |b: usize| self.cfg.blocks[b].keep_original.is_none();
        let mut seen = vec![false; self.cfg.blocks.len()];
        let mut stack: Vec<usize> = Vec::new();
        for (b, block) in self.cfg.blocks.iter().enumerate() {
            if (b == 0 || block.address_taken) && copiable(b) {
                seen[b] = true;
                stack.push(b);
            }
        }
        while let Some(b) = stack.pop() {
            for &next in &self.cfg.blocks[b].successors {
                if copiable(next as usize) && !std::mem::replace(&mut seen[next as usize], true) {
                    stack.push(next as usize);
                }
            }
        }
        (0..seen.len() as u32).filter(|&b| seen[b as usize]).collect()
    }
}

impl BlockInfo {
    fn read(image: &Image, block: &Block) -> Self {
        let mut info = Self::default();
        let Some(bytes) = image.bytes(block.start, (block.end.0 - block.start.0) as usize) else { return info };
        let mut decoder = Decoder::with_ip(64, bytes, block.start.0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            info.instructions += 1;
            if instruction.flow_control() == FlowControl::Call && instruction.near_branch_target() != 0 {
                let at = (instruction.ip() - block.start.0) as u32;
                info.calls.push((at, LinkAddr(instruction.near_branch_target())));
            }
        }
        let calls = matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
        info.fails = match block.terminator {
            Terminator::Stop => {
                matches!(instruction.mnemonic(), Mnemonic::Ud2 | Mnemonic::Hlt | Mnemonic::Int3) || calls
            }
            Terminator::FallThrough => block.successors.is_empty(),
            _ => false,
        };
        info
    }
}

fn edges(cfg: &Cfg) -> Vec<Edge> {
    let mut edges = Vec::new();
    for (from, block) in cfg.blocks.iter().enumerate() {
        let mut to = block.successors.clone();
        to.sort_unstable();
        to.dedup();
        let (kind, runs_on) = match block.terminator {
            Terminator::Conditional { .. } => (JumpKind::Conditional, true),
            Terminator::FallThrough => (JumpKind::Unconditional, true),
            Terminator::Indirect { .. } => (JumpKind::Indirect, false),
            Terminator::Jump { .. } | Terminator::Stop => (JumpKind::Unconditional, false),
        };
        edges.extend(to.into_iter().map(|to| Edge {
            from: from as u32,
            to,
            kind,
            fall_through: runs_on && cfg.blocks[to as usize].start == block.end,
        }));
    }
    edges
}
