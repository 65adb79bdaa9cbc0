"""What the study of evidence weighs with loaded models, beside the readings that are recorded: the log p of what was said, texts that other
vectors brought forth, and the raw log-probabilities behind the bits.

A text that a stand-in brought forth (a random vector, zero, another entity's state) says nothing of the item, whatever it says. Weighed
under the item's own second looks, as if it were its reading, it must look so: that is the null of the evidence. The other entity is
none of those that the item is compared with, since its own second look would win among them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from patchscopes.controls.vectors import N_OTHERS
from patchscopes.core.errors import PositionError, PromptError
from patchscopes.evaluate.data import Item
from patchscopes.evaluate.evidence_scores import Raw
from patchscopes.evaluate.scoring import names

if TYPE_CHECKING:
    from torch import Tensor

    from patchscopes.model import Model
    from patchscopes.scopes import Patchscope, Source
    from patchscopes.scopes.cells import Cell
    from patchscopes.scopes.viewing import Viewing

OWN, STRANGER = "its own state", "another entity's state"
CONTROLS = {"zero": "zero", "random": "a random vector", "random_covariance": "a random vector of the states' covariance"}
ALONE = 24  # others behind the prefix of each look
Key = tuple[str, str, int]  # prompt, where, source layer


@dataclass(frozen=True)
class Scoped:
    """How items of one relation are read. M1 is read, M2 speaks."""

    read: Model
    speaks: Model
    layers: tuple[int, ...]
    target_layer: int
    tokens: int
    stop: tuple[str, ...]

    def scope(self, items: Sequence[Item]) -> Patchscope:
        """Of items with one target prompt."""
        from patchscopes.scopes import extract

        found = extract(items[0].target, layer=self.target_layer, max_new_tokens=self.tokens, stop=self.stop)
        return replace(found, model=self.speaks)

    def sources(self, items: Sequence[Item]) -> tuple[list[Item], list[Source]]:
        """Items that M1 can read, each mention once, with where they are read."""
        from patchscopes.scopes import Source

        kept: dict[tuple[str, str], tuple[Item, Source]] = {}
        for item in items:
            try:
                self.read.tokens(item.prompt).position(item.at)
            except (PromptError, PositionError):  # as a run that skips bad prompts; it tells them
                continue
            one = Source(self.read, item.prompt, position=item.at, layer=list(self.layers))
            kept.setdefault((item.prompt, item.at), (item, one))
        return [item for item, _ in kept.values()], [source for _, source in kept.values()]


@dataclass(frozen=True)
class Pretended:
    """A text of `kind` of vector, weighed as if it were the reading of an item: its p-value and whether the verdict is "above"."""

    kind: str
    entity: str
    p: float
    above: bool


def log_p_of(by: Scoped, items: Sequence[Item]) -> dict[Key, tuple[str, float]]:
    """Of items with one target prompt: what is said of each, and its log p (nats) in the run that said it."""
    from patchscopes.scopes.viewing import Viewing

    kept, sources = by.sources(items)
    if not kept:
        return {}
    viewing = Viewing(by.scope(kept), sources, controls=False)
    viewing.sight.need(range(len(kept)))
    states = [(cell, state) for cell in viewing.cells if (state := _written(viewing, cell)) is not None]
    said = _said(viewing, states)
    log_p = _log_p(viewing, states, said)
    return {
        (kept[cell.place].prompt, kept[cell.place].at, cell.source_layer): (by.speaks.decode(text), one)
        for (cell, _), text, one in zip(states, said, log_p, strict=True)
    }


def bench(by: Scoped, items: Sequence[Item], weighed: int, *, seed: int = 0) -> tuple[list[Pretended], Raw | None]:
    """Of items of one relation, the first `weighed` of them: texts of stand-ins, and what the estimator is made of. None where there are
    too few others, or none outside those that an item is compared with."""
    from patchscopes.scopes.controlled import evidence_of
    from patchscopes.scopes.viewing import Viewing

    kept, sources = by.sources(items)
    if len(kept) < 3:
        return [], None
    viewing = Viewing(by.scope(kept), sources, controls=list(CONTROLS))
    world = viewing.controls
    assert world is not None
    everyone = set(range(len(kept)))
    viewing.sight.need(everyone)
    world.need(everyone)
    cells = [cell for cell in viewing.cells if cell.place < weighed]
    states: dict[str, dict[Cell, Tensor]] = {kind: {} for kind in (OWN, *CONTROLS.values(), STRANGER)}
    for cell in cells:
        own = _written(viewing, cell)
        if own is None:
            continue
        states[OWN][cell] = own
        for name, run in world.runs(cell, own):
            if not isinstance(run, str) and run[2] is not None:
                states[CONTROLS[name]][cell] = run[2]
        stranger = _stranger(viewing, kept, cell, seed)
        if stranger is not None and (state := viewing.state(viewing.sight, stranger, cell)) is not None:
            states[STRANGER][cell] = viewing.mapped(cell, state)
    flat = [(kind, cell, state) for kind, some in states.items() for cell, state in some.items()]
    texts: dict[str, dict[Cell, list[int]]] = {kind: {} for kind in states}
    for (kind, cell, _), text in zip(flat, _said(viewing, [(cell, state) for _, cell, state in flat]), strict=True):
        texts[kind][cell] = text
    found = []
    for kind, some in texts.items():
        columns = evidence_of(world, list(some), some, lambda done, of, what: None)
        for cell, one in columns.items():
            if one["verdict"] != "not run" and len(world.others(cell.place)) == N_OTHERS:
                found.append(Pretended(kind, kept[cell.place].cluster, one["p_value"], one["verdict"] == "above"))
    both = [cell for cell in cells if cell in texts[OWN] and cell in texts[STRANGER]]
    return found, _raw(by, viewing, kept, both, texts) if both else None


def joined(some: Sequence[Raw]) -> Raw | None:
    """Of several relations, with as many others as the least has."""
    if not some:
        return None
    n, m, k = (min(f(one) for one in some) for f in (_n_others, _n_pool, _n_alone))
    return Raw(
        np.concatenate([one.true for one in some]),
        tuple(entity for one in some for entity in one.entities),
        np.concatenate([one.own for one in some]),
        np.concatenate([one.others[:, :n] for one in some]),
        np.concatenate([one.pool[:, :m] for one in some]),
        tuple(np.concatenate([one[:, :k] for one in looks]) for looks in zip(*(one.alone for one in some), strict=True)),
        np.concatenate([one.stranger for one in some]),
        np.concatenate([one.stranger_others[:, :n] for one in some]),
        np.concatenate([one.stranger_pool[:, :m] for one in some]),
    )


def _n_others(one: Raw) -> int:
    return one.others.shape[1]


def _n_pool(one: Raw) -> int:
    return one.pool.shape[1]


def _n_alone(one: Raw) -> int:
    return one.alone[0].shape[1]


def _stranger(viewing: Viewing, kept: Sequence[Item], cell: Cell, seed: int) -> int | None:
    """The place of another entity, with another answer, that is none of those that the item is compared with."""
    world, own = viewing.controls, kept[cell.place]
    assert world is not None
    compared = {k for kind, k in world.others(cell.place) if kind == "call"}
    able = [
        k
        for k, other in enumerate(kept)
        if k not in compared and other.cluster != own.cluster and other.answers[0] != own.answers[0]
    ]
    return random.Random(f"{seed} stranger {own.subject} {own.target}").choice(able) if able else None


def _raw(
    by: Scoped, viewing: Viewing, kept: Sequence[Item], cells: Sequence[Cell], texts: Mapping[str, Mapping[Cell, Sequence[int]]]
) -> Raw | None:
    """Every other item of the viewing, in an order that is drawn by nothing: that of the ring; and the pool. None where no cell can be
    held against all of them (a state that is not finite)."""
    from patchscopes.scopes.controlled import under_vectors
    from patchscopes.scopes.viewing import Viewing

    world = viewing.controls
    assert world is not None
    n_others, n_pool = len(kept) - 1, len(world.pool)

    def everyone(place: int) -> list[tuple[str, int]]:
        return [*(("call", k) for k in range(len(kept)) if k != place), *(("pool", k) for k in range(n_pool))]

    def some(place: int) -> list[tuple[str, int]]:
        return everyone(place)[: min(ALONE, n_others)]

    world.second.need(range(len(kept)))
    world.pool_second.need(range(n_pool))
    found = under_vectors(world, cells, texts[OWN], everyone)
    strange = under_vectors(world, cells, texts[STRANGER], everyone)
    alone = []
    for look in viewing.scope.looks:
        other = Viewing(replace(viewing.scope, second_look=look), viewing.sources, controls=list(CONTROLS))
        assert other.controls is not None
        other.controls.second.need(range(len(kept)))
        alone.append(under_vectors(other.controls, cells, texts[OWN], some))
    whole = [cell for cell in cells if cell in found and len(found[cell]["others"]) == n_others + n_pool]
    whole = [cell for cell in whole if cell in strange and all(cell in one for one in alone)]
    if not whole:
        return None

    def bits(of: Mapping[Cell, Mapping[str, list[float]]], kind: str) -> np.ndarray:
        return np.array([of[cell][kind] for cell in whole]).reshape(len(whole), -1) / math.log(2)

    said = [by.speaks.decode(texts[OWN][cell]) for cell in whole]
    return Raw(
        np.array([names(text, kept[cell.place].answers) for text, cell in zip(said, whole, strict=True)], bool),
        tuple(kept[cell.place].cluster for cell in whole),
        bits(found, "own"),
        bits(found, "others")[:, :n_others],
        bits(found, "others")[:, n_others:],
        tuple(bits(one, "others") for one in alone),
        bits(strange, "own")[:, 0],
        bits(strange, "others")[:, :n_others],
        bits(strange, "others")[:, n_others:],
    )


def _written(viewing: Viewing, cell: Cell) -> Tensor | None:
    from patchscopes.core.errors import VectorError

    try:
        return viewing.written(cell)
    except VectorError:  # not finite: no reading, neither here nor in the run, which tells it
        return None


def _said(viewing: Viewing, states: Sequence[tuple[Cell, Tensor]]) -> list[list[int]]:
    """The tokens that the scope says of each state, greedily."""
    from patchscopes.engine.continued import stopping
    from patchscopes.engine.generate import Decoding, Request, stream

    model, scope = viewing.target_model, viewing.scope
    requests = [Request(viewing.target_of(cell).tokens.ids, viewing.row(cell, state)) for cell, state in states]
    decoding = Decoding(scope.max_new_tokens, model.end_ids, stopping(model.decode, scope.stop))
    found = dict(stream(model.engine, requests, decoding, route=model.capabilities.route))
    return [list(found[k].tokens) for k in range(len(requests))]


def _log_p(viewing: Viewing, states: Sequence[tuple[Cell, Tensor]], texts: Sequence[Sequence[int]]) -> list[float]:
    from patchscopes.engine.score import Case, scores

    model = viewing.target_model
    cases = [
        Case(viewing.target_of(cell).tokens.ids, viewing.row(cell, state), text)
        for (cell, state), text in zip(states, texts, strict=True)
    ]
    found = dict(scores(model.engine, cases, route=model.capabilities.readout_route))
    return [float(found[k].double().sum()) for k in range(len(cases))]
