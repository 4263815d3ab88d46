"""
Processes that this benchmark starts: pinned to a CPU, remembered by PID, and stopped by it, whatever happens.

Each is started in a session of its own, so that Ctrl-C reaches the benchmark alone, which then ends them in order.
"""

import os
import signal
import subprocess
import time

from .errors import BenchError, tail

# The scheduler's CPU clock of a whole process, as clock_getcpuclockid(3) computes it: exact, unlike the ticks in /proc.
PROCESS_CLOCK = 2
# What may end the benchmark from outside.
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def stat(pid):
    """The fields of /proc/PID/stat behind the name, of which the first is the state (field 3 in proc(5))."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rsplit(")", 1)[1].split()


def tree(pid):
    """A process and its descendants: `{pid: start time}`, by which a PID that was given anew is told."""
    found, todo = {}, [pid]
    while todo:
        one = todo.pop()
        try:
            found[one] = stat(one)[19]
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children", encoding="ascii") as file:
                    todo.extend(int(child) for child in file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def cpu_ns(pid):
    """CPU time of a process, its descendants, and those of them that were waited for."""
    total = 0
    for one in tree(pid):
        try:
            total += time.clock_gettime_ns((~one << 3) | PROCESS_CLOCK)
            fields = stat(one)
            total += (int(fields[13]) + int(fields[14])) * TICK_NS
        except OSError:
            continue
    return total


class Processes:
    """All processes that were started and not yet stopped. As a context, stops them at its end."""

    def __init__(self):
        self.running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A second Ctrl-C must not leave servers behind.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
        try:
            for process in reversed(self.running[:]):
                self.stop(process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, argv, cpu=None, binary=None, output=subprocess.PIPE, **options):
        """Starts a program, on one CPU if asked; `binary` runs in its place, but under its name."""
        argv = [str(arg) for arg in argv]
        options.setdefault("stderr", subprocess.STDOUT)
        # Ctrl-C between the start and the note of it would leave a process behind.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

        def child():
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})

        try:
            process = subprocess.Popen(
                argv, executable=binary, stdin=subprocess.DEVNULL, stdout=output, text=True, errors="replace",
                start_new_session=True, preexec_fn=child, **options)
            self.running.append(process)
            return process
        except OSError as error:
            raise BenchError(f"{argv[0]} can't be started", str(error)) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def finish(self, process):
        """Waits for the end, which has to be a good one, and returns what was printed."""
        output = process.communicate()[0]
        self.running.remove(process)
        if process.returncode:
            raise BenchError(f"{os.path.basename(process.args[0])} failed with {ending(process.returncode)}",
                             f"{' '.join(process.args)}\n{tail(output or '')}")
        return output

    def run(self, argv, **options):
        """Runs a program to its end and returns what it printed."""
        return self.finish(self.start(argv, **options))

    def stop(self, process, sign=signal.SIGTERM, patience=30):
        """Ends a process; one that does not listen, and whatever it leaves behind, is killed."""
        family = tree(process.pid) if process.poll() is None else {}
        if process.poll() is None:
            process.send_signal(sign)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout:
            process.stdout.close()
        for pid, began in family.items():
            try:
                if pid != process.pid and stat(pid)[19] == began:
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        if process in self.running:
            self.running.remove(process)


def ending(code):
    """An exit status in words."""
    return f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
