/* A fork storm: children inherit whatever stands in the text, do hot work and hand the result back through a pipe. */
#include <sys/wait.h>
#include "victim.h"

enum { CHILDREN = 4 };

static NOINLINE u64 bubble(u64 seed)
{
    u32 a[160];
    u64 s = seed, h = 0;
    for (int i = 0; i < 160; i++) a[i] = (u32)next(&s);
    for (int i = 0; i < 160; i++)
        for (int j = 0; j + 1 < 160 - i; j++)
            if (a[j] > a[j + 1]) {
                u32 t = a[j];
                a[j] = a[j + 1];
                a[j + 1] = t;
            }
    for (int i = 0; i < 160; i++) h = mix(h, a[i]);
    return h;
}

static NOINLINE void child(int fd, u64 seed, int depth)
{
    u64 h = bubble(seed);
    if (depth > 0) {
        /* A grandchild, so that the group is a tree and not a list. */
        pid_t p = fork();
        if (p < 0) victim_fail("fork", errno, 0);
        if (p == 0) _exit((int)(bubble(seed + 1) & 0x7f));
        int status;
        while (waitpid(p, &status, 0) < 0)
            if (errno != EINTR) victim_fail("waitpid", errno, 0);
        if (!WIFEXITED(status)) victim_fail("grandchild", (u64)status, 0);
        h = mix(h, (u64)WEXITSTATUS(status));
    }
    if (write(fd, &h, sizeof h) != sizeof h) _exit(3);
    _exit(0);
}

static u64 work(u64 seed)
{
    u64 h = seed;
    int fds[CHILDREN];
    pid_t pids[CHILDREN];
    for (int i = 0; i < CHILDREN; i++) {
        int p[2];
        if (pipe(p)) victim_fail("pipe", errno, 0);
        pids[i] = fork();
        if (pids[i] < 0) victim_fail("fork", errno, 0);
        if (pids[i] == 0) {
            close(p[0]);
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            child(p[1], seed + (u64)i, i & 1);
        }
        close(p[1]);
        fds[i] = p[0];
    }
    h = mix(h, bubble(seed));
    for (int i = 0; i < CHILDREN; i++) {
        u64 v;
        int status;
        CHECK("bytes from a child", read(fds[i], &v, sizeof v), sizeof v);
        close(fds[i]);
        CHECK("the child", waitpid(pids[i], &status, 0), pids[i]);
        CHECK("its status", status, 0);
        h = mix(h, v);
    }
    return h;
}

VICTIM_MAIN(NULL, work)
