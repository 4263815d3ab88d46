//! Telling a process's unwinder of copies, and taking that back.
//!
//! `__register_frame_info` is called in the process, by one of its own threads where it waits
//! (`remote::function`). The unwinder keeps a pointer to the section and to an object of the caller's, which it
//! writes to: both stay mapped for as long as the registration does, which is for as long as a frame of a copy may be on
//! a stack.
//!
//! **Whether a section is registered is not written anywhere: the object says it.** It is zero before, and the unwinder
//! writes to it first of all. So a later dyni knows, whenever an earlier one died; that matters, as to register an object
//! twice would make the unwinder's list a circle, and to take back what is not there ends the process.

use super::unwinder::{NoUnwinder, Unwinder};
use crate::remote::function::{self, Room};
use crate::remote::{Memory, RemoteError};
use dyni_schema::RunAddr;

pub use crate::remote::function::CallError;

/// The bytes of executable memory that registering needs, behind the code of the cache.
pub const CODE_LEN: u64 = function::CODE_LEN;
/// What the unwinder is given for its own use, in bytes. GCC's `struct object` takes 48, or 56 (`unwind-dw2-fde.h`).
const OBJECT: u64 = 128;

/// Where in a process the things lie that registering needs, all of them mappings of ours.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// [`CODE_LEN`] bytes of the executable mapping, zero from the start, a multiple of 16.
    pub code: RunAddr,
    /// [`data_len`] bytes of a private, writable, not executable mapping, zero from the start, at a page.
    pub data: RunAddr,
    /// The section ([`super::UnwindSection::bytes`]), readable.
    pub section: RunAddr,
}

/// Why the unwinder was not told.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// There is none to tell.
    #[error("{}", .0.text())]
    NoUnwinder(NoUnwinder),
    /// The function could not be called, or did not come back.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The process.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The unwinder returned and did not do what it is for.
    #[error("process {0}: its unwinder did not take the unwind data")]
    NotTaken(i32),
}

/// The bytes of writable memory that registering needs: whole pages.
pub fn data_len() -> u64 {
    // The object on a page of its own, behind what calls need.
    function::data_len() + 4096
}

impl Place {
    fn object(&self) -> RunAddr {
        self.data.plus(function::data_len())
    }

    /// The page on which the object is.
    pub fn object_page(&self) -> std::ops::Range<u64> {
        self.object().0..self.data.0 + data_len()
    }

    fn room(&self) -> Room {
        Room { code: self.code, data: self.data }
    }
}

/// Whether the unwinder knows the section, or is just being told.
pub fn is_registered(memory: &Memory, place: &Place) -> Result<bool, RemoteError> {
    Ok(memory.read_vec(place.object(), OBJECT as usize)?.iter().any(|&b| b != 0))
}

/// Tells the unwinder of process `pid` of the section, if it does not know it. The section's mapping and the data's must
/// stay for good afterwards.
///
/// # Errors
/// Why not. After [`CallError::Lost`] it may yet come to know: ask [`is_registered`], and leave everything mapped.
pub fn register(pid: i32, memory: &Memory, unwinder: &Unwinder, place: &Place) -> Result<(), RegisterError> {
    if is_registered(memory, place)? {
        return Ok(());
    }
    let arguments = [place.section.0, place.object().0];
    function::call(pid, memory, place.room(), unwinder.register, arguments, !unwinder.own_malloc)?;
    if is_registered(memory, place)? { Ok(()) } else { Err(RegisterError::NotTaken(pid)) }
}

/// Forgets what the last call returned, so that [`has_deregistered`] tells of a later one.
pub fn prepare_deregister(memory: &Memory, place: &Place) -> Result<(), RemoteError> {
    function::clear_result(memory, place.room())
}

/// Whether a call of [`deregister`] was seen to its end by the process itself, whatever became of the dyni that made it.
/// To be asked only if [`prepare_deregister`] and nothing else was done before that.
pub fn has_deregistered(memory: &Memory, place: &Place) -> Result<bool, RemoteError> {
    Ok(function::result(memory, place.room())? == Some(place.object().0))
}

/// Makes the unwinder forget the section, if it knows it. No frame of a copy may be on any stack, nor ever come there.
///
/// # Errors
/// Why not; it must then be taken for registered.
pub fn deregister(pid: i32, memory: &Memory, unwinder: &Unwinder, place: &Place) -> Result<(), RegisterError> {
    if !is_registered(memory, place)? {
        return Ok(());
    }
    let arguments = [place.section.0, 0];
    let object = function::call(pid, memory, place.room(), unwinder.deregister, arguments, !unwinder.own_malloc)?;
    if object != place.object().0 {
        return Err(RegisterError::NotTaken(pid));
    }
    memory.write(place.object(), &[0; OBJECT as usize])?;
    Ok(())
}

#[cfg(test)]
mod tests;
