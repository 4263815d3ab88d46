/* Handlers that change the interrupted PC: one steps over a faulting load, one over ud2, one compares the PC with
 * labels and continues at a recovery label (libjvm's SafeFetch). In a copy, the next instruction must be the next.
 * with: trapskip_text.S */
#include <sys/mman.h>
#include <ucontext.h>
#include "victim.h"

u64 asm_fetch(const void *p, u64 otherwise);
u64 asm_skip_load(const void *p, u64 h);
u64 asm_skip_ud2(u64 h);
extern char asm_fetch_fault[], asm_fetch_recover[];

static void *hole;
static volatile int skip;

static void on_segv(int sig, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)sig;
    if (info->si_addr != hole) victim_fail("a fault elsewhere", (u64)(uintptr_t)info->si_addr, (u64)(uintptr_t)hole);
    if (skip)
        r[REG_RIP] += 3;
    else if (r[REG_RIP] == (greg_t)(uintptr_t)asm_fetch_fault)
        r[REG_RIP] = (greg_t)(uintptr_t)asm_fetch_recover;
    else
        victim_fail("a fault at an unknown PC", (u64)r[REG_RIP], (u64)(uintptr_t)asm_fetch_fault);
}

static void on_ill(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}

static void setup(void)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_flags = SA_SIGINFO;
    sa.sa_sigaction = on_segv;
    sigaction(SIGSEGV, &sa, NULL);
    sa.sa_sigaction = on_ill;
    sigaction(SIGILL, &sa, NULL);
    hole = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (hole == MAP_FAILED) victim_fail("mmap", (u64)errno, 0);
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int i = 0; i < 4000; i++) {
        u64 there = h;
        h = mix(h, asm_fetch(&there, 5));
        if (i % 200 == 0) {
            skip = 0;
            h = mix(h, asm_fetch(hole, 99));
            skip = 1;
            h = mix(h, asm_skip_load(hole, h));
            h = mix(h, asm_skip_ud2(h));
        }
        h = mix(h, asm_skip_load(&there, h));
    }
    return h;
}

VICTIM_MAIN(setup, work)
