/* At SIGUSR1 a child is forked that goes on with the same work for as long as its parent lives, in whatever code it inherits. */
#include "victim.h"

static volatile sig_atomic_t wanted;

static void on_usr1(int sig)
{
    (void)sig;
    wanted = 1;
}

static NOINLINE u64 step(u64 h, u64 n)
{
    for (u64 i = 0; i < n % 50 + 10; i++) h = h & 1 ? mix(h, i) : h + (i << 7);
    return h;
}

static NOINLINE u64 walk(u64 seed)
{
    u64 h = seed;
    for (u64 n = 0; n < 400; n++) h = mix(step(h, n), n);
    return h;
}

static void setup(void)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = on_usr1;
    sa.sa_flags = SA_RESTART;
    sigaction(SIGUSR1, &sa, NULL);
}

static u64 work(u64 seed)
{
    if (wanted) {
        wanted = 0;
        pid_t parent = getpid(), child = fork();
        if (child < 0) victim_fail("fork", (u64)errno, 0);
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            /* Its parent's stdout is not its own. */
            for (volatile u64 sum = seed; getppid() == parent;) sum = walk(sum);
            _exit(0);
        }
    }
    return walk(seed);
}

VICTIM_MAIN(setup, work)
