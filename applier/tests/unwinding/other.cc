// Another library, whose code is never copied: it throws through its callers.
#include <stdexcept>
#include <string>

extern "C" void other_throw(int kind) {
    switch (kind % 4) {
    case 0: throw kind;
    case 1: throw std::runtime_error("other " + std::to_string(kind));
    case 2: throw std::string("text");
    }
}

extern "C" void other_call(void (*f)(int), int n) { f(n); }
