// C with -fexceptions: __gcc_personality_v0 runs the cleanups.
extern void note(const char *what, long n);
extern void other_throw(int kind);

static void release(int *n) { note("c-release", *n); }

__attribute__((visibility("hidden"))) int c_between(int kind) {
    int held __attribute__((cleanup(release))) = kind;
    {
        int inner __attribute__((cleanup(release))) = kind + 100;
        if (kind % 3 == 0) note("c-inner", inner);
        other_throw(kind);
    }
    other_throw(kind + 1);
    return held;
}
