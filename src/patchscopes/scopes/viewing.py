"""A viewing: sources under a scope. It knows its cells, and reads any of them, in any groups and order, each time with the same result.

That is what lets one call, a sweep on one machine and a cluster give the same table: whatever is random in a cell, and the other
sources that it is compared with, hang on the content of the cell and of the viewing's prompts, not on what else is read beside it.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from patchscopes.controls.vectors import seed_of
from patchscopes.core.edits import OF_SCOPES
from patchscopes.core.errors import InputError, PatchscopesError, PromptError, UnknownName, VectorError, nearest
from patchscopes.core.finite import require_finite
from patchscopes.core.layers import Layers, resolve_layers
from patchscopes.core.sites import SCOPED
from patchscopes.engine.continued import stopping
from patchscopes.engine.generate import Decoding, Request, stream
from patchscopes.maps import Map, digest_of
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.cells import Cell, product
from patchscopes.scopes.controlled import Controls, evidence_of
from patchscopes.scopes.sight import Sight
from patchscopes.scopes.source import Place, Source
from patchscopes.scopes.target import OWN, Target, own_target, resolve_target

if TYPE_CHECKING:
    from patchscopes.scopes.patchscope import Patchscope

Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a cell. rows: its reading, then its controls, by the columns of `Readings.table`; logits: [vocab] of each, if kept.
    error: why it could not be read; then there are no rows."""

    cell: Cell
    rows: list[dict[str, Any]]
    logits: list[Tensor] | None = None
    error: PatchscopesError | None = None


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

    def __init__(self, scope: Patchscope, source: Source | Sequence[Source], controls: bool = True, evidence: bool = True):
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
        self.map_digests = [digest_of(f) for f in self.maps]
        self.sight = Sight(self.origin, self.places, self.layers, self.site)
        self.controls = Controls(self) if controls else None

    @cached_property
    def cells(self) -> list[Cell]:
        """Every combination of the sources' prompts, positions and layers with the scope's prompts, layers, maps and draws."""
        everyone = range(len(self.targets))
        own = [[k] if self.own else everyone for k in range(len(self.places))]
        return product(own, self.pairs, self.maps, self.scope.draws)

    def identity(self, cell: Cell) -> str:
        """The content of a cell: the same wherever it stands in whatever call."""
        place, target = self.places[cell.place].digest, self.targets[cell.target].digest
        return f"{place} {cell.source_layer} {target} {cell.target_layer} {self.map_digests[cell.map]} {cell.draw}"

    @cached_property
    def content(self) -> str:
        """What all cells have in common, as a hash: where vectors are read and written, decoding, seed; not the models."""
        scope = self.scope
        parts = [self.site, scope.site, scope.write, scope.max_new_tokens, list(scope.stop), scope.temperature, scope.seed]
        parts += [scope.second_look if self.controls else None]
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
        progress: Progress = lambda done, of, what: None,
    ) -> list[Outcome]:
        """What `cells` (default: all) say, each with its controls and its evidence, in order. An error raised by `progress`
        cancels."""
        cells = self.cells if cells is None else cells
        progress(0, len(cells), "reading sources")
        self.sight.need({cell.place for cell in cells})
        if self.controls:
            self.controls.need({cell.place for cell in cells})
        requests: dict[str, Request] = {}
        keys: dict[Cell, list[tuple[str, str]]] = {}
        errors: dict[Cell, PatchscopesError] = {}
        for cell in cells:
            try:
                keys[cell] = list(self._runs(cell, requests))
            except VectorError as error:
                errors[cell] = error
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
            outcomes.append(Outcome(cell, rows, [t for t in kept if t is not None] if keep_logits else None))
        return outcomes

    def _runs(self, cell: Cell, requests: dict[str, Request]) -> Iterator[tuple[str, str]]:
        """(kind, key of its request) of a cell's own run and of its controls'; requests of equal key are one."""
        target = self.targets[cell.target]
        vector = self.written(cell)
        for kind, key, tokens, position, patched in (
            ("none", f"none {self.identity(cell)}", target.tokens, target.position, vector),
            *(self.controls.runs(cell, vector) if self.controls else ()),
        ):
            if key not in requests:
                more = target.more if tokens is target.tokens else target.edited(tokens)
                at = position if patched is not None else len(tokens) - 1
                row = self.scope.row(cell.target_layer, at, patched, more)
                requests[key] = Request(tokens.ids, row, seed_of(f"{self.scope.seed} {key}"))
            yield kind, key

    def written(self, cell: Cell) -> Tensor:
        """f(h) of a cell. VectorError if h or f(h) is not finite."""
        place = self.places[cell.place]
        h = self.sight.vector(cell.place, cell.source_layer)
        where = f"layer {cell.source_layer}, position {place.position} of {_short(place.text)}"
        require_finite(h, f"the state at {where}")
        f = self.maps[cell.map]
        vector = f(h)
        require_finite(vector, f"what the map {f.name!r} makes of the state at {where}")
        return vector

    def _generate(self, requests: dict[str, Request], keep_logits: bool, top_k: int, progress: Progress) -> dict[str, _Said]:
        """Run all requests, of all target prompts, in one stream."""
        model, scope = self.target_model, self.scope
        decoding = Decoding(scope.max_new_tokens, model.end_ids, stopping(model.decode, scope.stop), scope.temperature)
        route = model.capabilities.route if decoding.max_new_tokens > 1 else model.capabilities.readout_route
        keys, found = list(requests), dict[str, _Said]()
        for k, one in stream(model.engine, list(requests.values()), decoding, route=route):
            log_p = one.logits.float().log_softmax(-1)
            best, token = log_p.max(-1)
            top = None
            if top_k:
                values, ids = log_p.topk(min(top_k, len(log_p)))
                top = (ids.tolist(), values.tolist())
            logits = one.logits.float().cpu().clone() if keep_logits else None  # not a view of its batch's
            found[keys[k]] = _Said(one.tokens, int(token), float(best), one.norm_ratio, top, logits)
            progress(len(found), len(keys), "generating")
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
            targets = [own_target(model, p.text, p.tokens, p.position, scope.position, scope.edits) for p in self.places]
        else:
            prompts = [scope.prompt] if isinstance(scope.prompt, (str, Tokens)) else list(scope.prompt)
            targets = [resolve_target(model, prompt, scope.position, scope.edits) for prompt in prompts]
        for target in targets:
            _ = target.more
            room = None if model.context is None else model.context - len(target.tokens)
            if room is not None and scope.max_new_tokens > room:
                raise PromptError(
                    f"the target prompt has {len(target.tokens)} tokens and {scope.max_new_tokens} more were asked for, but "
                    f"{model.name} reads at most {model.context}; give a shorter prompt or max_new_tokens ≤ {room}"
                )
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
        for f in [scope.map] if callable(scope.map) else scope.map:
            out = f(torch.zeros(1, origin.d_model, device=target_model.device))
            if out.shape[-1] != target_model.d_model:
                raise VectorError(
                    f"the map {f.name!r} makes vectors {out.shape[-1]} wide from {origin.name} ({origin.d_model} wide), but "
                    f"{target_model.name} is {target_model.d_model} wide. Give a map between the two: map=ps.maps.Affine(weight, bias)"
                )
        return origin, target_model

    def _layer_pairs(self) -> list[tuple[int, int]]:
        asked, top = self.scope.layer, self.target_model.n_layers - (self.scope.site != "resid")
        if isinstance(asked, str) and asked == "same":
            return [(layer, resolve_layers(layer, top)[0]) for layer in self.layers]
        others = resolve_layers(asked, top)
        return [(layer, other) for layer in self.layers for other in others]

    def provenance(self) -> dict[str, Any]:
        """Models, prompts with token ids, settings, seeds, versions, time."""
        origin, target_model = self.origin, self.target_model
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "source_model": origin.provenance(),
            "target_model": None if target_model is origin else target_model.provenance(),
            "sources": [
                {"text": p.text, "ids": list(p.tokens.ids) if p.tokens else None, "position": p.position, "site": self.site}
                for p in self.places
            ],
            **self.settings(),
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
                "edits": [f"{edit!r} {edit.digest}" for edit in scope.edits],
                "temperature": scope.temperature,
                "draws": scope.draws,
                "seed": scope.seed,
            },
            "controls": self.controls.provenance() if self.controls else None,
        }

    def _described_targets(self) -> list[dict[str, Any]]:
        if self.own:  # the prompts are known as sources; here is only where they are written
            return [{"text": OWN, "ids": None, "position": self.scope.position}]
        return [{"text": t.tokens.text, "ids": list(t.tokens.ids), "position": t.position} for t in self.targets]


def _asked(layer: Layers, pairs: list[tuple[int, int]]) -> int | str | list[int]:
    """ℓ* as it was asked for, in plain numbers; a list or range, which may be used up by now, as the layers that it gave."""
    if isinstance(layer, str):
        return layer
    return operator.index(layer) if isinstance(layer, SupportsIndex) else list(dict.fromkeys(other for _, other in pairs))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")
