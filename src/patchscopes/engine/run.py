"""One full pass over a batch of prompts, with any reads and edits.

Prompts of different lengths are padded on the left, with an attention mask and explicit positions. On models where a padded row is
not what it would be alone, each prompt runs by itself. Recurrent states are read and written between tokens: such a run goes token
by token through the model's own cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchscopes.core.coordinates import Coordinates
from patchscopes.core.errors import PatchscopesError, PositionError, SiteError
from patchscopes.core.sites import EDGES, Site, resolve_sites
from patchscopes.engine.edits import Frame, Placed, edited
from patchscopes.engine.engine import Engine
from patchscopes.engine.hooks import hooked
from patchscopes.engine.watch import Watch, stacked


@dataclass(frozen=True, eq=False)
class Run:
    """What a pass left: run["resid.2"] is [batch, pos, d_model]. Shorter prompts are padded on the left; `mask` is True at real tokens.

    features: of the sites on which a coordinate system hangs.
    """

    logits: Float[Tensor, "batch pos vocab"]
    mask: Bool[Tensor, "batch pos"]
    values: dict[Site, Tensor]
    n_layers: int
    features: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Tensor:
        """The value of a site that was read, in the shape that `patchscopes.core.sites` gives; of one head, without the head axis."""
        asked = self._resolved(site)
        value = self.values[asked.whole]
        if asked.head is None:
            return value
        axis = 1 if asked.name in EDGES else -2
        if asked.head >= value.shape[axis]:
            raise SiteError(f"site {asked} is not on this model: {asked.whole} has {value.shape[axis]} heads, counted from 0")
        return value.select(axis, asked.head)

    def at(self, site: str, *, prompt: int = 0, position: int) -> Tensor:
        """The value of a site at a position of one prompt, counted in real tokens: [d_model], or [head, …]; at `scores` and
        `pattern` the prompt's own keys, [head, key]."""
        asked = self._resolved(site)
        if not -len(self.mask) <= prompt < len(self.mask):
            raise PositionError(f"prompt {prompt} is not in this run; it has {len(self.mask)}, counted from 0")
        real = self.mask[prompt].nonzero()[:, 0]
        if not -len(real) <= position < len(real):
            raise PositionError(
                f"position {position} is out of range: prompt {prompt} has tokens 0 to {len(real) - 1} (-1 is the last)"
            )
        value, column = self[site], int(real[position])
        if asked.name in EDGES:
            return value[prompt][..., column, :][..., real.to(value.device)]
        inner = value.ndim - 2 if asked.name == "state" else asked.features - (asked.head is not None)
        return value.movedim((-2 - inner, -1 - inner), (0, 1))[prompt % len(self.mask), column]

    def _resolved(self, site: str) -> Site:
        found = resolve_sites(site, self.n_layers)
        if len(found) != 1:
            raise SiteError(f"{site!r} names {len(found)} sites; a run gives one at a time: {found[0]}, …, {found[-1]}")
        if found[0].whole not in self.values:
            have = ", ".join(map(str, self.values)) or "nothing"
            raise SiteError(f"site {found[0]} was not read in this run; it read {have}. Name it in read=[…]")
        return found[0]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts in one tensor, padded on the left."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    lengths: list[int]

    @property
    def padded(self) -> Tensor | None:
        """The attention mask, if it is needed."""
        return None if bool(self.mask.all()) else self.mask.long()

    @property
    def positions(self) -> Tensor | None:
        """Position ids, if they are not 0, 1, 2, …"""
        return None if bool(self.mask.all()) else (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def frame(self) -> Frame:
        """Where a pass over all of it stands."""
        columns = self.ids.shape[1]
        return Frame(range(len(self.ids)), [n - columns for n in self.lengths], columns, self.lengths)


def batched(prompts: Sequence[Int[Tensor, "1 _"]], device: torch.device) -> Batch:
    """One batch of prompts of any lengths."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for i, p in enumerate(prompts):
        ids[i, longest - p.shape[1] :] = p[0].to(device)
        mask[i, longest - p.shape[1] :] = True
    return Batch(ids, mask, [p.shape[1] for p in prompts])


@torch.no_grad()
def run(
    engine: Engine,
    prompts: Sequence[Int[Tensor, "1 _"]],
    reads: Sequence[Site],
    edits: Sequence[Placed],
    *,
    padding_exact: bool,
    coordinates: Mapping[Site, Coordinates] | None = None,
) -> Run:
    """One pass over `prompts`. Sites read show the edits made at them, and all that follows from edits below."""
    lengths = {p.shape[1] for p in prompts}
    steps = any(site.name == "state" for site in (*reads, *(e.site for e in edits), *(coordinates or {})))
    if len(lengths) > 1 and (steps or not padding_exact):  # one token at a time recurrent models take no mask (Mamba)
        alone = [
            run(engine, [p], reads, own(edits, i), padding_exact=True, coordinates=coordinates) for i, p in enumerate(prompts)
        ]
        return side_by_side(alone, max(lengths))
    batch = batched(prompts, engine.device)
    watch = Watch(engine, reads, edits, batch.frame, coordinates=coordinates)
    if steps:
        return _token_by_token(engine, batch, watch)
    while True:
        with hooked(watch.hooks()):
            logits = engine.forward(batch.ids, mask=batch.padded, positions=batch.positions)
        if not watch.again():
            return finished(watch, logits, batch.mask)


def own(edits: Sequence[Placed], prompt: int) -> list[Placed]:
    """The edits of one prompt, as if it were alone."""
    return [replace(e, prompt=0) for e in edits if e.prompt == prompt]


def finished(watch: Watch, logits: Tensor, mask: Tensor) -> Run:
    """What a watched pass left."""
    values = {site: watch.values[site] for site in watch.reads}
    features = {str(site): value for site, value in watch.features.items()}
    return Run(logits, mask, values, watch.engine.n_layers, features)


def _token_by_token(engine: Engine, batch: Batch, watch: Watch) -> Run:
    """Each token of prompts of one length in a pass of its own, on the model's cache; in between, states are read and written there."""
    cache = engine.new_cache()
    found: dict[Site, list[Tensor]] = {site: [] for site in watch.reads}
    features: dict[Site, list[Tensor]] = {site: [] for site in watch.coordinates}
    logits, length = [], batch.ids.shape[1]
    state_sites = sorted(site for site in {*watch.reads, *watch.edits} if site.name == "state")
    whole = watch.frame
    for t in range(length):
        watch.frame = Frame(whole.prompts, [first + t for first in whole.first], 1, whole.lengths)
        with hooked(watch.hooks()):
            try:
                logits.append(engine.forward(batch.ids[:, t : t + 1], offset=t, cache=cache))
            except (ValueError, TypeError, AttributeError) as error:
                if t or isinstance(error, PatchscopesError):
                    raise
                # the first step of a model that keeps its states in no cache of the library's (MiniMax)
                raise SiteError(f"site {state_sites[0]} is not on this model: it does not go token by token ({error})") from error
        for site in state_sites:
            held = _state(cache, site.index)
            if held is None:
                raise SiteError(f"site {site} is not on this model: the cache of block {site.index} holds no recurrent state")
            flat = held.flatten(1)[:, None]
            flattened = [replace(e, value=_flat(e.value, held)) for e in watch.edits.get(site, [])]
            new = edited(flat, flattened, watch.frame) if flattened else None
            if new is not None:
                held.copy_(new[:, 0].reshape(held.shape))
            if site in found:
                found[site].append(held.clone()[:, None])
        for site in features:
            features[site].append(watch.features[site].clone())
        for site in found:
            if site.name != "state":
                found[site].append(watch.values[site].clone())
    values = {site: torch.cat(some, 1) if site.name == "state" else _edges_or(some, site, length) for site, some in found.items()}
    encoded = {str(site): some[-1] if site.name in ("k", "v") else stacked(some, site) for site, some in features.items()}
    return Run(torch.cat(logits, 1), batch.mask, values, engine.n_layers, encoded)


def _state(cache: Any, block: int) -> Tensor | None:
    """The recurrent state that `block` carries on, [batch, …], in place; None if its cache holds none."""
    held = getattr(cache.layers[block], "recurrent_states", None) if cache is not None and block < len(cache.layers) else None
    return next((t for t in held.values() if t is not None), None) if isinstance(held, dict) else held


def _flat(value: Tensor | None, held: Tensor) -> Tensor | None:
    return value if value is None or value.ndim < held.ndim - 1 else value.flatten(value.ndim - (held.ndim - 1))


def _edges_or(some: list[Tensor], site: Site, length: int) -> Tensor:
    if site.name in EDGES:  # each query has seen one key more
        return torch.cat([torch.nn.functional.pad(x, (0, length - x.shape[-1])) for x in some], -2)
    if site.name in ("k", "v"):  # the cache gives back all keys
        return some[-1]
    return stacked(some, site)


def side_by_side(runs: list[Run], longest: int) -> Run:
    """Runs of single prompts as one of all, padded on the left."""

    def left(x: Tensor, axis: int) -> Tensor:
        missing = list(x.shape)
        missing[axis] = longest - x.shape[axis]
        return torch.cat([x.new_zeros(missing), x], axis)

    def joined(site: Site) -> Tensor:
        if site.name in EDGES:
            return torch.cat([left(left(r.values[site], -2), -1) for r in runs])
        behind = runs[0].values[site].ndim - 2 if site.name == "state" else site.features
        return torch.cat([left(r.values[site], -1 - behind) for r in runs], -2 - behind)

    first = runs[0]
    return Run(
        torch.cat([left(r.logits, -2) for r in runs]),
        torch.cat([left(r.mask, -1) for r in runs]),
        {site: joined(site) for site in first.values},
        first.n_layers,
        {site: torch.cat([left(r.features[site], -2) for r in runs]) for site in first.features},
    )
