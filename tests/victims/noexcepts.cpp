/* An exception meets noexcept: std::terminate is called, in children that end by their own handler.
 * flags: -std=c++17 */
#include <exception>
#include <stdexcept>
#include <sys/wait.h>
#include "victim.h"

namespace {

NOINLINE u64 grind(u64 h)
{
    for (u64 i = 0; i < 4000; i++) h = mix(h, i);
    return h;
}

NOINLINE u64 deep(u64 h, int depth)
{
    if (depth == 0) throw std::runtime_error("deep");
    return mix(deep(grind(h), depth - 1), 1);
}

NOINLINE u64 quiet(u64 h) noexcept
{
    return mix(deep(h, 3), 2);
}

NOINLINE u64 caught(u64 h)
{
    try {
        return deep(h, 3);
    } catch (const std::runtime_error &e) {
        return mix(h, static_cast<u64>(e.what()[0]));
    }
}

[[noreturn]] void ended()
{
    try {
        std::rethrow_exception(std::current_exception());
    } catch (const std::runtime_error &) {
        _exit(42);
    } catch (...) {
        _exit(43);
    }
}

u64 work(u64 seed)
{
    u64 h = caught(grind(seed));
    pid_t child = fork();
    if (child < 0) victim_fail("fork", static_cast<u64>(errno), 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        std::set_terminate(ended);
        _exit(static_cast<int>(quiet(h) & 1));
    }
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) victim_fail("waitpid", static_cast<u64>(errno), 0);
    CHECK("the child's end", WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status, 42);
    return mix(h, 42);
}

} // namespace

VICTIM_MAIN(nullptr, work)
