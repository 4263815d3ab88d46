//! Builds the graph: follow every path from the entry, then from what jump tables and labels lead to.
//!
//! Paths from the entry must make sense or the function is given up. All else (table entries, labels whose address is
//! taken, what follows a call, which may never return) is *weak*: if it makes no sense it is left out.

use super::{Block, Cfg, GiveUp, JumpTable, KeepOriginal, Terminator};
use crate::functions::{Function, Functions};
use crate::image::Image;
use crate::jump_tables::{self, Code};
use crate::refuse;
use crate::targets::{PATCH, TargetIndex, is_trap};
use dyni_schema::LinkAddr;
use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};
use std::collections::{BTreeMap, HashMap};

/// The largest function that is analysed, in bytes.
pub const MAX_FUNCTION: u32 = 1 << 20;
/// How often the search for jump tables is repeated: a table's targets may lead to further tables.
const MAX_ROUNDS: usize = 64;

/// An instruction starts at this byte.
const START: u8 = 1;
/// The byte is inside an instruction, not its first.
const INSIDE: u8 = 2;
/// A block starts here.
const LEADER: u8 = 4;
/// Something else than this function's direct branches may come here.
const TAKEN: u8 = 8;
/// A landing pad.
const LANDING: u8 = 16;
/// The instruction is a call.
const CALL: u8 = 32;
/// An indirect jump through a register or an index, not through a fixed GOT slot.
const COMPUTED: u8 = 64;

/// Recovers the control-flow graph of `f`.
///
/// # Errors
/// Why the function is not to be optimised.
pub fn build(image: &Image, functions: &Functions, targets: &TargetIndex, f: &Function) -> Result<Cfg, GiveUp> {
    if u64::from(f.size) < PATCH {
        return Err(GiveUp::TooSmall);
    }
    if f.size > MAX_FUNCTION {
        return Err(GiveUp::TooLarge);
    }
    if targets.is_rseq(f.start) {
        return Err(GiveUp::Rseq);
    }
    let bytes = image.bytes(f.start, f.size as usize).ok_or(GiveUp::BadInstruction)?;
    let mut b = Builder {
        image,
        functions,
        targets,
        f,
        bytes,
        flags: vec![0; bytes.len()],
        len: vec![0; bytes.len()],
        ends: BTreeMap::new(),
        keep: BTreeMap::new(),
        work: vec![(0, false)],
        tables: Vec::new(),
    };
    b.explore()?;
    b.resolve_tables()?;
    let labels = targets.labels_in(f);
    for pad in functions.landing_pads_in(f.start..f.end()) {
        b.seed(pad, TAKEN | LANDING)?;
    }
    for &label in &labels {
        b.seed(label, TAKEN)?;
    }
    b.resolve_tables()?;
    if b.has_unresolved() {
        for entry in targets.table_entries_in(f) {
            b.seed(entry, TAKEN)?;
        }
        b.resolve_tables()?;
    }
    if !b.flags.iter().any(|x| x & COMPUTED != 0) {
        let compared = |&a: &LinkAddr| {
            let flags = b.flags[(a.0 - f.start.0) as usize];
            targets.is_observed(a) && flags & START != 0 && flags & LANDING == 0
        };
        if labels.iter().any(compared) {
            return Err(GiveUp::InteriorLabelObserved);
        }
    }
    let blocks = b.blocks();
    Ok(Cfg { start: f.start, end: f.end(), blocks, jump_tables: b.tables })
}

struct Builder<'a> {
    image: &'a Image,
    functions: &'a Functions,
    targets: &'a TargetIndex,
    f: &'a Function,
    bytes: &'a [u8],
    /// What is known of each byte.
    flags: Vec<u8>,
    /// The length of the instruction that starts at each byte; 0 if none is known to.
    len: Vec<u8>,
    /// Instructions that end a block, by offset.
    ends: BTreeMap<u32, Terminator>,
    /// Instructions whose block must stay in the original, by offset.
    keep: BTreeMap<u32, KeepOriginal>,
    /// Offsets to follow, and whether they are weak.
    work: Vec<(u32, bool)>,
    tables: Vec<JumpTable>,
}

/// An instruction of a run that is not yet known to make sense as a whole.
struct Step {
    at: u32,
    len: u8,
    flags: u8,
    end: Option<Terminator>,
    keep: Option<KeepOriginal>,
    target: Option<u32>,
}

impl Builder<'_> {
    /// An address as an offset into the function, if it lies in it.
    fn inside(&self, at: LinkAddr) -> Option<u32> {
        self.f.contains(at).then(|| (at.0 - self.f.start.0) as u32)
    }

    /// Follows a weak path from an address, and marks it if it made sense.
    fn seed(&mut self, at: LinkAddr, mark: u8) -> Result<(), GiveUp> {
        let Some(offset) = self.inside(at) else { return Ok(()) };
        self.work.push((offset, true));
        self.explore()?;
        if self.flags[offset as usize] & START != 0 {
            self.flags[offset as usize] |= mark | LEADER;
        }
        Ok(())
    }

    fn explore(&mut self) -> Result<(), GiveUp> {
        while let Some((at, weak)) = self.work.pop() {
            let flags = self.flags[at as usize];
            if flags & START != 0 {
                self.flags[at as usize] |= LEADER;
                continue;
            }
            let mut steps = Vec::new();
            let mut weak = weak;
            if let Err(reason) = self.run(at, &mut steps) {
                // What follows a call may be data, if the call never returns.
                match steps.iter().rposition(|s| s.flags & CALL != 0) {
                    Some(call) => steps.truncate(call + 1),
                    None if weak => continue,
                    None => return Err(reason),
                }
            } else if steps.is_empty() {
                continue;
            }
            self.flags[at as usize] |= LEADER;
            for s in steps {
                let next = s.at + u32::from(s.len);
                self.flags[s.at as usize] |= START | s.flags;
                self.len[s.at as usize] = s.len;
                self.flags[s.at as usize + 1..next as usize].fill(INSIDE);
                if let Some(end) = s.end {
                    self.ends.insert(s.at, end);
                }
                if let Some(keep) = s.keep {
                    // As little as possible stays behind: the instruction gets a block of its own.
                    self.keep.insert(s.at, keep);
                    self.flags[s.at as usize] |= LEADER;
                    if let Some(flags) = self.flags.get_mut(next as usize) {
                        *flags |= LEADER;
                    }
                }
                // What follows a call is no longer a path that must make sense.
                weak |= s.flags & CALL != 0;
                if let Some(target) = s.target {
                    self.work.push((target, weak));
                }
                if matches!(s.end, Some(Terminator::Conditional { .. })) && next < self.f.size {
                    self.work.push((next, weak));
                }
            }
        }
        Ok(())
    }

    /// Decodes from `at` to where execution does not fall through, or meets what is known already.
    fn run(&self, at: u32, steps: &mut Vec<Step>) -> Result<(), GiveUp> {
        let start = self.f.start.0;
        let mut decoder = Decoder::with_ip(64, &self.bytes[at as usize..], start + u64::from(at), DecoderOptions::NONE);
        let mut instr = Instruction::default();
        while decoder.can_decode() {
            let here = at + decoder.position() as u32;
            let flags = self.flags[here as usize];
            if flags & START != 0 {
                return Ok(());
            }
            if flags & INSIDE != 0 {
                return Err(GiveUp::OverlappingInstructions);
            }
            decoder.decode_out(&mut instr);
            if instr.is_invalid() {
                let cut = decoder.last_error() == DecoderError::NoMoreBytes;
                return Err(if cut { GiveUp::OverlappingInstructions } else { GiveUp::BadInstruction });
            }
            let range = here as usize..here as usize + instr.len();
            if self.flags[range].iter().any(|f| f & (START | INSIDE) != 0) {
                return Err(GiveUp::OverlappingInstructions);
            }
            let step = self.step(&instr, here);
            let ends = step.end.is_some();
            steps.push(step);
            if ends {
                return Ok(());
            }
        }
        Ok(())
    }

    fn step(&self, instr: &Instruction, at: u32) -> Step {
        let mut s = Step { at, len: instr.len() as u8, flags: 0, end: None, keep: None, target: None };
        let near =
            (instr.op_count() > 0 && instr.op0_kind() == OpKind::NearBranch64).then(|| LinkAddr(instr.near_branch64()));
        if must_stay(instr) {
            s.keep = Some(KeepOriginal::Instruction);
        }
        match instr.flow_control() {
            FlowControl::Next => {
                if instr.mnemonic() == Mnemonic::Hlt {
                    s.end = Some(Terminator::Stop);
                }
            }
            FlowControl::UnconditionalBranch => {
                s.end = Some(near.map_or(Terminator::Stop, |target| Terminator::Jump { target }));
            }
            FlowControl::ConditionalBranch => {
                s.end = near.map(|taken| Terminator::Conditional { taken });
            }
            FlowControl::XbeginXabortXend => {
                // The fallback of `xbegin` is entered from the original, where the instruction stays.
                s.end = near.map(|taken| Terminator::Conditional { taken });
            }
            FlowControl::IndirectBranch => {
                s.end = Some(Terminator::Indirect { table: None });
                if !instr.is_ip_rel_memory_operand() {
                    s.flags |= COMPUTED;
                }
            }
            FlowControl::Return | FlowControl::Exception => s.end = Some(Terminator::Stop),
            FlowControl::Call | FlowControl::IndirectCall => {
                if !is_trap(instr) {
                    s.flags |= CALL;
                }
            }
            FlowControl::Interrupt => {}
        }
        let leaves = matches!(
            instr.flow_control(),
            FlowControl::Call
                | FlowControl::IndirectCall
                | FlowControl::UnconditionalBranch
                | FlowControl::ConditionalBranch
                | FlowControl::IndirectBranch
        );
        if leaves && self.caller_is_observed(instr, near) {
            s.keep = Some(KeepOriginal::CallerIsObserved);
        }
        if let Some(offset) = near.and_then(|t| self.inside(t)) {
            if s.flags & CALL == 0 {
                s.target = Some(offset);
            } else if offset != 0 {
                s.keep = Some(KeepOriginal::ReadsOwnAddress);
                s.target = Some(offset);
            }
        }
        s
    }

    /// Whether a call or jump leads to a function that looks at its return address.
    fn caller_is_observed(&self, instr: &Instruction, near: Option<LinkAddr>) -> bool {
        let slot = match near {
            Some(target) if self.f.contains(target) && target != self.f.start => return false,
            Some(target) if self.targets.observes_caller(target) => return true,
            Some(target) => self.image.plt_slot(target),
            None => instr.is_ip_rel_memory_operand().then(|| LinkAddr(instr.ip_rel_memory_address())),
        };
        slot.is_some_and(|s| {
            self.image.got_name(s).is_some_and(refuse::observes_caller)
                || self.image.pointer_at(s).is_some_and(|t| self.targets.observes_caller(t))
        })
    }

    fn has_unresolved(&self) -> bool {
        let open = |(&at, end): (&u32, &Terminator)| {
            *end == Terminator::Indirect { table: None } && self.flags[at as usize] & COMPUTED != 0
        };
        self.ends.iter().any(open)
    }

    /// Looks for jump tables until nothing new is found. Each round looks at every jump anew, on the graph that the last
    /// round's tables make, so that the tables that remain are those that the finished graph supports.
    fn resolve_tables(&mut self) -> Result<(), GiveUp> {
        if !self.flags.iter().any(|f| f & COMPUTED != 0) {
            return Ok(());
        }
        for _ in 0..MAX_ROUNDS {
            let blocks = self.blocks();
            let code = Code::new(self.image, self.targets, &blocks);
            let plausible = |t: LinkAddr| self.inside(t).is_some_and(|o| self.flags[o as usize] & INSIDE == 0);
            let elsewhere = |t: LinkAddr| !self.f.contains(t) && self.functions.at(t).is_some();
            let jumps = self.ends.iter().filter(|&(&at, end)| {
                matches!(end, Terminator::Indirect { .. }) && self.flags[at as usize] & COMPUTED != 0
            });
            let mut tables: Vec<JumpTable> = Vec::new();
            let mut ends = Vec::new();
            let mut index: HashMap<LinkAddr, Vec<u32>> = HashMap::new();
            for (&at, _) in jumps {
                let found = jump_tables::recognise(&code, self.f.start.plus(u64::from(at)), &plausible, &elsewhere);
                let table = found.map(|t| {
                    // Many jumps may share one table.
                    let same = index.entry(t.address).or_default();
                    same.iter().copied().find(|&i| tables[i as usize] == t).unwrap_or_else(|| {
                        tables.push(t);
                        same.push(tables.len() as u32 - 1);
                        tables.len() as u32 - 1
                    })
                });
                ends.push((at, table));
            }
            for (at, table) in ends {
                self.ends.insert(at, Terminator::Indirect { table });
            }
            let mut new = tables != self.tables;
            self.tables = tables;
            let mut seeds: Vec<u32> =
                self.tables.iter().flat_map(|t| &t.targets).filter_map(|&t| self.inside(t)).collect();
            seeds.sort_unstable();
            seeds.dedup();
            for offset in seeds {
                let before = self.flags[offset as usize];
                self.seed(self.f.start.plus(u64::from(offset)), TAKEN)?;
                new |= self.flags[offset as usize] & LEADER != before & LEADER;
            }
            if !new {
                return Ok(());
            }
        }
        // A function whose tables don't settle: its jumps escape.
        self.tables.clear();
        for end in self.ends.values_mut() {
            if matches!(end, Terminator::Indirect { .. }) {
                *end = Terminator::Indirect { table: None };
            }
        }
        Ok(())
    }

    /// The blocks that the instructions found so far make.
    fn blocks(&self) -> Vec<Block> {
        let address = |o: u32| self.f.start.plus(u64::from(o));
        let mut blocks: Vec<Block> = Vec::new();
        let mut open = false;
        let mut at = 0u32;
        while at < self.f.size {
            let flags = self.flags[at as usize];
            if flags & START == 0 {
                open = false;
                at += 1;
                continue;
            }
            let next = at + u32::from(self.len[at as usize]);
            if flags & LEADER != 0 || !open {
                blocks.push(Block {
                    start: address(at),
                    end: address(next),
                    last: address(at),
                    terminator: Terminator::FallThrough,
                    successors: Vec::new(),
                    keep_original: (flags & LANDING != 0).then_some(KeepOriginal::LandingPad),
                    calls: false,
                    address_taken: flags & TAKEN != 0,
                });
            }
            open = true;
            let block = blocks.last_mut().expect("a block was just opened");
            block.end = address(next);
            block.last = address(at);
            block.calls |= flags & CALL != 0;
            if let Some(&keep) = self.keep.get(&at) {
                block.keep_original = block.keep_original.or(Some(keep));
            }
            if let Some(&end) = self.ends.get(&at) {
                block.terminator = end;
                open = false;
            }
            at = next;
        }
        self.connect(&mut blocks);
        blocks
    }

    fn connect(&self, blocks: &mut [Block]) {
        let starts: Vec<LinkAddr> = blocks.iter().map(|b| b.start).collect();
        let find = |a: LinkAddr| starts.binary_search(&a).ok().map(|i| i as u32);
        let mut entered = Vec::new();
        for block in blocks.iter_mut() {
            block.successors = match block.terminator {
                Terminator::FallThrough => find(block.end).into_iter().collect(),
                Terminator::Conditional { taken } => find(taken).into_iter().chain(find(block.end)).collect(),
                Terminator::Jump { target } => find(target).into_iter().collect(),
                Terminator::Indirect { table: Some(t) } => {
                    let targets = self.tables.get(t as usize).map_or(&[][..], |t| &t.targets);
                    let mut all: Vec<u32> = targets.iter().filter_map(|&a| find(a)).collect();
                    all.sort_unstable();
                    all.dedup();
                    all
                }
                Terminator::Indirect { table: None } | Terminator::Stop => Vec::new(),
            };
            // A call into the function itself enters what it calls.
            if block.keep_original == Some(KeepOriginal::ReadsOwnAddress) {
                let offset = (block.last.0 - self.f.start.0) as usize;
                let instr = Decoder::with_ip(64, &self.bytes[offset..], block.last.0, DecoderOptions::NONE).decode();
                entered.extend(find(LinkAddr(instr.near_branch64())));
            }
        }
        for i in entered {
            blocks[i as usize].address_taken = true;
        }
    }
}

/// Whether a copy of this instruction would not do the same: it stores or depends on its own address, changes how code is
/// executed, or is looked at by a handler that knows its address.
fn must_stay(instr: &Instruction) -> bool {
    use Mnemonic as M;
    let far = instr.is_call_far() || instr.is_call_far_indirect() || instr.is_jmp_far() || instr.is_jmp_far_indirect();
    let trap = is_trap(instr) && instr.mnemonic() != M::Syscall;
    far || trap
        || matches!(
            instr.mnemonic(),
            M::Xbegin
                | M::Xabort
                | M::Xend
                | M::Fnstenv
                | M::Fstenv
                | M::Fnsave
                | M::Fsave
                | M::Iret
                | M::Iretd
                | M::Iretq
                | M::Retf
                | M::Sysexit
                | M::Sysexitq
                | M::Sysret
                | M::Sysretq
                | M::Uiret
                | M::Enclu
        )
}
