"""What a map is: a function of vectors with a name. Any object with these two is one."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

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


def digest_of(f: Map) -> str:
    """A hash of a map: its kind, its name, and the numbers that it holds where it is a dataclass. Other maps are told apart by name."""
    digest = hashlib.blake2b(f"{type(f).__name__} {f.name}".encode(), digest_size=8)
    held: list[Any] = [getattr(f, field.name) for field in fields(f)] if is_dataclass(f) else []
    for value in held:
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().double().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
