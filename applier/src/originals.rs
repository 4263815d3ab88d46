//! What copies were made from: the bytes of functions, and of what copies go past.

use crate::check::Originals;
use crate::lower::Source;
use crate::remote::Memory;
use dyni_analyzer::image::Image;
use dyni_schema::LinkAddr;

/// The bytes that a generation's copies were made from, and are checked against.
#[derive(Debug, Default)]
pub struct FunctionBytes {
    /// The functions that were copied, by start.
    functions: Vec<(LinkAddr, Vec<u8>)>,
    /// Stubs, by start.
    stubs: Vec<(LinkAddr, Vec<u8>)>,
    /// Jump tables, by start.
    tables: Vec<Table>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Table {
    at: LinkAddr,
    /// With 8-byte addresses as entries: here link addresses.
    absolute: bool,
    bytes: Vec<u8>,
}

fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.collect();
    items.sort_unstable();
    items.dedup();
    items
}

impl FunctionBytes {
    /// What copies of these functions of a file are made from.
    #[must_use]
    pub fn of<'s, 'p: 's>(sources: impl Iterator<Item = &'s Source<'p>> + Clone, image: &Image) -> Self {
        let stubs = sources.clone().flat_map(|s| &s.stubs).map(|s| (s.at, s.bytes.clone()));
        let tables = sources.clone().filter(|s| !s.table_loads.is_empty()).flat_map(|s| &s.cfg.jump_tables);
        let tables = tables.filter_map(|t| Some(Table { at: t.address, absolute: t.absolute, bytes: t.bytes(image)? }));
        Self {
            stubs: sorted(stubs),
            tables: sorted(tables),
            functions: sorted(sources.map(|s| (s.cfg.start, s.code.clone()))),
        }
    }

    /// Each function's start and bytes, rising.
    pub fn iter(&self) -> impl Iterator<Item = (LinkAddr, &[u8])> {
        self.functions.iter().map(|(start, bytes)| (*start, bytes.as_slice()))
    }

    /// Whether a process that has the module mapped with this bias has the same stubs and jump tables.
    pub(crate) fn what_leads_on_is_in(&self, memory: &Memory, bias: u64) -> bool {
        let live = |at: LinkAddr, len: usize| memory.read_vec(at.run(bias), len).ok();
        let same_table = |t: &Table| {
            live(t.at, t.bytes.len()).is_some_and(|mut live| {
                for entry in live.chunks_exact_mut(8).filter(|_| t.absolute) {
                    let address = u64::from_le_bytes((&*entry).try_into().expect("eight bytes"));
                    entry.copy_from_slice(&address.wrapping_sub(bias).to_le_bytes());
                }
                live == t.bytes
            })
        };
        self.stubs.iter().all(|(at, bytes)| live(*at, bytes.len()).as_ref() == Some(bytes))
            && self.tables.iter().all(same_table)
    }
}

/// What lies at an address, from the start of the one of these that holds it.
fn holding(list: &[(LinkAddr, Vec<u8>)], at: LinkAddr, len: usize) -> Option<&[u8]> {
    let (start, bytes) = &list[list.partition_point(|(start, _)| *start <= at).checked_sub(1)?];
    let from = at.distance(*start) as usize;
    bytes.get(from..from.checked_add(len)?)
}

impl Originals for FunctionBytes {
    fn bytes(&self, at: LinkAddr, len: usize) -> Option<&[u8]> {
        let table = || {
            // Two functions may read one table to different lengths.
            let first = self.tables.partition_point(|t| t.at < at);
            let here = self.tables[first..].iter().take_while(|t| t.at == at);
            here.map(|t| &t.bytes[..]).find(|bytes| bytes.len() == len)
        };
        holding(&self.functions, at, len).or_else(|| holding(&self.stubs, at, len)).or_else(table)
    }
}
