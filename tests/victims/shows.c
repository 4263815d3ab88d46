/* Shows what a program is given at its start: arguments, environment, descriptors, dispositions, IDs, limits.
 * Its own, not the protocol of victim.h. */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

static void show_lines(const char *path, const char *const *names)
{
    char line[512];
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        for (const char *const *n = names; *n; n++)
            if (!strncmp(line, *n, strlen(*n))) printf("%s", line);
    if (f) fclose(f);
}

int main(int argc, char **argv)
{
    static const char *const status[] = {"Umask:", "Uid:", "Gid:", "Groups:", "Threads:", "TracerPid:", "SigPnd:", "ShdPnd:",
                                         "SigBlk:", "SigIgn:", "SigCgt:", "CapInh:", "CapPrm:", "CapEff:", "NoNewPrivs:",
                                         "Cpus_allowed_list:", 0};
    char cwd[4096];
    FILE *out = stdout;
    for (int i = 0; i < argc; i++) printf("argv[%d] %s\n", i, argv[i]);
    for (char **e = environ; *e; e++) printf("env %s\n", *e);
    for (int fd = 0; fd < 64; fd++) {
        struct stat st;
        if (!fstat(fd, &st)) printf("fd %d mode %o flags %x\n", fd, st.st_mode, fcntl(fd, F_GETFL));
    }
    printf("cwd %s\n", getcwd(cwd, sizeof cwd));
    printf("group %d session %d parent %d\n", getpgrp() == getpid(), getsid(0) == getpid(), getppid());
    show_lines("/proc/self/status", status);
    for (int r = 0; r < RLIM_NLIMITS; r++) {
        struct rlimit l;
        getrlimit(r, &l);
        printf("limit %d %llx %llx\n", r, (unsigned long long)l.rlim_cur, (unsigned long long)l.rlim_max);
    }
    extern void _start(void);
    printf("entry %d\n", getauxval(AT_ENTRY) == (unsigned long)_start);
    fflush(out);
    if (argc > 2 && !strcmp(argv[1], "--exit")) return atoi(argv[2]);
    if (argc > 2 && !strcmp(argv[1], "--die")) raise(atoi(argv[2]));
    return 0;
}
