"""Scale: f(h) = α h."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from patchscopes.core.errors import VectorError


@dataclass(frozen=True)
class Scale:
    """f(h) = alpha · h."""

    alpha: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise VectorError(f"alpha is {self.alpha}; expected a finite number")

    @property
    def name(self) -> str:
        """ "scale(α)"."""
        return f"scale({self.alpha:g})"

    def __call__(self, h: Tensor) -> Tensor:
        """alpha · h."""
        return self.alpha * h
