/* Assembly by hand: data between functions and inside one, functions without CFI, a table of code offsets in the text,
 * a function that falls through into the next and one with two entries.
 * with: handasm_text.S */
#include "victim.h"

u64 asm_data_inside(const u64 *v, u64 n, u64 h);
u64 asm_no_cfi(u64 h, u64 n);
u64 asm_table(u64 op, u64 h);
u64 asm_falls(u64 h);
u64 asm_second_entry(u64 h);
u64 asm_into_middle(u64 h, u64 n);
u64 asm_odd_frame(u64 h, u64 n);

static u64 work(u64 seed)
{
    u64 v[256], s = seed, h = seed;
    for (int i = 0; i < 256; i++) v[i] = next(&s);
    for (int i = 0; i < 100; i++) {
        h = asm_data_inside(v, 256, h);
        h = asm_no_cfi(h, 300);
        for (u64 op = 0; op < 64; op++) h = mix(h, asm_table(op & 7, h));
        h = asm_falls(h);
        h = asm_second_entry(h);
        h = asm_into_middle(h, 50);
        h = asm_odd_frame(h, 20);
    }
    return h;
}

VICTIM_MAIN(NULL, work)
