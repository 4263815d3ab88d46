//! From a branch stack to what it proves: the branches that were taken, and the straight stretches between them.
//!
//! A stack lists the last taken branches, newest first. Between the target of one and the source of the next newer one
//! the processor ran straight on, so every instruction there ran once. The stretch from the newest target to the sampled
//! instruction is left out: the sample may have come late.

use crate::records::{Branch, is_user};
use dyni_schema::RunAddr;

/// The longest stretch that is believed, bytes. A longer one means that the stack has a hole (an interrupt, a change of
/// the thread): code does not run 64 KiB without one taken branch.
pub const MAX_STRETCH: u64 = 64 << 10;

/// One thing that a branch stack proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A branch was taken.
    Taken(Branch),
    /// Everything from `start` to `end` ran, the instruction at `end` included.
    Straight {
        /// The first instruction.
        start: RunAddr,
        /// The branch instruction that ended it.
        end: RunAddr,
    },
}

impl Proof {
    /// The two addresses that it is of: a branch and its target, or the first and the last instruction.
    #[must_use]
    pub const fn ends(&self) -> (RunAddr, RunAddr) {
        match self {
            Self::Taken(branch) => (branch.from, branch.to),
            Self::Straight { start, end } => (*start, *end),
        }
    }
}

/// Tells what a branch stack (newest first) proves about user code.
pub fn proofs(stack: &[Branch], mut tell: impl FnMut(Proof)) {
    let mut newer: Option<&Branch> = None;
    for branch in stack {
        let plausible = |a: RunAddr| a.0 != 0 && is_user(a);
        // An empty slot of the hardware, or a transfer to or from the kernel: the chain is broken here.
        if !plausible(branch.from) || !plausible(branch.to) {
            newer = None;
            continue;
        }
        tell(Proof::Taken(*branch));
        if let Some(newer) = newer {
            let (start, end) = (branch.to, newer.from);
            if start <= end && end.0 - start.0 <= MAX_STRETCH {
                tell(Proof::Straight { start, end });
            }
        }
        newer = Some(branch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(from: u64, to: u64) -> Branch {
        Branch { from: RunAddr(from), to: RunAddr(to), mispredicted: false }
    }

    fn all(stack: &[Branch]) -> (usize, Vec<(u64, u64)>) {
        let (mut taken, mut straight) = (0, Vec::new());
        proofs(stack, |proof| match proof {
            Proof::Taken(_) => taken += 1,
            Proof::Straight { start, end } => straight.push((start.0, end.0)),
        });
        (taken, straight)
    }

    #[test]
    fn a_loop_of_two_blocks() {
        // 100..110 jumps to 200, 200..220 jumps back.
        let stack = [branch(0x220, 0x100), branch(0x110, 0x200), branch(0x220, 0x100)];
        assert_eq!(all(&stack), (3, vec![(0x200, 0x220), (0x100, 0x110)]));
    }

    #[test]
    fn a_branch_to_itself_is_a_stretch_of_one_instruction() {
        assert_eq!(all(&[branch(0x100, 0x100), branch(0x100, 0x100)]), (2, vec![(0x100, 0x100)]));
    }

    #[test]
    fn holes_give_no_stretch() {
        let kernel = 0xffff_ffff_8100_0000;
        assert_eq!(all(&[branch(0x220, 0x100), branch(kernel, 0x200), branch(0x20, 0x30)]), (2, vec![]));
        assert_eq!(all(&[branch(0x220, 0x100), branch(0, 0), branch(0x20, 0x30)]), (2, vec![]));
        assert_eq!(all(&[branch(0x100, 0x900), branch(0x20, 0x101)]), (2, vec![]), "it would run backwards");
        assert_eq!(all(&[branch(0x20_0000, 0x900), branch(0x20, 0x100)]), (2, vec![]), "it would be too long");
        assert_eq!(all(&[]), (0, vec![]));
    }
}
