"""What so many items can show: the smallest effect that a test finds with a given power.

A claim of no effect is worth what the test could have found. All are exact: of binomial tails, with no normal approximation. Where rows
of one entity hang together n is not the number of rows but `effective_n`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate.binomial import crossing, log_factorials, tail

ALPHA, POWER = 0.05, 0.8


def effective_n(clusters: Sequence[Hashable], values: Sequence[float] | np.ndarray | None = None) -> float:
    """Independent rows that are worth as much: n / (1 + ρ (Σ m² / n − 1)) for clusters of m rows (Kish 1965). ρ: the intraclass
    correlation of the values (of an analysis of variance, between 0 and 1); without values 1, the worst case, in which clusters of one
    size count once."""
    names = {name: k for k, name in enumerate(dict.fromkeys(clusters))}
    code = np.array([names[c] for c in clusters], int)
    n, sizes = len(code), np.bincount(code)
    if n == 0:
        return 0.0
    rho = 1.0 if values is None else _intraclass(np.asarray(values, float), code, sizes)
    return float(n / (1 + rho * ((sizes**2).sum() / n - 1)))


def detectable_rate(n: int, p0: float, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest rate above p0 that the exact one-sided binomial test tells from p0 with that power. NaN: not even a rate of 1."""
    _check(n, alpha, power)
    if not 0 <= p0 <= 1:
        raise InputError(f"{p0} is no rate; p0 lies between 0 and 1")
    k = next((k for k in range(n + 1) if tail(k, n, p0) <= alpha), None)
    return math.nan if k is None else crossing(lambda p: tail(k, n, p), power, p0)


def detectable_difference(n: int, discordant: float, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest difference of two paired rates that McNemar's exact two-sided test finds with that power among n pairs, of which a
    share `discordant` differs: δ = share(only first) − share(only second), at most `discordant`. NaN: not even then."""
    _check(n, alpha, power)
    if not 0 < discordant <= 1:
        raise InputError(f"{discordant} is no share of pairs that differ; it lies above 0 and up to 1")
    chance = [_pmf(n, m, discordant) for m in range(n + 1)]
    some = [(m, p, _critical(m, alpha)) for m, p in enumerate(chance) if p > 1e-12]

    def found(delta: float) -> float:
        theta = (1 + delta / discordant) / 2
        return sum(p * (tail(k, m, theta) + tail(k, m, 1 - theta)) for m, p, k in some if k <= m)

    return crossing(found, power, 0.0, discordant) if found(discordant) >= power else math.nan


def _critical(m: int, alpha: float) -> int:
    """The smallest larger count of m discordant pairs that is significant; m + 1 if none is."""
    above = np.cumsum([_pmf(m, k, 0.5) for k in range(m, m // 2, -1)])  # P(X ≥ m), P(X ≥ m−1), …
    return m + 1 - int((2 * above <= alpha).sum())


def _pmf(n: int, k: int, p: float) -> float:
    fact = log_factorials(n)
    if p == 1:
        return float(k == n)
    return math.exp(fact[n] - fact[k] - fact[n - k] + k * math.log(p) + (n - k) * math.log1p(-p))


def _intraclass(values: np.ndarray, code: np.ndarray, sizes: np.ndarray) -> float:
    n, k = len(values), len(sizes)
    if n != len(code):
        raise InputError(f"{n} values for {len(code)} rows; give one a row")
    if k < 2 or k == n:
        return 1.0 if k < 2 else 0.0
    means = np.bincount(code, values) / sizes
    between = (sizes * (means - values.mean()) ** 2).sum() / (k - 1)
    within = ((values - means[code]) ** 2).sum() / (n - k)
    per = (n - (sizes**2).sum() / n) / (k - 1)
    below = between + (per - 1) * within
    return 1.0 if below == 0 else float(min(1.0, max(0.0, (between - within) / below)))


def _check(n: int, alpha: float, power: float) -> None:
    if n < 1 or not 0 < alpha < 1 or not 0 < power < 1:
        raise InputError(f"n = {n}, alpha = {alpha}, power = {power}; n is 1 or more, alpha and power lie between 0 and 1")
