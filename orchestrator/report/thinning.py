"""Few points for many: so few that a browser draws them at once, and none of the peaks is lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_POINTS = 5_000


def thin(x: Array, y: Array, max_points: int = MAX_POINTS) -> tuple[Array, Array]:
    """Return at most max_points of the N points, x and y (N,), in their order: each bucket's lowest and highest y."""
    if len(y) <= max_points:
        return x, y
    edges = np.linspace(0, len(y), max_points // 2 + 1).astype(int)
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    kept = {0, len(y) - 1}
    for begin, end in pairwise(edges.tolist()):
        kept |= {begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())}
    indices = sorted(kept)
    return x[indices], y[indices]


def smooth(y: Array, width: int) -> Array:
    """Return the running mean (N,) over `width` values around each, fewer at the ends; NaN counts as not there."""
    is_there = ~np.isnan(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_there, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_there)])
    here = np.arange(len(y))
    begin, end = np.maximum(here - width // 2, 0), np.minimum(here + width // 2 + 1, len(y))
    n = counts[end] - counts[begin]
    return np.where(n > 0, (sums[end] - sums[begin]) / np.maximum(n, 1), np.nan)


def percentiles(x: Array, y: Array, ranks: tuple[float, ...], n_buckets: int = 200) -> tuple[Array, Array]:
    """Return the middle x of each bucket of values in a row (M,), and the percentiles of its y: (M, len(ranks))."""
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    buckets = np.array_split(np.arange(len(y)), max(1, min(n_buckets, len(y) // 5))) if len(y) else []
    middles = np.array([x[bucket].mean() for bucket in buckets])
    return middles, np.array([np.percentile(y[bucket], ranks) for bucket in buckets]).reshape(-1, len(ranks))
