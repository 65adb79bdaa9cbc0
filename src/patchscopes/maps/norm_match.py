"""Norm match: f(h) = ν · h / ‖h‖, where ν is the length that vectors have where f(h) is written.

Norms grow with depth, so a state of layer 3 written at layer 20 is nearly invisible, and the reverse drowns its context. ν is one
number, or one for each target layer (`NormMatch.of(run, "resid")`: the median over what stands there in a run). To match the very vector
that is replaced, write with `write="replace_matched"` instead: f(v, u) = v ‖u‖ / ‖v‖.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, LayerError, VectorError
from patchscopes.core.finite import require_finite
from patchscopes.engine.run import Run
from patchscopes.maps.map import Map, map_between


@dataclass(frozen=True, eq=False)
class NormMatch:
    """f(h) = length · g(h) / ‖g(h)‖. length: [] or [layer], by ℓ*; before: the map g whose vectors are matched (None: h itself)."""

    length: Float[Tensor, "*layer"]
    before: Map | None = None
    name: str = "norm-match"

    def __post_init__(self) -> None:
        require_finite(self.length, f"the length of the map {self.name!r}")
        if self.length.ndim > 1 or bool((self.length < 0).any()):
            raise VectorError(
                f"the map {self.name!r} has lengths of shape {tuple(self.length.shape)}, the least {float(self.length.min()):g}; "
                "expected one number, or one for each layer, none below 0"
            )

    @classmethod
    def of(cls, run: Run, site: str = "resid", before: Map | None = None) -> NormMatch:
        """The median norm at each layer of `site` over the real tokens of a run that read them all, `site.*`.

        The first token of each prompt is left out: on many models its norm is a thousandfold.
        """
        later = run.mask.cumsum(-1) > 1
        if not bool(later.any()):
            raise InputError(
                "the run has prompts of one token only; expected longer ones, because first tokens have norms of their own"
            )
        n = run.n_layers + (site == "resid")
        norms = [run[f"{site}.{layer}"].norm(dim=-1)[..., later.to(run.logits.device)].median() for layer in range(n)]
        return cls(torch.stack([one.float().cpu() for one in norms]), before)

    def for_layers(self, source_layer: int, target_layer: int) -> Map:
        """The map to the length of ℓ*."""
        length = self.length
        if length.ndim:
            if not 0 <= target_layer < len(length):
                raise LayerError(f"the map {self.name!r} has lengths of layers 0 to {len(length) - 1}, but not of {target_layer}")
            length = length[target_layer]
        before = None if self.before is None else map_between(self.before, source_layer, target_layer)
        return NormMatch(length, before, self.name)

    def __call__(self, h: Float[Tensor, "*row d_source"]) -> Float[Tensor, "*row d_target"]:
        """g(h) at the length. VectorError for a zero vector, which has no direction."""
        if self.length.ndim:
            raise InputError(
                f"the map {self.name!r} has a length for each layer; take one by for_layers(source_layer, target_layer)"
            )
        h = h if self.before is None else self.before(h)
        norm = h.norm(dim=-1, keepdim=True)
        if not bool(norm.all()):
            raise VectorError(f"the map {self.name!r} got a zero vector, which has no direction; expected others")
        return h * (self.length.to(h) / norm)
