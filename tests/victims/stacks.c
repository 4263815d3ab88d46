/* Frames whose size or alignment is only known at run time: alloca, variable-length arrays, realigned stacks. */
#include <alloca.h>
#include "victim.h"

typedef u64 v4 __attribute__((vector_size(32)));
typedef u64 v8 __attribute__((vector_size(64)));

static NOINLINE void fill(u64 *p, int n, u64 s)
{
    for (int i = 0; i < n; i++) p[i] = next(&s);
}

static NOINLINE u64 with_alloca(int n, u64 h)
{
    u64 sum = h;
    for (int i = 1; i < n; i++) {
        u64 *p = alloca((size_t)i * sizeof *p);
        fill(p, i, h + (u64)i);
        sum = mix(sum, p[i / 2]);
    }
    return sum;
}

static NOINLINE u64 with_vla(int n, u64 h)
{
    u64 a[n][n + 1];
    fill(&a[0][0], n * (n + 1), h);
    u64 sum = h;
    for (int i = 0; i < n; i++)
        for (int j = 0; j <= i; j++) sum = mix(sum, a[i][j] + a[j][i]);
    return sum;
}

static NOINLINE void touch(void *p, size_t align)
{
    if ((uintptr_t)p % align) victim_fail("alignment", (uintptr_t)p, align);
    __asm__ volatile("" ::"r"(p) : "memory");
}

/* The vector locals make the compiler realign rsp, which hides the return address from a fixed offset. */
static NOINLINE u64 realigned(u64 h)
{
    v4 a = {h, h + 1, h + 2, h + 3} , b = {1, 2, 3, 4};
    _Alignas(64) u64 line[16];
    touch(&a, 32);
    touch(line, 64);
    for (int i = 0; i < 64; i++) {
        a = a * b + (a >> 3);
        line[i & 15] = a[i & 3];
    }
    touch(&a, 32);
    u64 sum = 0;
    for (int i = 0; i < 16; i++) sum = mix(sum, line[i]);
    return sum;
}

__attribute__((force_align_arg_pointer)) static NOINLINE u64 forced(u64 h, int n)
{
    v8 x = {h, 1, 2, 3, 4, 5, 6, 7};
    u64 vla[n];
    fill(vla, n, h);
    touch(&x, 64);
    for (int i = 0; i < n; i++) x += vla[i] ^ (x << 1);
    return mix(x[0] ^ x[3], x[5] + x[7]);
}

/* A big frame: the compiler probes it page by page where stack-clash protection is on. */
static NOINLINE u64 big(u64 h)
{
    u64 a[6000];
    fill(a, 40, h);
    touch(a, 8);
    a[5999] = a[3];
    touch(a, 8);
    return mix(a[5999], a[39]);
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int i = 0; i < 60; i++) {
        h = mix(h, with_alloca(30, h));
        h = mix(h, with_vla(12 + i % 10, h));
        h = mix(h, realigned(h));
        h = mix(h, forced(h, 10 + i % 10));
        h = mix(h, big(h));
    }
    return h;
}

VICTIM_MAIN(NULL, work)
