/* Many threads at work in the same functions at once, meeting at barriers, counting under a lock and with atomics.
 * libs: -pthread */
#include <pthread.h>
#include "victim.h"

enum { THREADS = 8, STEPS = 4 };

static pthread_barrier_t begin, end;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static u64 seed_now, partial[THREADS], locked;
static volatile int quit;
static _Thread_local u64 mine;

static NOINLINE u64 sieve(u64 seed, unsigned n)
{
    unsigned char bits[600] = {0};
    u64 h = seed;
    for (unsigned i = 2; i < n; i++) {
        if (bits[i]) continue;
        h = mix(h, i);
        for (unsigned j = 2 * i; j < n; j += i) bits[j] = 1;
    }
    return h;
}

static NOINLINE void add_locked(u64 v)
{
    pthread_mutex_lock(&lock);
    locked += v;
    pthread_mutex_unlock(&lock);
}

static void *worker(void *arg)
{
    u64 id = (u64)(uintptr_t)arg;
    for (;;) {
        pthread_barrier_wait(&begin);
        if (quit) return NULL;
        mine = mix(seed_now, id);
        for (int i = 0; i < STEPS; i++) {
            mine = sieve(mine, 500 + i * 20);
            add_locked(mine);
        }
        __atomic_store_n(&partial[id], mine, __ATOMIC_RELEASE);
        pthread_barrier_wait(&end);
    }
}

static void setup(void)
{
    pthread_barrier_init(&begin, NULL, THREADS + 1);
    pthread_barrier_init(&end, NULL, THREADS + 1);
    for (u64 i = 0; i < THREADS; i++) {
        pthread_t t;
        if (pthread_create(&t, NULL, worker, (void *)(uintptr_t)i)) victim_fail("pthread_create", i, 0);
    }
}

static u64 work(u64 seed)
{
    seed_now = seed;
    locked = 0;
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
    u64 h = locked;
    for (int i = 0; i < THREADS; i++) h = mix(h, partial[i]);
    return h;
}

VICTIM_MAIN(setup, work)
