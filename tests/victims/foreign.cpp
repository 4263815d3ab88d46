/* Exceptions that cross shared objects: thrown by the C++ library, passed through the C library's sort and search,
 * caught by the program; and destructors, rethrow and nested exceptions on the way.
 * flags: -std=c++17 */
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>
#include "victim.h"

namespace {

u64 closed;

struct Closing {
    u64 id;
    explicit Closing(u64 i) : id(i) {}
    ~Closing() { closed = mix(closed, id); }
};

u64 limit;

struct Stop {
    u64 at;
};

int compare(const void *a, const void *b)
{
    u64 x = *static_cast<const u64 *>(a), y = *static_cast<const u64 *>(b);
    Closing c(x & 0xff);
    if (mix(x, y) % 1024 < limit) throw Stop{x ^ y};
    return x < y ? -1 : x > y;
}

NOINLINE u64 sorted(u64 seed)
{
    u64 a[96], s = seed, h = seed;
    for (u64 &v : a) v = next(&s);
    try {
        qsort(a, 96, sizeof a[0], compare);
        u64 key = a[seed % 96];
        h = mix(h, static_cast<u64>(static_cast<u64 *>(bsearch(&key, a, 96, sizeof a[0], compare)) - a));
    } catch (const Stop &stop) {
        return mix(h, stop.at);
    }
    for (u64 v : a) h = mix(h, v);
    return h;
}

/* at() and stoull() throw inside the C++ library. */
NOINLINE u64 parsed(const std::vector<std::string> &words, u64 i)
{
    Closing c(i);
    return std::stoull(words.at(i));
}

NOINLINE u64 nested(const std::vector<std::string> &words, u64 i)
{
    try {
        return parsed(words, i);
    } catch (const std::invalid_argument &) {
        std::throw_with_nested(std::runtime_error("nested"));
    }
}

NOINLINE u64 unwrapped(const std::exception &e)
{
    u64 h = static_cast<u64>(e.what()[0]);
    try {
        std::rethrow_if_nested(e);
    } catch (const std::exception &inner) {
        h = mix(h, unwrapped(inner));
    }
    return h;
}

u64 work(u64 seed)
{
    const std::vector<std::string> words = {"17", "x", "99999999999999999999999", "4", "", "12345"};
    u64 h = seed, s = seed;
    closed = 0;
    for (int i = 0; i < 60; i++) {
        limit = next(&s) % 8 ? 0 : 4;
        h = mix(h, sorted(h));
        try {
            h = mix(h, nested(words, next(&s) % 8));
        } catch (const std::exception &e) {
            h = mix(h, unwrapped(e));
        }
    }
    return mix(h, closed);
}

} // namespace

VICTIM_MAIN(nullptr, work)
