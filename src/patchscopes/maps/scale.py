"""Scale: f(h) = α h."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """f(h) = alpha · h."""

    alpha: float

    @property
    def name(self) -> str:
        """ "scale(α)"."""
        return f"scale({self.alpha:g})"

    def __call__(self, h: Tensor) -> Tensor:
        """alpha · h."""
        return self.alpha * h
