/* C++ exceptions through hot frames: landing pads, destructors, rethrow, nested and foreign catch clauses. */
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
#include "victim.h"

namespace {

u64 alive, destroyed;

struct Guard {
    u64 id;
    explicit Guard(u64 i) : id(i) { alive++; }
    Guard(const Guard &) = delete;
    ~Guard()
    {
        alive--;
        destroyed = mix(destroyed, id);
    }
};

struct Odd : std::runtime_error {
    u64 value;
    explicit Odd(u64 v) : std::runtime_error("odd"), value(v) {}
};

NOINLINE u64 leaf(u64 h)
{
    Guard g(h);
    for (u64 i = 0; i < 40; i++) h = mix(h, i);
    if (h % 5 == 0) throw Odd(h);
    if (h % 11 == 0) throw std::out_of_range("eleven");
    if (h % 13 == 0) throw static_cast<int>(h & 0xff);
    return h;
}

NOINLINE u64 middle(u64 h, int depth)
{
    Guard g(h ^ 1);
    std::unique_ptr<Guard> owned(new Guard(h ^ 2));
    try {
        return depth ? mix(middle(h, depth - 1), 3) : leaf(h);
    } catch (const Odd &o) {
        if (o.value & 1) throw;
        return mix(o.value, 17);
    } catch (int i) {
        if (depth > 2) throw std::string("from int ") + std::to_string(i);
        throw;
    }
}

NOINLINE u64 outer(u64 h, int depth)
{
    try {
        return middle(h, depth);
    } catch (const std::string &s) {
        return mix(h, s.size());
    } catch (const std::exception &e) {
        return mix(h, static_cast<u64>(e.what()[0]));
    } catch (...) {
        return ~h;
    }
}

u64 work(u64 seed)
{
    u64 h = seed;
    destroyed = 0;
    for (int i = 0; i < 250; i++) h = outer(mix(h, static_cast<u64>(i)), i % 6);
    CHECK("objects left alive", alive, 0);
    return mix(h, destroyed);
}

} // namespace

VICTIM_MAIN(nullptr, work)
