/* Interrupted system calls. A signal with a handler and without SA_RESTART ends a call with EINTR; nothing else may.
 * Whoever stops this process must neither invent an EINTR nor swallow one, and sleeps must last as long as they should.
 * libs: -pthread */
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include "victim.h"

static int quiet[2], answered[2];
static volatile sig_atomic_t alarms;

static void on_alarm(int sig)
{
    (void)sig;
    alarms++;
}

/* Restarted: the read underneath must go on and then find this byte. */
static void on_answer(int sig)
{
    (void)sig;
    int saved = errno;
    if (++alarms == 2 && write(answered[1], "x", 1) != 1) abort();
    errno = saved;
}

static void timer(void (*handler)(int), int flags, int usec)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = handler;
    sa.sa_flags = flags;
    sigaction(SIGALRM, &sa, NULL);
    alarms = 0;
    struct itimerval it = {{0, usec}, {0, usec}};
    setitimer(ITIMER_REAL, &it, NULL);
}

static void timer_off(void)
{
    struct itimerval off = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &off, NULL);
}

static u64 now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000 + (u64)t.tv_nsec / 1000;
}

/* The upper bound is generous, for a busy machine; a sleep begun anew at every interruption still passes it. */
static void lasted(const char *what, u64 since, u64 least)
{
    u64 took = now_us() - since;
    if (took + 1 < least || took > least + 3000000) victim_fail(what, took, least);
}

static NOINLINE u64 interrupted(void)
{
    char c;
    timer(on_alarm, 0, 1500);
    ssize_t n = read(quiet[0], &c, 1);
    int e = errno;
    timer_off();
    CHECK("read's result", n, -1);
    CHECK("read's errno", e, EINTR);
    if (alarms == 0) victim_fail("EINTR without a signal", 0, 1);
    return 1;
}

static NOINLINE u64 restarted(void)
{
    char c = 0;
    timer(on_answer, SA_RESTART, 1000);
    ssize_t n = read(answered[0], &c, 1);
    timer_off();
    CHECK("a restarted read", n, 1);
    CHECK("its byte", c, 'x');
    return 2;
}

static NOINLINE u64 sleeps(void)
{
    struct timespec t = {0, 1500000};
    u64 at = now_us();
    CHECK("nanosleep", nanosleep(&t, NULL), 0);
    lasted("nanosleep's time", at, 1500);

    clock_gettime(CLOCK_MONOTONIC, &t);
    at = now_us();
    t.tv_nsec += 1200000;
    if (t.tv_nsec >= 1000000000) t.tv_nsec -= 1000000000, t.tv_sec++;
    CHECK("clock_nanosleep", clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL), 0);
    lasted("clock_nanosleep's time", at, 1199);
    return 3;
}

static NOINLINE u64 waits(void)
{
    struct pollfd p = {quiet[0], POLLIN, 0};
    u64 at = now_us();
    CHECK("poll", poll(&p, 1, 2), 0);
    lasted("poll's time", at, 2000);

    fd_set set;
    FD_ZERO(&set);
    FD_SET(quiet[0], &set);
    struct timeval tv = {0, 1200};
    at = now_us();
    CHECK("select", select(quiet[0] + 1, &set, NULL, NULL, &tv), 0);
    lasted("select's time", at, 1200);

    static int word;
    struct timespec t = {0, 1300000};
    at = now_us();
    CHECK("futex", syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0), -1);
    CHECK("futex's errno", errno, ETIMEDOUT);
    lasted("futex's time", at, 1300);
    return 4;
}

/* An interrupted nanosleep tells what is left, and that is true. */
static NOINLINE u64 remains(void)
{
    struct timespec t = {0, 40000000}, left = {0, 0};
    timer(on_alarm, SA_RESTART, 2000);
    u64 at = now_us();
    int r = nanosleep(&t, &left);
    int e = errno;
    u64 took = now_us() - at;
    timer_off();
    /* On a machine busy beyond measure the timer may come too late; then the sleep is simply over. */
    if (r == 0) return 5;
    CHECK("nanosleep's errno", e, EINTR);
    if (alarms == 0) victim_fail("nanosleep: EINTR without a signal", 0, 1);
    u64 rest = (u64)left.tv_nsec / 1000;
    /* The kernel may count a timer's slack of 50 us as part of what is left. */
    if (rest > 40100 || rest + took < 39900) victim_fail("nanosleep's remainder", rest, 40000 - took);
    return 5;
}

static NOINLINE u64 compute(u64 h)
{
    for (u64 i = 0; i < 60000; i++) h = i % 3 ? mix(h, i) : h * 5 + 1;
    return h;
}

static void setup(void)
{
    if (pipe(quiet) || pipe(answered)) victim_fail("pipe", (u64)errno, 0);
}

static u64 work(u64 seed)
{
    victim_hold_term(1);
    u64 h = compute(seed);
    h = mix(h, interrupted());
    h = mix(h, restarted());
    h = mix(h, sleeps());
    h = mix(h, waits());
    h = mix(h, remains());
    victim_hold_term(0);
    return compute(h);
}

VICTIM_MAIN(setup, work)
