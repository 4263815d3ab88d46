//! A function's hash that does not change when the function, or what it refers to, moves.

use super::Function;
use crate::image::Image;
use dyni_schema::{FunctionHash, LinkAddr};
use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind};

/// BLAKE3, cut to 16 bytes, of the function's bytes with everything zeroed that its position decides: RIP-relative
/// displacements, branch and call distances that leave the function, and, in a module at a fixed address, 32- and 64-bit
/// numbers that are addresses of the module. Distances inside the function stay.
///
/// Decoding is linear from the first byte: data between instructions may be taken for instructions, but for the same ones
/// in every copy of the function.
#[must_use]
pub fn function_hash(image: &Image, f: &Function) -> FunctionHash {
    let Some(bytes) = image.bytes(f.start, f.size as usize) else { return FunctionHash::default() };
    let mut masked = bytes.to_vec();
    let in_module = |value: u64| image.kind().is_fixed() && image.contains(LinkAddr(value));
    let mut decoder = Decoder::with_ip(64, bytes, f.start.0, DecoderOptions::NONE);
    let mut instr = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instr);
        if instr.is_invalid() {
            // Resynchronise at the next byte, as a mutation in one place must not change how all that follows is read.
            if decoder.set_position(at + 1).is_err() {
                break;
            }
            decoder.set_ip(f.start.0 + at as u64 + 1);
            continue;
        }
        let places = decoder.get_constant_offsets(&instr);
        let mut mask = |offset: usize, size: usize| {
            if size >= 4 || size == 1 {
                masked[at + offset..at + offset + size].fill(0);
            }
        };
        if places.has_displacement() && places.displacement_size() >= 4 {
            let absolute = instr.memory_base() == iced_x86::Register::None && in_module(instr.memory_displacement64());
            let based =
                in_module(instr.memory_displacement64() & 0xffff_ffff) && instr.memory_displacement64() >> 31 == 0;
            if instr.is_ip_rel_memory_operand() || absolute || based {
                mask(places.displacement_offset(), places.displacement_size());
            }
        }
        if places.has_immediate() {
            let near = matches!(instr.op0_kind(), OpKind::NearBranch64);
            let leaves = near && !f.contains(LinkAddr(instr.near_branch64()));
            let value = (0..instr.op_count()).find_map(|i| instr.try_immediate(i).ok()).unwrap_or(0);
            if leaves || (!near && places.immediate_size() >= 4 && in_module(value)) {
                mask(places.immediate_offset(), places.immediate_size());
            }
        }
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::hash(&masked).as_bytes()[..16]);
    FunctionHash(hash)
}
