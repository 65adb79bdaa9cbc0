"""How well a score sorts right from wrong: AUROC, and what is gained by answering only where it is high.

    AUROC = P(score of a right row > score of a wrong one) + ½ P(they are equal)

so a score that says nothing has ½. The risk–coverage curve (El-Yaniv and Wiener 2010) answers the k rows with the highest scores and
gives the share of wrong ones among them; its area is the mean over k. Equal scores have no order: of a tie that is answered in part,
the expected number of wrong rows counts. Any real number is a score, bits among them: ±∞ sorts first and last; NaN is refused.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate.bootstrap import bootstrapped
from patchscopes.evaluate.statistics import Estimate


def auroc(scores: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> float:
    """Of scores and whether each row is right (0 or 1); NaN where all are right or all wrong."""
    return _auroc(*checked(scores, correct))


def auroc_of(
    scores: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """AUROC with its interval over clusters; of perfect separation, whose resamples are all 1, that is unknown."""
    s, y = checked(scores, correct)
    return bootstrapped(lambda rows: _auroc(s[rows], y[rows]), clusters, seed=seed)


def auroc_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    correct: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Estimate:
    """AUROC of the first score less that of the second, of the same rows, its interval over clusters."""
    a, y = checked(first, correct)
    b, _ = checked(second, correct)
    return bootstrapped(lambda rows: _auroc(a[rows], y[rows]) - _auroc(b[rows], y[rows]), clusters, seed=seed)


@dataclass(frozen=True)
class Selective:
    """risk[k−1]: the share of wrong ones among the k rows with the highest scores, coverage[k−1] = k/n. area: the mean risk; at_chance:
    that of random order, which is the share of wrong rows; at_best: that of the order that puts all right rows first."""

    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    area: float
    at_chance: float
    at_best: float

    def accuracy_at(self, coverage: float) -> float:
        """The share of right ones among the rows answered, as soon as so large a share of rows is answered."""
        if not 0 < coverage <= 1:
            raise InputError(f"{coverage} is no coverage; give a share of rows above 0 and up to 1")
        return 1 - self.risk[math.ceil(coverage * len(self.risk) - 1e-9) - 1] if self.risk else math.nan


def selective(scores: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> Selective:
    """The risk–coverage curve. Of no rows it is empty and its areas NaN."""
    s, y = checked(scores, correct)
    n = len(s)
    if not n:
        return Selective((), (), math.nan, math.nan, math.nan)
    _, code, size = np.unique(-s, return_inverse=True, return_counts=True)
    wrong = np.bincount(code.ravel(), ~y) / size  # the share of each tie
    k = np.arange(1, n + 1)
    risk = np.cumsum(np.repeat(wrong, size)) / k
    best = np.maximum(0, k - y.sum()) / k
    return Selective(tuple((k / n).tolist()), tuple(risk.tolist()), float(risk.mean()), float((~y).mean()), float(best.mean()))


def checked(scores: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of one length, the second of truth values. InputError where a score is NaN or a hit is neither 0 nor 1."""
    s, y = np.asarray(scores, float), np.asarray(correct, float)
    if s.shape != y.shape or s.ndim != 1:
        raise InputError(f"scores of shape {s.shape} and hits of {y.shape}; both want one number a row")
    if np.isnan(s).any():
        rows = np.flatnonzero(np.isnan(s))
        raise InputError(f"{len(rows)} scores are not a number (rows {rows.tolist()[:5]}); leave out rows that were not scored")
    if not np.isin(y, (0.0, 1.0)).all():
        raise InputError(f"{y[~np.isin(y, (0.0, 1.0))].tolist()[:3]} among the hits; a row is right (1) or wrong (0)")
    return s, y.astype(bool)


def _auroc(s: np.ndarray, y: np.ndarray) -> float:
    right = int(y.sum())
    wrong = len(y) - right
    if not right or not wrong:
        return math.nan
    _, code, size = np.unique(s, return_inverse=True, return_counts=True)
    rank = np.cumsum(size) - (size - 1) / 2  # the mean rank of each tie, from 1
    return float((rank[code.ravel()][y].sum() - right * (right + 1) / 2) / (right * wrong))
