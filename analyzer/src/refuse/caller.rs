//! Functions that find out who called them by their return address.
//!
//! A copy's call leaves a return address in the code cache, which belongs to no module: `dlopen` would look into the wrong
//! namespace. So calls to these are made from the original.

use crate::functions::{Function, Functions};
use crate::image::Image;
use dyni_schema::LinkAddr;
use gimli::{CfaRule, UnwindContext};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use rayon::prelude::*;

/// Functions, by name, that look at their return address and act by it.
pub const OBSERVERS: &[&str] = &[
    "dlopen",
    "dlmopen",
    "dlsym",
    "dlvsym",
    "dl_iterate_phdr",
    "__libc_dlopen_mode",
    "__libc_dlsym",
    "android_dlopen_ext",
    "mcount",
    "_mcount",
    "__mcount",
    "__fentry__",
    "__cyg_profile_func_enter",
    "__cyg_profile_func_exit",
    "__sanitizer_cov_trace_pc",
    "__sanitizer_cov_trace_pc_guard",
];

/// Whether the function of this name (a symbol version after `@` is ignored) acts by its return address.
#[must_use]
pub fn observes_caller(name: &str) -> bool {
    OBSERVERS.contains(&name.split('@').next().unwrap_or(name))
}

/// The functions of the module that have such a name (a static executable, or libc itself).
pub(crate) fn observers_by_name(image: &Image) -> Vec<LinkAddr> {
    let named = image.symbols().filter(|s| observes_caller(s.2) && image.is_executable(s.0));
    named.map(|s| s.0).collect()
}

/// The functions that read the 8 bytes of the stack where their return address is, other than by `ret`. Unsorted.
///
/// The unwind table says where that is at every instruction. Without one only the first instruction is looked at.
pub(crate) fn return_address_readers(image: &Image, functions: &Functions) -> Vec<LinkAddr> {
    functions
        .all()
        .par_iter()
        .with_min_len(256)
        .map_init(
            || (UnwindContext::new(), Vec::new()),
            |(context, rows), f| reads(image, functions, f, context, rows).then_some(f.start),
        )
        .flatten()
        .collect()
}

/// Where the canonical frame address is from an address on: (address, register, distance in bytes).
type Row = (u64, Register, i64);

fn reads(
    image: &Image,
    functions: &Functions,
    f: &Function,
    context: &mut UnwindContext<usize>,
    rows: &mut Vec<Row>,
) -> bool {
    let Some(bytes) = image.bytes(f.start, f.size as usize) else { return false };
    let mut decoder = Decoder::with_ip(64, bytes, f.start.0, DecoderOptions::NONE);
    let mut instr = Instruction::default();
    let mut have_rows = false;
    let mut first = true;
    while decoder.can_decode() {
        decoder.decode_out(&mut instr);
        if instr.is_invalid() {
            return false;
        }
        if first && instr.mnemonic() == Mnemonic::Endbr64 {
            continue;
        }
        let Some((base, distance)) = read_from_stack(&instr) else {
            first = false;
            continue;
        };
        // Rows are made only for functions with a candidate.
        if !std::mem::replace(&mut have_rows, true) {
            rows.clear();
            let whole = functions.unwind_rows(image, f, context, |row| {
                if let CfaRule::RegisterAndOffset { register, offset } = *row.cfa() {
                    let register = match register.0 {
                        6 => Register::RBP,
                        7 => Register::RSP,
                        _ => Register::None,
                    };
                    rows.push((row.start_address(), register, offset));
                } else {
                    rows.push((row.start_address(), Register::None, 0));
                }
            });
            if !whole {
                rows.clear();
                rows.push((f.start.0, Register::RSP, 8));
                rows.push((instr.next_ip(), Register::None, 0));
                if !first {
                    return false;
                }
            }
        }
        first = false;
        let row = rows.partition_point(|r| r.0 <= instr.ip());
        if let Some(&(_, register, cfa)) = row.checked_sub(1).and_then(|i| rows.get(i))
            && register == base
            && distance == cfa - 8
        {
            return true;
        }
    }
    false
}

/// The 8 bytes of the stack that an instruction reads into a register: base register and displacement in bytes.
fn read_from_stack(instr: &Instruction) -> Option<(Register, i64)> {
    if instr.mnemonic() == Mnemonic::Pop && instr.op0_kind() == OpKind::Register {
        return Some((Register::RSP, 0));
    }
    let reads = instr.mnemonic() == Mnemonic::Mov
        && instr.op0_kind() == OpKind::Register
        && instr.op0_register().is_gpr64()
        && instr.op1_kind() == OpKind::Memory
        && instr.memory_index() == Register::None
        && matches!(instr.memory_base(), Register::RSP | Register::RBP);
    reads.then(|| (instr.memory_base(), instr.memory_displacement64() as i64))
}
