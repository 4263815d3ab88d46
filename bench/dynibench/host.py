"""What machine and what build this is: without that a figure says nothing."""

import hashlib
import os
import platform
import re
import subprocess
import time


def facts():
    """Date, system, kernel, processor and number of CPUs."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = processor(file.read())
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        system = "Linux"
    return {"date": time.strftime("%Y-%m-%d"), "system": system, "kernel": platform.release(), "cpu": cpu,
            "cpus": os.cpu_count()}


def processor(cpuinfo):
    """The model of the first CPU in /proc/cpuinfo, with the family, which tells virtual ones apart."""
    fields = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    model = fields.get("model name", "unknown processor")
    return f"{model} (family {fields['cpu family']})" if "cpu family" in fields else model


def commit_of(binary):
    """The commit of the checkout that a build lies in, `None` if it lies in none; marked if its sources were changed since."""
    def git(*args):
        try:
            done = subprocess.run(["git", "-C", os.path.dirname(binary), *args], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = commit and git("status", "--porcelain", "--", ":/*.rs", ":/*.toml", ":/Cargo.lock")
    return f"{commit} with changes" if changed else commit


def digest(path):
    """The beginning of a file's SHA-256: two builds of one commit may differ."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]
