//! What must not be optimised, and why, in words that the commands print.
//!
//! Three kinds of reason: the whole module belongs to a runtime that looks at return addresses or rewrites its code
//! ([`RUNTIMES`], [`module_refusal`]); a function is named by a restartable sequence ([`rseq_functions`]); a function may be
//! on the stack of a throw while the unwinder can't be told about copies ([`may_unwind`]).

mod caller;
mod unwind;

use crate::functions::Functions;
use crate::image::Image;
use dyni_schema::LinkAddr;

pub use caller::{OBSERVERS, observes_caller};
pub(crate) use caller::{observers_by_name, return_address_readers};
pub use unwind::{FunctionSet, NOTHROW, Options, may_unwind};

/// What in a file shows that a runtime made it. Any of them suffices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// Names of sections.
    pub sections: &'static [&'static str],
    /// Names of symbols, defined or imported.
    pub symbols: &'static [&'static str],
    /// Owners of notes.
    pub notes: &'static [&'static str],
    /// `DT_SONAME`.
    pub sonames: &'static [&'static str],
    /// Texts in read-only data, for files that are stripped of all else: the names of the runtime's environment variables.
    pub texts: &'static [&'static str],
}

/// A runtime whose modules are never optimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// Its name.
    pub name: &'static str,
    /// Why.
    pub reason: &'static str,
    /// How it is recognised.
    pub evidence: Evidence,
}

const NOTHING: Evidence = Evidence { sections: &[], symbols: &[], notes: &[], sonames: &[], texts: &[] };

/// Every runtime whose modules are refused. `dyni doctor` prints this table.
pub const RUNTIMES: &[Runtime] = &[
    Runtime {
        name: "Go",
        reason: "its stack scanner and panics look up every return address in tables of the binary",
        evidence: Evidence {
            sections: &[".go.buildinfo", ".gopclntab", ".note.go.buildid"],
            notes: &["Go"],
            symbols: &["runtime.text", "runtime.morestack"],
            ..NOTHING
        },
    },
    Runtime {
        name: "OCaml",
        reason: "its collector and exceptions look up every return address in frame tables",
        evidence: Evidence {
            symbols: &["caml_frametable", "caml_system__frametable", "caml_startup_code_begin"],
            texts: &["OCAMLRUNPARAM"],
            ..NOTHING
        },
    },
    Runtime {
        name: "GHC (Haskell)",
        reason: "its code is laid out with tables in front of every return address",
        evidence: Evidence { symbols: &["stg_upd_frame_info", "hs_main"], texts: &["GHCRTS"], ..NOTHING },
    },
    Runtime {
        name: ".NET native AOT",
        reason: "its collector and exceptions look up every return address in tables",
        evidence: Evidence { sections: &["__managedcode", ".managedcode"], ..NOTHING },
    },
    Runtime {
        name: "GraalVM native image",
        reason: "its collector and exceptions look up every return address in tables",
        evidence: Evidence { sections: &[".svm_heap"], symbols: &["__svm_code_section"], ..NOTHING },
    },
    Runtime {
        name: "Dart AOT",
        reason: "its collector and exceptions look up every return address in tables",
        evidence: Evidence { symbols: &["_kDartIsolateSnapshotInstructions"], ..NOTHING },
    },
    Runtime {
        name: "vDSO",
        reason: "it belongs to the kernel",
        evidence: Evidence { sonames: &["linux-vdso.so.1"], ..NOTHING },
    },
];

/// Whether the whole module is refused: the runtime that made it.
#[must_use]
pub fn module_refusal(image: &Image) -> Option<&'static Runtime> {
    RUNTIMES.iter().find(|r| {
        let e = &r.evidence;
        e.sections.iter().any(|s| image.section(s).is_some())
            || image.notes().any(|(owner, _)| e.notes.contains(&owner))
            || image.soname().is_some_and(|s| e.sonames.contains(&s))
            || (!e.symbols.is_empty()
                && (image.symbols().any(|s| e.symbols.contains(&s.2))
                    || image.imports().any(|s| e.symbols.contains(&s))))
            || e.texts.iter().any(|t| holds_text(image, t))
    })
}

/// Whether read-only data hold a zero-ended string. A library of that runtime's language bindings may mention its name in a
/// longer text; the runtime itself passes exactly this to `getenv`.
fn holds_text(image: &Image, text: &str) -> bool {
    let Some(rodata) = image.section(".rodata") else { return false };
    let Some(bytes) = image.bytes(rodata.address, rodata.size as usize) else { return false };
    let text = text.as_bytes();
    let mut rest = bytes;
    while let Some(i) = rest.iter().position(|&b| b == text[0]) {
        let before = bytes.len() - rest.len() + i;
        rest = &rest[i + 1..];
        if (before == 0 || bytes[before - 1] == 0)
            && rest.starts_with(&text[1..])
            && rest.get(text.len() - 1) == Some(&0)
        {
            return true;
        }
    }
    false
}

/// The functions that restartable sequences name (`__rseq_cs` sections), by their start, sorted. The kernel compares the
/// instruction pointer with the addresses that these state, so a copy would not be restarted.
#[must_use]
pub fn rseq_functions(image: &Image, functions: &Functions) -> Vec<LinkAddr> {
    /// `struct rseq_cs`: version and flags (4 bytes each), start, length, abort handler (8 bytes each).
    const RECORD: u64 = 32;
    let mut named = Vec::new();
    for s in image.sections().iter().filter(|s| s.name == "__rseq_cs" && s.has_bytes && s.size < 1 << 24) {
        for record in (0..s.size / RECORD).map(|i| s.address.plus(i * RECORD)) {
            for slot in [record.plus(8), record.plus(24)] {
                named.extend(image.pointer_at(slot).and_then(|a| functions.at(a)).map(|f| f.start));
            }
        }
    }
    named.sort_unstable();
    named.dedup();
    named
}
