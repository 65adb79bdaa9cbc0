"""Is a confidence of 0.7 right in seven cases of ten?

Of confidences c in [0, 1] and whether each row is right, y:

    ECE   = Σ_bins (rows of the bin / n) |mean c − mean y|                 (Naeini et al. 2015; Guo et al. 2017)
    Brier = mean (c − y)² = reliability − resolution + uncertainty         (Brier 1950; Murphy 1973)
    NLL   = −mean ln(c if right, else 1 − c), nats; ∞ where a certain answer is wrong

Brier's parts are taken over the distinct confidences, so that they add up exactly. ECE is above 0 even of perfect confidences, since
bins are small: `ece_floor` says by how much, and an ECE below it shows nothing amiss.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import statistics
from patchscopes.evaluate.ranking import Selective, auroc_of, checked, selective
from patchscopes.evaluate.statistics import Estimate

BINS, DRAWS = 10, 1000


@dataclass(frozen=True)
class Bin:
    """A bar of the reliability diagram: confidences from low to high, rows, their mean confidence and the share that is right."""

    low: float
    high: float
    n: int
    confidence: float
    rate: float


@dataclass(frozen=True)
class Brier:
    """score = reliability − resolution + uncertainty. reliability: how far confidences lie from their rates (0 is best); resolution:
    how far these rates lie from the rate of all; uncertainty: rate (1 − rate) of all."""

    score: float
    reliability: float
    resolution: float
    uncertainty: float


@dataclass(frozen=True)
class Calibration:
    """All figures of one confidence. gap: mean confidence less accuracy (above 0: too sure). brier_interval, accuracy, gap and auroc
    have intervals over clusters."""

    n: int
    accuracy: Estimate
    gap: Estimate
    ece: float
    ece_mass: float
    ece_floor: float
    brier: Brier
    brier_interval: Estimate
    nll: float
    auroc: Estimate
    selective: Selective


def equal_width(
    confidence: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray, bins: int = BINS
) -> tuple[Bin, ...]:
    """Bins [k/bins, (k+1)/bins), the last with 1; empty ones are left out."""
    c, y = _confidences(confidence, correct)
    edges = np.linspace(0, 1, bins + 1)
    return _bins(c, y, np.clip(np.searchsorted(edges, c + 1e-12, side="right") - 1, 0, bins - 1), edges)


def equal_mass(
    confidence: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray, bins: int = BINS
) -> tuple[Bin, ...]:
    """Bins of as many rows each, as nearly as may be: equal confidences stay together, so that the order of rows does not matter."""
    c, y = _confidences(confidence, correct)
    if not len(c):
        return ()
    first = np.searchsorted(np.sort(c), c)  # the rank of the first row with this confidence
    return _bins(c, y, first * bins // len(c), None)


def ece(bins: Sequence[Bin]) -> float:
    """The expected calibration error of a reliability diagram. NaN of none."""
    rows = sum(one.n for one in bins)
    return sum(one.n * abs(one.confidence - one.rate) for one in bins) / rows if rows else math.nan


def ece_floor(confidence: Sequence[float] | np.ndarray, *, bins: int = BINS, seed: int = 0) -> float:
    """The mean ECE (equal widths) that these confidences would have if each were exactly right, simulated."""
    c, _ = _confidences(confidence, np.zeros(len(confidence)))
    if not len(c):
        return math.nan
    rng = np.random.default_rng(seed)
    edges = np.linspace(0, 1, bins + 1)
    member = np.clip(np.searchsorted(edges, c + 1e-12, side="right") - 1, 0, bins - 1)[:, None] == np.arange(bins)
    right = (rng.random((DRAWS, len(c))) < c).astype(float)
    return float(np.abs((right - c) @ member).sum(axis=1).mean() / len(c))


def brier(confidence: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> Brier:
    """The score and its parts; NaN of no rows."""
    c, y = _confidences(confidence, correct)
    if not len(c):
        return Brier(math.nan, math.nan, math.nan, math.nan)
    values, code, size = np.unique(c, return_inverse=True, return_counts=True)
    rates, share, base = np.bincount(code.ravel(), y) / size, size / len(c), y.mean()
    return Brier(
        float(((c - y) ** 2).mean()),
        float((share * (values - rates) ** 2).sum()),
        float((share * (rates - base) ** 2).sum()),
        float(base * (1 - base)),
    )


def nll(confidence: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> float:
    """Nats a row; ∞ where a confidence of 0 or 1 was wrong, NaN of no rows."""
    c, y = _confidences(confidence, correct)
    if not len(c):
        return math.nan
    with np.errstate(divide="ignore"):
        return float(-np.log(np.where(y, c, 1 - c)).mean())


def calibrated(
    confidence: Sequence[float] | np.ndarray,
    correct: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Calibration:
    """Everything about one confidence."""
    c, y = _confidences(confidence, correct)
    return Calibration(
        len(c),
        statistics.rate(y.astype(float), clusters, seed=seed),
        statistics.difference(c, y, clusters, seed=seed),
        ece(equal_width(c, y)),
        ece(equal_mass(c, y)),
        ece_floor(c, seed=seed),
        brier(c, y),
        statistics.rate((c - y) ** 2, clusters, seed=seed),
        nll(c, y),
        auroc_of(c, y, clusters, seed=seed),
        selective(c, y),
    )


def _bins(c: np.ndarray, y: np.ndarray, code: np.ndarray, edges: np.ndarray | None) -> tuple[Bin, ...]:
    found = []
    for k in np.unique(code):
        some = code == k
        low, high = (c[some].min(), c[some].max()) if edges is None else (edges[k], edges[k + 1])
        found.append(Bin(float(low), float(high), int(some.sum()), float(c[some].mean()), float(y[some].mean())))
    return tuple(found)


def _confidences(
    confidence: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    c, y = checked(confidence, correct)
    if ((c < 0) | (c > 1)).any():
        odd = c[(c < 0) | (c > 1)].tolist()[:3]
        raise InputError(
            f"{odd} are no confidences, which lie from 0 to 1; turn other scores (bits) into them with recalibration"
        )
    return c, y
