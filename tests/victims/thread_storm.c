/* Threads born and gone all the time: a list of tasks that never stands still while somebody stops them all.
 * libs: -pthread */
#include <pthread.h>
#include "victim.h"

static NOINLINE u64 crunch(u64 x)
{
    u64 h = x;
    for (int i = 0; i < 3000; i++) {
        if (h & 1)
            h = h * 3 + 1;
        else
            h = (h >> 1) ^ 0x5555;
        h = mix(h, i);
    }
    return h;
}

static void *leaf(void *arg) { return (void *)(uintptr_t)crunch((u64)(uintptr_t)arg); }

static void *branch(void *arg)
{
    pthread_t t;
    void *below;
    if (pthread_create(&t, NULL, leaf, (void *)((uintptr_t)arg * 5 + 1))) victim_fail("pthread_create", 0, 0);
    u64 h = crunch((u64)(uintptr_t)arg);
    pthread_join(t, &below);
    return (void *)(uintptr_t)mix(h, (u64)(uintptr_t)below);
}

static u64 work(u64 seed)
{
    pthread_t t[6];
    u64 h = seed;
    for (u64 i = 0; i < 6; i++)
        if (pthread_create(&t[i], NULL, branch, (void *)(uintptr_t)(seed + i))) victim_fail("pthread_create", i, 0);
    for (int i = 0; i < 6; i++) {
        void *r;
        pthread_join(t[i], &r);
        h = mix(h, (u64)(uintptr_t)r);
    }
    return h;
}

VICTIM_MAIN(NULL, work)
