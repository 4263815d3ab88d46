//! The code that a borrowed thread runs to make one system call, and that brings it home without help.
//!
//! `syscall` changes rax, rcx and r11 and nothing else (System V ABI, A.2.1); its arguments are in six more registers.
//! So the trampoline is: `syscall`, nine `mov r64, imm64` with the values that the thread had, and a jump through a
//! literal to where it was. Flags, stack, vector and x87 state are never touched, hence need no saving. About a hundred
//! bytes, which lie for a moment in the unused tail of the last page of some executable segment: bytes that belong to
//! no program, and that are put back afterwards.

use super::trace::Registers;

/// The length of a trampoline in bytes.
pub(crate) const LEN: usize = 2 + 9 * 10 + 6 + 8;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// `mov r64, imm64`: REX.W (and REX.B) and opcode, in the order in which [`build`] loads them.
const MOV: [[u8; 2]; 9] = [
    [0x48, 0xb8], // rax
    [0x48, 0xb9], // rcx
    [0x48, 0xba], // rdx
    [0x48, 0xbe], // rsi
    [0x48, 0xbf], // rdi
    [0x49, 0xb8], // r8
    [0x49, 0xb9], // r9
    [0x49, 0xba], // r10
    [0x49, 0xbb], // r11
];
/// `jmp [rip+0]`: to the eight bytes that follow it.
const JMP_LITERAL: [u8; 6] = [0xff, 0x25, 0, 0, 0, 0];

// include/linux/errno.h: what an interrupted system call answers inside the kernel.
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Where a thread with these registers goes on in user mode and with which rax, if nobody is there to let the kernel
/// restart its interrupted system call: two bytes back, with the number of the call in rax (arch/x86/kernel/signal.c,
/// `arch_do_signal_or_restart`).
pub(super) fn home(registers: &Registers) -> (u64, u64) {
    match (registers.orig_rax as i64, registers.rax as i64) {
        (0.., ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND) => (registers.rip - 2, registers.orig_rax),
        (0.., ERESTART_RESTARTBLOCK) => (registers.rip - 2, libc::SYS_restart_syscall as u64),
        _ => (registers.rip, registers.rax),
    }
}

/// The trampoline for a thread that has these registers.
pub(crate) fn build(registers: &Registers) -> [u8; LEN] {
    let (rip, rax) = home(registers);
    let r = registers;
    let values = [rax, r.rcx, r.rdx, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11];
    let mut code = Vec::with_capacity(LEN);
    code.extend(SYSCALL);
    for (opcode, value) in MOV.iter().zip(values) {
        code.extend(opcode);
        code.extend(value.to_le_bytes());
    }
    code.extend(JMP_LITERAL);
    code.extend(rip.to_le_bytes());
    code.try_into().expect("the length is the sum above")
}

/// Whether these bytes are a trampoline: one that a dyni which was killed left behind.
pub(crate) fn is_one(bytes: &[u8]) -> bool {
    bytes.len() == LEN
        && bytes[..2] == SYSCALL
        && MOV.iter().enumerate().all(|(i, opcode)| bytes[2 + 10 * i..].starts_with(opcode))
        && bytes[2 + 90..].starts_with(&JMP_LITERAL)
}

/// The registers with which the thread starts the trampoline at `at`.
pub(crate) fn enter(registers: &Registers, at: u64, number: i64, arguments: [u64; 6]) -> Registers {
    let [rdi, rsi, rdx, r10, r8, r9] = arguments;
    // orig_rax = -1: the thread is in no system call, so the kernel has none to restart.
    Registers { rip: at, rax: number as u64, orig_rax: u64::MAX, rdi, rsi, rdx, r10, r8, r9, ..*registers }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(orig_rax: i64, rax: i64) -> Registers {
        // SAFETY: user_regs_struct is 27 integers; all zero is a value of it.
        let zero: Registers = unsafe { std::mem::zeroed() };
        Registers { rip: 0x1002, rax: rax as u64, orig_rax: orig_rax as u64, ..zero }
    }

    #[test]
    fn an_interrupted_call_is_made_again() {
        assert_eq!(home(&registers(-1, 7)), (0x1002, 7));
        assert_eq!(home(&registers(0, 7)), (0x1002, 7), "a call that is done stays done");
        assert_eq!(home(&registers(34, ERESTARTNOHAND)), (0x1000, 34));
        assert_eq!(home(&registers(35, ERESTART_RESTARTBLOCK)), (0x1000, libc::SYS_restart_syscall as u64));
        assert_eq!(home(&registers(-1, ERESTARTSYS)).0, 0x1002, "a plain -512 in rax is the program's own");
    }

    #[test]
    fn it_knows_its_own() {
        let code = build(&registers(-1, 7));
        assert!(is_one(&code));
        let mut other = code;
        other[12] ^= 1;
        assert!(!is_one(&other));
    }
}
