/* Signals: handlers on an alternate stack, from a timer at any instruction, nested three deep, with the work going on
 * beneath. What a handler computes must not leak into what it interrupted, nor the reverse. */
#include <sys/time.h>
#include <time.h>
#include "victim.h"

static char altstack[64 * 1024];
static volatile u64 ticks, nested, raised;
static volatile u64 handler_sum;
static u64 handler_truth;

static NOINLINE u64 handler_work(u64 seed)
{
    u64 h = seed;
    double d = 1.0;
    for (int i = 1; i < 60; i++) {
        d += 1.0 / i;
        h = mix(h, (u64)(d * 1e6));
    }
    return h;
}

static void on_usr2(int sig, siginfo_t *info, void *uc)
{
    (void)sig, (void)info, (void)uc;
    nested++;
    handler_sum = handler_work(3);
}

static void on_usr1(int sig, siginfo_t *info, void *uc)
{
    (void)sig, (void)info, (void)uc;
    char here;
    if (&here < altstack || &here >= altstack + sizeof altstack) victim_fail("not on the alternate stack", 1, 0);
    raised++;
    raise(SIGUSR2);
    handler_sum = handler_work(3);
}

static void on_alarm(int sig, siginfo_t *info, void *uc)
{
    (void)sig, (void)info, (void)uc;
    u64 before = raised;
    ticks++;
    /* Nested: raised here, delivered before raise() returns. */
    raise(SIGUSR1);
    if (raised != before + 1) victim_fail("a nested signal was lost", raised, before + 1);
    if (handler_work(3) != handler_truth || handler_sum != handler_truth)
        victim_fail("a handler's result", handler_sum, handler_truth);
}

static void on(int sig, void (*f)(int, siginfo_t *, void *), int flags)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_sigaction = f;
    sa.sa_flags = SA_SIGINFO | flags;
    /* The timer's handler counts on its own SIGUSR1 coming at once: it must not find one half handled. */
    if (sig == SIGUSR1) sigaddset(&sa.sa_mask, SIGALRM);
    sigaction(sig, &sa, NULL);
}

static void setup(void)
{
    stack_t ss;
    memset(&ss, 0, sizeof ss);
    ss.ss_sp = altstack;
    ss.ss_size = sizeof altstack;
    if (sigaltstack(&ss, NULL)) victim_fail("sigaltstack", (u64)errno, 0);
    handler_truth = handler_work(3);
    on(SIGALRM, on_alarm, SA_RESTART | SA_ONSTACK);
    on(SIGUSR1, on_usr1, SA_RESTART | SA_ONSTACK);
    on(SIGUSR2, on_usr2, SA_RESTART);
    struct itimerval it = {{0, 700}, {0, 700}};
    setitimer(ITIMER_REAL, &it, NULL);
}

static NOINLINE u64 gcd(u64 a, u64 b)
{
    while (b) {
        u64 t = a % b;
        a = b;
        b = t;
    }
    return a;
}

static u64 work(u64 seed)
{
    u64 h = seed, s = seed, was = raised;
    double f = 0.5;
    for (int i = 0; i < 800; i++) {
        h = mix(h, gcd(next(&s) | 1, next(&s) | 1));
        f = f * 3.7 * (1.0 - f);
        h = mix(h, (u64)(f * 1e9));
    }
    raise(SIGUSR1);
    /* The timer raises too, between any two instructions: what was raised by now must have nested by later. */
    u64 now = raised;
    if (now <= was || nested < now) victim_fail("signals lost", nested, now);
    return h;
}

VICTIM_MAIN(setup, work)
