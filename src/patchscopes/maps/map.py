"""What a map is: a function of vectors with a name. Any object with these two is one.

A map that differs from layer to layer (a lens, maps fitted between many layers) also has `for_layers(source_layer, target_layer)`, which
gives the map of one pair; a Patchscope asks for it wherever there is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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


@runtime_checkable
class LayeredMap(Map, Protocol):
    """A map that is another one for each pair of layers."""

    def for_layers(self, source_layer: int, target_layer: int) -> Map:
        """The map from ℓ to ℓ*. LayerError if there is none."""
        ...


def map_between(f: Map, source_layer: int, target_layer: int) -> Map:
    """f, or what f is from ℓ to ℓ*."""
    return f.for_layers(source_layer, target_layer) if isinstance(f, LayeredMap) else f


def digest_of(f: Map) -> str:
    """A hash of a map: its kind, its name, and the numbers that it holds where it is a dataclass. Other maps are told apart by name."""
    digest = hashlib.blake2b(f"{type(f).__name__} {f.name}".encode(), digest_size=8)
    held: list[Any] = [getattr(f, field.name) for field in fields(f)] if is_dataclass(f) else []
    for value in held:
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().double().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, Mapping):  # the maps of a layered one
            for key in sorted(value):
                digest.update(f"{key!r} {digest_of(value[key])}".encode())
        elif is_dataclass(value) and isinstance(value, Map):
            digest.update(digest_of(value).encode())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
