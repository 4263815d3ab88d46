/* Position-independent code of the old kind: call the next instruction and pop the return address. */
#include "victim.h"

static const u64 numbers[4] = {0x1111, 0x2345, 0x9999, 0xabcdef};

static NOINLINE u64 where(void)
{
    u64 got, want;
    __asm__ volatile("sub $128, %%rsp\n\t"
                     "call 1f\n"
                     "1: pop %0\n\t"
                     "add $128, %%rsp\n\t"
                     "lea 1b(%%rip), %1"
                     : "=r"(got), "=r"(want)::"memory", "cc");
    CHECK("the popped return address", got, want);
    return want;
}

/* Data found by its distance from the popped address: a wrong one reads from anywhere. */
static NOINLINE u64 by_distance(unsigned i)
{
    u64 r;
    __asm__ volatile("sub $128, %%rsp\n\t"
                     "call 1f\n"
                     "1: pop %0\n\t"
                     "add $128, %%rsp\n\t"
                     "add $2f-1b, %0\n\t"
                     "mov (%0,%1,8), %0\n\t"
                     "jmp 3f\n"
                     "2: .quad 7, 77, 777, 7777\n"
                     "3:"
                     : "=&r"(r)
                     : "r"((u64)(i & 3))
                     : "memory", "cc");
    return r;
}

static u64 work(u64 seed)
{
    u64 h = seed, first = where();
    for (unsigned i = 0; i < 20000; i++) {
        h = mix(h, by_distance((unsigned)h) + numbers[i & 3]);
        CHECK("the same place", where(), first);
    }
    return h;
}

VICTIM_MAIN(NULL, work)
