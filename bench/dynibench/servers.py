"""
A program that is measured: how it is started, what load is put on it, and how many operations that was.

Servers listen on Unix sockets in a folder of their own, nginx on a free port of the loopback interface.
"""

import os
import pathlib
import shutil
import signal
import socket
import struct
import sys
import time

from . import parse
from .errors import BenchError, tail
from .processes import cpu_ns, ending, tree


def program(name, package, places=("/usr/sbin", "/usr/bin")):
    """The path of a program of the distribution."""
    for place in places:
        if os.access(f"{place}/{name}", os.X_OK):
            return f"{place}/{name}"
    found = shutil.which(name)
    if not found:
        raise BenchError(f"{name} is not installed", "", f"apt-get install {package}")
    return found


class Load:
    """One run of a load generator. `count` turns what it printed into operations."""

    def __init__(self, server, process, count):
        self.server, self.process, self.count = server, process, count

    def finish(self):
        """Waits for its end and says how many operations were done."""
        output = self.server.processes.finish(self.process)
        self.server.check()
        return self.count(output)

    def interrupt(self):
        """Ends one that would go on. That it still runs says that nothing has failed."""
        if self.process.poll() is not None:
            output = self.process.communicate()[0]
            raise BenchError(f"the load on {self.server} ended early with {ending(self.process.returncode)}", tail(output))
        self.server.processes.stop(self.process)
        self.server.check()


class Server:
    """A running program; subclasses say which."""

    name = ""
    stop_signal = signal.SIGTERM
    # What BOLT makes of it is known to crash.
    bolt_crashes = False

    def __init__(self, letter, folder, processes, cpus, binary=None, quick=False):
        """`cpus`: the one for the server, the one for its clients. `binary`: what runs in place of the stock file."""
        self.letter, self.folder, self.processes, self.quick = letter, pathlib.Path(folder), processes, quick
        self.server_cpu, self.client_cpu = cpus
        self.binary = binary
        self.folder.mkdir(mode=0o700)
        self.process = None
        self.touched = set()

    def __str__(self):
        return f"{self.name} {self.letter}"

    @property
    def pid(self):
        """Of the first process."""
        return self.process.pid

    @classmethod
    def stock(cls):
        """The distribution's executable."""
        raise NotImplementedError

    def start(self):
        """Sets up its data, starts it and fills it."""
        raise NotImplementedError

    def load(self, seconds):
        """Starts a load of about so many seconds; None for one that goes on until it is interrupted."""
        raise NotImplementedError

    def launch(self, argv, **options):
        """Starts the server itself."""
        with open(self.folder / "log", "a", encoding="utf-8") as log:
            self.process = self.processes.start(argv, cpu=self.server_cpu, binary=self.binary, output=log, **options)

    def client(self, argv, count):
        """Starts a load generator."""
        return Load(self, self.processes.start(argv, cpu=self.client_cpu), count)

    def log(self):
        """The end of what it wrote."""
        return tail((self.folder / "log").read_text(encoding="utf-8", errors="replace"))

    def check(self):
        """An error if it is dead."""
        if self.process.poll() is not None:
            raise BenchError(f"{self} died with {ending(self.process.returncode)}", self.log())

    def wait_ready(self, ready, seconds=60):
        """Waits until it serves."""
        end = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > end:
                raise BenchError(f"{self} does not serve after {seconds} s", self.log())
            time.sleep(0.1)

    def answers(self, argv):
        """Whether a client program gets an answer."""
        try:
            self.processes.run(argv)
            return True
        except BenchError:
            return False

    def cpu_ns(self):
        """CPU time so far."""
        return cpu_ns(self.pid)

    def family(self):
        """PIDs of its processes."""
        return set(tree(self.pid))

    def stop(self):
        """Ends it, and removes the perf maps that dyni wrote for it."""
        if self.process is None:
            return
        self.touched.update(self.family())
        self.processes.stop(self.process, self.stop_signal)
        for pid in self.touched:
            pathlib.Path(f"/tmp/perf-{pid}.map").unlink(missing_ok=True)


class Redis(Server):
    """Six commands, in a row, 16 at a time on each of eight connections."""

    name = "redis"
    commands = ("get", "set", "hset", "lpush", "rpop", "zadd")

    @classmethod
    def stock(cls):
        return program("redis-server", "redis-server")

    def start(self):
        self.socket = self.folder / "socket"
        self.benchmark = program("redis-benchmark", "redis-tools")
        self.cli = [program("redis-cli", "redis-tools"), "-s", self.socket]
        self.launch([self.stock(), "--port", "0", "--unixsocket", self.socket, "--save", "", "--dir", self.folder])
        self.wait_ready(lambda: self.answers([*self.cli, "ping"]))
        # A list that is as long as the loads' `rpop` may ever need, and keys to find.
        self.processes.run([self.benchmark, "-s", self.socket, "-t", "set,lpush", "-r", "100000", "-n", "200000", "-P", "16",
                            "-q"])
        # Requests of each command a second; each load corrects it for the next.
        self.rate = 30_000

    def load(self, seconds):
        requests = max(int(self.rate * (seconds or 10)), 1000)
        argv = [self.benchmark, "-s", self.socket, "-t", ",".join(self.commands), "-r", "100000", "-n", requests,
                "-c", "8", "-P", "16", "--csv"]
        if seconds is None:
            return self.client([*argv, "-l"], None)
        began = time.monotonic()

        def count(output):
            self.rate = requests / (time.monotonic() - began)
            errors = parse.redis_info(self.processes.run([*self.cli, "info", "stats"]), "total_error_replies")
            if errors:
                raise BenchError(f"{self} answered {errors} commands with an error")
            return parse.redis_benchmark(output, self.commands, requests)

        return self.client(argv, count)


class Nginx(Server):
    """A small static page, by way of a rewrite, over eight connections that are kept."""

    name = "nginx"

    @classmethod
    def stock(cls):
        return program("nginx", "nginx")

    def start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pages = self.folder / "pages"
        pages.mkdir()
        (pages / "index.html").write_text("<p>" + "x" * 600 + "</p>\n")
        # The workers run as nobody.
        for folder in (self.folder, pages):
            folder.chmod(0o755)
        temporary = "".join(f"  {kind}_temp_path {self.folder}/{kind};\n"
                            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (self.folder / "conf").write_text(
            f"worker_processes 1; daemon off; user nobody nogroup;\npid {self.folder}/pid; error_log {self.folder}/log;\n"
            "events { worker_connections 256; }\n"
            f"http {{\n{temporary}  access_log off; keepalive_requests 1000000000; types {{ text/html html; }}\n"
            f"  server {{\n    listen 127.0.0.1:{port}; root {pages};\n"
            "    location / {\n      add_header X-Kind page; if ($http_x_none) { return 403; }\n"
            "      rewrite ^/r/(.*)$ /$1 last;\n    }\n  }\n}\n")
        self.wrk = program("wrk", "wrk")
        self.url = f"http://127.0.0.1:{port}/r/index.html"
        self.launch([self.stock(), "-c", self.folder / "conf", "-p", self.folder])

        def listens():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        self.wait_ready(listens)

    def load(self, seconds):
        # wrk has no "until it is stopped".
        return self.client([self.wrk, "-t1", "-c8", f"-d{seconds or 86400}s", self.url], parse.wrk)


class Python(Server):
    """The interpreter at work on a program that needs nothing else, and counts its own rounds."""

    name = "python"

    @classmethod
    def stock(cls):
        return os.path.realpath(program("python3", "python3"))

    def start(self):
        self.counter = self.folder / "rounds"
        self.counter.write_bytes(bytes(8))
        self.launch([self.stock(), "-I", pathlib.Path(__file__).with_name("pyloop.py"), self.counter])
        self.wait_ready(lambda: self.rounds() > 0)

    def rounds(self):
        """How many it has done."""
        return struct.unpack("<Q", self.counter.read_bytes())[0]

    def load(self, seconds):
        before = self.rounds()
        # The load is a wait: what is done in the moments around it is a few hundredths of a per cent.
        wait = [sys.executable, "-I", "-c", f"import time; time.sleep({seconds or 86400})"]
        return self.client(wait, lambda _: self.rounds() - before)
