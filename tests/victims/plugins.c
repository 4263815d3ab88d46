/* A plugin loaded, used and unloaded in a loop: hot code that comes and goes, and maybe comes back elsewhere.
 * dlopen finds the caller's RUNPATH and dlsym(RTLD_NEXT) the caller's place in the search order by return address.
 * plugin: plugins_so.c
 * flags: -fno-builtin-abs -Wl,-rpath,$ORIGIN -Wl,--enable-new-dtags
 * libs: -ldl */
#include <dlfcn.h>
#include "victim.h"

/* Interposes libc's: RTLD_NEXT must find libc's from here, however hot the caller is. */
int abs(int x)
{
    static int (*real)(int);
    real = (int (*)(int))dlsym(RTLD_NEXT, "abs");
    if (!real || real == abs) victim_fail("dlsym(RTLD_NEXT) lost its caller", (uintptr_t)real, 0);
    return real(x) + 1;
}

static NOINLINE u64 inner(u64 (*f)(u64, u64), u64 seed)
{
    u64 h = seed;
    for (u64 i = 0; i < 40; i++) h = mix(h, f(h, i));
    return h;
}

static NOINLINE u64 load_use_unload(u64 seed)
{
    /* A name without a slash: only this program's RUNPATH leads there. */
    void *so = dlopen(PLUGIN_NAME, RTLD_NOW | RTLD_LOCAL);
    if (!so) {
        fprintf(stderr, "%s\n", dlerror());
        victim_fail("dlopen", 0, 1);
    }
    u64 (*f)(u64, u64) = (u64 (*)(u64, u64))dlsym(so, "plugin_work");
    if (!f) victim_fail("dlsym", 0, 1);
    u64 h = inner(f, seed);
    dlclose(so);
    return h;
}

static u64 work(u64 seed)
{
    u64 h = seed;
    h = mix(h, load_use_unload(seed));
    for (int i = 0; i < 20; i++) {
        volatile int v = -i;
        h = mix(h, (u64)abs(v));
    }
    return mix(h, load_use_unload(seed + 1));
}

VICTIM_MAIN(NULL, work)
