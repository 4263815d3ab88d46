//! The target's memory through `/proc/PID/mem`, which writes through read-only protections (`FOLL_FORCE`, mm/memory.c),
//! so that no page is ever made writable for us.

use super::RemoteError;
use dyni_schema::RunAddr;
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

/// The memory of one process as it was when this was opened: after an `exec` it reaches nothing (reads give 0 bytes).
#[derive(Debug)]
pub struct Memory {
    pid: i32,
    file: File,
}

impl Memory {
    /// Opens the memory of `pid` for reading and writing.
    ///
    /// # Errors
    /// The process is gone or the kernel does not permit it (as for ptrace).
    pub fn open(pid: i32) -> Result<Self, RemoteError> {
        let file = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"));
        file.map(|file| Self { pid, file }).map_err(|e| Self::error(pid, "opening its memory", &e))
    }

    /// Opens the memory of `pid` for reading.
    ///
    /// # Errors
    /// As [`Memory::open`].
    pub fn open_read_only(pid: i32) -> Result<Self, RemoteError> {
        let file = File::open(format!("/proc/{pid}/mem"));
        file.map(|file| Self { pid, file }).map_err(|e| Self::error(pid, "opening its memory", &e))
    }

    fn error(pid: i32, what: &'static str, e: &io::Error) -> RemoteError {
        match (e.kind(), e.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => RemoteError::Died(pid),
            (_, Some(raw)) => RemoteError::from_errno(pid, what, Errno::from_raw(raw)),
            // A read or write that moved nothing: the address space is gone or changed by exec.
            (_, None) => RemoteError::Died(pid),
        }
    }

    /// Fills `buffer` from `at`.
    ///
    /// # Errors
    /// An address that is not mapped, or the process is gone.
    pub fn read(&self, at: RunAddr, buffer: &mut [u8]) -> Result<(), RemoteError> {
        self.file.read_exact_at(buffer, at.0).map_err(|e| Self::error(self.pid, "reading its memory", &e))
    }

    /// `len` bytes from `at`.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn read_vec(&self, at: RunAddr, len: usize) -> Result<Vec<u8>, RemoteError> {
        let mut bytes = vec![0; len];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads as much as there is, from `at` up to the length of `buffer`; the number of bytes read.
    pub fn read_some(&self, at: RunAddr, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], at.0 + done as u64) {
                Ok(n) if n > 0 => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        done
    }

    /// Whether this memory is no more, because the process ended or exec'ed: then a read answers 0 bytes, while one of an
    /// address that is not mapped answers an error (`mem_rw`, fs/proc/base.c).
    pub fn is_gone(&self) -> bool {
        matches!(self.file.read_at(&mut [0], 0), Ok(0))
    }

    /// Writes `bytes` at `at`, whatever the page's protection. Bytes inside one page are written by one copy in the
    /// kernel and so are never half there.
    ///
    /// # Errors
    /// An address that is not mapped, a shared mapping, or the process is gone.
    pub fn write(&self, at: RunAddr, bytes: &[u8]) -> Result<(), RemoteError> {
        self.file.write_all_at(bytes, at.0).map_err(|e| Self::error(self.pid, "writing its memory", &e))
    }
}
