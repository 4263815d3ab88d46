/* Calls that the kernel ends with EINTR at any stop, not only for a handler (signal(7)): epoll_wait, sigtimedwait,
 * semtimedop. Where nobody attaches, they never fail here; who stops this process has to mend them. */
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <time.h>
#include "victim.h"

static int ep, fds[2], sems = -1;

static u64 now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000 + (u64)t.tv_nsec / 1000;
}

static void lasted(const char *what, u64 since, u64 least)
{
    u64 took = now_us() - since;
    if (took + 1 < least || took > least + 3000000) victim_fail(what, took, least);
}

static void drop(void)
{
    if (sems >= 0) semctl(sems, 0, IPC_RMID);
}

static void setup(void)
{
    ep = epoll_create1(0);
    if (ep < 0 || pipe(fds)) victim_fail("epoll or pipe", (u64)errno, 0);
    struct epoll_event e = {.events = EPOLLIN};
    epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &e);
    sems = semget(IPC_PRIVATE, 1, 0600);
    atexit(drop);
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR1);
    sigprocmask(SIG_BLOCK, &s, NULL);
}

static NOINLINE u64 compute(u64 h)
{
    for (u64 i = 0; i < 60000; i++) h = h & 8 ? mix(h, i) : h * 7 + 3;
    return h;
}

static u64 work(u64 seed)
{
    u64 h = compute(seed);
    victim_hold_term(1);
    u64 at = now_us();
    struct epoll_event e;
    int n = epoll_wait(ep, &e, 1, 3);
    CHECK("epoll_wait", n, 0);
    lasted("epoll_wait's time", at, 3000);

    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR1);
    struct timespec t = {0, 2000000};
    at = now_us();
    n = sigtimedwait(&s, NULL, &t);
    CHECK("sigtimedwait", n, -1);
    CHECK("sigtimedwait's errno", errno, EAGAIN);
    lasted("sigtimedwait's time", at, 2000);

    if (sems >= 0) {
        struct sembuf op = {0, -1, 0};
        t = (struct timespec){0, 2000000};
        at = now_us();
        n = semtimedop(sems, &op, 1, &t);
        CHECK("semtimedop", n, -1);
        CHECK("semtimedop's errno", errno, EAGAIN);
        lasted("semtimedop's time", at, 2000);
    }
    victim_hold_term(0);
    return compute(h);
}

VICTIM_MAIN(setup, work)
