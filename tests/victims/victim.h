/* The protocol that every victim follows.
 *
 *   victim --rounds N     does N rounds and ends
 *   victim --forever      goes on until SIGTERM, stops at a round's end
 *   victim --verify N     prints the checksum that N rounds must give, without doing them
 *
 * A victim prints "ready PID" once it serves and "rounds N checksum X" at its end. The result of a round depends on
 * the round's number modulo VICTIM_PERIOD only, and the first VICTIM_PERIOD rounds are done before "ready": nobody has
 * touched the program by then, so they are the truth that every later round is compared with, and `--verify` has to do
 * no more than those to know the checksum of any number of rounds.
 */
#ifndef VICTIM_H
#define VICTIM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

typedef uint64_t u64;
typedef uint32_t u32;

#define NOINLINE __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline, unused))
#define UNUSED __attribute__((unused))

#define VICTIM_PERIOD 16

struct victim_args {
    u64 rounds;
    int forever;
    int verify;
};

static volatile sig_atomic_t victim_stop;
static u64 victim_expected[VICTIM_PERIOD];
static u64 victim_sum, victim_done;

/* One step of the running checksum: any change in a value or in the order shows. */
INLINE u64 mix(u64 h, u64 v)
{
    h ^= v + 0x9e3779b97f4a7c15ull + (h << 6) + (h >> 2);
    h *= 0xff51afd7ed558ccdull;
    return h ^ (h >> 33);
}

/* A small generator: the same numbers on every machine. */
INLINE u64 next(u64 *state)
{
    u64 x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

INLINE u64 seed_of(u64 round) { return (round % VICTIM_PERIOD + 1) * 0x9e3779b97f4a7c15ull; }

UNUSED static void __attribute__((noreturn, cold)) victim_fail(const char *what, u64 got, u64 want)
{
    fprintf(stderr, "victim: %s: got %#" PRIx64 ", want %#" PRIx64 " (errno %d)\n", what, got, want, errno);
    fflush(stderr);
    abort();
}

#define CHECK(what, got, want)                                                                                         \
    do {                                                                                                               \
        u64 got_ = (u64)(got), want_ = (u64)(want);                                                                    \
        if (__builtin_expect(got_ != want_, 0)) victim_fail(what, got_, want_);                                        \
    } while (0)

static void victim_on_term(int sig)
{
    (void)sig;
    victim_stop = 1;
}

UNUSED static struct victim_args victim_parse(int argc, char **argv)
{
    struct victim_args a = {0, 0, 0};
    if (argc >= 2 && !strcmp(argv[1], "--forever")) {
        a.forever = 1;
        a.rounds = UINT64_MAX;
    } else if (argc >= 3 && (!strcmp(argv[1], "--rounds") || !strcmp(argv[1], "--verify"))) {
        a.rounds = strtoull(argv[2], NULL, 10);
        a.verify = argv[1][2] == 'v';
    } else {
        fprintf(stderr, "usage: %s --rounds N | --forever | --verify N\n", argv[0]);
        exit(2);
    }
    return a;
}

UNUSED static void victim_begin(void)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = victim_on_term;
    sa.sa_flags = SA_RESTART;
    sigaction(SIGTERM, &sa, NULL);
    /* A test that dies must not leave its victims behind, and Yama must let a sibling attach. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#ifdef PR_SET_PTRACER
    prctl(PR_SET_PTRACER, (unsigned long)-1, 0, 0, 0);
#endif
}

/* A round that counts on calls not being interrupted keeps SIGTERM for its end. */
UNUSED static void victim_hold_term(int hold)
{
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGTERM);
    sigprocmask(hold ? SIG_BLOCK : SIG_UNBLOCK, &s, NULL);
}

UNUSED static void victim_ready(void)
{
    printf("ready %d\n", (int)getpid());
    fflush(stdout);
}

/* Files a round's result: checks it against the truth and folds it into the checksum. */
INLINE void victim_file(u64 result)
{
    u64 want = victim_expected[victim_done % VICTIM_PERIOD];
    if (__builtin_expect(result != want, 0)) {
        fprintf(stderr, "victim: round %" PRIu64 ": ", victim_done);
        victim_fail("wrong result", result, want);
    }
    victim_sum = mix(victim_sum, result);
    victim_done++;
}

UNUSED static void victim_report(void)
{
    printf("rounds %" PRIu64 " checksum %016" PRIx64 "\n", victim_done, victim_sum);
    fflush(stdout);
}

UNUSED static void victim_verify(u64 rounds)
{
    for (u64 i = 0; i < rounds; i++) victim_file(victim_expected[i % VICTIM_PERIOD]);
    victim_report();
}

UNUSED static int victim_run(int argc, char **argv, void (*setup)(void), u64 (*round)(u64))
{
    struct victim_args a = victim_parse(argc, argv);
    victim_begin();
    if (setup) setup();
    for (u64 i = 0; i < VICTIM_PERIOD; i++) victim_expected[i] = round(seed_of(i));
    if (a.verify) {
        victim_verify(a.rounds);
        return 0;
    }
    victim_ready();
    while (victim_done < a.rounds && !victim_stop) victim_file(round(seed_of(victim_done)));
    victim_report();
    return 0;
}

#define VICTIM_MAIN(setup, round)                                                                                      \
    int main(int argc, char **argv) { return victim_run(argc, argv, setup, round); }

#endif
