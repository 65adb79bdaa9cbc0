"""Does a model know planted facts, and can they be read out of its hidden states?

recall       the object is the greedy continuation of a sentence up to it
extraction   the object is read out through `extract`, patching only the last token of the entity, mentioned in a sentence that says
             nothing of it, of a form that training never showed; at one cell (ℓ, ℓ*) for all relations, chosen on other facts

Beside extraction: the same with random vectors of the same norm, and with the vector of another entity that has the relation, both scored
against the fact's own object. An object is read out if the text begins with it, as whole words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from patchscopes.controls.vectors import random_like, seed_of
from patchscopes.evaluate.scoring import begins_with
from patchscopes.model import Model
from patchscopes.organisms.atlas.facts import Fact
from patchscopes.organisms.atlas.relations import HELD_OUT_MENTIONS, SKELETONS, Relation
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
class Extraction:
    """What can be read out of hidden states. cell: (ℓ, ℓ*), chosen on one half of the entities; grid[ℓ][ℓ*]: the share on that half;
    the others are of the other half: by relation all relations that it has."""

    cell: tuple[int, int]
    grid: tuple[tuple[float, ...], ...]
    own: Share
    random: Share
    others: Share
    by_relation: dict[str, Share]


def figures(
    shares: Mapping[str, Share], best_cell: tuple[int, int], grid: Sequence[Sequence[float]], by_relation: Mapping[str, Share]
) -> dict[str, Any]:
    """Scores for JSON: each figure as a share of 1, and under "n" of how many."""
    return {
        **{name: share.share for name, share in shares.items()},
        "n": {name: share.n for name, share in shares.items()},
        "best_cell": {"layer": best_cell[0], "target_layer": best_cell[1]},
        "grid": [list(row) for row in grid],
        "by_relation": {name: asdict(share) for name, share in by_relation.items()},
    }


def share_of(hits: Sequence[bool]) -> Share:
    """The share of hits; NaN of none."""
    return Share(sum(hits) / len(hits) if hits else float("nan"), len(hits))


def recall(model: Model, asked: Sequence[tuple[str, Fact]], progress: Progress, what: str) -> list[bool]:
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


def known(model: Model, facts: Sequence[Fact], progress: Progress) -> list[Fact]:
    """Those of the facts that the model says in the plainest sentence."""
    said = recall(model, [(SKELETONS[0], fact) for fact in facts], progress, "known facts")
    return [fact for fact, ok in zip(facts, said, strict=True) if ok]


def extraction(
    model: Model,
    known: Sequence[Fact],
    relations: Sequence[Relation],
    *,
    n: int | None,
    seed: int,
    rng: random.Random,
    progress: Progress,
) -> Extraction:
    """Read out the facts that the model knows. n: at most so many choose the cell (None: `SELECTION`)."""
    half = [[f for f in known if seed_of(f.entity) % 2 == k] for k in (0, 1)]
    chosen = rng.sample(half[0], min(SELECTION if n is None else n, len(half[0])))
    top = model.n_layers
    everywhere = [(layer, other) for layer in range(top + 1) for other in range(top + 1)]
    grid = _extracted(model, chosen, relations, everywhere, progress, "choosing a cell")
    # among equals the deepest source layer: at layer 0 a name that ends in a token of its own is there without any context
    best = max(everywhere, key=lambda cell: (share_of(grid[cell]).share, cell[0]))
    scored = _extracted(model, half[1], relations, [best], progress, "extraction")[best]
    noise = _extracted_from_random(model, half[1], relations, best, seed, progress)
    strangers = _extracted_from_others(model, half[1], relations, best, rng, progress)
    return Extraction(
        cell=best,
        grid=tuple(tuple(share_of(grid[layer, other]).share for other in range(top + 1)) for layer in range(top + 1)),
        own=share_of(scored),
        random=share_of(noise),
        others=share_of(strangers),
        by_relation={
            r.key: share_of([ok for f, ok in zip(half[1], scored, strict=True) if f.relation == r])
            for r in relations
            if any(f.relation == r for f in half[1])
        },
    )


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


def _by_relation(facts: Sequence[Fact], relations: Sequence[Relation]) -> list[list[int]]:
    return [found for r in relations if (found := [k for k, f in enumerate(facts) if f.relation == r])]


def _extracted(
    model: Model,
    facts: Sequence[Fact],
    relations: Sequence[Relation],
    cells: Sequence[tuple[int, int]],
    progress: Progress,
    what: str,
) -> dict[tuple[int, int], list[bool]]:
    """For every cell and fact: is the object read out?"""
    hits = {cell: [False] * len(facts) for cell in cells}
    layers, others = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
    done = 0
    for mine in _by_relation(facts, relations):
        scope = _scope(facts[mine[0]], others)
        table = scope([_source(model, facts[k], layers) for k in mine], controls=False).table
        for row in table.select("prompt", "source_layer", "target_layer", "text").iter_rows():
            k = mine[row[0]]
            hits[row[1], row[2]][k] = begins_with(row[3], facts[k].object)
        done += len(mine)
        progress(done, len(facts), what)
    return hits


def _extracted_from(
    model: Model,
    facts: Sequence[Fact],
    relations: Sequence[Relation],
    cell: tuple[int, int],
    sources: Callable[[list[int]], Source | list[Source]],
    progress: Progress,
    what: str,
) -> list[bool]:
    """Each fact's question put to other vectors than its own: sources(facts of one relation) gives one for each."""
    hits = [False] * len(facts)
    done = 0
    for mine in _by_relation(facts, relations):
        texts = _scope(facts[mine[0]], [cell[1]])(sources(mine), controls=False).table["text"]
        for k, text in zip(mine, texts, strict=True):
            hits[k] = begins_with(text, facts[k].object)
        done += len(mine)
        progress(done, len(facts), what)
    return hits


def _extracted_from_random(
    model: Model, facts: Sequence[Fact], relations: Sequence[Relation], cell: tuple[int, int], seed: int, progress: Progress
) -> list[bool]:
    """Random vectors with the norms of the facts' own."""

    def noise(mine: list[int]) -> Source:
        places = [place for k in mine for place in _source(model, facts[k], [cell[0]]).places()]
        looked = look(model, places, [cell[0]], "resid")
        own = torch.stack([looked.vectors[i, cell[0]][-1] for i in range(len(mine))])
        return Source.of_vectors(model, random_like(own, f"{seed} {facts[mine[0]].relation.key}"), layer=cell[0])

    return _extracted_from(model, facts, relations, cell, noise, progress, "random vectors")


def _extracted_from_others(
    model: Model,
    facts: Sequence[Fact],
    relations: Sequence[Relation],
    cell: tuple[int, int],
    rng: random.Random,
    progress: Progress,
) -> list[bool]:
    """The vectors of other entities that have the relation: shifted by a random number of places. A relation of one fact has none."""
    counts = Counter(fact.relation.key for fact in facts)
    shared = [fact for fact in facts if counts[fact.relation.key] > 1]

    def strangers(mine: list[int]) -> list[Source]:
        shift = rng.randrange(1, len(mine))
        return [_source(model, shared[mine[(i + shift) % len(mine)]], [cell[0]]) for i in range(len(mine))]

    return _extracted_from(model, shared, relations, cell, strangers, progress, "other entities' vectors")
