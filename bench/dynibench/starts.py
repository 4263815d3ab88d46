"""
How programs start: with their files in memory or not, plain, with the daemon that reads ahead for them, and by `dyni exec`.

The figure of a cold start is the share of the gap between cold and warm that reading ahead closes; of a warm one, the ratio to a
plain start, and how many page faults are left. A compilation is measured by the compiler's own user time.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time

from .cli import BENCH, listed, positive, progress, told
from .dyni import Dyni, find
from .errors import BenchError
from .processes import Processes

STARTS = ("clang++", "node", "perf", "gdb", "python3", "mariadbd")
# How long the daemon has to come up, s.
PATIENCE = 10
# A file of twenty lines that uses the standard library, and one that keeps a compiler busy for some seconds.
SMALL = """\
#include <algorithm>
#include <iostream>
#include <map>
#include <string>
#include <vector>

int main()
{
    std::map<std::string, int> counts;
    std::vector<std::string> words;
    for (std::string word; std::cin >> word;) {
        counts[word]++;
        words.push_back(word);
    }
    std::sort(words.begin(), words.end());
    for (const auto &[word, count] : counts)
        std::cout << word << ' ' << count << '\\n';
    std::cout << words.size() << '\\n';
    return words.empty();
}
"""
LARGE = """\
#include <algorithm>
#include <functional>
#include <iostream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>
""" + "".join(f"""
std::string f{i}(const std::string &text)
{{
    std::map<std::string, std::vector<int>> m; std::set<std::pair<long, std::string>> s; std::unordered_map<long, std::string> u;
    std::regex r("([a-z]+){i}([0-9]*)"); std::smatch found; std::stringstream out;
    if (std::regex_search(text, found, r)) for (auto &one : found) m[one.str()].push_back({i});
    for (auto &[k, v] : m) {{ std::sort(v.begin(), v.end()); s.emplace(v.size(), k); u[v.size()] = k; out << k; }}
    return out.str();
}}
""" for i in range(12))


class Start:
    """One way to start one program, again and again."""

    def __init__(self, argv, stdin=None, env=None):
        self.argv, self.stdin, self.env = [str(arg) for arg in argv], stdin, env or dict(os.environ)

    def by(self, *before, env=None):
        """The same, started by another command."""
        return Start([*before, *self.argv], self.stdin, env or self.env)

    def once(self):
        """Starts it and waits for its end: seconds, user seconds, page faults."""
        null = os.open(self.stdin or "/dev/null", os.O_RDONLY)
        sink = os.open("/dev/null", os.O_WRONLY)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, sink, 1), (os.POSIX_SPAWN_DUP2, sink, 2)]
            began = time.perf_counter()
            pid = os.posix_spawnp(self.argv[0], self.argv, self.env, file_actions=actions)
            _, status, used = os.wait4(pid, 0)
            took = time.perf_counter() - began
        finally:
            os.close(null)
            os.close(sink)
        if status:
            raise BenchError(f"{self.argv[0]} ended with status {os.waitstatus_to_exitcode(status)}", " ".join(self.argv))
        return {"seconds": took, "user": used.ru_utime, "faults": used.ru_minflt + used.ru_majflt}


def commands(folder, names):
    """What is started, by name; a program that is not there is left out, and said to be."""
    (folder / "empty.cpp").write_text("", encoding="utf-8")
    (folder / "query.sql").write_text("select 1;\n", encoding="utf-8")
    data = folder / "data"
    argvs = {
        "clang++": ["clang++", "-c", "-o", folder / "empty.o", folder / "empty.cpp"],
        "node": ["node", "-e", "1"],
        "perf": ["perf", "--version"],
        "gdb": ["gdb", "-nx", "-batch"],
        "python3": ["/usr/bin/python3", "-c", "import asyncio"],
        "mariadbd": ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--bootstrap", "--console"],
    }
    found = {}
    for name in names:
        if not shutil.which(str(argvs[name][0])):
            print(f"{name}: SKIPPED: it is not installed", flush=True)
            continue
        found[name] = Start(argvs[name], folder / "query.sql" if name == "mariadbd" else None)
    return found


def forget_files():
    """The kernel forgets all that it holds of files and does not need."""
    os.sync()
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


@contextlib.contextmanager
def daemon(processes, dyni, folder):
    """The daemon, with nothing to optimise: it reads ahead."""
    socket, config = folder / "control.sock", folder / "dyni.conf"
    config.write_text("[exeList]\nno-program-of-this-host\n", encoding="utf-8")
    running = processes.start([dyni.path, "daemon", "--socket", socket, "--config", config, "--log", folder / "log"],
                              env=dyni.environment)
    try:
        until = time.monotonic() + PATIENCE
        while not socket.exists():
            if time.monotonic() > until or running.poll() is not None:
                raise BenchError("the daemon does not come up", (folder / "log").read_text(encoding="utf-8")[-2000:])
            time.sleep(0.05)
        time.sleep(0.5)
        yield
    finally:
        processes.stop(running)


def medians(runs):
    """Of each figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measured(bench, name, start):
    """All of one program's starts."""
    processes, dyni, folder, rounds, tell = bench
    by_exec = start.by(dyni.path, "exec", "--", env=dyni.environment)
    tell(f"{name}: learning")
    start.once()
    for _ in range(2):
        start.by(dyni.path, "exec", "--learn", "--", env=dyni.environment).once()
    runs = {}

    def cold(what, one):
        forget_files()
        # dyni itself is in use on a host that has it.
        processes.run([dyni.path, "--version"])
        runs.setdefault(f"cold{what}", []).append(one.once())

    def warm(what, one):
        runs.setdefault(f"warm{what}", []).append(one.once())

    for turn in range(rounds):
        tell(f"{name}: round {turn + 1} of {rounds}")
        cold("", start)
        cold(" exec", by_exec)
        for _ in range(3):
            warm("", start)
            warm(" exec", by_exec)
        with daemon(processes, dyni, folder):
            cold(" daemon", start)
            for _ in range(3):
                warm(" daemon", start)
    return {what: medians(of) for what, of in runs.items()}


def closed(entry, how):
    """The share of the gap between cold and warm that is closed."""
    cold, warm = entry["cold"]["seconds"], entry["warm"]["seconds"]
    return (cold - entry[f"cold {how}"]["seconds"]) / (cold - warm) if cold > warm else None


def row(name, entry):
    """A line of the table."""
    def ms(what):
        return f"{entry[what]['seconds'] * 1000:.0f}"

    def share(how):
        gap = closed(entry, how)
        return "no gap" if gap is None else f"{gap:.2f}"

    def ratio(how):
        return f"{entry[f'warm {how}']['seconds'] / entry['warm']['seconds']:.3f}"

    faults = 1 - entry["warm exec"]["faults"] / entry["warm"]["faults"]
    return (f"| {name} | {ms('cold')} | {ms('warm')} | {ms('cold daemon')} | **{share('daemon')}** | {ms('cold exec')} | "
            f"{share('exec')} | {ratio('daemon')} | {ratio('exec')} | {faults * 100:+.0f} % |")


HEAD = """\
| program | cold, ms | warm, ms | cold with the daemon, ms | closes | cold by dyni exec, ms | closes | warm with the daemon | \
warm by dyni exec | page faults, warm, by dyni exec |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def compiled(bench):
    """User time of a small compilation: plain, by `dyni exec` with its usual patience, and with all it wants."""
    processes, dyni, folder, rounds, tell = bench
    small, large = folder / "small.cpp", folder / "large.cpp"
    small.write_text(SMALL, encoding="utf-8")
    large.write_text(LARGE, encoding="utf-8")
    compile_ = ["clang++", "-O2", "-c", "-o", folder / "out.o"]
    for turn in range(4):
        tell(f"clang++ -O2: learning, {turn + 1} of 4")
        running = processes.start([*compile_, large])
        time.sleep(0.2)
        dyni.call("record", "-p", running.pid, "--duration", "3s")
        processes.finish(running)
    dyni.call("analyze")
    start, runs = Start([*compile_, small]), {}
    ways = {"plain": start, "exec": start.by(dyni.path, "exec", "--", env=dyni.environment),
            "exec, waiting": start.by(dyni.path, "exec", "--wait", "5s", "--", env=dyni.environment)}
    for turn in range(3 * rounds):
        tell(f"clang++ -O2: round {turn + 1} of {3 * rounds}")
        for what, way in ways.items():
            runs.setdefault(what, []).append(way.once())
    return {what: medians(of) for what, of in runs.items()}


def compile_lines(entry):
    """For people."""
    plain = entry["plain"]
    for what, one in entry.items():
        yield (f"clang++ -O2, {what}: user {one['user'] * 1000:.0f} ms ({plain['user'] / one['user']:.3f}), "
               f"wall {one['seconds'] * 1000:.0f} ms ({plain['seconds'] / one['seconds']:.3f})")


def options(argv):
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="bench/starts", description=__doc__.strip().splitlines()[0])
    add = parser.add_argument
    names = (*STARTS, "compile")
    add("--workloads", metavar="LIST", type=listed(names), default=list(names), help=f"of {', '.join(names)} (default: all)")
    add("--rounds", metavar="N", type=positive, default=5, help="how often (default: 5)")
    add("--dyni", metavar="PATH", help="the dyni to measure (default: target/release/dyni, else the one in PATH)")
    add("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(argv)


def run(asked):
    """Measures; the exit status."""
    if os.geteuid() != 0:
        raise BenchError("bench/starts has to run as root", "It makes the kernel forget files, and the daemon read ahead for all.",
                         "sudo bench/starts …")
    outcome, tell = {}, progress()
    with tempfile.TemporaryDirectory(prefix="dyni-bench-") as folder, Processes() as processes:
        folder = pathlib.Path(folder)
        bench = (processes, Dyni(find(asked.dyni, BENCH.parent), folder, processes), folder, asked.rounds, tell)
        starts = commands(folder, [name for name in asked.workloads if name != "compile"])
        if "mariadbd" in starts:
            processes.run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder / 'data'}"])
        if starts:
            print(HEAD, flush=True)
        for name, start in starts.items():
            outcome[name] = measured(bench, name, start)
            tell("")
            print(row(name, outcome[name]), flush=True)
        if "compile" in asked.workloads:
            outcome["compile"] = compiled(bench)
            tell("")
            print("", *compile_lines(outcome["compile"]), sep="\n", flush=True)
    if asked.json:
        pathlib.Path(asked.json).write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv):
    """The exit status."""
    asked = options(argv)
    return told("bench/starts", lambda: run(asked))
