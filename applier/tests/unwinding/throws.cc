// Every way in which an exception passes through a frame. `run` plays one scenario and leaves what happened in a trace.
#include <alloca.h>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <pthread.h>
#include <stdexcept>
#include <string>
#include <unwind.h>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define NOINLINE __attribute__((noinline))

static char trace[1 << 16];
static size_t used;

extern "C" __attribute__((visibility("hidden"))) void note(const char *what, long n) {
    if (used + 64 < sizeof trace) used += snprintf(trace + used, 64, "%s %ld;", what, n);
}
extern "C" void other_throw(int kind);
extern "C" void other_call(void (*f)(int), int n);
extern "C" __attribute__((visibility("hidden"))) int c_between(int kind);

struct Guard {
    long n;
    explicit Guard(long n) : n(n) { note("+", n); }
    ~Guard() { note("-", n); }
};
struct Base { virtual ~Base() {} virtual int id() const { return 1; } };
struct Derived : Base { int n; explicit Derived(int n) : n(n) {} int id() const override { return n; } };
struct Other { long a[8]; };

NOINLINE static void thrower(int kind) {
    Guard g(kind);
    switch (kind) {
    case 0: throw 42;
    case 1: throw Derived(7);
    case 2: throw Other{{1, 2, 3, 4, 5, 6, 7, 8}};
    case 3: throw std::out_of_range("three");
    case 4: throw "chars";
    case 5: throw std::string("a longer text than fits into the small buffer of a string");
    case 6: other_throw(1); break;
    case 7: other_throw(4); break;
    case 8: std::vector<int>().at(9); break;
    case 9: note("s", std::stoi("no number")); break;
    case 10: throw std::make_shared<int>(5);
    }
    note("no throw", kind);
}

NOINLINE static int deep(int kind, int depth) {
    Guard g(1000 + depth);
    std::string local(depth * 3, 'x');
    if (depth == 0) thrower(kind);
    else if (depth % 5 == 3) other_call([](int n) { deep(n / 100, n % 100); }, kind * 100 + depth - 1);
    else note("deep", deep(kind, depth - 1));
    return local.size();
}

NOINLINE static int catcher(int kind, int depth) {
    try {
        Guard g(1);
        return deep(kind, depth);
    } catch (int n) {
        note("int", n);
    } catch (const Base &b) {
        note("base", b.id());
    } catch (const std::exception &e) {
        note(e.what(), 0);
    } catch (const char *s) {
        note(s, 1);
    } catch (const std::string &s) {
        note("string", s.size());
    } catch (...) {
        note("any", kind);
    }
    return -1;
}

NOINLINE static int nested(int kind) {
    int result = 0;
    for (int i = 0; i < 4; i++) {
        try {
            Guard outer(10 + i);
            try {
                Guard inner(20 + i);
                try {
                    thrower((kind + i) % 11);
                } catch (int n) {
                    Guard handling(30 + i);
                    note("rethrow", n);
                    throw;
                } catch (const std::exception &e) {
                    note("replace", i);
                    throw Derived(i);
                }
            } catch (const Derived &d) {
                note("derived", d.n);
                result += d.n;
                if (d.n == 2) throw std::runtime_error("two");
            }
        } catch (const std::runtime_error &e) {
            note(e.what(), 2);
            result += 100;
        } catch (int n) {
            result += n;
        } catch (...) {
            try {
                std::exception_ptr p = std::current_exception();
                std::rethrow_exception(p);
            } catch (const Other &o) {
                result += o.a[3];
            } catch (...) {
                result += 1000;
            }
        }
    }
    return result;
}

#if __cplusplus < 201703L
NOINLINE static int limited(int kind) throw(int, Derived) {
    Guard g(40);
    deep(kind, 2);
    return kind;
}
NOINLINE static int limited_to_none(int kind) throw() {
    Guard g(41);
    thrower(kind);
    return kind;
}
static void on_unexpected() {
    note("unexpected", 0);
    throw 99;
}
NOINLINE static int specified(int kind) {
    auto old = std::set_unexpected(on_unexpected);
    int result = 0;
    try {
        result = limited(kind);
    } catch (int n) {
        result = n;
    } catch (const Derived &d) {
        result = -d.n;
    }
    std::set_unexpected(old);
    return result;
}
#else
NOINLINE static int limited_to_none(int kind) noexcept { thrower(kind); return kind; }
NOINLINE static int specified(int kind) { return kind; }
#endif

static jmp_buf home;
static void on_terminate() {
    note("terminate", 0);
    longjmp(home, 1);
}
NOINLINE static int never(int kind) noexcept {
    Guard g(50);
    try {
        thrower(kind);
    } catch (int n) {
        note("inside", n);
    }
    return kind;
}
NOINLINE static int terminated(int kind) {
    auto old = std::set_terminate(on_terminate);
    volatile int result = -5;
    if (setjmp(home) == 0) result = kind % 2 ? never(kind) : limited_to_none(kind);
    std::set_terminate(old);
    return result;
}

struct Member {
    Guard g;
    Member(int n, int kind) : g(n) { if (n == 62) thrower(kind); }
};
struct Whole {
    Member a, b, c;
    explicit Whole(int kind) try : a(61, kind), b(62, kind), c(63, kind) { note("whole", 0); } catch (int n) {
        note("in constructor", n);
    }
};
NOINLINE static int constructed(int kind) {
    try {
        std::unique_ptr<Whole> p(new Whole(kind));
        Whole many[3] = {Whole(11), Whole(11), Whole(kind)};
        return many[0].a.g.n;
    } catch (...) {
        return -61;
    }
}

// A frame that is aligned, of a size known at run time, with arguments on the stack.
NOINLINE static long wide(long a, long b, long c, long d, long e, long f, long g, long h, const Derived &i, int kind) {
    alignas(64) volatile long aligned[8] = {a, b, c, d, e, f, g, h};
    volatile char *room = (volatile char *)alloca(a * 16 + 16);
    room[a] = 1;
    Guard guard(70);
    try {
        deep(kind, 1);
    } catch (int n) {
        return aligned[3] + n + room[a];
    } catch (const Base &base) {
        return base.id() + i.n + ((size_t)aligned % 64 == 0 ? 0 : 10000);
    }
    return h + room[a];
}
NOINLINE static long wide_caller(int kind) {
    long sum = 0;
    for (int i = 0; i < 3; i++) {
        try {
            sum += wide(i, 2, 3, 4, 5, 6, 7 + i, 8, Derived(i), kind);
        } catch (...) {
            sum -= wide(1, 1, 1, 1, 1, 1, 1, i, Derived(3), 11);
        }
    }
    return sum;
}

static int compare(const void *a, const void *b) {
    Guard g(80);
    if (*(const int *)a == 5 || *(const int *)b == 5) throw Derived(*(const int *)a);
    return *(const int *)a - *(const int *)b;
}
NOINLINE static int sorted(int kind) {
    int a[] = {4, 9, 1, kind, 7, 3};
    try {
        qsort(a, 6, sizeof(int), compare);
        return a[0] * 10 + a[5];
    } catch (const Derived &d) {
        return -d.n;
    }
}

NOINLINE static int through_c(int kind) {
    try {
        return c_between(kind);
    } catch (int n) {
        return n;
    } catch (const std::exception &e) {
        note(e.what(), 3);
        return -3;
    } catch (const std::string &s) {
        return s.size();
    }
}

static _Unwind_Reason_Code step(_Unwind_Context *, void *count) {
    ++*(long *)count;
    return _URC_NO_REASON;
}
NOINLINE static long depth_of(int n) {
    long count = 0;
    if (n == 0) _Unwind_Backtrace(step, &count);
    else count = depth_of(n - 1) + (n % 2 ? 0 : deep(11, 1) * 0);
    return count;
}

static void *ending(void *kind) {
    Guard g(90);
    other_call([](int n) {
        Guard g(91);
        if (n % 2) pthread_exit((void *)(long)n);
        try {
            Guard g(92);
            pthread_exit((void *)(long)(n + 100));
        } catch (int) {
            note("never", 0);
        }
    }, (int)(long)kind);
    return nullptr;
}
NOINLINE static long ended(int kind) {
    pthread_t t;
    void *result = nullptr;
    if (pthread_create(&t, nullptr, ending, (void *)(long)kind) == 0) pthread_join(t, &result);
    return (long)result;
}

// A signal handler that throws, out of the instruction that raised the signal (-fnon-call-exceptions).
static void on_fault(int) { throw Derived(8); }
NOINLINE static int divide(int a, int b) {
    Guard g(95);
    try {
        volatile int q = a / b;
        return q;
    } catch (const Derived &d) {
        note("fault", d.n);
        throw;
    }
}
NOINLINE static int faulted(int kind) {
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_fault;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGFPE, &action, &old);
    int result;
    try {
        result = divide(kind, kind % 3);
    } catch (const Base &b) {
        result = -b.id();
    }
    sigaction(SIGFPE, &old, nullptr);
    return result;
}

// Many small try blocks in a loop and a switch: many call sites and blocks.
NOINLINE static int busy(int kind) {
    int sum = 0;
    for (int i = 0; i < 24; i++) {
        try {
            switch ((i * 7 + kind) % 8) {
            case 0: try { thrower(0); } catch (int n) { sum += n; } break;
            case 1: try { thrower(1); } catch (const Base &b) { sum ^= b.id(); } break;
            case 2: { Guard g(200 + i); if (i % 3) thrower(3); sum += 2; break; }
            case 3: { std::map<std::string, int> m; m["a"] = i; sum += m.at(i % 2 ? "a" : "b"); break; }
            case 4: { std::vector<Guard> v; v.reserve(2); v.emplace_back(1); v.emplace_back(2); thrower(4); break; }
            case 5: try { thrower(5); } catch (const std::string &s) { sum += s.size(); throw 6; } break;
            case 6: sum += deep(11, 2); break;
            default: thrower(i % 11);
            }
        } catch (int n) {
            sum += n * 3;
        } catch (const std::exception &e) {
            sum += strlen(e.what());
        } catch (const char *) {
            sum -= 1;
        } catch (...) {
            sum += 17;
        }
    }
    return sum;
}

EXPORT long run(int scenario, int kind) {
    used = 0;
    trace[0] = 0;
    switch (scenario) {
    case 0: return catcher(kind, 0);
    case 1: return catcher(kind, 12);
    case 2: return nested(kind);
    case 3: return specified(kind);
    case 4: return terminated(kind);
    case 5: return constructed(kind);
    case 6: return wide_caller(kind);
    case 7: return sorted(kind);
    case 8: return through_c(kind);
    case 9: return depth_of(kind);
    case 10: return ended(kind);
    case 11: return busy(kind);
    case 12: return FAULTS ? faulted(kind) : 0;
    }
    return -9999;
}

EXPORT const char *last_trace() { return trace; }

#ifdef MAIN
int main(int argc, char **) {
    for (int s = 0; s < 13; s++)
        for (int k = 0; k < 12; k++) { long r = run(s, k); printf("%ld %s\n", r, last_trace()); };
    return 0;
}
#endif
