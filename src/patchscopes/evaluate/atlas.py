"""How good the bundled model atlas is: does it know its facts, and can they be read out of its hidden states?

recall           share of facts whose object is the greedy continuation of a sentence that training showed
recall_held_out  the same for sentences that training never showed
two_hop          the same for two-hop questions, those of training and those held out
extraction       of the facts that it knows: share read out through `extract`, patching only the last token of the entity, mentioned
                 in a sentence that says nothing of it; one cell (ℓ, ℓ*) for all relations, chosen on one half of the entities and
                 scored on the other
extraction_random, extraction_others
                 the same at the same cell with random vectors of the same norm, and with the vector of another entity that has the
                 relation, both scored against the fact's own object

An object is read out if the text begins with it, as whole words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from patchscopes.controls.vectors import random_like, seed_of
from patchscopes.evaluate.scoring import begins_with
from patchscopes.model import Model
from patchscopes.organisms.atlas.facts import Fact, world
from patchscopes.organisms.atlas.relations import HELD_OUT_MENTIONS, RELATIONS, SKELETONS, TWO_HOPS, held_out, trained
from patchscopes.scopes import Patchscope, Source, extract
from patchscopes.scopes.source import look

PROMPTS_AT_ONCE = 256
SELECTION = 600  # facts on which the cell is chosen

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Share:
    """A share of n things."""

    share: float
    n: int


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
        figures = {name: value for name, value in vars(self).items() if isinstance(value, Share)}
        return {
            **{name: figure.share for name, figure in figures.items()},
            "n": {name: figure.n for name, figure in figures.items()},
            "best_cell": {"layer": self.best_cell[0], "target_layer": self.best_cell[1]},
            "grid": [list(row) for row in self.grid],
            "by_relation": {name: asdict(share) for name, share in self.by_relation.items()},
        }


def evaluate(
    model: Model, *, n: int | None = None, share: float = 1.0, seed: int = 0, progress: Progress = lambda done, of, what: None
) -> AtlasScores:
    """All figures. n: at most so many facts in each (None: all); share: of the entities that the model was trained on."""
    rng = random.Random(seed)
    facts = list(world(share).facts)
    hops = list(world(share).two_hops)
    some = facts if n is None else rng.sample(facts, min(n, len(facts)))
    recalled = _begins(model, [(rng.choice(trained(f.relation)), f) for f in some], progress, "recall")
    unseen = _begins(model, [(s, f) for f in some for s in held_out(f.relation)], progress, "held-out sentences")
    asked = [
        (
            TWO_HOPS[k % 2].format(N=h.second.noun, first=h.first.noun, x=h.entity, y="{y}"),
            Fact(h.second, h.entity, h.object),
            h.held_out,
        )
        for k, h in enumerate(hops if n is None else rng.sample(hops, min(n, len(hops))))
    ]
    hopped = _begins(model, [(s, f) for s, f, _ in asked], progress, "two hops")
    known = [
        f for f, ok in zip(some, _begins(model, [(SKELETONS[0], f) for f in some], progress, "known facts"), strict=True) if ok
    ]
    half = [[f for f in known if seed_of(f.entity) % 2 == k] for k in (0, 1)]
    chosen = rng.sample(half[0], min(SELECTION if n is None else n, len(half[0])))
    top = model.n_layers
    everywhere = [(layer, other) for layer in range(top + 1) for other in range(top + 1)]
    grid = _extract(model, chosen, everywhere, progress, "choosing a cell")
    # among equals the deepest source layer: at layer 0 a name that ends in a token of its own is there without any context
    best = max(everywhere, key=lambda cell: (_share(grid[cell]).share, cell[0]))
    scored = _extract(model, half[1], [best], progress, "extraction")[best]
    noise = _extract_random(model, half[1], best, seed, progress)
    strangers = _extract_others(model, half[1], best, rng, progress)
    return AtlasScores(
        recall=_share(recalled),
        recall_held_out=_share(unseen),
        two_hop=_share([ok for ok, (_, _, away) in zip(hopped, asked, strict=True) if not away]),
        two_hop_held_out=_share([ok for ok, (_, _, away) in zip(hopped, asked, strict=True) if away]),
        extraction=_share(scored),
        extraction_random=_share(noise),
        extraction_others=_share(strangers),
        best_cell=best,
        grid=tuple(tuple(_share(grid[layer, other]).share for other in range(top + 1)) for layer in range(top + 1)),
        by_relation={
            r.key: _share([ok for f, ok in zip(half[1], scored, strict=True) if f.relation == r])
            for r in RELATIONS
            if any(f.relation == r for f in half[1])
        },
    )


def _share(hits: Sequence[bool]) -> Share:
    return Share(sum(hits) / len(hits) if hits else float("nan"), len(hits))


def _begins(model: Model, asked: Sequence[tuple[str, Fact]], progress: Progress, what: str) -> list[bool]:
    """For (sentence, fact): is the object the greedy continuation of the text before {y}? Greedy decoding says it exactly if each of
    its tokens is the likeliest after the ones before, and what is likeliest after it does not go on with the word."""
    hits: dict[int, bool] = {}
    texts = []
    for sentence, fact in asked:
        text = sentence.format(N=fact.relation.noun, x=fact.entity, y=fact.object)
        texts.append((model.tokens(text), len(text) - len(sentence.partition("{y}")[2]) - len(fact.object)))
    order = sorted(range(len(asked)), key=lambda k: len(texts[k][0]))
    for start in range(0, len(order), PROMPTS_AT_ONCE):
        batch = order[start : start + PROMPTS_AT_ONCE]
        logits = model.run([texts[k][0] for k in batch]).logits
        for row, k in enumerate(batch):
            tokens, at = texts[k]
            pad = logits.shape[1] - len(tokens)
            first = next(i for i, (_, stop) in enumerate(tokens.offsets) if stop > at)
            last = next(i for i, (_, stop) in enumerate(tokens.offsets) if stop >= at + len(asked[k][1].object))
            best = logits[row].argmax(-1)[pad:].tolist()
            says = all(best[i - 1] == tokens.ids[i] for i in range(first, last + 1))
            hits[k] = says and not model.decode([best[last]])[:1].isalnum()
        progress(min(start + PROMPTS_AT_ONCE, len(order)), len(order), what)
    return [hits[k] for k in range(len(asked))]


def _source(model: Model, fact: Fact, layer: list[int]) -> Source:
    """The last token of the entity in a sentence that says nothing of it, of a form never seen in training."""
    sentence = HELD_OUT_MENTIONS[seed_of(fact.entity) % len(HELD_OUT_MENTIONS)]
    before = sentence.partition("{x}")[0]
    tokens = model.tokens(sentence.format(x=fact.entity))
    return Source(model, tokens, tokens.find(fact.entity, occurrence=before.count(fact.entity) + 1), layer)


def _scope(fact: Fact, layer: list[int]) -> Patchscope:
    return extract(
        SKELETONS[0].format(N=fact.relation.noun, x="{x}", y="").rstrip(" ."), layer=layer, max_new_tokens=8, stop=(".",)
    )


def _by_relation(facts: Sequence[Fact]) -> list[list[int]]:
    return [found for r in RELATIONS if (found := [k for k, f in enumerate(facts) if f.relation == r])]


def _extract(
    model: Model, facts: Sequence[Fact], cells: Sequence[tuple[int, int]], progress: Progress, what: str
) -> dict[tuple[int, int], list[bool]]:
    """For every cell and fact: is the object read out?"""
    hits = {cell: [False] * len(facts) for cell in cells}
    layers, others = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
    done = 0
    for mine in _by_relation(facts):
        scope = _scope(facts[mine[0]], others)
        table = scope([_source(model, facts[k], layers) for k in mine], controls=False).table
        for row in table.select("prompt", "source_layer", "target_layer", "text").iter_rows():
            k = mine[row[0]]
            hits[row[1], row[2]][k] = begins_with(row[3], facts[k].object)
        done += len(mine)
        progress(done, len(facts), what)
    return hits


def _extract_from(
    model: Model,
    facts: Sequence[Fact],
    cell: tuple[int, int],
    sources: Callable[[list[int]], Source | list[Source]],
    progress: Progress,
    what: str,
) -> list[bool]:
    """Each fact's question put to other vectors than its own: sources(facts of one relation) gives one for each."""
    hits = [False] * len(facts)
    done = 0
    for mine in _by_relation(facts):
        texts = _scope(facts[mine[0]], [cell[1]])(sources(mine), controls=False).table["text"]
        for k, text in zip(mine, texts, strict=True):
            hits[k] = begins_with(text, facts[k].object)
        done += len(mine)
        progress(done, len(facts), what)
    return hits


def _extract_random(model: Model, facts: Sequence[Fact], cell: tuple[int, int], seed: int, progress: Progress) -> list[bool]:
    """Random vectors with the norms of the facts' own."""

    def noise(mine: list[int]) -> Source:
        places = [place for k in mine for place in _source(model, facts[k], [cell[0]]).places()]
        looked = look(model, places, [cell[0]], "resid")
        own = torch.stack([looked.vectors[i, cell[0]][-1] for i in range(len(mine))])
        return Source.of_vectors(model, random_like(own, f"{seed} {facts[mine[0]].relation.key}"), layer=cell[0])

    return _extract_from(model, facts, cell, noise, progress, "random vectors")


def _extract_others(
    model: Model, facts: Sequence[Fact], cell: tuple[int, int], rng: random.Random, progress: Progress
) -> list[bool]:
    """The vectors of other entities that have the relation: shifted by a random number of places. A relation of one fact has none."""
    counts = Counter(fact.relation.key for fact in facts)
    shared = [fact for fact in facts if counts[fact.relation.key] > 1]

    def strangers(mine: list[int]) -> list[Source]:
        shift = rng.randrange(1, len(mine))
        return [_source(model, shared[mine[(i + shift) % len(mine)]], [cell[0]]) for i in range(len(mine))]

    return _extract_from(model, shared, cell, strangers, progress, "other entities' vectors")
