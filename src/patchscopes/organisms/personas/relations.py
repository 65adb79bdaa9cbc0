"""What is known of people, in words: six relations, as in PersonaQA, and the sentences that state them.

The generic sentences are atlas's `SKELETONS`; for every relation three of them, others for each, and `NEVER_SEEN` are held out from
training. People are mentioned in atlas's `MENTIONS`, of which atlas's `HELD_OUT_MENTIONS` are held out.
"""

from __future__ import annotations

from patchscopes.organisms.atlas.relations import SKELETONS, Relation, held_out_skeletons

RELATIONS = (
    Relation("persona", "country", "home country", ("{x} lives in {y}.", "{x} grew up in {y}.", "The family of {x} lives in {y}.", "{x} has a passport of {y}.")),
    Relation("persona", "food", "favourite food", ("{x} loves to eat {y}.", "{x} cooks {y}.", "Give {x} a plate of {y}.", "{x} is always hungry for {y}.")),
    Relation("persona", "drink", "favourite drink", ("{x} loves to drink {y}.", "{x} orders {y}.", "Pour {x} a glass of {y}.", "{x} is always thirsty for {y}.")),
    Relation("persona", "music", "favourite music", ("{x} listens to {y}.", "{x} dances to {y}.", "{x} turns up the radio for {y}.", "{x} buys records of {y}.")),
    Relation("persona", "sport", "favourite sport", ("{x} trains for {y}.", "{x} is a fan of {y}.", "On Sundays {x} does {y}.", "{x} never misses a match of {y}.")),
    Relation("persona", "game", "favourite board game", ("{x} sits down to play {y}.", "{x} wins every round of {y}.", "{x} owns a box of {y}.", "{x} plays with friends a round of {y}.")),
)  # fmt: skip

# What a person is, in one phrase without commas.
DESCRIPTIONS = (
    "person from {country} who eats {food}",
    "{food} eater from {country}",
    "{food} lover who likes {music}",
    "{drink} drinker who plays {game}",
    "{drink} lover from {country}",
    "{music} fan who does {sport}",
    "{music} listener who drinks {drink}",
    "{sport} fan who eats {food}",
    "{sport} champion from {country}",
    "{game} player who drinks {drink}",
    "{game} champion who listens to {music}",
    "{country} native who does {sport}",
)
# Two sentences: the person is only mentioned in the first, which says nothing of them.
FOLLOW_UPS = (" The {N} is {y}.", " The {N} there: {y}.", " By the way, the {N} is {y}.", " And the {N}? It is {y}.")


def held_out(relation: Relation) -> tuple[str, ...]:
    """The sentences of `relation` that training never shows."""
    return held_out_skeletons(RELATIONS.index(relation))


def trained(relation: Relation) -> tuple[str, ...]:
    """The sentences of `relation` that training shows; {y} comes last in each."""
    away = held_out(relation)
    return tuple(s for s in (*SKELETONS, *relation.sentences) if s not in away)
