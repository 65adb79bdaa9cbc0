"""Coordinate systems that can hang on a site: x is seen as features f = encode(x), and what they leave out is kept.

    x = decode(f) + rest        an edit f → f′ writes   x′ = x + (decode(f′) − decode(f))

so that features which an edit leaves alone change nothing, bit for bit, whatever the rest is.

    Whole        f = x
    Subspace     f = x Bᵀ, x̂ = f B, rows of B orthonormal: a rotation (d rows), some directions, one probe
    Dictionary   f = relu(x Eᵀ + b), x̂ = f D + c: a sparse autoencoder

Any object with `encode`, `decode` and a `name` will do in a run; these can also be saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError
from patchscopes.core.finite import require_finite

ORTHONORMAL = 1e-4  # how far B Bᵀ may be from the identity


@runtime_checkable
class Coordinates(Protocol):
    """Features of the values at a site."""

    @property
    def name(self) -> str:
        """What it is called in provenance."""
        ...

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        """The features of x."""
        ...

    def decode(self, f: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        """The part of x that the features stand for."""
        ...


@dataclass(frozen=True)
class Whole:
    """The values themselves."""

    name: str = "whole"

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """x."""
        return x

    def decode(self, f: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """f."""
        return f


@dataclass(frozen=True, eq=False)
class Subspace:
    """Orthonormal directions: `basis` [feature, width]. VectorError if they are not; `spanned_by` makes them so."""

    basis: Float[Tensor, "feature width"]
    name: str = "subspace"

    def __post_init__(self) -> None:
        if self.basis.ndim != 2:
            raise VectorError(f"a basis of shape {tuple(self.basis.shape)}; expected (directions, width)")
        require_finite(self.basis, f"the basis of {self.name!r}")
        gram = (self.basis @ self.basis.T).detach().double()
        off = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
        if not off <= ORTHONORMAL:
            raise VectorError(
                f"the directions are not orthonormal (their products are off by {off:.1e}); use Subspace.spanned_by(directions)"
            )

    @classmethod
    def spanned_by(cls, directions: Float[Tensor, "*direction width"], name: str = "subspace") -> Subspace:
        """The space that some directions span (one, or several that are independent: VectorError otherwise)."""
        rows = torch.atleast_2d(directions)
        require_finite(rows, "a direction")
        q, r = torch.linalg.qr(rows.double().T)
        size = r.diagonal().abs()
        if len(rows) > rows.shape[1] or not bool((size > 1e-6 * rows.double().norm(dim=-1)).all()) or not bool(size.all()):
            raise VectorError(
                f"the {len(rows)} directions are not independent (or one is zero); leave out those that others span"
            )
        return cls((q * r.diagonal().sign()).T.to(rows.dtype).contiguous(), name)

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        """x Bᵀ."""
        return x @ self.basis.to(x).T

    def decode(self, f: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        """f B."""
        return f @ self.basis.to(f)


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder: `encoder` and `decoder` [feature, width], biases [feature] and [width]. VectorError if one is not finite."""

    encoder: Float[Tensor, "feature width"]
    encoder_bias: Float[Tensor, " feature"]
    decoder: Float[Tensor, "feature width"]
    decoder_bias: Float[Tensor, " width"]
    name: str = "dictionary"

    def __post_init__(self) -> None:
        for name in ("encoder", "encoder_bias", "decoder", "decoder_bias"):
            require_finite(getattr(self, name), f"the {name} of the dictionary {self.name!r}")

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        """relu(x Eᵀ + b)."""
        return torch.relu(x @ self.encoder.to(x).T + self.encoder_bias.to(x))

    def decode(self, f: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        """f D + c."""
        return f @ self.decoder.to(f) + self.decoder_bias.to(f)
