"""How good the bundled model atlas is: does it know its facts, and can they be read out of its hidden states?

recall           share of facts whose object is the greedy continuation of a sentence that training showed
recall_held_out  the same for sentences that training never showed
two_hop          the same for two-hop questions, those of training and those held out
extraction, extraction_random, extraction_others
                 of the facts that it knows: share read out of hidden states, and the controls, as `evaluate.facts` says
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from patchscopes.evaluate.facts import Progress, Share, extraction, figures, known, recall, share_of
from patchscopes.model import Model
from patchscopes.organisms.atlas.facts import Fact, world
from patchscopes.organisms.atlas.relations import RELATIONS, TWO_HOPS, held_out, trained


@dataclass(frozen=True)
class AtlasScores:
    """The figures of the module's docstring. best_cell: (ℓ, ℓ*); grid[ℓ][ℓ*]: extraction on the half that chose it."""

    recall: Share
    recall_held_out: Share
    two_hop: Share
    two_hop_held_out: Share
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
    model: Model, *, n: int | None = None, share: float = 1.0, seed: int = 0, progress: Progress = lambda done, of, what: None
) -> AtlasScores:
    """All figures. n: at most so many facts in each (None: all); share: of the entities that the model was trained on."""
    rng = random.Random(seed)
    facts = list(world(share).facts)
    hops = list(world(share).two_hops)
    some = facts if n is None else rng.sample(facts, min(n, len(facts)))
    recalled = recall(model, [(rng.choice(trained(f.relation)), f) for f in some], progress, "recall")
    unseen = recall(model, [(s, f) for f in some for s in held_out(f.relation)], progress, "held-out sentences")
    asked = [
        (
            TWO_HOPS[k % 2].format(N=h.second.noun, first=h.first.noun, x=h.entity, y="{y}"),
            Fact(h.second, h.entity, h.object),
            h.held_out,
        )
        for k, h in enumerate(hops if n is None else rng.sample(hops, min(n, len(hops))))
    ]
    hopped = recall(model, [(s, f) for s, f, _ in asked], progress, "two hops")
    read = extraction(model, known(model, some, progress), RELATIONS, n=n, seed=seed, rng=rng, progress=progress)
    return AtlasScores(
        recall=share_of(recalled),
        recall_held_out=share_of(unseen),
        two_hop=share_of([ok for ok, (_, _, away) in zip(hopped, asked, strict=True) if not away]),
        two_hop_held_out=share_of([ok for ok, (_, _, away) in zip(hopped, asked, strict=True) if away]),
        extraction=read.own,
        extraction_random=read.random,
        extraction_others=read.others,
        best_cell=read.cell,
        grid=read.grid,
        by_relation=read.by_relation,
    )
