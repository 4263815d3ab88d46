/* A restartable sequence: the kernel restarts it by comparing the PC with the bounds in its descriptor. A copy of it
 * would not be restarted, and counts would be lost. Uses the registration that glibc made.
 * libs: -pthread */
#include <pthread.h>
#include <stddef.h>
#include <sys/rseq.h>
#include "victim.h"

enum { THREADS = 4, STEPS = 6000, CPUS = 1024 };

static _Alignas(64) struct { u64 n; char pad[56]; } counter[CPUS];

static pthread_barrier_t begin, end;

static struct rseq *mine(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

/* counter[cpu]++ without a lock prefix; 0 where it was restarted or the CPU changed. */
static NOINLINE int add_here(struct rseq *rs)
{
    int ok = 0;
    u32 cpu = rs->cpu_id_start;
    u64 *p = &counter[cpu % CPUS].n;
    __asm__ volatile goto(".pushsection __rseq_cs, \"aw\"\n\t"
                          ".balign 32\n\t"
                          "3: .long 0, 0\n\t"
                          ".quad 1f, 2f - 1f, 4f\n\t"
                          ".popsection\n\t"
                          "leaq 3b(%%rip), %%rax\n\t"
                          "movq %%rax, %c[cs](%[rs])\n"
                          "1: cmpl %[cpu], %c[id](%[rs])\n\t"
                          "jnz 4f\n\t"
                          "movq (%[p]), %%rax\n\t"
                          "incq %%rax\n\t"
                          "movq %%rax, (%[p])\n"
                          "2:\n\t"
                          ".pushsection .text.rseq_abort, \"ax\"\n\t"
                          ".byte 0x0f, 0xb9, 0x3d\n\t"
                          ".long 0x53053053\n"
                          "4: jmp %l[aborted]\n\t"
                          ".popsection"
                          :
                          : [rs] "r"(rs), [cpu] "r"(cpu), [p] "r"(p), [cs] "i"(offsetof(struct rseq, rseq_cs)),
                            [id] "i"(offsetof(struct rseq, cpu_id))
                          : "memory", "cc", "rax"
                          : aborted);
    ok = 1;
aborted:
    return ok;
}

static void *worker(void *arg)
{
    (void)arg;
    struct rseq *rs = mine();
    for (;;) {
        pthread_barrier_wait(&begin);
        for (int i = 0; i < STEPS;) i += add_here(rs);
        pthread_barrier_wait(&end);
    }
    return NULL;
}

static void setup(void)
{
    pthread_t t;
    if (__rseq_size == 0) {
        fprintf(stderr, "victim: no rseq registration here\n");
        _exit(77);
    }
    pthread_barrier_init(&begin, NULL, THREADS + 1);
    pthread_barrier_init(&end, NULL, THREADS + 1);
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&t, NULL, worker, NULL)) victim_fail("pthread_create", 0, 1);
}

static u64 work(u64 seed)
{
    u64 sum = 0;
    memset(counter, 0, sizeof counter);
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
    for (int i = 0; i < CPUS; i++) sum += counter[i].n;
    CHECK("the per-CPU counts", sum, THREADS * STEPS);
    return mix(seed, sum);
}

VICTIM_MAIN(setup, work)
