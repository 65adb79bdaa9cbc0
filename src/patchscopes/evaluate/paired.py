"""Two methods on the same rows: which is better, and by how much?

McNemar's exact test takes each row for itself. Where rows of one entity hang together it overstates how many there are; then the
clustered test flips the sign of the differences of a whole entity at once: if the two methods are alike, an entity's differences might
as well have had the other sign, so p is the share of all flips in which the mean difference is as far from 0 as it is. With one row an
entity the two tests are one. Over a family of tests (task × layer) p-values are adjusted as Holm (1979) does.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import statistics
from patchscopes.evaluate.statistics import Estimate

FLIPS, EXACT = 20000, 2**16  # random flips where there are more than so many different sums


@dataclass(frozen=True)
class Table:
    """Rows by which of two hit: McNemar's table."""

    both: int
    only_first: int
    only_second: int
    neither: int


@dataclass(frozen=True)
class Compared:
    """Rates of two methods on the same rows, their difference (clustered intervals), and two p-values: of McNemar's exact test, which
    takes rows to be independent, and of the sign flip of whole clusters."""

    first: Estimate
    second: Estimate
    difference: Estimate
    table: Table
    p_exact: float
    p_clustered: float


@dataclass(frozen=True)
class Corrected:
    """One test of a family; p: the clustered one; adjusted: by Holm over the whole family."""

    task: str
    layer: int
    found: Compared
    p: float
    adjusted: float
    significant: bool


def table(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Table:
    """Of two vectors of hits (0 or 1)."""
    a, b = _hits(first, "first"), _hits(second, "second")
    if len(a) != len(b):
        raise InputError(f"{len(a)} hits of the first and {len(b)} of the second; a paired test wants both of every row")
    return Table(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def compared(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Compared:
    """Hits of two methods, row by row; with groups, rates and their difference are means over groups."""
    counts = table(first, second)
    a, b = np.asarray(first, float), np.asarray(second, float)
    within = [0] * len(a) if groups is None else groups
    return Compared(
        statistics.mean_of_rates(a, within, clusters, seed=seed),
        statistics.mean_of_rates(b, within, clusters, seed=seed),
        statistics.difference(a, b, clusters, groups, seed=seed),
        counts,
        statistics.mcnemar(counts.only_first, counts.only_second),
        sign_flip(a - b, clusters, groups, seed=seed),
    )


def sign_flip(
    differences: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> float:
    """Two-sided p of the mean difference (over groups the mean of that in each) when signs of whole clusters are flipped: exact where
    the flips have at most 65,536 different sums, else (1 + number of random flips at least as far from 0) / (their number + 1)."""
    values = np.asarray(differences, float)
    if np.isnan(values).any():
        raise InputError(f"rows {np.flatnonzero(np.isnan(values)).tolist()[:5]} have no difference (NaN); leave them out first")
    names: list[Hashable] = [0] * len(values) if groups is None else list(groups)
    size = {name: names.count(name) for name in dict.fromkeys(names)}
    parts: dict[Hashable, float] = {}
    for value, cluster, name in zip(values, clusters, names, strict=True):
        parts[cluster] = parts.get(cluster, 0.0) + value / size[name] * (len(values) if groups is None else 1)
    weights = np.array([w for w in parts.values() if abs(w) > 1e-12])  # rounded: whole numbers where there are no groups
    if not len(weights):
        return 1.0
    far = abs(weights.sum()) - 1e-9 * np.abs(weights).sum()
    found = _sums(weights)
    if found is not None:
        sums, chance = found
        return min(1.0, float(chance[np.abs(sums) >= far].sum()))
    signs = np.random.default_rng(seed).integers(0, 2, (FLIPS, len(weights)), dtype=np.int8) * 2.0 - 1
    return (1 + int((np.abs(signs @ weights) >= far).sum())) / (FLIPS + 1)


def family(found: Mapping[tuple[str, int], Compared], *, alpha: float = 0.05) -> tuple[Corrected, ...]:
    """The clustered p-values of all (task, layer), adjusted for their number."""
    adjusted = statistics.holm([one.p_clustered for one in found.values()])
    return tuple(
        Corrected(task, layer, one, one.p_clustered, p, p <= alpha)
        for ((task, layer), one), p in zip(found.items(), adjusted, strict=True)
    )


def _sums(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """All sums of ±weights and the chance of each; None if they are too many."""
    grain = 1e-9 * np.abs(weights).sum()  # sums closer than that are one
    sums, chance = np.zeros(1), np.ones(1)
    for weight in weights:
        both = np.concatenate([sums - weight, sums + weight])
        _, first, inverse = np.unique(np.round(both / grain), return_index=True, return_inverse=True)
        sums, chance = both[first], np.bincount(inverse.ravel(), np.tile(chance / 2, 2))
        if len(sums) > EXACT:
            return None
    return sums, chance


def _hits(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, float)
    if not np.isin(values, (0.0, 1.0)).all():
        odd = values[~np.isin(values, (0.0, 1.0))].tolist()[:3]
        raise InputError(f"the {name} has {odd} among its hits; hits are 0 or 1 (use sign_flip and difference for other numbers)")
    return values.astype(bool)
