//! Which bytes of a copy have the state of which place in the original.

use crate::check::{Originals, pairs};
use crate::lower::{CopiedBlock, Emission};
use dyni_analyzer::functions::Function;
use dyni_schema::LinkAddr;
use iced_x86::{Decoder, DecoderOptions, FlowControl};

/// From this place of the copy to the next one's, the machine's state is as at this place in the original.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    /// Offset in the cache, bytes.
    pub copy: u64,
    /// An instruction boundary of the original.
    pub original: LinkAddr,
    /// The length of the instruction there, bytes; 1 where the copy has a jump of its own.
    pub len: u32,
}

/// Appends the origins of one copied block, by rising copy, no two with the same one. `None` if the block is no copy.
///
/// A no-operation that was left out shares its place in the copy with what follows it, and the latter is what lies
/// there. A jump that only the copy has leaves the state as it finds it: behind a branch that is the branch's, behind
/// any other instruction that of the place to which the original would run on.
pub(super) fn of(
    block: &CopiedBlock,
    emission: &Emission,
    originals: &dyn Originals,
    cache: LinkAddr,
    function: &Function,
    out: &mut Vec<Origin>,
) -> Option<()> {
    let pairs = pairs(&emission.code, cache, &emission.blocks, block, emission.into(), originals).ok()?;
    let last = *pairs.last()?;
    let first = out.len();
    let after = block.original.plus(u64::from(block.size));
    for (i, pair) in pairs.iter().enumerate() {
        let next = pairs.get(i + 1).map_or(after, |next| next.original);
        let len = u32::try_from(next.distance(pair.original)).ok().filter(|&len| len > 0)?;
        let origin = Origin { copy: pair.copy.0, original: pair.original, len };
        match out[first..].last_mut() {
            Some(previous) if previous.copy == origin.copy => *previous = origin,
            _ => out.push(origin),
        }
    }
    let end = block.copy.0 + u64::from(block.copy_size);
    let bytes = emission.code.get(usize::try_from(last.instruction.0).ok()?..usize::try_from(end).ok()?)?;
    if bytes.is_empty() {
        // The block's last instruction was a jump or a no-operation that the copy does without.
        out.pop();
        return Some(());
    }
    let instruction = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
    let is_branch =
        matches!(instruction.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch);
    let jump = last.instruction.0 + instruction.len() as u64;
    if !is_branch && jump < end {
        // Behind a call that does not return, at the very end of a function, there is nothing to run on to.
        let original = if function.contains(after) { after } else { last.original };
        out.push(Origin { copy: jump, original, len: 1 });
    }
    Some(())
}
