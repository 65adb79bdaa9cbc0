"""Rates with honest intervals, as small exact functions on arrays of hits.

A row is an item (an entity in a sentence, say), a column a cell that was tried on it. Rows of one entity hang together, so intervals
resample entities, not rows (a clustered bootstrap); the best of N cells is no accuracy, so it stands beside the same best of N for
vectors of other entities, and beside the rate of one cell that was chosen on other entities.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

RESAMPLES, LEVEL, AT_ONCE = 2000, 0.95, 200


@dataclass(frozen=True)
class Estimate:
    """A mean with the interval of a bootstrap over clusters; low and high are NaN where that is unknown. n: rows; clusters: entities that
    they belong to."""

    value: float
    low: float
    high: float
    n: int
    clusters: int

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value != self.value:
            return "none"
        between = "interval unknown" if self.low != self.low else f"{self.low:.1%} to {self.high:.1%}"
        return f"{self.value:.1%} ({between})"


def rate(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """The mean of values (hits as 0 and 1, or any numbers), its interval over clusters."""
    return mean_of_rates(values, [0] * len(clusters), clusters, seed=seed)


def mean_of_rates(
    values: Sequence[float] | np.ndarray, groups: Sequence[Hashable], clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """The mean over groups (relations, say) of the mean of values in each. A cluster is resampled as a whole, in whatever groups it
    has rows; a group that is empty in a resample is left out of it. Where all resamples are alike they prove nothing: with all values 0 or
    all 1 the bound is that of Clopper and Pearson for as many clusters, else (one cluster, or equal numbers) the interval is unknown."""
    values = np.asarray(values, float)
    if len(values) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    g, c = _codes(groups), _codes(clusters)
    total, count = np.zeros((c.max() + 1, g.max() + 1)), np.zeros((c.max() + 1, g.max() + 1))
    np.add.at(total, (c, g), values)
    np.add.at(count, (c, g), 1.0)
    n = len(total)
    rng = np.random.default_rng(seed)
    means = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, RESAMPLES, AT_ONCE):
            weights = rng.multinomial(n, np.full(n, 1 / n), size=min(AT_ONCE, RESAMPLES - start)).astype(float)
            means.append(np.nanmean((weights @ total) / (weights @ count), axis=1))
        value = float(np.mean(total.sum(0) / count.sum(0)))
    low, high = np.percentile(np.concatenate(means), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    if (values == values[0]).all() and value in (0.0, 1.0):  # the exact bound on n clusters
        bound = (0.5 - LEVEL / 2) ** (1 / n)
        low, high = (bound, 1.0) if value else (0.0, 1 - bound)
    elif high - low <= 1e-12 * max(1.0, abs(value)):  # resamples that differ by rounding alone
        low = high = math.nan
    return Estimate(value, float(low), float(high), len(values), n)


def difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """The mean of first − second, paired row by row (over groups the mean of that in each), its interval over clusters. Where no row
    differs the interval is the exact bound on n clusters, to both sides; where it is unknown, it is so as for a mean."""
    apart = np.asarray(first, float) - np.asarray(second, float)
    if len(apart) and (apart == -1).all():
        found = difference(second, first, clusters, groups, seed=seed)
        return replace(found, value=-1.0, low=-1.0, high=-found.low)
    found = mean_of_rates(apart, [0] * len(apart) if groups is None else groups, clusters, seed=seed)
    return found if len(apart) == 0 or apart.any() else replace(found, low=-found.high)


def any_of(hits: np.ndarray) -> np.ndarray:
    """[row, cell] → [row]: whether any cell hit."""
    return np.asarray(np.asarray(hits, bool).any(axis=1))


def per_draw(hits: np.ndarray) -> np.ndarray:
    """[row, cell] → [row]: the share of cells that hit."""
    return np.asarray(hits, float).mean(axis=1)


def in_first_half(cluster: object, seed: int = 0) -> bool:
    """A fair coin that depends on the cluster's name and the seed alone: which half of the entities it belongs to."""
    return bool(hashlib.sha256(f"{seed} half {cluster}".encode()).digest()[0] & 1)


def chosen_cell(hits: np.ndarray, groups: Sequence[Hashable] | None = None) -> int:
    """The column with the highest mean over groups of the rate in each; among equals the last."""
    hits = np.asarray(hits, float)
    codes = _codes(groups) if groups is not None else np.zeros(len(hits), int)
    means = np.mean([hits[codes == k].mean(axis=0) for k in range(codes.max() + 1)], axis=0)
    return int(np.flatnonzero(means >= means.max() - 1e-12)[-1])


@dataclass(frozen=True)
class HeldOut:
    """A cell chosen on the rows of one half of the clusters, and where it is scored: the rows of the other half."""

    cell: int
    chose: np.ndarray
    scores: np.ndarray


def held_out(
    hits: np.ndarray, clusters: Sequence[Hashable], groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> HeldOut | None:
    """Choose a column of hits[row, cell] on one half of the clusters; None if one of the halves has no row."""
    first = np.array([in_first_half(c, seed) for c in clusters], bool)
    if not len(first) or first.all() or not first.any():
        return None
    own = [g for g, mine in zip(groups, first, strict=True) if mine] if groups is not None else None
    return HeldOut(chosen_cell(np.asarray(hits)[first], own), np.flatnonzero(first), np.flatnonzero(~first))


def strangers(
    groups: Sequence[Hashable], answers: Sequence[Hashable], clusters: Sequence[Hashable], seed: int = 0
) -> list[int | None]:
    """For every row another row of its group, of another cluster and with another answer, so that what is read out of the one can be
    held against the answer of the other (a shuffled control); None where there is no such row."""
    rng = np.random.default_rng(seed)
    of_group: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        of_group.setdefault(group, []).append(k)
    found: list[int | None] = []
    for k, group in enumerate(groups):
        others = [j for j in of_group[group] if clusters[j] != clusters[k] and answers[j] != answers[k]]
        found.append(others[int(rng.integers(len(others)))] if others else None)
    return found


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: of n discordant pairs, as many in one direction, X ~ Binomial(n, ½)."""
    n, k = only_first + only_second, min(only_first, only_second)
    return 1.0 if n == 0 else min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): they bound the chance of any false alarm among them."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = worst
    return adjusted


def _codes(names: Sequence[Hashable]) -> np.ndarray:
    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(name, len(index)) for name in names], int)
