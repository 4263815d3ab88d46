/* Threads asleep in every kind of system call while others work: each must still be asleep, or wake for the right
 * reason, after any number of stops.
 * libs: -pthread */
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/socket.h>
#include <time.h>
#include "victim.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static sem_t sem, done;
static int in[2], sock[2];
static u64 turn, seen, from_pipe, from_sock, from_sem, from_cond;

static void *by_cond(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (turn == seen) pthread_cond_wait(&cond, &lock);
        seen = turn;
        from_cond = mix(turn, 1);
        sem_post(&done);
    }
    return NULL;
}

static void *by_read(void *arg)
{
    (void)arg;
    u64 v;
    for (;;) {
        if (read(in[0], &v, sizeof v) != sizeof v) victim_fail("read", (u64)errno, 0);
        from_pipe = mix(v, 2);
        sem_post(&done);
    }
    return NULL;
}

static void *by_poll(void *arg)
{
    (void)arg;
    u64 v;
    for (;;) {
        struct pollfd p = {sock[0], POLLIN, 0};
        CHECK("poll without end", poll(&p, 1, -1), 1);
        if (recv(sock[0], &v, sizeof v, 0) != sizeof v) victim_fail("recv", (u64)errno, 0);
        from_sock = mix(v, 3);
        sem_post(&done);
    }
    return NULL;
}

static void *by_sem(void *arg)
{
    (void)arg;
    for (;;) {
        while (sem_wait(&sem)) victim_fail("sem_wait", (u64)errno, 0);
        from_sem = mix(turn, 4);
        sem_post(&done);
    }
    return NULL;
}

static void *forever(void *arg)
{
    (void)arg;
    struct timespec t = {1000000, 0};
    nanosleep(&t, NULL);
    victim_fail("a sleep of days has ended", (u64)errno, 0);
}

static void setup(void)
{
    pthread_t t;
    void *(*all[])(void *) = {by_cond, by_read, by_poll, by_sem, forever};
    sem_init(&sem, 0, 0);
    sem_init(&done, 0, 0);
    if (pipe(in) || socketpair(AF_UNIX, SOCK_STREAM, 0, sock)) victim_fail("pipe", (u64)errno, 0);
    /* SIGTERM is for the main thread: it must not end a sleep elsewhere. */
    sigset_t s, old;
    sigfillset(&s);
    pthread_sigmask(SIG_BLOCK, &s, &old);
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) pthread_create(&t, NULL, all[i], NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void send_u64(int fd, u64 v)
{
    if (write(fd, &v, sizeof v) != sizeof v) victim_fail("write", (u64)errno, 0);
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int i = 0; i < 4; i++) {
        for (u64 k = 0; k < 8000; k++) h = k & h & 1 ? mix(h, k) : h + (h << 5);
        pthread_mutex_lock(&lock);
        turn = h;
        pthread_cond_signal(&cond);
        pthread_mutex_unlock(&lock);
        send_u64(in[1], h);
        send_u64(sock[1], h);
        sem_post(&sem);
        for (int k = 0; k < 4; k++)
            while (sem_wait(&done))
                if (errno != EINTR) victim_fail("sem_wait", (u64)errno, 0);
        h = mix(mix(from_cond, from_pipe), mix(from_sock, from_sem));
    }
    return h;
}

VICTIM_MAIN(setup, work)
