"""From a score (bits, log-probability) to the probability of being right, fitted on one half of the entities and scored on the other.

Platt (1999): p = σ(slope · score + intercept), by likelihood, against targets (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) instead of 1 and 0,
which keeps it finite where the score separates right from wrong. Isotonic: the monotone step function of least squares, by pooling
adjacent violators (Ayer et al. 1955; Zadrozny and Elkan 2002). Platt's has two numbers to learn and wants few rows; isotonic fits any
rising shape and wants many.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate.ranking import checked
from patchscopes.evaluate.statistics import in_first_half

STEPS = 100


class Fitted(Protocol):
    """A map from scores to probabilities."""

    def probability(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """[row]: the probability of being right."""
        ...


@dataclass(frozen=True)
class Platt:
    """σ(slope · score + intercept); scores are held between low and high, the finite ones that it was fitted on, so that ±∞ has a
    place."""

    slope: float
    intercept: float
    low: float
    high: float

    def probability(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """[row]."""
        s = _numbers(scores).clip(self.low, self.high)
        return _sigmoid(self.slope * s + self.intercept)


@dataclass(frozen=True)
class Isotonic:
    """values[k] from starts[k] up to below starts[k+1]; below the first start the first value."""

    starts: tuple[float, ...]
    values: tuple[float, ...]

    def probability(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """[row]."""
        k = np.searchsorted(self.starts, _numbers(scores), side="right") - 1
        return np.array(self.values)[k.clip(0)]


def platt(scores: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> Platt:
    """By Newton's method. InputError where all rows are right or all wrong."""
    s, y = _two_classes(scores, correct)
    finite = s[np.isfinite(s)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (-1.0, 1.0)
    s = s.clip(low, high)
    centre, scale = s.mean(), s.std() or 1.0
    x = np.stack([(s - centre) / scale, np.ones(len(s))], axis=1)
    right = y.sum()
    target = np.where(y, (right + 1) / (right + 2), 1 / (len(y) - right + 2))
    w = np.array([0.0, 0.0])

    def loss(w: np.ndarray) -> float:
        return float((np.logaddexp(0, x @ w) - target * (x @ w)).sum())

    for _ in range(STEPS):
        p = _sigmoid(x @ w)
        gradient = x.T @ (p - target)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2), gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) + 1e-12 and size > 1e-6:
            size /= 2
        w = w - size * step
        if np.abs(gradient).max() < 1e-9:
            break
    return Platt(float(w[0] / scale), float(w[1] - w[0] * centre / scale), low, high)


def isotonic(scores: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> Isotonic:
    """Equal scores are one step. InputError where all rows are right or all wrong."""
    s, y = _two_classes(scores, correct)
    starts, code, size = np.unique(s, return_inverse=True, return_counts=True)
    means = np.bincount(code.ravel(), y) / size
    blocks: list[list[float]] = []  # start, mean, rows
    for start, mean, rows in zip(starts.tolist(), means.tolist(), size.tolist(), strict=True):
        blocks.append([start, mean, rows])
        while len(blocks) > 1 and blocks[-2][1] >= blocks[-1][1]:
            _, later, more = blocks.pop()
            first = blocks[-1]
            first[1], first[2] = (first[1] * first[2] + later * more) / (first[2] + more), first[2] + more
    return Isotonic(tuple(b[0] for b in blocks), tuple(b[1] for b in blocks))


def cross_fitted(
    scores: Sequence[float] | np.ndarray,
    correct: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    fit: Callable[[np.ndarray, np.ndarray], Fitted],
    *,
    seed: int = 0,
) -> np.ndarray:
    """[row]: the probability by a fit (`platt`, `isotonic`) on the half of the clusters that the row does not belong to. InputError
    where a half is empty, or all right or all wrong."""
    s, y = checked(scores, correct)
    first = np.array([in_first_half(c, seed) for c in clusters], bool)
    found = np.empty(len(s))
    for here in (first, ~first):
        found[~here] = fit(s[here], y[here]).probability(s[~here])
    return found


def _two_classes(scores: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s, y = checked(scores, correct)
    if not y.any() or y.all():
        raise InputError(f"{int(y.sum())} of {len(y)} rows are right; a fit wants some that are right and some that are wrong")
    return s, y


def _numbers(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    s = np.asarray(scores, float)
    if np.isnan(s).any():
        raise InputError(f"{int(np.isnan(s).sum())} scores are not a number; leave out rows that were not scored")
    return s


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.clip(-700, 700)))
