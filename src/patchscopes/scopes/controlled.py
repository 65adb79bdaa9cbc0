"""The controls of a call: what else goes through the scope, and the evidence of its readings.

For every reading the same scope also runs with nothing patched in, a random vector of the same norm, the vector of another source at
the same layer, the layer's mean vector, and, unpatched, with the source's own words in the placeholder's place. Then its text is
scored, teacher-forced, under its second look and under the control vectors (see `controls.evidence`).

Other sources are the call's other prompts; when they are fewer than `N_OTHERS`, prompts of a built-in pool are added.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from patchscopes.controls.evidence import bits_over, p_value, verdict
from patchscopes.controls.vectors import N_OTHERS, N_RANDOM, POOL, POOL_NAME, random_like, seed_of
from patchscopes.engine.edits import Placed
from patchscopes.engine.rows import Row
from patchscopes.engine.score import Case, score, scores
from patchscopes.maps import Map
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.source import Looked, Place, look
from patchscopes.scopes.target import Target

CELLS_AT_ONCE = 256  # whose control vectors are held together


@runtime_checkable
class Scope(Protocol):
    """What controls need to know of a scope."""

    def row(self, layer: int, position: int, vector: Tensor | None, more: tuple[Placed, ...], target: int = 0) -> Row:
        """A run in which a vector is written, under the scope's further edits."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...

    @property
    def second_look(self) -> str:
        """The neutral text behind which sources are read again."""
        ...


class Controls:
    """The vectors that stand in for those of one call, and their provenance."""

    def __init__(
        self,
        origin: Model,
        target_model: Model,
        places: Sequence[Place],
        prompts: Sequence[int],
        layers: Sequence[int],
        site: str,
        looked: Looked,
        targets: Sequence[Target],
        maps: Sequence[Map],
        scope: Scope,
    ):
        self.origin, self.target_model, self.targets, self.maps, self.scope = origin, target_model, targets, maps, scope
        self.places, self.prompts, self.looked = places, prompts, looked
        self.second = look(origin, places, layers, site, behind=scope.second_look)
        pool = [Place(-1 - k, text, tokens, len(tokens) - 1) for k, text in enumerate(POOL) for tokens in [origin.tokens(text)]]
        fewest = min(len({q for q in range(len(places)) if places[q].text != place.text}) for place in places)
        self.pool = pool if fewest < N_OTHERS else []
        self.pool_first = look(origin, self.pool, layers, site)
        self.pool_second = look(origin, self.pool, layers, site, behind=scope.second_look)
        self.others = [self._choose_others(p) for p in range(len(places))]
        self._filled: dict[tuple[int, int], Tokens | None] = {}

    def provenance(self) -> dict[str, Any]:
        """What the controls were."""
        return {
            "pool": POOL_NAME if self.pool else None,
            "pool_prompts": [place.text for place in self.pool],
            "others_per_reading": [len(o) for o in self.others],
            "random_per_reading": N_RANDOM,
            "second_look": self.scope.second_look,
        }

    def _choose_others(self, p: int) -> list[tuple[str, int]]:
        """("call", place) or ("pool", k) of the sources that place p is compared with: never its own prompt."""
        rng = random.Random(seed_of(f"{self.scope.seed} others {p}"))
        by_prompt: dict[str, list[int]] = {}
        for q, place in enumerate(self.places):
            if place.text != self.places[p].text and (place.tokens is None) == (self.places[p].tokens is None):
                by_prompt.setdefault(place.text, []).append(q)
        mine = [("call", rng.choice(qs)) for qs in by_prompt.values()]  # one place of each prompt: places of one prompt are alike
        if len(mine) > N_OTHERS:
            return rng.sample(mine, N_OTHERS)
        spare = [("pool", k) for k in range(len(self.pool)) if self.pool[k].text != self.places[p].text]
        return mine + rng.sample(spare, min(len(spare), N_OTHERS - len(mine)))

    def vector(self, which: tuple[str, int], layer: int, *, second: bool) -> Tensor | None:
        """The first or second look at one of the others; None for a bare vector, which has no second."""
        kind, k = which
        if kind == "pool":
            return (self.pool_second if second else self.pool_first).vectors[k, layer]
        return (self.second if second else self.looked).vectors.get((k, layer))

    def filled(self, cell: Cell) -> Tokens | None:
        """The target prompt with the source's own words, up to and with the position read, in the placeholder's place."""
        key = (cell.target, cell.place)
        if key not in self._filled:
            place = self.places[cell.place]
            words = place.tokens.upto(place.position) if place.tokens else ""
            self._filled[key] = self.targets[cell.target].filled(words)
        return self._filled[key]

    def runs(self, cell: Cell) -> Iterator[tuple[str, tuple, Tokens, int, Tensor | None]]:
        """Every control run of a cell: (control, key, prompt, position, vector or None). Runs of equal key are one."""
        target = self.targets[cell.target]
        f, at = self.maps[cell.map], (cell.target, cell.target_layer, cell.map, cell.draw)
        yield "nothing", ("nothing", cell.target, cell.draw), target.tokens, target.position, None
        own = f(self.looked.vectors[cell.place, cell.source_layer])
        key = f"{self.scope.seed} random {cell.key}"
        yield "random", ("random", *cell.key), target.tokens, target.position, random_like(own[None], key)[0]
        others = self.others[cell.place]
        if others:
            chosen = others[seed_of(f"{self.scope.seed} other {cell.key}") % len(others)]
            vector = self.vector(chosen, cell.source_layer, second=False)
            assert vector is not None
            yield "other", ("other", chosen, cell.source_layer, *at), target.tokens, target.position, f(vector)
            states = [self.vector(o, cell.source_layer, second=False) for o in others]
            mean = torch.stack([s for s in states if s is not None]).mean(0)
            yield "mean", ("mean", tuple(others), cell.source_layer, *at), target.tokens, target.position, f(mean)
        words = self.filled(cell)
        if words is not None:
            yield "text", ("text", words.ids, cell.draw), words, 0, None


def evidence_of(
    world: Controls,
    cells: Sequence[Cell],
    texts_of: Mapping[tuple[int, ...], Sequence[int]],
    progress: Callable[[int, int, str], None],
) -> dict[tuple[int, ...], dict[str, Any]]:
    """The evidence columns of every cell, by its key. `texts_of`: the tokens that each reading said."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    done = 0
    for t in range(len(world.targets)):
        mine = [cell for cell in cells if cell.target == t]
        for chunk in (mine[i : i + CELLS_AT_ONCE] for i in range(0, len(mine), CELLS_AT_ONCE)):
            vectors = _under_vectors(world, chunk, texts_of)
            words = _under_words(world, chunk, texts_of)
            for cell in chunk:
                found[cell.key] = _columns(vectors.get(cell.key), words.get(cell.key))
            done += len(chunk)
            progress(done, len(cells), "weighing evidence")
    return found


def _columns(scores: dict[str, list[float]] | None, words: float | None) -> dict[str, Any]:
    if scores is None:  # a vector without a prompt has no second look
        return {"verdict": "not run"}
    (own,) = scores["own"]
    nothing, random_, others = (torch.tensor(scores[kind], dtype=torch.float64) for kind in ("nothing", "random", "others"))
    over_nothing, over_random, over_others = (bits_over(own, control) for control in (nothing, random_, others))
    p = p_value(own, others)
    return {
        "bits_over_nothing": over_nothing,
        "bits_over_random": over_random,
        "bits_over_others": over_others,
        "bits_over_text": None if words is None else bits_over(own, torch.tensor([words], dtype=torch.float64)),
        "p_value": p,
        "verdict": verdict(over_nothing, over_random, over_others, p),
    }


def _under_vectors(
    world: Controls, cells: Sequence[Cell], texts_of: Mapping[tuple[int, ...], Sequence[int]]
) -> dict[tuple[int, ...], dict[str, list[float]]]:
    """log p (nats) of each reading's text under its second look ("own") and under every control vector."""
    model, target = world.target_model, world.targets[cells[0].target]
    rows, owners, texts = [], [], []
    for cell in cells:
        second = world.second.vectors.get((cell.place, cell.source_layer))
        if second is None:
            continue
        f = world.maps[cell.map]
        own = f(second)
        states = [world.vector(o, cell.source_layer, second=True) for o in world.others[cell.place]]
        random_ = random_like(own.expand(N_RANDOM, -1), f"{world.scope.seed} scored {cell.key}")
        kinds: list[tuple[str, Tensor | None]] = [("own", own), ("nothing", None)]
        kinds += [("random", v) for v in random_] + [("others", f(s)) for s in states if s is not None]
        for kind, vector in kinds:
            place = target.position if vector is not None else len(target.tokens) - 1
            rows.append(world.scope.row(cell.target_layer, place, vector, target.more, target=len(texts)))
            owners.append((cell.key, kind))
        texts.append(texts_of[cell.key])
    found: dict[tuple[int, ...], dict[str, list[float]]] = {}
    if rows:
        ids = target.tokens.tensor.to(model.device)
        for (key, kind), log_p in zip(
            owners, score(model.engine, ids, rows, texts, route=model.capabilities.readout_route), strict=True
        ):
            found.setdefault(key, {}).setdefault(kind, []).append(float(log_p.double().sum()))
    return found


def _under_words(
    world: Controls, cells: Sequence[Cell], texts_of: Mapping[tuple[int, ...], Sequence[int]]
) -> dict[tuple[int, ...], float]:
    """log p (nats) of each reading's text after the source's own words, nothing patched."""
    model = world.target_model
    cases: dict[tuple[int, ...], Case] = {}
    for cell in cells:
        words, text = world.filled(cell), texts_of[cell.key]
        # where the words leave no room for the text there is no such evidence
        if words is not None and (model.context is None or len(words) + len(text) <= model.context):
            row = world.scope.row(0, len(words) - 1, None, world.targets[cell.target].edited(words))
            cases[cell.key] = Case(words.ids, row, text)
    found = scores(model.engine, list(cases.values()), route=model.capabilities.readout_route)
    keys = list(cases)
    return {keys[k]: float(log_p.double().sum()) for k, log_p in found}
