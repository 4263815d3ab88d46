//! What a file is: the identity under which its pages are kept.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use dyni_collector::elf;
use dyni_schema::{FileKey, InodeKey};

/// Opens a regular file to be read. What else has that name is not opened, as that alone may start something (a device) or
/// wait (a FIFO): names come from records that others may have made.
///
/// # Errors
/// It can't be opened or is no regular file.
pub fn open(path: &Path) -> io::Result<(File, Metadata)> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // Another may have taken its place since.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    Ok((file, metadata))
}

/// The identity of an open file: its build-id, or for want of one its place on this host and its last change.
#[must_use]
pub fn key(file: &File, metadata: &Metadata) -> FileKey {
    if let Ok(elf::StartFacts { build_id: Some(id), .. }) = elf::start_facts(file) {
        return FileKey::Build(id);
    }
    FileKey::Inode(place(metadata))
}

/// Where a file is on this host and when it was changed last: cheaper to find out than what it is.
#[must_use]
pub fn place(metadata: &Metadata) -> InodeKey {
    InodeKey {
        device: (libc::major(metadata.dev()), libc::minor(metadata.dev())),
        inode: metadata.ino(),
        size: metadata.len(),
        modified_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_written_to_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, "one").unwrap();
        let key_now = || open(&path).map(|(file, metadata)| key(&file, &metadata)).unwrap();
        let before = key_now();
        assert_eq!(before, key_now());
        std::fs::write(&path, "three").unwrap();
        assert_ne!(before, key_now());
        assert!(open(dir.path()).is_err());
    }

    #[test]
    fn a_program_is_its_build() {
        let (file, metadata) = open(Path::new("/proc/self/exe")).unwrap();
        assert!(matches!(key(&file, &metadata), FileKey::Build(_)));
    }
}
