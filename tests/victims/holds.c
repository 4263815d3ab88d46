/* A call that is left half-way for as long as somebody wants: SIGUSR1 makes a call of the function that does all the work
 * and switches away from the middle of it, SIGUSR2 goes back and lets it return. In between, return addresses into that
 * function lie on a stack that nobody runs on, and a program counter in a saved context.
 *
 * With HOARD=MB in the environment the program has so much memory, all of it in use. One more SIGUSR1 hides what was left
 * half-way in there, in a form in which nobody can know it, until SIGHUP undoes that. (Code that is freed while it is hidden is
 * gone for good.) */
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include "victim.h"

enum { STACK = 16 * 1024, HELD = 3 };

/* What is left half-way, in one piece. */
struct half_way {
    ucontext_t context;
    char stack[STACK];
};

static ucontext_t here;
static jmp_buf top;
static volatile sig_atomic_t wanted, unwanted, disclosed;
static struct half_way *there;
static char *hoard, *hidden;
static size_t hoard_len;
static int armed, done_with;
static u64 held_result;

static NOINLINE u64 visit(u64 h)
{
    if (__builtin_expect(armed, 0)) {
        armed = 0;
        swapcontext(&there->context, &here);
    }
    return mix(h, 1);
}

static NOINLINE u64 hot(u64 seed)
{
    u64 h = seed;
    for (u64 i = 0; i < 400; i++) {
        switch ((h >> 7) & 7) {
        case 0: h = mix(h, i); break;
        case 1: h += i * 3; break;
        case 2: h ^= h >> 11; break;
        case 3: h = visit(h); break;
        case 4: h -= 77; break;
        case 5: h = mix(h, 5); break;
        case 6: h = ~h; break;
        default: h = mix(h, h >> 3); break;
        }
        h = mix(h, i);
        if (i % 40 == 20) h = visit(h);
    }
    return h;
}

static void body(void) { held_result = hot(seed_of(HELD)); }

static void on_wish(int sig)
{
    switch (sig) {
    case SIGUSR1: wanted = 1; break;
    case SIGUSR2: unwanted = 1; break;
    default: disclosed = 1;
    }
}

static void say(const char *what)
{
    puts(what);
    fflush(stdout);
}

static NOINLINE void turn_round(void *to, const void *from)
{
    for (size_t i = 0; i < sizeof *there; i++) ((char *)to)[i] = ~((const char *)from)[i];
}

static NOINLINE void hide(void)
{
    static u64 state = 88172645463325252ull;
    hidden = hoard + next(&state) % (hoard_len - sizeof *there);
    turn_round(hidden, there);
    explicit_bzero(there, sizeof *there);
    say("hidden");
}

static NOINLINE void disclose(void)
{
    turn_round(there, hidden);
    explicit_bzero(hidden, sizeof *there);
    hidden = NULL;
    say("disclosed");
}

static NOINLINE void hold(void)
{
    there = mmap(NULL, sizeof *there, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK("a stack", there == MAP_FAILED, 0);
    getcontext(&there->context);
    there->context.uc_stack.ss_sp = there->stack;
    there->context.uc_stack.ss_size = STACK;
    there->context.uc_link = &here;
    makecontext(&there->context, body, 0);
    armed = 1;
    swapcontext(&here, &there->context);
    CHECK("it was left half-way", armed, 0);
    say("held");
}

/* The frames of signals lay here, with program counters in them. */
static NOINLINE void wipe_stack(void)
{
    char below[16 * 1024];
    explicit_bzero(below, sizeof below);
}

/* Nothing of it is left behind: what the stacks and the context held would look like references for ever. */
static NOINLINE void let_go(u64 expected)
{
    swapcontext(&here, &there->context);
    CHECK("the call that was held", held_result, expected);
    munmap(there, sizeof *there);
    there = NULL;
    memset(&here, 0, sizeof here);
    say("let go");
}

static void setup(void)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = on_wish;
    sa.sa_flags = SA_RESTART;
    sigaction(SIGUSR1, &sa, NULL);
    sigaction(SIGUSR2, &sa, NULL);
    sigaction(SIGHUP, &sa, NULL);
    if (getenv("HOARD")) {
        hoard_len = strtoull(getenv("HOARD"), NULL, 10) << 20;
        hoard = mmap(NULL, hoard_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK("a hoard", hoard == MAP_FAILED, 0);
        for (size_t i = 0; i < hoard_len; i += 4096) hoard[i] = 1;
    }
}

static u64 work(u64 seed)
{
    static u64 expected;
    if (done_with) longjmp(top, 1);
    u64 h = hot(seed);
    if (seed == seed_of(HELD)) expected = h;
    if (wanted) {
        wanted = 0;
        there ? hide() : hold();
    }
    if (disclosed && hidden) {
        disclosed = 0;
        disclose();
    }
    if (unwanted && there) {
        unwanted = 0;
        let_go(expected);
        wipe_stack();
        done_with = 1;
    }
    return h;
}

/* The main loop may run in a copy by now, which it would never leave: it begins anew where nobody had been yet. */
int main(int argc, char **argv)
{
    if (!setjmp(top)) return victim_run(argc, argv, setup, work);
    done_with = 0;
    while (!victim_stop) victim_file(work(seed_of(victim_done)));
    victim_report();
    return 0;
}
