/* See handasm.c. Bytes that are data lie where a linear sweep would take them for instructions. */
        .text

/* Data inside the function, jumped over, and read relative to rip. */
        .globl  asm_data_inside
        .type   asm_data_inside, @function
        .p2align 4
asm_data_inside:
        .cfi_startproc
        movq    %rdx, %rax
        testq   %rsi, %rsi
        jz      3f
        jmp     2f
1:      .quad   0x9e3779b97f4a7c15, 0xe8e9ebc3cccccccc
        .byte   0x0f
2:      movq    (%rdi), %rcx
        addq    $8, %rdi
        xorq    1b(%rip), %rax
        imulq   1b+8(%rip), %rcx
        rolq    $13, %rax
        addq    %rcx, %rax
        decq    %rsi
        jnz     2b
3:      ret
        .cfi_endproc
        .size   asm_data_inside, .-asm_data_inside

        .byte   0xe8, 0x00, 0xe9, 0xff, 0x0f, 0x84

/* No CFI, no size, no type: nothing says where it begins or ends. */
        .globl  asm_no_cfi
asm_no_cfi:
        pushq   %rbx
        movq    %rdi, %rbx
        movq    %rsi, %rcx
1:      movq    %rbx, %rax
        shrq    $7, %rax
        xorq    %rax, %rbx
        leaq    (%rbx,%rbx,4), %rbx
        addq    $0x3c, %rbx
        decq    %rcx
        jnz     1b
        movq    %rbx, %rax
        popq    %rbx
        ret

/* A jump table of 16-bit offsets, in the text, between the jump and its targets. */
        .globl  asm_table
        .type   asm_table, @function
        .p2align 4
asm_table:
        .cfi_startproc
        leaq    5f(%rip), %rdx
        movzwl  (%rdx,%rdi,2), %ecx
        addq    %rcx, %rdx
        movq    %rsi, %rax
        jmp     *%rdx
5:      .word   10f-5b, 11f-5b, 12f-5b, 13f-5b, 14f-5b, 15f-5b, 16f-5b, 17f-5b
10:     addq    $1, %rax
        ret
11:     imulq   $77, %rax, %rax
        ret
12:     notq    %rax
13:     rolq    $3, %rax
        ret
14:     xorq    $0x1357, %rax
        jmp     13b
15:     subq    $9, %rax
        jmp     11b
16:     bswapq  %rax
        ret
17:     negq    %rax
        jmp     10b
        .cfi_endproc
        .size   asm_table, .-asm_table

/* Falls through into the next function, as some hand-tuned libraries do. */
        .globl  asm_falls
        .type   asm_falls, @function
asm_falls:
        .cfi_startproc
        xorq    $0x77, %rdi
        rolq    $5, %rdi
        .cfi_endproc
        .size   asm_falls, .-asm_falls
        .globl  asm_second_entry
        .type   asm_second_entry, @function
asm_second_entry:
        .cfi_startproc
        leaq    (%rdi,%rdi,2), %rax
        movl    $40, %ecx
1:      addq    %rcx, %rax
        rolq    $9, %rax
        decl    %ecx
        jnz     1b
        ret
        .cfi_endproc
        .size   asm_second_entry, .-asm_second_entry

/* Calls into the middle of asm_no_cfi's neighbour: a local label that is an entry too, right after the real one. */
        .globl  asm_into_middle
        .type   asm_into_middle, @function
asm_into_middle:
        .cfi_startproc
        movq    %rdi, %rax
        jmp     2f
1:      addq    $3, %rax
        rolq    $11, %rax
2:      xorq    %rsi, %rax
        decq    %rsi
        jz      3f
        call    4f
        jmp     1b
3:      ret
4:      imulq   $0x1f, %rax, %rax
        ret
        .cfi_endproc
        .size   asm_into_middle, .-asm_into_middle

/* Pops what it did not push in the order that compilers use, and leaves through push and ret. */
        .globl  asm_odd_frame
        .type   asm_odd_frame, @function
asm_odd_frame:
        .cfi_startproc
        movq    %rdi, %rax
        leaq    7f(%rip), %rdx
1:      pushq   %rdx
        .cfi_adjust_cfa_offset 8
        addq    %rsi, %rax
        ret
7:      rolq    $17, %rax
        .cfi_adjust_cfa_offset -8
        decq    %rsi
        jnz     1b
        ret
        .cfi_endproc
        .size   asm_odd_frame, .-asm_odd_frame

        .section .note.GNU-stack,"",@progbits
