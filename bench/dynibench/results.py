"""The results file: raw rounds with what they were taken on. A later run adds to it, if it is of the same machine and build."""

import json
import os

from .errors import BenchError

FORMAT = 1


def fresh(host, dyni, settings):
    """Results without any."""
    host = dict(host)
    date = host.pop("date")
    return {"format": FORMAT, "dates": [date, date], "host": host, "dyni": dyni, "settings": settings, "workloads": {},
            "passes": {}, "length": {}, "method": {}}


def load(path):
    """Results that were kept."""
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} can't be read", str(error)) from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise BenchError(f"{path} holds no results of this benchmark", f"It has no \"format\": {FORMAT}.")
    return results


def continued(path, results):
    """What `path` holds, to add to; `results` if there is no such file."""
    if not path or not os.path.exists(path):
        return results
    old = load(path)
    for key in ("host", "dyni", "settings"):
        if old.get(key) != results[key]:
            raise BenchError(
                f"{path} holds results that can't be put beside new ones: another {key}",
                f"there: {json.dumps(old.get(key))}\nhere:  {json.dumps(results[key])}", "Name another file with --json.")
    old["dates"][1] = results["dates"][1]
    return old


def save(path, results):
    """Keeps results; a reader never sees half of them."""
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    new = f"{path}.new"
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, path)
    except OSError as error:
        raise BenchError(f"{path} can't be written", str(error)) from error
