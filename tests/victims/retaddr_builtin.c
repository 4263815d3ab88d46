/* Functions that look at who called them: __builtin_return_address compared with the program's bounds and with dladdr.
 * libs: -ldl */
#include <dlfcn.h>
#include "victim.h"

extern char __executable_start[], etext[];

static NOINLINE u64 who(u64 x)
{
    char *ra = __builtin_return_address(0);
    if (ra < __executable_start || ra >= etext)
        victim_fail("called from outside the program", (u64)(uintptr_t)ra, (u64)(uintptr_t)etext);
    return x * 3 + 1;
}

static NOINLINE u64 known(u64 x)
{
    static const char *name;
    Dl_info info;
    if (!dladdr(__builtin_return_address(0), &info) || !info.dli_fname) victim_fail("dladdr knows no caller", 0, 1);
    if (!name) name = info.dli_fname;
    if (strcmp(name, info.dli_fname)) victim_fail("dladdr names another module", 0, 1);
    return x ^ 0x77;
}

static NOINLINE u64 loop(u64 h)
{
    for (int i = 0; i < 500; i++) {
        h = mix(h, who(h));
        if (i % 16 == 0) h = mix(h, known(h));
    }
    return h;
}

static u64 work(u64 seed)
{
    u64 h = seed;
    for (int i = 0; i < 20; i++) h = loop(h);
    return h;
}

VICTIM_MAIN(NULL, work)
