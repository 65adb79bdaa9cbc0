"""The interval of any statistic of rows, by resampling clusters (entities) as a whole.

`statistics.rate` and its sisters are means, and faster; this is for what is none: AUROC, κ, the area below a curve. It gives the
statistic of all rows and the percentiles of the same statistic on rows drawn anew, a cluster with all its rows as often as it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from patchscopes.evaluate.statistics import LEVEL, RESAMPLES, Estimate


def bootstrapped(statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """statistic: of row numbers, some of them more than once; NaN where it has no value (one class only, say). Such resamples are left
    out; where they are more than half, or where all others are alike, the interval is unknown."""
    rows = len(clusters)
    if rows == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    members: dict[Hashable, list[int]] = {}
    for k, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(k)
    of_cluster = [np.array(some) for some in members.values()]
    n = len(of_cluster)
    value = float(statistic(np.arange(rows)))
    low = high = math.nan
    if n > 1 and value == value:
        rng = np.random.default_rng(seed)
        drawn = rng.integers(n, size=(RESAMPLES, n))
        found = np.array([statistic(np.concatenate([of_cluster[c] for c in some])) for some in drawn], float)
        found = found[~np.isnan(found)]
        if 2 * len(found) > RESAMPLES:
            low, high = map(float, np.percentile(found, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
            if high - low <= 1e-12 * max(1.0, abs(value)):  # resamples that differ by rounding alone
                low = high = math.nan
    return Estimate(value, low, high, rows, n)
