/* Executable mappings that are no modules: junk, half an ELF file, an ELF header full of lies, an empty page. They are
 * there the whole time and are no reason to leave the program itself alone. */
#include <elf.h>
#include <sys/mman.h>
#include "victim.h"

static void map(const char *name, const void *bytes, size_t n)
{
    int fd = memfd_create(name, 0);
    if (fd < 0 || write(fd, bytes, n) != (ssize_t)n) victim_fail("memfd", (u64)errno, 0);
    if (mmap(NULL, 8192, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED) victim_fail("mmap", (u64)errno, 0);
    close(fd);
}

static void setup(void)
{
    static unsigned char bytes[6000];
    u64 s = 42;
    for (int i = 0; i < 6000; i++) bytes[i] = (unsigned char)next(&s);
    map("junk", bytes, sizeof bytes);
    map("empty", "", 0);

    Elf64_Ehdr h;
    memset(&h, 0, sizeof h);
    memcpy(h.e_ident, ELFMAG, SELFMAG);
    h.e_ident[EI_CLASS] = ELFCLASS64;
    h.e_ident[EI_DATA] = ELFDATA2LSB;
    h.e_ident[EI_VERSION] = EV_CURRENT;
    h.e_type = ET_DYN;
    h.e_machine = EM_X86_64;
    h.e_ehsize = sizeof h;
    h.e_phentsize = sizeof(Elf64_Phdr);
    h.e_shentsize = sizeof(Elf64_Shdr);
    map("header-only", &h, sizeof h);
    h.e_phoff = 0xfffffffffffffff0ull;
    h.e_phnum = 0xffff;
    h.e_shoff = 0x7fffffffffffffffull;
    h.e_shnum = 0xfffe;
    memcpy(bytes, &h, sizeof h);
    map("lies", bytes, sizeof bytes);

    FILE *self = fopen("/proc/self/exe", "r");
    size_t n = fread(bytes, 1, 3000, self);
    fclose(self);
    map("half", bytes, n);
    if (mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED)
        victim_fail("mmap", (u64)errno, 0);
}

static NOINLINE u64 mangle(u64 h)
{
    for (u64 i = 0; i < 50000; i++) h = h % 3 ? mix(h, i) : h + 5;
    return h;
}

static u64 work(u64 seed) { return mangle(seed); }

VICTIM_MAIN(setup, work)
