//! One linear pass over a piece of text: everything its instructions say about where execution may go.

use super::bits::{Filling, Layout};
use crate::functions::Function;
use crate::image::Image;
use crate::refuse;
use dyni_schema::LinkAddr;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use std::ops::Range;

/// The sets that the pass fills; see [`super::TargetIndex`] for what each holds.
pub(super) struct Sets {
    pub branch: Filling,
    pub observed: Filling,
    pub soft: Filling,
    pub tables: Filling,
    pub returns: Filling,
    pub traps: Filling,
}

/// What is not a set over the text.
#[derive(Default)]
pub(super) struct Found {
    /// Data addresses that instructions compute: possible jump tables.
    pub bases: Vec<LinkAddr>,
    /// Addresses of the function's own text that it computes.
    pub labels: Vec<LinkAddr>,
    /// It jumps to where a register or an index says.
    pub indirect: bool,
    /// It leaves by a jump to a function that looks at its return address, which is then this function's.
    pub passes_caller: bool,
}

/// Whether execution resumes at the next instruction after the kernel was entered here.
pub(crate) fn is_trap(instr: &Instruction) -> bool {
    matches!(instr.mnemonic(), Mnemonic::Syscall | Mnemonic::Sysenter) || instr.flow_control() == FlowControl::Interrupt
}

/// Decodes `range`, which is all of `owner` or lies outside all functions.
pub(super) fn scan(
    image: &Image,
    layout: &Layout,
    sets: &Sets,
    range: Range<LinkAddr>,
    owner: Option<&Function>,
) -> Found {
    let mut found = Found::default();
    let Some(bytes) = image.bytes(range.start, (range.end.0 - range.start.0) as usize) else { return found };
    let fixed = image.kind().is_fixed();
    let mut decoder = Decoder::with_ip(64, bytes, range.start.0, DecoderOptions::NONE);
    let mut instr = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instr);
        if instr.is_invalid() {
            if decoder.set_position(at + 1).is_err() {
                break;
            }
            decoder.set_ip(range.start.0 + at as u64 + 1);
            continue;
        }
        let next = LinkAddr(instr.next_ip());
        match instr.flow_control() {
            FlowControl::Next => {}
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend => {
                if instr.op0_kind() == OpKind::NearBranch64 {
                    let target = LinkAddr(instr.near_branch64());
                    sets.branch.set(layout, target);
                    found.passes_caller |=
                        instr.is_jmp_short_or_near() && image.plt_name(target).is_some_and(refuse::observes_caller);
                }
            }
            FlowControl::IndirectBranch => {
                if instr.is_ip_rel_memory_operand() {
                    let slot = LinkAddr(instr.ip_rel_memory_address());
                    found.passes_caller |= image.got_name(slot).is_some_and(refuse::observes_caller);
                } else {
                    found.indirect = true;
                }
            }
            FlowControl::Call | FlowControl::IndirectCall => {
                if instr.op0_kind() == OpKind::NearBranch64 {
                    sets.branch.set(layout, LinkAddr(instr.near_branch64()));
                }
                let kernel = is_trap(&instr);
                if kernel { &sets.traps } else { &sets.returns }.set(layout, next);
            }
            FlowControl::Interrupt => sets.traps.set(layout, next),
            FlowControl::Return | FlowControl::Exception => {}
        }

        let mut address = |value: u64, exact: bool| {
            let value = LinkAddr(value);
            if layout.bit(value).is_none() {
                if image.contains(value) {
                    found.bases.push(value);
                }
            } else if owner.is_some_and(|f| f.contains(value)) {
                sets.soft.set(layout, value);
                found.labels.push(value);
            } else if exact {
                sets.observed.set(layout, value);
            } else {
                sets.soft.set(layout, value);
            }
        };
        if instr.code() == Code::Lea_r64_m && instr.is_ip_rel_memory_operand() {
            address(instr.ip_rel_memory_address(), true);
        } else if fixed && instr.memory_base() != Register::RIP && instr.memory_displ_size() >= 4 {
            address(instr.memory_displacement64(), false);
        }
        if fixed {
            for i in 0..instr.op_count() {
                if matches!(instr.op_kind(i), OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64) {
                    address(instr.immediate(i), false);
                }
            }
        }
    }
    found
}
