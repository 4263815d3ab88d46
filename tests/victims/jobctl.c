/* Job control: a parent that stops and continues its child and sees it so with waitpid. Stops by somebody else's
 * ptrace must neither show here nor swallow one of these. */
#include <sys/wait.h>
#include "victim.h"

static pid_t child;
static int ask[2], tell[2];

static NOINLINE u64 mangle(u64 h)
{
    for (u64 i = 0; i < 12000; i++) {
        h = mix(h, i);
        if (h % 7 == 3) h = ~h;
    }
    return h;
}

static void end_child(void) { kill(child, SIGKILL); }

static void setup(void)
{
    if (pipe(ask) || pipe(tell)) victim_fail("pipe", (u64)errno, 0);
    child = fork();
    if (child < 0) victim_fail("fork", (u64)errno, 0);
    if (child == 0) {
        u64 v;
        signal(SIGTERM, SIG_DFL);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (read(ask[0], &v, sizeof v) == sizeof v) {
            v = mangle(v);
            if (write(tell[1], &v, sizeof v) != sizeof v) _exit(1);
        }
        _exit(0);
    }
    atexit(end_child);
}

static void expect(const char *what, int options, int (*is)(int))
{
    int status = 0;
    pid_t p;
    while ((p = waitpid(child, &status, options)) < 0 && errno == EINTR) {
    }
    CHECK("waitpid", p, child);
    if (!is(status)) victim_fail(what, (u64)status, 0);
}

static int is_stopped(int s) { return WIFSTOPPED(s) && WSTOPSIG(s) == SIGSTOP; }
static int is_continued(int s) { return WIFCONTINUED(s); }

static u64 work(u64 seed)
{
    u64 v = seed, h;
    if (write(ask[1], &v, sizeof v) != sizeof v) victim_fail("write", (u64)errno, 0);
    if (seed & 2) {
        kill(child, SIGSTOP);
        expect("not stopped by SIGSTOP", WUNTRACED, is_stopped);
        h = mangle(seed + 1);
        kill(child, SIGCONT);
        expect("not continued", WCONTINUED, is_continued);
    } else {
        h = mangle(seed + 1);
    }
    CHECK("the child's answer", read(tell[0], &v, sizeof v), sizeof v);
    return mix(h, v);
}

VICTIM_MAIN(setup, work)
