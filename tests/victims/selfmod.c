/* A program that rewrites an immediate of its own hot function and so must not be optimised there. It first prints
 * "rewrites FROM TO AT": the function's bounds and the four bytes, so that the harness can leave those out and can check
 * that nobody else has written there. With -DTOGGLE the page is writable for the moment only; without, it stays rwx.
 * with: selfmod_text.S */
#include <sys/mman.h>
#include "victim.h"

u64 asm_rewritten(u64 h, u64 n);
extern unsigned char asm_rewritten_end[], asm_rewritten_imm[];

static void protect(int prot)
{
    uintptr_t from = (uintptr_t)asm_rewritten & ~4095ul;
    uintptr_t to = ((uintptr_t)asm_rewritten_end + 4095) & ~4095ul;
    if (mprotect((void *)from, to - from, prot)) victim_fail("mprotect", (u64)errno, 0);
}

static NOINLINE void rewrite(u32 value)
{
#ifdef TOGGLE
    protect(PROT_READ | PROT_WRITE | PROT_EXEC);
#endif
    memcpy(asm_rewritten_imm, &value, sizeof value);
#ifdef TOGGLE
    protect(PROT_READ | PROT_EXEC);
#endif
}

static void setup(void)
{
#ifndef TOGGLE
    protect(PROT_READ | PROT_WRITE | PROT_EXEC);
#endif
    printf("rewrites %lx %lx %lx\n", (unsigned long)(uintptr_t)asm_rewritten,
           (unsigned long)(uintptr_t)asm_rewritten_end, (unsigned long)(uintptr_t)asm_rewritten_imm);
}

static NOINLINE u64 reference(u64 h, u64 n, u32 value)
{
    for (; n; n--) {
        h += value;
        h = (h << 7) | (h >> 57);
        h ^= n;
    }
    return h;
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (u32 i = 1; i <= 100; i++) {
        /* Never the value in the file, which is zero. */
        u32 value = (u32)(h >> 40) + i;
        rewrite(value);
        u64 got = asm_rewritten(h, 400);
        CHECK("the rewritten function", got, reference(h, 400, value));
        h = mix(h, got);
    }
    return h;
}

VICTIM_MAIN(setup, work)
