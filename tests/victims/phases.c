/* Two kinds of work in turn: SIGUSR1 changes from one to the other. Both give the same result by code of their own, so that
 * only somebody who looks where the time goes can tell them apart. */
#include "victim.h"

static volatile sig_atomic_t phase;

static void change(int sig)
{
    (void)sig;
    phase = !phase;
}

/* The asm is what keeps the compiler from folding the two into one; apart from each other they are two pieces of code for
 * who looks at some hundred bytes at a time. */
#define WORK(name)                                                                                                     \
    static NOINLINE __attribute__((aligned(1024))) u64 name##_step(u64 a, u64 op)                                      \
    {                                                                                                                  \
        __asm__ volatile("/* " #name " step */");                                                                      \
        if (op & 1) a += op * 3;                                                                                       \
        if (op & 2) a ^= a >> 7;                                                                                       \
        else a = mix(a, op);                                                                                           \
        if ((op & 12) == 12) a = a / 5 + 1;                                                                            \
        return a;                                                                                                      \
    }                                                                                                                  \
    static NOINLINE __attribute__((aligned(1024))) u64 name##_walk(u64 seed, int n)                                    \
    {                                                                                                                  \
        __asm__ volatile("/* " #name " walk */");                                                                      \
        u64 s = seed, a = seed;                                                                                        \
        for (int i = 0; i < n; i++) {                                                                                  \
            u64 op = next(&s);                                                                                         \
            a = name##_step(a, op);                                                                                    \
            if (__builtin_expect((op & 0xffff) == 7, 0)) a = ~a;                                                       \
            else a += op >> 60;                                                                                        \
        }                                                                                                              \
        return a;                                                                                                      \
    }
WORK(first)
WORK(second)

static void setup(void) { signal(SIGUSR1, change); }

static u64 round_(u64 seed) { return phase ? second_walk(seed, 4000) : first_walk(seed, 4000); }

VICTIM_MAIN(setup, round_)
