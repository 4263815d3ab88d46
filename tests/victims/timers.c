/* timerfd: expirations are counted by the kernel, so none may be lost or come early, however long a stop lasts. */
#include <sys/timerfd.h>
#include <time.h>
#include "victim.h"

static int fd;

static u64 now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

static NOINLINE u64 polynomial(u64 h)
{
    for (u64 i = 0; i < 6000; i++) h = (h * h + i) % 0x1fffffffffffffffull + (h & 1 ? i : 3);
    return h;
}

static void setup(void)
{
    fd = timerfd_create(CLOCK_MONOTONIC, 0);
    if (fd < 0) victim_fail("timerfd_create", (u64)errno, 0);
}

static u64 work(u64 seed)
{
    const u64 period = 400000;
    struct itimerspec it = {{0, (long)period}, {0, (long)period}};
    u64 h = seed, fired = 0, from = now_ns();
    timerfd_settime(fd, 0, &it, NULL);
    while (fired < 4) {
        u64 n;
        CHECK("read from the timer", read(fd, &n, sizeof n), sizeof n);
        fired += n;
        u64 most = (now_ns() - from) / period;
        if (fired > most) victim_fail("a timer came early", fired, most);
        /* Between the ticks, any number of times: only the last counts. */
        h = polynomial(seed);
    }
    for (int i = 0; i < 4; i++) h = polynomial(h);
    return h;
}

VICTIM_MAIN(setup, work)
