/* Deep recursion: tens of thousands of frames whose return addresses outlive many applies and undos. */
#include "victim.h"

struct node {
    struct node *left, *right;
    u64 key;
};

static struct node pool[4096];

static NOINLINE struct node *insert(struct node *at, struct node *new)
{
    if (!at) return new;
    if (new->key < at->key)
        at->left = insert(at->left, new);
    else
        at->right = insert(at->right, new);
    return at;
}

static NOINLINE u64 walk(const struct node *n, u64 depth)
{
    if (!n) return depth;
    u64 l = walk(n->left, depth + 1);
    u64 r = walk(n->right, depth + 1);
    return mix(l, r) ^ n->key;
}

/* Never a tail call and never a loop: each frame adds something after its callee has returned. */
static NOINLINE u64 deep(u64 n, u64 seed)
{
    volatile u64 mine = seed ^ n;
    if (n == 0) return seed;
    u64 below = deep(n - 1, mix(seed, n));
    return mix(below, mine);
}

static NOINLINE u64 even(u64 n, u64 h);

static NOINLINE u64 odd(u64 n, u64 h) { return n == 0 ? h : mix(even(n - 1, h * 3), n); }

static NOINLINE u64 even(u64 n, u64 h) { return n == 0 ? ~h : mix(odd(n - 1, h + 7), n); }

static u64 work(u64 seed)
{
    u64 s = seed;
    struct node *root = NULL;
    for (int i = 0; i < 512; i++) {
        pool[i].left = pool[i].right = NULL;
        pool[i].key = next(&s);
        root = insert(root, &pool[i]);
    }
    u64 h = walk(root, 0);
    h = mix(h, deep(20000 + seed % 1000, seed));
    return mix(h, even(5000, seed));
}

VICTIM_MAIN(NULL, work)
