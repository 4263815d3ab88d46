//! Calls through pointers: which of them may be preceded by a comparison of the pointer with a known function.
//!
//! A promoted call, and one whose targets are recorded, changes r11 and the status flags just before the call. That is
//! not seen by anybody who keeps to the System V ABI (x86-64 psABI, 3.2.1 and figure 3.4: r11 is a scratch register that
//! carries nothing into a function, and flags neither go in nor come out), but code written by hand need not keep to it.
//! So a site is taken only if
//!
//! - its operand does not use r11, and it has none but the usual encodings;
//! - it is not a call of a TLS descriptor, which preserves every register (`lea x@tlsdesc(%rip), %rax; call *(%rax)`);
//! - after it, as far as the function's graph goes, neither r11 nor a flag is read before it is written;
//! - a jump has, in its function, no label that it might lead to: then it is a call at the function's end.
//!
//! The callee that is called directly must not read them either ([`reads_scratch_at_entry`]); of the others the ABI is
//! taken at its word.

use crate::cfg::{Block, Cfg, Terminator};
use dyni_schema::LinkAddr;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits,
};

/// The status flags.
const STATUS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// A call, or a jump at a function's end, through a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// The instruction.
    pub at: LinkAddr,
    /// Its length in bytes.
    pub len: u32,
    /// The block that it is in, an index into [`Cfg::blocks`].
    pub block: usize,
    /// It is a jump.
    pub is_jump: bool,
}

/// The sites of a function whose bytes are `code`, by rising address.
#[must_use]
pub fn sites(cfg: &Cfg, code: &[u8]) -> Vec<Site> {
    let mut found = Vec::new();
    let has_labels = cfg.blocks.iter().any(|b| b.address_taken);
    for (index, block) in cfg.blocks.iter().enumerate().filter(|(_, b)| b.keep_original.is_none()) {
        let mut before: Option<Instruction> = None;
        for i in instructions(cfg, code, block, block.start) {
            let is_jump = match i.flow_control() {
                FlowControl::IndirectCall => Some(false),
                FlowControl::IndirectBranch if block.terminator == (Terminator::Indirect { table: None }) => Some(true),
                _ => None,
            };
            if let Some(is_jump) = is_jump
                && !(is_jump && has_labels)
                && has_plain_operand(&i)
                && !is_descriptor(before.as_ref(), &i)
                && (is_jump || !reads_scratch(cfg, code, index, LinkAddr(i.next_ip())))
            {
                found.push(Site { at: LinkAddr(i.ip()), len: i.len() as u32, block: index, is_jump });
            }
            before = Some(i);
        }
    }
    found
}

/// Whether a function may read r11 or a status flag before it writes them, as far as its graph goes.
#[must_use]
pub fn reads_scratch_at_entry(cfg: &Cfg, code: &[u8]) -> bool {
    reads_scratch(cfg, code, 0, cfg.start)
}

fn instructions<'a>(cfg: &Cfg, code: &'a [u8], block: &Block, from: LinkAddr) -> Decoder<'a> {
    let range = from.distance(cfg.start) as usize..block.end.distance(cfg.start) as usize;
    Decoder::with_ip(64, code.get(range).unwrap_or(&[]), from.0, DecoderOptions::NONE)
}

/// A 64-bit register or memory operand without r11, and not a fixed slot, which belongs to another module as a rule.
fn has_plain_operand(i: &Instruction) -> bool {
    if !matches!(i.code(), Code::Call_rm64 | Code::Jmp_rm64) || i.has_repne_prefix() || i.has_repe_prefix() {
        return false;
    }
    match i.op0_kind() {
        OpKind::Register => !matches!(i.op0_register(), Register::R11 | Register::RSP),
        OpKind::Memory => {
            let (base, index) = (i.memory_base(), i.memory_index());
            let wide = |r: Register| r == Register::None || r.is_gpr64();
            wide(base) && wide(index) && base != Register::R11 && index != Register::R11
        }
        _ => false,
    }
}

fn is_descriptor(before: Option<&Instruction>, call: &Instruction) -> bool {
    let reads_rax = call.op0_kind() == OpKind::Memory && call.memory_base() == Register::RAX;
    let lea = |b: &Instruction| b.mnemonic() == Mnemonic::Lea && b.op0_register() == Register::RAX;
    reads_rax && before.is_some_and(|b| lea(b) && b.is_ip_rel_memory_operand())
}

/// Whether r11 or a status flag is read before it is written on some way from an instruction of a block. What a call does
/// with them, or code outside the function, is the ABI's business: nothing.
fn reads_scratch(cfg: &Cfg, code: &[u8], block: usize, from: LinkAddr) -> bool {
    let mut factory = InstructionInfoFactory::new();
    // What may still be read, as a mask: the flags, and r11 as one more bit.
    const SCRATCH: u32 = 1 << 31;
    let mut open = vec![0u32; cfg.blocks.len()];
    let mut todo = vec![(block, from, STATUS | SCRATCH)];
    while let Some((index, from, mut live)) = todo.pop() {
        let block = &cfg.blocks[index];
        for i in instructions(cfg, code, block, from) {
            if i.is_invalid() || i.rflags_read() & live & STATUS != 0 {
                return true;
            }
            let scratch = |r: Register| r.full_register() == Register::R11;
            for used in factory.info(&i).used_registers().iter().filter(|u| scratch(u.register())) {
                match used.access() {
                    OpAccess::Write if used.register().size() >= 4 => {}
                    _ if live & SCRATCH != 0 => return true,
                    _ => {}
                }
            }
            if factory.info(&i).used_registers().iter().any(|u| scratch(u.register())) {
                live &= !SCRATCH;
            }
            // A shift by a count that may be zero writes none.
            let is_shift = i.rflags_undefined() != 0 && i.op_count() > 1 && i.op1_register() == Register::CL;
            if !is_shift {
                live &= !(i.rflags_modified() & STATUS);
            }
            if matches!(i.flow_control(), FlowControl::Call | FlowControl::IndirectCall) {
                live = 0;
            }
            if live == 0 {
                break;
            }
        }
        for &next in &block.successors {
            let next = next as usize;
            if live & !open[next] != 0 {
                open[next] |= live;
                todo.push((next, cfg.blocks[next].start, open[next]));
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function of one block that ends by `ret`, or by the jump that is its last instruction.
    fn function(code: &[u8]) -> Cfg {
        let base = 0x1000;
        let all: Vec<_> = Decoder::with_ip(64, code, base, DecoderOptions::NONE).into_iter().collect();
        let last = all.last().unwrap();
        let terminator = match last.flow_control() {
            FlowControl::IndirectBranch => Terminator::Indirect { table: None },
            _ => Terminator::Stop,
        };
        let block = Block {
            start: LinkAddr(base),
            end: LinkAddr(last.next_ip()),
            last: LinkAddr(last.ip()),
            terminator,
            successors: Vec::new(),
            keep_original: None,
            calls: true,
            address_taken: false,
        };
        Cfg { start: block.start, end: block.end, blocks: vec![block], jump_tables: Vec::new() }
    }

    fn count(code: &[u8]) -> usize {
        sites(&function(code), code).len()
    }

    #[test]
    fn a_call_is_a_site_if_nobody_reads_what_is_changed() {
        assert_eq!(count(&[0xff, 0x10, 0xc3]), 1, "call [rax]; ret");
        assert_eq!(count(&[0xff, 0xe0]), 1, "jmp rax");
        assert_eq!(count(&[0x41, 0xff, 0xd3, 0xc3]), 0, "call r11");
        assert_eq!(count(&[0x43, 0xff, 0x14, 0x18, 0xc3]), 0, "call [r8 + r11]");
        assert_eq!(count(&[0xff, 0x15, 0, 0, 0, 0, 0xc3]), 0, "call [rip]: another module's function");
        assert_eq!(count(&[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xff, 0x10, 0xc3]), 0, "a TLS descriptor");
        assert_eq!(count(&[0xff, 0xd0, 0x4c, 0x89, 0xd8, 0xc3]), 0, "call rax; mov rax, r11");
        assert_eq!(count(&[0xff, 0xd0, 0x0f, 0x92, 0xc0, 0xc3]), 0, "call rax; setb al");
        assert_eq!(count(&[0xff, 0xd0, 0x85, 0xc0, 0x0f, 0x94, 0xc0, 0xc3]), 1, "call rax; test; sete");
        assert_eq!(count(&[0xff, 0xd0, 0x49, 0x89, 0xc3, 0x4c, 0x89, 0xd8, 0xc3]), 1, "r11 is written first");
        assert_eq!(count(&[0xff, 0xd0, 0x45, 0x30, 0xdb, 0xc3]), 0, "xor r11b, r11b leaves the rest of it");
        assert_eq!(count(&[0xff, 0xd0, 0xd3, 0xe0, 0x0f, 0x92, 0xc0, 0xc3]), 0, "a shift by cl may write no flag");
    }

    #[test]
    fn a_jump_that_may_go_to_a_label_is_no_site() {
        let code = [0xff, 0xe0];
        let mut cfg = function(&code);
        cfg.blocks[0].address_taken = true;
        assert_eq!(sites(&cfg, &code), []);
    }

    #[test]
    fn an_entry_that_reads_flags_or_r11_is_known() {
        let reads = |code: &[u8]| reads_scratch_at_entry(&function(code), code);
        assert!(!reads(&[0x31, 0xc0, 0xc3]), "xor eax, eax; ret");
        assert!(!reads(&[0xc3]), "ret");
        assert!(reads(&[0x11, 0xc0, 0xc3]), "adc eax, eax");
        assert!(reads(&[0x4c, 0x89, 0xd8, 0xc3]), "mov rax, r11");
    }
}
