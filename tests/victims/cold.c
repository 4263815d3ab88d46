/* Cold parts: paths that the compiler moved away as unlikely, which are taken now and then all the same, and which
 * jump back into the middle of the hot part. */
#include "victim.h"

static u64 rare, rarer;

__attribute__((cold, noinline)) static u64 repair(u64 h)
{
    rare++;
    return mix(h, 0xdead);
}

static NOINLINE u64 hot(const u64 *v, int n, u64 h)
{
    for (int i = 0; i < n; i++) {
        if (__builtin_expect(v[i] % 61 == 0, 0)) {
            h = repair(h);
            if (__builtin_expect(h % 5 == 0, 0)) {
                rarer++;
                h = mix(h, v[i]);
                i++;
                continue;
            }
            h ^= v[i];
        }
        h = mix(h, v[i]);
        if (__builtin_expect((h & 0x3ff) == 7, 0)) {
            switch (repair(h) % 7) {
            case 0: h += 1; break;
            case 1: h ^= 2; goto skip;
            case 2: h -= 3; break;
            case 3: h *= 5; break;
            case 4: return mix(h, (u64)i);
            case 5: h = ~h; break;
            default: h = repair(h); goto skip;
            }
        }
        h += 3;
    skip:
        h ^= h >> 7;
    }
    return h;
}

/* Labels with attributes: a loop whose unlikely side lies in the cold part and loops there. */
static NOINLINE u64 retry(u64 h)
{
    for (int i = 0; i < 200; i++) {
    again:
        h = mix(h, (u64)i);
        if (h % 29 == 0) goto slow;
        continue;
    slow:
#ifndef __clang__
        __attribute__((cold));
#endif
        h = repair(h);
        while (__builtin_expect(h & 1, 0)) h = repair(h >> 1);
        if (h % 2 == 0) goto again;
    }
    return h;
}

static u64 work(u64 seed)
{
    u64 v[1024], s = seed, h = seed;
    rare = rarer = 0;
    for (int i = 0; i < 1024; i++) v[i] = next(&s);
    for (int i = 0; i < 40; i++) h = hot(v, 1024, h);
    for (int i = 0; i < 8; i++) h = retry(h);
    return mix(mix(h, rare), rarer);
}

VICTIM_MAIN(NULL, work)
