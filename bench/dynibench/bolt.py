"""The peer: BOLT on the same stock binary, from clock samples of the same load."""

import os
import shutil

from .errors import BenchError, Skipped
from .servers import program

OPTIONS = ("-reorder-blocks=ext-tsp", "-split-functions", "-split-all-cold", "-icf=1", "-use-gnu-stack")


def tools():
    """perf, perf2bolt and llvm-bolt; skipped if this host has them not."""
    found = []
    for name in ("perf2bolt", "llvm-bolt"):
        # Not by Debian's names in PATH: what is called perf2bolt-19 behaves as llvm-bolt.
        path = shutil.which(name, path="/usr/lib/llvm-19/bin") or shutil.which(name)
        if not path:
            raise Skipped(f"there is no {name} (apt-get install bolt-19)")
        found.append(path)
    try:
        return program("perf", "linux-perf"), *found
    except BenchError as error:
        raise Skipped("there is no perf (apt-get install linux-perf)") from error


def record(server, folder, processes, seconds):
    """Clock samples of a server under load: the file that they are in."""
    data = folder / f"{server.name}.perf"
    pids = ",".join(str(pid) for pid in sorted(server.family()))
    processes.run([tools()[0], "record", "-q", "-e", "cpu-clock:u", "-F", "5000", "-p", pids, "-o", data,
                   "--", "sleep", seconds])
    return data


def lay_out(stock, data, folder, processes):
    """The binary as BOLT lays it out."""
    _, perf2bolt, llvm_bolt = tools()
    stock = os.path.realpath(stock)
    profile, result = data.with_suffix(".fdata"), folder / f"{os.path.basename(stock)}.bolted"
    processes.run([perf2bolt, "-nl", "--allow-stripped", "-p", data, "-o", profile, stock])
    processes.run([llvm_bolt, stock, "--allow-stripped", "-o", result, f"-data={profile}", *OPTIONS])
    result.chmod(0o755)
    return str(result)
