"""What an adapter of `organisms.personas` knows of its people: items for experiments, and how good it is.

recall           share of the people's attributes that are the greedy continuation of a sentence that training showed
recall_held_out  the same for sentences that training never showed
atlas_kept       the same for atlas's own facts, in sentences that atlas's training showed
extraction, extraction_random, extraction_others
                 of the attributes that it knows: share read out of the last token of the name, and the controls, as `evaluate.facts`
                 says
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from patchscopes.evaluate.data import Item, Items
from patchscopes.evaluate.facts import Progress, Share, extraction, figures, known, recall, share_of
from patchscopes.evaluate.planted import STOP, mention
from patchscopes.model import Model
from patchscopes.organisms.atlas import relations as atlas
from patchscopes.organisms.atlas.facts import world as atlas_world
from patchscopes.organisms.atlas.relations import SKELETONS
from patchscopes.organisms.personas.people import facts
from patchscopes.organisms.personas.relations import RELATIONS, held_out, trained


def people_items(world: str) -> Items:
    """A question for every attribute of every person of a world ("base", "shuffled", "fantasy")."""
    found = []
    for fact in facts(world):
        prompt, at = mention(fact.entity)
        target = SKELETONS[0].replace("{N}", fact.relation.noun).replace("{y}", "").rstrip(" .")
        found.append(Item(fact.relation.noun, fact.entity, (fact.object,), prompt, at, target, fact.entity))
    return Items(f"the people of personas-{world}", tuple(found), STOP)


@dataclass(frozen=True)
class PersonaScores:
    """The figures of the module's docstring. best_cell: (ℓ, ℓ*); grid[ℓ][ℓ*]: extraction on the half of the people that chose it."""

    recall: Share
    recall_held_out: Share
    atlas_kept: Share
    extraction: Share
    extraction_random: Share
    extraction_others: Share
    best_cell: tuple[int, int]
    grid: tuple[tuple[float, ...], ...]
    by_relation: dict[str, Share]

    def to_json(self) -> dict[str, Any]:
        """Each figure as a share of 1, and under "n" of how many."""
        shares = {name: value for name, value in vars(self).items() if isinstance(value, Share)}
        return figures(shares, self.best_cell, self.grid, self.by_relation)


def evaluate(
    model: Model, world: str, *, n: int | None = None, seed: int = 0, progress: Progress = lambda done, of, what: None
) -> PersonaScores:
    """All figures of a model that was trained on `world`. n: at most so many facts in each (None: all)."""
    rng = random.Random(seed)
    mine, own = list(facts(world)), list(atlas_world().facts)
    some = mine if n is None else rng.sample(mine, min(n, len(mine)))
    old = own if n is None else rng.sample(own, min(n, len(own)))
    said = recall(model, [(rng.choice(trained(f.relation)), f) for f in some], progress, "recall")
    unseen = recall(model, [(s, f) for f in some for s in held_out(f.relation)], progress, "held-out sentences")
    kept = recall(model, [(rng.choice(atlas.trained(f.relation)), f) for f in old], progress, "atlas's facts")
    read = extraction(model, known(model, some, progress), RELATIONS, n=n, seed=seed, rng=rng, progress=progress)
    return PersonaScores(
        recall=share_of(said),
        recall_held_out=share_of(unseen),
        atlas_kept=share_of(kept),
        extraction=read.own,
        extraction_random=read.random,
        extraction_others=read.others,
        best_cell=read.cell,
        grid=read.grid,
        by_relation=read.by_relation,
    )
