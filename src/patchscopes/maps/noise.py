"""Noise: f(h) = h + ε, ε ~ N(0, σ² I), as causal tracing corrupts what it reads (Meng et al. 2022, "Locating and Editing Factual
Associations in GPT": σ is three times the standard deviation of the embeddings).

ε hangs on the seed and the width alone: every state gets the same one, so that a batch equals its rows and a sweep that is resumed
equals one that was not. Several draws are several seeds: map=[Noise(0.3, seed) for seed in range(8)].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError


@dataclass(frozen=True)
class Noise:
    """f(h) = h + ε. sigma: the standard deviation of each entry of ε, in the units of h."""

    sigma: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise VectorError(f"sigma is {self.sigma}; expected a finite number of at least 0")

    @classmethod
    def like(cls, vectors: Float[Tensor, "*row d_model"], times: float = 3.0, seed: int = 0) -> Noise:
        """σ = `times` the standard deviation of all entries of `vectors`: of the embeddings, 3 is causal tracing's."""
        return cls(times * float(vectors.detach().double().std()), seed)

    @property
    def name(self) -> str:
        """ "noise(σ, seed)"."""
        return f"noise({self.sigma:g}, {self.seed})"

    def __call__(self, h: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """h + ε."""
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU, so that all devices draw the same
        noise = torch.randn(h.shape[-1], generator=generator, dtype=torch.float64)
        return h + (self.sigma * noise).to(h)
