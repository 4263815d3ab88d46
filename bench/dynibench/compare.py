"""What is done to B, and what it brought: dyni, BOLT, or nothing."""

from . import bolt
from .errors import Skipped
from .pair import paired, serving, under_load
from .stats import gain


def with_dyni(bench, kind):
    """B stock, then under `dyni optimize`."""
    with paired(bench, kind) as pair:
        before = pair.measure("stock")
        bench.progress(f"{kind.name}: dyni optimize")
        with under_load(pair.a, pair.b):
            done = bench.dyni.optimize(pair.b, bench.record_seconds)
        after = pair.measure("optimised")
    itself = {key: done[key] for key in ("state", "gain", "not_measured")}
    return {"before": before, "after": after, "gain": gain(before, after), "optimize": itself}


def with_bolt(bench, kind):
    """B is BOLT's binary from the start."""
    bolt.tools()
    if kind.bolt_crashes and not bench.try_crashing:
        raise Skipped(f"BOLT's {kind.name} is known to crash; --workloads {kind.name} --peer bolt tries it")
    with serving(bench, kind, "A") as server:
        bench.progress(f"{kind.name}: recording for BOLT")
        with under_load(server):
            data = bolt.record(server, bench.folder, bench.processes, 2 * bench.record_seconds)
    bench.progress(f"{kind.name}: BOLT")
    binary = bolt.lay_out(kind.stock(), data, bench.folder, bench.processes)
    with paired(bench, kind, binary) as pair:
        after = pair.measure("BOLT")
    return {"after": after, "gain": {key: after[key] for key in ("median", "low", "high")}}


def with_nothing(bench, kind):
    """A against A, twice: what the method makes of no change."""
    with paired(bench, kind) as pair:
        before, after = pair.measure("stock"), pair.measure("stock again")
    return {"before": before, "after": after, "gain": gain(before, after)}


PEERS = {"dyni": with_dyni, "bolt": with_bolt, "none": with_nothing}
