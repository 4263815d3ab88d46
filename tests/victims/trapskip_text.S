/* See trapskip.c. */
        .text
        .globl  asm_fetch
        .type   asm_fetch, @function
        .p2align 4
asm_fetch:
        .cfi_startproc
        movq    %rsi, %rax
        testq   %rdi, %rdi
        jz      asm_fetch_recover
        .globl  asm_fetch_fault
asm_fetch_fault:
        movq    (%rdi), %rax
        rolq    $3, %rax
        .globl  asm_fetch_recover
asm_fetch_recover:
        addq    $1, %rax
        ret
        .cfi_endproc
        .size   asm_fetch, .-asm_fetch

/* The load is three bytes long, and the handler steps over it into what follows. */
        .globl  asm_skip_load
        .type   asm_skip_load, @function
        .p2align 4
asm_skip_load:
        .cfi_startproc
        movq    %rsi, %rax
        movl    $7, %ecx
1:      xorq    %rcx, %rax
        movq    (%rdi), %rdx
        leaq    3(%rax,%rcx), %rax
        decl    %ecx
        jnz     1b
        ret
        .cfi_endproc
        .size   asm_skip_load, .-asm_skip_load

/* A disassembler sees a block's end in ud2; this program does not. */
        .globl  asm_skip_ud2
        .type   asm_skip_ud2, @function
        .p2align 4
asm_skip_ud2:
        .cfi_startproc
        leaq    9(%rdi), %rax
        testb   $1, %al
        jz      1f
        ud2
        imulq   $5, %rax, %rax
        ret
1:      ud2
        notq    %rax
        ret
        .cfi_endproc
        .size   asm_skip_ud2, .-asm_skip_ud2
        .section .note.GNU-stack,"",@progbits
