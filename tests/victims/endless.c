/* A loop that never returns: all the work stands in one loop in main, which calls nothing while it works and leaves
 * through _exit only. No function entry is ever passed again, so only a patch inside the loop can catch it. */
#include "victim.h"

int main(int argc, char **argv)
{
    struct victim_args a = victim_parse(argc, argv);
    victim_begin();
    for (u64 i = 0;; i++) {
        u64 s = seed_of(i), h = s;
        u32 t[64];
        for (int k = 0; k < 64; k++) t[k] = (u32)next(&s);
        for (int r = 0; r < 900; r++) {
            for (int k = 1; k < 64; k++) {
                if (t[k] & 4)
                    h = mix(h, t[k]);
                else if (h & 1)
                    t[k] += (u32)h;
                else
                    t[k] ^= t[k - 1] >> 1;
            }
        }
        h = mix(h, t[63]);
        if (i < VICTIM_PERIOD) {
            victim_expected[i] = h;
            if (i + 1 < VICTIM_PERIOD) continue;
            if (a.verify) {
                victim_verify(a.rounds);
                _exit(0);
            }
            victim_ready();
            continue;
        }
        victim_file(h);
        if (victim_stop || victim_done >= a.rounds) {
            victim_report();
            _exit(0);
        }
    }
}
