"""A viewing: sources under a scope. It knows its cells, and reads any of them, in any groups and order, each time with the same result.

That is what lets one call, a sweep on one machine and a cluster give the same table: whatever is random in a cell, and the other
sources that it is compared with, hang on the content of the cell and of the viewing's prompts, not on what else is read beside it.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from patchscopes.controls.other_model import OtherModel
from patchscopes.controls.random_blocks import RandomBlocks
from patchscopes.controls.vectors import seed_of
from patchscopes.core.edits import OF_SCOPES
from patchscopes.core.errors import InputError, PatchscopesError, PromptError, UnknownName, VectorError, nearest
from patchscopes.core.finite import require_finite
from patchscopes.core.layers import Layers, resolve_layers
from patchscopes.core.names import CONTROLS, named_controls
from patchscopes.core.sites import SCOPED, Site
from patchscopes.engine.continued import stopping
from patchscopes.engine.generate import Decoding, Request, stream
from patchscopes.engine.rows import Row
from patchscopes.maps import Map, digest_of, map_between
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.cells import Cell, product
from patchscopes.scopes.control_rows import Control, Written
from patchscopes.scopes.controlled import Controls, evidence_of
from patchscopes.scopes.sight import Sight
from patchscopes.scopes.source import Place, Source
from patchscopes.scopes.spread import require_spread, row_of, steps
from patchscopes.scopes.target import OWN, SAME, Target, own_target, resolve_target

if TYPE_CHECKING:
    from patchscopes.scopes.patchscope import Patchscope

Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a cell. rows: its reading, then its controls, by the columns of `Readings.table`; logits: [vocab] of each, if kept;
    said: the tokens of the reading. absent: controls without a row, and why. error: why it could not be read; then there are no rows."""

    cell: Cell
    rows: list[dict[str, Any]]
    logits: list[Tensor] | None = None
    error: PatchscopesError | None = None
    said: tuple[int, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Said:
    """What is kept of a run: logits over the vocabulary would fill the memory long before the table does."""

    tokens: list[int]
    next_token: int
    log_p: float
    norm_ratio: float
    top: tuple[list[int], list[float]] | None
    logits: Tensor | None


class Viewing:
    """Sources of one model under one scope. Everything that can be wrong with them is said when it is made; nothing has run yet."""

    def __init__(
        self,
        scope: Patchscope,
        source: Source | Sequence[Source],
        controls: bool | Control | Sequence[Control] = True,
        evidence: bool = True,
    ):
        self.scope, self.evidence = scope, evidence
        self.sources = [source] if isinstance(source, Source) else list(source)
        self.origin, self.target_model = self._check()
        self.site = self.sources[0].site
        self.places: list[Place] = []
        self.prompts: list[int] = []  # of every place the number of its prompt, counted over all sources
        for one in self.sources:
            own, start = one.places(), self.prompts[-1] + 1 if self.prompts else 0
            self.places += own
            self.prompts += [start + place.prompt for place in own]
        self.targets = self._targets()
        self.layers = self.sources[0].layers()
        self.pairs = self._layer_pairs()
        self.maps: list[Map] = [scope.map] if callable(scope.map) else list(scope.map)
        self._between: dict[tuple[int, int, int], Map] = {}
        self._digests: dict[tuple[int, int, int], str] = {}
        self._check_maps()
        self._placed: dict[tuple[int, tuple[int, ...]], Target] = {}
        self._check_places()
        self.reach = max(place.span for place in self.places)
        self.read_layers = sorted({layer + k for layer, other in self.pairs for k in self._carried(layer, other)})
        self.sight = Sight(self.origin, self.places, self.read_layers, self.site, reach=self.reach)
        asked = named_controls(controls)
        self.controls = Controls(self, _known(asked)) if asked else None

    @cached_property
    def cells(self) -> list[Cell]:
        """Every combination of the sources' prompts, positions and layers with the scope's prompts, layers, maps and draws."""
        everyone = range(len(self.targets))
        own = [[k] if self.own else everyone for k in range(len(self.places))]
        return product(own, self.pairs, self.maps, self.scope.draws)

    def identity(self, cell: Cell) -> str:
        """The content of a cell: the same wherever it stands in whatever call."""
        place, target = self.places[cell.place].digest, self.target_of(cell).digest
        return f"{place} {cell.source_layer} {target} {cell.target_layer} {self.map_digest(cell)} {cell.draw}"

    def read_identity(self, cell: Cell) -> str:
        """The content of what a cell reads: the same under every map, in all target prompts, target layers and draws."""
        return f"{self.places[cell.place].digest} {cell.source_layer}"

    def target_of(self, cell: Cell) -> Target:
        """T with i* of a cell: where the source was read with position="same", and as wide as the source's span."""
        place = self.places[cell.place]
        same = self.scope.position == SAME
        key = (cell.target, tuple(place.positions) if same else (place.span,))
        if key not in self._placed:
            target = self.targets[cell.target]
            self._placed[key] = target.at(place.positions) if same and not target.positions else target.widened(place.span)
        return self._placed[key]

    def steps(self, cell: Cell) -> list[int]:
        """Distances from the target layer at which something is written."""
        return self._steps(cell.source_layer, cell.target_layer)

    def _steps(self, source_layer: int, target_layer: int) -> list[int]:
        scope = self.scope
        tops = (self._top(self.origin, self.site), self._top(self.target_model, scope.site))
        return steps(scope.spread, scope.carry, (source_layer, tops[0]), (target_layer, tops[1]))

    def _carried(self, source_layer: int, target_layer: int) -> list[int]:
        """Distances from the source layer at which something is read."""
        return self._steps(source_layer, target_layer) if self.scope.carry == "each" else [0]

    @staticmethod
    def _top(model: Model, site: str) -> int:
        return model.n_layers - (site != "resid")

    def map_of(self, cell: Cell, step: int = 0) -> Map:
        """f of a cell: of a map that differs between layers, the one of its layers (or of those `step` above them)."""
        key = (cell.map, cell.source_layer + step, cell.target_layer + step)
        if key not in self._between:
            self._between[key] = map_between(self.maps[cell.map], *key[1:])
        return self._between[key]

    def map_digest(self, cell: Cell) -> str:
        """A hash of it: what a map is at other layers does not matter to a cell."""
        key = (cell.map, cell.source_layer, cell.target_layer)
        if key not in self._digests:
            carried = self._carried(cell.source_layer, cell.target_layer)
            self._digests[key] = " ".join(dict.fromkeys(digest_of(self.map_of(cell, k)) for k in carried))
        return self._digests[key]

    def state(self, sight: Sight, place: int, cell: Cell) -> Tensor | None:
        """What a cell would read at a place, [layer, span, d_model]; None where there is none, or none that is finite."""
        return sight.sound(place, self.layers_read(cell), self.places[cell.place].span)

    def layers_read(self, cell: Cell) -> list[int]:
        """The source layers of a cell: its own, and those above it whose states are carried along."""
        return [cell.source_layer + k for k in self._carried(cell.source_layer, cell.target_layer)]

    def mapped(self, cell: Cell, state: Tensor) -> Tensor:
        """f of what a cell reads, layer by layer."""
        carried = self._carried(cell.source_layer, cell.target_layer)
        return torch.stack([self.map_of(cell, k)(one) for k, one in zip(carried, state, strict=True)])

    def row(self, cell: Cell, state: Tensor | None) -> Row:
        """The target run of a cell in which `state` is written instead of its own; None: nothing is."""
        target = self.target_of(cell)
        where = {"site": self.scope.site, "write": self.scope.write, "more": target.more}
        return row_of(state, target, cell.target_layer, self.steps(cell), **where)

    @cached_property
    def content(self) -> str:
        """What all cells have in common, as a hash: where vectors are read and written, decoding, seed; not the models."""
        scope = self.scope
        parts = [self.site, scope.site, scope.write, scope.max_new_tokens, list(scope.stop), scope.temperature, scope.seed]
        parts += [scope.looks if self.controls else None]
        parts += [(scope.spread, scope.carry)] if scope.spread != "here" else []
        parts += [f"guidance {scope.guidance}"] if scope.guidance else []
        parts += [] if self.evidence or not self.controls else ["no evidence"]
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def kinds(self, cell: Cell) -> list[str]:
        """The rows of a cell: "none" for the reading itself, then its controls."""
        return ["none", *(self.controls.kinds(cell) if self.controls else ())]

    def coordinates(self, cell: Cell) -> dict[str, Any]:
        """Where a cell stands: the first columns of the table."""
        place = self.places[cell.place]
        return {
            "prompt": self.prompts[cell.place],
            "prompt_text": place.text,
            "position": place.position,
            "token": place.token,
            "source_layer": cell.source_layer,
            "target": 0 if self.own else cell.target,
            "target_layer": cell.target_layer,
            "map": self.maps[cell.map].name,
            "draw": cell.draw,
        }

    # ------------------------------------------------------------------------------------------------------- reading

    def read(
        self,
        cells: Sequence[Cell] | None = None,
        *,
        keep_logits: bool = False,
        top_k: int = 0,
        strict: bool = False,
        progress: Progress = lambda done, of, what: None,
    ) -> list[Outcome]:
        """What `cells` (default: all) say, each with its controls and its evidence, in order. An error raised by `progress`
        cancels. strict: a cell that cannot be read is raised before any target runs."""
        cells = self.cells if cells is None else cells
        progress(0, len(cells), "reading sources")
        self.sight.need({cell.place for cell in cells})
        states: dict[Cell, Tensor] = {}
        errors: dict[Cell, PatchscopesError] = {}
        for cell in cells:
            try:
                states[cell] = self.written(cell)
            except VectorError as error:
                if strict:
                    raise
                errors[cell] = error
        if self.controls and states:
            self.controls.need({cell.place for cell in states})
        requests: dict[Model, dict[str, Request]] = {self.target_model: {}}
        absent: dict[Cell, dict[str, str]] = {}
        keys = {cell: self._runs(cell, state, requests, absent.setdefault(cell, {})) for cell, state in states.items()}
        said = self._generate(requests, keep_logits, top_k, progress)
        well = list(keys)
        texts = {cell: said[keys[cell][0][1]].tokens for cell in well}
        evidence = evidence_of(self.controls, well, texts, progress) if self.controls and self.evidence else {}
        outcomes = []
        for cell in cells:
            if cell in errors:
                outcomes.append(Outcome(cell, [], error=errors[cell]))
                continue
            own = {"none": evidence.get(cell, {"verdict": "not run"})}
            rows = [self._record(cell, kind, said[key], own.get(kind, {})) for kind, key in keys[cell]]
            kept = [said[key].logits for _, key in keys[cell]]
            logits = [t for t in kept if t is not None] if keep_logits else None
            outcomes.append(Outcome(cell, rows, logits, said=tuple(texts[cell]), absent=absent[cell]))
        return outcomes

    def _runs(
        self, cell: Cell, state: Tensor, requests: dict[Model, dict[str, Request]], absent: dict[str, str]
    ) -> list[tuple[str, str]]:
        """(kind, key of its request) of a cell's own run and of its controls'; requests of equal key are one."""
        kinds: list[tuple[str, Written | str]] = [("none", (f"none {self.identity(cell)}", None, state))]
        kinds += self.controls.runs(cell, state) if self.controls else ()
        keys = []
        for kind, run in kinds:
            if isinstance(run, str):
                absent[kind] = run
                continue
            key, words, patched = run
            model = self.controls.model_of(kind) if self.controls else self.target_model
            mine = requests.setdefault(model, {})
            if key not in mine:
                mine[key] = self._request(cell, words, patched, seed_of(f"{self.scope.seed} {key}"))
            keys.append((kind, key))
        return keys

    def _request(self, cell: Cell, words: Tokens | None, state: Tensor | None, seed: int) -> Request:
        """A run of a cell: with `state` written, or of its prompt with words of text in the placeholder's place."""
        if words is not None:
            return Request(words.ids, self.plain_row(cell, words), seed)
        return Request(self.target_of(cell).tokens.ids, self.row(cell, state), seed, self.without(cell, state))

    def without(self, cell: Cell, state: Tensor | None) -> Row | None:
        """What guidance leads away from: the run in which nothing is written."""
        return self.row(cell, None) if self.scope.guidance and state is not None else None

    def plain_row(self, cell: Cell, words: Tokens) -> Row:
        """A run of another prompt in a cell's place, in which nothing is written."""
        more = self.targets[cell.target].edited(words)
        return Row(Site(self.scope.site, cell.target_layer), len(words) - 1, None, self.scope.write, more=more)

    def written(self, cell: Cell) -> Tensor:
        """f(h) of a cell, [layer, span, d_model]. VectorError if h or f(h) is not finite."""
        place = self.places[cell.place]
        h = self.sight.found(cell.place, self.layers_read(cell), place.span)
        assert h is not None
        where = f"layer {cell.source_layer}, position {place.position} of {_short(place.text)}"
        require_finite(h, f"the state at {where}")
        state = self.mapped(cell, h)
        require_finite(state, f"what the map {self.map_of(cell).name!r} makes of the state at {where}")
        return state

    def _generate(
        self, requests: Mapping[Model, Mapping[str, Request]], keep_logits: bool, top_k: int, progress: Progress
    ) -> dict[str, _Said]:
        """Run all requests, of all target prompts, in one stream for each model."""
        scope, found = self.scope, dict[str, _Said]()
        total = sum(map(len, requests.values()))
        for model, mine in requests.items():
            decoding = Decoding(
                scope.max_new_tokens, model.end_ids, stopping(model.decode, scope.stop), scope.temperature, scope.guidance
            )
            route = model.capabilities.route if decoding.max_new_tokens > 1 else model.capabilities.readout_route
            keys = list(mine)
            for k, one in stream(model.engine, list(mine.values()), decoding, route=route):
                log_p = one.logits.float().log_softmax(-1)
                best, token = log_p.max(-1)
                top = None
                if top_k:
                    values, ids = log_p.topk(min(top_k, len(log_p)))
                    top = (ids.tolist(), values.tolist())
                logits = one.logits.float().cpu().clone() if keep_logits else None  # not a view of its batch's
                found[keys[k]] = _Said(one.tokens, int(token), float(best), one.norm_ratio, top, logits)
                progress(len(found), total, "generating")
        return found

    def _record(self, cell: Cell, kind: str, said: _Said, evidence: dict[str, Any]) -> dict[str, Any]:
        model = self.target_model
        top = {} if said.top is None else {"top_ids": said.top[0], "top_logprobs": said.top[1]}
        return {
            **self.coordinates(cell),
            "control": kind,
            "text": model.decode(said.tokens),
            "n_tokens": len(said.tokens),
            "next_token": model.show(said.next_token),
            "next_token_id": said.next_token,
            "logprob": said.log_p,
            "surprisal": self._surprisal(cell.place, said.next_token),
            "norm_ratio": said.norm_ratio,
            **evidence,
            **top,
        }

    def _surprisal(self, place: int, token: int) -> float | None:
        """−log2 p of the source model's own distribution at the token that the scope says next; None across tokenizers and for bare
        vectors."""
        log_p = self.sight.next_log_p(place)
        if log_p is None or not self._one_vocabulary:
            return None
        return -float(log_p[token]) / math.log(2)

    @cached_property
    def _one_vocabulary(self) -> bool:
        mine, other = self.origin, self.target_model
        return mine is other or other.tokenizer.get_vocab() == mine.tokenizer.get_vocab()

    # -------------------------------------------------------------------------------------------------------- making

    @property
    def own(self) -> bool:
        """Whether T = S: then target number k is the prompt of place number k."""
        return self.scope.prompt is None

    def _targets(self) -> list[Target]:
        """The target prompts; what is wrong with them and their edits is said now."""
        scope, model = self.scope, self.target_model
        if scope.prompt is None:
            if not self._one_vocabulary:
                raise InputError(
                    f"{model.name} has other tokens than {self.origin.name}, so it cannot read the same prompt; give target prompts"
                )
            targets = [own_target(place, scope.position, model, scope.edits) for place in self.places]
        else:
            prompts = [scope.prompt] if isinstance(scope.prompt, (str, Tokens)) else list(scope.prompt)
            targets = [resolve_target(model, prompt, scope.position, scope.edits) for prompt in prompts]
        for target in targets:
            _ = target.more
        return targets

    def _check(self) -> tuple[Model, Model]:
        scope, sources = self.scope, self.sources
        if not sources:
            raise PromptError("no source was given; expected at least one")
        first = sources[0]
        for other in sources[1:]:
            if other.model is not first.model or other.site != first.site or other.layers() != first.layers():
                raise InputError(
                    "sources that are looked at together must share model, site and layers; call the scope once for each otherwise"
                )
        if scope.site not in SCOPED:
            raise UnknownName(f"unknown site {scope.site!r}. {nearest(scope.site, SCOPED)}")
        if scope.write not in OF_SCOPES:
            raise UnknownName(f"a scope cannot write {scope.write!r}; expected one of {', '.join(OF_SCOPES)}")
        if scope.max_new_tokens < 1 or scope.draws < 1:
            raise InputError(f"max_new_tokens is {scope.max_new_tokens} and draws is {scope.draws}; expected at least 1 of each")
        if scope.temperature < 0 or (scope.draws > 1 and scope.temperature == 0):
            raise InputError(
                f"{scope.draws} draws at temperature {scope.temperature:g}: several draws need a temperature above 0"
            )
        origin, target_model = first.model, scope.model or first.model
        for model, what in ((origin, "reading sources"), (target_model, "patching")):
            for ability in ("hooks_seen", "identity", "rows_independent"):
                model.capabilities.require(ability, what)
        require_spread(scope.spread, scope.carry)
        if not math.isfinite(scope.guidance):
            raise InputError(f"guidance is {scope.guidance}; expected a finite number, 0 for none")
        return origin, target_model

    def _check_places(self) -> None:
        """PositionError where a source's states have no places in a target; PromptError where a target gets too long."""
        scope, model = self.scope, self.target_model
        firsts = {(place.span, place.position): p for p, place in enumerate(self.places)}
        pairs = [(p, t) for p in firsts.values() for t in range(len(self.targets))]
        for p, t in [(p, p) for p in range(len(self.places))] if self.own else pairs:
            target = self.target_of(Cell(p, 0, t, 0, 0, 0))
            _ = target.more
            if model.context is not None and len(target.tokens) + scope.max_new_tokens > model.context:
                room = model.context - len(target.tokens)
                raise PromptError(
                    f"the target prompt has {len(target.tokens)} tokens and {scope.max_new_tokens} more were asked for, but "
                    f"{model.name} reads at most {model.context}; give a shorter prompt or max_new_tokens ≤ {room}"
                )

    def _check_maps(self) -> None:
        """LayerError if a map knows no such layers, VectorError if it takes or makes vectors of another width."""
        origin, target_model = self.origin, self.target_model
        one = torch.ones(1, origin.d_model, device=target_model.device)
        pairs = dict.fromkeys((layer + k, other + k) for layer, other in self.pairs for k in self._carried(layer, other))
        for f, (source_layer, target_layer) in ((f, pair) for f in self.maps for pair in pairs):
            out = map_between(f, source_layer, target_layer)(one)
            if out.shape[-1] != target_model.d_model:
                raise VectorError(
                    f"the map {f.name!r} makes vectors {out.shape[-1]} wide from {origin.name} ({origin.d_model} wide), but "
                    f"{target_model.name} is {target_model.d_model} wide. Give a map between the two: map=ps.maps.Affine(weight, bias)"
                )

    def _layer_pairs(self) -> list[tuple[int, int]]:
        asked, top = self.scope.layer, self._top(self.target_model, self.scope.site)
        if isinstance(asked, str) and asked == "same":
            return [(layer, resolve_layers(layer, top)[0]) for layer in self.layers]
        others = resolve_layers(asked, top)
        return [(layer, other) for layer in self.layers for other in others]

    def provenance(self, outcomes: Sequence[Outcome] = ()) -> dict[str, Any]:
        """Models, prompts with token ids, settings, seeds, versions, time; and which controls of `outcomes` could not be run, and why."""
        origin, target_model = self.origin, self.target_model
        about = self.settings()
        if outcomes and about["controls"]:
            about["controls"]["absent"] = _absent(outcomes)
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "source_model": origin.provenance(),
            "target_model": None if target_model is origin else target_model.provenance(),
            "sources": [
                {
                    "text": p.text,
                    "ids": list(p.tokens.ids) if p.tokens else None,
                    "position": p.position,
                    "site": self.site,
                    **({"span": p.span} if p.span > 1 else {}),
                }
                for p in self.places
            ],
            **about,
        }

    def settings(self) -> dict[str, Any]:
        """The part of the provenance that is known before models are loaded: layers, scope, controls."""
        scope = self.scope
        return {
            "source_layers": self.layers,
            "scope": {
                "name": scope.name,
                "targets": self._described_targets(),
                "layer": _asked(scope.layer, self.pairs),
                "map": [f.name for f in self.maps],
                "max_new_tokens": scope.max_new_tokens,
                "stop": list(scope.stop),
                "site": scope.site,
                "write": scope.write,
                "spread": scope.spread if isinstance(scope.spread, str) else list(scope.spread),
                "carry": scope.carry,
                "edits": [f"{edit!r} {edit.digest}" for edit in scope.edits],
                "temperature": scope.temperature,
                "guidance": scope.guidance,
                "draws": scope.draws,
                "seed": scope.seed,
            },
            "controls": self.controls.provenance() if self.controls else None,
        }

    def _described_targets(self) -> list[dict[str, Any]]:
        if self.own:  # the prompts are known as sources; here is only where they are written
            return [{"text": OWN, "ids": None, "position": SAME if self.scope.position is None else self.scope.position}]
        return [{"text": t.tokens.text, "ids": list(t.tokens.ids), "position": _where(t.positions)} for t in self.targets]


def _known(asked: Sequence[Any]) -> list[Control]:
    """InputError for what is no control."""
    for one in asked:
        if not isinstance(one, (str, OtherModel, RandomBlocks)):
            raise InputError(
                f"{one!r} is no control; expected a name ({', '.join(CONTROLS)}), controls.OtherModel(model) or "
                "controls.RandomBlocks(seed)"
            )
    return list(asked)


def _absent(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """By control, why it has no row: reason, number of cells."""
    found: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        for kind, reason in outcome.absent.items():
            reasons = found.setdefault(kind, {})
            reasons[reason] = reasons.get(reason, 0) + 1
    return found


def _asked(layer: Layers, pairs: list[tuple[int, int]]) -> int | str | list[int]:
    """ℓ* as it was asked for, in plain numbers; a list or range, which may be used up by now, as the layers that it gave."""
    if isinstance(layer, str):
        return layer
    return operator.index(layer) if isinstance(layer, SupportsIndex) else list(dict.fromkeys(other for _, other in pairs))


def _where(positions: tuple[int, ...]) -> int | list[int] | str:
    """i* as a number; several as a list; "same" where they hang on the source."""
    return positions[0] if len(positions) == 1 else list(positions) or SAME


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")
