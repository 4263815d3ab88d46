//! Which unwinder a process has, and how it is told of code that no module holds.
//!
//! Exceptions are raised by `_Unwind_RaiseException`, of which a process has one as a rule: that of `libgcc_s.so.1`, or
//! one that was linked into the program. Only that one has to know the copies, but it must be known which it is. A module
//! that has an unwinder of its own without exporting it would look for frames in its own list: then nothing is promised.

use dyni_analyzer::image::Image;
use dyni_collector::maps::MappedModule;
use dyni_schema::{BuildId, RunAddr};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

const REGISTER: &str = "__register_frame_info";
const DEREGISTER: &str = "__deregister_frame_info";
const MALLOC: &str = "malloc";
const RAISE: &str = "_Unwind_RaiseException";
/// How an unwinder finds the modules of its process; who else asks has no personality routines of its own, or imports
/// the unwinder.
const FINDERS: [&str; 2] = ["dl_iterate_phdr", "_dl_find_object"];

/// The functions of a process's unwinder, as run addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unwinder {
    /// `void __register_frame_info(const void *begin, void *object)`.
    pub register: RunAddr,
    /// `void *__deregister_frame_info(const void *begin)`, which ends the process if `begin` is not registered.
    pub deregister: RunAddr,
    /// Whether the process allocates memory by code of its own, which the unwinder may then call.
    pub own_malloc: bool,
}

/// Why a process's unwinder can't be told of copies; shown to users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NoUnwinder {
    /// There is none that lists frames, or it is not exported.
    NotThere,
    /// There may be two, and it is not known which of them an exception meets.
    Another,
}

impl NoUnwinder {
    /// One line for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::NotThere => "the process has no unwinder that can be told of copies",
            Self::Another => "the process has a second unwinder, which can't be told of copies",
        }
    }
}

/// What a module has to do with unwinding.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Part {
    /// Link addresses of what it exports.
    raise: bool,
    register: Option<u64>,
    deregister: Option<u64>,
    /// It may hold an unwinder that it does not export.
    hidden: bool,
    /// It defines `malloc`.
    malloc: bool,
}

impl Part {
    fn of(image: &Image) -> Self {
        let mut part = Self::default();
        for (at, _, name) in image.symbols() {
            match name {
                RAISE => part.raise = true,
                REGISTER => part.register = Some(at.0),
                DEREGISTER => part.deregister = Some(at.0),
                MALLOC => part.malloc = true,
                _ => {}
            }
        }
        let imports = |wanted: &dyn Fn(&str) -> bool| image.imports().any(wanted);
        let searches = imports(&|n| FINDERS.contains(&n));
        let imports_it = imports(&|n| n.starts_with("_Unwind_"));
        part.hidden = searches && !imports_it && !part.raise && has_exception_tables(image);
        part
    }

    fn unwinder(&self, bias: u64) -> Option<Unwinder> {
        let run = |at: u64| RunAddr(at.wrapping_add(bias));
        self.raise.then_some(()).and(self.register.zip(self.deregister)).map(|(register, deregister)| Unwinder {
            register: run(register),
            deregister: run(deregister),
            own_malloc: false,
        })
    }
}

/// The C library, and the loader, which has a `malloc` for itself.
fn is_libc(module: &str) -> bool {
    ["libc.so", "libc-2.", "libc.musl-", "ld-"].iter().any(|p| module.starts_with(p))
}

/// Whether the module has code that catches; without section headers that is taken for granted.
fn has_exception_tables(image: &Image) -> bool {
    image.sections().is_empty() || image.section(".gcc_except_table").is_some()
}

/// What each build that was met has to do with unwinding: the processes of a group have the same ones.
#[derive(Debug, Default)]
pub struct Unwinders(HashMap<BuildId, Part>);

impl Unwinders {
    /// Finds the unwinder of process `pid`, whose modules these are.
    ///
    /// # Errors
    /// Why there is none that can be used.
    pub fn find(&mut self, pid: i32, modules: &[MappedModule]) -> Result<Unwinder, NoUnwinder> {
        let program = std::fs::metadata(format!("/proc/{pid}/exe")).ok().map(|m| m.ino());
        let mut found = None;
        let mut of_program = None;
        let mut own_malloc = false;
        for module in modules {
            let Some(part) = self.part(module) else { continue };
            own_malloc |= part.malloc && !is_libc(&module.name);
            if Some(module.file_id.inode) == program && part.raise {
                // The program comes first when names are bound, so all modules have its unwinder.
                of_program = Some(part.unwinder(module.bias));
            } else if part.hidden {
                return Err(NoUnwinder::Another);
            } else if part.raise {
                // An interposing one (a sanitizer's) counts as one more.
                if found.replace(part.unwinder(module.bias)).is_some() {
                    return Err(NoUnwinder::Another);
                }
            }
        }
        let found = of_program.or(found).flatten().ok_or(NoUnwinder::NotThere)?;
        Ok(Unwinder { own_malloc, ..found })
    }

    fn part(&mut self, module: &MappedModule) -> Option<Part> {
        if let Some(part) = self.0.get(&module.build_id) {
            return Some(part.clone());
        }
        let bytes = std::fs::read(module.file.as_ref()?).ok()?;
        let image = Image::parse(bytes, &module.name).ok()?;
        let part = Part::of(&image);
        // A file that was replaced since it was mapped says nothing of other processes.
        if *image.build_id() == module.build_id {
            self.0.insert(module.build_id.clone(), part.clone());
        }
        Some(part)
    }
}
