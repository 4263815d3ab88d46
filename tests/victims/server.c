/* A server that sleeps in epoll_wait and a client thread that asks it now and then: idle most of the time.
 * libs: -pthread */
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include "victim.h"

enum { CONNECTIONS = 4 };

struct request {
    u64 op, arg[6];
};

static int fds[CONNECTIONS][2];

static NOINLINE u64 answer(const struct request *r)
{
    u64 h = r->op;
    for (int n = 0; n < 300; n++) {
        switch ((h ^ (u64)n) % 6) {
        case 0: h += r->arg[n % 6]; break;
        case 1: h = mix(h, r->arg[(n + 1) % 6]); break;
        case 2: h ^= r->arg[(n + 2) % 6] >> 3; break;
        case 3: h *= 11; break;
        case 4: h = ~h; break;
        default: h -= (u64)n;
        }
    }
    return h;
}

static void *serve(void *arg)
{
    (void)arg;
    int ep = epoll_create1(0);
    for (int i = 0; i < CONNECTIONS; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fds[i][0]};
        epoll_ctl(ep, EPOLL_CTL_ADD, fds[i][0], &e);
    }
    for (;;) {
        struct epoll_event e[CONNECTIONS];
        int n = epoll_wait(ep, e, CONNECTIONS, -1);
        /* As every server does: an EINTR here is nothing special. */
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) victim_fail("epoll_wait without end", (u64)n, 1);
        for (int i = 0; i < n; i++) {
            struct request r;
            if (recv(e[i].data.fd, &r, sizeof r, MSG_WAITALL) != sizeof r) victim_fail("recv", (u64)errno, 0);
            u64 h = answer(&r);
            if (send(e[i].data.fd, &h, sizeof h, 0) != sizeof h) victim_fail("send", (u64)errno, 0);
        }
    }
    return NULL;
}

static void setup(void)
{
    pthread_t t;
    for (int i = 0; i < CONNECTIONS; i++)
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds[i])) victim_fail("socketpair", (u64)errno, 0);
    sigset_t s, old;
    sigfillset(&s);
    pthread_sigmask(SIG_BLOCK, &s, &old);
    if (pthread_create(&t, NULL, serve, NULL)) victim_fail("pthread_create", 0, 1);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int k = 0; k < 40; k++) {
        for (int i = 0; i < CONNECTIONS; i++) {
            struct request r = {h % 5, {h, h >> 1, (u64)k, (u64)i, ~h, 77}};
            if (send(fds[i][1], &r, sizeof r, 0) != sizeof r) victim_fail("send", (u64)errno, 0);
        }
        for (int i = 0; i < CONNECTIONS; i++) {
            u64 v;
            if (recv(fds[i][1], &v, sizeof v, MSG_WAITALL) != sizeof v) victim_fail("recv", (u64)errno, 0);
            h = mix(h, v);
        }
    }
    usleep(500);
    return h;
}

VICTIM_MAIN(setup, work)
