"""How often several say the same: draws of one reading, or two ways of scoring.

`mode_frequency`: the share of k draws that say what most of them say, a confidence that needs no labels (bootstrap agreement). It can
be high of readings that are alike and false.

`agreement` of two scorers (a judge and alias matching): Cohen's (1960) κ = (p_o − p_e)/(1 − p_e), p_o the share of rows on which they
agree, p_e what two independent scorers with the same rates would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import statistics
from patchscopes.evaluate.bootstrap import bootstrapped
from patchscopes.evaluate.generic import plain
from patchscopes.evaluate.paired import Table, table
from patchscopes.evaluate.statistics import Estimate


@dataclass(frozen=True)
class Mode:
    """What most of n draws say (as the first of them said it), and their share; of equals the first."""

    text: str
    share: float
    n: int


@dataclass(frozen=True)
class Agreement:
    """kappa: NaN where both say the same of every row; raw: the share of rows on which both agree; table: rows by who says yes."""

    kappa: Estimate
    raw: Estimate
    table: Table


def same_text(first: str, second: str) -> bool:
    """Whether two texts are equal but for case, spaces and punctuation at the ends."""
    return plain(first) == plain(second)


def mode_frequency(texts: Sequence[str], same: Callable[[str, str], bool] = same_text) -> Mode:
    """A draw joins the first group whose first draw is the same answer. InputError of no draws."""
    if not texts:
        raise InputError("no draws, so none is the most frequent; give one text or more")
    groups: list[list[str]] = []
    for text in texts:
        mine = next((group for group in groups if same(group[0], text)), None)
        if mine is None:
            groups.append([text])
        else:
            mine.append(text)
    largest = max(groups, key=len)
    return Mode(largest[0], len(largest) / len(texts), len(texts))


def agreement(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0
) -> Agreement:
    """Of the verdicts (0 or 1) of two scorers on the same rows, intervals over clusters."""
    counts = table(first, second)
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    kappa = bootstrapped(lambda rows: _kappa(a[rows], b[rows]), clusters, seed=seed)
    return Agreement(kappa, statistics.rate((a == b).astype(float), clusters, seed=seed), counts)


def _kappa(a: np.ndarray, b: np.ndarray) -> float:
    if not len(a):
        return math.nan
    observed, x, y = (a == b).mean(), a.mean(), b.mean()
    by_chance = x * y + (1 - x) * (1 - y)
    return float((observed - by_chance) / (1 - by_chance)) if by_chance < 1 else math.nan
