"""One full pass over a batch of prompts, with any reads and edits.

Prompts of different lengths are padded on the left, with an attention mask and explicit positions. On models where a padded row is
not what it would be alone, each prompt runs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchscopes.core.edits import Write, written
from patchscopes.core.errors import PositionError, SiteError
from patchscopes.core.sites import Site, resolve_sites
from patchscopes.engine.engine import Engine
from patchscopes.engine.hooks import Handle, hooked


@dataclass(frozen=True, eq=False)
class Placed:
    """An edit whose prompt and position (from 0, real tokens) are known."""

    site: Site
    prompt: int
    position: int
    value: Tensor
    write: Write


@dataclass(frozen=True, eq=False)
class Run:
    """What a pass left: run["resid.2"] is [batch, pos, d_model]. Shorter prompts are padded on the left; `mask` is True at real tokens."""

    logits: Float[Tensor, "batch pos vocab"]
    mask: Bool[Tensor, "batch pos"]
    values: dict[Site, Tensor]
    n_layers: int

    def __getitem__(self, site: str) -> Float[Tensor, "*stream batch pos d_model"]:
        """The value of a site that was read."""
        found = resolve_sites(site, self.n_layers)
        if len(found) != 1:
            raise SiteError(f"{site!r} names {len(found)} sites; a run gives one at a time: {found[0]}, …, {found[-1]}")
        asked = found[0]
        if asked not in self.values:
            have = ", ".join(map(str, self.values)) or "nothing"
            raise SiteError(f"site {asked} was not read in this run; it read {have}. Name it in read=[…]")
        return self.values[asked]

    def at(self, site: str, *, prompt: int = 0, position: int) -> Float[Tensor, "*stream d_model"]:
        """The value of a site at a position of one prompt, counted in real tokens."""
        value = self[site]
        if not -len(self.mask) <= prompt < len(self.mask):
            raise PositionError(f"prompt {prompt} is not in this run; it has {len(self.mask)}, counted from 0")
        real = self.mask[prompt].nonzero()[:, 0]
        if not -len(real) <= position < len(real):
            raise PositionError(
                f"position {position} is out of range: prompt {prompt} has tokens 0 to {len(real) - 1} (-1 is the last)"
            )
        return value[..., prompt, int(real[position]), :]


@torch.no_grad()
def run(
    engine: Engine,
    prompts: Sequence[Int[Tensor, "1 _"]],
    reads: Sequence[Site],
    edits: Sequence[Placed],
    *,
    padding_exact: bool,
) -> Run:
    """One pass over `prompts`. Sites read show the edits made at them, and all that follows from edits below."""
    lengths = {p.shape[1] for p in prompts}
    if len(lengths) > 1 and not padding_exact:
        alone = [
            _pass(engine, [p], reads, [Placed(e.site, 0, e.position, e.value, e.write) for e in edits if e.prompt == i])
            for i, p in enumerate(prompts)
        ]
        return _stack(alone, max(lengths))
    return _pass(engine, prompts, reads, edits)


def _pass(engine: Engine, prompts: Sequence[Tensor], reads: Sequence[Site], edits: Sequence[Placed]) -> Run:
    longest = max(p.shape[1] for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=engine.device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool, device=engine.device)
    for i, p in enumerate(prompts):
        ids[i, longest - p.shape[1] :] = p[0].to(ids.device)
        mask[i, longest - p.shape[1] :] = True
    values: dict[Site, Tensor] = {}
    versions: dict[Site, int] = {}

    def at(site: Site) -> Handle:
        mine = [e for e in edits if e.site == site]

        def change(x: Tensor) -> Tensor | None:
            new = x.clone() if mine else x
            for e in mine:
                place = longest - prompts[e.prompt].shape[1] + e.position
                new[..., e.prompt, place, :] = written(e.value, new[..., e.prompt, place, :], e.write)
            if site in reads:
                values[site] = new.clone() if site in moved else new
                versions[site] = values[site]._version
            return new if mine else None

        return engine.at_site(site, change)

    padded = None if all(p.shape[1] == longest for p in prompts) else mask.long()
    positions = None if padded is None else (padded.cumsum(-1) - 1).clamp(min=0)
    sites = sorted({*reads, *(e.site for e in edits)})
    moved: set[Site] = set()
    while True:
        with hooked(at(site) for site in sites):
            logits = engine.forward(ids, mask=padded, positions=positions)
        # some models write into tensors that they have handed out (parallel Falcon, Llama-4): read those again, as copies
        changed = {site for site, value in values.items() if value._version != versions[site]}
        if not changed:
            return Run(logits, mask, {site: values[site] for site in reads}, engine.n_layers)
        moved |= changed


def _stack(runs: list[Run], longest: int) -> Run:
    def left(x: Tensor, axis: int) -> Tensor:
        missing = list(x.shape)
        missing[axis] = longest - x.shape[axis]
        return torch.cat([x.new_zeros(missing), x], axis)

    first = runs[0]
    return Run(
        torch.cat([left(r.logits, -2) for r in runs]),
        torch.cat([left(r.mask, -1) for r in runs]),
        {site: torch.cat([left(r.values[site], -2) for r in runs], -3) for site in first.values},
        first.n_layers,
    )
