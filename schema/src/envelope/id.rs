//! The name of a sealed record: the BLAKE3 hash of its bytes, and what people type of it.

use std::fmt;
use std::str::FromStr;

/// The identity of a sealed record: BLAKE3 of its bytes. Equal values have equal ids wherever they were sealed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(pub [u8; 32]);

impl BlobId {
    /// How many hexadecimal digits [`BlobId::short`] has.
    pub const SHORT: usize = 12;

    /// The identity of sealed bytes.
    #[must_use]
    pub fn of(sealed: &[u8]) -> Self {
        Self(super::content_id(sealed))
    }

    /// All 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The first 12 digits: enough for people, and accepted wherever an id is.
    #[must_use]
    pub fn short(&self) -> String {
        self.0[..Self::SHORT / 2].iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The identity in these bytes, as a database keeps it; `None` unless there are 32.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `{:.12}` gives the first 12 digits, and widths work, as for a string.
        f.pad(&self.hex())
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobId({})", self.short())
    }
}

/// The beginning of an id as people type it: 4 to 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobPrefix(String);

/// Text that can't be the beginning of an id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an id: give 4 to 64 hexadecimal digits of one")]
pub struct NotAnId(pub String);

impl BlobPrefix {
    /// The fewest digits that are accepted: fewer are more likely a slip.
    pub const MIN: usize = 4;

    /// The digits, in lower case.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the id begins with these digits.
    #[must_use]
    pub fn matches(&self, id: &BlobId) -> bool {
        let (low, high) = self.range();
        (low..=high).contains(id)
    }

    /// The lowest and the highest id that begin with these digits, both inclusive: what a database index can search.
    #[must_use]
    pub fn range(&self) -> (BlobId, BlobId) {
        let (mut low, mut high) = ([0; 32], [0xff; 32]);
        for (i, digit) in self.0.chars().enumerate() {
            let value = digit.to_digit(16).unwrap_or(0) as u8;
            let shift = if i % 2 == 0 { 4 } else { 0 };
            low[i / 2] |= value << shift;
            high[i / 2] &= !(0xf << shift) | (value << shift);
        }
        (BlobId(low), BlobId(high))
    }
}

impl FromStr for BlobPrefix {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        let fits = (Self::MIN..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        if fits {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            // What was typed may be a whole file; the message quotes only its beginning.
            Err(NotAnId(text.escape_debug().take(72).collect()))
        }
    }
}

impl From<BlobId> for BlobPrefix {
    fn from(id: BlobId) -> Self {
        Self(id.hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_finds_its_id_and_no_neighbour() {
        let id = BlobId::of(b"something");
        for digits in BlobPrefix::MIN..=64 {
            let prefix: BlobPrefix = id.hex()[..digits].parse().unwrap();
            assert!(prefix.matches(&id), "{digits} digits");
            let mut other = id;
            other.0[(digits - 1) / 2] ^= if digits % 2 == 0 { 0x01 } else { 0x10 };
            assert!(!prefix.matches(&other), "{digits} digits");
        }
        assert_eq!(BlobPrefix::from(id).range(), (id, id));
        assert_eq!(id.short(), id.hex()[..12]);
        assert_eq!(format!("{id:.12}"), id.short());
    }

    #[test]
    fn what_is_no_prefix_is_refused() {
        for text in ["", "abc", "xyz1", "ab cd", "é€é", &"a".repeat(65)] {
            assert!(text.parse::<BlobPrefix>().is_err(), "{text}");
        }
        assert_eq!("ABCD".parse::<BlobPrefix>().unwrap().as_str(), "abcd");
    }
}
