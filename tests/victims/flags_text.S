/* See flags.c. */
        .text

/* The carry lives across the loop's back edge: lea and dec leave it alone. */
        .globl  asm_add_chain
        .type   asm_add_chain, @function
asm_add_chain:
        .cfi_startproc
        movq    %rdx, %rcx
        clc
1:      movq    (%rsi), %rax
        adcq    %rax, (%rdi)
        leaq    8(%rsi), %rsi
        leaq    8(%rdi), %rdi
        decq    %rcx
        jz      2f
        jmp     1b
2:      adcq    $0, -8(%rdi)
        ret
        .cfi_endproc
        .size   asm_add_chain, .-asm_add_chain

/* Flags set once and read in four blocks, through jumps that must not touch them. */
        .globl  asm_flags_across
        .type   asm_flags_across, @function
asm_flags_across:
        .cfi_startproc
        xorl    %eax, %eax
        xorl    %edx, %edx
        cmpq    %rsi, %rdi
        jo      5f
1:      sete    %al
        jmp     3f
2:      setb    %dl
        leaq    (%rax,%rdx,2), %rax
        ret
3:      js      4f
        seto    %dl
        leaq    (%rax,%rdx,8), %rax
        movl    $0, %edx
        jmp     2b
4:      setl    %dl
        leaq    16(%rax,%rdx,4), %rax
        movl    $0, %edx
        jp      2b
        leaq    64(%rax), %rax
        jmp     2b
5:      leaq    (%rax), %rax
        jmp     1b
        .cfi_endproc
        .size   asm_flags_across, .-asm_flags_across

/* jrcxz, loop, loopne: branches with 8 bits of reach only. */
        .globl  asm_loops
        .type   asm_loops, @function
asm_loops:
        .cfi_startproc
        movq    %rdi, %rax
        movq    %rsi, %rcx
        jrcxz   9f
1:      imulq   $0x2d, %rax, %rax
        addq    %rcx, %rax
        loop    1b
        movl    $30, %ecx
2:      rolq    $7, %rax
        testb   $0x7c, %al
        loopne  2b
        jrcxz   3f
        addq    $0x11, %rax
3:      movl    $30, %ecx
4:      rorq    $3, %rax
        testb   $1, %al
        loope   4b
        addq    %rcx, %rax
        movl    $3, %ecx
5:      jecxz   9f
        decl    %ecx
        xorq    $0x5a5a, %rax
        jmp     5b
9:      ret
        .cfi_endproc
        .size   asm_loops, .-asm_loops

        .globl  asm_strings
        .type   asm_strings, @function
asm_strings:
        .cfi_startproc
        pushq   %rdi
        .cfi_adjust_cfa_offset 8
        movq    %rdx, %rcx
        rep movsb
        popq    %rdi
        .cfi_adjust_cfa_offset -8
        movl    $3, %ecx
        movq    %rdx, %rax
        rep stosq
        movq    %rdi, %rsi
        lodsq
        ret
        .cfi_endproc
        .size   asm_strings, .-asm_strings

/* The direction flag is state too, and it is set over a basic block's end. */
        .globl  asm_backwards
        .type   asm_backwards, @function
asm_backwards:
        .cfi_startproc
        leaq    -1(%rdi,%rdx), %rdi
        leaq    -1(%rsi,%rdx), %rsi
        movq    %rdx, %rcx
        std
        testq   %rdx, %rdx
        jz      1f
        rep movsb
1:      cld
        movzbl  1(%rdi), %eax
        ret
        .cfi_endproc
        .size   asm_backwards, .-asm_backwards

        .globl  asm_find
        .type   asm_find, @function
asm_find:
        .cfi_startproc
        movq    %rsi, %rcx
        movl    %edx, %eax
        repne scasb
        movq    %rcx, %rax
        je      1f
        notq    %rax
1:      ret
        .cfi_endproc
        .size   asm_find, .-asm_find

        .section .note.GNU-stack,"",@progbits
