//! What functions look like inside, as far as it takes to find them and their blocks again in another build.
//!
//! Of each function: its name and what it calls, as hashes; of each of its blocks: length, a short hash, how it ends and
//! where it leads. That is less than BOLT keeps for the same purpose (Ayupov, Panchenko, Pupyrev, "Stale Profile Matching",
//! CC 2024: 8 bytes of hashes for a block): blocks are aligned in their order, and where they lead is known itself rather
//! than by hashes of the neighbours, so that 8 bits and the length tell those apart that could be meant.
//!
//! In a profile it is a struct of arrays ([`Shapes`]); whoever works on it unpacks it ([`FunctionShape`]).

use crate::Invalid;
use crate::profile::{FunctionIndex, MAX_ROWS, check};
use rkyv::{Archive, Deserialize, Serialize};

/// A function as it looks inside.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct FunctionShape {
    /// A hash of its name; 0 if it has none, or was not hot.
    pub name: u64,
    /// What it calls, in the order in which it does: hashes of names of other modules' functions, and parts of the
    /// [`FunctionHash`](crate::FunctionHash) of its own module's.
    pub callees: Vec<u16>,
    /// Its blocks by rising address; none if its code was not understood, or it was not hot.
    pub blocks: Vec<BlockShape>,
}

/// A basic block as it looks inside.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BlockShape {
    /// Bytes between the end of the block before it (or the function's first byte) and its own first one.
    pub skipped: u16,
    /// Its length in bytes; not zero.
    pub length: u16,
    /// A hash of its instructions without their operands.
    pub hash: u8,
    /// How it ends: [`BlockShape::ENTERED`], [`BlockShape::LEFT`], [`BlockShape::RUNS_ON`], and the kind of its last
    /// instruction above them.
    pub ends: u8,
    /// Where else it leads inside the function: distances to other blocks, in blocks.
    pub successors: Vec<i16>,
}

impl BlockShape {
    /// Bit of [`BlockShape::ends`]: it may be entered from outside the function.
    pub const ENTERED: u8 = 1;
    /// Bit of [`BlockShape::ends`]: execution may leave the function from it.
    pub const LEFT: u8 = 2;
    /// Bit of [`BlockShape::ends`]: after all of [`BlockShape::successors`] it leads to the next block.
    pub const RUNS_ON: u8 = 4;

    /// The blocks that it leads to, given its own index among the function's; those inside the function are all that a
    /// checked shape has.
    pub fn leads_to(&self, index: u32) -> impl Iterator<Item = u32> + '_ {
        let others = self.successors.iter().map(move |&d| index.wrapping_add_signed(i32::from(d)));
        others.chain((self.ends & Self::RUNS_ON != 0).then_some(index.wrapping_add(1)))
    }
}

/// The shapes of the functions of a [`FunctionIndex`], in its order; all columns are empty if none is known.
#[derive(Clone, Debug, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Shapes {
    /// By function: [`FunctionShape::name`].
    pub name: Vec<u64>,
    /// By function: how many rows of `callee` are its own.
    pub callees: Vec<u32>,
    /// By function: how many rows of the columns of blocks are its own.
    pub blocks: Vec<u32>,
    /// [`FunctionShape::callees`] of all functions.
    pub callee: Vec<u16>,
    /// By block: [`BlockShape::skipped`].
    pub skipped: Vec<u16>,
    /// By block: [`BlockShape::length`].
    pub length: Vec<u16>,
    /// By block: [`BlockShape::hash`].
    pub hash: Vec<u8>,
    /// By block: [`BlockShape::ends`].
    pub ends: Vec<u8>,
    /// By block: how many rows of `successor` are its own.
    pub successors: Vec<u16>,
    /// [`BlockShape::successors`] of all blocks.
    pub successor: Vec<i16>,
}

impl Shapes {
    /// As a profile keeps them. A block with more successors than [`u16::MAX`] keeps that many.
    #[must_use]
    pub fn pack<'a>(functions: impl IntoIterator<Item = &'a FunctionShape>) -> Self {
        let mut packed = Self::default();
        for f in functions {
            packed.name.push(f.name);
            packed.callees.push(f.callees.len() as u32);
            packed.callee.extend(&f.callees);
            packed.blocks.push(f.blocks.len() as u32);
            for b in &f.blocks {
                packed.skipped.push(b.skipped);
                packed.length.push(b.length);
                packed.hash.push(b.hash);
                packed.ends.push(b.ends);
                let kept = &b.successors[..b.successors.len().min(usize::from(u16::MAX))];
                packed.successors.push(kept.len() as u16);
                packed.successor.extend(kept);
            }
        }
        packed
    }

    /// One shape for each function, in order. What a checked profile never has is cut short.
    #[must_use]
    pub fn unpack(&self) -> Vec<FunctionShape> {
        let mut callee = self.callee.iter();
        let mut successor = self.successor.iter();
        let mut block = 0;
        let functions = self.name.iter().zip(&self.callees).zip(&self.blocks);
        functions
            .map(|((&name, &callees), &blocks)| FunctionShape {
                name,
                callees: callee.by_ref().take(callees as usize).copied().collect(),
                blocks: (0..blocks)
                    .map_while(|_| {
                        let at = block;
                        block += 1;
                        Some(BlockShape {
                            skipped: *self.skipped.get(at)?,
                            length: *self.length.get(at)?,
                            hash: *self.hash.get(at)?,
                            ends: *self.ends.get(at)?,
                            successors: {
                                let own = usize::from(*self.successors.get(at)?);
                                successor.by_ref().take(own).copied().collect()
                            },
                        })
                    })
                    .collect(),
            })
            .collect()
    }

    /// Checks what every reader may rely on; `n` is the module's name.
    pub(crate) fn validate(&self, functions: &FunctionIndex, n: &str) -> Result<(), Invalid> {
        let all = self.name.len();
        check(all == 0 || all == functions.start.len(), "shapes of other functions", n)?;
        check(self.callees.len() == all && self.blocks.len() == all, "shape columns differ in length", n)?;
        let sum = |counts: &[u32]| counts.iter().map(|&c| u64::from(c)).sum::<u64>();
        let rows = self.length.len();
        let columns = [self.skipped.len(), self.hash.len(), self.ends.len(), self.successors.len()];
        check(columns.iter().all(|&c| c == rows) && rows <= MAX_ROWS, "block columns differ in length", n)?;
        check(sum(&self.blocks) == rows as u64, "blocks of no function", n)?;
        check(
            self.callee.len() <= MAX_ROWS && sum(&self.callees) == self.callee.len() as u64,
            "calls of no function",
            n,
        )?;
        let leads: u64 = self.successors.iter().map(|&c| u64::from(c)).sum();
        check(self.successor.len() <= MAX_ROWS && leads == self.successor.len() as u64, "edges of no block", n)?;
        check(self.length.iter().all(|&l| l > 0), "a block has no bytes", n)?;
        let (mut block, mut edge) = (0, 0);
        for (&own, &size) in self.blocks.iter().zip(&functions.size) {
            let rows = block..block + own as usize;
            let bytes = rows.clone().map(|b| u64::from(self.skipped[b]) + u64::from(self.length[b])).sum::<u64>();
            check(bytes <= u64::from(size), "blocks beyond their function's end", n)?;
            for (b, place) in rows.clone().zip(0i64..) {
                let to = &self.successor[edge..edge + usize::from(self.successors[b])];
                let inside = |&d: &i16| (0..i64::from(own)).contains(&(place + i64::from(d)));
                let last = place + 1 == i64::from(own);
                let runs_out = last && self.ends[b] & BlockShape::RUNS_ON != 0;
                check(to.iter().all(inside) && !runs_out, "an edge leads out of its function", n)?;
                edge += to.len();
            }
            block = rows.end;
        }
        Ok(())
    }
}
