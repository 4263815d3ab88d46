//! Several recordings of a program as one.
//!
//! Tables are sorted by their key, so two merge by one walk: what both have is summed, saturating. The result depends
//! neither on the order nor on the grouping of the recordings, so hosts may merge in any tree.
//!
//! Of words and settings that differ the merge says nothing rather than something wrong: an empty label, a rate of 0.

use dyni_schema::{
    Branches, BuildId, FunctionHash, FunctionIndex, FunctionShape, Host, Method, ModuleProfile, Profile, Ranges,
    Samples, Shapes,
};
use std::cmp::Ordering;

/// Why profiles can't be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// There is none.
    #[error("there is nothing to merge")]
    Nothing,
    /// They are of two programs.
    #[error("'{0}' and '{1}' are different programs: their profiles can't be merged")]
    Programs(String, String),
    /// Some are exact counts, some are samples: their numbers have different units.
    #[error("exact counts and samples can't be merged; merge profiles of method 'count' with each other only")]
    Units,
}

/// One profile with the evidence of all: counts summed (saturating), the earliest start, the sum of durations, the
/// method of the weakest.
///
/// # Errors
/// [`MergeError`] if there is none, or they are of different programs or units.
pub fn merge(profiles: &[&Profile]) -> Result<Profile, MergeError> {
    let first = *profiles.first().ok_or(MergeError::Nothing)?;
    for p in profiles {
        if p.program != first.program {
            let (a, b) = (first.program.clone(), p.program.clone());
            return Err(if a < b { MergeError::Programs(a, b) } else { MergeError::Programs(b, a) });
        }
        if (p.method == Method::Count) != (first.method == Method::Count) {
            return Err(MergeError::Units);
        }
    }
    Ok(all(profiles, first))
}

/// By halves, so that each row is moved a logarithmic number of times.
fn all(profiles: &[&Profile], first: &Profile) -> Profile {
    match profiles {
        [] => first.clone(),
        [one] => (*one).clone(),
        _ => {
            let (left, right) = profiles.split_at(profiles.len() / 2);
            two(&all(left, first), &all(right, first))
        }
    }
}

fn two(a: &Profile, b: &Profile) -> Profile {
    Profile {
        program: a.program.clone(),
        label: common(&a.label, &b.label),
        method: a.method.max(b.method),
        method_note: common(&a.method_note, &b.method_note),
        host: Host { cpu: common(&a.host.cpu, &b.host.cpu), kernel: common(&a.host.kernel, &b.host.kernel) },
        start_s: a.start_s.min(b.start_s),
        duration_ns: a.duration_ns.saturating_add(b.duration_ns),
        frequency_hz: common(&a.frequency_hz, &b.frequency_hz),
        processes: a.processes.saturating_add(b.processes),
        threads: a.threads.saturating_add(b.threads),
        samples: a.samples.saturating_add(b.samples),
        outside: a.outside.saturating_add(b.outside),
        kernel: a.kernel.saturating_add(b.kernel),
        in_cache: a.in_cache.saturating_add(b.in_cache),
        lost: a.lost.saturating_add(b.lost),
        modules: modules(&a.modules, &b.modules),
    }
}

fn common<T: Clone + Default + PartialEq>(a: &T, b: &T) -> T {
    if a == b { a.clone() } else { T::default() }
}

/// Names and paths of a module may differ between hosts; any will do as long as it is always the same one.
fn either(a: &str, b: &str) -> String {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => b.into(),
        (_, true) => a.into(),
        _ => a.min(b).into(),
    }
}

/// One walk over two tables that rise strictly in their key; `sum` joins the values that share a key.
fn walk<K: Ord, V>(
    a: impl Iterator<Item = (K, V)>,
    b: impl Iterator<Item = (K, V)>,
    sum: impl Fn(V, V) -> V,
    mut push: impl FnMut(K, V),
) {
    let (mut a, mut b) = (a.peekable(), b.peekable());
    loop {
        let order = match (a.peek(), b.peek()) {
            (Some(x), Some(y)) => x.0.cmp(&y.0),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return,
        };
        let left = if order.is_le() { a.next() } else { None };
        let right = if order.is_ge() { b.next() } else { None };
        match (left, right) {
            (Some((key, x)), Some((_, y))) => push(key, sum(x, y)),
            (Some((key, value)), None) | (None, Some((key, value))) => push(key, value),
            (None, None) => return,
        }
    }
}

fn modules(a: &[ModuleProfile], b: &[ModuleProfile]) -> Vec<ModuleProfile> {
    fn rows(modules: &[ModuleProfile]) -> impl Iterator<Item = (&BuildId, (&ModuleProfile, Option<&ModuleProfile>))> {
        modules.iter().map(|m| (&m.build_id, (m, None)))
    }
    let mut out = Vec::with_capacity(a.len().max(b.len()));
    walk(
        rows(a),
        rows(b),
        |(x, _), (y, _)| (x, Some(y)),
        |_, (x, y)| out.push(y.map_or_else(|| x.clone(), |y| module(x, y))),
    );
    out
}

fn module(a: &ModuleProfile, b: &ModuleProfile) -> ModuleProfile {
    let (functions, shapes) = functions(a, b);
    ModuleProfile {
        build_id: a.build_id.clone(),
        name: either(&a.name, &b.name),
        path: either(&a.path, &b.path),
        samples: samples(&a.samples, &b.samples),
        branches: branches(&a.branches, &b.branches),
        ranges: ranges(&a.ranges, &b.ranges),
        functions,
        shapes,
    }
}

fn samples(a: &Samples, b: &Samples) -> Samples {
    fn rows(s: &Samples) -> impl Iterator<Item = (u64, u64)> {
        s.addr.iter().copied().zip(s.count.iter().copied())
    }
    let mut out = Samples::default();
    walk(rows(a), rows(b), u64::saturating_add, |addr, count| {
        out.addr.push(addr);
        out.count.push(count);
    });
    out
}

fn branches(a: &Branches, b: &Branches) -> Branches {
    fn rows(b: &Branches) -> impl Iterator<Item = ((u64, u64), (u64, u64))> {
        let keys = b.from.iter().copied().zip(b.to.iter().copied());
        keys.zip(b.count.iter().copied().zip(b.mispredicted.iter().copied()))
    }
    let mut out = Branches::default();
    let sum = |x: (u64, u64), y: (u64, u64)| (x.0.saturating_add(y.0), x.1.saturating_add(y.1));
    walk(rows(a), rows(b), sum, |(from, to), (count, mispredicted)| {
        out.from.push(from);
        out.to.push(to);
        out.count.push(count);
        out.mispredicted.push(mispredicted);
    });
    out
}

fn ranges(a: &Ranges, b: &Ranges) -> Ranges {
    fn rows(r: &Ranges) -> impl Iterator<Item = ((u64, u64), u64)> {
        r.start.iter().copied().zip(r.end.iter().copied()).zip(r.count.iter().copied())
    }
    let mut out = Ranges::default();
    walk(rows(a), rows(b), u64::saturating_add, |(start, end), count| {
        out.start.push(start);
        out.end.push(end);
        out.count.push(count);
    });
    out
}

/// The same build has the same functions; where two entries disagree one of them lies, and it does not matter which is
/// kept as long as it is always the same one: the hash is checked against the binary anyway.
/// A function that one of them has no shape of (it was not hot there) has the other's.
fn functions(a: &ModuleProfile, b: &ModuleProfile) -> (FunctionIndex, Shapes) {
    fn rows(m: &ModuleProfile) -> impl Iterator<Item = (u64, (u32, FunctionHash, FunctionShape))> {
        let f = &m.functions;
        let shapes = m.shapes.unpack().into_iter().chain(std::iter::repeat(FunctionShape::default()));
        let values = f.size.iter().copied().zip(f.hash.iter().copied()).zip(shapes);
        f.start.iter().copied().zip(values.map(|((size, hash), shape)| (size, hash, shape)))
    }
    let (mut out, mut shapes) = (FunctionIndex::default(), Vec::new());
    walk(rows(a), rows(b), Ord::max, |start, (size, hash, shape)| {
        out.start.push(start);
        out.size.push(size);
        out.hash.push(hash);
        shapes.push(shape);
    });
    let known = !a.shapes.name.is_empty() || !b.shapes.name.is_empty();
    (out, if known { Shapes::pack(&shapes) } else { Shapes::default() })
}
