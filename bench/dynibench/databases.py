"""MariaDB under sysbench and PostgreSQL under pgbench; see `servers`."""

import glob
import pwd
import re
import shutil
import signal

from . import parse
from .errors import BenchError
from .servers import Server, program


class MariaDB(Server):
    """sysbench's reading transactions: point queries, ranges, sums, sorts, distinct values."""

    name = "mariadb-ro"
    script = "oltp_read_only"
    ignored_errors = "none"

    @classmethod
    def stock(cls):
        return program("mariadbd", "mariadb-server")

    def start(self):
        self.sysbench = program("sysbench", "sysbench")
        self.socket, data = self.folder / "socket", self.folder / "data"
        self.processes.run([program("mariadb-install-db", "mariadb-server"), "--no-defaults", "--user=root",
                            f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db"])
        self.launch([self.stock(), "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={self.socket}",
                     "--skip-networking", "--innodb-buffer-pool-size=512M", "--innodb-flush-log-at-trx-commit=0",
                     "--basedir=/usr", "--lc-messages-dir=/usr/share/mysql", f"--pid-file={self.folder}/pid"])
        client = [program("mariadb", "mariadb-client"), "--no-defaults", "-uroot", "-S", self.socket, "-e"]
        self.wait_ready(lambda: self.answers([*client, "select 1"]))
        self.processes.run([*client, "create database sbtest"])
        self.processes.run(self.argv("prepare", 1))

    def argv(self, verb, seconds):
        """A sysbench command."""
        rows = 10_000 if self.quick else 100_000
        return [self.sysbench, self.script, f"--mysql-socket={self.socket}", "--mysql-user=root", "--tables=4",
                f"--table-size={rows}", "--threads=2", f"--time={seconds}", f"--mysql-ignore-errors={self.ignored_errors}",
                verb]

    def load(self, seconds):
        # To sysbench, 0 is for ever.
        return self.client(self.argv("run", seconds or 0), parse.sysbench)


class MariaDBPoint(MariaDB):
    """One row by its key."""

    name = "mariadb-point"
    script = "oltp_point_select"


class MariaDBWrite(MariaDB):
    """Reads and writes."""

    name = "mariadb-rw"
    script = "oltp_read_write"
    # Two transactions that lock the same rows in turn are a deadlock in any MariaDB; sysbench repeats one of them.
    ignored_errors = "1213"


class Postgres(Server):
    """pgbench's reading transactions over two connections."""

    name = "postgres"
    # pgbench's option for the transactions.
    script = "-S"
    # A fast shutdown; SIGTERM would wait for the clients.
    stop_signal = signal.SIGINT
    bolt_crashes = True

    @classmethod
    def stock(cls):
        found = glob.glob("/usr/lib/postgresql/*/bin/postgres")
        if not found:
            raise BenchError("postgres is not installed", "", "apt-get install postgresql postgresql-contrib")
        return max(found, key=lambda path: int(re.search(r"/(\d+)/", path).group(1)))

    def start(self):
        # postgres refuses to run as root.
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            raise BenchError("there is no user postgres", "", "apt-get install postgresql") from None
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": "/"}
        folder, data = self.stock().rsplit("/", 1)[0], self.folder / "data"
        data.mkdir(mode=0o700)
        for path in (self.folder, data):
            shutil.chown(path, user.pw_uid, user.pw_gid)
        self.processes.run([f"{folder}/initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"], **identity)
        self.launch([self.stock(), "-D", data, "-c", f"unix_socket_directories={self.folder}", "-c", "listen_addresses=",
                     "-c", "fsync=off", "-c", "shared_buffers=512MB"], **identity)
        self.wait_ready(lambda: self.answers([f"{folder}/psql", *self.place(), "-c", "select 1", "postgres"]))
        self.pgbench = f"{folder}/pgbench"
        self.processes.run([self.pgbench, *self.place(), "-i", "-q", "-s", "1" if self.quick else "10", "postgres"])

    def place(self):
        """Where a client finds it."""
        return ["-h", str(self.folder), "-U", "postgres"]

    def load(self, seconds):
        return self.client([self.pgbench, *self.place(), "-n", self.script, "-c", "2", "-T", seconds or 86400, "postgres"],
                           parse.pgbench)
