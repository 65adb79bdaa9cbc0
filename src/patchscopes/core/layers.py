"""Layers and how they are named.

Layer ℓ is the residual stream after ℓ blocks: 0 the embeddings as the first block receives them, L the raw output of the last
block, before the final norm. A negative layer counts back from L: −1 is L. Block b turns layer b into layer b + 1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex

from patchscopes.core.errors import LayerError

Layers = SupportsIndex | str | Iterable[SupportsIndex]


def resolve_layers(layers: Layers, n_layers: int) -> list[int]:
    """The layers 0…L that `layers` names, in the order given.

    An int, a list or range of them, "all", or text: "3", "3,5,9", "3:9" (9 excluded), "3:9:2", ":", "-1". LayerError says the range.
    """
    if isinstance(layers, str):
        found = _parse(layers, n_layers)
    elif isinstance(layers, Iterable):
        found = [_resolve(layer, n_layers) for layer in layers]
    else:
        found = [_resolve(layers, n_layers)]
    if not found:
        raise LayerError(f"no layer is named by {layers!r}; this model has layers 0 to {n_layers} (-1 is the last)")
    return found


def _parse(text: str, n_layers: int) -> list[int]:
    if text.strip() == "all":
        return list(range(n_layers + 1))
    found: list[int] = []
    for piece in text.split(","):
        bounds = piece.strip().split(":")
        try:
            numbers = [int(bound) if bound.strip() else None for bound in bounds]
        except ValueError:
            numbers = [None, None, None, None]
        if len(numbers) > 3 or (len(numbers) == 1 and numbers[0] is None):
            raise LayerError(
                f"{text!r} does not name layers; expected a layer (3), a list (3,5,9), a range (3:9, 3:9:2, :) or 'all', "
                f"within 0 to {n_layers} (-1 is the last)"
            )
        if len(numbers) == 1:
            found.append(_resolve(numbers[0], n_layers))
            continue
        first, stop, step = (*numbers, None)[:3]
        for bound in (first, stop):
            if bound is not None and not -n_layers - 1 <= bound <= n_layers + 1:
                raise LayerError(f"{piece.strip()!r} leaves the model's layers, 0 to {n_layers} (-1 is the last)")
        if step == 0:
            raise LayerError(f"{piece.strip()!r} has a step of 0; expected a step such as 2")
        found += range(n_layers + 1)[slice(first, stop, step)]
    return found


def _resolve(layer: object, n_layers: int) -> int:
    try:
        number = operator.index(layer)  # type: ignore[arg-type]
    except TypeError:
        raise LayerError(f"{layer!r} is not a layer; expected a whole number from 0 to {n_layers} (-1 is the last)") from None
    if not -n_layers - 1 <= number <= n_layers:
        raise LayerError(
            f"layer {number} is out of range; this model has layers 0 to {n_layers} (0 = embeddings, -1 is the last)"
        )
    return number % (n_layers + 1)
