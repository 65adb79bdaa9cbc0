"""By layer: another map for each pair (ℓ, ℓ*), as one map of a Patchscope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from patchscopes.core.errors import InputError, LayerError
from patchscopes.maps.map import Map


@dataclass(frozen=True, eq=False)
class ByLayer:
    """maps[ℓ, ℓ*] is the map from source layer ℓ to target layer ℓ*."""

    maps: Mapping[tuple[int, int], Map]
    name: str = "by-layer"

    def __post_init__(self) -> None:
        if not self.maps:
            raise InputError(f"the map {self.name!r} has no layers; expected at least one pair")

    def for_layers(self, source_layer: int, target_layer: int) -> Map:
        """The map from ℓ to ℓ*. LayerError if there is none; it says which there are."""
        found = self.maps.get((source_layer, target_layer))
        if found is None:
            raise LayerError(
                f"the map {self.name!r} has none from layer {source_layer} to {target_layer}; it has {_listing(self.maps)}. "
                "Name these layers, or fit a map for this pair"
            )
        return found

    def __call__(self, h: Tensor) -> Tensor:
        """What the only map makes of h. InputError if there are several, because which one depends on the layers."""
        if len(self.maps) > 1:
            raise InputError(f"the map {self.name!r} differs between layers; take one by for_layers(source_layer, target_layer)")
        return next(iter(self.maps.values()))(h)


def _listing(pairs: Mapping[tuple[int, int], Map], shown: int = 12) -> str:
    names = [f"{source}→{target}" for source, target in sorted(pairs)]
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
