"""Are p-values uniform where they ought to be? A check of a control, and of the test itself.

p = (1 + number of others at least as likely) / (n + 1) lies on the grid 1/(n+1), 2/(n+1), …, 1, each as likely where a reading tells
nothing. So the share at or below α should be ⌊α (n+1)⌋/(n+1). Beside that share stand two distances from the grid's uniform
distribution, Kolmogorov's D = max |F̂ − F| and χ² = Σ (count − expected)²/expected, each with the p-value of simulated uniform draws:
tables of either hold for no grid.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate.binomial import clopper_pearson
from patchscopes.evaluate.statistics import Estimate, rate

DRAWS = 2000


@dataclass(frozen=True)
class Uniformity:
    """share: of p-values ≤ α, beside what is expected of uniform ones. ks_p and chi2_p take p-values to be independent."""

    share: Estimate
    expected: float
    ks: float
    ks_p: float
    chi2: float
    chi2_p: float


def uniformity(
    p_values: Sequence[float] | np.ndarray,
    n: int,
    clusters: Sequence[Hashable] | None = None,
    *,
    alpha: float = 0.05,
    draws: int = DRAWS,
    seed: int = 0,
) -> Uniformity:
    """n: the others that each was ranked among. The share's interval is that of Clopper and Pearson; with clusters it resamples
    these."""
    p = np.asarray(p_values, float)
    if n < 1:
        raise InputError(f"ranked among {n} others; a p-value wants one or more")
    rank = p * (n + 1)
    if np.isnan(p).any() or (np.abs(rank - np.round(rank)) > 1e-6).any() or (rank < 0.5).any() or (rank > n + 1.5).any():
        odd = p[~((np.abs(rank - np.round(rank)) <= 1e-6) & (rank >= 0.5) & (rank <= n + 1.5))].tolist()[:3]
        raise InputError(f"{odd} are not on the grid 1/{n + 1}, …, 1 of ranks among {n} others; give p-values of one n at a time")
    allowed = math.floor(alpha * (n + 1) + 1e-9)
    expected, low = allowed / (n + 1), np.round(rank) <= allowed
    if not len(p):
        nan = math.nan
        return Uniformity(Estimate(nan, nan, nan, 0, 0), expected, nan, nan, nan, nan)
    if clusters is None:
        share = Estimate(float(low.mean()), *clopper_pearson(int(low.sum()), len(p)), len(p), len(p))
    else:
        share = rate(low.astype(float), clusters, seed=seed)
    ks, chi2 = _distances(np.bincount(np.round(rank).astype(int) - 1, minlength=n + 1)[None])
    simulated = np.random.default_rng(seed).multinomial(len(p), np.full(n + 1, 1 / (n + 1)), size=draws)
    null_ks, null_chi2 = _distances(simulated)
    return Uniformity(share, expected, float(ks[0]), _rank(ks[0], null_ks), float(chi2[0]), _rank(chi2[0], null_chi2))


def _distances(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total, cells = counts[0].sum(), counts.shape[1]
    apart = np.cumsum(counts, axis=1) / total - np.arange(1, cells + 1) / cells
    return np.abs(apart).max(axis=1), ((counts - total / cells) ** 2).sum(axis=1) / (total / cells)


def _rank(value: float, null: np.ndarray) -> float:
    return (1 + int((null >= value - 1e-9).sum())) / (len(null) + 1)
