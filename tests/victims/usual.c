/* Code that mostly leads to one place by a detour: calls and tail calls through pointers that nearly always are the same,
 * jumps through tables, calls of another module's functions. And now and then the pointer is another one. */
#include "victim.h"

typedef u64 (*op)(u64, u64);

/* As an allocator has it: the functions of the object's kind, called through memory. */
struct kind {
    op get;
    op put;
};

static NOINLINE u64 often(u64 a, u64 b)
{
    for (u64 i = 0; i < (b & 3); i++) a = a * 3 + i;
    return mix(a, b);
}

static NOINLINE u64 rarely(u64 a, u64 b)
{
    for (u64 i = 0; i < (b & 3); i++) a = a * 5 - i;
    return mix(b, a);
}

static const struct kind usual = {often, often}, unusual = {rarely, rarely};

NOINLINE u64 by_memory(const struct kind *const *k, u64 a, u64 b)
{
    u64 h = (*k)->get(a, b);
    return mix(h, (*k)->put(h, a));
}

NOINLINE u64 by_register(op f, u64 a, u64 b)
{
    u64 h = a;
    for (int i = 0; i < 3; i++) h = mix(f(h, b), h);
    return h;
}

/* A jump at the function's end. */
NOINLINE u64 by_jump(const struct kind *k, u64 a, u64 b) { return k->put(b, a + 1); }

/* A call that is the first instruction of its block, and one at a block's end. */
NOINLINE u64 by_turns(op f, u64 a, u64 b)
{
    do {
        a ^= f(a, b);
    } while ((a & 7) == 3);
    return a;
}

NOINLINE u64 by_table(u64 which, u64 a)
{
    switch (which & 7) {
    case 0: return a + 1;
    case 1: return a * 3 + which;
    case 2: return mix(a, which);
    case 3: return a ^ which << 7;
    case 4: return a - which;
    case 5: return mix(which, a);
    case 6: return (a << 3) + (a >> 61);
    default: return ~a;
    }
}

/* Nothing is given back in a register, and the cases end the function. */
NOINLINE void by_table_into(u64 which, u64 *a)
{
    switch (which % 6) {
    case 0: *a += 11; return;
    case 1: *a *= 7; return;
    case 2: *a ^= *a >> 3; return;
    case 3: *a = mix(*a, which); return;
    case 4: *a -= which << 1; return;
    default: *a = ~*a; return;
    }
}

NOINLINE u64 by_stub(const char *text, u64 a)
{
    char copy[32];
    memset(copy, (int)(a & 15) + 'a', sizeof copy - 1);
    copy[sizeof copy - 1] = 0;
    return a + strcspn(copy, text) + strtoul(text, NULL, 16);
}

/* The stub at the function's end. */
NOINLINE u64 by_last_stub(const char *text) { return (u64)atoll(text); }

static u64 work(u64 seed)
{
    u64 s = seed, h = seed;
    for (int i = 0; i < 3000; i++) {
        u64 n = next(&s);
        int is_rare = n % 23 == 0;
        const struct kind *k = is_rare ? &unusual : &usual;
        op f = is_rare ? rarely : often;
        h = mix(h, by_memory(&k, h, n));
        h = mix(h, by_register(f, n, h));
        h = mix(h, by_jump(k, n, h));
        h = by_turns(f, h, n);
        h = by_table(n, h);
        by_table_into(n >> 5, &h);
        if (i % 8 == 0) h += by_stub("fe3", n) + by_last_stub("981");
        /* What a pointer says is what it said. */
        CHECK("a function's address", f == k->get, 1);
    }
    return h;
}

VICTIM_MAIN(NULL, work)
