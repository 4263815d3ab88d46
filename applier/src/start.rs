//! A program from its `execve` to its first instruction, so that a plan is in force before anything of it has run.
//!
//! What is to be patched is there only when the dynamic loader has mapped the modules, which is when it jumps to the
//! program's entry point. A breakpoint there would kill the program if dyni died before it is met. So the loader is sent
//! elsewhere by what it goes by: the `AT_ENTRY` of the auxiliary vector on the stack (glibc and musl read it there; debuggers
//! read the kernel's own copy). At the exec, before the loader's first instruction, dyni writes
//!
//! 1. a *gate* into unused bytes of an executable page (as for every system call in a target): it saves what it changes,
//!    waits in `poll` for a bounded time, puts `AT_ENTRY` and the registers back and jumps to the entry point;
//! 2. the gate's address into `AT_ENTRY`;
//!
//! and lets go. From then on the program gets to its entry point by itself, whether or not dyni lives: dead, it costs the
//! program that wait, once. While a thread waits in the gate, the process is a live process like any other, and the applier
//! needs to know nothing of it. At last the thread is taken out of the gate, and the gate's bytes are zero again.

use crate::remote::trace::{Event, Registers, Report, Tracee, thread_state};
use crate::remote::{Memory, RemoteError, come_to_rest, trampoline};
use crate::room;
use dyni_schema::RunAddr;
use std::time::{Duration, Instant};

/// Keys of the auxiliary vector (include/uapi/linux/auxvec.h).
const AT_NULL: u64 = 0;
const AT_BASE: u64 = 7;
const AT_ENTRY: u64 = 9;
const AT_SECURE: u64 = 23;
/// How many bytes of a new program's stack are looked through for the vector; arguments and environment come before it.
const MAX_STACK: usize = 4 << 20;
/// Words that the gate keeps on the stack: r11, rdi, rsi, rdx, rcx, rax.
const SAVED: usize = 6;
/// How often it is looked whether the program has come to the gate.
const LOOK: Duration = Duration::from_micros(60);

/// Why a program is not held at its entry point; it starts as if nobody had come.
#[derive(Debug, thiserror::Error)]
pub enum NotHeld {
    /// No loader maps its modules, or none of the usual kind: nothing would be read from the vector.
    #[error("it has no dynamic loader")]
    NoLoader,
    /// The kernel has raised its rights.
    #[error("it runs with rights of its own")]
    Privileged,
    /// The process has ended, or its exec has failed.
    #[error("it did not start")]
    Ended,
    /// It can't be traced, read or written.
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// What happens to a process that is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It has become the program; nothing of that has run.
    Begins,
    /// It has become yet another one.
    Replaced,
    /// It is about to end; its memory is still there.
    Ends,
}

/// A process that is about to exec, seized. It must be used by the thread that made it, as with all of ptrace.
#[derive(Debug)]
pub struct Starting {
    tracee: Tracee,
}

impl Starting {
    /// Seizes process `pid`; it runs on and will stop when it has become another program.
    ///
    /// # Errors
    /// It is gone, traced by somebody else, or not ours to trace.
    pub fn watch(pid: i32) -> Result<Self, RemoteError> {
        Tracee::seize_for_events(pid, pid).map(|tracee| Self { tracee })
    }

    /// Follows the process to its end, or until `at` answers `false`. It is called while the process stands still at one
    /// of these moments.
    ///
    /// # Errors
    /// It can't be traced any more.
    pub fn follow(mut self, mut at: impl FnMut(Moment) -> bool) -> Result<(), RemoteError> {
        let mut begun = false;
        loop {
            match self.tracee.wait()? {
                Report::Gone => return Ok(()),
                Report::Signal(signal) => self.tracee.go_on(signal)?,
                Report::Syscall => self.tracee.go_on(0)?,
                Report::Stopped => match self.tracee.event() {
                    Event::Exec => {
                        let moment = if begun { Moment::Replaced } else { Moment::Begins };
                        begun = true;
                        if !at(moment) {
                            return Ok(());
                        }
                        self.tracee.go_on(0)?;
                    }
                    Event::Exit => {
                        at(Moment::Ends);
                        return Ok(());
                    }
                    Event::Group => self.tracee.stay_stopped()?,
                    Event::Interrupted => self.tracee.go_on(0)?,
                },
            }
        }
    }

    /// Waits for the exec, puts up the gate and lets go. A program that comes to the gate waits there for `at_most`.
    ///
    /// # Errors
    /// Why there is no gate. The program has been let go of all the same.
    pub fn put_up_gate(mut self, at_most: Duration) -> Result<Gate, NotHeld> {
        loop {
            match self.tracee.wait()? {
                Report::Gone => return Err(NotHeld::Ended),
                Report::Signal(signal) => self.tracee.go_on(signal)?,
                Report::Syscall => self.tracee.go_on(0)?,
                Report::Stopped => match self.tracee.event() {
                    Event::Exec => break,
                    Event::Exit => return Err(NotHeld::Ended),
                    Event::Group => self.tracee.stay_stopped()?,
                    Event::Interrupted => self.tracee.go_on(0)?,
                },
            }
        }
        // Dropping the tracee lets it go.
        put_up(&self.tracee, at_most)
    }
}

fn put_up(tracee: &Tracee, at_most: Duration) -> Result<Gate, NotHeld> {
    let pid = tracee.pid;
    let memory = Memory::open(pid)?;
    let vector = Vector::of(&memory, RunAddr(tracee.registers()?.rsp)).ok_or(NotHeld::NoLoader)?;
    if vector.secure {
        return Err(NotHeld::Privileged);
    }
    let at = room::find(pid, &memory)?.at;
    let code = gate(vector.place, vector.entry, at_most);
    memory.write(at, &code)?;
    memory.write(vector.place, &at.0.to_le_bytes())?;
    Ok(Gate { pid, memory, at, entry: vector.entry, place: vector.place })
}

/// What is needed of the auxiliary vector of a program that has not begun.
struct Vector {
    /// Where the value of `AT_ENTRY` lies.
    place: RunAddr,
    /// That value.
    entry: RunAddr,
    secure: bool,
}

impl Vector {
    /// From the stack as the kernel has laid it out: the number of arguments, the arguments, 0, the environment, 0, pairs.
    /// `None` if it is not laid out so or there is no loader.
    fn of(memory: &Memory, rsp: RunAddr) -> Option<Self> {
        let mut bytes = vec![0; MAX_STACK];
        let read = memory.read_some(rsp, &mut bytes);
        let words: Vec<u64> =
            bytes[..read].chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("eight bytes"))).collect();
        let arguments = usize::try_from(*words.first()?).ok()?;
        let environment = words.get(arguments.checked_add(2)?..)?;
        let first = arguments + 2 + environment.iter().position(|&w| w == 0)? + 1;
        let (mut entry, mut loader, mut secure) = (None, false, false);
        for (i, pair) in words.get(first..)?.chunks_exact(2).enumerate() {
            match pair[0] {
                AT_NULL => break,
                AT_BASE => loader = pair[1] != 0,
                AT_ENTRY => entry = Some((rsp.plus(8 * (first + 2 * i + 1) as u64), RunAddr(pair[1]))),
                AT_SECURE => secure = pair[1] != 0,
                _ => {}
            }
        }
        let (place, entry) = entry.filter(|_| loader)?;
        Some(Self { place, entry, secure })
    }
}

/// Offset in bytes of the instruction after the gate's system call.
const AFTER_WAIT: u64 = 29;

/// The gate's code. No instruction of it changes a flag, nor a register that it does not put back.
fn gate(place: RunAddr, entry: RunAddr, at_most: Duration) -> Vec<u8> {
    let wait_ms = i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX);
    let mut code = vec![0x50, 0x51, 0x52, 0x56, 0x57, 0x41, 0x53]; // push rax, rcx, rdx, rsi, rdi, r11
    // The number of the call comes last, as in the C library: by it a wait that was restarted is known.
    for (opcode, value) in [(0xbf, 0), (0xbe, 0), (0xba, wait_ms), (0xb8, libc::SYS_poll as i32)] {
        code.push(opcode); // mov edi, esi, edx, eax
        code.extend(value.to_le_bytes());
    }
    code.extend([0x0f, 0x05]); // syscall
    debug_assert_eq!(code.len() as u64, AFTER_WAIT);
    for (opcode, value) in [([0x48, 0xb8], place), ([0x48, 0xb9], entry)] {
        code.extend(opcode); // mov rax, rcx
        code.extend(value.0.to_le_bytes());
    }
    code.extend([0x48, 0x89, 0x08]); // mov [rax], rcx
    code.extend([0x41, 0x5b, 0x5f, 0x5e, 0x5a, 0x59, 0x58]); // pop r11, rdi, rsi, rdx, rcx, rax
    code.extend([0xff, 0x25, 0, 0, 0, 0]); // jmp [rip]
    code.extend(entry.0.to_le_bytes());
    assert!(code.len() <= trampoline::LEN, "the gate fits where a trampoline does");
    code
}

/// Whether these bytes are a gate, which may be in use or may be one that a dyni which was killed left behind.
pub(crate) fn is_gate(bytes: &[u8]) -> bool {
    let like = gate(RunAddr(0), RunAddr(0), Duration::ZERO);
    let same = |range: std::ops::Range<usize>| bytes.get(range.clone()).is_some_and(|b| b == &like[range]);
    // All but the time that is waited and the addresses.
    let time_end = AFTER_WAIT as usize - 7;
    same(0..time_end - 4) && same(time_end..AFTER_WAIT as usize) && same(like.len() - 14..like.len() - 8)
}

/// Whether a thread that is stopped here waits in a gate: then none of the program's own code has run in it, and the loader
/// is done.
pub(crate) fn waits_in_gate(memory: &Memory, rip: RunAddr) -> bool {
    let gate = RunAddr(rip.0.wrapping_sub(AFTER_WAIT));
    memory.read_vec(gate, trampoline::LEN).is_ok_and(|bytes| is_gate(&bytes))
}

/// A gate in a program that runs.
#[derive(Debug)]
pub struct Gate {
    pid: i32,
    memory: Memory,
    at: RunAddr,
    entry: RunAddr,
    place: RunAddr,
}

impl Gate {
    /// Waits until the program stands in the gate, or has gone through it: its loader has mapped its modules and run their
    /// initialisers. `false` if it does not come there in this time.
    #[must_use]
    pub fn reached(&self, patience: Duration) -> bool {
        let start = Instant::now();
        let path = format!("/proc/{}/syscall", self.pid);
        let waits_at = format!("{:#x}", self.at.0 + AFTER_WAIT);
        while start.elapsed() < patience {
            match std::fs::read_to_string(&path) {
                // The last word is the instruction pointer.
                Ok(text) if text.trim_end().ends_with(&waits_at) => return true,
                Ok(_) if self.is_passed() => return true,
                Ok(_) if !self.memory.is_gone() && thread_state(self.pid, self.pid) != Some(b'Z') => {}
                _ => return false,
            }
            std::thread::sleep(LOOK);
        }
        false
    }

    fn is_passed(&self) -> bool {
        self.memory.read_vec(self.place, 8).is_ok_and(|value| value == self.entry.0.to_le_bytes())
    }

    /// Lets the program go on to its entry point, and takes the gate away; `false` if it had gone through by itself.
    ///
    /// # Errors
    /// The process is gone or is another program by now.
    pub fn open(self) -> Result<bool, RemoteError> {
        crate::remote::in_own_thread(|| self.open_here())
    }

    fn open_here(&self) -> Result<bool, RemoteError> {
        if self.memory.is_gone() {
            return Err(RemoteError::Died(self.pid));
        }
        let mut tracee = Tracee::seize(self.pid, self.pid)?;
        tracee.interrupt()?;
        if !come_to_rest(&mut tracee)? {
            return Err(RemoteError::Died(self.pid));
        }
        let registers = tracee.registers()?;
        // Anywhere else in the gate, or in a signal handler on top of it, the thread goes on alone and needs its bytes.
        let waits = registers.rip == self.at.0 + AFTER_WAIT && !self.memory.is_gone();
        if waits {
            let home = self.home(&registers)?;
            self.memory.write(self.place, &self.entry.0.to_le_bytes())?;
            tracee.set_registers(home)?;
            // Only this thread could come here, and only once.
            self.memory.write(self.at, &[0; trampoline::LEN])?;
        }
        Ok(waits)
    }

    /// The registers that the thread had when it came to the gate, with RIP at the entry point.
    fn home(&self, r: &Registers) -> Result<Registers, RemoteError> {
        let saved = self.memory.read_vec(RunAddr(r.rsp), 8 * SAVED)?;
        let word = |i: usize| u64::from_le_bytes(saved[8 * i..8 * i + 8].try_into().expect("eight bytes"));
        Ok(Registers {
            rip: self.entry.0,
            rsp: r.rsp + 8 * SAVED as u64,
            r11: word(0),
            rdi: word(1),
            rsi: word(2),
            rdx: word(3),
            rcx: word(4),
            rax: word(5),
            // In no system call: the kernel has none to restart.
            orig_rax: u64::MAX,
            ..*r
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};

    #[test]
    fn the_gate_puts_back_what_it_changes_and_ends_in_the_entry() {
        let code = gate(RunAddr(0x7ffc_0000_1230), RunAddr(0x5555_0000_1040), Duration::from_millis(3));
        assert!(is_gate(&code) && !is_gate(&[0; trampoline::LEN]) && !is_gate(&code[1..]));
        let mut decoder = Decoder::with_ip(64, &code, 0x1000, DecoderOptions::NONE);
        let mut saved = Vec::new();
        loop {
            let i = decoder.decode();
            assert!(!i.is_invalid());
            assert_eq!(i.rflags_modified(), if i.mnemonic() == Mnemonic::Syscall { i.rflags_modified() } else { 0 });
            match i.mnemonic() {
                Mnemonic::Push => saved.push(i.op0_register()),
                Mnemonic::Pop => assert_eq!(saved.pop(), Some(i.op0_register())),
                Mnemonic::Syscall => assert_eq!(i.next_ip(), 0x1000 + AFTER_WAIT),
                _ => {}
            }
            if i.flow_control() == FlowControl::IndirectBranch {
                assert!(saved.is_empty());
                assert_eq!(i.memory_displacement64(), i.next_ip());
                let literal = (i.next_ip() - 0x1000) as usize;
                assert_eq!(code[literal..], 0x5555_0000_1040u64.to_le_bytes());
                return;
            }
        }
    }
}
