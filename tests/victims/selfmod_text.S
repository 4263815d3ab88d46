/* See selfmod.c. */
        .text
        .p2align 12
        .globl  asm_rewritten
        .type   asm_rewritten, @function
asm_rewritten:
        .cfi_startproc
        movq    %rdi, %rax
1:      movl    $0, %edx
        .globl  asm_rewritten_imm
        .set    asm_rewritten_imm, .-4
        addq    %rdx, %rax
        rolq    $7, %rax
        xorq    %rsi, %rax
        decq    %rsi
        jnz     1b
        ret
        .cfi_endproc
        .size   asm_rewritten, .-asm_rewritten
        .globl  asm_rewritten_end
asm_rewritten_end:
        .p2align 12
        .section .note.GNU-stack,"",@progbits
