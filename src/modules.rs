//! The binaries that a profile or a doctor looks into, read and taken apart.

use std::path::{Path, PathBuf};

use dyni_analyzer::functions::Functions;
use dyni_analyzer::image::Image;
use dyni_analyzer::plan::Module;
use dyni_analyzer::targets::TargetIndex;
use dyni_collector::maps::{self, MappedModule};
use dyni_collector::{Target, TargetError};
use dyni_schema::{BuildId, Profile};

use crate::errors::Failure;

/// A file, and what was recovered from it.
#[derive(Debug)]
pub struct Binary {
    /// The file.
    pub image: Image,
    /// Its functions.
    pub functions: Functions,
    /// Where execution may arrive in it.
    pub targets: TargetIndex,
}

impl Binary {
    /// Reads a file.
    ///
    /// # Errors
    /// It can't be read, or is no x86-64 ELF file with code.
    pub fn read(path: &Path, name: &str) -> Result<Self, Failure> {
        let what = || format!("read {}", path.display());
        let bytes = std::fs::read(path).map_err(|e| Failure::failed(what(), e))?;
        let image = Image::parse(bytes, name).map_err(|e| Failure::refused(what(), e))?;
        Ok(Self::of(image))
    }

    fn of(image: Image) -> Self {
        let functions = Functions::find(&image);
        let targets = TargetIndex::build(&image, &functions);
        Self { image, functions, targets }
    }

    /// As the analyzer takes it.
    pub const fn module(&self) -> Module<'_> {
        Module { image: &self.image, functions: &self.functions, targets: &self.targets }
    }
}

/// Processes that may still run what a profile was recorded of, by its name: several, if several programs have it.
pub fn running(profile: &Profile) -> Vec<Target> {
    match Target::find(&profile.program) {
        Ok(target) => vec![target],
        Err(TargetError::Ambiguous { processes, .. }) => {
            processes.iter().filter_map(|&(pid, _)| Target::by_pid(pid).ok()).collect()
        }
        Err(_) => Vec::new(),
    }
}

/// Reads the binaries of a profile in which samples fell, each from the first place that has the very build: the running
/// processes, if there are any, else the path at which it was recorded. What can't be found is left out.
pub fn of_profile(profile: &Profile, targets: &[Target]) -> Vec<Binary> {
    let mapped: Vec<_> = targets.iter().flat_map(|t| maps::modules(t.pid).unwrap_or_default()).collect();
    let sampled = profile.modules.iter().filter(|m| !m.samples.addr.is_empty() || !m.branches.from.is_empty());
    sampled
        .filter_map(|m| {
            let live = mapped.iter().filter(|l| l.build_id == m.build_id).filter_map(|l| l.file.clone());
            let paths = live.chain([PathBuf::from(&m.path)]);
            paths.filter_map(|path| of_build(&path, &m.name, &m.build_id)).next()
        })
        .collect()
}

/// The file at a path that a profile names, if it is this very build.
pub fn of_build(path: &Path, name: &str, build_id: &BuildId) -> Option<Binary> {
    // A path in a profile is anybody's word: nothing but a plain file is opened, and only the right build is used.
    let is_file = std::fs::metadata(path).is_ok_and(|m| m.is_file());
    let image = is_file.then(|| std::fs::read(path).ok()).flatten().and_then(|b| Image::parse(b, name).ok())?;
    (image.build_id() == build_id).then(|| Binary::of(image))
}

/// A module of a process, and what its file holds or why it can't be taken apart.
pub type Examined = (MappedModule, Result<Binary, Failure>);

/// The modules that a process has mapped.
///
/// # Errors
/// The process can't be looked into.
pub fn of_process(pid: i32) -> Result<Vec<Examined>, TargetError> {
    let read = |m: &MappedModule| match &m.file {
        Some(file) => Binary::read(file, &m.name),
        None => Err(Failure::refused(format!("read {}", m.path.display()), "this user may not open the mapped file")),
    };
    Ok(maps::modules(pid)?.into_iter().map(|m| (m.clone(), read(&m))).collect())
}
