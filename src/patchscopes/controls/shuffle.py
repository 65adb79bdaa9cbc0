"""Shuffled states: every row gets the state of another one, within its group (relation) or from another group.

A state of another row of the same relation keeps what all questions of a relation have in common and takes away whom this one is about;
one of another relation takes away both. How a score with shuffled states compares with that with their own is a rate, and no test: for a
p-value whose null holds in small groups too see `evaluate.permutation.paired`.

A derangement is found by a turn: the rows of what must not meet stand together in random order, and all are moved on by the size of the
largest such block. Where one block is more than half of all, some rows have no partner.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from patchscopes.core.errors import InputError


def shuffled(
    groups: Sequence[Hashable], *, within: bool = True, clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> list[int | None]:
    """For every row the one whose state it gets, each at most once: another row of the same group (within), or one of another group.

    clusters  which entity a row is about: rows of one entity never stand in for each other. None: every row is its own
    None where no partner is left.
    """
    if clusters is not None and len(clusters) != len(groups):
        raise InputError(f"{len(clusters)} clusters were given for {len(groups)} rows; expected one each")
    rng = random.Random(f"{seed} shuffled {within}")
    own = list(range(len(groups))) if clusters is None else list(clusters)
    found: list[int | None] = [None] * len(groups)
    if not within:
        _turned(list(range(len(groups))), groups, rng, found)
        for k, j in enumerate(found):  # an entity may have rows in several groups
            if clusters is not None and j is not None and own[j] == own[k]:
                found[k] = None
        return found
    rows: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        rows.setdefault(group, []).append(k)
    for mine in rows.values():
        _turned(mine, own, rng, found)
    return found


def _turned(rows: Sequence[int], apart: Sequence[Hashable], rng: random.Random, found: list[int | None]) -> None:
    """Pair `rows` so that no two of a pair have the same `apart`, as many as can be."""
    blocks: dict[Hashable, list[int]] = {}
    for k in rows:
        blocks.setdefault(apart[k], []).append(k)
    lists = list(blocks.values())
    rng.shuffle(lists)
    for one in lists:
        rng.shuffle(one)
    largest = max(lists, key=len, default=[])
    rest = [k for one in lists if one is not largest for k in one]
    if len(largest) > len(rest):  # only as many of it as there are others to meet
        largest = largest[: len(rest)]
        for a, b in zip(largest, rest, strict=True):
            found[a], found[b] = b, a
        return
    order = [k for one in lists for k in one]
    for i, k in enumerate(order):
        found[k] = order[(i + len(largest)) % len(order)]
