/* Sibling calls: jumps between functions, mutual, through a pointer and with arguments on the stack. */
#include "victim.h"

typedef u64 (*state)(const unsigned char *p, u64 h, u64 n);

static u64 letter(const unsigned char *p, u64 h, u64 n);
static u64 digit(const unsigned char *p, u64 h, u64 n);
static u64 other(const unsigned char *p, u64 h, u64 n);

static const state table[3] = {letter, digit, other};

static NOINLINE u64 letter(const unsigned char *p, u64 h, u64 n)
{
    if (!n) return h;
    return table[p[1] % 3](p + 1, mix(h, *p), n - 1);
}

static NOINLINE u64 digit(const unsigned char *p, u64 h, u64 n)
{
    if (!n) return ~h;
    if (*p & 16) return other(p + 1, h * 3, n - 1);
    return letter(p + 1, h ^ *p, n - 1);
}

static NOINLINE u64 other(const unsigned char *p, u64 h, u64 n)
{
    if (!n) return h + 1;
    if (*p & 32) return digit(p + 1, h + *p, n - 1);
    return table[*p % 3](p + 1, h - 9, n - 1);
}

static NOINLINE u64 wide_end(u64 a, u64 b, u64 c, u64 d, u64 e, u64 f, u64 g, u64 h)
{
    return mix(a, b) ^ mix(c, d) ^ mix(e, f) ^ mix(g, h);
}

static NOINLINE u64 wide(u64 a, u64 b, u64 c, u64 d, u64 e, u64 f, u64 g, u64 h)
{
    return wide_end(h, g, f, e, d, c, b, a + 1);
}

/* A conditional sibling call: compilers make it a conditional jump to another function. */
static NOINLINE u64 maybe(u64 x, u64 y)
{
    if (x & 1) return mix(x, y);
    if (x & 2) return wide(x, y, 3, 4, 5, 6, 7, 8);
    return y;
}

static NOINLINE u64 ping(u64 n, u64 h);

static NOINLINE u64 pong(u64 n, u64 h) { return n ? ping(n - 1, h * 5 + 1) : h; }

static NOINLINE u64 ping(u64 n, u64 h) { return n ? pong(n - 1, h ^ n) : ~h; }

static u64 work(u64 seed)
{
    unsigned char text[2100];
    u64 s = seed, h = seed;
    for (int i = 0; i < 2100; i++) text[i] = (unsigned char)(next(&s) >> 9);
    for (int i = 0; i < 16; i++) h = letter(text, h, 2000);
    for (u64 i = 0; i < 20000; i++) h += maybe(i ^ (h & 3), h);
    return mix(h, ping(8000, h));
}

VICTIM_MAIN(NULL, work)
