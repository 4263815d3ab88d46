/* A call that is left half-way for as long as somebody wants: SIGUSR1 makes a call of the function that does all the work
 * and switches away from the middle of it, SIGUSR2 goes back and lets it return. In between, return addresses into that
 * function lie on a stack that nobody runs on, and a program counter in a saved context. */
#include <sys/mman.h>
#include <ucontext.h>
#include "victim.h"

enum { STACK = 256 * 1024, HELD = 3 };

static ucontext_t here, there;
static volatile sig_atomic_t wanted, unwanted;
static char *stack;
static int armed;
static u64 held_result;

static NOINLINE u64 visit(u64 h)
{
    if (__builtin_expect(armed, 0)) {
        armed = 0;
        swapcontext(&there, &here);
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
    if (sig == SIGUSR1)
        wanted = 1;
    else
        unwanted = 1;
}

static void say(const char *what)
{
    puts(what);
    fflush(stdout);
}

static NOINLINE void hold(void)
{
    stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK("a stack", stack == MAP_FAILED, 0);
    getcontext(&there);
    there.uc_stack.ss_sp = stack;
    there.uc_stack.ss_size = STACK;
    there.uc_link = &here;
    makecontext(&there, body, 0);
    armed = 1;
    swapcontext(&here, &there);
    CHECK("it was left half-way", armed, 0);
    say("held");
}

/* Nothing of it is left behind: what the stack and the context held would look like references for ever. */
static NOINLINE void let_go(u64 expected)
{
    swapcontext(&here, &there);
    CHECK("the call that was held", held_result, expected);
    munmap(stack, STACK);
    stack = NULL;
    memset(&here, 0, sizeof here);
    memset(&there, 0, sizeof there);
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
}

static u64 work(u64 seed)
{
    static u64 expected;
    u64 h = hot(seed);
    if (seed == seed_of(HELD)) expected = h;
    if (wanted && !stack) {
        wanted = 0;
        hold();
    }
    if (unwanted && stack) {
        unwanted = 0;
        let_go(expected);
    }
    return h;
}

VICTIM_MAIN(setup, work)
