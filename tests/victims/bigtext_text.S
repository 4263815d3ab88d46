/* Text before the program's functions (the linker puts unlikely text first) and behind them. */
    .section .text.unlikely,"ax",@progbits
    .fill 5 << 20, 1, 0xcc

    .text
    .globl far_away
    .type far_away, @function
far_away:
    .cfi_startproc
    lea 3(%rdi,%rdi,4), %rax
    ror $9, %rax
    ret
    .cfi_endproc
    .size far_away, . - far_away
    .globl constants_in_text
constants_in_text:
    .rept 16
    .long 0x12345678 + 0x01020305 * (. - constants_in_text)
    .endr
    .fill 5 << 20, 1, 0xcc
    .section .note.GNU-stack,"",@progbits
