/* setjmp and longjmp over many frames, and siglongjmp out of a handler: the saved PCs outlive applies and undos. */
#include <setjmp.h>
#include <sys/time.h>
#include "victim.h"

static jmp_buf again;
static sigjmp_buf out;
static volatile sig_atomic_t armed, jumps;

static void on_alarm(int sig)
{
    (void)sig;
    if (armed) {
        armed = 0;
        siglongjmp(out, 7);
    }
}

static NOINLINE u64 dive(u64 n, u64 h)
{
    volatile u64 keep = h;
    if (n == 0) longjmp(again, (int)(h % 1000) + 1);
    u64 r = dive(n - 1, mix(h, n));
    return r + keep;
}

static void setup(void)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = on_alarm;
    sigaction(SIGALRM, &sa, NULL);
    struct itimerval it = {{0, 900}, {0, 900}};
    setitimer(ITIMER_REAL, &it, NULL);
}

/* A loop that only a jump out of the handler ends. What it counts is timing and stays out of the checksum. */
static NOINLINE u64 until_jumped(u64 seed)
{
    volatile u64 spins = 0, s = seed;
    int code = sigsetjmp(out, 1);
    if (code == 0) {
        armed = 1;
        for (;;) {
            u64 x = s;
            next(&x);
            s = x;
            spins++;
        }
    }
    jumps++;
    return (u64)code;
}

static u64 work(u64 seed)
{
    volatile u64 h = seed, i = 0;
    for (i = 0; i < 60; i++) {
        int code = setjmp(again);
        if (code == 0)
            dive(40 + i % 7, h);
        else
            h = mix(h, (u64)code);
    }
    if (seed % 8 == 0 || seed % 8 == 5) h = mix(h, until_jumped(h));
    return h;
}

VICTIM_MAIN(setup, work)
