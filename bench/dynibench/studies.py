"""
What the gain depends on: passes, the length of the recording, the sampling method.

A study takes one pair of servers. Each plan is applied to B, measured and undone; the gain is over B as it was at first. At
the end stock B is measured once more: how far that is from 1 is how far the study can be trusted.
"""

from .errors import BenchError
from .pair import paired, under_load
from .stats import gain

LENGTHS = (2, 5, 10, 20, 40)
METHODS = ("clock", "count", "lbr")


class Study:
    """A pair, and B's layouts one after the other."""

    def __init__(self, bench, pair):
        self.bench, self.pair = bench, pair
        self.stock = pair.measure("stock")

    def profile(self, seconds, method="auto"):
        """A recording of B under load."""
        self.bench.progress(f"{self.pair.b}: recording for {seconds} s ({method})")
        with under_load(self.pair.a, self.pair.b):
            return self.bench.dyni.record(self.pair.b, seconds, method)

    def layout(self, what, profile, passes="all"):
        """The gain of a plan from a profile, and how many functions it has."""
        plan = self.bench.dyni.analyze(profile, passes)
        self.bench.dyni.apply(self.pair.b, plan)
        after = self.pair.measure(what)
        self.bench.dyni.undo(self.pair.b)
        return {"gain": gain(self.stock, after), "after": after, "functions": plan["functions"]}

    def result(self, points):
        """The study as it is kept."""
        again = self.pair.measure("stock again")
        return {"stock": self.stock, "points": points, "again": gain(self.stock, again)}


def pass_sets(passes, quick=False):
    """`(kind, pass, the passes that run)`: none, each added to those before it, and each left out of all."""
    steps = passes[:1] if quick else passes
    yield "none", None, []
    for n, name in enumerate(steps):
        yield "added", name, passes[:n + 1]
    if quick:
        yield "added", passes[-1], passes
    for name in steps:
        yield "without", name, [other for other in passes if other != name]


def study_passes(bench, kind):
    """Which pass brings what. The names are dyni's own."""
    with paired(bench, kind) as pair:
        study = Study(bench, pair)
        profile = study.profile(bench.record_seconds)
        passes = bench.dyni.analyze(profile)["passes"]
        points = []
        for how, name, some in pass_sets(passes, bench.quick):
            listed = ",".join(some) or "none"
            points.append({"kind": how, "pass": name, **study.layout(f"passes {listed}", profile, listed)})
        return study.result(points)


def study_length(bench, kind):
    """How long one has to look."""
    with paired(bench, kind) as pair:
        study = Study(bench, pair)
        lengths = (1, 2) if bench.quick else LENGTHS
        return study.result([{"label": f"{seconds} s", **study.layout(f"recorded {seconds} s", study.profile(seconds))}
                             for seconds in lengths])


def study_method(bench, kind):
    """Samples against counts, and against branch stacks where the host has them."""
    missing = bench.dyni.samplers()
    with paired(bench, kind) as pair:
        study, points = Study(bench, pair), []
        for method in METHODS:
            if missing.get(method):
                points.append({"label": method, "skipped": missing[method]})
                continue
            profile = study.profile(bench.record_seconds, method)
            points.append({"label": method, **study.layout(f"method {method}", profile)})
        if all("skipped" in point for point in points):
            raise BenchError("no sampler works here", "", "dyni doctor says why")
        return study.result(points)


STUDIES = {"passes": study_passes, "length": study_length, "method": study_method}
