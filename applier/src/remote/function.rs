//! A function of the target called by one of its own threads, the others running on.
//!
//! A system call may be made wherever a thread happens to stop; a function may not, for it takes locks which that thread
//! may hold. So a thread is borrowed only where it waits in a system call of the C library that blocks, is no wait for a
//! lock, and is not inside a signal handler ([`is_safe`]). There the library's own locks are not held by it; nor in the
//! gate of a program that starts ([`start`]). In a program that never waits, a thread will do that is stopped in the
//! program's own code with no library on its stack but where threads begin ([`Walked::is_in_program`]), if the function and
//! the program share no other locks.
//!
//! The thread runs a trampoline that needs no help: it blocks all signals, saves the vector and x87 state, calls, puts that
//! state back, stores that it is done and waits a little for dyni to bring it home. With dyni dead it comes home alone, the
//! function called to its end: it puts back its signal mask, the flags and every general register from immediates, and
//! jumps, as the one for system calls does.
//!
//! *Signals.* The thread may wait where it can be cancelled at any moment (glibc's `read` is such a place): a handler that
//! ran on top of the call would unwind from there, find no caller beyond the trampoline, and leave out the cleanups of all
//! frames below; or it would unwind while the unwinder's own lock is held. So no handler may run before the thread is home.
//! A signal that comes before the call has begun makes the thread get its own registers back and the call be tried again;
//! one that comes later waits until dyni has put back registers and mask in one stop. (Where dyni died meanwhile, it comes
//! a few instructions before home.)

use super::backtrace::{Frames, Stack, Walked};
use super::stop::{Stragglers, come_to_rest};
use super::trace::{Registers, Report, Tracee, is_ending, thread_state, threads};
use super::trampoline::home;
use super::{Memory, RemoteError, in_own_thread};
use crate::{failpoint, start};
use dyni_collector::maps::{self, Mapping};
use dyni_schema::RunAddr;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The length of a trampoline in bytes, and the distance from one to the next.
const SLOT: u64 = 512;
/// How many bytes of executable memory of our own calls need, from [`Room::code`].
pub(crate) const CODE_LEN: u64 = 4096;
/// Where in [`Room::data`] the trampoline writes 1 when the function has returned, and what it returned.
const DONE: u64 = 0;
const RESULT: u64 = 8;
/// Where there is a signal mask of everything, and the thread's own.
const ALL_SIGNALS: u64 = 16;
const OWN_SIGNALS: u64 = 24;
/// Where the vector state is saved; a multiple of 64.
const STATE: u64 = 64;
/// How long the thread waits, when the call is over, for dyni to bring it home, ms.
const WAIT_MS: u32 = 200;
/// How long a thread at a safe point is looked for, and how often at least, on a machine that is busy with other things.
const SEARCH: Search = Search { time: Duration::from_secs(1), rounds: 50 };
/// The same in a process in which the last search was in vain: another module's turn, or the next burst of counting, comes at
/// once, and a program that always computes must not be searched for minutes.
const SEARCH_AGAIN: Search = Search { time: Duration::from_millis(100), rounds: 10 };
/// After so many looks in a row at which no thread could serve later either (every one waits inside a signal handler, so that
/// is where the program lives), the search is over.
const HOPELESS: u32 = 10;
/// After so many looks a thread that computes will do, too.
const PATIENT_ROUNDS: u32 = 5;
/// How much of such a thread's stack is walked, in bytes.
const WALKED: u64 = 256 << 10;
/// How long the function may take. Nobody waits for it but dyni.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of a stack is looked through, in bytes.
const MAX_STACK: u64 = 8 << 20;
/// How much stack a function and the handlers of signals meanwhile may need, in bytes.
const STACK: u64 = 32 << 10;
/// The System V ABI's red zone, in bytes.
const RED_ZONE: u64 = 128;

/// Memory of the target for calls, which the program knows nothing of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// [`CODE_LEN`] bytes of an executable mapping of ours; zero where nothing was written.
    pub code: RunAddr,
    /// [`data_len`] bytes of a private writable mapping of ours, not executable, aligned to 64.
    pub data: RunAddr,
}

/// Why a function was not called, or not seen to return.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No thread was met where it could be borrowed; nothing was done.
    #[error("process {0}: no thread waits where a function can be called")]
    NoSafePoint(i32),
    /// The call began and was not seen to end: a signal handler went elsewhere, or a lock is held for long.
    #[error("process {0}: a function called in it did not return in time")]
    Lost(i32),
    /// Every trampoline of the room is in use by a thread that has not come back from a signal handler.
    #[error("process {0}: no room for one more call")]
    NoRoom(i32),
    /// The process.
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// Forgets what the last call returned, if one was ever made.
pub(crate) fn clear_result(memory: &Memory, room: Room) -> Result<(), RemoteError> {
    memory.write(room.data.plus(DONE), &[0; 16])
}

/// What the last call returned, by the note of the trampoline alone; `None` if it has not, or none was made since
/// [`clear_result`].
pub(crate) fn result(memory: &Memory, room: Room) -> Result<Option<u64>, RemoteError> {
    let bytes = memory.read_vec(room.data.plus(DONE), 16)?;
    let result = u64::from_le_bytes(bytes[RESULT as usize..].try_into().expect("eight bytes"));
    Ok((bytes[0] == 1).then_some(result))
}

/// The bytes of writable memory that calls need.
pub(crate) fn data_len() -> u64 {
    (STATE + state_len()).next_multiple_of(4096)
}

/// Whether the processor has XSAVE and the kernel lets programs use it.
fn has_xsave() -> bool {
    __cpuid(1).ecx & 1 << 27 != 0
}

/// The length of the saved state in bytes (Intel SDM, volume 1, 13.4; FXSAVE: 10.5.1).
fn state_len() -> u64 {
    if has_xsave() { u64::from(__cpuid_count(0xd, 0).ecx).max(576) } else { 512 }
}

/// The trampoline at its place: bytes, and where the call is over.
struct Trampoline {
    bytes: Vec<u8>,
    /// Offset of the call instruction: up to here nothing has been changed.
    call: u64,
}

/// `mov r64, imm64` for each register of the order in [`Trampoline::new`], rsp last.
const MOV: [[u8; 2]; 16] = [
    [0x48, 0xb8], // rax
    [0x48, 0xbb], // rbx
    [0x48, 0xb9], // rcx
    [0x48, 0xba], // rdx
    [0x48, 0xbe], // rsi
    [0x48, 0xbf], // rdi
    [0x48, 0xbd], // rbp
    [0x49, 0xb8], // r8
    [0x49, 0xb9], // r9
    [0x49, 0xba], // r10
    [0x49, 0xbb], // r11
    [0x49, 0xbc], // r12
    [0x49, 0xbd], // r13
    [0x49, 0xbe], // r14
    [0x49, 0xbf], // r15
    [0x48, 0xbc], // rsp
];

impl Trampoline {
    /// For a thread with these registers, to call `function` with these arguments. rbx holds [`Room::data`] when it is
    /// entered, as the function keeps that register.
    fn new(r: &Registers, function: RunAddr, [rdi, rsi]: [u64; 2]) -> Self {
        let (rip, rax) = home(r);
        let mut code = Vec::with_capacity(SLOT as usize);
        set_signal_mask(&mut code, ALL_SIGNALS);
        for (opcode, value) in [([0x48, 0xbf], rdi), ([0x48, 0xbe], rsi)] {
            code.extend(opcode);
            code.extend(value.to_le_bytes());
        }
        let all_components = [0xb8, 0xff, 0xff, 0xff, 0xff, 0xba, 0xff, 0xff, 0xff, 0xff]; // mov eax, -1; mov edx, -1
        // 0f ae /4 and /5, or /0 and /1.
        let (save, restore) = if has_xsave() { (0x63, 0x6b) } else { (0x43, 0x4b) };
        code.extend(all_components);
        code.extend([0x48, 0x0f, 0xae, save, STATE as u8]); // xsave64 or fxsave64 [rbx + STATE]
        let call = code.len() as u64;
        code.extend([0xff, 0x15, 0, 0, 0, 0]); // call [rip + literal]
        let to_patch = code.len();
        code.extend([0x48, 0x89, 0x43, RESULT as u8]); // mov [rbx + RESULT], rax
        code.extend(all_components);
        code.extend([0x48, 0x0f, 0xae, restore, STATE as u8]); // xrstor64 or fxrstor64 [rbx + STATE]
        code.extend([0xc6, 0x43, DONE as u8, 1]); // mov byte [rbx + DONE], 1
        for (opcode, value) in [(0xb8, libc::SYS_poll as u32), (0xbf, 0), (0xbe, 0), (0xba, WAIT_MS)] {
            code.push(opcode); // mov eax, edi, esi, edx
            code.extend(value.to_le_bytes());
        }
        code.extend([0x0f, 0x05]); // syscall
        set_signal_mask(&mut code, OWN_SIGNALS);
        code.push(0x68); // push flags; popfq
        code.extend((r.eflags as u32).to_le_bytes());
        code.push(0x9d);
        let values = [
            rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rsp,
        ];
        for (opcode, value) in MOV.iter().zip(values) {
            code.extend(opcode);
            code.extend(value.to_le_bytes());
        }
        code.extend([0xff, 0x25, 0, 0, 0, 0]); // jmp [rip]
        code.extend(rip.to_le_bytes());
        let literal = (code.len() - to_patch) as u32;
        code[to_patch - 4..to_patch].copy_from_slice(&literal.to_le_bytes());
        code.extend(function.0.to_le_bytes());
        debug_assert!(code.len() as u64 <= SLOT);
        Self { bytes: code, call }
    }
}

/// `rt_sigprocmask(SIG_SETMASK, rbx + at, NULL, 8)`.
fn set_signal_mask(code: &mut Vec<u8>, at: u64) {
    for (opcode, value) in [(0xb8, libc::SYS_rt_sigprocmask as u32), (0xbf, libc::SIG_SETMASK as u32), (0xba, 0)] {
        code.push(opcode); // mov eax, edi, edx
        code.extend(value.to_le_bytes());
    }
    code.extend([0x48, 0x8d, 0x73, at as u8]); // lea rsi, [rbx + at]
    code.extend([0x41, 0xba, 8, 0, 0, 0]); // mov r10d, 8
    code.extend([0x0f, 0x05]); // syscall
}

/// Where a thread may be borrowed: what is known of the process's mappings.
struct Places {
    maps: Vec<Mapping>,
    /// Where the C library's code is, run addresses.
    library: Vec<std::ops::Range<u64>>,
    /// Where signal handlers return to (`__restore_rt`).
    restorers: Vec<u64>,
}

/// System calls in which a thread waits for the outside, not for another thread of its process that holds a lock.
const WAITS: [i64; 21] = [
    libc::SYS_read,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_msgrcv,
    libc::SYS_io_getevents,
    libc::SYS_mq_timedreceive,
];

impl Places {
    fn of(pid: i32, memory: &Memory) -> Result<Self, CallError> {
        let maps = maps::mappings(pid).map_err(|_| RemoteError::Died(pid))?;
        let is_library = |m: &Mapping| {
            let name = m.path.file_name().map(|n| n.as_encoded_bytes().to_vec()).unwrap_or_default();
            let prefixes: [&[u8]; 5] = [b"libc.so.", b"libc-2.", b"libpthread", b"ld-musl-", b"libc.musl-"];
            m.executable && !m.writable && prefixes.iter().any(|p| name.starts_with(p))
        };
        let library: Vec<_> = maps.iter().filter(|m| is_library(m)).map(|m| m.range.clone()).collect();
        let mut restorers = Vec::new();
        for range in &library {
            // mov rax, SYS_rt_sigreturn; syscall
            let mark = [0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];
            let mut text = vec![0; (range.end - range.start) as usize];
            let n = memory.read_some(RunAddr(range.start), &mut text);
            restorers.extend(
                text[..n].windows(9).enumerate().filter(|(_, w)| *w == mark).map(|(i, _)| range.start + i as u64),
            );
        }
        Ok(Self { maps, library, restorers })
    }

    /// Whether a function may be called by a thread that is stopped with these registers, if it is in no signal handler:
    /// that may have interrupted `malloc` before it came to wait.
    fn is_safe(&self, memory: &Memory, r: &Registers) -> bool {
        let in_library = || self.library.iter().any(|l| l.contains(&r.rip));
        if (r.orig_rax as i64) < 0 || !(in_library() || start::waits_in_gate(memory, RunAddr(r.rip))) {
            return false;
        }
        // Where our stop alone made the call fail, the thread is back at it ([`dyni_collector::interrupted`]).
        let mut around = [0; 9];
        if memory.read(RunAddr(r.rip.wrapping_sub(7)), &mut around).is_err() {
            return false;
        }
        const SYSCALL: [u8; 2] = [0x0f, 0x05];
        let before = match (around[5..7] == SYSCALL, around[7..] == SYSCALL && r.rax == r.orig_rax) {
            (true, _) => &around[..5],
            (false, true) => &around[2..7],
            (false, false) => return false,
        };
        // A wait that was restarted does not say which; the library's instruction before the call does.
        let number = match r.orig_rax as i64 {
            libc::SYS_restart_syscall if before[0] == 0xb8 => {
                i64::from(u32::from_le_bytes(before[1..5].try_into().expect("four bytes")))
            }
            number => number,
        };
        WAITS.contains(&number) && self.has_stack(r.rsp)
    }

    /// About a thread that waits. `known`: its stack, if it was walked.
    fn judge_waiting(&self, memory: &Memory, r: &Registers, known: Option<&Walked>) -> Judgement {
        if !self.is_safe(memory, r) {
            return Judgement::Bad;
        }
        match self.doubtful_stack(memory, r) {
            Some(stack) if !known.is_some_and(|walked| walked.still_holds(&stack)) => Judgement::Doubt(Box::new(stack)),
            _ => Judgement::Good,
        }
    }

    /// About a thread that computes. All of `frames` has been read.
    fn judge_computing(&self, memory: &Memory, r: &Registers, frames: &mut Frames) -> Judgement {
        if (r.orig_rax as i64) >= 0 || !self.has_stack(r.rsp) {
            return Judgement::Bad;
        }
        let words = words_above(&self.maps, memory, r.rsp, WALKED).collect();
        let walked = frames.walk(&Stack { registers: *r, words }, &self.restorers);
        if walked.is_some_and(|w| w.is_in_program()) { Judgement::Good } else { Judgement::Bad }
    }

    fn has_stack(&self, rsp: u64) -> bool {
        self.maps.iter().any(|m| {
            let grows = m.path.as_os_str() == "[stack]";
            m.writable && m.range.contains(&rsp) && (grows || rsp - m.range.start > STACK)
        })
    }

    /// The stack of a thread that may be in a handler: a signal frame, or the remains of one, is on it. `None` if there is
    /// none.
    fn doubtful_stack(&self, memory: &Memory, registers: &Registers) -> Option<Stack> {
        let words: Vec<u64> = words_above(&self.maps, memory, registers.rsp, MAX_STACK).collect();
        let doubtful = words.iter().any(|word| self.restorers.contains(word));
        doubtful.then_some(Stack { registers: *registers, words })
    }
}

/// The words of the stack from `rsp` up, at most `limit` bytes of it.
fn words_above(maps: &[Mapping], memory: &Memory, rsp: u64, limit: u64) -> impl Iterator<Item = u64> {
    let end = maps.iter().find(|m| m.range.contains(&rsp)).map_or(rsp, |m| m.range.end);
    let mut bytes = vec![0; (end - rsp).min(limit) as usize];
    let n = memory.read_some(RunAddr(rsp), &mut bytes);
    bytes.truncate(n & !7);
    (0..bytes.len() / 8).map(move |i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().expect("eight bytes")))
}

/// Whether a stopped thread may be borrowed.
enum Judgement {
    Good,
    Bad,
    /// It waits at a good place; whether in a signal handler is to be found out, from its stack.
    Doubt(Box<Stack>),
}

/// What came of one thread.
enum Try {
    Done(u64),
    /// The thread waits at a good place; whether in a signal handler is to be found out, from its stack.
    Doubt(Box<Stack>),
    /// Nothing was called; another thread, or this one later.
    Again,
}

/// Calls a function of process `pid` with up to two arguments; what it returned. No other tracer of ours may be at
/// work on the process. `computing`: whether a thread may be borrowed that computes; the function must then share no lock
/// with the program's own code.
///
/// # Errors
/// [`CallError::NoSafePoint`] and [`CallError::NoRoom`]: it was not called. [`CallError::Lost`]: it may have been.
pub(crate) fn call(
    pid: i32,
    memory: &Memory,
    room: Room,
    function: RunAddr,
    arguments: [u64; 2],
    computing: bool,
) -> Result<u64, CallError> {
    let in_vain = || IN_VAIN.lock().unwrap_or_else(PoisonError::into_inner);
    let search = if in_vain().contains(&pid) { SEARCH_AGAIN } else { SEARCH };
    let called = in_own_thread(|| call_here(pid, memory, room, function, arguments, computing, search));
    match called {
        Err(CallError::NoSafePoint(_)) => in_vain().insert(pid),
        _ => in_vain().remove(&pid),
    };
    called
}

/// How long a thread is looked for.
#[derive(Clone, Copy, Debug)]
struct Search {
    time: Duration,
    /// How often at least.
    rounds: u32,
}

/// The processes in which this dyni's last search found no thread.
static IN_VAIN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn call_here(
    pid: i32,
    memory: &Memory,
    room: Room,
    function: RunAddr,
    arguments: [u64; 2],
    computing: bool,
    search: Search,
) -> Result<u64, CallError> {
    let start = Instant::now();
    let places = Places::of(pid, memory)?;
    let mut frames: Option<Frames> = None;
    let mut walked: HashMap<i32, Walked> = HashMap::new();
    let mut stragglers = Stragglers::default();
    // A static program waits in code of its own, which is not known to hold no lock there.
    let nowhere = places.library.is_empty() && !computing;
    let (mut rounds, mut hopeless) = (0, 0);
    while (start.elapsed() < search.time || rounds < search.rounds) && hopeless < HOPELESS {
        rounds += 1;
        stragglers.settle();
        let all = threads(pid)?;
        let mut in_handlers = 0;
        let waiting = all.iter().filter(|&&tid| may_be_safe(pid, tid)).map(|&tid| (tid, true));
        let runs = |tid: i32| computing && rounds > PATIENT_ROUNDS && thread_state(pid, tid) == Some(b'R');
        let running = all.iter().filter(|&&tid| runs(tid)).map(|&tid| (tid, false));
        for (tid, waits) in waiting.chain(running) {
            if !waits {
                frames.get_or_insert_with(|| Frames::of(pid)).read_all();
            }
            let judge = |r: &Registers| match frames.as_mut().filter(|_| !waits) {
                Some(frames) => places.judge_computing(memory, r, frames),
                None => places.judge_waiting(memory, r, walked.get(&tid)),
            };
            match try_on(pid, tid, memory, &places, judge, room, function, arguments, &mut stragglers) {
                Ok(Try::Done(result)) => return Ok(result),
                Ok(Try::Doubt(stack)) => {
                    let frames = frames.get_or_insert_with(|| Frames::of(pid));
                    match frames.walk(&stack, &places.restorers) {
                        Some(clean) => drop(walked.insert(tid, clean)),
                        None => in_handlers += 1,
                    }
                }
                Ok(Try::Again) => {}
                Err(CallError::Remote(e)) if e.is_passing() || matches!(e, RemoteError::Died(_)) => {}
                Err(e) => return Err(e),
            }
        }
        hopeless = if nowhere || in_handlers == all.len() { hopeless + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(2));
    }
    if threads(pid)?.is_empty() { Err(RemoteError::Died(pid).into()) } else { Err(CallError::NoSafePoint(pid)) }
}

/// A look from outside: a thread that runs now, or waits for a lock, is not stopped for nothing.
fn may_be_safe(pid: i32, tid: i32) -> bool {
    let waits_in = || {
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    let is_wait = |number: i64| number == libc::SYS_restart_syscall || WAITS.contains(&number);
    thread_state(pid, tid) == Some(b'S') && waits_in().is_none_or(is_wait)
}

#[expect(clippy::too_many_arguments, reason = "called once; a struct for it would be read once")]
fn try_on(
    pid: i32,
    tid: i32,
    memory: &Memory,
    places: &Places,
    judge: impl FnOnce(&Registers) -> Judgement,
    room: Room,
    function: RunAddr,
    arguments: [u64; 2],
    stragglers: &mut Stragglers,
) -> Result<Try, CallError> {
    let mut tracee = Tracee::seize(pid, tid)?;
    tracee.interrupt()?;
    match come_to_rest(&mut tracee) {
        Ok(true) => {}
        Ok(false) => return Ok(Try::Again),
        Err(e) => {
            stragglers.0.push(tracee);
            return Err(e.into());
        }
    }
    pass("remote:stopped", pid);
    let registers = tracee.registers()?;
    match judge(&registers) {
        Judgement::Good => {}
        Judgement::Bad => return Ok(Try::Again),
        Judgement::Doubt(stack) => return Ok(Try::Doubt(stack)),
    }
    let slots = (0..CODE_LEN / SLOT).map(|i| room.code.plus(i * SLOT));
    let is_free = |at: &RunAddr| memory.read_vec(*at, SLOT as usize).is_ok_and(|bytes| bytes.iter().all(|&b| b == 0));
    let slot = slots.into_iter().find(is_free).ok_or(CallError::NoRoom(pid))?;
    let trampoline = Trampoline::new(&registers, function, arguments);
    let own = Own { registers, signals: tracee.signal_mask()? };
    memory.write(room.data.plus(DONE), &[0; 16])?;
    memory.write(room.data.plus(ALL_SIGNALS), &u64::MAX.to_le_bytes())?;
    memory.write(room.data.plus(OWN_SIGNALS), &own.signals.to_le_bytes())?;
    memory.write(slot, &trampoline.bytes)?;
    pass("remote:trampoline-written", pid);
    let outcome = borrow(&mut tracee, memory, &own, room, slot, &trampoline);
    match outcome {
        Err(CallError::Lost(_)) => {
            if tracee.interrupt().is_ok() && come_to_rest(&mut tracee).is_err() {
                stragglers.0.push(tracee);
            }
        }
        // A thread that is in the trampoline, or will come back to it, needs it for ever.
        Ok(_) if tracee.is_attached() && is_used(&tracee, memory, places, slot).unwrap_or(true) => {}
        // What this says of the call must be heard, whether or not the place can be used again.
        Ok(_) => drop(memory.write(slot, &vec![0; SLOT as usize])),
        Err(_) => {}
    }
    outcome
}

/// Whether a stopped thread is in the trampoline, or a signal handler of it will return there.
fn is_used(tracee: &Tracee, memory: &Memory, places: &Places, slot: RunAddr) -> Result<bool, RemoteError> {
    let registers = tracee.registers()?;
    let inside = |at: u64| (slot.0..slot.0 + SLOT).contains(&at);
    Ok(inside(registers.rip) || words_above(&places.maps, memory, registers.rsp, MAX_STACK).any(inside))
}

/// What a borrowed thread is to have again.
struct Own {
    registers: Registers,
    /// The signals that it blocks.
    signals: u64,
}

impl Own {
    /// Gives a stopped thread all of it.
    fn give_back(&self, tracee: &Tracee) -> Result<(), RemoteError> {
        tracee.set_registers(self.registers)?;
        tracee.set_signal_mask(self.signals)
    }
}

/// Lets a stopped thread run the trampoline. It is stopped again when this returns without an error.
fn borrow(
    tracee: &mut Tracee,
    memory: &Memory,
    own: &Own,
    room: Room,
    slot: RunAddr,
    trampoline: &Trampoline,
) -> Result<Try, CallError> {
    let (pid, registers) = (tracee.pid, own.registers);
    let rsp = (registers.rsp - RED_ZONE) & !15;
    // orig_rax = -1: the thread is in no system call, so the kernel has none to restart.
    tracee.set_registers(Registers {
        rip: slot.0,
        rsp,
        rbx: room.data.0,
        eflags: registers.eflags & !(1 << 10),
        orig_rax: u64::MAX,
        ..registers
    })?;
    pass("remote:registers-set", pid);
    tracee.go_on(0)?;
    // From here on the function may be called. An error must not look as if it had not been: nobody may try again.
    match until_done(tracee, memory, own, room, slot, trampoline) {
        Ok(true) => {}
        Ok(false) => return Ok(Try::Again),
        Err(RemoteError::Died(_)) if is_ending(pid) => return Err(RemoteError::Died(pid).into()),
        Err(_) => return Err(CallError::Lost(pid)),
    }
    pass("remote:syscall-left", pid);
    let result = memory.read_vec(room.data.plus(RESULT), 8).map_err(|_| CallError::Lost(pid))?;
    let result = u64::from_le_bytes(result.try_into().expect("eight bytes"));
    // It is done, whatever becomes of the thread: it may have ended by now.
    if tracee.is_attached() && tracee.interrupt().is_ok() && come_to_rest(tracee).is_ok_and(|stopped| stopped) {
        // It waits for this, or is in the last moves already. The kernel restarts what our stop had interrupted.
        if tracee.registers().is_ok_and(|r| (slot.0..slot.0 + SLOT).contains(&r.rip)) {
            let _ = own.give_back(tracee);
        }
    }
    pass("remote:registers-restored", pid);
    Ok(Try::Done(result))
}

/// Waits until a thread that was sent into the trampoline has made the call; `false` if it was stopped before it began,
/// and has its own registers again.
fn until_done(
    tracee: &mut Tracee,
    memory: &Memory,
    own: &Own,
    room: Room,
    slot: RunAddr,
    trampoline: &Trampoline,
) -> Result<bool, RemoteError> {
    let pid = tracee.pid;
    let start = Instant::now();
    loop {
        let report = tracee.poll()?;
        let begun = |tracee: &Tracee| -> Result<bool, RemoteError> {
            let rip = tracee.registers()?.rip;
            Ok(!(slot.0..=slot.0 + trampoline.call).contains(&rip))
        };
        match report {
            Some(Report::Signal(_)) if !begun(tracee)? => {
                own.give_back(tracee)?;
                // The signal is delivered when the thread is let go.
                return Ok(false);
            }
            Some(Report::Stopped) if !begun(tracee)? => {
                own.give_back(tracee)?;
                return Ok(false);
            }
            Some(Report::Signal(signal)) => tracee.go_on(signal)?,
            Some(Report::Stopped | Report::Syscall) => tracee.go_on(0)?,
            Some(Report::Gone) | None => {}
        }
        let mut done = [0];
        memory.read(room.data.plus(DONE), &mut done)?;
        if done == [1] {
            return Ok(true);
        }
        if report == Some(Report::Gone) || start.elapsed() > PATIENCE {
            return Err(RemoteError::Died(pid));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

fn pass(step: &str, pid: i32) {
    failpoint::pass(step, pid);
    #[cfg(test)]
    fuse::pass(step);
}

/// For tests: a step at which the thread that traces ends, as if dyni had died there.
#[cfg(test)]
pub(crate) mod fuse {
    use std::sync::Mutex;

    static ARMED: Mutex<Option<String>> = Mutex::new(None);

    pub(crate) fn arm(step: &str) {
        *ARMED.lock().unwrap() = Some(step.to_owned());
    }

    pub(super) fn pass(step: &str) {
        let burnt = ARMED.lock().unwrap().take_if(|armed| armed == step).is_some();
        assert!(!burnt, "the fuse at {step} has burnt");
    }
}
