/* Function pointers: tables, callbacks, qsort, and pointers kept over rounds and compared with each other. */
#include "victim.h"

typedef u64 (*op)(u64, u64);

static u64 op_add(u64 a, u64 b) { return a + b; }
static u64 op_xor(u64 a, u64 b) { return a ^ (b << 1); }
static u64 op_mul(u64 a, u64 b) { return a * (b | 1); }
static u64 op_rot(u64 a, u64 b) { return (a << (b & 31)) | (a >> (64 - (b & 31)) % 64); }
static u64 op_mix(u64 a, u64 b) { return mix(a, b); }

static op const table[5] = {op_add, op_xor, op_mul, op_rot, op_mix};
static op volatile kept[64];

struct object {
    const struct class *class;
    u64 value;
};

struct class {
    u64 (*get)(const struct object *);
    void (*put)(struct object *, u64);
};

static u64 plain_get(const struct object *o) { return o->value; }
static void plain_put(struct object *o, u64 v) { o->value = v; }
static u64 odd_get(const struct object *o) { return o->value | 1; }
static void odd_put(struct object *o, u64 v) { o->value ^= v; }

static const struct class plain = {plain_get, plain_put}, odd = {odd_get, odd_put};

static NOINLINE int compare(const void *a, const void *b)
{
    u64 x = *(const u64 *)a, y = *(const u64 *)b;
    return x < y ? -1 : x > y;
}

static NOINLINE u64 each(const u64 *v, int n, op f, u64 h)
{
    for (int i = 0; i < n; i++) h = f(h, v[i]);
    return h;
}

static u64 work(u64 seed)
{
    u64 v[256], s = seed, h = seed;
    struct object o[16];
    for (int i = 0; i < 256; i++) v[i] = next(&s);
    for (int i = 0; i < 16; i++) o[i] = (struct object){i % 3 ? &plain : &odd, v[i]};
    for (int i = 0; i < 64; i++) kept[i] = table[v[i] % 5];
    for (int r = 0; r < 20; r++)
        for (int i = 0; i < 5; i++) h = each(v, 256, table[i], h);
    for (int i = 0; i < 2000; i++) {
        struct object *x = &o[h % 16];
        x->class->put(x, h);
        h = mix(h, x->class->get(x));
        h = kept[i % 64](h, v[i % 256]);
        /* A function has one address, whatever was done to its code. */
        for (int k = 0; k < 5; k++)
            if (kept[i % 64] == table[k]) h += (u64)k;
    }
    qsort(v, 256, sizeof *v, compare);
    return each(v, 256, op_mix, h);
}

VICTIM_MAIN(NULL, work)
