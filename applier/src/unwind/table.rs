//! Exception tables as a personality routine reads them, for the checker: shares no code with the maker, [`super::lsda`].
//!
//! Every number in the tables is resolved to what it denotes, so that two tables can be compared whatever their layout.

use dyni_schema::LinkAddr;
use gimli::{EndianSlice, LittleEndian, Reader};

/// The longest chain of actions, and list of types, that is followed.
const MAX_STEPS: usize = 1 << 16;

/// What a routine does with an exception from some range of code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing: on to the caller.
    Pass,
    /// To this landing pad, as its handlers say.
    Land(LinkAddr, Vec<Handler>),
}

/// One action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Handler {
    Cleanup,
    /// Catches this type, as the switch value says.
    Catch(i64, Type),
    /// Lets only these types pass.
    Specification(i64, Vec<Type>),
}

/// What a type entry says: its encoding's flag for an indirect pointer, and the address; 0 for every exception.
pub(super) type Type = (bool, u64);

/// A table's ranges, as link addresses, in its order.
pub(super) type Ranges = Vec<(u64, u64, Outcome)>;

/// Something at a link address that can be read on from there.
pub(super) trait Source {
    /// The bytes from an address to the end of whatever holds it.
    fn from(&self, at: u64) -> Option<&[u8]>;
}

struct Input<'a> {
    start: u64,
    all: EndianSlice<'a, LittleEndian>,
    rest: EndianSlice<'a, LittleEndian>,
}

impl<'a> Input<'a> {
    fn at(source: &'a dyn Source, at: u64) -> Option<Self> {
        let all = EndianSlice::new(source.from(at)?, LittleEndian);
        Some(Self { start: at, all, rest: all })
    }

    fn here(&self) -> u64 {
        self.start + (self.all.len() - self.rest.len()) as u64
    }

    fn uleb(&mut self) -> Option<u64> {
        self.rest.read_uleb128().ok()
    }

    /// `read_encoded_value` of libgcc's `unwind-pe.h`, without the last step through an indirect pointer.
    fn value(&mut self, encoding: u8) -> Option<u64> {
        let here = self.here();
        let value = match encoding & 0x0f {
            0x00 | 0x04 | 0x0c => self.rest.read_u64().ok()?,
            0x01 => self.uleb()?,
            0x02 => u64::from(self.rest.read_u16().ok()?),
            0x03 => u64::from(self.rest.read_u32().ok()?),
            0x0b => self.rest.read_i32().ok()? as u64,
            _ => return None,
        };
        match encoding & 0x70 {
            _ if value == 0 => Some(0),
            0x00 => Some(value),
            0x10 => Some(value.wrapping_add(here)),
            _ => None,
        }
    }
}

/// The table at `at` for code that begins at `region`.
pub(super) fn read(source: &dyn Source, at: u64, region: u64) -> Option<Ranges> {
    let mut input = Input::at(source, at)?;
    let encoding = input.rest.read_u8().ok()?;
    let pads = if encoding == 0xff { region } else { input.value(encoding)? };
    let types = match input.rest.read_u8().ok()? {
        0xff => None,
        encoding => {
            let distance = input.uleb()?;
            Some((encoding, input.here().checked_add(distance)?))
        }
    };
    let encoding = input.rest.read_u8().ok()?;
    let length = input.uleb()?;
    let actions = input.here().checked_add(length)?;
    let mut ranges = Vec::new();
    while input.here() < actions {
        let (start, len, pad) = (input.value(encoding)?, input.value(encoding)?, input.value(encoding)?);
        let action = input.uleb()?;
        let outcome = match (pad, action) {
            (0, _) => Outcome::Pass,
            (_, 0) => Outcome::Land(LinkAddr(pads.wrapping_add(pad)), Vec::new()),
            _ => Outcome::Land(
                LinkAddr(pads.wrapping_add(pad)),
                handlers(source, actions.checked_add(action - 1)?, types)?,
            ),
        };
        let start = region.wrapping_add(start);
        ranges.push((start, start.wrapping_add(len), outcome));
    }
    (input.here() == actions).then_some(ranges)
}

fn handlers(source: &dyn Source, mut at: u64, types: Option<(u8, u64)>) -> Option<Vec<Handler>> {
    let mut handlers = Vec::new();
    for _ in 0..MAX_STEPS {
        let mut input = Input::at(source, at)?;
        let filter = input.rest.read_sleb128().ok()?;
        let field = input.here();
        let next = input.rest.read_sleb128().ok()?;
        handlers.push(match filter {
            0 => Handler::Cleanup,
            1.. => Handler::Catch(filter, type_at(source, filter as u64, types)?),
            _ => {
                let mut list = Input::at(source, types?.1.checked_add(filter.unsigned_abs() - 1)?)?;
                let mut allowed = Vec::new();
                loop {
                    match list.uleb()? {
                        0 => break,
                        index if allowed.len() < MAX_STEPS => allowed.push(type_at(source, index, types)?),
                        _ => return None,
                    }
                }
                Handler::Specification(filter, allowed)
            }
        });
        if next == 0 {
            return Some(handlers);
        }
        at = field.wrapping_add_signed(next);
    }
    None
}

fn type_at(source: &dyn Source, index: u64, types: Option<(u8, u64)>) -> Option<Type> {
    let (encoding, base) = types?;
    let width = if matches!(encoding & 0x0f, 0x03 | 0x0b) { 4 } else { 8 };
    let at = base.checked_sub(index.checked_mul(width)?)?;
    let address = Input::at(source, at)?.value(encoding)?;
    Some((encoding & 0x80 != 0 && address != 0, address))
}

/// What a table says of an address: `None` where it says nothing, which ends the program. The first range that holds it
/// counts, and none behind one that begins later.
pub(super) fn look_up(ranges: &Ranges, at: u64) -> Option<&Outcome> {
    let after = ranges.partition_point(|r| r.0 <= at);
    ranges[..after].iter().rev().find(|r| at < r.1).map(|r| &r.2)
}

/// Whether [`look_up`] may be asked: ranges rise and do not overlap.
pub(super) fn is_sorted(ranges: &Ranges) -> bool {
    ranges.iter().all(|r| r.0 <= r.1) && ranges.windows(2).all(|w| w[0].1 <= w[1].0)
}
