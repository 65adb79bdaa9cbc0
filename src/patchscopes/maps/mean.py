"""Mean: f(h) = μ, whatever h is: what a map can do that knows where it writes, and nothing of what it read."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError
from patchscopes.core.finite import require_finite


@dataclass(frozen=True, eq=False)
class Mean:
    """f(h) = mean, [d_target]. `Mean.of(vectors)` takes it of some."""

    mean: Float[Tensor, " d_target"]
    name: str = "mean"

    def __post_init__(self) -> None:
        require_finite(self.mean, f"the mean of the map {self.name!r}")

    @classmethod
    def of(cls, vectors: Float[Tensor, "*row d_target"], name: str = "mean") -> Mean:
        """The mean of some vectors, taken in float64. VectorError if there are none."""
        rows = vectors.detach().reshape(-1, vectors.shape[-1])
        if not len(rows):
            raise VectorError("the mean of no vectors was asked for; expected at least one")
        return cls(rows.double().mean(0).to(vectors.dtype), name)

    def __call__(self, h: Float[Tensor, "*row d_source"]) -> Float[Tensor, "*row d_target"]:
        """The mean, once for each row of h."""
        return self.mean.to(h).expand(*h.shape[:-1], -1)
