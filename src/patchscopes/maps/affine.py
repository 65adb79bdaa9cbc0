"""Affine: f(h) = W h + b, between residual streams of any two widths."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError


@dataclass(frozen=True, eq=False)
class Affine:
    """f(h) = weight · h + bias. weight: [d_target, d_source]; bias: [d_target] or None."""

    weight: Float[Tensor, "d_target d_source"]
    bias: Float[Tensor, " d_target"] | None = None
    name: str = "affine"

    def __call__(self, h: Float[Tensor, "... d_source"]) -> Float[Tensor, "... d_target"]:
        """weight · h + bias. VectorError if h has another width."""
        if h.shape[-1] != self.weight.shape[1]:
            raise VectorError(f"the map {self.name!r} takes vectors {self.weight.shape[1]} wide, but got {h.shape[-1]}")
        out = h @ self.weight.to(h).T
        return out if self.bias is None else out + self.bias.to(h)
