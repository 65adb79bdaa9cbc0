"""The controls of a viewing: what else goes through the scope, and the evidence of its readings.

For every reading the same scope also runs with nothing patched in, a random vector of the same norm, the vector of another source at
the same layer, the layer's mean vector, and, unpatched, with the source's own words in the placeholder's place. Then its text is
scored, teacher-forced, under its second look and under the control vectors (see `controls.evidence`).

Other sources are the viewing's other prompts; when they are fewer than `N_OTHERS`, prompts of a built-in pool are added.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchscopes.controls.evidence import bits_over, p_value, verdict
from patchscopes.controls.vectors import N_OTHERS, N_RANDOM, POOL, POOL_NAME, random_like, seed_of
from patchscopes.engine.score import Case, scores
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.sight import Sight
from patchscopes.scopes.source import Place

if TYPE_CHECKING:
    from patchscopes.scopes.viewing import Viewing

CELLS_AT_ONCE = 256  # whose control vectors are held together


class Controls:
    """What stands in for the vectors of a viewing, and its provenance."""

    def __init__(self, viewing: Viewing):
        self.viewing, self.seed = viewing, viewing.scope.seed
        origin, layers, site, behind = viewing.origin, viewing.read_layers, viewing.site, viewing.scope.second_look
        reach = viewing.reach
        self.second = Sight(origin, viewing.places, layers, site, behind, reach)
        pool = [Place(-1 - k, text, tokens, len(tokens) - 1) for k, text in enumerate(POOL) for tokens in [origin.tokens(text)]]
        self.sources: dict[bool, _Ring] = {}  # by whether they are bare vectors
        for bare in (False, True):
            places = {k: place for k, place in enumerate(viewing.places) if (place.tokens is None) == bare}
            self.sources[bare] = _Ring(self.seed, places)
        fewest = min(len(ring) - 1 for ring in self.sources.values() if len(ring))
        self.pool = pool if fewest < N_OTHERS else []
        self.pool_ring = _Ring(self.seed, dict(enumerate(self.pool)))
        self.pool_first = Sight(origin, self.pool, layers, site, reach=reach)
        self.pool_second = Sight(origin, self.pool, layers, site, behind, reach)
        self._others: dict[tuple[str, bool], list[tuple[str, int]]] = {}
        self._filled: dict[tuple[int, int], Tokens | None] = {}

    def provenance(self) -> dict[str, Any]:
        """What the controls were."""
        return {
            "pool": POOL_NAME if self.pool else None,
            "pool_prompts": [place.text for place in self.pool],
            "others_per_reading": [len(self.others(p)) for p in range(len(self.viewing.places))],
            "random_per_reading": N_RANDOM,
            "second_look": self.viewing.scope.second_look,
        }

    def need(self, places: set[int]) -> None:
        """Read what the controls of these places need."""
        others = {k for p in places for kind, k in self.others(p) if kind == "call"}
        self.viewing.sight.need(places | others)
        self.pool_first.need(range(len(self.pool)))
        if self.viewing.evidence:
            self.second.need(places | others)
            self.pool_second.need(range(len(self.pool)))

    def others(self, p: int) -> list[tuple[str, int]]:
        """("call", place) or ("pool", k) of the sources that place p is compared with: never its own prompt. They are the same for all
        places of a prompt, and hang on its text and theirs alone: a prompt that joins a sweep changes few of them."""
        place = self.viewing.places[p]
        key = (place.text, place.tokens is None)
        if key not in self._others:
            mine = [("call", k) for k in self.sources[key[1]].after(place.text, N_OTHERS)]
            self._others[key] = mine + [("pool", k) for k in self.pool_ring.after(place.text, N_OTHERS - len(mine))]
        return self._others[key]

    def company(self, p: int) -> str:
        """The others of place p, by their content."""
        lists = {"call": self.viewing.places, "pool": self.pool}
        return " ".join(lists[kind][k].digest for kind, k in self.others(p))

    def state(self, which: tuple[str, int], cell: Cell, *, second: bool) -> Tensor | None:
        """What `cell` would read of one of the others at the first or second look, as many tokens up to its position as of its own;
        None for a bare vector, which has no second, where there are fewer tokens, and where it is not finite."""
        kind, k = which
        if kind == "pool":
            return self.viewing.state(self.pool_second if second else self.pool_first, k, cell)
        return self.viewing.state(self.second if second else self.viewing.sight, k, cell)

    def filled(self, cell: Cell) -> Tokens | None:
        """The target prompt with the source's own words, up to and with the position read, in the placeholder's place."""
        key = (cell.target, cell.place)
        if key not in self._filled:
            place = self.viewing.places[cell.place]
            words = place.tokens.upto(place.position) if place.tokens else ""
            self._filled[key] = self.viewing.targets[cell.target].filled(words)
        return self._filled[key]

    def kinds(self, cell: Cell) -> list[str]:
        """The controls of a cell, if all that they need can be read."""
        others = ["other", "mean"] if self.others(cell.place) else []
        return ["nothing", "random", *others, *(["text"] if self.filled(cell) is not None else [])]

    def runs(self, cell: Cell, own: Tensor) -> Iterator[tuple[str, str, Tokens | None, Tensor | None]]:
        """Every control run of a cell that writes the state `own`: (kind, key, prompt, state), of another prompt or with another state
        or none. A key says all that a run hangs on: runs of equal key are one, and draw from the same seed.

        The direction that is drawn, and the source that is chosen, are one for all maps, target prompts, target layers and draws of what
        the cell reads, as its own state is: what is said in all of them, or in the best, is compared with what one other vector says in
        all, or at best."""
        viewing = self.viewing
        one = viewing.read_identity(cell)
        target, span = viewing.target_of(cell), viewing.places[cell.place].span
        at = f"{cell.source_layer} {target.digest} {cell.target_layer} {viewing.map_digest(cell)} {cell.draw}"
        at += f" span {span}" if span > 1 else ""
        yield "nothing", f"nothing {target.digest} {cell.draw}", None, None
        yield "random", f"random {viewing.identity(cell)}", None, random_like(own[None], f"{self.seed} random {one}")[0]
        others = [
            (which, state) for which in self.others(cell.place) if (state := self.state(which, cell, second=False)) is not None
        ]
        if others:
            (kind, k), state = others[seed_of(f"{self.seed} other {one}") % len(others)]
            chosen = (self.pool if kind == "pool" else viewing.places)[k].digest
            yield "other", f"other {chosen} {at}", None, viewing.mapped(cell, state)
            mean = torch.stack([state for _, state in others]).mean(0)
            yield "mean", f"mean {self.company(cell.place)} {at}", None, viewing.mapped(cell, mean)
        words = self.filled(cell)
        if words is not None:
            yield "text", f"text {words.ids} {cell.draw}", words, None


class _Ring:
    """One place of each prompt, in the order of hashes: who comes after a point of it hangs on content alone."""

    def __init__(self, seed: int, places: Mapping[int, Place]):
        self.seed = seed
        texts: dict[str, list[int]] = {}
        for k, place in places.items():
            texts.setdefault(place.text, []).append(k)
        self.texts = sorted((seed_of(f"{seed} ring {text}"), text) for text in texts)
        # one place of each prompt: places of one prompt are alike
        self.chosen = {text: min(ks, key=lambda k: seed_of(f"{seed} place {places[k].digest}")) for text, ks in texts.items()}

    def __len__(self) -> int:
        return len(self.texts)

    def after(self, text: str, n: int) -> list[int]:
        """Places of the `n` prompts that come after `text` on the ring, without its own; fewer if there are no more."""
        start = bisect.bisect(self.texts, (seed_of(f"{self.seed} start {text}"), ""))
        found: list[int] = []
        for i in range(len(self.texts)):
            other = self.texts[(start + i) % len(self.texts)][1]
            if len(found) >= n:
                break
            if other != text:
                found.append(self.chosen[other])
        return found


def evidence_of(
    world: Controls,
    cells: Sequence[Cell],
    texts_of: Mapping[Cell, Sequence[int]],
    progress: Callable[[int, int, str], None],
) -> dict[Cell, dict[str, Any]]:
    """The evidence columns of every cell. `texts_of`: the tokens that each reading said."""
    found: dict[Cell, dict[str, Any]] = {}
    done = 0
    by_target: dict[int, list[Cell]] = {}
    for cell in cells:
        by_target.setdefault(cell.target, []).append(cell)
    for mine in by_target.values():
        for chunk in (mine[i : i + CELLS_AT_ONCE] for i in range(0, len(mine), CELLS_AT_ONCE)):
            vectors = _under_vectors(world, chunk, texts_of)
            words = _under_words(world, chunk, texts_of)
            for cell in chunk:
                found[cell] = _columns(vectors.get(cell), words.get(cell))
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
    world: Controls, cells: Sequence[Cell], texts_of: Mapping[Cell, Sequence[int]]
) -> dict[Cell, dict[str, list[float]]]:
    """log p (nats) of each reading's text under its second look ("own") and under every control vector."""
    viewing = world.viewing
    model, scope = viewing.target_model, viewing.scope
    cases: list[Case] = []
    owners: list[tuple[Cell, str]] = []
    for cell in cells:
        second = viewing.state(world.second, cell.place, cell)
        if second is None:
            continue
        own = viewing.mapped(cell, second)
        others = [world.state(other, cell, second=True) for other in world.others(cell.place)]
        random_ = random_like(own.expand(N_RANDOM, *own.shape), f"{scope.seed} scored {viewing.identity(cell)}")
        kinds: list[tuple[str, Tensor | None]] = [("own", own), ("nothing", None)]
        kinds += [("random", state) for state in random_]
        kinds += [("others", viewing.mapped(cell, state)) for state in others if state is not None]
        ids = viewing.target_of(cell).tokens.ids
        for kind, state in kinds:
            cases.append(Case(ids, viewing.row(cell, state), texts_of[cell], viewing.without(cell, state)))
            owners.append((cell, kind))
    route = model.capabilities.readout_route
    log_p = dict(scores(model.engine, cases, route=route, guidance=scope.guidance))
    found: dict[Cell, dict[str, list[float]]] = {}
    for k, (cell, kind) in enumerate(owners):
        found.setdefault(cell, {}).setdefault(kind, []).append(float(log_p[k].double().sum()))
    return found


def _under_words(world: Controls, cells: Sequence[Cell], texts_of: Mapping[Cell, Sequence[int]]) -> dict[Cell, float]:
    """log p (nats) of each reading's text after the source's own words, nothing patched."""
    viewing = world.viewing
    model = viewing.target_model
    cases: dict[Cell, Case] = {}
    for cell in cells:
        words, text = world.filled(cell), texts_of[cell]
        # where the words leave no room for the text there is no such evidence
        if words is not None and (model.context is None or len(words) + len(text) <= model.context):
            cases[cell] = Case(words.ids, viewing.plain_row(cell, words), text)
    found = scores(model.engine, list(cases.values()), route=model.capabilities.readout_route)
    keys = list(cases)
    return {keys[k]: float(log_p.double().sum()) for k, log_p in found}
