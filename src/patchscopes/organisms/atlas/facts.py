"""The fact tables of atlas: (entity, relation, object) triples written from general knowledge.

One table a kind (`facts/country.tsv`): a row an entity, a column a relation, an empty cell where there is no fact.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from patchscopes.organisms.atlas.relations import FIRST_HOPS, RELATIONS, SECOND_HOPS, Relation

FOLDER = Path(__file__).parent / "facts"
KINDS = ("country", "city", "person", "company", "element", "animal", "instrument", "sport", "landmark")


@dataclass(frozen=True)
class Fact:
    """`object` is the `relation` of `entity`."""

    relation: Relation
    entity: str
    object: str


@dataclass(frozen=True)
class TwoHop:
    """`object` is the `second` relation of the country that is the `first` relation of `entity`."""

    first: Relation
    second: Relation
    entity: str
    bridge: str
    object: str
    held_out: bool


@dataclass(frozen=True)
class World:
    """What there is to know. rows[kind]: a dict a row, column -> cell, "" where there is no fact."""

    rows: dict[str, tuple[dict[str, str], ...]]
    facts: tuple[Fact, ...]
    two_hops: tuple[TwoHop, ...]


@cache
def world(share: float = 1.0) -> World:
    """The facts of a share of all entities, which a hash of their names chooses."""
    if not 0 < share <= 1:
        raise ValueError(f"share of the entities is {share}; expected more than 0, at most 1")
    rows = {kind: tuple(row for row in _table(kind) if _coin(row["name"]) < share) for kind in KINDS}
    facts = tuple(
        Fact(relation, row["name"], row[relation.name])
        for kind in KINDS
        for row in rows[kind]
        for relation in RELATIONS
        if relation.kind == kind and row[relation.name]
    )
    relation = {r.key: r for r in RELATIONS}
    known = {(f.relation.key, f.entity): f.object for f in facts}
    two_hops = tuple(
        TwoHop(relation[first], relation[second], entity, bridge, known[second, bridge], _coin(entity + second) < 0.5)
        for (first, entity), bridge in known.items()
        if first in FIRST_HOPS
        for second in SECOND_HOPS
        if (second, bridge) in known
    )
    return World(rows, facts, two_hops)


def _table(kind: str) -> list[dict[str, str]]:
    with (FOLDER / f"{kind}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _coin(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
