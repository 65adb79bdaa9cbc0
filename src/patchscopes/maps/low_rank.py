"""Low rank: f(h) = σ h + U V h + b, with U [d_target, rank] and V [rank, d_source].

Reduced-rank regression has σ = 0; an adapter beside the identity σ = 1 (as SelfIE's, Pepper et al. 2026, which also normalises h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError
from patchscopes.core.finite import require_finite


@dataclass(frozen=True, eq=False)
class LowRank:
    """f(h) = skip · h + up · down · h + bias. up: [d_target, rank]; down: [rank, d_source]; bias: [d_target] or None."""

    up: Float[Tensor, "d_target rank"]
    down: Float[Tensor, "rank_too d_source"]
    bias: Float[Tensor, " d_target"] | None = None
    skip: float = 0.0
    name: str = "low-rank"

    def __post_init__(self) -> None:
        for tensor, what in ((self.up, "up"), (self.down, "down"), (self.bias, "bias")):
            if tensor is not None:
                require_finite(tensor, f"the tensor {what} of the map {self.name!r}")
        if not math.isfinite(self.skip):
            raise VectorError(f"the map {self.name!r} has skip {self.skip}; expected a finite number")
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if up[1] != down[0]:
            raise VectorError(
                f"the map {self.name!r} has up {up} and down {down}; expected (d_target, rank) and (rank, d_source)"
            )
        if self.skip and up[0] != down[1]:
            raise VectorError(
                f"the map {self.name!r} keeps {self.skip:g} of h, which is {down[1]} wide, but makes vectors {up[0]} wide"
            )

    def __call__(self, h: Float[Tensor, "*row d_source"]) -> Float[Tensor, "*row d_target"]:
        """f(h). VectorError if h has another width."""
        if h.shape[-1] != self.down.shape[1]:
            raise VectorError(f"the map {self.name!r} takes vectors {self.down.shape[1]} wide, but got {h.shape[-1]}")
        out = h @ self.down.to(h).T @ self.up.to(h).T
        out = out + self.skip * h if self.skip else out
        return out if self.bias is None else out + self.bias.to(h)
