"""The residual stream as a sum of what was written into it.

    resid[ℓ] = embedding + Σ_{b<ℓ} ( Σ_h head_out[b, h] + attention bias[b] + mlp_out[b] ) + rest

Blocks that scale the stream (Gemma-4's layer_scalar) scale what is in it already. `rest` is what the sum leaves: rounding, wherever
blocks add what their parts write; a block whose parts are not known (Gemma-3n mixes four streams) is one component as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchscopes.core.errors import RefusedError, UnknownName, nearest
from patchscopes.core.sites import Site
from patchscopes.engine.engine import Engine
from patchscopes.engine.run import run


@dataclass(frozen=True, eq=False)
class Decomposition:
    """labels     "embed", "head_out.0.3", "attn_bias.0", "attn_out.1" (where heads cannot be told apart), "mlp_out.0", "block.2", "rest"
    components    what each added, scaled as it stands in the stream at `layer`
    total         the residual stream at `layer`, to which the components add up
    """

    labels: tuple[str, ...]
    components: Float[Tensor, "component batch pos d_model"]
    total: Float[Tensor, "batch pos d_model"]
    mask: Bool[Tensor, "batch pos"]
    layer: int

    def __getitem__(self, label: str) -> Float[Tensor, "batch pos d_model"]:
        """One component. UnknownName for a label that is not there."""
        if label not in self.labels:
            raise UnknownName(f"no component {label!r} in this decomposition. {nearest(label, self.labels)}")
        return self.components[self.labels.index(label)]


def decompose(
    engine: Engine, prompts: Sequence[Int[Tensor, "1 _"]], layer: int, *, heads: bool, padding_exact: bool
) -> Decomposition:
    """See `Model.decompose`. RefusedError on a model whose stream is several."""
    if engine.streams:
        raise RefusedError(
            f"the residual stream of this model is {engine.streams[0]} streams that every block mixes: it is no sum of what was written"
        )
    sites: list[Site] = [Site("resid", 0), Site("resid", layer)]
    for b in range(layer):
        sites += [Site("resid", b), Site("resid", b + 1), *_parts(engine, b, heads)]
    got = run(engine, prompts, list(dict.fromkeys(sites)), (), padding_exact=padding_exact)
    found: dict[str, Tensor] = {"embed": got.values[Site("resid", 0)].clone()}
    for b in range(layer):
        before, after = got.values[Site("resid", b)], got.values[Site("resid", b + 1)]
        written = {site: got.values[site] for site in _parts(engine, b, heads)}
        carry = engine.anatomy.carries[b]
        if not written:  # what this block adds is known only as a whole
            found[f"block.{b}"] = after - before
            continue
        if carry != 1:
            found = {label: value * carry for label, value in found.items()}
        for site, value in written.items():
            if site.name != "head_out":
                found[str(site)] = value
                continue
            alone = value.unbind(-2)
            found.update({f"head_out.{b}.{h}": one for h, one in enumerate(alone)})
        if Site("head_out", b) in written:
            whole = found.pop(f"attn_out.{b}")
            found[f"attn_bias.{b}"] = whole - written[Site("head_out", b)].sum(-2)
    total = got.values[Site("resid", layer)]
    found["rest"] = total - torch.stack(list(found.values())).sum(0)
    return Decomposition(tuple(found), torch.stack(list(found.values())), total, got.mask, layer)


def _parts(engine: Engine, block: int, heads: bool) -> list[Site]:
    writers = engine.anatomy.writers[block]
    if not 1 <= len(writers) <= 2:
        return []
    found = [Site(name, block) for name in ("attn_out", "mlp_out")[: len(writers)]]
    parts = engine.parts.blocks[block]
    if heads and parts.heads and parts.heads_out is not None:
        found.append(Site("head_out", block))
    return found
