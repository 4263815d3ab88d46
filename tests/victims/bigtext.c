/* A program with megabytes of text, its hot code somewhere in the middle: threads that run there, children that are forked
 * there, signals that arrive there, a pointer to a function there, and constants there that are read as data.
 * with: bigtext_text.S
 * libs: -pthread */
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include "victim.h"

u64 far_away(u64 h);
extern const unsigned char constants_in_text[64];

static volatile sig_atomic_t signals;

static void on_signal(int sig)
{
    (void)sig;
    signals++;
}

static NOINLINE u64 spin(u64 h, u64 n)
{
    for (u64 i = 0; i < n; i++) {
        switch (h & 7) {
        case 0: h = mix(h, i); break;
        case 1: h = h * 5 + 1; break;
        case 2: h ^= h >> 7; break;
        case 3: h += far_away(h); break;
        case 4: h = (h << 3) | (h >> 61); break;
        case 5: h -= i; break;
        case 6: h = ~h; break;
        default: h = mix(i, h); break;
        }
    }
    return h;
}

static void *thread(void *argument)
{
    u64 *h = argument;
    *h = spin(*h, 20000);
    return NULL;
}

static NOINLINE u64 constants(u64 h)
{
    for (int i = 0; i < 64; i++) h = h * 31 + constants_in_text[i];
    return h;
}

static void setup(void)
{
    signal(SIGUSR2, on_signal);
}

static u64 work(u64 seed)
{
    u64 (*volatile pointer)(u64, u64) = spin;
    u64 h = pointer(seed, 30000), other[2] = {seed, h};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, thread, &other[i]);
    h = spin(h, 10000);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL), h = mix(h, other[i]);
    int before = signals;
    raise(SIGUSR2);
    CHECK("a signal", signals, before + 1);
    pid_t child = fork();
    if (child == 0) _exit((int)(spin(h, 1000) & 63));
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    CHECK("a child ends by itself", WIFEXITED(status), 1);
    return mix(constants(h), (u64)WEXITSTATUS(status));
}

VICTIM_MAIN(setup, work)
