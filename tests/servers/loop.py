#!/usr/bin/python3
"""An interpreter at work, under the protocol of tests/victims/victim.h: every round's result is known beforehand."""
import functools
import hashlib
import os
import re
import signal
import sys

PERIOD = 8
MASK = (1 << 64) - 1
stop = False


def on_term(_signal, _frame):
    global stop
    stop = True


class Shape:
    def __init__(self, size):
        self.size = size

    def area(self):
        return self.size * self.size


class Ring(Shape):
    def area(self):
        return super().area() * 3 - self.size


def primes(n):
    sieve = bytearray([1]) * n
    for i in range(2, int(n**0.5) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, n, i)))
    return [i for i in range(2, n) if sieve[i]]


@functools.lru_cache(maxsize=64)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def numbers(seed):
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) & MASK
        yield seed >> 33


def failing(n):
    try:
        if n % 3 == 0:
            raise ValueError(n)
        return [0, 1][n % 5]
    except ValueError as e:
        return e.args[0]
    except IndexError:
        return -1
    finally:
        fibonacci.cache_clear()


def work(seed):
    source = numbers(seed)
    values = [next(source) for _ in range(300)]
    table = {}
    for v in values:
        table.setdefault(v % 31, []).append(v)
    text = " ".join(f"{k}:{sum(v):x}" for k, v in sorted(table.items()))
    words = re.findall(r"(\d+):([0-9a-f]+)", text)
    shapes = [Ring(v % 100) if v & 1 else Shape(v % 100) for v in values]
    h = hashlib.sha256(text.encode())
    h.update(repr(sorted(values, key=lambda v: (v % 7, -v))[:20]).encode())
    h.update(repr(sum(s.area() for s in shapes)).encode())
    h.update(repr([failing(v % 17) for v in values[:60]]).encode())
    h.update(repr((fibonacci(40), primes(500 + seed)[-3:], len(words), 3.0**seed / 7)).encode())
    h.update(repr([(3**200) // (v | 1) % 1009 for v in values[:50]]).encode())
    return h.digest()


def main():
    args = sys.argv[1:]
    signal.signal(signal.SIGTERM, on_term)
    expected = [work(i) for i in range(PERIOD)]
    rounds = int(args[1]) if len(args) > 1 else None
    verify = args[0] == "--verify"
    total, done = hashlib.sha256(), 0
    if not verify:
        print("ready", os.getpid(), flush=True)
    while done != rounds and not (stop and not verify):
        want = expected[done % PERIOD]
        if not verify and work(done % PERIOD) != want:
            sys.exit(f"victim: round {done}: wrong result")
        total.update(want)
        done += 1
    print("rounds", done, "checksum", total.hexdigest()[:16], flush=True)


main()
