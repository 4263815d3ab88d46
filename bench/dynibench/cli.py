"""The command line: what is measured, in which order, and where the figures go."""

import argparse
import contextlib
import os
import pathlib
import signal
import sys
import tempfile

from . import compare, host, render, results
from .databases import MariaDB, MariaDBPoint, MariaDBWrite, Postgres
from .dyni import Dyni, find
from .errors import BenchError, Skipped
from .pair import Bench, cpus
from .processes import Processes
from .servers import Nginx, Python, Redis
from .studies import STUDIES

WORKLOADS = {kind.name: kind for kind in (MariaDB, MariaDBPoint, MariaDBWrite, Postgres, Redis, Nginx, Python)}
# Studies are long; these are the servers with the most to gain.
STUDIED = ["postgres", "mariadb-ro"]
BENCH = pathlib.Path(__file__).resolve().parent.parent

DESCRIPTION = """\
Measures what `dyni optimize` brings to stock servers of the distribution, beside its peers.

Two servers of the same program, A and B, run at once on one CPU, their clients on another. The figure is CPU time per
operation, A over B: first with B stock, then with B optimised; the gain is the second over the first. A failed operation,
a dead server or a failing command is an error, never a figure.

Writes the tables of bench/README.md and the plots in bench/plots. Has to run as root, on Debian with:
  apt-get install mariadb-server sysbench postgresql postgresql-contrib redis-server redis-tools nginx wrk linux-perf bolt-19
"""


def listed(names):
    """An option that takes some of these names, with commas between them."""
    def parse(text):
        words = [word for word in text.split(",") if word]
        for word in words:
            if word not in names:
                raise argparse.ArgumentTypeError(f"there is no {word!r}; there are {', '.join(names)}")
        return list(dict.fromkeys(words))
    return parse


def positive(text):
    """A number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def options(argv):
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="bench/run", description=DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", metavar="LIST", type=listed(WORKLOADS),
        help=f"of {', '.join(WORKLOADS)} (default: all; for a study {' and '.join(STUDIED)})")
    add("--rounds", metavar="N", type=positive, help="rounds before and after (default: 5)")
    add("--seconds", metavar="S", type=positive, help="length of a round (default: 5)")
    add("--quick", action="store_true",
        help="one round of a second on little data: shows that all works; its figures mean nothing and are not published")
    add("--peer", metavar="LIST", type=listed(compare.PEERS),
        help="what is done to B: dyni, bolt (BOLT's binary, from clock samples), none (A against A); default: all three")
    add("--study", metavar="LIST", type=listed(STUDIES),
        help="instead: passes (what each brings), length (of the recording), method (clock samples, counts, LBR)")
    add("--dyni", metavar="PATH", help="the dyni to measure (default: target/release/dyni, else the one in PATH)")
    add("--json", metavar="FILE", help="keep the raw results there; those of an earlier run are added to")
    add("--render", metavar="FILE", help="measure nothing: write tables and plots from such a file")
    asked = parser.parse_args(argv)
    if asked.quick and (asked.rounds or asked.seconds):
        parser.error("--quick is one round of a second; leave out --rounds and --seconds")
    if asked.study and asked.peer:
        parser.error("--study and --peer are two runs")
    return asked


def progress():
    """A line that says what goes on, on a terminal."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda words: print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)


def publish(outcome):
    """Tables into README.md, plots beside it."""
    page = BENCH / "README.md"
    text = page.read_text(encoding="utf-8")
    for name, body in render.blocks(outcome).items():
        text = render.replace(text, name, body)
    page.write_text(text, encoding="utf-8")
    written = [page]
    for name, picture in render.plots(outcome).items():
        (BENCH / "plots").mkdir(exist_ok=True)
        (BENCH / "plots" / name).write_text(picture, encoding="utf-8")
        written.append(BENCH / "plots" / name)
    print("written: " + ", ".join(str(path) for path in written))


def one(bench, what, measure, kind):
    """A measurement, or why there is none: the others go on."""
    try:
        entry = measure(bench, kind)
        word = render.figure(entry["gain"]) if "gain" in entry else "done"
    except Skipped as reason:
        entry = {"skipped": str(reason)}
        word = f"SKIPPED: {reason}"
    except BenchError as error:
        entry = {"failed": str(error)}
        word = f"FAILED: {error}"
    bench.progress("")
    print(f"{kind.name}, {what}: {word}", flush=True)
    return entry


def measure_all(bench, asked, outcome):
    """Everything that was asked for, one after the other; false if something failed."""
    good = True
    for name in asked.workloads or (STUDIED if asked.study else WORKLOADS):
        for what in asked.study or asked.peer or compare.PEERS:
            entry = one(bench, what, (STUDIES if asked.study else compare.PEERS)[what], WORKLOADS[name])
            good &= "failed" not in entry
            if not asked.study:
                outcome["workloads"].setdefault(name, {})[what] = entry
            elif "failed" not in entry:
                outcome[what][name] = entry
            if asked.json:
                results.save(asked.json, outcome)
    return good


def absent(outcome):
    """Workloads that the table would lack: a run of some must not take the others' figures out of README.md."""
    return [name for name in WORKLOADS if "gain" not in outcome["workloads"].get(name, {}).get("dyni", {})]


@contextlib.contextmanager
def terminable():
    """SIGTERM and SIGHUP end the run as Ctrl-C does: with everything put away."""
    def end(number, _):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(asked):
    """Measures and publishes; the exit status."""
    if asked.render:
        outcome = results.load(asked.render)
        if outcome["settings"]["quick"]:
            raise BenchError(f"{asked.render} is of a smoke run (--quick)", "Its figures mean nothing.")
        publish(outcome)
        return 0
    if os.geteuid() != 0:
        raise BenchError("bench/run has to run as root", "It starts servers under users of their own, and dyni traces them.",
                         "sudo bench/run …")
    cpus()
    with tempfile.TemporaryDirectory(prefix="dyni-bench-") as folder, Processes() as processes:
        folder = pathlib.Path(folder)
        # Servers that are not root's have to get to their own folders in it.
        folder.chmod(0o711)
        dyni = Dyni(find(asked.dyni, BENCH.parent), folder, processes)
        settings = {"rounds": asked.rounds or (1 if asked.quick else 5), "seconds": asked.seconds or (1 if asked.quick else 5),
                    "quick": asked.quick}
        outcome = results.continued(asked.json, results.fresh(host.facts(), dyni.version(), settings))
        print(render.sentence(outcome) + (" A smoke run: its figures mean nothing." if asked.quick else ""), flush=True)
        bench = Bench(folder, processes, dyni, settings["rounds"], settings["seconds"], asked.quick,
                      bool(asked.workloads and asked.peer), progress())
        good = measure_all(bench, asked, outcome)
    for body in render.blocks(outcome).values():
        print("\n" + render.plain(body))
    if asked.quick:
        print("\nA smoke run (--quick): nothing was written to README.md.")
    elif not asked.study and absent(outcome):
        print(f"\nREADME.md keeps its table: dyni's gain is missing here for {', '.join(absent(outcome))}.\n"
              "Measure into one --json FILE until none is, or have it written as it is with --render FILE.")
    else:
        publish(outcome)
    return 0 if good else 1


def told(name, work):
    """The exit status of what a command does; its errors are for people."""
    try:
        with terminable():
            return work()
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; all that it started is stopped", file=sys.stderr)
        return 130


def main(argv):
    """The exit status."""
    asked = options(argv)
    return told("bench/run", lambda: run(asked))
