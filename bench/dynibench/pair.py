"""
Two servers of the same program at once, A and B, on one CPU; their load generators on another.

The figure is CPU time per operation, A over B. Both feel the same neighbours in the same millisecond, so that their ratio
holds on a machine where a time does not.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
import typing

from .dyni import Dyni
from .errors import BenchError
from .processes import Processes
from .stats import summary

# Sessions end, and are waited for, after their client has ended.
SETTLE = 0.4


@dataclasses.dataclass
class Bench:
    """What every measurement needs."""

    folder: pathlib.Path
    processes: Processes
    dyni: Dyni
    rounds: int
    seconds: int
    quick: bool
    # Whether to measure what is known to crash.
    try_crashing: bool
    progress: typing.Callable[[str], None]

    @property
    def record_seconds(self):
        """How long dyni and BOLT look at a server: dyni's default."""
        return 2 if self.quick else 10


def cpus():
    """The CPU of the servers and that of their clients: the first and the last, which are rarely threads of one core."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise BenchError("two CPUs are needed", "The servers share one, their clients another; there is one only.")
    return allowed[0], allowed[-1]


@contextlib.contextmanager
def serving(bench, kind, letter, binary=None):
    """A server while it is needed. `kind`: a class of `servers`; `binary`: the file that runs in place of the stock one."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{kind.name}-", dir=bench.folder))
    folder.chmod(0o711)
    server = kind(letter, folder / letter, bench.processes, cpus(), binary, bench.quick)
    try:
        bench.progress(f"{server}: starting and filling")
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def paired(bench, kind, binary=None):
    """A, and B beside it, which runs `binary` if there is one."""
    with serving(bench, kind, "A") as a, serving(bench, kind, "B", binary) as b:
        yield Pair(bench, a, b)


@contextlib.contextmanager
def under_load(*servers):
    """Load on servers while something is done; an error if one of them fails meanwhile."""
    loads = [server.load(None) for server in servers]
    time.sleep(1)
    try:
        yield
    except BaseException:
        for load in loads:
            load.server.processes.stop(load.process)
        raise
    for load in loads:
        load.interrupt()


class Pair:
    """A and B, both running."""

    def __init__(self, bench, a, b):
        self.bench, self.a, self.b = bench, a, b

    def round(self, seconds):
        """Both under load for so long: CPU time of an operation of each, and A's over B's."""
        pair = (self.a, self.b)
        before = [server.cpu_ns() for server in pair]
        loads = [server.load(seconds) for server in pair]
        operations = [load.finish() for load in loads]
        time.sleep(SETTLE)
        spent = [server.cpu_ns() - then for server, then in zip(pair, before)]
        for server, count in zip(pair, operations):
            server.check()
            if count <= 0:
                raise BenchError(f"{server} did no operation in {seconds} s")
        a, b = (ns / count for ns, count in zip(spent, operations))
        return {"operations": operations, "ns_per_operation": [round(a), round(b)], "ratio": a / b}

    def measure(self, what):
        """Rounds, after one to warm up, and the median of their ratios."""
        bench = self.bench
        bench.progress(f"{self.a.name}, {what}: warming up")
        self.round(1 if bench.quick else 2)
        rounds = []
        for n in range(bench.rounds):
            bench.progress(f"{self.a.name}, {what}: round {n + 1} of {bench.rounds}")
            rounds.append(self.round(bench.seconds))
        return {**summary(r["ratio"] for r in rounds), "rounds": rounds}
