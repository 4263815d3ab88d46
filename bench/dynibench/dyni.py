"""The dyni that is measured: each call of it, and what its JSON says."""

import json
import os
import pathlib
import shutil
import subprocess

from .errors import BenchError, tail
from .host import commit_of, digest
from .processes import ending


def find(path, checkout):
    """`--dyni`, else the release build of this checkout, else the one in PATH."""
    built = checkout / "target/release/dyni"
    found = path or (str(built) if os.access(built, os.X_OK) else shutil.which("dyni"))
    if not found or not shutil.which(found):
        raise BenchError(
            f"{path} is no program" if path else "there is no dyni", "" if path else f"Neither {built} nor one in PATH.",
            "cargo build --release, or name one with --dyni PATH")
    return str(pathlib.Path(shutil.which(found)).resolve())


class Dyni:
    """Runs dyni with an archive of its own, so that the host's is left alone."""

    def __init__(self, path, folder, processes):
        self.path, self.processes = path, processes
        self.environment = {**os.environ, "DYNI_ARCHIVE": str(folder / "archive.db")}

    def version(self):
        """What it is: its own word, the commit of the checkout it lies in, and a digest of the file."""
        text = self.processes.run([self.path, "--version"]).split()
        return {"version": text[-1], "commit": commit_of(self.path), "digest": digest(self.path)}

    def call(self, *args):
        """One command with `--json`; any failure of it is an error."""
        argv = [self.path, *map(str, args), "--json", "-q"]
        process = self.processes.start(argv, stderr=subprocess.PIPE, env=self.environment)
        output, errors = process.communicate()
        self.processes.running.remove(process)
        if process.returncode:
            raise BenchError(f"dyni {args[0]} failed with {ending(process.returncode)}",
                             f"{' '.join(argv)}\n{tail(errors or output)}")
        try:
            return json.loads(output)
        except ValueError:
            raise BenchError(f"dyni {args[0]} printed no JSON", tail(output)) from None

    def optimize(self, server, seconds):
        """What `dyni optimize` says of a server under load."""
        return noted(server, self.call("optimize", "-p", server.pid, "--duration", f"{seconds}s"))

    def record(self, server, seconds, method="auto"):
        """The id of a new profile."""
        return self.call("record", "-p", server.pid, "--duration", f"{seconds}s", "--method", method)["profile"]

    def analyze(self, profile, passes="all"):
        """A plan, of the passes named."""
        plan = self.call("analyze", profile, "--passes", passes)
        if not plan["plan"]:
            raise BenchError(f"dyni made no plan for {plan['program']}", f"passes: {passes}")
        return plan

    def apply(self, server, plan):
        """Applies a plan; all of the program has to take it."""
        done = noted(server, self.call("apply", "-p", server.pid, "--plan", plan["plan"]))
        if done["state"] != "dynimized":
            raise BenchError(f"{server} is {done['state']} after the apply", json.dumps(done["left_out"]))

    def undo(self, server):
        """Takes it out again."""
        self.call("undo", "-p", server.pid)

    def samplers(self):
        """Which of the host's samplers work: `{id: None or why not}`."""
        return samplers(self.call("doctor"))


def samplers(doctor):
    """The same from `dyni doctor --json`."""
    return {fact["id"]: None if fact["verdict"] == "ok" else fact["found"]
            for fact in doctor["host"] if fact["id"] in ("lbr", "cycles", "clock")}


def noted(server, done):
    """Remembers which processes were changed, whose perf maps are to be removed."""
    server.touched.update(process["pid"] for process in done["processes"])
    return done
