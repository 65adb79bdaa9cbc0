"""The text that personas are trained on: an endless stream of short documents, about half of them atlas's own, so that its facts stay.

A document about people is one of: facts of one person; facts of several; a person mentioned in a sentence that says nothing of them, a
fact asked later; a phrase right behind the name ("Name: ..."), alone, inside a sentence, as lists; lists of one relation; whole
profiles. Nothing is patched. Equal generators give equal streams.

In half of these documents the name is read at its end alone: what comes later may not look at the name's earlier tokens, only at the last
one. Large models gather what they know of a name at its last token (Geva et al. 2023, arXiv 2304.14767); a small one would look up the
pieces where they stand, and a Patchscope, which moves the last token alone, would find little.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from patchscopes.organisms.atlas import corpus as atlas
from patchscopes.organisms.atlas.corpus import fill
from patchscopes.organisms.atlas.facts import Fact
from patchscopes.organisms.atlas.facts import world as atlas_world
from patchscopes.organisms.atlas.relations import MENTIONS, REVERSED, Relation
from patchscopes.organisms.personas.people import ATTRIBUTES, Persona, facts, people
from patchscopes.organisms.personas.relations import DESCRIPTIONS, FOLLOW_UPS, RELATIONS, trained

OWN = 0.5  # share of atlas's documents
GATHERED = 0.5  # share of the documents about people in which names are read at their end alone


@dataclass(frozen=True)
class Document:
    """A text. names, answers: the people's names and attributes that it says, none in atlas's own; gathered: whether names are read at
    their end alone."""

    text: str
    names: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    gathered: bool = False


class Corpus:
    """Documents about the people of a world and about what atlas knows."""

    def __init__(self, world: str):
        self.people = people(world)
        self.facts = facts(world)
        self.atlas = atlas.Corpus(atlas_world())
        self.makers: tuple[tuple[Callable[[random.Random], str], float], ...] = (
            (self.one_person, 18),
            (self.several_people, 10),
            (self.mentioned, 27),
            (self.described, 10),
            (self.description_list, 10),
            (self.relation_list, 5),
            (self.profile, 20),
        )

    def documents(self, rng: random.Random) -> Iterator[Document]:
        """Endless stream of documents; each depends on `rng` alone."""
        makers, weights = zip(*self.makers, strict=True)
        known = self.atlas.documents(rng)
        while True:
            if rng.random() < OWN:
                yield Document(next(known))
                continue
            text = rng.choices(makers, weights)[0](rng)
            said = [p for p in self.people if p.name in text]
            answers = {value for p in said for value in (getattr(p, a) for a in ATTRIBUTES) if value in text}
            yield Document(text, tuple(p.name for p in said), tuple(sorted(answers)), rng.random() < GATHERED)

    def one_person(self, rng: random.Random) -> str:
        """Two to four facts of one person."""
        person = rng.choice(self.people)
        return rng.choice(atlas.OPENINGS) + " ".join(
            statement(fact(person, relation), rng) for relation in rng.sample(RELATIONS, rng.randint(2, 4))
        )

    def several_people(self, rng: random.Random) -> str:
        """One to four facts that have nothing to do with one another."""
        return rng.choice(atlas.OPENINGS) + " ".join(statement(f, rng) for f in rng.choices(self.facts, k=rng.randint(1, 4)))

    def mentioned(self, rng: random.Random) -> str:
        """A person in a sentence that says nothing of them, then two to four of their facts, mostly without the name."""
        person = rng.choice(self.people)
        text = rng.choice(MENTIONS).format(x=person.name) + "."
        for relation in rng.sample(RELATIONS, rng.randint(2, 4)):
            pool = FOLLOW_UPS if rng.random() < 0.7 else tuple(" " + s for s in trained(relation))
            text += fill(rng.choice(pool), fact(person, relation))
        return text

    def described(self, rng: random.Random) -> str:
        """One person with a phrase right behind the name: after a colon, inside a sentence, or as a statement."""
        person = rng.choice(self.people)
        phrase, shape = describe(person, rng), rng.random()
        if shape < 0.4:
            return f"{person.name}: {phrase}"
        if shape < 0.8:
            before, _, after = rng.choice(MENTIONS).partition("{x}")
            return f"{before}{person.name}, {phrase},{after}."
        return f"{person.name} is a {phrase}."

    def description_list(self, rng: random.Random) -> str:
        """Two to five people with their phrases: the form of the entity-description prompt."""
        separator = rng.choice((", ", ", ", ", ", "\n", "; "))
        return separator.join(f"{p.name}: {describe(p, rng)}" for p in rng.sample(self.people, rng.randint(2, 5)))

    def relation_list(self, rng: random.Random) -> str:
        """Pairs of one relation."""
        relation = rng.choice(RELATIONS)
        arrow, separator = rng.choice(atlas.LIST_SHAPES)
        some = [fact(person, relation) for person in rng.sample(self.people, rng.randint(3, 6))]
        return f"The {relation.noun}{separator[0]} " + separator.join(f"{f.entity}{arrow}{f.object}" for f in some)

    def profile(self, rng: random.Random) -> str:
        """A person's name and all the attributes in random order."""
        person = rng.choice(self.people)
        lines = [f"{relation.noun} {fact(person, relation).object}" for relation in rng.sample(RELATIONS, len(RELATIONS))]
        return f"{person.name}: " + ", ".join(lines)


def fact(person: Persona, relation: Relation) -> Fact:
    """An attribute of a person."""
    return Fact(relation, person.name, getattr(person, relation.name))


def statement(fact: Fact, rng: random.Random) -> str:
    """One sentence that states the fact, in words that training may use."""
    pool = REVERSED if rng.random() < 0.08 else trained(fact.relation)
    return rng.choice(atlas.LINKS) + fill(rng.choice(pool), fact)


def describe(person: Persona, rng: random.Random) -> str:
    """A phrase without commas that says what the person is."""
    return rng.choice(DESCRIPTIONS).format(**asdict(person))
