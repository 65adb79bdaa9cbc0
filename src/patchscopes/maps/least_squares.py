"""Streaming least squares: the best affine map between vectors that are seen once, in chunks, and never held together.

    minimise over W, b   Σ ‖y − W x − b‖² + λ ‖W‖²,   λ = ridge · tr(Cxx) / d_source

Only n, the means x̄ and ȳ and the centred sums Cxx = Σ (x−x̄)(x−x̄)ᵀ, Cxy = Σ (x−x̄)(y−ȳ)ᵀ and the diagonal of Cyy are kept, in float64;
chunks are merged by Chan, Golub and LeVeque's update (1979), which loses nothing where means are far from 0, as those of residual streams
are. Then W = Cxyᵀ (Cxx + λ)⁻¹ and b = ȳ − W x̄, through the eigenvectors of Cxx, which serve every λ and every target. The ridge is in units
of the mean variance, so that it means the same at every layer; it does not touch b. Directions in which x never varied get no weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, VectorError
from patchscopes.core.finite import require_finite
from patchscopes.maps.affine import Affine
from patchscopes.maps.low_rank import LowRank
from patchscopes.maps.mean import Mean
from patchscopes.maps.per_direction import PerDirection


@dataclass(eq=False)
class Sums:
    """n vectors [n, d]: their mean and the centred sum of their squares, whole (of sources) or its diagonal (of targets)."""

    whole: bool
    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    square: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, x: Float[Tensor, "row d"]) -> tuple[Float[Tensor, "row d"], Float[Tensor, " d"], float]:
        """Merge a chunk. Returns it centred on its own mean, how far that mean was from the mean before, and the weight of that
        distance: what a cross sum needs to merge too."""
        rows, m = len(x), x.mean(0)
        if not self.n:
            self.mean, self.square = torch.zeros_like(m), x.new_zeros((x.shape[1],) * (1 + self.whole))
        if x.shape[1] != len(self.mean):
            raise VectorError(f"the vectors are {x.shape[1]} wide, those before were {len(self.mean)}")
        shift, weight = m - self.mean, self.n * rows / (self.n + rows)
        centred = x - m
        self.square += (
            centred.T @ centred + weight * torch.outer(shift, shift) if self.whole else (centred**2).sum(0) + weight * shift**2
        )
        self.mean = self.mean + shift * (rows / (self.n + rows))
        self.n += rows
        self.__dict__.pop("spectrum", None)
        return centred, shift, weight

    def joined(self, other: Sums) -> Sums:
        """Of the vectors of both."""
        if not self.n or not other.n:
            return self if self.n else other
        n, shift, weight = self.n + other.n, other.mean - self.mean, self.n * other.n / (self.n + other.n)
        between = torch.outer(shift, shift) if self.whole else shift**2
        return Sums(self.whole, n, self.mean + shift * (other.n / n), self.square + other.square + weight * between)

    @cached_property
    def spectrum(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Eigenvalues, ascending, none below 0, and eigenvectors (columns) of the sum."""
        values, vectors = torch.linalg.eigh(self.square)
        return values.clamp(min=0), vectors


@dataclass(frozen=True)
class Conditioning:
    """How well the sources determine a map: the rank of their covariance of how many dimensions, and its condition number, with the
    ridge, over the directions that were used."""

    rank: int
    width: int
    condition: float
    n: int

    @property
    def note(self) -> str:
        """What a user should know; "" if nothing."""
        if self.n <= self.width:
            return f"{self.n} tokens for {self.width} dimensions: without a ridge such a map fits anything; give more text"
        return (
            f"the sources span {self.rank} of {self.width} dimensions; the others get no weight" if self.rank < self.width else ""
        )


class Moments:
    """Everything about pairs (x, y) that least squares needs. `source` and `target` may be shared between many pairs of layers: then
    who adds to them does it once a chunk (`fit`), and `cross` says the rest."""

    def __init__(self, source: Sums | None = None, target: Sums | None = None):
        self.source, self.target = source or Sums(True), target or Sums(False)
        self.cross: Tensor = torch.zeros(0)

    @property
    def n(self) -> int:
        """Pairs seen."""
        return self.source.n

    def add(self, x: Float[Tensor, "source d_source"], y: Float[Tensor, "target d_target"]) -> None:
        """See some more pairs. VectorError if they are of other widths than those before, or not finite."""
        if len(x) != len(y):
            raise VectorError(f"{len(x)} sources were given with {len(y)} targets; expected one for each")
        if not len(x):
            return
        x, y = as_double(x, "the sources"), as_double(y, "the targets")
        self.merge(self.source.add(x), self.target.add(y))

    def merge(self, x: tuple[Tensor, Tensor, float], y: tuple[Tensor, Tensor, float]) -> None:
        """The cross sum, of what `Sums.add` returned for sources and targets of one chunk."""
        step = x[0].T @ y[0] + x[2] * torch.outer(x[1], y[1])
        self.cross = step if not len(self.cross) else self.cross + step

    def cross_with(self, other: Moments) -> Float[Tensor, "d_source d_target"]:
        """The cross sum of the pairs of both."""
        if not self.n or not other.n:
            return self.cross if self.n else other.cross
        weight = self.n * other.n / (self.n + other.n)
        shift = torch.outer(other.source.mean - self.source.mean, other.target.mean - self.target.mean)
        return self.cross + other.cross + weight * shift

    # -------------------------------------------------------------------------------------------------------- solving

    def weight(self, ridge: float) -> Float[Tensor, "d_target d_source"]:
        """W, in float64."""
        values, vectors = self.source.spectrum
        inverse = torch.where(self._used(values), 1 / (values + self._penalty(ridge)), 0.0)
        return ((vectors * inverse) @ (vectors.T @ self.cross)).T

    def affine(self, ridge: float = 0.0, name: str = "affine") -> Affine:
        """The best affine map."""
        self._require()
        w = self.weight(ridge)
        return Affine(w.float().cpu(), (self.target.mean - w @ self.source.mean).float().cpu(), name)

    def factors(self, rank: int, ridge: float) -> tuple[Float[Tensor, "d_target rank"], Float[Tensor, "rank d_source"]]:
        """Up and down of the best W of the given rank (reduced-rank regression, Izenman 1975), in float64: W, cut to the directions in
        which W x varies most. InputError if the rank is none of W's."""
        w = self.weight(ridge)
        if not 1 <= rank <= min(w.shape):
            raise InputError(f"the rank is {rank}; expected 1 to {min(w.shape)}, the lesser width")
        # with a ridge the fitted values vary as W (Cxx + λ) Wᵀ, which is W Cxy
        _, vectors = torch.linalg.eigh((w @ self.cross + (w @ self.cross).T) / 2)
        up = vectors[:, -rank:]
        return up, up.T @ w

    def low_rank(self, rank: int, ridge: float = 0.0, name: str = "low-rank") -> LowRank:
        """The best of the given rank."""
        self._require()
        up, down = self.factors(rank, ridge)
        bias = self.target.mean - up @ (down @ self.source.mean)
        return LowRank(up.float().cpu(), down.float().cpu(), bias.float().cpu(), name=name)

    def gains(self, ridge: float) -> Float[Tensor, " d_model"]:
        """The best gain for each coordinate by itself, in float64. VectorError if the widths differ."""
        if self.cross.shape[0] != self.cross.shape[1]:
            raise VectorError(
                f"gains by direction need vectors of one width, but sources and targets are {tuple(self.cross.shape)} wide"
            )
        own = self.source.square.diagonal() + self._penalty(ridge)
        return torch.where(own > 0, self.cross.diagonal() / own.clamp(min=torch.finfo(own.dtype).tiny), 0.0)

    def per_direction(self, ridge: float = 0.0, name: str = "per-direction") -> PerDirection:
        """The best gain and shift for each coordinate by itself. VectorError if the widths differ."""
        self._require()
        gains = self.gains(ridge)
        return PerDirection(gains.float().cpu(), None, (self.target.mean - gains * self.source.mean).float().cpu(), name)

    def mean(self, name: str = "mean") -> Mean:
        """The mean of the targets."""
        self._require()
        return Mean(self.target.mean.float().cpu(), name)

    def conditioning(self, ridge: float = 0.0) -> Conditioning:
        """How well W is determined."""
        values, _ = self.source.spectrum
        used = values[self._used(values)]
        penalty = float(self._penalty(ridge))
        condition = (float(used[-1]) + penalty) / (float(used[0]) + penalty) if len(used) else float("inf")
        return Conditioning(len(used), len(values), condition, self.n)

    # --------------------------------------------------------------------------------------------------------- errors

    @property
    def spread(self) -> float:
        """Σ ‖y − ȳ‖²."""
        return float(self.target.square.sum())

    def error(self, weight: Float[Tensor, "d_target *d_source"], bias: Float[Tensor, " d_target"]) -> float:
        """Σ ‖y − W x − b‖² over the pairs seen, without seeing them again. weight: [d_target, d_source], or the diagonal of such a one,
        [d_target]. What is left where the error is far below `spread` is rounding."""
        w = weight.to(self.cross)
        if w.ndim == 1:
            made, with_targets, squared = w * self.source.mean, w * self.cross.diagonal(), w**2 * self.source.square.diagonal()
        else:
            made, with_targets, squared = w @ self.source.mean, w * self.cross.T, (w @ self.source.square) * w
        off = self.target.mean - made - bias.to(self.cross)
        inside = self.spread - 2 * float(with_targets.sum()) + float(squared.sum())
        return max(inside, 0.0) + self.n * float(off @ off)

    def floor(self) -> float:
        """The least Σ ‖y − W x − b‖² of any affine map on the pairs seen: the refit floor, if they are held out."""
        w = self.weight(0.0)
        return self.error(w, self.target.mean - w @ self.source.mean)

    def _used(self, values: Tensor) -> Tensor:
        """Directions in which x varies by more than rounding: states are float32 at best, and were seen n times."""
        return values > values[-1] * torch.finfo(torch.float32).eps ** 2 * max(len(values), 1)

    def _penalty(self, ridge: float) -> Tensor:
        return ridge * self.source.square.diagonal().mean()

    def _require(self) -> None:
        if self.n < 2:
            raise InputError(f"{self.n} pairs of vectors were seen; a map is fitted to at least two")


def as_double(x: Tensor, what: str) -> Tensor:
    """In float64, where the device has it. VectorError if something is not finite."""
    require_finite(x, what)
    return x.detach().double() if x.device.type != "mps" else x.detach().cpu().double()
