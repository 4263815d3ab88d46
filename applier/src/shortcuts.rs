//! Shortcuts: where a copy goes past code of the original that only leads on.
//!
//! What each changes between two instruction boundaries of the original, and why the state is equal at them:
//!
//! - *Stubs.* `call stub`, where the stub of the procedure linkage table is `jmp [slot]`, becomes `call [slot]`; a `jmp`
//!   likewise. The stub reads and writes nothing else, whether the slot has been bound yet or not.
//! - *Tables.* The instruction that reads a jump table gets another displacement, and so reads one in the cache, whose
//!   entries lead to copies. From there to the jump a register holds another number; who may be made to see it, and why
//!   nobody does: [`dyni_analyzer::table_loads`]. Only tables whose length the code checks, and which nobody writes to
//!   ([`dyni_analyzer::cfg::JumpTable::exact`]).
//! - *Promoted calls.* `call x`, x a register or memory, is preceded by `lea r11, [F]; cmp x, r11; jne` to the plain call, and
//!   `call` of F's copy. r11 and the status flags change; who may be made to see it, and why nobody does:
//!   [`dyni_analyzer::calls`]. If x is memory, it is read twice where the original reads it once, and either value is one
//!   that the original might have read.
//! - *Recorded calls*, in a counting plan: x is stored before `call x`, by way of r11 if it is memory.

use crate::lower::COUNTER;
use dyni_analyzer::cfg::Cfg;
use dyni_analyzer::image::Image;
use dyni_schema::LinkAddr;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use rkyv::{Archive, Deserialize, Serialize};
use std::collections::BTreeMap;

/// The longest stub, in bytes: `endbr64; bnd jmp [slot]`.
const STUB: usize = 11;

/// A stub of the procedure linkage table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stub {
    /// Its first byte.
    pub at: LinkAddr,
    /// The slot that it jumps through.
    pub slot: LinkAddr,
    /// Its bytes, to the end of the jump.
    pub bytes: Vec<u8>,
}

impl Stub {
    /// The stub at an address of a file, if there is one.
    #[must_use]
    pub fn at(image: &Image, at: LinkAddr) -> Option<Self> {
        let slot = image.plt_slot(at)?;
        let bytes = (6..=STUB).rev().find_map(|n| image.bytes(at, n))?;
        let mut decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
        let mut i = decoder.decode();
        if i.mnemonic() == Mnemonic::Endbr64 {
            i = decoder.decode();
        }
        let leads_on = i.mnemonic() == Mnemonic::Jmp && i.is_ip_rel_memory_operand();
        let bytes = bytes[..decoder.position()].to_vec();
        (leads_on && i.ip_rel_memory_address() == slot.0).then_some(Self { at, slot, bytes })
    }

    /// Those that a function whose bytes are `code` calls or jumps to, by rising address.
    #[must_use]
    pub fn all(image: &Image, cfg: &Cfg, code: &[u8]) -> Vec<Self> {
        let mut stubs = BTreeMap::new();
        for block in &cfg.blocks {
            let range = block.start.distance(cfg.start) as usize..block.end.distance(cfg.start) as usize;
            for i in Decoder::with_ip(64, &code[range], block.start.0, DecoderOptions::NONE) {
                if i.is_call_near() || i.is_jmp_short_or_near() {
                    let at = LinkAddr(i.near_branch_target());
                    stubs.entry(at).or_insert_with(|| Self::at(image, at));
                }
            }
        }
        stubs.into_values().flatten().collect()
    }
}

/// An instruction that reads a jump table, whose copy reads one in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct TableLoad {
    /// The instruction, a link address.
    pub at: u64,
    /// The original's table, a link address.
    pub table: u64,
    /// Its entries are 8-byte addresses; else 4-byte distances from the table.
    pub absolute: bool,
    /// How many entries it has.
    pub count: u32,
}

/// The shortcuts of a generation. Addresses are link addresses, lists rise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Shortcuts {
    /// Stubs that copies go past: the stub, and its slot.
    pub stubs: Vec<(u64, u64)>,
    /// What reads jump tables.
    pub tables: Vec<TableLoad>,
    /// Promoted calls and jumps: the site, and the function that it is compared with.
    pub calls: Vec<(u64, u64)>,
    /// Where in the cache there are addresses, 8 bytes each: link addresses in an emission, in a process run addresses.
    pub pointers: Vec<u32>,
}

impl Shortcuts {
    /// The slot of a stub.
    #[must_use]
    pub fn slot(&self, stub: u64) -> Option<u64> {
        self.stubs.binary_search_by_key(&stub, |s| s.0).ok().map(|i| self.stubs[i].1)
    }

    /// The table that an instruction reads.
    #[must_use]
    pub fn table(&self, load: u64) -> Option<TableLoad> {
        self.tables.binary_search_by_key(&load, |t| t.at).ok().map(|i| self.tables[i])
    }

    /// What a site is compared with.
    #[must_use]
    pub fn callee(&self, site: u64) -> Option<u64> {
        self.calls.binary_search_by_key(&site, |c| c.0).ok().map(|i| self.calls[i].1)
    }

    /// Makes link addresses in the cache's bytes run addresses; with the negated bias, the other way round.
    pub fn relocate(&self, code: &mut [u8], bias: u64) {
        for &at in &self.pointers {
            if let Some(pointer) = code.get_mut(at as usize..at as usize + 8) {
                let address = u64::from_le_bytes((&*pointer).try_into().expect("eight bytes"));
                pointer.copy_from_slice(&address.wrapping_add(bias).to_le_bytes());
            }
        }
    }

    /// Whether a reader may rely on it, for a cache of so many bytes of code.
    #[must_use]
    pub fn is_sound(&self, code_size: u64) -> bool {
        let rising = |list: &[(u64, u64)]| list.windows(2).all(|w| w[0].0 < w[1].0);
        rising(&self.stubs)
            && rising(&self.calls)
            && self.tables.windows(2).all(|w| w[0].at < w[1].at)
            && self.pointers.windows(2).all(|w| u64::from(w[0]) + COUNTER <= u64::from(w[1]))
            && self.pointers.last().is_none_or(|&last| u64::from(last) + COUNTER <= code_size)
    }
}
