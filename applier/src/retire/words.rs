//! Finding words that refer to given ranges of addresses, in bytes of any kind and at every offset.
//!
//! A word refers to an address if its eight bytes are that address, or if they are what the C library makes of a code
//! address before it puts it into a `jmp_buf` (glibc, `PTR_MANGLE`: exclusive or with a number of the process's own, then
//! rotated left by 17). A structure may be packed and a copy of a stack lie at any byte, so offsets are not only multiples
//! of eight. That costs little: of all addresses in a stretch of some megabytes the upper bytes are the same, and a search
//! for those is as fast as memory.

use memchr::memmem::Finder;
use std::ops::Range;

/// glibc's rotation, in bits (`sysdeps/unix/sysv/linux/x86_64/pointer_guard.h`: `2 * LP_SIZE + 1`).
const ROTATION: u32 = 17;
/// Addresses that agree in all bits above these agree in their bytes 3 to 7.
const PLAIN_BITS: u32 = 24;
/// Addresses that agree in all bits above these agree, when mangled, in their bytes 5 to 7: bit 23 comes to be bit 40.
const MANGLED_BITS: u32 = 40 - ROTATION;

/// The upper bytes of addresses below it are all zero.
const LOW: u64 = 1 << 32;

/// One range of addresses to which references are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub range: Range<u64>,
    /// A part of it that does not count.
    pub except: Range<u64>,
}

impl Target {
    pub fn holds(&self, address: u64) -> bool {
        self.range.contains(&address) && !self.except.contains(&address)
    }
}

/// How a word has to be changed to be an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Mangled { guard: u64 },
}

impl Form {
    fn address(self, word: u64) -> u64 {
        match self {
            Self::Plain => word,
            Self::Mangled { guard } => word.rotate_right(ROTATION) ^ guard,
        }
    }

    fn word(self, address: u64) -> u64 {
        match self {
            Self::Plain => address,
            Self::Mangled { guard } => (address ^ guard).rotate_left(ROTATION),
        }
    }
}

/// Bytes that every reference of one form to one stretch of addresses has, and where in the word they are.
#[derive(Debug)]
struct Needle {
    form: Form,
    offset: usize,
    finder: Finder<'static>,
}

/// References to some ranges, in words that are plain or mangled with one of some guards.
#[derive(Debug)]
pub(super) struct Words {
    targets: Vec<Target>,
    needles: Vec<Needle>,
    /// Whether there are addresses below [`LOW`]: zeros are everywhere.
    low: bool,
}

impl Words {
    pub fn new(targets: Vec<Target>, guards: &[u64]) -> Self {
        let mut needles: Vec<(Form, usize, Vec<u8>)> = Vec::new();
        let mut add = |form: Form, bits: u32, bytes: Range<usize>, range: &Range<u64>| {
            for block in range.start >> bits..=(range.end - 1) >> bits {
                let word = form.word(block << bits).to_le_bytes();
                let needle = (form, bytes.start, word[bytes.clone()].to_vec());
                if !needles.contains(&needle) {
                    needles.push(needle);
                }
            }
        };
        let mut low = false;
        for target in targets.iter().filter(|t| !t.range.is_empty()) {
            low |= target.range.start < LOW;
            let high = target.range.start.max(LOW)..target.range.end;
            if !high.is_empty() {
                add(Form::Plain, PLAIN_BITS, 3..8, &high);
            }
            for &guard in guards {
                add(Form::Mangled { guard }, MANGLED_BITS, 5..8, &target.range);
            }
        }
        let needle = |(form, offset, bytes): (Form, usize, Vec<u8>)| Needle {
            form,
            offset,
            finder: Finder::new(&bytes).into_owned(),
        };
        Self { targets, needles: needles.into_iter().map(needle).collect(), low }
    }

    /// Calls `found` with the target's index, the offset in `bytes` and the address of each reference.
    pub fn each(&self, bytes: &[u8], mut found: impl FnMut(usize, usize, u64)) {
        let word = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().expect("eight bytes")))
        };
        let mut tell = |address: u64, at: usize| {
            for (index, _) in self.targets.iter().enumerate().filter(|(_, t)| t.holds(address)) {
                found(index, at, address);
            }
        };
        for needle in &self.needles {
            let mut from = 0;
            // One match may overlap the next.
            while let Some(place) = bytes.get(from..).and_then(|rest| needle.finder.find(rest)).map(|i| from + i) {
                if let Some((at, word)) = place.checked_sub(needle.offset).and_then(|at| Some((at, word(at)?))) {
                    tell(needle.form.address(word), at);
                }
                from = place + 1;
            }
        }
        if self.low {
            for (at, window) in bytes.windows(8).enumerate() {
                let word = u64::from_le_bytes(window.try_into().expect("eight bytes"));
                if word < LOW && word != 0 {
                    tell(word, at);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn target(range: Range<u64>) -> Target {
        Target { range, except: 0..0 }
    }

    fn all(words: &Words, bytes: &[u8]) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        words.each(bytes, |target, at, _| found.push((target, at)));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// What a reader without ideas would do.
    fn all_slowly(targets: &[Target], guards: &[u64], bytes: &[u8]) -> Vec<(usize, usize)> {
        let forms = || [Form::Plain].into_iter().chain(guards.iter().map(|&guard| Form::Mangled { guard }));
        let mut found = Vec::new();
        for (at, window) in bytes.windows(8).enumerate() {
            let word = u64::from_le_bytes(window.try_into().unwrap());
            for (index, target) in targets.iter().enumerate() {
                if forms().any(|form| target.holds(form.address(word))) {
                    found.push((index, at));
                }
            }
        }
        found.sort_unstable();
        found
    }

    proptest! {
        #[test]
        fn finds_what_is_there_and_nothing_else(
            start in prop::sample::select(vec![0x5555_5520_0000u64, 0x7fff_00ff_0000, 0x20_0000, 0xffe0_0000, 0x7f00_0000_0000]),
            size in 1u64..0x500_0000,
            guard: u64,
            planted in prop::collection::vec((0u64..0x500_0000, any::<bool>(), 0usize..180), 0..6),
            fill in prop::sample::select(vec![0u8, 0x55, 0xff]),
        ) {
            let targets = vec![target(start..start + size), Target { range: start + 4096..start + size / 2 + 4097, except: start + 8192..start + 9000 }];
            let mut bytes = vec![fill; 188];
            for (offset, mangled, at) in planted {
                let form = if mangled { Form::Mangled { guard } } else { Form::Plain };
                bytes[at..at + 8].copy_from_slice(&form.word(start + offset).to_le_bytes());
            }
            let words = Words::new(targets.clone(), &[guard]);
            prop_assert_eq!(all(&words, &bytes), all_slowly(&targets, &[guard], &bytes));
        }
    }

    #[test]
    fn a_jmp_buf_of_this_process_is_understood() {
        // What glibc stores is what this library undoes: a real one, of the C library at hand.
        let guard: u64;
        // SAFETY: reads eight bytes of the thread control block, which every thread of glibc has.
        unsafe { std::arch::asm!("mov {}, fs:[0x30]", out(reg) guard, options(nostack, readonly, preserves_flags)) };
        unsafe extern "C" {
            fn _setjmp(buffer: *mut u64) -> i32;
        }
        let mut buffer = [0u64; 64];
        // SAFETY: the buffer is longer than any jmp_buf; nobody ever jumps to what is stored in it.
        unsafe { _setjmp(buffer.as_mut_ptr()) };
        let here = a_jmp_buf_of_this_process_is_understood as fn() as usize as u64;
        let near = Words::new(vec![target(here & !0xff_ffff..(here | 0xff_ffff) + 1)], &[guard]);
        let bytes: Vec<u8> = buffer.iter().flat_map(|w| w.to_le_bytes()).collect();
        // The program counter is the eighth word (setjmp.h, `__jmp_buf`).
        assert!(all(&near, &bytes).contains(&(0, 56)), "{buffer:x?}");
    }
}
