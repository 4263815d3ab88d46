/* Leaf functions that keep live values in the red zone, the 128 bytes below rsp: whoever pushes there breaks them.
 * with: redzone_text.S */
#include "victim.h"

u64 asm_redzone(u64 h, u64 n);

/* More live values than registers, all volatile: the compiler spills below rsp, as a leaf may. */
static NOINLINE u64 leaf(u64 a, u64 b, u64 c, u64 d)
{
    volatile u64 v[14];
    for (int i = 0; i < 14; i++) v[i] = a + (u64)i * b;
    for (int r = 0; r < 50; r++) {
        v[r % 14] ^= v[(r + 5) % 14] + c;
        v[(r + 3) % 14] += (v[(r + 9) % 14] >> 3) * d;
        if (v[r % 14] & 1) v[(r + 1) % 14] = ~v[(r + 2) % 14];
    }
    u64 h = 0;
    for (int i = 0; i < 14; i++) h = (h << 5 | h >> 59) ^ v[i];
    return h;
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (u64 i = 0; i < 600; i++) h = mix(h, leaf(h, i, h >> 7, 13));
    return mix(h, asm_redzone(h, 20000));
}

VICTIM_MAIN(NULL, work)
