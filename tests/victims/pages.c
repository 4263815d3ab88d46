/* Maps a file and touches the pages of it that it is told, in that order: pages FILE SECONDS PAGE…
 * Its own, not the protocol of victim.h: what is looked at is where it was, not what it computes. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct stat st;
    unsigned sum = 0;
    int fd = open(argv[1], O_RDONLY);
    if (fd < 0 || fstat(fd, &st) < 0) return 2;
    volatile const unsigned char *p = mmap(0, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) return 2;
    for (int i = 3; i < argc; i++) sum += p[4096 * atol(argv[i])];
    printf("sum %u\n", sum);
    fflush(stdout);
    usleep((useconds_t)(1e6 * atof(argv[2])));
    return 0;
}
