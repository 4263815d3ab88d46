"""Ratios and their medians."""

import statistics


def summary(values):
    """Median, lowest and highest."""
    values = list(values)
    if not values:
        raise ValueError("no rounds")
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def gain(before, after):
    """
    How much less CPU time an operation takes after than before, from A/B before and after: `median` over `median`, with the
    lowest and highest round after over the same median before.
    """
    base = before["median"]
    return {key: after[key] / base for key in ("median", "low", "high")}
