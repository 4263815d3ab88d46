"""
How many operations a load generator has done, from what it printed.

Any sign of an error in the output is an error here: a figure from failed queries would be wrong.
"""

import csv
import re

from .errors import BenchError, tail


def number(tool, pattern, text):
    """The one number that a tool prints for its work."""
    found = re.search(pattern, text)
    if not found or int(found.group(1)) == 0:
        raise BenchError(f"{tool} did no operation", tail(text))
    return int(found.group(1))


def refuse(tool, pattern, text):
    """An error if the output shows one."""
    bad = re.search(pattern, text, re.IGNORECASE | re.MULTILINE)
    if bad:
        raise BenchError(f"{tool}: an operation failed: {bad.group(0).strip()}", tail(text))


def sysbench(text):
    """Transactions of a sysbench run."""
    refuse("sysbench", r"^.*\b(FATAL|ALERT)\b.*$", text)
    refuse("sysbench", r"^\s*reconnects:\s+[1-9].*$", text)
    return number("sysbench", r"transactions:\s+(\d+)", text)


def pgbench(text):
    """Transactions of a pgbench run."""
    refuse("pgbench", r"^.*\b(error|fatal|aborted)\b.*$", text)
    refuse("pgbench", r"^.*failed transactions: [1-9].*$", text)
    return number("pgbench", r"transactions actually processed: (\d+)", text)


def redis_benchmark(text, commands, requests):
    """Requests of a redis-benchmark run: it prints rates only, so a row for each command says that its requests are done."""
    refuse("redis-benchmark", r"^.*\berror\b.*$", text)
    rows = [row for row in csv.reader(text.splitlines()) if len(row) > 1 and row[0] != "test"]
    if len(rows) != len(commands):
        raise BenchError(f"redis-benchmark ran {len(rows)} of {len(commands)} commands", tail(text))
    return len(rows) * requests


def wrk(text):
    """Requests of a wrk run."""
    refuse("wrk", r"^.*(Socket errors|Non-2xx).*$", text)
    return number("wrk", r"(\d+) requests in", text)


def redis_info(text, field):
    """A number of redis's INFO."""
    found = re.search(rf"^{field}:(\d+)", text, re.MULTILINE)
    if not found:
        raise BenchError(f"redis does not tell {field}", tail(text))
    return int(found.group(1))
