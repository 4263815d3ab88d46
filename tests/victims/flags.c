/* Flags and strings: carries that cross basic blocks, setcc after jumps, rep movs and stos, loop and jrcxz.
 * with: flags_text.S */
#include "victim.h"

void asm_add_chain(u64 *a, const u64 *b, u64 n);
u64 asm_flags_across(u64 a, u64 b);
u64 asm_loops(u64 h, u64 n);
u64 asm_strings(unsigned char *to, const unsigned char *from, u64 n);
u64 asm_backwards(unsigned char *to, const unsigned char *from, u64 n);
u64 asm_find(const unsigned char *p, u64 n, u64 what);

static u64 work(u64 seed)
{
    u64 a[64], b[64], s = seed, h = seed;
    unsigned char x[512], y[512];
    for (int i = 0; i < 64; i++) a[i] = next(&s), b[i] = ~0ull - (next(&s) >> 40);
    for (int i = 0; i < 512; i++) x[i] = (unsigned char)next(&s);
    for (int k = 0; k < 150; k++) {
        asm_add_chain(a, b, 64);
        h = mix(h, a[63] ^ a[17]);
        for (int i = 0; i < 63; i++) h += asm_flags_across(a[i], a[i + 1]) * (u64)(i + 1);
        h = asm_loops(h, 40);
        h = mix(h, asm_strings(y, x, 512 - (u64)k));
        h = mix(h, asm_backwards(x, y, 300));
        h = mix(h, asm_find(x, 512, h & 0xff));
        x[k] ^= y[511 - k] + 1;
    }
    for (int i = 0; i < 512; i++) h = mix(h, x[i]);
    return h;
}

VICTIM_MAIN(NULL, work)
