//! System calls made in the target's name by one of its own threads, the others running on.

use super::stop::{Stragglers, come_to_rest};
use super::trace::{Registers, Report, Tracee, thread_state, threads};
use super::{Memory, RemoteError, trampoline};
use crate::failpoint;
use dyni_schema::RunAddr;
use nix::errno::Errno;
use std::cell::RefCell;
use std::time::Duration;

/// How often a system call is tried again when signals get in its way: on a machine with more to do than processors a timer of
/// a millisecond gets in the way of most.
const TRIES: u32 = 1000;
/// How many stops may follow each other on the way to a system call.
const GROUP_STOPS: u32 = 3;

/// Makes system calls in one process.
#[derive(Debug)]
pub(crate) struct Caller<'a> {
    pid: i32,
    memory: &'a Memory,
    /// Where the trampoline is written: [`trampoline::LEN`] bytes of an executable page that no program uses.
    room: RunAddr,
    stragglers: RefCell<Stragglers>,
}

/// What came of one try.
enum Try {
    Done(i64),
    Again,
    /// This thread is no good (it ended, or sleeps too deep); another may be.
    OtherThread,
}

impl<'a> Caller<'a> {
    /// `room` is [`trampoline::LEN`] executable bytes that nobody runs or reads.
    pub fn new(pid: i32, memory: &'a Memory, room: RunAddr) -> Self {
        Self { pid, memory, room, stragglers: RefCell::default() }
    }

    /// Makes the system call `number` with `arguments`; what it returned. `name` is for the error.
    ///
    /// # Errors
    /// The call's own error ([`RemoteError::Call`]), or no thread could be borrowed.
    pub fn call(&self, name: &'static str, number: i64, arguments: [u64; 6]) -> Result<u64, RemoteError> {
        let mut last = RemoteError::Interrupted(self.pid);
        for attempt in 0..TRIES {
            self.stragglers.borrow_mut().settle();
            let mut candidates = threads(self.pid)?;
            // A thread in an uninterruptible wait answers late: take it last.
            candidates.sort_by_key(|&tid| thread_state(self.pid, tid) == Some(b'D'));
            let tried = match candidates.get(attempt as usize / 4 % candidates.len().max(1)) {
                None => return Err(RemoteError::Died(self.pid)),
                Some(&tid) => self.try_on(tid, number, arguments),
            };
            match tried {
                Ok(Try::Done(result @ -4095..=-1)) => {
                    return Err(RemoteError::Call {
                        pid: self.pid,
                        call: name,
                        errno: Errno::from_raw(-result as i32),
                    });
                }
                Ok(Try::Done(result)) => return Ok(result as u64),
                Ok(Try::Again | Try::OtherThread) => {}
                Err(e) if e.is_passing() => last = e,
                Err(RemoteError::Died(_)) if candidates.len() > 1 => {}
                Err(e) => return Err(e),
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Err(last)
    }

    fn try_on(&self, tid: i32, number: i64, arguments: [u64; 6]) -> Result<Try, RemoteError> {
        let mut tracee = Tracee::seize(self.pid, tid)?;
        tracee.interrupt()?;
        match come_to_rest(&mut tracee) {
            Ok(true) => {}
            Ok(false) => return Ok(Try::OtherThread),
            Err(e) => {
                self.stragglers.borrow_mut().0.push(tracee);
                return if e.is_passing() { Ok(Try::OtherThread) } else { Err(e) };
            }
        }
        failpoint::pass("remote:stopped", self.pid);
        let before = self.memory.read_vec(self.room, trampoline::LEN)?;
        let registers = tracee.registers()?;
        self.memory.write(self.room, &trampoline::build(&registers))?;
        failpoint::pass("remote:trampoline-written", self.pid);
        let result = self.borrow(&mut tracee, registers, number, arguments);
        // Nobody is in the trampoline any more: the thread has its own registers back, or is dead.
        self.memory.write(self.room, &before)?;
        result
    }

    /// From the thread's own registers to its own registers.
    fn borrow(
        &self,
        tracee: &mut Tracee,
        registers: Registers,
        number: i64,
        arguments: [u64; 6],
    ) -> Result<Try, RemoteError> {
        tracee.set_registers(trampoline::enter(&registers, self.room.0, number, arguments))?;
        failpoint::pass("remote:registers-set", self.pid);
        for step in ["remote:syscall-entered", "remote:syscall-left"] {
            tracee.go_to_syscall()?;
            let mut report = tracee.wait()?;
            // A process that its shell has stopped reports that stop as well as the one we asked for.
            for _ in 0..GROUP_STOPS {
                if report != Report::Stopped {
                    break;
                }
                tracee.go_to_syscall()?;
                report = tracee.wait()?;
            }
            match report {
                Report::Syscall => {}
                Report::Gone => return Err(RemoteError::Died(self.pid)),
                Report::Signal(signal) => {
                    // Before the call, or the call was interrupted by it: as if we had never come. The thread is at the
                    // point of delivery, so with its own registers back the kernel does what it would have done.
                    tracee.set_registers(registers)?;
                    tracee.interrupt()?;
                    tracee.go_on(signal)?;
                    come_to_rest(tracee)?;
                    return Ok(Try::Again);
                }
                Report::Stopped => {
                    tracee.set_registers(registers)?;
                    return Ok(Try::Again);
                }
            }
            failpoint::pass(step, self.pid);
        }
        let result = tracee.registers()?.rax as i64;
        match self.bring_home(tracee, registers) {
            // The call was made, whatever becomes of the thread: it must not be made again.
            Ok(()) | Err(RemoteError::Died(_)) => Ok(Try::Done(result)),
            Err(e) => Err(e),
        }
    }

    /// Gives the thread its own registers back, after the call.
    fn bring_home(&self, tracee: &mut Tracee, registers: Registers) -> Result<(), RemoteError> {
        // The registers are put back at a stop on the way out to user mode, where the kernel looks at orig_rax and
        // restarts the system call that our stop had interrupted; at the exit of our own call it would not.
        tracee.interrupt()?;
        tracee.go_on(0)?;
        match tracee.wait()? {
            Report::Gone => return Err(RemoteError::Died(self.pid)),
            Report::Signal(signal) => {
                tracee.set_registers(registers)?;
                tracee.go_on(signal)?;
                come_to_rest(tracee)?;
            }
            Report::Stopped | Report::Syscall => tracee.set_registers(registers)?,
        }
        failpoint::pass("remote:registers-restored", self.pid);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_leaves_a_blocked_process_as_it_was() {
        let mut child = std::process::Command::new("sleep").arg("2").spawn().expect("sleep is there");
        let pid = child.id() as i32;
        std::thread::sleep(Duration::from_millis(100));
        let memory = Memory::open(pid).expect("our own child");
        let room = crate::room::find(pid, &memory).expect("some segment has an unused tail");
        let before = memory.read_vec(room.at, trampoline::LEN).unwrap();
        let caller = Caller::new(pid, &memory, room.at);
        for _ in 0..100 {
            assert_eq!(caller.call("getpid", libc::SYS_getpid, [0; 6]).unwrap(), pid as u64);
        }
        let error = caller.call("close", libc::SYS_close, [999, 0, 0, 0, 0, 0]).unwrap_err();
        assert!(matches!(error, RemoteError::Call { errno: Errno::EBADF, .. }), "{error}");
        assert_eq!(memory.read_vec(room.at, trampoline::LEN).unwrap(), before);
        let start = std::time::Instant::now();
        assert!(child.wait().unwrap().success(), "nanosleep was restarted, not failed");
        assert!(start.elapsed() < Duration::from_secs(3));
    }
}
