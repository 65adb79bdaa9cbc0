"""Identity: f(h) = h."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """f(h) = h."""

    name: str = "identity"

    def __call__(self, h: Tensor) -> Tensor:
        """h."""
        return h
