"""The Patchscope: look at a hidden state of one run through another run whose prompt makes the model say what the state holds.

A source (S, i, M, ℓ) is looked at through a scope (T, i*, f, M*, ℓ*): while M* reads T, the value at layer ℓ* and position i* is
replaced by f(h), h the state of M at layer ℓ and position i of S, and M* goes on from there. Only the computation after the patch
changes. Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language Models".

Published code skips the patch when a pass has one token, and leaves padding to chance; here a one-token T is patched, and a batch
equals its cells run one at a time.
"""

from __future__ import annotations

import datetime
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import polars as pl
import torch
from torch import Tensor

from patchscopes.controls.vectors import SECOND_LOOK
from patchscopes.core.edits import OF_SCOPES, Edit, Write
from patchscopes.core.errors import InputError, PromptError, UnknownName, VectorError, nearest
from patchscopes.core.finite import require_finite
from patchscopes.core.layers import Layers, resolve_layers
from patchscopes.core.sites import SCOPED, Site
from patchscopes.engine.continued import stopping
from patchscopes.engine.edits import Placed
from patchscopes.engine.generate import Decoding, Request, stream
from patchscopes.engine.rows import Row
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position, Tokens
from patchscopes.scopes.cells import Cell, product
from patchscopes.scopes.controlled import Controls, evidence_of
from patchscopes.scopes.readings import SCHEMA, Readings
from patchscopes.scopes.source import Looked, Source, look
from patchscopes.scopes.target import PLACEHOLDER, Target, resolve_target

Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass(frozen=True, eq=False)
class Patchscope:
    """(T, i*, f, M*, ℓ*), and how to go on from there. Call it on a `Source`, or on several of one model.

    prompt          T, or several; a slot "{x}" may mark the place to patch
    position        i*: a piece of text or an index; not needed with a slot
    layer           ℓ*: a layer, a list or range of them, "all", or "same" (ℓ* = ℓ); for other sites than "resid" the index of a block
    map             f, or several
    model           M*; None: the source's model
    max_new_tokens  tokens said at most
    stop            strings that end a text; they are not part of it
    site, write     where and how f(h) is written: "resid", "attn_out", "mlp_out"; "replace", "add", "add_matched" (see `Edit`)
    edits           further edits of every target run (see `Edit`): attention knocked out, a head steered, at the prompt or at later
                    tokens. Controls run under them too
    temperature     0: greedy; else `draws` texts are sampled for every cell, from seeds that depend on `seed` and the cell alone
    second_look     the neutral text behind which sources are read again for their evidence
    """

    prompt: Prompt | Sequence[Prompt]
    position: Position = PLACEHOLDER
    layer: Layers = "same"
    map: Map | Sequence[Map] = Identity()
    model: Model | None = None
    max_new_tokens: int = 20
    stop: Sequence[str] = ()
    site: str = "resid"
    write: Write = "replace"
    edits: Sequence[Edit] = ()
    temperature: float = 0.0
    draws: int = 1
    seed: int = 0
    second_look: str = SECOND_LOOK
    name: str = "patchscope"

    def __call__(
        self,
        source: Source | Sequence[Source],
        controls: bool = True,
        keep_logits: bool = False,
        *,
        progress: Progress = lambda done, of, what: None,
    ) -> Readings:
        """Every combination of the source's prompts, positions and layers with the scope's prompts, layers, maps and draws.

        controls     also run every cell with nothing, a random vector, another source's vector and the layer's mean patched in, and
                     with the source's own words in the placeholder's place; and compute the evidence of each reading
        keep_logits  keep the next-token logits of every row of the table
        """
        sources = [source] if isinstance(source, Source) else list(source)
        origin, target_model, targets = self._check(sources)
        layers, site = sources[0].layers(), sources[0].site
        places = [place for s in sources for place in s.places()]
        prompts = _number_prompts(sources)
        pairs = self._layer_pairs(layers, target_model)
        maps = [self.map] if callable(self.map) else list(self.map)
        cells = product(len(places), pairs, len(targets), maps, self.draws)
        progress(0, len(cells), "reading sources")
        looked = look(origin, places, layers, site)
        written = {cell.key: self._written(maps[cell.map], looked, cell) for cell in cells}  # before any target runs
        decoding = self._decoding(target_model)
        world = Controls(origin, target_model, places, prompts, layers, site, looked, targets, maps, self) if controls else None

        requests: dict[tuple, Request] = {}
        rows: list[tuple[Cell, str, tuple]] = []
        for cell in cells:
            vector = written[cell.key]
            key = ("none", *cell.key)
            target = targets[cell.target]
            requests[key] = Request(
                target.tokens.ids, self.row(cell.target_layer, target.position, vector, target.more), cell.seed(self.seed)
            )
            rows.append((cell, "none", key))
            for kind, key, tokens, position, vector in world.runs(cell) if world else ():
                seed = cell.seed(self.seed, kind)
                more = target.more if tokens is target.tokens else target.edited(tokens)
                row = self.row(cell.target_layer, position if vector is not None else len(tokens) - 1, vector, more)
                requests.setdefault(key, Request(tokens.ids, row, seed))
                rows.append((cell, kind, key))
        said = _generate(target_model, requests, decoding, keep_logits, progress)
        texts = {cell.key: said["none", *cell.key].tokens for cell in cells}
        evidence = evidence_of(world, cells, texts, progress) if world else {}

        records = []
        for cell, kind, key in rows:
            got, place = said[key], places[cell.place]
            records.append(
                {
                    "prompt": prompts[cell.place],
                    "prompt_text": place.text,
                    "position": place.position,
                    "token": place.token,
                    "source_layer": cell.source_layer,
                    "target": cell.target,
                    "target_layer": cell.target_layer,
                    "map": maps[cell.map].name,
                    "control": kind,
                    "draw": cell.draw,
                    "text": target_model.decode(got.tokens),
                    "n_tokens": len(got.tokens),
                    "next_token": target_model.show(got.next_token),
                    "next_token_id": got.next_token,
                    "logprob": got.log_p,
                    "surprisal": _surprisal(looked.next_log_p[cell.place], got.next_token, origin, target_model),
                    "norm_ratio": got.norm_ratio,
                    **(evidence.get(cell.key, {"verdict": "not run"}) if kind == "none" else {}),
                }
            )
        logits = torch.stack([got for *_, key in rows if (got := said[key].logits) is not None]) if keep_logits else None
        return Readings(
            pl.DataFrame(records, schema=SCHEMA), self._provenance(sources, targets, pairs, origin, target_model, world), logits
        )

    # -------------------------------------------------------------------------------------------------------- pieces

    def _check(self, sources: Sequence[Source]) -> tuple[Model, Model, list[Target]]:
        """Everything that can be wrong is said before anything runs."""
        if not sources:
            raise PromptError("no source was given; expected at least one")
        first = sources[0]
        for other in sources[1:]:
            if other.model is not first.model or other.site != first.site or other.layers() != first.layers():
                raise InputError(
                    "sources that are looked at together must share model, site and layers; call the scope once for each otherwise"
                )
        if self.site not in SCOPED:
            raise UnknownName(f"unknown site {self.site!r}. {nearest(self.site, SCOPED)}")
        if self.write not in OF_SCOPES:
            raise UnknownName(f"a scope cannot write {self.write!r}; expected one of {', '.join(OF_SCOPES)}")
        if self.max_new_tokens < 1 or self.draws < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens} and draws is {self.draws}; expected at least 1 of each")
        if self.temperature < 0 or (self.draws > 1 and self.temperature == 0):
            raise InputError(f"{self.draws} draws at temperature {self.temperature:g}: several draws need a temperature above 0")
        origin, target_model = first.model, self.model or first.model
        for model, what in ((origin, "reading sources"), (target_model, "patching")):
            for ability in ("hooks_seen", "identity", "rows_independent"):
                model.capabilities.require(ability, what)
        prompts = [self.prompt] if isinstance(self.prompt, (str, Tokens)) else list(self.prompt)
        targets = [resolve_target(target_model, prompt, self.position, self.edits) for prompt in prompts]
        for target in targets:
            _ = target.more  # what is wrong with the edits is said now
            longest = len(target.tokens) + self.max_new_tokens
            if target_model.context is not None and longest > target_model.context:
                room = target_model.context - len(target.tokens)
                raise PromptError(
                    f"the target prompt has {len(target.tokens)} tokens and {self.max_new_tokens} more were asked for, but "
                    f"{target_model.name} reads at most {target_model.context}; give a shorter prompt or max_new_tokens ≤ {room}"
                )
        for f in [self.map] if callable(self.map) else self.map:
            out = f(torch.zeros(1, origin.d_model, device=target_model.device))
            if out.shape[-1] != target_model.d_model:
                raise VectorError(
                    f"the map {f.name!r} makes vectors {out.shape[-1]} wide from {origin.name} ({origin.d_model} wide), but "
                    f"{target_model.name} is {target_model.d_model} wide. Give a map between the two: map=ps.maps.Affine(weight, bias)"
                )
        return origin, target_model, targets

    def _layer_pairs(self, layers: list[int], model: Model) -> list[tuple[int, int]]:
        top = model.n_layers - (self.site != "resid")
        if isinstance(self.layer, str) and self.layer == "same":
            return [(layer, resolve_layers(layer, top)[0]) for layer in layers]
        others = resolve_layers(self.layer, top)
        return [(layer, other) for layer in layers for other in others]

    def _written(self, f: Map, looked: Looked, cell: Cell) -> Tensor:
        vector = f(looked.vectors[cell.place, cell.source_layer])
        require_finite(vector, f"what the map {f.name!r} makes of the state at layer {cell.source_layer}")
        return vector

    def row(self, layer: int, position: int, vector: Tensor | None, more: tuple[Placed, ...], target: int = 0) -> Row:
        """A run in which `vector` is written; or nothing but `more`, if it is None."""
        return Row(Site(self.site, layer), position, vector, self.write, target, more)

    def _decoding(self, model: Model) -> Decoding:
        return Decoding(self.max_new_tokens, model.end_ids, stopping(model.decode, self.stop), self.temperature)

    def _provenance(
        self,
        sources: Sequence[Source],
        targets: Sequence[Target],
        pairs: list[tuple[int, int]],
        origin: Model,
        target_model: Model,
        world: Controls | None,
    ) -> dict[str, Any]:
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "source_model": origin.provenance(),
            "target_model": None if target_model is origin else target_model.provenance(),
            "sources": [
                {"text": p.text, "ids": list(p.tokens.ids) if p.tokens else None, "position": p.position, "site": s.site}
                for s in sources
                for p in s.places()
            ],
            "source_layers": sources[0].layers(),
            "scope": {
                "name": self.name,
                "targets": [{"text": t.tokens.text, "ids": list(t.tokens.ids), "position": t.position} for t in targets],
                "layer": _asked(self.layer, pairs),
                "map": [f.name for f in ([self.map] if callable(self.map) else self.map)],
                "max_new_tokens": self.max_new_tokens,
                "stop": list(self.stop),
                "site": self.site,
                "write": self.write,
                "edits": [f"{edit!r} {edit.digest}" for edit in self.edits],
                "temperature": self.temperature,
                "draws": self.draws,
                "seed": self.seed,
            },
            "controls": world.provenance() if world else None,
        }


@dataclass(frozen=True, eq=False)
class _Said:
    """What is kept of a result: logits over the vocabulary would fill the memory long before the table does."""

    tokens: list[int]
    next_token: int
    log_p: float
    norm_ratio: float
    logits: Tensor | None


def _generate(
    model: Model, requests: dict[tuple, Request], decoding: Decoding, keep_logits: bool, progress: Progress
) -> dict[tuple, _Said]:
    """Run all requests, of all target prompts, in one stream."""
    route = model.capabilities.route if decoding.max_new_tokens > 1 else model.capabilities.readout_route
    keys, found = list(requests), dict[tuple, _Said]()
    for k, one in stream(model.engine, list(requests.values()), decoding, route=route):
        token = int(one.logits.argmax())
        log_p = float(one.logits.float().log_softmax(-1)[token])
        logits = one.logits.float().cpu().clone() if keep_logits else None  # not a view of its batch's
        found[keys[k]] = _Said(one.tokens, token, log_p, one.norm_ratio, logits)
        progress(len(found), len(keys), "generating")
    return found


def _number_prompts(sources: Sequence[Source]) -> list[int]:
    """For every place the index of its prompt, counted over all sources."""
    numbers, start = [], 0
    for s in sources:
        own = [place.prompt for place in s.places()]
        numbers += [start + n for n in own]
        start += max(own) + 1
    return numbers


def _asked(layer: Layers, pairs: list[tuple[int, int]]) -> int | str | list[int]:
    """ℓ* as it was asked for, in plain numbers; a list or range, which may be used up by now, as the layers that it gave."""
    if isinstance(layer, str):
        return layer
    return operator.index(layer) if isinstance(layer, SupportsIndex) else list(dict.fromkeys(other for _, other in pairs))


def _surprisal(log_p: Tensor | None, token: int, origin: Model, target_model: Model) -> float | None:
    """−log2 p of the source model's own distribution at the token that the scope says next; None across tokenizers and for bare vectors."""
    if log_p is None or (target_model is not origin and target_model.tokenizer.get_vocab() != origin.tokenizer.get_vocab()):
        return None
    return -float(log_p[token]) / math.log(2)
