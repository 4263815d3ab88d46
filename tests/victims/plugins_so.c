/* The plugin of plugins.c. */
#include <stdint.h>

static uint64_t table[256];

__attribute__((constructor)) static void init(void)
{
    for (uint64_t i = 0; i < 256; i++) table[i] = i * 0x9e3779b97f4a7c15ull;
}

__attribute__((noinline)) static uint64_t step(uint64_t h, uint64_t i)
{
    switch (h % 6) {
    case 0: return h + table[i & 255];
    case 1: return h ^ table[(h >> 8) & 255];
    case 2: return h * 3;
    case 3: return h - i;
    case 4: return (h << 3) | (h >> 61);
    default: return ~h;
    }
}

uint64_t plugin_work(uint64_t a, uint64_t b)
{
    for (uint64_t i = 0; i < 200; i++) a = step(a, b + i);
    return a;
}
