/* Virtual calls, thunks of multiple inheritance, std::function, templates and iostreams.
 * flags: -std=c++17 */
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <unordered_map>
#include <vector>
#include "victim.h"

namespace {

struct Shape {
    virtual ~Shape() = default;
    virtual u64 area() const = 0;
    virtual Shape *self() { return this; }
};

struct Named {
    virtual ~Named() = default;
    virtual u64 name() const { return 1; }
};

struct Square : Shape, Named {
    u64 side;
    explicit Square(u64 s) : side(s) {}
    u64 area() const override { return side * side; }
    u64 name() const override { return mix(side, 2); }
    Square *self() override { return this; }
};

struct Ring final : virtual Shape {
    u64 out, in;
    Ring(u64 o, u64 i) : out(o), in(i) {}
    u64 area() const override { return 3 * (out * out - in * in); }
};

NOINLINE u64 total(const std::vector<std::unique_ptr<Shape>> &all, u64 h)
{
    for (const auto &s : all) {
        h = mix(h, s->self()->area());
        if (const auto *n = dynamic_cast<const Named *>(s.get())) h = mix(h, n->name());
    }
    return h;
}

NOINLINE u64 containers(u64 seed)
{
    std::map<u64, u64> tree;
    std::unordered_map<u64, u64> hash;
    u64 s = seed, h = seed;
    for (int i = 0; i < 200; i++) {
        u64 v = next(&s);
        tree[v % 97] += v;
        hash[v % 89] ^= v;
    }
    for (const auto &[k, v] : tree) h = mix(h, k ^ v);
    for (u64 k = 0; k < 89; k++) h = mix(h, hash.count(k) ? hash[k] : 0);
    std::ostringstream out;
    out << h << ' ' << std::hex << seed << ' ' << 3.25;
    return mix(h, out.str().size());
}

u64 work(u64 seed)
{
    std::vector<std::unique_ptr<Shape>> all;
    u64 s = seed, h = seed;
    for (int i = 0; i < 64; i++) {
        u64 v = next(&s);
        if (v & 1)
            all.emplace_back(new Square(v % 1000));
        else
            all.emplace_back(new Ring(v % 1000 + 5, v % 5));
    }
    std::vector<std::function<u64(u64)>> steps;
    for (u64 i = 0; i < 8; i++) steps.emplace_back([i, seed](u64 x) { return i % 2 ? mix(x, seed) : x + i; });
    for (int i = 0; i < 40; i++) {
        h = total(all, h);
        h = steps[h % 8](h);
    }
    std::sort(all.begin(), all.end(), [](const auto &a, const auto &b) { return a->area() < b->area(); });
    return mix(total(all, h), containers(seed));
}

} // namespace

VICTIM_MAIN(nullptr, work)
