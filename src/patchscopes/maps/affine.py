"""Affine: f(h) = W h + b, between residual streams of any two widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError
from patchscopes.core.finite import require_finite


@dataclass(frozen=True, eq=False)
class Affine:
    """f(h) = weight · h + bias. weight: [d_target, d_source]; bias: [d_target] or None. VectorError if one is not finite."""

    weight: Float[Tensor, "d_target d_source"]
    bias: Float[Tensor, " d_target"] | None = None
    name: str = "affine"

    def __post_init__(self) -> None:
        require_finite(self.weight, f"the weight of the map {self.name!r}")
        if self.bias is not None:
            require_finite(self.bias, f"the bias of the map {self.name!r}")

    def __call__(self, h: Float[Tensor, "... d_source"]) -> Float[Tensor, "... d_target"]:
        """weight · h + bias. VectorError if h has another width."""
        if h.shape[-1] != self.weight.shape[1]:
            raise VectorError(f"the map {self.name!r} takes vectors {self.weight.shape[1]} wide, but got {h.shape[-1]}")
        # half-precision states are mapped in float32: the ones on the diagonal of I + W would round W away
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        out = x @ self.weight.to(x).T
        return (out if self.bias is None else out + self.bias.to(x)).to(h.dtype)
