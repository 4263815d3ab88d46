/* vfork and posix_spawn: a child that runs in its parent's memory while the parent's thread sleeps in the kernel,
 * where no debugger can stop it before the child execs or exits. */
#include <spawn.h>
#include <sys/wait.h>
#include "victim.h"

extern char **environ;

static NOINLINE u64 collatz(u64 from)
{
    u64 h = from;
    for (u64 i = from & 0xff; i < (from & 0xff) + 60; i++) {
        u64 n = i + 1, steps = 0;
        while (n != 1) {
            n = n & 1 ? 3 * n + 1 : n / 2;
            steps++;
        }
        h = mix(h, steps);
    }
    return h;
}

static int wait_for(pid_t p)
{
    int status;
    while (waitpid(p, &status, 0) < 0)
        if (errno != EINTR) victim_fail("waitpid", (u64)errno, 0);
    if (!WIFEXITED(status)) victim_fail("a child's end", (u64)status, 0);
    return WEXITSTATUS(status);
}

/* The child writes into the parent's memory: that is what vfork means. */
static NOINLINE u64 by_vfork(u64 seed)
{
    volatile u64 shared = 0;
    pid_t p = vfork();
    if (p < 0) victim_fail("vfork", (u64)errno, 0);
    if (p == 0) {
        shared = collatz(seed);
        _exit((int)(seed & 63));
    }
    CHECK("vfork's exit status", wait_for(p), seed & 63);
    return shared;
}

static NOINLINE u64 by_vfork_exec(u64 seed)
{
    pid_t p = vfork();
    if (p < 0) victim_fail("vfork", (u64)errno, 0);
    if (p == 0) {
        execl("/bin/true", "true", (char *)NULL);
        _exit(99);
    }
    CHECK("true's exit status", wait_for(p), 0);
    return collatz(seed);
}

static NOINLINE u64 by_spawn(u64 seed)
{
    pid_t p;
    char code[32];
    snprintf(code, sizeof code, "exit %d", (int)(seed & 31));
    char *argv[] = {(char *)"sh", (char *)"-c", code, NULL};
    int e = posix_spawn(&p, "/bin/sh", NULL, NULL, argv, environ);
    if (e) victim_fail("posix_spawn", (u64)e, 0);
    u64 h = collatz(seed);
    return mix(h, (u64)wait_for(p));
}

static u64 work(u64 seed)
{
    u64 h = mix(by_vfork(seed), collatz(seed));
    for (u64 i = 0; i < 6; i++) h = mix(h, by_vfork(h + i));
    if (seed % 4 == 0) h = mix(h, by_spawn(seed));
    if (seed % 4 == 2) h = mix(h, by_vfork_exec(seed));
    for (u64 i = 0; i < 40; i++) h = mix(h, collatz(h));
    return h;
}

VICTIM_MAIN(NULL, work)
