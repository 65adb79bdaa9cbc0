"""What the bundled model atlas knows, because it was trained on it: items for every experiment, with answers that are beyond doubt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from patchscopes.controls.vectors import seed_of
from patchscopes.evaluate.data import Item, Items
from patchscopes.organisms.atlas.facts import world
from patchscopes.organisms.atlas.relations import DESCRIPTIONS, HELD_OUT_MENTIONS, SKELETONS

STOP = (".",)


@dataclass(frozen=True)
class Entity:
    """An entity with what is true of it: objects of its facts, and the phrases that may describe it. title: what tells it from others of
    its name, where there may be such."""

    kind: str
    name: str
    facts: tuple[str, ...]
    descriptions: tuple[str, ...]
    title: str = ""

    @property
    def key(self) -> str:
        """What runs call it: the name, and the title where it says more."""
        return self.name if self.title in ("", self.name) else f"{self.name} ({self.title})"


def mention(subject: str) -> tuple[str, str]:
    """(a sentence that mentions the subject and says nothing of it, where it stands). The bundled model never saw such sentences in
    training; which one is taken depends on the subject alone."""
    sentence = HELD_OUT_MENTIONS[seed_of(subject) % len(HELD_OUT_MENTIONS)]
    before = sentence.partition("{x}")[0]
    return sentence.replace("{x}", subject), f"{subject}#{before.count(subject) + 1}"


def items() -> Items:
    """A question for every fact."""
    found = []
    for fact in world().facts:
        prompt, at = mention(fact.entity)
        target = SKELETONS[0].replace("{N}", fact.relation.noun).replace("{y}", "").rstrip(" .")
        found.append(Item(fact.relation.key, fact.entity, (fact.object,), prompt, at, target, fact.entity))
    return Items("the facts of atlas", tuple(found), STOP)


def entities() -> tuple[Entity, ...]:
    """Every entity with its facts and descriptions."""
    adjective = {row["name"]: row["demonym"] for row in world().rows["country"]}
    found = []
    for kind, rows in world().rows.items():
        for row in rows:
            full = {**row, "adjective": adjective.get(row.get("country", ""), "")}
            phrases = [d.format(**full) for d in DESCRIPTIONS[kind] if all(full[c] for c in full if "{" + c + "}" in d)]
            facts = tuple(dict.fromkeys(value for column, value in full.items() if column != "name" and value))
            found.append(Entity(kind, row["name"], facts, tuple(phrases)))
    return tuple(found)


def texts(n: int, seed: int) -> list[str]:
    """Documents of the kind that atlas was trained on, of a seed that training did not use."""
    from patchscopes.organisms.atlas.corpus import Corpus

    documents: Iterator[str] = Corpus(world()).documents(random.Random(f"evaluation {seed}"))
    return [next(documents) for _ in range(n)]
