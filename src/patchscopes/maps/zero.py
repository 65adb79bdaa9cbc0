"""Zero: f(h) = 0, a knock-out: the target runs with nothing where the state would stand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from patchscopes.core.errors import VectorError


@dataclass(frozen=True)
class Zero:
    """f(h) = 0. width: of what it makes, where target and source differ; None: as wide as h."""

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise VectorError(f"the width of a zero is {self.width}; expected at least 1")

    @property
    def name(self) -> str:
        """ "zero"."""
        return "zero"

    def __call__(self, h: Tensor) -> Tensor:
        """Zeros."""
        return h.new_zeros(*h.shape[:-1], self.width or h.shape[-1])
