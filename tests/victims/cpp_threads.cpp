/* std::thread and what goes with it: exceptions carried to another thread, futures, call_once, thread_local objects,
 * function-local statics whose initialisers throw, lambdas in std::function.
 * flags: -std=c++17
 * libs: -lpthread */
#include <array>
#include <condition_variable>
#include <exception>
#include <functional>
#include <future>
#include <mutex>
#include <stdexcept>
#include <thread>
#include "victim.h"

namespace {

enum { THREADS = 4, STEPS = 60 };

struct Local {
    u64 sum = 7;
    ~Local() { sum = 0; }
};
thread_local Local local;

struct Failed : std::exception {
    u64 value;
    explicit Failed(u64 v) : value(v) {}
    const char *what() const noexcept override { return "failed"; }
};

/* The initialiser throws the first time that a number asks, and is then tried again (__cxa_guard_abort). */
template <int N> NOINLINE u64 lazily(u64 h)
{
    static int tries = 0;
    struct Once {
        u64 value;
        explicit Once(u64 v) : value(v)
        {
            if (++tries == 1) throw Failed(v);
        }
    };
    try {
        static Once once(N * 11 + 1);
        return mix(h, once.value);
    } catch (const Failed &f) {
        return mix(h, f.value);
    }
}

NOINLINE u64 grind(u64 h)
{
    for (u64 i = 0; i < 50; i++) h = mix(h, i ^ local.sum);
    return h;
}

NOINLINE u64 step(u64 h)
{
    h = grind(h);
    if (h % 3 == 0) throw Failed(h);
    if (h % 7 == 0) throw std::length_error("seven");
    return h;
}

/* A worker hands its exceptions to whoever waits for it. */
struct Box {
    std::mutex lock;
    std::condition_variable filled;
    bool done = false;
    u64 value = 0;
    std::exception_ptr error;
};

void fill(Box &box, u64 seed)
{
    local.sum = seed & 0xff;
    u64 h = seed;
    std::exception_ptr error;
    std::function<u64(u64)> next_step = [seed](u64 x) { return step(x ^ seed); };
    for (int i = 0; i < STEPS; i++) {
        try {
            h = next_step(h + static_cast<u64>(i));
        } catch (const Failed &f) {
            h = mix(h, f.value);
        } catch (...) {
            error = std::current_exception();
            h = mix(h, 5);
        }
    }
    std::lock_guard<std::mutex> hold(box.lock);
    box.value = h;
    box.error = error;
    box.done = true;
    box.filled.notify_one();
}

NOINLINE u64 empty(Box &box)
{
    std::unique_lock<std::mutex> hold(box.lock);
    box.filled.wait(hold, [&box] { return box.done; });
    u64 h = box.value;
    try {
        if (box.error) std::rethrow_exception(box.error);
    } catch (const std::length_error &e) {
        h = mix(h, static_cast<u64>(e.what()[0]));
    }
    return h;
}

u64 work(u64 seed)
{
    std::array<Box, THREADS> boxes;
    std::array<std::thread, THREADS> threads;
    for (u64 i = 0; i < THREADS; i++) threads[i] = std::thread([&boxes, i, seed] { fill(boxes[i], mix(seed, i)); });
    std::future<u64> later = std::async(std::launch::async, [seed] { return step(seed); });
    u64 h = seed;
    for (auto &box : boxes) h = mix(h, empty(box));
    for (auto &t : threads) t.join();
    try {
        h = mix(h, later.get());
    } catch (const std::exception &e) {
        h = mix(h, static_cast<u64>(e.what()[0]));
    }
    std::once_flag flag;
    for (u64 i = 0; i < 5; i++) {
        try {
            std::call_once(flag, [&h, i] {
                if (i < 3) throw Failed(i);
                h = mix(h, 9);
            });
        } catch (const Failed &f) {
            h = mix(h, f.value);
        }
    }
    return h;
}

/* Before the first round, as rounds must not depend on how many there were. */
void setup()
{
    u64 h = 1;
    for (int i = 0; i < 3; i++) h = lazily<1>(lazily<2>(h));
    CHECK("statics", lazily<1>(h), mix(h, 12));
}

u64 round_and_statics(u64 seed) { return lazily<2>(lazily<1>(work(seed))); }

} // namespace

VICTIM_MAIN(setup, round_and_statics)
