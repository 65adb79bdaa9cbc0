"""Exact binomial tails, and the interval of Clopper and Pearson (1934) that follows from them.

    P(X ≥ k) = Σ_{i≥k} C(n, i) pⁱ (1−p)ⁿ⁻ⁱ

The interval of a rate of k hits in n independent rows holds every p of which neither P(X ≥ k) nor P(X ≤ k) is below (1 − level)/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from patchscopes.core.errors import InputError

LEVEL, STEPS = 0.95, 100


def tail(k: int, n: int, p: float) -> float:
    """P(X ≥ k) of X ~ Binomial(n, p)."""
    if n < 0 or not 0 <= p <= 1:
        raise InputError(f"no binomial has n = {n} and p = {p}; n is 0 or more and p lies between 0 and 1")
    if k <= 0:
        return 1.0
    if k > n or p == 0:
        return 0.0
    if p == 1:
        return 1.0
    i = np.arange(k, n + 1)
    fact = log_factorials(n)
    terms = fact[n] - fact[i] - fact[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    return min(1.0, float(np.exp(terms).sum()))


def clopper_pearson(hits: int, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval (low, high) of a rate; of no rows (NaN, NaN)."""
    if not 0 <= hits <= n:
        raise InputError(f"{hits} hits in {n} rows; hits lie between 0 and the number of rows")
    if n == 0:
        return math.nan, math.nan
    beyond = (1 - level) / 2
    low = 0.0 if hits == 0 else crossing(lambda p: tail(hits, n, p), beyond)
    high = 1.0 if hits == n else crossing(lambda p: tail(hits + 1, n, p), 1 - beyond)
    return low, high


def crossing(rises: Callable[[float], float], level: float, low: float = 0.0, high: float = 1.0) -> float:
    """Where a rising function reaches a level between two points, by bisection."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < level else (low, middle)
    return (low + high) / 2


def log_factorials(n: int) -> np.ndarray:
    """[0…n]: ln i!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
