//! What a function's own frame description entry says of it.

use super::UnwindRefusal;
use super::lsda::Table;
use super::rows::Rows;
use dyni_analyzer::functions::{Function, Functions};
use dyni_analyzer::image::Image;
use dyni_schema::LinkAddr;
use gimli::constants::{DW_EH_PE_absptr as ABSPTR, DW_EH_PE_pcrel as PCREL};
use gimli::{DwEhPe, Pointer, UnwindContext};

/// The routines that are known to read exception tables of the layout that [`super::lsda`] writes: those of C++, of C
/// with `-fexceptions`, of Rust, Ada, D and Objective-C. One whose name can't be found (a stripped, static program) is
/// known by its tables.
const PERSONALITIES: [&str; 6] = [
    "__gxx_personality_v0",
    "__gcc_personality_v0",
    "rust_eh_personality",
    "__gnat_personality_v0",
    "__gdc_personality_v0",
    "__gnu_objc_personality_v0",
];

/// A personality routine, as an entry names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Personality {
    /// The routine, or the 8 bytes that hold its address.
    pub at: LinkAddr,
    /// Which of them.
    pub indirect: bool,
}

/// One function's unwind data, understood in full.
#[derive(Debug)]
pub(super) struct Frame {
    pub rows: Rows,
    pub personality: Option<Personality>,
    pub table: Option<Table>,
    /// A signal's frame: the address in it is where the program was, not where it comes back to.
    pub is_signal: bool,
}

/// What it takes to find a frame's caller: the rows, and whether it is a signal's frame. `None` if the function has no
/// unwind data.
pub(super) fn rows(
    image: &Image,
    functions: &Functions,
    function: &Function,
) -> Result<Option<(Rows, bool)>, UnwindRefusal> {
    if function.fde.is_none() {
        return Ok(None);
    }
    let (section, bases) = functions.eh_frame(image).ok_or(UnwindRefusal::Frame)?;
    let fde = functions.fde(image, function).ok_or(UnwindRefusal::Frame)?;
    if fde.initial_address() != function.start.0 || fde.len() < u64::from(function.size) {
        return Err(UnwindRefusal::Frame);
    }
    let rows = Rows::read(&section, &bases, &fde, &mut UnwindContext::new())?;
    Ok(Some((rows, fde.is_signal_trampoline())))
}

/// Reads them; `None` if the function has none.
pub(super) fn read(image: &Image, functions: &Functions, function: &Function) -> Result<Option<Frame>, UnwindRefusal> {
    let Some((rows, is_signal)) = rows(image, functions, function)? else { return Ok(None) };
    let (_, bases) = functions.eh_frame(image).ok_or(UnwindRefusal::Frame)?;
    let fde = functions.fde(image, function).ok_or(UnwindRefusal::Frame)?;
    let cie = fde.cie();
    // A null pointer that is counted from its own place comes as that place.
    let start = bases.eh_frame.section.ok_or(UnwindRefusal::Frame)?;
    let is_null = |value: u64, entry: usize, len: usize| {
        let offset = value.wrapping_sub(start);
        value == 0 || (entry as u64..entry as u64 + len as u64 + 12).contains(&offset)
    };
    let personality = match cie.personality_with_encoding() {
        None => None,
        Some((_, pointer)) if is_null(pointer.pointer(), cie.offset(), cie.entry_len()) => {
            return Err(UnwindRefusal::Personality);
        }
        Some((encoding, pointer)) => {
            let (indirect, at) = match pointer {
                Pointer::Direct(at) => (false, LinkAddr(at)),
                Pointer::Indirect(at) => (true, LinkAddr(at)),
            };
            if !is_fixed(image, encoding) || !image.contains(at) || !is_known(image, at, indirect) {
                return Err(UnwindRefusal::Personality);
            }
            Some(Personality { at, indirect })
        }
    };
    let table = match (fde.lsda(), cie.lsda_encoding()) {
        (Some(pointer), Some(encoding)) if !is_null(pointer.pointer(), fde.offset(), fde.entry_len()) => {
            if personality.is_none() || !is_fixed(image, encoding) {
                return Err(UnwindRefusal::ExceptionTable);
            }
            let at = match pointer {
                Pointer::Direct(at) => LinkAddr(at),
                Pointer::Indirect(_) => return Err(UnwindRefusal::ExceptionTable),
            };
            Some(Table::read(image, at, function).ok_or(UnwindRefusal::ExceptionTable)?)
        }
        _ => None,
    };
    Ok(Some(Frame { rows, personality, table, is_signal }))
}

/// Whether a pointer in this encoding is what the file says it is, without a relocation.
fn is_fixed(image: &Image, encoding: DwEhPe) -> bool {
    match encoding.application() {
        PCREL => true,
        ABSPTR => image.kind().is_fixed(),
        _ => false,
    }
}

fn is_known(image: &Image, at: LinkAddr, indirect: bool) -> bool {
    let named = |name: &str| {
        let name = name.split('@').next().unwrap_or(name);
        // Rust's is mangled like any function of its library.
        PERSONALITIES.contains(&name) || name.contains("rust_eh_personality")
    };
    if indirect && let Some(name) = image.got_name(at) {
        return named(name);
    }
    let routine = if indirect { image.pointer_at(at) } else { Some(at) };
    let Some(routine) = routine else { return false };
    match image.plt_name(routine).or_else(|| image.symbol_at(routine).filter(|s| s.1 == routine).map(|s| s.0)) {
        Some(name) => named(name),
        None => image.is_executable(routine),
    }
}
