/* ucontext coroutines on stacks from the heap: most return addresses lie on stacks that no thread is running on. */
#include <ucontext.h>
#include "victim.h"

enum { TASKS = 16, STACK = 64 * 1024 };

static ucontext_t scheduler, task[TASKS];
static char *stack[TASKS];
static u64 channel[TASKS];
static int alive[TASKS], current;

static NOINLINE void yield_(void) { swapcontext(&task[current], &scheduler); }

static NOINLINE u64 produce(u64 h, int depth)
{
    if (depth == 0) {
        yield_();
        return h;
    }
    u64 r = produce(mix(h, (u64)depth), depth - 1);
    return mix(r, h);
}

static void body(int id)
{
    u64 h = channel[id];
    for (int i = 0; i < 12; i++) {
        h = produce(h, 3 + id % 5);
        for (int k = 0; k < 30; k++) h = mix(h, (u64)k);
        channel[id] = h;
    }
    alive[id] = 0;
    yield_();
    victim_fail("a finished coroutine was resumed", (u64)id, 0);
}

static void setup(void)
{
    for (int i = 0; i < TASKS; i++) stack[i] = malloc(STACK);
}

static u64 work(u64 seed)
{
    int left = TASKS;
    for (int i = 0; i < TASKS; i++) {
        getcontext(&task[i]);
        task[i].uc_stack.ss_sp = stack[i];
        task[i].uc_stack.ss_size = STACK;
        task[i].uc_link = &scheduler;
        channel[i] = seed + (u64)i;
        alive[i] = 1;
        makecontext(&task[i], (void (*)(void))body, 1, i);
    }
    while (left) {
        for (int i = 0; i < TASKS; i++) {
            if (!alive[i]) continue;
            current = i;
            swapcontext(&scheduler, &task[i]);
            if (!alive[i]) left--;
        }
    }
    u64 h = seed;
    for (int i = 0; i < TASKS; i++) h = mix(h, channel[i]);
    return h;
}

VICTIM_MAIN(setup, work)
