//! Writing a profile for the Firefox Profiler (profiler.firefox.com), in its *processed profile* format, which is JSON.
//!
//! The format wants moments. A profile has none: instructions follow one another by address, each for as long as its samples
//! stand for. So the call tree, its totals and the assembly view are right, and the order in the timeline means nothing.

use crate::view::{Drawn, NamedFunction, NamedModule, Seen, Unit, View};
use dyni_schema::LinkAddr;
use fxprof_processed_profile::debugid::{CodeId, DebugId};
use fxprof_processed_profile::{
    CategoryHandle, CpuDelta, Frame, FrameFlags, FrameInfo, LibraryInfo, Profile, ReferenceTimestamp, SamplingInterval,
    Symbol, SymbolTable, Timestamp,
};
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

/// How long a sample stands for where that is not known: the format needs something, ns.
const ANY_PERIOD: u64 = 1_000_000;

/// The latest start that is written, seconds since 1970-01-01 UTC: the end of the year 9999.
const LATEST: u64 = 253_402_300_799;

/// Whether a file that begins so may be of this format.
#[must_use]
pub fn looks_like(begins: &[u8]) -> bool {
    begins.starts_with(b"{\"meta\"")
}

/// Writes a profile; how much of it.
///
/// # Errors
/// What writing gave.
pub fn write(view: &View<'_>, mut to: impl Write) -> io::Result<Drawn> {
    let p = view.profile;
    let period = view.period_ns().unwrap_or(ANY_PERIOD);
    let start = ReferenceTimestamp::from_duration_since_unix_epoch(Duration::from_secs(p.start_s.min(LATEST)));
    let mut out = Profile::new(&p.program, start, SamplingInterval::from_nanos(period));
    out.set_os_name(&format!("Linux {}", p.host.kernel));
    let began = Timestamp::from_nanos_since_reference(0);
    let process = out.add_process(&p.program, 0, began);
    let thread = out.add_thread(process, 0, began, true);
    out.set_thread_name(thread, &p.program);
    let seen = view.seen();
    // A weight has 31 bits. Counts of branches may have more, and only what they are to each other matters.
    let most = seen.iter().flat_map(|s| &s.rows).map(|r| r.1).max().unwrap_or(0);
    let scale = if view.unit() == Unit::Branches { most.div_ceil(i32::MAX as u64).max(1) } else { 1 };
    let mut drawn = Drawn::default();
    let mut now: u64 = 0;
    for Seen { module, known, rows } in seen {
        let base = known.map_or(LinkAddr(0), |k| k.base);
        let mut functions = BTreeSet::new();
        let lib = out.add_lib(LibraryInfo {
            name: module.name.clone(),
            debug_name: module.name.clone(),
            path: module.path.clone(),
            debug_path: module.path.clone(),
            debug_id: debug_id(&module.build_id.0),
            code_id: Some(CodeId::new(module.build_id.hex()).to_string()),
            arch: Some("x86_64".to_owned()),
            symbol_table: known.map(|k| Arc::new(symbols(k))),
        });
        for (at, count) in rows {
            match known.and_then(|k| k.function_at(at)) {
                Some(function) => drop(functions.insert(function)),
                None => drawn.unnamed = drawn.unnamed.saturating_add(count),
            }
            // Beyond 4 GiB there is no module; a damaged profile may say so, and is shown by the address alone.
            let frame = match u32::try_from(at.0.wrapping_sub(base.0)) {
                Ok(relative) => Frame::RelativeAddressFromInstructionPointer(lib, relative),
                Err(_) => Frame::Label(out.intern_string(&format!("{}+{at}", module.name))),
            };
            let info = FrameInfo { frame, category_pair: CategoryHandle::OTHER.into(), flags: FrameFlags::empty() };
            let stack = out.intern_stack_frames(thread, std::iter::once(info));
            let time = count.saturating_mul(period);
            now = now.saturating_add(time);
            let weight = i32::try_from(count / scale).unwrap_or(i32::MAX).max(1);
            let when = Timestamp::from_nanos_since_reference(now);
            out.add_sample(thread, when, stack, CpuDelta::from_nanos(time), weight);
            drawn.rows += 1;
        }
        drawn.functions += functions.len() as u64;
    }
    out.set_process_end_time(process, Timestamp::from_nanos_since_reference(now));
    out.set_thread_end_time(thread, Timestamp::from_nanos_since_reference(now));
    // Nobody is to look for other names: there may be none, or those of another host.
    out.set_symbolicated(true);
    serde_json::to_writer(&mut to, &out)?;
    to.write_all(b"\n")?;
    to.flush()?;
    Ok(drawn)
}

fn symbols(known: &NamedModule) -> SymbolTable {
    let symbol = |f: &NamedFunction| {
        let address = u32::try_from(f.start.0.wrapping_sub(known.base.0)).ok()?;
        Some(Symbol { address, size: Some(f.size), name: f.name.clone() })
    };
    SymbolTable::new(known.functions.iter().filter_map(symbol).collect())
}

/// The identity that Breakpad, and so this format, makes of a build-id: its first 16 bytes as a little-endian GUID.
fn debug_id(build_id: &[u8]) -> DebugId {
    let mut guid = [0; 16];
    let length = build_id.len().min(guid.len());
    guid[..length].copy_from_slice(&build_id[..length]);
    guid[0..4].reverse();
    guid[4..6].reverse();
    guid[6..8].reverse();
    DebugId::from_guid_age(&guid, 0).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{known, profile};
    use serde_json::Value;

    fn written(view: &View<'_>) -> (Value, Drawn) {
        let mut file = Vec::new();
        let drawn = write(view, &mut file).unwrap();
        assert!(looks_like(&file), "{}", String::from_utf8_lossy(&file[..60]));
        (serde_json::from_slice(&file).unwrap(), drawn)
    }

    #[test]
    fn names_weights_and_libraries_are_there() {
        let profile = profile();
        let (json, drawn) = written(&View { profile: &profile, id: "ab", modules: vec![known()] });
        assert_eq!(drawn, Drawn { functions: 1, rows: 5, unnamed: 15 });
        assert_eq!(json["meta"]["interval"], 1.0);
        assert_eq!(json["meta"]["symbolicated"], true);
        let libs = json["libs"].as_array().unwrap();
        let main = libs.iter().find(|l| l["name"] == "main").unwrap();
        assert_eq!(main["codeId"], "02".repeat(20));
        let thread = &json["threads"][0];
        let weights = thread["samples"]["weight"].as_array().unwrap();
        assert_eq!(weights.iter().filter_map(Value::as_i64).sum::<i64>(), 115);
        let text = json.to_string();
        assert!(text.contains("\"work\"") && !text.contains("\"idle\""), "{text}");
    }

    #[test]
    fn counts_beyond_the_format_keep_their_shares() {
        let mut profile = profile();
        for m in &mut profile.modules {
            m.branches.from = std::mem::take(&mut m.samples.addr);
            m.branches.count = m.samples.count.drain(..).map(|c| c << 40).collect();
            m.branches.to = m.branches.from.clone();
            m.branches.mispredicted = vec![0; m.branches.from.len()];
        }
        let (json, _) = written(&View { profile: &profile, id: "", modules: Vec::new() });
        let weights: Vec<_> =
            json["threads"][0]["samples"]["weight"].as_array().unwrap().iter().filter_map(Value::as_i64).collect();
        assert!((weights[0] as f64 / weights[1] as f64 - 70.0 / 30.0).abs() < 1e-6, "{weights:?}");
    }
}
