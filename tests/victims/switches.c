/* Dense switches: jump tables, several in one function, in loops, nested, with holes and with values out of range. */
#include "victim.h"

static NOINLINE u64 one(u64 op, u64 a)
{
    switch (op) {
    case 0: return a + 1;
    case 1: return a * 3;
    case 2: return a ^ 0x55;
    case 3: return a >> 3;
    case 4: return a - 77;
    case 5: return a << 5;
    case 6: return ~a;
    case 7: return a | 0x1000;
    case 8: return a & ~0xffull;
    case 9: return a / 7;
    case 12: return a % 1001;
    case 13: return mix(a, 13);
    default: return a + op;
    }
}

/* Two tables and a loop: the second switch's index depends on the first one's case. */
static NOINLINE u64 machine(const unsigned char *code, int n, u64 a)
{
    u64 b = 1, c = 2;
    for (int pc = 0; pc < n; pc++) {
        switch (code[pc] & 15) {
        case 0: a += b; break;
        case 1: b ^= a >> 2; break;
        case 2: c = a * 5; break;
        case 3: a = one(c % 16, a); break;
        case 4: b++; /* fall through */
        case 5: a -= c; break;
        case 6: if (a & 1) continue; c++; break;
        case 7: a = (a << 7) | (a >> 57); break;
        case 8: b = c; break;
        case 9: c ^= 0x1234; break;
        case 10: a = mix(a, b); break;
        case 11:
            switch (b % 9) {
            case 0: a += 1; break;
            case 1: a += 20; break;
            case 2: a += 300; break;
            case 3: a ^= 4000; break;
            case 4: a ^= 50000; break;
            case 5: a -= 600000; break;
            case 6: a -= 7; goto out;
            case 7: a *= 11; break;
            default: a = ~a;
            }
            break;
        case 12: b = one(a % 20, b); break;
        case 13: c = one(b % 20, c); break;
        case 14: a ^= c; break;
        default: goto out;
        }
        continue;
    out:
        c = mix(c, a);
    }
    return mix(mix(a, b), c);
}

/* A signed index with a bias, and a table of small values that a compiler turns into a lookup instead. */
static NOINLINE int classify(int ch)
{
    switch (ch) {
    case 'a': case 'e': case 'i': case 'o': case 'u': return 1;
    case 'x': case 'y': case 'z': return 2;
    case '0': case '1': case '2': case '3': return 3;
    case -5: return 4;
    case -4: return 5;
    case -3: return 6;
    case -2: return 7;
    case -1: return 8;
    default: return 0;
    }
}

static NOINLINE u64 sparse(u64 v, u64 h)
{
    switch (v) {
    case 100: h += 3; break;
    case 101: h = mix(h, 9); break;
    case 102: h ^= 1; break;
    case 103: h = one(3, h); break;
    case 104: h -= 8; break;
    case 2000: h = one(5, h); break;
    case 2001: h += 2; break;
    case 2002: h ^= 99; break;
    case 2003: h *= 3; break;
    case 2004: h = ~h; break;
    default: h++;
    }
    return h;
}

static u64 work(u64 seed)
{
    unsigned char code[1024];
    u64 s = seed, h = seed;
    for (int i = 0; i < 1024; i++) code[i] = (unsigned char)(next(&s) >> 11);
    for (int i = 0; i < 12; i++) h = machine(code, 1024, h);
    for (int i = 0; i < 1024; i++) {
        h = mix(h, (u64)classify((int)code[i] - 10));
        h = sparse(code[i] & 1 ? 98u + code[i] % 9 : 1998u + code[i] % 9, h);
    }
    return h;
}

VICTIM_MAIN(NULL, work)
