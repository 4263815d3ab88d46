/* Code whose layout the compiler decides by what it is told is rare. Built with REGRESSED it is told the opposite: the same
 * program, worse laid out. ANOTHER makes another build of it that is laid out the same, but for a function that nobody calls.
 * Each function decides by bits of what it is given, so that every build takes the same ways. */
#include "victim.h"

#ifdef REGRESSED
#define RARELY(x) __builtin_expect(!!(x), 1)
#else
#define RARELY(x) __builtin_expect(!!(x), 0)
#endif

static u64 table[256];

#define STEP(name, bits, k)                                                                                            \
    static NOINLINE u64 name(u64 a, u64 op)                                                                            \
    {                                                                                                                  \
        if (RARELY((op >> bits & 63) == k)) {                                                                          \
            table[a & 255] += a / 3;                                                                                   \
            a = a * 5 + table[op & 255];                                                                               \
        }                                                                                                              \
        a += op ^ k;                                                                                                   \
        if (RARELY((op >> (bits + 7) & 31) == 3)) {                                                                    \
            a ^= table[(a >> 8) & 255] / 7;                                                                            \
            table[k] ^= a >> 3;                                                                                        \
        }                                                                                                              \
        for (u64 i = 0; i < (op >> (bits + 3) & 3); i++) {                                                             \
            if (RARELY((op + i & 127) == k)) a = ~a / 9;                                                               \
            a = mix(a, i);                                                                                             \
        }                                                                                                              \
        return a;                                                                                                      \
    }
STEP(first, 1, 5)
STEP(second, 4, 9)
STEP(third, 9, 2)
STEP(fourth, 13, 7)
STEP(fifth, 17, 6)
STEP(sixth, 21, 1)

#ifdef ANOTHER
__attribute__((used)) static NOINLINE u64 nobody(u64 a) { return a * 3 + table[a & 7]; }
#endif

static void setup(void) {}

static u64 round_(u64 seed)
{
    u64 s = seed, a = seed;
    memset(table, 0, sizeof table);
    for (int i = 0; i < 2000; i++) {
        u64 op = next(&s);
        a = first(a, op);
        a = second(a, op);
        if (RARELY((op & 15) == 3)) a = third(a, op);
        a = fourth(a, op);
        a = fifth(a, op);
        a = sixth(a, op);
    }
    return a;
}

VICTIM_MAIN(setup, round_)
