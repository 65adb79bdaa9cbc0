"""Per direction: f(h) = h + Σₖ (gₖ − 1) ⟨h, uₖ⟩ uₖ + b: a gain of its own for each of some orthonormal directions, the rest as it is.

Without directions they are the coordinates: f(h) = g ⊙ h + b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError
from patchscopes.core.finite import require_finite


@dataclass(frozen=True, eq=False)
class PerDirection:
    """gains: [direction]; directions: [direction, d_model], orthonormal rows, or None for the coordinates; bias: [d_model] or None."""

    gains: Float[Tensor, " direction"]
    directions: Float[Tensor, "row d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None
    name: str = "per-direction"

    def __post_init__(self) -> None:
        for tensor, what in ((self.gains, "gains"), (self.directions, "directions"), (self.bias, "bias")):
            if tensor is not None:
                require_finite(tensor, f"the {what} of the map {self.name!r}")
        if self.directions is None:
            return
        if len(self.directions) != len(self.gains):
            raise VectorError(f"the map {self.name!r} has {len(self.gains)} gains for {len(self.directions)} directions")
        rows = self.directions.double()
        off = float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64, device=rows.device)).abs().max())
        if off > 1e-3:  # half-precision files round orthonormal rows by less
            raise VectorError(
                f"the directions of the map {self.name!r} are not orthonormal (off by {off:.2g}); orthonormalise them first"
            )

    def __call__(self, h: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """f(h). VectorError if h has another width."""
        width = len(self.gains) if self.directions is None else self.directions.shape[1]
        if h.shape[-1] != width:
            raise VectorError(f"the map {self.name!r} takes vectors {width} wide, but got {h.shape[-1]}")
        gains = self.gains.to(h)
        if self.directions is None:
            out = gains * h
        else:
            u = self.directions.to(h)
            out = h + ((gains - 1) * (h @ u.T)) @ u
        return out if self.bias is None else out + self.bias.to(h)
