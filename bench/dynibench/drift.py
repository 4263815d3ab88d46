"""
A server that is optimised for one mix of work and then does another: how much it recovers by being optimised again.

The figure is that of `pair`, CPU time per operation of A over B, always under the second mix: with B stock, with B as it was
optimised under the first mix, after it was optimised once more, and in another pair whose B was optimised for the second mix
from the start.
"""

import argparse
import json
import os
import pathlib
import tempfile

from .cli import BENCH, listed, positive, progress, told
from .databases import MariaDB, Postgres
from .dyni import Dyni, find
from .errors import BenchError
from .pair import Bench, cpus, paired, under_load
from .processes import Processes
from .stats import gain

# By name: the server, the mix that it is trained on, the one that it is switched to.
SWITCHES = {
    "mariadb": (MariaDB, "oltp_point_select", "oltp_read_only"),
    "postgres": (Postgres, "-S", "-N"),
}


def options(argv):
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="bench/drift", description=__doc__.strip().splitlines()[0])
    add = parser.add_argument
    add("--workloads", metavar="LIST", type=listed(SWITCHES), default=list(SWITCHES),
        help=f"of {', '.join(SWITCHES)} (default: all)")
    add("--rounds", metavar="N", type=positive, help="rounds of each measurement (default: 5)")
    add("--seconds", metavar="S", type=positive, help="length of a round (default: 5)")
    add("--quick", action="store_true", help="one round of a second on little data: its figures mean nothing")
    add("--dyni", metavar="PATH", help="the dyni to measure (default: target/release/dyni, else the one in PATH)")
    add("--json", metavar="FILE", help="write the raw results there")
    return parser.parse_args(argv)


def switch(pair, mix):
    """From here on, both servers' clients do this."""
    for server in (pair.a, pair.b):
        server.script = mix


def optimised(bench, pair):
    """B optimised under the present mix."""
    bench.progress(f"{pair.b}: dyni optimize under {pair.b.script}")
    with under_load(pair.a, pair.b):
        done = bench.dyni.optimize(pair.b, bench.record_seconds)
    return {key: done[key] for key in ("state", "gain", "not_measured")}


def measured(bench, name):
    """All of one server's measurements."""
    kind, first, second = SWITCHES[name]
    entry = {"first": first, "second": second, "optimize": {}}
    with paired(bench, kind) as pair:
        switch(pair, second)
        entry["stock"] = pair.measure(f"{second}, stock")
        switch(pair, first)
        entry["optimize"]["first"] = optimised(bench, pair)
        switch(pair, second)
        entry["stale"] = pair.measure(f"{second}, optimised for {first}")
        entry["optimize"]["again"] = optimised(bench, pair)
        entry["again"] = pair.measure(f"{second}, optimised again")
    with paired(bench, kind) as pair:
        switch(pair, second)
        entry["fresh_stock"] = pair.measure(f"{second}, stock, a new pair")
        entry["optimize"]["fresh"] = optimised(bench, pair)
        entry["fresh"] = pair.measure(f"{second}, optimised for it alone")
    entry["gains"] = {"stale": gain(entry["stock"], entry["stale"]), "again": gain(entry["stock"], entry["again"]),
                      "fresh": gain(entry["fresh_stock"], entry["fresh"])}
    entry["recovered"] = recovered(entry["gains"])
    return entry


def recovered(gains):
    """
    The share of the fresh gain that optimising again brings, of the medians, and the least and the most that the rounds
    allow; None where the fresh one gained nothing, as there is nothing to recover.
    """
    def share(again, fresh):
        return (again - 1) / (fresh - 1) if fresh > 1 else None

    again, fresh = gains["again"], gains["fresh"]
    return {"median": share(again["median"], fresh["median"]), "low": share(again["low"], fresh["high"]),
            "high": share(again["high"], fresh["low"])}


def percent(share):
    """For people."""
    return "nothing to recover" if share is None else f"{share * 100:.0f} %"


def line(name, entry):
    """What came of one server."""
    figures = ", ".join(f"{what} {g['median']:.3f} ({g['low']:.3f} to {g['high']:.3f})"
                        for what, g in entry["gains"].items())
    share = entry["recovered"]
    return (f"{name}, {entry['first']} → {entry['second']}: gains {figures}; "
            f"recovered {percent(share['median'])} ({percent(share['low'])} to {percent(share['high'])})")


def run(asked):
    """Measures; the exit status."""
    if os.geteuid() != 0:
        raise BenchError("bench/drift has to run as root", "It starts servers under users of their own, and dyni traces them.",
                         "sudo bench/drift …")
    cpus()
    few = 1 if asked.quick else 5
    outcome = {}
    with tempfile.TemporaryDirectory(prefix="dyni-bench-") as folder, Processes() as processes:
        folder = pathlib.Path(folder)
        # Servers that are not root's have to get to their own folders in it.
        folder.chmod(0o711)
        dyni = Dyni(find(asked.dyni, BENCH.parent), folder, processes)
        bench = Bench(folder, processes, dyni, asked.rounds or few, asked.seconds or few, asked.quick, False, progress())
        for name in asked.workloads:
            outcome[name] = measured(bench, name)
            bench.progress("")
            print(line(name, outcome[name]), flush=True)
    if asked.json:
        pathlib.Path(asked.json).write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    if asked.quick:
        print("A smoke run (--quick): its figures mean nothing.")
    return 0


def main(argv):
    """The exit status."""
    asked = options(argv)
    return told("bench/drift", lambda: run(asked))
