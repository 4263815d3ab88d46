//! Whether a 5-byte jump may be written at an address.

use super::{TargetIndex, is_trap};
use crate::cfg::{Cfg, Terminator};
use crate::image::Image;
use dyni_schema::LinkAddr;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};

/// The length of a patch (`jmp rel32`) in bytes.
pub const PATCH: u64 = 5;
/// The size of a page in bytes: a patch is one store into one page.
const PAGE: u64 = 4096;

/// Why the 5 bytes at an address can't be overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PatchRefusal {
    /// No known instruction starts there.
    NotAnInstruction,
    /// They reach over the end of the function.
    OutsideFunction,
    /// They lie in two pages.
    CrossesPage,
    /// Something may branch to one of the last four.
    BranchTarget,
    /// A call may return to one of the last four.
    ReturnPoint,
    /// A system call or software interrupt is, or resumes, among them.
    SystemCall,
    /// They hold bytes that are not known to be instructions.
    Data,
}

impl PatchRefusal {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::NotAnInstruction,
        Self::OutsideFunction,
        Self::CrossesPage,
        Self::BranchTarget,
        Self::ReturnPoint,
        Self::SystemCall,
        Self::Data,
    ];

    /// One line for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::NotAnInstruction => "no instruction is known to start there",
            Self::OutsideFunction => "a 5-byte patch would reach over the function's end",
            Self::CrossesPage => "a patch would lie in two pages",
            Self::BranchTarget => "something may branch into the patched bytes",
            Self::ReturnPoint => "a call may return into the patched bytes",
            Self::SystemCall => "a system call lies in the patched bytes",
            Self::Data => "the patched bytes may hold data",
        }
    }
}

impl TargetIndex {
    /// Whether the bytes `[at, at + 5)` of this function may be overwritten by a jump: instructions start at `at` and
    /// cover them, and execution can't arrive at, return to or be resumed at any but the first. (A thread may still be
    /// *stopped* in between; only who stops it can tell.)
    ///
    /// # Errors
    /// Why not.
    pub fn patchable(&self, image: &Image, cfg: &Cfg, at: LinkAddr) -> Result<(), PatchRefusal> {
        let end = at.plus(PATCH);
        if at < cfg.start || at >= cfg.end || self.layout.bit(at).is_none() {
            return Err(PatchRefusal::NotAnInstruction);
        }
        if end > cfg.end {
            return Err(PatchRefusal::OutsideFunction);
        }
        if at.0 % PAGE > PAGE - PATCH {
            return Err(PatchRefusal::CrossesPage);
        }
        self.covered_by_instructions(image, cfg, at, end)?;
        for x in (1..PATCH).map(|i| at.plus(i)) {
            if self.is_trap_point(x) {
                return Err(PatchRefusal::SystemCall);
            }
            if self.is_return_point(x) {
                return Err(PatchRefusal::ReturnPoint);
            }
            // The linear decode that filled the index may have lost its step at data in text; the graph has not.
            if self.is_branch_target(x) || (cfg.block_at(x).is_some() && is_entered(cfg, x)) {
                return Err(PatchRefusal::BranchTarget);
            }
        }
        Ok(())
    }

    fn covered_by_instructions(
        &self,
        image: &Image,
        cfg: &Cfg,
        at: LinkAddr,
        end: LinkAddr,
    ) -> Result<(), PatchRefusal> {
        let block = &cfg.blocks[cfg.block_holding(at).ok_or(PatchRefusal::NotAnInstruction)?];
        let len = (cfg.end.0 - block.start.0) as usize;
        let bytes = image.bytes(block.start, len).ok_or(PatchRefusal::NotAnInstruction)?;
        let mut decoder = Decoder::with_ip(64, bytes, block.start.0, DecoderOptions::NONE);
        while decoder.ip() < at.0 {
            let _ = decoder.decode();
        }
        if decoder.ip() != at.0 {
            return Err(PatchRefusal::NotAnInstruction);
        }
        while decoder.ip() < end.0 {
            let here = LinkAddr(decoder.ip());
            let instr = decoder.decode();
            // After the end of a block come bytes that no path reaches. Padding may go; anything else may be data.
            let reached = cfg.block_holding(here).is_some();
            let padding = matches!(instr.mnemonic(), Mnemonic::Nop | Mnemonic::Int3);
            if instr.is_invalid() || !(reached || padding) {
                return Err(PatchRefusal::Data);
            }
            if reached && is_trap(&instr) {
                return Err(PatchRefusal::SystemCall);
            }
        }
        Ok(())
    }
}

/// Whether anything but falling through leads to the block that starts at `x`.
fn is_entered(cfg: &Cfg, x: LinkAddr) -> bool {
    cfg.blocks.iter().any(|b| {
        (b.start == x && b.address_taken)
            || match b.terminator {
                Terminator::Conditional { taken } => taken == x,
                Terminator::Jump { target } => target == x,
                Terminator::Indirect { .. } | Terminator::FallThrough | Terminator::Stop => false,
            }
    }) || cfg.jump_tables.iter().any(|t| t.targets.contains(&x))
}
