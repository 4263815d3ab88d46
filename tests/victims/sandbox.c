/* A seccomp sandbox: nothing but write, clock_gettime, exit and signal returns; anything else kills. Whoever runs
 * system calls in this process without leave, even mmap, ends it. */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/syscall.h>
#include "victim.h"

#define ALLOW(nr) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (nr), 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

static void enter(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        ALLOW(SYS_write),
        ALLOW(SYS_clock_gettime),
        ALLOW(SYS_clock_nanosleep),
        ALLOW(SYS_restart_syscall),
        ALLOW(SYS_rt_sigreturn),
        ALLOW(SYS_exit),
        ALLOW(SYS_exit_group),
        ALLOW(SYS_getpid),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    /* No allocation inside the sandbox: a first malloc asks for random bytes. */
    static char buffer[4096];
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
    struct sock_fprog prog = {sizeof code / sizeof *code, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) victim_fail("no_new_privs", (u64)errno, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog)) victim_fail("seccomp", (u64)errno, 0);
}

static NOINLINE u64 crc(const unsigned char *p, int n, u32 c)
{
    for (int i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++) c = c & 1 ? (c >> 1) ^ 0xedb88320u : c >> 1;
    }
    return c;
}

static u64 work(u64 seed)
{
    unsigned char b[2048];
    u64 s = seed, h = seed;
    for (int i = 0; i < 2048; i++) b[i] = (unsigned char)next(&s);
    for (int i = 0; i < 20; i++) h = mix(h, crc(b, 2048 - i, (u32)h));
    return h;
}

VICTIM_MAIN(enter, work)
