/* An exec storm: after every 300 rounds the program replaces itself and carries its state in its arguments.
 * One PID, many images: what was done to one image says nothing about the next. */
#include "victim.h"

enum { ROUNDS_PER_IMAGE = 300 };

static NOINLINE u64 matrix(u64 seed)
{
    u64 a[24][24], b[24][24], s = seed, h = 0;
    for (int i = 0; i < 24; i++)
        for (int j = 0; j < 24; j++) a[i][j] = next(&s), b[i][j] = next(&s);
    for (int i = 0; i < 24; i++)
        for (int j = 0; j < 24; j++) {
            u64 sum = 0;
            for (int k = 0; k < 24; k++) sum += a[i][k] * b[k][j];
            h = mix(h, sum);
        }
    return h;
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int i = 0; i < 20; i++) h = mix(h, matrix(seed + (u64)i));
    return h;
}

/* Block SIGTERM across the exec: between two images there is no handler for it. */
static void again(char **argv, u64 rounds)
{
    char done[32], sum[32], left[32];
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    if (victim_stop) return;
    snprintf(done, sizeof done, "%" PRIu64, victim_done);
    snprintf(sum, sizeof sum, "%" PRIu64, victim_sum);
    snprintf(left, sizeof left, "%" PRIu64, rounds);
    char *next_argv[] = {argv[0], (char *)"--carry", left, done, sum, NULL};
    execv("/proc/self/exe", next_argv);
    victim_fail("execv", (u64)errno, 0);
}

int main(int argc, char **argv)
{
    struct victim_args a = {0, 0, 0};
    int carried = argc == 5 && !strcmp(argv[1], "--carry");
    victim_begin();
    if (carried) {
        a.rounds = strtoull(argv[2], NULL, 10);
        victim_done = strtoull(argv[3], NULL, 10);
        victim_sum = strtoull(argv[4], NULL, 10);
    } else {
        a = victim_parse(argc, argv);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (u64 i = 0; i < VICTIM_PERIOD; i++) victim_expected[i] = work(seed_of(i));
    if (a.verify) {
        victim_verify(a.rounds);
        return 0;
    }
    if (!carried) victim_ready();
    u64 here = 0;
    while (victim_done < a.rounds && !victim_stop) {
        if (here++ == ROUNDS_PER_IMAGE) {
            again(argv, a.rounds);
            break;
        }
        victim_file(work(seed_of(victim_done)));
    }
    victim_report();
    return 0;
}
