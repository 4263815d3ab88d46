// A server: waits for requests in poll, while threads compute and throw, a timer interrupts them all, and a handler
// counts. Each request plays one scenario of throws.cc, which is compiled with it.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdexcept>
#include <string>
#include <sys/time.h>
#include <unistd.h>

extern "C" long run(int scenario, int kind);
extern "C" const char *last_trace();

static std::atomic<bool> stop;
static std::atomic<long> ticks, rounds;
static void on_tick(int) { ticks++; }

__attribute__((noinline)) static long sometimes(long n, int depth) {
    std::string held(depth, 'x');
    if (depth == 0) {
        if (n % 3 == 0) throw std::runtime_error("three");
        if (n % 5 == 0) throw n;
        return n;
    }
    return sometimes(n, depth - 1) + held.size();
}

__attribute__((noinline)) static long round_of(long seed) {
    long sum = 0;
    for (long i = seed; i < seed + 60; i++) {
        try {
            sum += sometimes(i, 5);
        } catch (const std::exception &e) {
            sum += e.what()[0];
        } catch (long n) {
            sum -= n;
        }
    }
    return sum;
}

static void *work(void *) {
    long expected = round_of(1);
    while (!stop) {
        if (round_of(1) != expected) abort();
        rounds++;
    }
    return nullptr;
}

int main(int argc, char **argv) {
    struct sigaction action = {};
    action.sa_handler = on_tick;
    action.sa_flags = SA_RESTART;
    sigaction(SIGALRM, &action, nullptr);
    long every = atol(argv[1]);
    struct itimerval timer = {{0, every}, {0, every}};
    setitimer(ITIMER_REAL, &timer, nullptr);
    pthread_t threads[2];
    for (auto &t : threads) pthread_create(&t, nullptr, work, nullptr);
    char line[64];
    size_t have = 0;
    for (;;) {
        struct pollfd in = {0, POLLIN, 0};
        if (poll(&in, 1, argc > 2 ? 100000 : -1) < 0) continue;
        ssize_t n = read(0, line + have, 1);
        if (n <= 0) break;
        if (line[have] != '\n') {
            have++;
            continue;
        }
        line[have] = 0;
        have = 0;
        int scenario, kind;
        if (sscanf(line, "%d %d", &scenario, &kind) == 2) {
            long result = run(scenario, kind);
            printf("%ld %s\n", result, last_trace());
        } else {
            printf("%ld\n", rounds.load());
        }
        fflush(stdout);
    }
    stop = true;
    for (auto &t : threads) pthread_join(t, nullptr);
    puts("right");
    return 0;
}
