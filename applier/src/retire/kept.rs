//! Why a generation is not freed yet, in words for people and as a number for its ledger.

use dyni_schema::RunAddr;

/// Why a generation that is out of force stays mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// A word at this address refers to its code: a return address, a saved context, or what looks like one.
    Word(RunAddr),
    /// A register of a thread does.
    Register,
    /// Memory at this address could not be read, or not without changing the process.
    Unreadable(RunAddr),
    /// There is too much memory to look through while the program stands still.
    TooMuch,
    /// Looking took too long while the program stood still, and was broken off.
    TooSlow,
    /// The process could not be stopped, or changed meanwhile.
    NotStopped,
    /// Its unwinder could not be told to forget it now: no thread waits where a function can be called.
    Unwinder,
    /// A dyni that died may have told the unwinder to forget it, or not. It stays for good.
    UnwinderUnknown,
    /// It could not be unmapped.
    NotUnmapped,
}

/// Addresses are above it.
const FIRST_PAGE: u64 = 4096;
/// Set in the number of an address that could not be read; no address of a program has it.
const UNREADABLE: u64 = 1 << 63;

impl Kept {
    /// One line for people.
    #[must_use]
    pub fn text(self) -> String {
        match self {
            Self::Word(at) => format!("a word at {:#x} refers to it", at.0),
            Self::Register => "a register of a thread refers to it".to_owned(),
            Self::Unreadable(at) => format!("the memory at {:#x} could not be looked through", at.0),
            Self::TooMuch => "there is too much memory to look through while the program stands still".to_owned(),
            Self::TooSlow => "looking through its memory took too long and was broken off".to_owned(),
            Self::NotStopped => "the process could not be stopped, or changed meanwhile".to_owned(),
            Self::Unwinder => "no thread waits where the unwinder can be told to forget it".to_owned(),
            Self::UnwinderUnknown => "it is not known whether the unwinder has forgotten it".to_owned(),
            Self::NotUnmapped => "it could not be unmapped".to_owned(),
        }
    }

    pub(crate) fn number(self) -> u64 {
        match self {
            Self::Word(at) => at.0.max(FIRST_PAGE),
            Self::Register => 1,
            Self::Unreadable(at) => at.0 | UNREADABLE,
            Self::TooMuch => 2,
            Self::TooSlow => 3,
            Self::NotStopped => 4,
            Self::Unwinder => 5,
            Self::UnwinderUnknown => 6,
            Self::NotUnmapped => 7,
        }
    }

    /// `None` for 0, and for what this dyni does not know.
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Register),
            2 => Some(Self::TooMuch),
            3 => Some(Self::TooSlow),
            4 => Some(Self::NotStopped),
            5 => Some(Self::Unwinder),
            6 => Some(Self::UnwinderUnknown),
            7 => Some(Self::NotUnmapped),
            n if n & UNREADABLE != 0 => Some(Self::Unreadable(RunAddr(n & !UNREADABLE))),
            FIRST_PAGE.. => Some(Self::Word(RunAddr(number))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_again() {
        let at = RunAddr(0x7fff_1234_5678);
        let fixed = [Kept::Register, Kept::TooMuch, Kept::TooSlow, Kept::NotStopped, Kept::Unwinder];
        let others = [Kept::UnwinderUnknown, Kept::NotUnmapped, Kept::Word(at), Kept::Unreadable(at)];
        for kept in fixed.into_iter().chain(others) {
            assert_eq!(Kept::from_number(kept.number()), Some(kept));
        }
        assert_eq!(Kept::from_number(0), None);
        assert_eq!(Kept::from_number(99), None);
    }
}
