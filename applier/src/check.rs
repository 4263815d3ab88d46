//! The checker: proves every copied block against its original before it is installed, in release builds too.
//!
//! It shares no code with [`lower`](crate::lower) and trusts only two things: the original bytes, and the decoder. The
//! claim it proves, for every pair (original X, copy Y) of the block map: *execution from Y does what execution from X
//! does*. It walks the two side by side:
//!
//! - an instruction must have the same bytes, except that a RIP-relative displacement must denote the same address;
//! - a `nop` of the original may be missing in the copy;
//! - in a block that is counted, the copy raises that block's counter once, before an instruction at which what that
//!   changes is dead;
//! - where the original goes on at Z (a jump, either way of a branch, or the end of the block), the copy must go on at Z
//!   itself, or at the copy of Z that the block map names, with at most direct jumps between;
//! - a call must go to the same function, or to the copy of its entry;
//! - a shortcut must be one of those that the emission names, and what it says of the original must be so
//!   ([`crate::shortcuts`]): a stub is one, every entry of a table in the cache means the original's, and a promoted call
//!   goes to its function's copy after a comparison with that function, else to a copy of the plain call.
//!
//! What it takes for granted is that nobody looks at return addresses; which calls must stay in the original because
//! somebody does is the analyzer's to say (`KeepOriginal`), as it is how long a jump table is, that nobody writes to it, and
//! that nobody sees which one was read ([`dyni_analyzer::table_loads`]); and at which calls through pointers r11 and the
//! flags are dead ([`dyni_analyzer::calls`]).
//!
//! As every block of the map is proven and every edge ends in the map or in the original, the claim follows for whole
//! executions by induction on their length. Like regalloc2's checker, this verifies each result, not the algorithm.

mod shortcut;

use crate::lower::{CopiedBlock, CounterMap, Emission};
use crate::shortcuts::Shortcuts;
use dyni_schema::{CacheAddr, LinkAddr};
use iced_x86::{
    Code, ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register, RflagsBits,
};
use rayon::prelude::*;
use shortcut::is_stub;

/// Two places that mean the same: an instruction boundary of the original and one of the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// In the original.
    pub original: LinkAddr,
    /// In the copy.
    pub copy: CacheAddr,
    /// Where in the copy the instruction itself is: behind what raises a counter.
    pub instruction: CacheAddr,
}

/// A copy that is not its original. This is a bug in dyni: the whole module is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the copy at cache {copy} does not match the original at {original}: {what}")]
pub struct Mismatch {
    /// Where in the original.
    pub original: LinkAddr,
    /// Where in the cache.
    pub copy: CacheAddr,
    /// What is wrong.
    pub what: &'static str,
}

/// The original code of a module, as read from the live process.
pub trait Originals: Sync {
    /// The bytes from `at`, `len` of them.
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]>;
}

/// What the checker knows of a copy.
#[derive(Clone, Copy)]
struct Copies<'a> {
    code: &'a [u8],
    cache: LinkAddr,
    blocks: &'a [CopiedBlock],
    counters: &'a CounterMap,
    shortcuts: &'a Shortcuts,
}

/// What there is besides the code and the block map.
#[derive(Clone, Copy)]
pub struct Extras<'a> {
    /// What is counted.
    pub counters: &'a CounterMap,
    /// What copies go past.
    pub shortcuts: &'a Shortcuts,
}

impl<'a> From<&'a Emission> for Extras<'a> {
    fn from(emission: &'a Emission) -> Self {
        Self { counters: &emission.counters, shortcuts: &emission.shortcuts }
    }
}

impl Copies<'_> {
    /// The instruction of the copy at link address `at`.
    fn decode(&self, at: u64) -> Option<Instruction> {
        let offset = usize::try_from(LinkAddr(at).distance(self.cache)).ok()?;
        let bytes = self.code.get(offset..)?;
        let bytes = &bytes[..bytes.len().min(15)];
        let instruction = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Whether going to `to` means what going to the original's `original` means.
    fn means(&self, to: u64, original: u64) -> bool {
        let first = self.blocks.partition_point(|b| b.original.0 < original);
        let mut copies = self.blocks[first..].iter().take_while(|b| b.original.0 == original);
        to == original || copies.any(|b| self.cache.plus(b.copy.0).0 == to)
    }

    /// Whether the copy, being at `at`, goes on where the original goes on at `original`.
    fn goes_on(&self, at: u64, original: u64) -> bool {
        self.means(at, original)
            || self.decode(at).is_some_and(|i| is_jump(&i) && self.means(i.near_branch_target(), original))
    }
}

/// Instructions that raise a counter.
#[derive(Clone, Copy)]
struct Raised {
    /// The register that they change; else it is the flags.
    register: Option<Register>,
    /// What comes after them.
    next: u64,
}

impl Copies<'_> {
    /// Whether the copy raises `counter` at `at`: `inc [counter]`, or load, `lea r, [r + 1]`, store.
    fn raises(&self, counter: LinkAddr, at: u64) -> Option<Raised> {
        let is_counter = |i: &Instruction| i.is_ip_rel_memory_operand() && i.ip_rel_memory_address() == counter.0;
        let first = self.decode(at).filter(is_counter)?;
        if self.begins(&first, &[0x48, 0xff, 0x05]) {
            return Some(Raised { register: None, next: first.next_ip() });
        }
        // Byte for byte, as decoders look past prefix bits that mean nothing here.
        let register = first.op0_register();
        let number = register.is_gpr64().then(|| register.number() as u8)?;
        let (high, low) = (number >> 3, number & 7);
        let second = self.decode(first.next_ip())?;
        let third = self.decode(second.next_ip()).filter(is_counter)?;
        let same = self.begins(&first, &[0x48 | high << 2, 0x8b, low << 3 | 5])
            && self.begins(&second, &[0x48 | high << 2 | high, 0x8d, 0x40 | low << 3 | low, 1])
            && second.len() == 4
            && self.begins(&third, &[0x48 | high << 2, 0x89, low << 3 | 5]);
        same.then_some(Raised { register: Some(register), next: third.next_ip() })
    }

    /// Whether an instruction of the copy begins with these bytes.
    fn begins(&self, i: &Instruction, bytes: &[u8]) -> bool {
        let offset = i.ip().wrapping_sub(self.cache.0) as usize;
        self.code.get(offset..).is_some_and(|code| code.starts_with(bytes))
    }
}

impl Raised {
    /// Whether these instructions of the original, the rest of a block, do not depend on what was changed.
    fn is_harmless(self, rest: &[u8]) -> bool {
        // `inc` leaves the carry alone.
        let mut flags = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::PF;
        let mut factory = InstructionInfoFactory::new();
        for i in Decoder::with_ip(64, rest, 0, DecoderOptions::NONE) {
            let info = factory.info(&i);
            if let Some(register) = self.register {
                let mut uses = info.used_registers().iter().filter(|u| u.register().full_register() == register);
                if let Some(first) = uses.next() {
                    return uses.next().is_none() && first.access() == OpAccess::Write && first.register().size() >= 4;
                }
            } else {
                if i.rflags_read() & flags != 0 {
                    return false;
                }
                // Shifts and rotations by zero change nothing, whatever the decoder says of others.
                let arithmetic = matches!(
                    i.mnemonic(),
                    Mnemonic::Cmp
                        | Mnemonic::Inc
                        | Mnemonic::Dec
                        | Mnemonic::Test
                        | Mnemonic::Add
                        | Mnemonic::Sub
                        | Mnemonic::And
                        | Mnemonic::Or
                        | Mnemonic::Xor
                        | Mnemonic::Neg
                        | Mnemonic::Adc
                        | Mnemonic::Sbb
                );
                if arithmetic {
                    flags &= !i.rflags_modified();
                }
                if flags == 0 {
                    return true;
                }
            }
            if i.is_invalid() || i.flow_control() != FlowControl::Next {
                return false;
            }
        }
        false
    }
}

fn is_jump(i: &Instruction) -> bool {
    matches!(i.code(), Code::Jmp_rel8_64 | Code::Jmp_rel32_64)
}

/// A `jcc` as the number of its condition, the lowest bit of which is its sense.
fn condition(i: &Instruction) -> Option<u8> {
    // The decoder gives `loope` and `loopne` a condition too.
    let jcc = i.flow_control() == FlowControl::ConditionalBranch && !is_counter_branch(i);
    (jcc && i.condition_code() != ConditionCode::None).then(|| i.condition_code() as u8 - 1)
}

fn is_counter_branch(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Jrcxz | Mnemonic::Jecxz | Mnemonic::Jcxz
    )
}

/// Checks every block of an emission whose cache lies at link address `cache`.
///
/// # Errors
/// The first mismatch, by original address.
pub fn check(emission: &Emission, cache: LinkAddr, originals: &dyn Originals) -> Result<(), Mismatch> {
    let copies = Copies::new(&emission.code, cache, &emission.blocks, emission.into());
    if let Some((stub, _)) = copies.shortcuts.stubs.iter().find(|s| !is_stub(s.0, s.1, originals)) {
        let what = "a stub is not what it is taken for";
        return Err(Mismatch { original: LinkAddr(*stub), copy: CacheAddr(0), what });
    }
    emission
        .blocks
        .par_iter()
        .map(|block| walk(copies, block, originals, true).map(drop))
        .collect::<Vec<_>>()
        .into_iter()
        .collect()
}

/// The instruction boundaries that correspond, in one block; made by the same walk that checks it, but for the contents of
/// jump tables.
///
/// # Errors
/// The block is not a copy of its original.
pub fn pairs(
    code: &[u8],
    cache: LinkAddr,
    blocks: &[CopiedBlock],
    block: &CopiedBlock,
    extras: Extras<'_>,
    originals: &dyn Originals,
) -> Result<Vec<Pair>, Mismatch> {
    walk(Copies::new(code, cache, blocks, extras), block, originals, false)
}

impl<'a> Copies<'a> {
    fn new(code: &'a [u8], cache: LinkAddr, blocks: &'a [CopiedBlock], extras: Extras<'a>) -> Self {
        Self { code, cache, blocks, counters: extras.counters, shortcuts: extras.shortcuts }
    }
}

fn walk(
    copies: Copies<'_>,
    block: &CopiedBlock,
    originals: &dyn Originals,
    with_tables: bool,
) -> Result<Vec<Pair>, Mismatch> {
    // The copy of a promoted call that begins a block counts nothing: it is gone to from within the block.
    let of_original = copies.blocks.partition_point(|b| b.original < block.original);
    let is_first = copies.blocks.get(of_original) == Some(block);
    let mut counter = copies.counters.of(block.original).filter(|_| is_first);
    let pairs = walk_beside(copies, block, originals, with_tables, &mut counter)?;
    match counter {
        None => Ok(pairs),
        Some(_) => Err(Mismatch { original: block.original, copy: block.copy, what: "a counter is not raised" }),
    }
}

/// Walks a block's original and copy side by side. `counter` is what the block has to raise, and is taken when it does.
fn walk_beside(
    copies: Copies<'_>,
    block: &CopiedBlock,
    originals: &dyn Originals,
    with_tables: bool,
    counter: &mut Option<LinkAddr>,
) -> Result<Vec<Pair>, Mismatch> {
    let end = block.original.0.wrapping_add(u64::from(block.size));
    let mut at = copies.cache.plus(block.copy.0).0;
    let mut pairs = Vec::new();
    let fault = |original: u64, at: u64, what| Mismatch {
        original: LinkAddr(original),
        copy: CacheAddr(at.wrapping_sub(copies.cache.0)),
        what,
    };
    let Some(bytes) = originals.bytes(block.original, block.size as usize) else {
        return Err(fault(block.original.0, at, "the original's bytes are not known"));
    };
    let mut decoder = Decoder::with_ip(64, bytes, block.original.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let o = decoder.decode();
        let here = at;
        let wrong = |what| Err(fault(o.ip(), here, what));
        if o.is_invalid() {
            return wrong("the original is not an instruction");
        }
        if let Some(raised) = counter.and_then(|counter| copies.raises(counter, at)) {
            if !raised.is_harmless(&bytes[(o.ip() - block.original.0) as usize..]) {
                return wrong("a counter is raised where what that changes is in use");
            }
            at = raised.next;
            *counter = None;
        }
        let o_bytes = &bytes[(o.ip() - block.original.0) as usize..][..o.len()];
        if let Some(slot) = copies.counters.of_site(LinkAddr(o.ip())) {
            let Some(next) = copies.records(slot, &o, o_bytes, at) else { return wrong("a call is not recorded") };
            at = next;
        }
        let promoted = copies.decode(at).and_then(|lea| copies.promoted(&o, o_bytes, &lea));
        let place = |at: u64| CacheAddr(at.wrapping_sub(copies.cache.0));
        let instruction = place(promoted.map_or(at, |go| go.ip()));
        pairs.push(Pair { original: LinkAddr(o.ip()), copy: place(here), instruction });
        if let Some(go) = promoted {
            at = go.next_ip();
            if o.flow_control() == FlowControl::IndirectBranch {
                return if o.next_ip() == end { Ok(pairs) } else { wrong("a block goes on after its end") };
            }
            continue;
        }
        if o.mnemonic() == Mnemonic::Nop {
            continue;
        }
        if is_jump(&o) {
            let target = o.near_branch_target();
            let passes = || copies.decode(at).is_some_and(|c| copies.passes_stub(&c, [0xff, 0x25], target));
            let ok = o.next_ip() == end && (copies.goes_on(at, target) || passes());
            return if ok { Ok(pairs) } else { wrong("a jump goes elsewhere") };
        }
        let Some(c) = copies.decode(at) else { return wrong("the copy is not an instruction") };
        if let Some(sense) = condition(&o) {
            let (taken, fall) = (o.near_branch_target(), o.next_ip());
            let to = c.near_branch_target();
            let ok = match condition(&c) {
                Some(same) if same == sense => copies.means(to, taken) && copies.goes_on(c.next_ip(), fall),
                Some(other) if other == sense ^ 1 => copies.means(to, fall) && copies.goes_on(c.next_ip(), taken),
                _ => false,
            };
            return if ok && fall == end { Ok(pairs) } else { wrong("a branch goes elsewhere") };
        }
        if is_counter_branch(&o) {
            let ok = c.code() == o.code() && counter_branch(copies, &c, o.near_branch_target(), o.next_ip());
            return if ok && o.next_ip() == end { Ok(pairs) } else { wrong("a counting branch goes elsewhere") };
        }
        if o.code() == Code::Call_rel32_64 {
            let target = o.near_branch_target();
            let same = c.code() == Code::Call_rel32_64 && copies.means(c.near_branch_target(), target);
            if !same && !copies.passes_stub(&c, [0xff, 0x15], target) {
                return wrong("a call goes elsewhere");
            }
        } else if let Some(moved) = copies.reads_table(&o, o_bytes, &c) {
            let table = copies.shortcuts.table(o.ip()).expect("it reads one");
            if with_tables && !copies.has_table(table, moved, originals) {
                return wrong("a jump table leads elsewhere");
            }
        } else if !same_instruction(copies, bytes, block.original.0, &o, &c) {
            return wrong("an instruction differs");
        }
        at = c.next_ip();
        match o.flow_control() {
            FlowControl::Return | FlowControl::IndirectBranch => {
                return if o.next_ip() == end { Ok(pairs) } else { wrong("a block goes on after its end") };
            }
            FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall | FlowControl::Exception => {}
            // The kernel comes back behind it, or a handler steps over it, or nobody does.
            FlowControl::Interrupt => {}
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::XbeginXabortXend => {
                return wrong("a branch that has no copy");
            }
        }
    }
    if copies.goes_on(at, end) { Ok(pairs) } else { Err(fault(end, at, "the end of the block goes elsewhere")) }
}

/// `loop` and its like have no long form: the copy goes over a short jump to a long one.
fn counter_branch(copies: Copies<'_>, c: &Instruction, taken: u64, fall: u64) -> bool {
    let Some(over) = copies.decode(c.next_ip()) else { return false };
    is_jump(&over)
        && c.near_branch_target() == over.next_ip()
        && copies.decode(over.next_ip()).is_some_and(|far| {
            is_jump(&far)
                && copies.means(far.near_branch_target(), taken)
                && over.near_branch_target() == far.next_ip()
                && copies.goes_on(far.next_ip(), fall)
        })
}

/// The same bytes, but for a RIP-relative displacement, which must denote the same address.
fn same_instruction(copies: Copies<'_>, bytes: &[u8], base: u64, o: &Instruction, c: &Instruction) -> bool {
    if o.len() != c.len() || o.code() != c.code() {
        return false;
    }
    let from = (o.ip() - base) as usize;
    let original = &bytes[from..from + o.len()];
    let offset = c.ip().wrapping_sub(copies.cache.0) as usize;
    let copy = &copies.code[offset..offset + c.len()];
    if !o.is_ip_rel_memory_operand() {
        return original == copy;
    }
    if !c.is_ip_rel_memory_operand() || o.ip_rel_memory_address() != c.ip_rel_memory_address() {
        return false;
    }
    // Where the displacement lies is asked of the decoder, of the original's bytes.
    let mut decoder = Decoder::with_ip(64, original, o.ip(), DecoderOptions::NONE);
    let again = decoder.decode();
    let at = decoder.get_constant_offsets(&again).displacement_offset();
    original[..at] == copy[..at] && original[at + 4..] == copy[at + 4..]
}
