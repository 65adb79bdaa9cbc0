"""Does a reading know whose it is? Pairings of readings with answers, against shuffled pairings.

scores[i, j] says how well the reading of row i fits the answer of row j. If readings tell nothing of their own row, the pairing i, i is
as good as any other: p = (1 + number of shuffled pairings at least as good) / (draws + 1). Shuffled within groups (relations), it asks
for more than which relation was meant.

Shuffles may leave a row in its place: only so is the true pairing one of them, and the test exact. Against derangements alone, which
leave none, p is too small in small groups (of four rows, 12 % of noise came out at p ≤ .05), so these give a rate and no p: `deranged`, the
mean over all of them, which by symmetry is the mean score against the others of the group. (One shuffle of states that leaves none in
its place: `controls.shuffled`.)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from patchscopes.core.errors import InputError

DRAWS = 2000
Kind = Literal["within", "across"]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Permuted:
    """observed: the mean score of the true pairing (over groups the mean of that in each); mean: of the shuffled ones; deranged: of
    all derangements; units: rows, or clusters, that were shuffled; alone: rows of groups with one unit, which were left out of all."""

    observed: float
    mean: float
    deranged: float
    p: float
    draws: int
    units: int
    alone: tuple[int, ...]


def paired(
    scores: np.ndarray,
    groups: Sequence[Hashable],
    clusters: Sequence[Hashable] | None = None,
    *,
    kind: Kind = "within",
    draws: int = DRAWS,
    seed: int = 0,
) -> Permuted:
    """The permutation test of scores[reading, answer]. clusters: rows of one cluster in one group are shuffled as one, with the mean of
    their scores, and a cluster that has rows in several groups is shuffled alike in all of them. "within" shuffles inside groups, "across"
    all over."""
    scores = np.asarray(scores, float)
    if scores.shape != (len(groups), len(groups)):
        raise InputError(f"scores of shape {scores.shape} for {len(groups)} rows; scores[i, j] holds every row against every row")
    if np.isnan(scores).any():
        raise InputError(f"{int(np.isnan(scores).sum())} scores are not a number; score every reading against every answer")
    names = range(len(groups)) if clusters is None else clusters
    units = _members(list(zip(groups, names, strict=True)))
    of_group = _members([key[0] for key in units])
    merged = _merged(scores, list(units.values()))
    keys = list(units.values())
    lone = [some[0] for some in of_group.values() if len(some) == 1] if kind != "across" else []
    alone = tuple(sorted(row for k in lone for row in keys[k]))
    kept = [some for some in of_group.values() if len(some) > 1 or kind == "across"]
    everyone = np.array([k for some in kept for k in some], int)
    if len(everyone) < 2:
        return Permuted(math.nan, math.nan, math.nan, math.nan, 0, len(everyone), alone)
    weight = np.concatenate([np.full(len(some), 1 / (len(some) * len(kept))) for some in kept])
    sizes = [len(everyone)] if kind == "across" else [len(some) for some in kept]
    rng = np.random.default_rng(seed)
    whose = {name: k for k, name in enumerate(dict.fromkeys(name for _, name in units))}
    entity = np.array([whose[name] for _, name in units])
    found = np.zeros(draws)
    # two random orders of all entities: in every group the first of the one gets the answer of the first of the other, and so on, so that
    # an entity's groups are shuffled alike
    orders = rng.random((2, draws, len(whose)))
    share = np.zeros(len(units))
    share[everyone] = weight
    for some in [everyone] if kind == "across" else [np.array(some) for some in kept]:
        a, b = (some[np.argsort(order[:, entity[some]], axis=1, kind="stable")] for order in orders)
        found += (share[a] * merged[a, b]).sum(axis=1)
    observed = float(weight @ merged[everyone, everyone])
    size = np.repeat(sizes, sizes)
    pool = np.repeat(np.arange(len(sizes)), sizes)
    others = (merged[np.ix_(everyone, everyone)] * (pool[:, None] == pool)).sum(axis=1) - merged[everyone, everyone]
    beaten = int((found >= observed - 1e-12 * max(1.0, abs(observed))).sum())
    p = (1 + beaten) / (draws + 1)
    return Permuted(observed, float(found.mean()), float(weight @ (others / (size - 1))), p, draws, len(everyone), alone)


def _members(names: Sequence[Name]) -> dict[Name, list[int]]:
    found: dict[Name, list[int]] = {}
    for k, name in enumerate(names):
        found.setdefault(name, []).append(k)
    return found


def _merged(scores: np.ndarray, units: Sequence[Sequence[int]]) -> np.ndarray:
    """[unit, unit]: means over the rows of each."""
    share = np.zeros((len(units), len(scores)))
    for k, rows in enumerate(units):
        share[k, list(rows)] = 1 / len(rows)
    return share @ scores @ share.T
