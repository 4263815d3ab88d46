/* pthread_cancel and pthread_exit: forced unwinding through hot frames, whose cleanups must all run, in order.
 * flags: -fexceptions
 * libs: -pthread */
#include <pthread.h>
#include "victim.h"

struct job {
    u64 seed, order, cleanups;
    int fds[2];
    int how;
};

static NOINLINE u64 spin(u64 h)
{
    for (u64 i = 0; i < 4000; i++) h = h & 2 ? mix(h, i) : h + i * 3;
    return h;
}

static void cleanup(void *arg)
{
    struct job *j = arg;
    j->cleanups++;
    j->order = mix(j->order, j->cleanups);
}

static void by_attribute(struct job **j) { cleanup(*j); }

static NOINLINE void nested(struct job *j, int depth)
{
    struct job *guard __attribute__((cleanup(by_attribute))) = j;
    pthread_cleanup_push(cleanup, j);
    if (depth) {
        nested(j, depth - 1);
    } else {
        j->order = spin(j->seed);
        if (j->how == 0) pthread_exit(j);
        char c;
        /* Cancelled here, asleep, or at the test below. */
        if (j->how == 1 && read(j->fds[0], &c, 1) != 1) victim_fail("read", (u64)errno, 0);
        for (;;) {
            spin(j->seed);
            pthread_testcancel();
        }
    }
    pthread_cleanup_pop(0);
    (void)guard;
}

static void *body(void *arg)
{
    struct job *j = arg;
    nested(j, 6);
    return NULL;
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int how = 0; how < 3; how++) {
        struct job j = {seed + (u64)how, 0, 0, {-1, -1}, how};
        pthread_t t;
        void *end;
        if (pipe(j.fds)) victim_fail("pipe", (u64)errno, 0);
        if (pthread_create(&t, NULL, body, &j)) victim_fail("pthread_create", 0, 1);
        h = mix(h, spin(h));
        if (how) {
            /* Only once the work is done: what the thread had computed by then would be timing. */
            while (!__atomic_load_n(&j.order, __ATOMIC_ACQUIRE)) usleep(50);
            pthread_cancel(t);
        }
        pthread_join(t, &end);
        CHECK("how the thread ended", end == (how ? PTHREAD_CANCELED : (void *)&j), 1);
        CHECK("cleanups", j.cleanups, 14);
        h = mix(h, j.order);
        close(j.fds[0]);
        close(j.fds[1]);
    }
    return h;
}

VICTIM_MAIN(NULL, work)
