/* Computed goto, the two ways of real programs: a static table of labels indexed by opcode (an interpreter), and label
 * addresses written into the program's own data on the heap, far from the function (postgres's ExecInterpExpr). */
#include "victim.h"

enum { ADD, MUL, XOR, DUP, JNZ, DEC, ROT, END, OPS };

struct step {
    const void *label;
    u64 arg;
};

static const void *labels[OPS];

/* Called with NULL it publishes its labels, as ExecInterpExpr does. */
static NOINLINE u64 direct(const struct step *program, u64 a)
{
    static const void *const mine[OPS] = {&&add, &&mul, &&xor_, &&dup, &&jnz, &&dec, &&rot, &&end};
    const struct step *at = program;
    u64 b = 40;
    if (!program) {
        memcpy(labels, mine, sizeof mine);
        return 0;
    }
#define NEXT goto *(++at)->label
    goto *at->label;
add:
    a += at->arg;
    NEXT;
mul:
    a *= at->arg | 1;
    NEXT;
xor_:
    a ^= b + at->arg;
    NEXT;
dup:
    a = mix(a, b);
    NEXT;
jnz:
    if (b) {
        at = program;
        goto *at->label;
    }
    NEXT;
dec:
    b--;
    NEXT;
rot:
    a = (a << 9) | (a >> 55);
    NEXT;
end:
    return a;
}

/* A table of 32-bit differences between labels: the position-independent spelling of the same. */
static NOINLINE u64 relative(const unsigned char *code, u64 a)
{
    static const int off[4] = {0, &&two - &&one, &&three - &&one, &&four - &&one};
    const unsigned char *pc = code;
    goto *(&&one + off[*pc++ & 3]);
one:
    a += *pc;
    goto *(&&one + off[*pc++ & 3]);
two:
    a = mix(a, *pc);
    goto *(&&one + off[*pc++ & 3]);
three:
    a ^= a >> 3;
    if (*pc == 0xff) return a;
    goto *(&&one + off[*pc++ & 3]);
four:
    if (*pc == 0xff) return ~a;
    a -= 5;
    goto *(&&one + off[*pc++ & 3]);
}

static struct step *program[VICTIM_PERIOD];

static void setup(void) { direct(NULL, 0); }

static u64 work(u64 seed)
{
    u64 s = seed, h = seed, t = ~seed;
    struct step **p = &program[seed % VICTIM_PERIOD];
    if (!*p) {
        int n = 48;
        *p = calloc((size_t)n, sizeof **p);
        for (int i = 0; i < n; i++) {
            static const int some[] = {ADD, MUL, XOR, DUP, ROT};
            (*p)[i].label = labels[i == n - 3 ? DEC : i == n - 2 ? JNZ : i == n - 1 ? END : some[next(&s) % 5]];
            (*p)[i].arg = (u64)i * 3;
        }
    }
    for (int i = 0; i < 8; i++) h = direct(*p, h);
    unsigned char code[4096];
    for (int i = 0; i < 4096; i++) code[i] = (unsigned char)(next(&t) % 255);
    memset(code + 4000, 0xff, 96);
    for (int i = 0; i < 8; i++) h = relative(code, h);
    return h;
}

VICTIM_MAIN(setup, work)
