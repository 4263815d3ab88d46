//! Why a function lies as it does, or why it stays where it is: text for people.

use crate::cfg::{Block, GiveUp, KeepOriginal, Terminator};
use crate::exttsp::JumpKind;
use crate::infer::Quality;
use crate::passes::FunctionLayout;
use crate::passes::infer::Evidence;
use crate::plan::{Module, Options, Reason, lay_out};
use crate::refuse;
use dyni_schema::{LinkAddr, Profile};
use std::fmt::Write;

/// Why there is nothing to explain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// No function has that name or holds that address.
    #[error("no function of the profile's binaries is called \"{0}\" or holds that address")]
    Unknown(String),
}

/// Everything about one function: `what` is its name, mangled or not, or a hexadecimal link address inside it (`0x…`).
/// If several modules have one, all of them are explained.
///
/// # Errors
/// If there is no such function.
pub fn explain(
    profile: &Profile,
    modules: &[Module<'_>],
    options: &Options,
    what: &str,
) -> Result<String, ExplainError> {
    let address = what.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok()).map(LinkAddr);
    let mut text = String::new();
    for seen in &profile.modules {
        let Some(module) = modules.iter().find(|m| *m.image.build_id() == seen.build_id) else { continue };
        let evidence = Evidence::new(seen, profile.method);
        let found: Vec<usize> = match address {
            Some(at) => module.functions.index_at(at).into_iter().collect(),
            None => named(module, what),
        };
        for index in found {
            if !text.is_empty() {
                text.push('\n');
            }
            one(&mut text, module, &evidence, options, index);
        }
    }
    if text.is_empty() { Err(ExplainError::Unknown(what.to_owned())) } else { Ok(text) }
}

/// The functions of that name: the symbol as it is, demangled, or demangled without its parameters.
fn named(module: &Module<'_>, name: &str) -> Vec<usize> {
    let fits = |symbol: &str| {
        symbol == name || {
            let plain = crate::image::demangle(symbol);
            plain == name || plain.split('(').next() == Some(name)
        }
    };
    let mut found: Vec<usize> =
        module.image.symbols().filter(|s| fits(s.2)).filter_map(|s| module.functions.index_at(s.0)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

// Writing to a string can't fail, so the results of `write!` are dropped below.
fn one(text: &mut String, module: &Module<'_>, evidence: &Evidence<'_>, options: &Options, index: usize) {
    let function = module.functions.all()[index];
    let samples: u64 = evidence.samples(function.start, function.end()).map(|s| s.1).sum();
    let name = function.name(module.image).unwrap_or_else(|| format!("fn_{:x}", function.start.0));
    let _ = writeln!(text, "{name} in {}", module.image.name());
    let _ = writeln!(text, "  {}, {} bytes, {samples} samples", function.start, function.size);
    if let Some(runtime) = refuse::module_refusal(module.image) {
        let _ = writeln!(text, "  not optimised: its module belongs to {}: {}", runtime.name, runtime.reason);
        return;
    }
    let unwind = refuse::Options { unwind_registered: options.unwind_registered, others_throw: false };
    // Empty, and at once, where copies are registered.
    let stays = refuse::may_unwind(module.image, module.functions, module.targets, unwind).has(index);
    let outcome = match stays {
        true => Err(Reason::Function(GiveUp::MayUnwind)),
        false => lay_out(module, function, evidence, options.passes),
    };
    match outcome {
        Err(reason) => {
            let _ = writeln!(text, "  not optimised: it {}", reason.text());
        }
        Ok((layout, stats)) => {
            let quality = match layout.flow.quality {
                Quality::Optimal => "",
                Quality::Feasible => " (inference stopped at its step limit)",
                Quality::Heuristic => " (inference left out: raw weights)",
            };
            let _ = writeln!(text, "  passes {}{quality}", options.passes);
            for stat in stats {
                let _ = writeln!(text, "  {stat}");
            }
            blocks(text, &layout);
        }
    }
}

fn blocks(text: &mut String, layout: &FunctionLayout) {
    let _ = writeln!(
        text,
        "  {:>4} {:>8} {:>6} {:>5} {:>9} {:>12} what",
        "new", "offset", "bytes", "insns", "samples", "count"
    );
    let mut rest: Vec<u32> = (0..layout.cfg.blocks.len() as u32).filter(|b| !layout.order.contains(b)).collect();
    for (place, &b) in layout.order.iter().enumerate() {
        if place == layout.hot {
            let _ = writeln!(text, "  ---- cold");
        }
        block(text, layout, b, Some(place));
    }
    if !rest.is_empty() {
        let _ = writeln!(text, "  ---- stays in the original");
    }
    for b in rest.drain(..) {
        block(text, layout, b, None);
    }
}

fn block(text: &mut String, layout: &FunctionLayout, b: u32, place: Option<usize>) {
    let i = b as usize;
    let block = &layout.cfg.blocks[i];
    let _ = write!(
        text,
        "  {:>4} {:>8} {:>6} {:>5} {:>9} {:>12}",
        place.map_or("-".to_owned(), |p| p.to_string()),
        format!("+{:x}", layout.offset(b)),
        layout.size(b),
        layout.info[i].instructions,
        layout.samples[i],
        layout.flow.nodes[i]
    );
    for (e, count) in layout.edges.iter().zip(&layout.flow.edges).filter(|(e, _)| e.from == b) {
        let arrow = match e.kind {
            JumpKind::Indirect => "=>",
            _ if e.fall_through => "->",
            _ => "~>",
        };
        // Of a large jump table only what ran.
        if e.kind != JumpKind::Indirect || *count > 0 {
            let _ = write!(text, " {arrow}+{:x}:{count}", layout.offset(e.to));
        }
    }
    if layout.flow.left[i] > 0 {
        let _ = write!(text, " {}:{}", exit(block), layout.flow.left[i]);
    }
    for (word, holds) in [
        ("[patched]", b == 0 || layout.entries.contains(&b)),
        ("[address taken]", block.address_taken),
        ("[caller is observed]", block.keep_original == Some(KeepOriginal::CallerIsObserved)),
        ("[reads its own address]", block.keep_original == Some(KeepOriginal::ReadsOwnAddress)),
        ("[landing pad]", block.keep_original == Some(KeepOriginal::LandingPad)),
        ("[instruction can't be copied]", block.keep_original == Some(KeepOriginal::Instruction)),
    ] {
        if holds {
            let _ = write!(text, " {word}");
        }
    }
    text.push('\n');
}

/// How execution leaves the function at the end of a block.
fn exit(block: &Block) -> String {
    match block.terminator {
        Terminator::Stop => "return".to_owned(),
        Terminator::Jump { target } | Terminator::Conditional { taken: target } => format!("~>{target}"),
        Terminator::Indirect { .. } => "=>?".to_owned(),
        Terminator::FallThrough => "end".to_owned(),
    }
}

#[cfg(test)]
mod tests;
