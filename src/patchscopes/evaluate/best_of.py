"""The best of N is no accuracy: own hits beside as many of a null.

own[row, N] and null[row, N]: hits of N draws (cells, samples, gains) of the row's own state, and of as many of a null (another entity's
vector, held against this row's answer, say). Of n draws taken from the N without putting back, none hits with chance
C(N − h, n) / C(N, n) where h of the N do, so the expected any-of-n is exact, not resampled.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import statistics
from patchscopes.evaluate.paired import sign_flip
from patchscopes.evaluate.statistics import Estimate


@dataclass(frozen=True)
class BestOf:
    """n: N. over_null: any-of-N less that of the null, p its clustered sign flip. held_out: one column, chosen by own hits on one half
    of the clusters, on the other half; None if there is only one half. curve[n−1]: the expected any-of-n. left_out: rows without a
    null."""

    n: int
    per_draw: Estimate
    per_draw_null: Estimate
    any_of: Estimate
    any_of_null: Estimate
    over_null: Estimate
    p: float
    column: int | None
    held_out: Estimate | None
    held_out_null: Estimate | None
    curve: tuple[float, ...]
    curve_null: tuple[float, ...]
    left_out: int


def any_of_n(hits: np.ndarray) -> np.ndarray:
    """[row, N] → [row, n−1]: the chance that any of n of the row's draws hits."""
    hits = np.asarray(hits, bool)
    draws = hits.shape[1]
    misses = draws - hits.sum(axis=1, keepdims=True)
    ratios = np.clip((misses - np.arange(draws)) / (draws - np.arange(draws)), 0, None)  # C(m, n)/C(N, n) = Π (m−i)/(N−i)
    return 1 - np.cumprod(ratios, axis=1)


def best_of_curve(hits: np.ndarray, groups: Sequence[Hashable] | None = None) -> np.ndarray:
    """[n−1]: the expected any-of-n for n = 1…N, the mean over rows (with groups the mean over them)."""
    found = any_of_n(hits)
    if groups is None:
        return found.mean(axis=0)
    names = np.array([list(dict.fromkeys(groups)).index(group) for group in groups], int)
    return np.mean([found[names == k].mean(axis=0) for k in range(names.max() + 1)], axis=0)


def best_of(
    own: np.ndarray,
    null: np.ndarray,
    clusters: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> BestOf:
    """All of it on the rows that have a null (NaN: they have none)."""
    own, null = np.asarray(own, float), np.asarray(null, float)
    if own.ndim != 2 or own.shape != null.shape:
        raise InputError(f"own hits of shape {own.shape} and null hits of {null.shape}; both want [row, N] with the same N")
    there = np.asarray(~np.isnan(null).any(axis=1))
    if not there.any() or not own.shape[1]:
        raise InputError(f"none of {len(own)} rows has draws of its own and of a null; give a null of as many draws to some")
    own, null = own[there], null[there]
    c = list(compress(clusters, there))
    g = [0] * len(c) if groups is None else list(compress(groups, there))

    def mean(values: np.ndarray) -> Estimate:
        return statistics.mean_of_rates(values, g, c, seed=seed)

    apart = statistics.any_of(own).astype(float) - statistics.any_of(null)
    chosen = statistics.held_out(own, c, g, seed=seed)
    there_too = None if chosen is None else chosen.scores.tolist()

    def chosen_rate(hits: np.ndarray) -> Estimate | None:
        if chosen is None or there_too is None:
            return None
        column = hits[there_too, chosen.cell]
        return statistics.mean_of_rates(column, [g[k] for k in there_too], [c[k] for k in there_too], seed=seed)

    return BestOf(
        own.shape[1],
        mean(statistics.per_draw(own)),
        mean(statistics.per_draw(null)),
        mean(statistics.any_of(own)),
        mean(statistics.any_of(null)),
        statistics.difference(statistics.any_of(own), statistics.any_of(null), c, g, seed=seed),
        sign_flip(apart, c, None if groups is None else g, seed=seed),
        None if chosen is None else chosen.cell,
        chosen_rate(own),
        chosen_rate(null),
        tuple(best_of_curve(own, g).tolist()),
        tuple(best_of_curve(null, g).tolist()),
        int((~there).sum()),
    )
