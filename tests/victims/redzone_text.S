/* See redzone.c: all of the red zone, down to its last word, live over every branch of a long loop. */
        .text
        .globl  asm_redzone
        .type   asm_redzone, @function
        .p2align 4
asm_redzone:
        .cfi_startproc
        movq    %rdi, -8(%rsp)
        movq    %rsi, -128(%rsp)
        movq    $0, -64(%rsp)
1:      movq    -8(%rsp), %rax
        rolq    $9, %rax
        xorq    -128(%rsp), %rax
        testb   $4, %al
        jz      2f
        addq    %rax, -64(%rsp)
2:      movq    %rax, -8(%rsp)
        testb   $8, %al
        jnz     3f
        incq    -64(%rsp)
3:      decq    -128(%rsp)
        jnz     1b
        movq    -64(%rsp), %rax
        addq    -8(%rsp), %rax
        ret
        .cfi_endproc
        .size   asm_redzone, .-asm_redzone
        .section .note.GNU-stack,"",@progbits
