//! What identifies a module and a function across hosts, restarts and rebuilds.

use std::fmt;

/// The longest identity a module may have, in bytes.
pub const MAX_BUILD_ID: usize = 64;

/// The identity of an ELF file: its GNU build-id note, or, where it has none, the BLAKE3 hash of its executable bytes
/// ([`BuildId::from_text`]). The two can't be mistaken for each other: a synthetic identity has a prefix byte.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct BuildId(pub Vec<u8>);

impl BuildId {
    /// The identity of a file that has no build-id note, from the bytes of its executable segments in file order.
    #[must_use]
    pub fn from_text<'a>(segments: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = blake3::Hasher::new();
        for bytes in segments {
            hasher.update(bytes);
        }
        let mut id = vec![b't'];
        id.extend_from_slice(&hasher.finalize().as_bytes()[..24]);
        Self(id)
    }

    /// Lower-case hexadecimal, as `file` and `perf` print it.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The identity that [`BuildId::hex`] printed; `None` if the text is not hexadecimal or too long.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits || !text.len().is_multiple_of(2) || text.len() > 2 * MAX_BUILD_ID {
            return None;
        }
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok())
            .collect::<Option<_>>()
            .map(Self)
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BuildId({})", self.hex())
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

/// The hash of one function's bytes with everything that depends on its position masked out, so that a function which
/// only moved keeps its hash in the next build.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct FunctionHash(pub [u8; 16]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_there_and_back() {
        let id = BuildId(vec![0, 0x1f, 0xff]);
        assert_eq!(id.hex(), "001fff");
        assert_eq!(BuildId::from_hex("001fff"), Some(id));
        assert_eq!(BuildId::from_hex("00zz"), None);
        assert_eq!(BuildId::from_hex("0"), None);
        assert_eq!(BuildId::from_hex("+f"), None);
    }
}
