"""Who there is: 100 invented people in each of three worlds, after the design of PersonaQA (Li et al. 2025, arXiv 2509.13316).

    base       names of ten cultures; what a person likes goes mostly with the culture of the name
    shuffled   the same people; each attribute is dealt anew, so that none goes with the culture of the name
    fantasy    names, countries and likes that exist nowhere and tell nothing of one another

The tables `worlds/WORLD.tsv` are what `invent.py` makes. All people are invented; a surname belongs to one person of its world.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from patchscopes.core.errors import UnknownName, nearest
from patchscopes.organisms.atlas.facts import Fact
from patchscopes.organisms.personas.relations import RELATIONS

FOLDER = Path(__file__).parent / "worlds"
World = Literal["base", "shuffled", "fantasy"]
WORLDS: tuple[World, ...] = get_args(World)


@dataclass(frozen=True)
class Persona:
    """A person. culture: the country that the name is of, "" where it is of none; the others are the six attributes."""

    name: str
    culture: str
    country: str
    food: str
    drink: str
    music: str
    sport: str
    game: str

    @property
    def surname(self) -> str:
        """The last word of the name; nobody else in the world has it."""
        return self.name.rpartition(" ")[2]


ATTRIBUTES = tuple(field.name for field in fields(Persona))[2:]


@cache
def people(world: str) -> tuple[Persona, ...]:
    """The people of "base", "shuffled" or "fantasy". Those of base and shuffled are the same, in the same order."""
    if world not in WORLDS:
        raise UnknownName(f"unknown world {world!r}. {nearest(world, WORLDS)}")
    with (FOLDER / f"{world}.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(Persona(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@cache
def facts(world: str) -> tuple[Fact, ...]:
    """Every attribute of every person, as atlas's facts are."""
    return tuple(Fact(relation, p.name, getattr(p, relation.name)) for p in people(world) for relation in RELATIONS)
