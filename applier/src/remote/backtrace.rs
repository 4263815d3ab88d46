//! Whether a thread is inside a signal handler, or inside a library that keeps locks: its stack, frame by frame, by the
//! files' call frame information.
//!
//! A signal frame is known by the return address that the kernel puts there. But the same word lies about in memory that
//! an earlier handler used and no frame has overwritten since, so finding it proves nothing. Walking does; and as that
//! needs files to be read, the stack of a thread that waits is copied while it is stopped and walked while it runs on. What
//! was found holds for as long as the thread waits with the same return addresses on its stack ([`Walked::still_holds`]).
//! For one that computes, all files are read beforehand ([`Frames::read_all`]).

use super::trace::Registers;
use crate::resolve::Resolver;
use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_collector::maps::{MappedModule, modules};
use dyni_schema::{BuildId, RunAddr};
use gimli::{CfaRule, RegisterRule, UnwindContext};
use std::collections::HashMap;

/// The most frames that are walked.
const MAX_FRAMES: usize = 512;
/// DWARF's numbers (System V ABI for x86-64, figure 3.36).
const RSP: usize = 7;
const RETURN_ADDRESS: usize = 16;

/// A thread's stack as it was when the thread was stopped.
pub(super) struct Stack {
    pub registers: Registers,
    /// The words from the stack pointer up.
    pub words: Vec<u64>,
}

impl Stack {
    fn word(&self, at: u64) -> Option<u64> {
        let offset = at.checked_sub(self.registers.rsp).filter(|o| o.is_multiple_of(8))?;
        self.words.get(usize::try_from(offset / 8).ok()?).copied()
    }
}

/// A stack that was walked to its end and has no signal frame.
pub(super) struct Walked {
    rip: u64,
    rsp: u64,
    /// Where its return addresses are, and what they were.
    returns: Vec<(u64, u64)>,
    /// Whose code each frame is, innermost first.
    owners: Vec<Owner>,
}

/// Whose code a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The program's, or a library's that has nothing to do with what dyni calls.
    Program,
    /// That of a library by which threads begin and end: the C and the C++ library.
    Runtime,
    /// That of the dynamic loader or the unwinder.
    Loader,
}

impl Owner {
    fn of(module: &str) -> Self {
        let is = |prefixes: &[&str]| prefixes.iter().any(|p| module.starts_with(p));
        if is(&["ld-linux", "ld-2.", "ld.so", "ld-musl-", "libgcc_s", "libunwind", "libdl"]) {
            Self::Loader
        } else if is(&["libc.so", "libc-2.", "libc.musl-", "libpthread", "libstdc++", "libc++"]) {
            Self::Runtime
        } else {
            Self::Program
        }
    }
}

impl Walked {
    /// Whether nothing but the program itself is at work: no library is on the stack but where threads begin, so none
    /// holds a lock for this thread.
    pub fn is_in_program(&self) -> bool {
        // The outermost frame of the main thread is the program's `_start`.
        let begin = self.owners.iter().take_while(|o| **o == Owner::Program).count();
        let rest = &self.owners[begin..];
        let rest = rest.strip_suffix(&[Owner::Program]).unwrap_or(rest);
        begin > 0 && rest.iter().all(|o| *o == Owner::Runtime)
    }

    /// Whether a thread stands where this one did, with the same frames above it.
    pub fn still_holds(&self, now: &Stack) -> bool {
        let r = &now.registers;
        // A call that was interrupted and starts again is at its instruction or behind it.
        r.rsp == self.rsp
            && r.rip.abs_diff(self.rip) <= 2
            && self.returns.iter().all(|&(at, to)| now.word(at) == Some(to))
    }
}

/// The call frame information of the modules of one process, read as it is needed.
pub(super) struct Frames {
    modules: Vec<MappedModule>,
    caches: Resolver,
    read: HashMap<BuildId, Option<(Image, Functions)>>,
}

/// A module's file and its functions; `None` if it can't be read, or is another build now.
fn read(module: &MappedModule) -> Option<(Image, Functions)> {
    let bytes = std::fs::read(module.file.as_ref()?).ok()?;
    let image = Image::parse(bytes, &module.name).ok()?;
    let functions = Functions::find(&image);
    (*image.build_id() == module.build_id).then_some((image, functions))
}

impl Frames {
    /// Of process `pid`; empty if it can't be read.
    pub fn of(pid: i32) -> Self {
        let caches = Resolver::of(pid).unwrap_or_default();
        Self { modules: modules(pid).unwrap_or_default(), caches, read: HashMap::new() }
    }

    /// Reads what walking through any module of the process will need.
    pub fn read_all(&mut self) {
        for module in &self.modules {
            self.read.entry(module.build_id.clone()).or_insert_with(|| read(module));
        }
    }

    /// Walks a stack; `None` if there is a signal frame on it, or its end was not reached.
    pub fn walk(&mut self, stack: &Stack, restorers: &[u64]) -> Option<Walked> {
        let r = &stack.registers;
        let mut regs = [
            r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        let mut walked = Walked { rip: r.rip, rsp: r.rsp, returns: Vec::new(), owners: Vec::new() };
        let mut at = r.rip;
        for _ in 0..MAX_FRAMES {
            match self.step(stack, at, &mut regs, &mut walked.owners)? {
                None | Some((_, 0)) => return Some(walked),
                Some((_, to)) if restorers.contains(&to) => return None,
                Some((slot, to)) => {
                    walked.returns.push((slot, to));
                    // The call, not what comes after it.
                    at = to - 1;
                }
            }
        }
        None
    }

    /// Goes from the frame of the code at `at` to its caller's. `None`: it can't be said; `Some(None)`: there is none;
    /// else where the return address is and what it is.
    #[expect(clippy::option_option, reason = "not known, and known to be none, are two things")]
    fn step(
        &mut self,
        stack: &Stack,
        at: u64,
        regs: &mut [u64; 16],
        owners: &mut Vec<Owner>,
    ) -> Option<Option<(u64, u64)>> {
        // A copy's frame is its original's.
        let at = self.caches.resolve(RunAddr(at)).unwrap_or(RunAddr(at));
        let module = self.modules.iter().find(|m| m.text.iter().any(|t| t.contains(&at)))?;
        owners.push(Owner::of(&module.name));
        let read = self.read.entry(module.build_id.clone()).or_insert_with(|| read(module));
        let (image, functions) = read.as_ref()?;
        let link = at.link(module.bias);
        let (section, bases) = functions.eh_frame(image)?;
        let function = &functions.all()[functions.index_at(link)?];
        let fde = functions.fde(image, function)?;
        if fde.is_signal_trampoline() {
            return None;
        }
        let mut context = UnwindContext::new();
        let row = fde.unwind_info_for_address(&section, &bases, &mut context, link.0).ok()?;
        let CfaRule::RegisterAndOffset { register, offset } = row.cfa() else { return None };
        let cfa = regs.get(usize::from(register.0))?.wrapping_add_signed(*offset);
        let before = *regs;
        let mut to = None;
        for (register, rule) in row.registers() {
            let register = usize::from(register.0);
            if register == RETURN_ADDRESS {
                match rule {
                    RegisterRule::Undefined => return Some(None),
                    RegisterRule::Offset(offset) => to = Some(cfa.wrapping_add_signed(*offset)),
                    _ => return None,
                }
                continue;
            }
            let Some(slot) = regs.get_mut(register) else { continue };
            match rule {
                RegisterRule::Undefined | RegisterRule::SameValue => {}
                RegisterRule::Offset(offset) => *slot = stack.word(cfa.wrapping_add_signed(*offset))?,
                RegisterRule::ValOffset(offset) => *slot = cfa.wrapping_add_signed(*offset),
                RegisterRule::Register(other) => *slot = *before.get(usize::from(other.0))?,
                _ => return None,
            }
        }
        regs[RSP] = cfa;
        let to = to?;
        Some(Some((to, stack.word(to)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::Owner::{Loader, Program, Runtime};
    use super::*;

    #[test]
    fn only_where_threads_begin_may_a_library_be_on_the_stack() {
        let in_program =
            |owners: &[Owner]| Walked { rip: 0, rsp: 0, returns: Vec::new(), owners: owners.to_vec() }.is_in_program();
        assert!(in_program(&[Program, Program, Runtime, Runtime, Program]), "main");
        assert!(in_program(&[Program, Runtime, Runtime]), "a thread's function");
        assert!(in_program(&[Program]), "a program without a C library");
        assert!(!in_program(&[Runtime, Program, Runtime]), "malloc");
        assert!(!in_program(&[Program, Runtime, Program, Runtime]), "qsort's callback");
        assert!(!in_program(&[Program, Loader, Loader]), "a constructor");
        assert!(!in_program(&[Program, Loader, Runtime, Program, Runtime]), "a callback under dl_iterate_phdr");
        assert!(!in_program(&[]));
    }

    #[test]
    fn owners_are_told_by_name() {
        let names =
            ["libc.so.6", "libstdc++.so.6.0.30", "ld-linux-x86-64.so.2", "libgcc_s.so.1", "mariadbd", "libcurl.so.4"];
        assert_eq!(names.map(Owner::of), [Runtime, Runtime, Loader, Loader, Program, Program]);
    }
}
