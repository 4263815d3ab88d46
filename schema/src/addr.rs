//! The four address spaces, four types that do not mix.
//!
//! | type | counts from | example |
//! |---|---|---|
//! | [`FileOffset`] | the first byte of the ELF file | what `mmap` is given |
//! | [`LinkAddr`] | the ELF file's own virtual addresses (`p_vaddr`) | what an FDE or a symbol says |
//! | [`RunAddr`] | the address space of the target process | what RIP holds |
//! | [`CacheAddr`] | the first byte of one module's code cache | where a copy was emitted |
//!
//! `RunAddr = LinkAddr + load bias`, the bias being one number for a module in a process. A code cache lies at a fixed
//! distance from its module, so it has link addresses too: those of a cache below a PIE wrap around zero, which is why
//! the arithmetic here wraps.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// This address moved up by `bytes`, wrapping.
            #[must_use]
            pub const fn plus(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// This address moved by a signed distance in bytes, wrapping.
            #[must_use]
            pub const fn offset(self, bytes: i64) -> Self {
                Self(self.0.wrapping_add_signed(bytes))
            }

            /// The signed distance in bytes from `from` to this address, wrapping.
            #[must_use]
            pub const fn distance(self, from: Self) -> i64 {
                self.0.wrapping_sub(from.0) as i64
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// An offset in bytes from the start of an ELF file.
    FileOffset
);
address!(
    /// A virtual address as the ELF file states it, before loading.
    LinkAddr
);
address!(
    /// A virtual address in a target process.
    RunAddr
);
address!(
    /// An offset in bytes from the start of a module's code cache.
    CacheAddr
);

impl LinkAddr {
    /// Where this address lies in a process in which the module has this load bias (bytes, wrapping).
    #[must_use]
    pub const fn run(self, bias: u64) -> RunAddr {
        RunAddr(self.0.wrapping_add(bias))
    }
}

impl RunAddr {
    /// The module's own address for this one, given the module's load bias (bytes, wrapping).
    #[must_use]
    pub const fn link(self, bias: u64) -> LinkAddr {
        LinkAddr(self.0.wrapping_sub(bias))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_goes_there_and_back_even_below_zero() {
        let bias = 0x5555_5555_4000;
        let below = LinkAddr(0).offset(-0x20_0000);
        assert_eq!(below.run(bias), RunAddr(bias - 0x20_0000));
        assert_eq!(below.run(bias).link(bias), below);
        assert_eq!(LinkAddr(0).distance(below), 0x20_0000);
    }
}
