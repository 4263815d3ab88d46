"""Lets gdb see through the code that dyni has written into a program: names and whole backtraces.

Load it by a line in ~/.gdbinit or, for all users, in /etc/gdb/gdbinit:

    source /path/to/share/gdb/dyni.py

Whenever gdb attaches to a process, `dyni symbols` is asked for the symbols and call frames of the copies in it. The
command `dyni` asks again. dyni is looked for in PATH; the environment variable DYNI names another one.
Neither gdb nor dyni changes anything in the process for that.
"""

import json
import os
import shutil
import subprocess
import tempfile

import gdb


class Symbols:
    """The symbol files that were loaded, one for each inferior that holds copies."""

    def __init__(self):
        self.folder = None
        # By the inferior's number: to what it was attached, and the file or None.
        self.known = {}

    def on_stop(self, _event):
        """Looks at an inferior when it stops for the first time after an attach."""
        inferior = gdb.selected_inferior()
        attachment = attachment_of(inferior)
        if attachment is not None and self.known.get(inferior.num, (None,))[0] != attachment:
            self.load(inferior, attachment)

    def load(self, inferior, attachment):
        """Replaces what is known of an inferior; the number of names, or None after a complaint."""
        _, old = self.known.pop(inferior.num, (None, None))
        if old is not None:
            gdb.execute(f'remove-symbol-file "{old}"', to_string=True)
            os.unlink(old)
        # Also if it fails now: a stop at every breakpoint is no reason to fail again.
        self.known[inferior.num] = (attachment, None)
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="dyni-gdb-")
        path = os.path.join(self.folder.name, f"{inferior.pid}.symbols")
        report = ask(inferior.pid, path)
        if report is None:
            return None
        if report["file"] is None:
            return 0
        gdb.execute(f'add-symbol-file "{path}"', from_tty=False, to_string=True)
        self.known[inferior.num] = (attachment, path)
        return sum(process["symbols"] for process in report["processes"])


def attachment_of(inferior):
    """Something that differs between any two attaches to processes of this host; None for anything else, as a core."""
    if not inferior.is_valid() or inferior.pid == 0 or not inferior.was_attached:
        return None
    connection = getattr(inferior, "connection", None)
    if connection is not None and connection.type != "native":
        return None
    return (inferior.pid, connection.num if connection is not None else 0)


def ask(pid, path):
    """Has dyni write the symbol file of a process; its report, or None after a complaint."""
    command = os.environ.get("DYNI") or shutil.which("dyni")
    if command is None:
        return complain("not found in PATH; set the environment variable DYNI to where it is")
    arguments = [command, "symbols", "-p", str(pid), "-o", path, "--json"]
    try:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        report = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return complain(f"{command} could not be asked: {error}")
    if done.returncode != 0:
        return complain(report["error"]["message"])
    return report


def complain(text):
    """Says why copies stay without names."""
    gdb.write(f"dyni: {text}\n", gdb.STDERR)


class Command(gdb.Command):
    """Load names and call frames of the code that dyni has written into the program."""

    def __init__(self):
        super().__init__("dyni", gdb.COMMAND_FILES)

    def invoke(self, _argument, _from_tty):
        """Runs it."""
        inferior = gdb.selected_inferior()
        attachment = attachment_of(inferior)
        if attachment is None:
            complain("attach to a process of this host first")
            return
        names = SYMBOLS.load(inferior, attachment)
        if names is not None:
            gdb.write(f"{names} names of copies\n" if names else "the program holds no copies\n")


SYMBOLS = Symbols()
Command()
gdb.events.stop.connect(SYMBOLS.on_stop)
# Where it is loaded after the attach, there has been the stop already.
SYMBOLS.on_stop(None)
