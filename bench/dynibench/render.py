"""Results as tables for README.md, between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, and as plots."""

import re
import textwrap

from . import svg
from .errors import BenchError

METHODS = {"clock": "clock samples", "count": "counts", "lbr": "branch stacks (LBR)"}


def blocks(results):
    """`{name: text}` of the tables that the results have figures for."""
    tables = {"workloads": workloads, "passes": passes, "length": length, "method": method}
    return {name: table(results) for name, table in tables.items() if results[name]}


def plots(results):
    """`{file name: SVG}` likewise."""
    made = {}
    if results["length"]:
        made["length.svg"] = plot(results, "length", "Gain against recording length", "recorded for", True)
    if results["method"]:
        made["method.svg"] = plot(results, "method", "Gain by sampling method", "method", False)
    return made


def replace(page, name, body):
    """A page with what stands between the markers of that name replaced."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise BenchError(f"the page has no place for the table {name}", f"It needs one line {begin}, and after it one {end}.",
                         "git checkout bench/README.md brings it back.")
    head, rest = page.split(begin)
    return f"{head}{begin}\n{body.rstrip()}\n{end}{rest.split(end)[1]}"


def sentence(results):
    """Where and on what the figures were taken."""
    host, dyni, settings = results["host"], results["dyni"], results["settings"]
    first, last = results["dates"]
    date = first if first == last else f"{first} to {last}"
    commit = f", commit {dyni['commit']}" if dyni["commit"] else ""
    rounds = "one round" if settings["rounds"] == 1 else f"medians of {settings['rounds']} rounds"
    return (f"Taken on {date}, {host['cpu']}, {host['cpus']} CPUs, {host['system']}, Linux {host['kernel']}; dyni "
            f"{dyni['version']}{commit}; {rounds} of {settings['seconds']} s.")


def wrapped(words):
    """A paragraph."""
    return textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False)


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def middle(entry):
    """A gain's median, or why there is none."""
    if entry is None:
        return ""
    return next((word for word in ("skipped", "failed") if word in entry), None) or f"{entry['gain']['median']:.3f}"


def spread(entry):
    """A gain with its range."""
    if entry is None or "gain" not in entry:
        return middle(entry)
    return figure(entry["gain"])


def figure(gain):
    """1.031 (1.018 to 1.041)"""
    return f"{gain['median']:.3f} ({gain['low']:.3f} to {gain['high']:.3f})"


def itself(entry):
    """What `dyni optimize` found out."""
    if entry is None or "optimize" not in entry:
        return ""
    said = entry["optimize"]
    if not said["gain"]:
        return "not measured"
    ratio = f"{said['gain']['ratio']:.3f}"
    return ratio if said["state"] == "dynimized" else f"{ratio}, {said['state']}"


def workloads(results):
    """CPU per operation, dyni beside its peers."""
    rows, reasons = [], []
    for name, peers in results["workloads"].items():
        dyni = peers.get("dyni")
        after = dyni and dyni.get("after")
        rows.append([name, f"**{middle(dyni)}**" if after else middle(dyni),
                     f"{after['low']:.3f} to {after['high']:.3f}" if after else "", itself(dyni), spread(peers.get("bolt")),
                     spread(peers.get("none"))])
        for peer, entry in peers.items():
            reasons += [f"{name}, {peer}: {word.upper()}: {entry[word].splitlines()[0]}"
                        for word in ("skipped", "failed") if word in entry]
    head = ["workload", "gain", "A/B in the rounds after", "what `optimize` itself measured", "BOLT", "A against A"]
    return "\n\n".join([wrapped(sentence(results)), table(head, rows), *map(wrapped, reasons)])


def passes(results):
    """What each pass adds, and what is lost without it."""
    parts = [wrapped(sentence(results))]
    for name, study in results["passes"].items():
        points = {(point["kind"], point["pass"]): point for point in study["points"]}
        every = [point for point in study["points"] if point["kind"] == "added"][-1]["gain"]["median"]
        rows = [["none", spread(points[("none", None)]), "", ""]]
        for pass_name in dict.fromkeys(point["pass"] for point in study["points"] if point["pass"]):
            added, without = points.get(("added", pass_name)), points.get(("without", pass_name))
            share = f"{100 * (every / without['gain']['median'] - 1):+.1f} %" if without else ""
            rows.append([pass_name, spread(added), spread(without), share])
        parts.append(f"{name}; stock again at the end {figure(study['again'])}:")
        parts.append(table(["pass", "gain with it and those above", "gain with all but it", "what it brings to all"], rows))
    return "\n\n".join(parts)


def points_table(results, kind, words):
    """A row for each workload, a column for each point of its study."""
    studies = results[kind]
    labels = list(dict.fromkeys(point["label"] for study in studies.values() for point in study["points"]))
    rows = []
    for name, study in studies.items():
        points = {point["label"]: point for point in study["points"]}
        rows.append([name, *(spread(points.get(label)) for label in labels), figure(study["again"])])
    return table(["workload", *(words.get(label, label) for label in labels), "stock again"], rows)


def skipped(results, kind):
    """Why points are missing, each once."""
    return list(dict.fromkeys(f"{METHODS.get(point['label'], point['label'])}: SKIPPED: {point['skipped']}."
                              for study in results[kind].values() for point in study["points"] if "skipped" in point))


def length(results):
    """Gain by recording length."""
    return "\n\n".join([wrapped(sentence(results)), points_table(results, "length", {}),
                        "![Gain against recording length](plots/length.svg)"])


def method(results):
    """Gain by sampling method."""
    return "\n\n".join([wrapped(sentence(results)), points_table(results, "method", METHODS),
                        *map(wrapped, skipped(results, "method")), "![Gain by sampling method](plots/method.svg)"])


def plot(results, kind, title, axis, joined):
    """A study's plot; its caption says on what it was taken and what is missing."""
    studies = results[kind]
    labels = list(dict.fromkeys(point["label"] for study in studies.values() for point in study["points"]
                                if "skipped" not in point))
    series = {}
    for name, study in studies.items():
        gains = {point["label"]: point.get("gain") for point in study["points"]}
        series[name] = [gains.get(label) for label in labels]
    caption = " ".join([sentence(results), *skipped(results, kind)])
    return svg.plot(title, caption, (axis, "gain in CPU per operation"), [METHODS.get(label, label) for label in labels],
                    series, joined)


def plain(text):
    """A rendered block for a terminal."""
    return re.sub(r"\*\*|^!\[.*\n?", "", text, flags=re.MULTILINE).strip()
