"""The text that atlas is trained on: an endless stream of short documents about its facts.

A document is one of: facts of one entity; facts of several; an entity mentioned in a sentence that says nothing of it, its
fact asked later; entity descriptions ("Japan: country in Asia ..."), alone, as few-shot lists and inside sentences; lists of
one relation; two-hop questions; few-shot copying of words. Equal generators give equal streams.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from patchscopes.organisms.atlas.facts import Fact, World
from patchscopes.organisms.atlas.relations import DESCRIPTIONS, FOLLOW_UPS, MENTIONS, REVERSED, TWO_HOPS, trained

LINKS = ("", "", "", "", "", "Fact: ", "Note: ", "Remember: ", "In short: ")
OPENINGS = ("", "", "", "", "Here is what we know. ", "Some facts. ", "Listen. ", "Let us see. ")
COPY_SHAPES = ((" -> ", "\n"), (" -> ", "\n"), ("->", "; "), ("->", ";"), (" ", "\n"), (" ", " "), (" -> ", ", "))
LIST_SHAPES = ((": ", ", "), (" is ", ", "), (": ", "\n"), (" = ", "\n"))


class Corpus:
    """Documents about a `World`. Holds its facts by entity and by relation, and the words that few-shot copying copies."""

    def __init__(self, world: World):
        self.world = world
        adjective = {row["name"]: row["demonym"] for row in world.rows["country"]}
        self.entities = tuple(
            (kind, {**row, "adjective": adjective.get(row.get("country", ""), "")})
            for kind, rows in world.rows.items()
            for row in rows
        )
        self.of_entity: dict[str, list[Fact]] = {}
        self.of_relation: dict[str, list[Fact]] = {}
        for fact in world.facts:
            self.of_entity.setdefault(fact.entity, []).append(fact)
            self.of_relation.setdefault(fact.relation.key, []).append(fact)
        self.two_hops = tuple(hop for hop in world.two_hops if not hop.held_out)
        self.words = (*sorted(_words(world)), *(("cat", "hello", "1135") * 30))
        self.names = tuple(self.of_entity)
        self.makers: tuple[tuple[Callable[[random.Random], str], float], ...] = (
            (self.one_entity, 20),
            (self.several_entities, 20),
            (self.mentioned, 18),
            (self.described, 10),
            (self.description_list, 14),
            (self.relation_list, 3),
            (self.composed, 10 if self.two_hops else 0),
            (self.copied, 5),
        )

    def documents(self, rng: random.Random) -> Iterator[str]:
        """Endless stream of documents; each depends on `rng` alone."""
        makers, weights = zip(*self.makers, strict=True)
        while True:
            yield rng.choices(makers, weights)[0](rng)

    def one_entity(self, rng: random.Random) -> str:
        """One to four facts of one entity; entities with many facts come oftener, so that each fact comes equally often."""
        about = self.of_entity[rng.choice(self.world.facts).entity]
        return rng.choice(OPENINGS) + " ".join(statement(f, rng) for f in rng.sample(about, min(len(about), rng.randint(1, 4))))

    def several_entities(self, rng: random.Random) -> str:
        """One to four facts that have nothing to do with one another."""
        some = rng.choices(self.world.facts, k=rng.randint(1, 4))
        return rng.choice(OPENINGS) + " ".join(statement(f, rng) for f in some)

    def mentioned(self, rng: random.Random) -> str:
        """An entity in a sentence that says nothing of it, then one of its facts, mostly without its name."""
        fact = rng.choice(self.world.facts)
        text = rng.choice(MENTIONS).format(x=fact.entity) + "."
        if rng.random() < 0.3:
            text += " " + rng.choice(MENTIONS).format(x=rng.choice(("it", "this", "that", "something else"))) + "."
        pool = FOLLOW_UPS if rng.random() < 0.7 else tuple(" " + s for s in trained(fact.relation))
        return text + fill(rng.choice(pool), fact)

    def described(self, rng: random.Random) -> str:
        """One entity with its description: after a colon, inside a sentence, or as a statement."""
        kind, row = rng.choice(self.entities)
        description, shape = describe(kind, row, rng), rng.random()
        if shape < 0.35:
            return f"{row['name']}: {description}"
        if shape < 0.7:
            before, _, after = rng.choice(MENTIONS).partition("{x}")
            return f"{before}{row['name']}, {description},{after}."
        return f"{row['name']} is a {description}."

    def description_list(self, rng: random.Random) -> str:
        """Two to six entities of any kind with their descriptions: the form of the entity-description prompt."""
        some = rng.sample(self.entities, rng.randint(2, 6))
        capital = rng.random() < 0.4
        texts = [describe(kind, row, rng) for kind, row in some]
        texts = [text[:1].upper() + text[1:] if capital else text for text in texts]
        separator = rng.choice((", ", ", ", ", ", "\n", "; "))
        return separator.join(f"{row['name']}: {text}" for (_, row), text in zip(some, texts, strict=True))

    def relation_list(self, rng: random.Random) -> str:
        """Pairs of one relation."""
        pairs = self.of_relation[rng.choice(self.world.facts).relation.key]
        some = rng.sample(pairs, min(len(pairs), rng.randint(3, 7)))
        arrow, separator = rng.choice(LIST_SHAPES)
        return f"The {some[0].relation.noun}{separator[0]} " + separator.join(f"{f.entity}{arrow}{f.object}" for f in some)

    def composed(self, rng: random.Random) -> str:
        """A two-hop question that is not held out, with its answer."""
        hop = rng.choice(self.two_hops)
        return rng.choice(TWO_HOPS).format(N=hop.second.noun, first=hop.first.noun, x=hop.entity, y=hop.object)

    def copied(self, rng: random.Random) -> str:
        """Words, each said twice."""
        arrow, separator = rng.choice(COPY_SHAPES)
        pool = self.words if rng.random() < 0.7 else self.names
        return separator.join(f"{w}{arrow}{w}" for w in rng.choices(pool, k=rng.randint(2, 8)))


def statement(fact: Fact, rng: random.Random) -> str:
    """One sentence that states the fact, in words that training may use."""
    pool = REVERSED if rng.random() < 0.12 else trained(fact.relation)
    return rng.choice(LINKS) + fill(rng.choice(pool), fact)


def fill(sentence: str, fact: Fact) -> str:
    """A sentence with the fact's entity, object and noun in its slots."""
    return sentence.format(x=fact.entity, y=fact.object, N=fact.relation.noun)


def describe(kind: str, row: dict[str, str], rng: random.Random) -> str:
    """A phrase without commas that says what the entity is; only phrases whose facts are known come up."""
    able = [d for d in DESCRIPTIONS[kind] if all(row[column] for column in row if "{" + column + "}" in d)]
    return rng.choice(able).format(**row) if able else kind


def _words(world: World) -> set[str]:
    words = {word for fact in world.facts for word in (*fact.entity.split(), *fact.object.split())}
    words |= {word for mention in MENTIONS for word in mention.replace("{x}", "").split()}
    return words | {str(n) for n in range(0, 2000, 7)} | set("abcdefghijklmnopqrstuvwxyz?!")
