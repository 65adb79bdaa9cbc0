"""What a map is: a function of vectors with a name. Any object with these two is one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Map(Protocol):
    """f of a Patchscope: [..., d_model of the source] -> [..., d_model of the target]. `name` stands in tables and must tell maps apart."""

    @property
    def name(self) -> str:
        """How tables call it."""
        ...

    def __call__(self, h: Tensor) -> Tensor:
        """f(h)."""
        ...
