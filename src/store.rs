//! The archive as the subcommands use it: opened when it is first needed, so that a command that needs none works where
//! there is none.

use std::path::{Path, PathBuf};

use dyni_collector::{Target, TargetError};
use dyni_profiles::{Archive, ArchiveError, Category, archive_path};
use dyni_schema::envelope::{BlobId, BlobPrefix, seal};
use dyni_schema::{FileKey, Plan, Profile, WorkingSet};

use crate::errors::Failure;

/// Why there is no plan, where there is none for what a program runs.
pub const NO_PLAN: &str = "the archive has none for the builds that it runs";

/// A plan and the id that it has in every archive.
#[derive(Debug)]
pub struct StoredPlan {
    /// BLAKE3 of its sealed bytes, hexadecimal.
    pub id: String,
    /// The plan.
    pub plan: Plan,
}

impl StoredPlan {
    /// A plan that need not be in an archive.
    ///
    /// # Errors
    /// The plan breaks a rule of its type, which would be a bug of whoever made it.
    pub fn new(plan: Plan) -> Result<Self, Failure> {
        let sealed = seal(&plan).map_err(|e| Failure::failed("keep the plan", e))?;
        Ok(Self { id: BlobId::of(&sealed).hex(), plan })
    }
}

/// The archive that the command line names, opened at each use.
#[derive(Debug)]
pub struct Store {
    flag: Option<PathBuf>,
}

impl Store {
    /// The archive at the path of `--archive`, else at the usual place.
    pub fn at(flag: Option<&Path>) -> Self {
        Self { flag: flag.map(Path::to_owned) }
    }

    /// Where it lies.
    ///
    /// # Errors
    /// The environment names no place.
    pub fn path(&self) -> Result<PathBuf, Failure> {
        Ok(archive_path(self.flag.as_deref())?)
    }

    fn write(&self) -> Result<Archive, Failure> {
        Ok(Archive::open(&self.path()?)?)
    }

    fn read(&self) -> Result<Archive, Failure> {
        Ok(Archive::open_read_only(&self.path()?)?)
    }

    /// Fails now rather than after a long recording if nothing can be kept.
    ///
    /// # Errors
    /// The archive can't be opened for writing.
    pub fn check_writable(&self) -> Result<(), Failure> {
        self.write().map(drop)
    }

    /// Keeps a profile; its id.
    ///
    /// # Errors
    /// The archive can't be written.
    pub fn keep_profile(&self, profile: &Profile) -> Result<String, Failure> {
        Ok(self.write()?.put_profile(profile)?.hex())
    }

    /// Keeps a plan.
    ///
    /// # Errors
    /// The archive can't be written.
    pub fn keep_plan(&self, plan: &StoredPlan) -> Result<(), Failure> {
        self.write()?.put_plan(&plan.plan)?;
        Ok(())
    }

    /// Keeps a working set; its id.
    ///
    /// # Errors
    /// The archive can't be written.
    pub fn keep_working_set(&self, set: &WorkingSet) -> Result<BlobId, Failure> {
        Ok(self.write()?.put_working_set(set)?)
    }

    /// The working set of an executable; `None` if nothing of it has been learned.
    ///
    /// # Errors
    /// The archive can't be read.
    pub fn working_set_of(&self, executable: &FileKey) -> Result<Option<WorkingSet>, Failure> {
        Ok(self.read()?.working_set_of(executable)?)
    }

    /// Throws a plan away.
    ///
    /// # Errors
    /// The archive can't be written.
    pub fn forget_plan(&self, plan: &StoredPlan) -> Result<(), Failure> {
        let id = plan.id.parse::<BlobPrefix>().map_err(ArchiveError::from)?;
        self.write()?.remove(&id)?;
        Ok(())
    }

    /// The profile that these words mean, by default the newest; and its id.
    ///
    /// # Errors
    /// There is none, or the archive can't be read.
    pub fn profile(&self, words: Option<&str>) -> Result<(String, Profile), Failure> {
        let archive = self.read()?;
        let id = archive.find_profile(words.unwrap_or("latest"))?;
        let (id, profile) = archive.profile(&BlobPrefix::from(id))?;
        Ok((id.hex(), profile))
    }

    /// The plan with exactly this id.
    ///
    /// # Errors
    /// There is none, or the archive can't be read.
    pub fn plan_of(&self, id: BlobId) -> Result<StoredPlan, Failure> {
        let (id, plan) = self.read()?.plan(&id.into())?;
        Ok(StoredPlan { id: id.hex(), plan })
    }

    /// The plan that these digits name.
    ///
    /// # Errors
    /// There is none or more than one, or the archive can't be read.
    pub fn plan_named(&self, digits: &str) -> Result<StoredPlan, Failure> {
        let prefix = digits.parse::<BlobPrefix>().map_err(ArchiveError::from)?;
        let (id, plan) = self.read()?.plan(&prefix)?;
        Ok(StoredPlan { id: id.hex(), plan })
    }

    /// The profile with exactly this id.
    ///
    /// # Errors
    /// There is none, or the archive can't be read.
    pub fn profile_of(&self, id: BlobId) -> Result<Profile, Failure> {
        Ok(self.read()?.profile(&id.into())?.1)
    }

    /// The plan with this id, by default the newest one that was made for what `target` runs.
    ///
    /// # Errors
    /// There is none, or the archive can't be read.
    pub fn plan(&self, id: Option<&str>, target: &Target) -> Result<StoredPlan, Failure> {
        let archive = self.read()?;
        let prefix = match id {
            Some(text) => text.parse::<BlobPrefix>().map_err(ArchiveError::from)?,
            None => newest_for(&archive, target)?.into(),
        };
        let (id, plan) = archive.plan(&prefix)?;
        Ok(StoredPlan { id: id.hex(), plan })
    }
}

fn newest_for(archive: &Archive, target: &Target) -> Result<BlobId, Failure> {
    let modules = dyni_collector::maps::modules(target.pid)?;
    if modules.is_empty() && !target.still_there() {
        return Err(TargetError::Exited(target.pid).into());
    }
    let build_ids: Vec<_> = modules.iter().map(|m| m.build_id.clone()).collect();
    let plans = archive.plans_for(&build_ids)?;
    let newest = plans.iter().find(|p| p.program == target.name);
    newest.map(|p| p.id).ok_or_else(|| {
        Failure::failed(format!("find a plan for {}, pid: {}", target.name, target.pid), NO_PLAN)
            .help("`dyni optimize` makes one, or `dyni record` and then `dyni analyze`")
    })
}

impl From<ArchiveError> for Failure {
    fn from(e: ArchiveError) -> Self {
        let text = e.to_string();
        let failure = match e.category() {
            Category::Failed => Self::failed(text, ""),
            Category::Usage => Self::usage(text, ""),
            Category::Refused => Self::refused(text, ""),
        };
        match e.help() {
            Some(help) => failure.help(help),
            None => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::Status;

    #[test]
    fn an_archive_that_is_not_there_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(Some(&dir.path().join("none.db")));
        let failure = store.profile(None).unwrap_err();
        assert_eq!(failure.status(), Status::Failed);
        assert!(failure.to_string().contains("there is no archive"), "{failure}");
    }

    #[test]
    fn what_is_no_archive_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        let text =
            "not a database at all, but long enough to have a header of a hundred bytes if it were one".repeat(9);
        std::fs::write(&path, &text).unwrap();
        let failure = Store::at(Some(&path)).check_writable().unwrap_err();
        assert_eq!(failure.status(), Status::Refused);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}
