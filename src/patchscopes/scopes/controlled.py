"""The controls of a viewing: what else goes through the scope, and the evidence of its readings.

For every reading the same scope also runs with what was asked for in the state's place (see `control_rows`): by default with nothing
patched in, a random vector of the same norm, the vector of another source at the same layer, the layer's mean vector, and, unpatched,
with the source's own words in the placeholder's place. Then its text is scored, teacher-forced, under its second look and under the
control vectors of `controls.evidence`, which are the same whatever rows were asked for.

Other sources are the viewing's other prompts; when they are fewer than `N_OTHERS`, prompts of a built-in pool are added.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchscopes.controls.evidence import bits_over, explained, p_value, verdict
from patchscopes.controls.other_model import OtherModel
from patchscopes.controls.random_blocks import RandomBlocks, random_blocks
from patchscopes.controls.texts import source_text
from patchscopes.controls.vectors import CONTEXT, N_OTHERS, N_RANDOM, POOL, POOL_NAME, random_like, seed_of
from patchscopes.core.errors import VectorError
from patchscopes.engine.score import Case, scores
from patchscopes.maps import map_between
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.control_rows import OF_OTHERS, Control, Written, in_context, known_reason, name_of, rows_of
from patchscopes.scopes.sight import Sight
from patchscopes.scopes.source import Place

if TYPE_CHECKING:
    from patchscopes.scopes.viewing import Viewing

CELLS_AT_ONCE = 256  # whose control vectors are held together


class Controls:
    """What stands in for the vectors of a viewing, and its provenance."""

    def __init__(self, viewing: Viewing, asked: Sequence[Control]):
        self.viewing, self.seed, self.asked = viewing, viewing.scope.seed, tuple(asked)
        self.names = [name_of(control) for control in asked]
        origin, layers, site, looks = viewing.origin, viewing.read_layers, viewing.site, viewing.scope.looks
        reach = viewing.reach
        self.looks = [Sight(origin, viewing.places, layers, site, behind, reach) for behind in looks]
        self.second = self.looks[0]
        pool = [Place(-1 - k, text, tokens, len(tokens) - 1) for k, text in enumerate(POOL) for tokens in [origin.tokens(text)]]
        self.sources: dict[bool, _Ring] = {}  # by whether they are bare vectors
        for bare in (False, True):
            places = {k: place for k, place in enumerate(viewing.places) if (place.tokens is None) == bare}
            self.sources[bare] = _Ring(self.seed, places)
        fewest = min(len(ring) - 1 for ring in self.sources.values() if len(ring))
        self.pool = pool if fewest < N_OTHERS or "random_covariance" in self.names else []
        self.pool_ring = _Ring(self.seed, dict(enumerate(self.pool)))
        self.pool_first = Sight(origin, self.pool, layers, site, reach=reach)
        self.pool_second = Sight(origin, self.pool, layers, site, looks[0], reach)
        self._others: dict[tuple[str, bool], list[tuple[str, int]]] = {}
        self._filled: dict[tuple[int, int, str | None], Tokens | None] = {}
        self.contexts = [in_context(origin, place) for place in viewing.places] if "context" in self.names else []
        self.context = Sight(origin, self._sound(self.contexts), layers, site, reach=reach) if self.contexts else None
        self.elsewhere: dict[str, list[Place | str]] = {}
        self.other_sights: dict[str, Sight] = {}
        for other in (control for control in asked if isinstance(control, OtherModel)):
            places = self.elsewhere[other.name] = [_elsewhere(other, place) for place in viewing.places]
            _require_same_width(other, viewing)
            there = [layer for layer in layers if layer <= other.model.n_layers - (site != "resid")]
            self.other_sights[other.name] = Sight(other.model, self._sound(places), there, site, reach=reach)
        self.blank = {one.name: random_blocks(viewing.target_model, one.seed) for one in asked if isinstance(one, RandomBlocks)}

    def _sound(self, places: Sequence[Place | str]) -> list[Place]:
        """Places that a sight can hold; those that are none are never asked for."""
        return [own if isinstance(one, str) else one for one, own in zip(places, self.viewing.places, strict=True)]

    def model_of(self, control: str) -> Model:
        """The model in which a control is written."""
        return self.blank.get(control, self.viewing.target_model)

    def provenance(self) -> dict[str, Any]:
        """What the controls were."""
        return {
            "pool": POOL_NAME if self.pool else None,
            "pool_prompts": [place.text for place in self.pool],
            "others_per_reading": [len(self.others(p)) for p in range(len(self.viewing.places))],
            "random_per_reading": N_RANDOM,
            "second_looks": list(self.viewing.scope.looks),
            "kinds": self.names,
            "absent": {name: dict(reasons) for name, reasons in self.never.items()},
            **({"context": CONTEXT} if self.contexts else {}),
            **{one.name: one.model.provenance() for one in self.asked if isinstance(one, OtherModel)},
            **{one.name: {"seed": one.seed} for one in self.asked if isinstance(one, RandomBlocks)},
        }

    @cached_property
    def never(self) -> dict[str, Counter[str]]:
        """What can be run for no cell of a place, by name: reason, number of cells."""
        found: dict[str, Counter[str]] = {}
        seen: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for cell in self.viewing.cells:
            key = (cell.place, cell.target)
            if key not in seen:
                some = ((name_of(control), known_reason(self, control, cell)) for control in self.asked)
                seen[key] = [(name, reason) for name, reason in some if reason is not None]
            for name, reason in seen[key]:
                found.setdefault(name, Counter())[reason] += 1
        return found

    def need(self, places: set[int]) -> None:
        """Read what the controls of these places need."""
        others = {k for p in places for kind, k in self.others(p) if kind == "call"}
        if self.viewing.evidence or set(OF_OTHERS) & set(self.names):
            self.viewing.sight.need(places | others)
            self.pool_first.need(range(len(self.pool)))
        if self.viewing.evidence:
            self.second.need(places | others)
            for look in self.looks[1:]:
                look.need(places)
            self.pool_second.need(range(len(self.pool)))
        if self.context is not None:
            self.context.need(p for p in places if isinstance(self.contexts[p], Place))
        for name, sight in self.other_sights.items():
            sight.need(p for p in places if isinstance(self.elsewhere[name][p], Place))

    def others(self, p: int) -> list[tuple[str, int]]:
        """("call", place) or ("pool", k) of the sources that place p is compared with: never its own prompt. They are the same for all
        places of a prompt, and hang on its text and theirs alone: a prompt that joins a sweep changes few of them."""
        place = self.viewing.places[p]
        key = (place.text, place.tokens is None)
        if key not in self._others:
            mine = [("call", k) for k in self.sources[key[1]].after(place.text, N_OTHERS)]
            self._others[key] = mine + [("pool", k) for k in self.pool_ring.after(place.text, N_OTHERS - len(mine))]
        return self._others[key]

    def rest_of_pool(self, p: int) -> list[tuple[str, int]]:
        """The prompts of the pool that are not among the others of place p, without its own."""
        there, text = set(self.others(p)), self.viewing.places[p].text
        return [("pool", k) for k, place in enumerate(self.pool) if ("pool", k) not in there and place.text != text]

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

    def filled(self, cell: Cell, words: str | None = None) -> Tokens | None:
        """The target prompt with `words` in the placeholder's place; None: with the source's own, up to and with the position read."""
        key = (cell.target, cell.place, words)
        if key not in self._filled:
            place = self.viewing.places[cell.place]
            if words is None:
                words = source_text(place.tokens, place.position) if place.tokens else ""
            self._filled[key] = self.viewing.targets[cell.target].filled(words)
        return self._filled[key]

    def kinds(self, cell: Cell) -> list[str]:
        """The controls of a cell, if all that they need can be read."""
        return [name_of(control) for control in self.asked if known_reason(self, control, cell) is None]

    def runs(self, cell: Cell, own: Tensor) -> Iterator[tuple[str, Written | str]]:
        """Every control of a cell that writes the state `own`, with its run (key, another prompt, state), or why it has none.

        The direction that is drawn, and the source that is chosen, are one for all maps, target prompts, target layers and draws of what
        the cell reads, as its own state is: what is said in all of them, or in the best, is compared with what one other vector says in
        all, or at best."""
        return rows_of(self, cell, own)


def _elsewhere(control: OtherModel, place: Place) -> Place | str:
    """A place as another model reads it, or why it does not."""
    if place.tokens is None:
        return "a vector without a prompt has no text"
    found = control.positions(place.tokens, place.positions)
    return found if isinstance(found, str) else replace(place, tokens=found[0], position=found[1][-1])


def _require_same_width(control: OtherModel, viewing: Viewing) -> None:
    """VectorError if states of the other model cannot stand in for the source's."""
    origin, other = viewing.origin, control.model
    if other.engine.streams != origin.engine.streams:
        raise VectorError(
            f"{other.name} has another number of residual streams than {origin.name}, so its states cannot stand in"
        )
    width = other.d_model
    if control.map is not None:
        layer = viewing.read_layers[0]
        width = map_between(control.map, layer, layer)(torch.ones(1, other.d_model, device=other.device)).shape[-1]
    if width != origin.d_model:
        raise VectorError(
            f"states of {other.name} are {width} wide, and {origin.name} is {origin.d_model} wide. Give a map between the two: "
            "ps.controls.OtherModel(model, map=ps.maps.Affine(weight, bias))"
        )


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
            vectors = under_vectors(world, chunk, texts_of)
            words = _under_words(world, chunk, texts_of)
            for cell in chunk:
                found[cell] = _columns(vectors.get(cell), words.get(cell))
            done += len(chunk)
            progress(done, len(cells), "weighing evidence")
    return found


def _columns(scores: dict[str, list[float]] | None, words: float | None) -> dict[str, Any]:
    if scores is None:  # a vector without a prompt has no second look
        return {"verdict": "not run"}
    looks = scores["own"]
    own = sum(looks) / len(looks)
    nothing, random_, others = (torch.tensor(scores[kind], dtype=torch.float64) for kind in ("nothing", "random", "others"))
    over_nothing, over_random, over_others = (bits_over(own, control) for control in (nothing, random_, others))
    p = p_value(looks[0], others)  # whose prefix is the others'
    return {
        "bits_over_nothing": over_nothing,
        "bits_over_random": over_random,
        "bits_over_others": over_others,
        "bits_over_text": None if words is None else bits_over(own, torch.tensor([words], dtype=torch.float64)),
        "explained": explained(own, others),
        "p_value": p,
        "verdict": verdict(over_nothing, over_random, over_others, p),
    }


def under_vectors(
    world: Controls,
    cells: Sequence[Cell],
    texts_of: Mapping[Cell, Sequence[int]],
    others_of: Callable[[int], Sequence[tuple[str, int]]] | None = None,
) -> dict[Cell, dict[str, list[float]]]:
    """log p (nats) of each reading's text under its second looks ("own") and under every control vector: "nothing", "random", "others".
    others_of: of a place, in the order of their log p, instead of its `Controls.others`. All that is asked for must have been read."""
    viewing = world.viewing
    model, scope = viewing.target_model, viewing.scope
    cases: list[Case] = []
    owners: list[tuple[Cell, str]] = []
    for cell in cells:
        looks = [viewing.state(look, cell.place, cell) for look in world.looks]
        again = [viewing.mapped(cell, state) for state in looks if state is not None]
        if len(again) < len(looks):
            continue
        own = again[0]
        chosen = (others_of or world.others)(cell.place)
        others = [world.state(other, cell, second=True) for other in chosen]
        random_ = random_like(own.expand(N_RANDOM, *own.shape), f"{scope.seed} scored {viewing.identity(cell)}")
        kinds: list[tuple[str, Tensor | None]] = [*(("own", state) for state in again), ("nothing", None)]
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
