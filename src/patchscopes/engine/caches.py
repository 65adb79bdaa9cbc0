"""Key-value caches of some rows made from caches of others.

Keys and values may be views: `update` of a dynamic cache concatenates and never writes. Convolution and recurrent states live
in dicts and are updated in place, their flags too: those are copied. (transformers 5.23)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _is_batched(value: object) -> bool:
    return (
        isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] > 0
    )  # some rows of no entries: DeepSeek-V4's compressor


def _mapped(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {k: change(t).clone() if _is_batched(t) else t for k, t in value.items()})
        elif _is_batched(value):
            setattr(twin, name, change(value))
    return twin


def rows_of(layer: Any, index: Tensor) -> Any:
    """One cache layer holding rows `index` of `layer`; the two can be extended independently. A single row is not copied."""

    def take(t: Tensor) -> Tensor:
        if t.shape[0] == 1:
            return t.expand(len(index), *t.shape[1:])
        return t.index_select(0, index.to(t.device))

    return _mapped(layer, take)


def of_blocks(values: list, layers: int) -> list:
    """One value a cache layer from one a block: LongCat-Flash caches two layers a block, Gemma-3n before transformers 5.23 none for
    the last blocks, which use the keys and values of earlier ones."""
    each = max(1, layers // len(values))
    return [values[k // each] for k in range(layers)]


def fork(cache: Any, indices: list[Tensor]) -> Any:
    """A cache whose block b holds rows indices[b] of `cache`'s."""
    new = copy.copy(cache)
    new.layers = [rows_of(layer, index) for layer, index in zip(cache.layers, of_blocks(indices, len(cache.layers)), strict=True)]
    return new


def splice(cache: Any, base: Any, present: list[int], base_row: Tensor) -> None:
    """Complete `cache` to len(base_row) rows: block b keeps its own first present[b] and takes the others' from `base`.

    base_row[r]: the row of `base` that row r continues.
    """
    present = of_blocks(present, len(cache.layers))
    for b, own in enumerate(cache.layers):
        if present[b] == len(base_row):
            continue
        other = rows_of(base.layers[b], base_row[present[b] :])
        if present[b] == 0:
            cache.layers[b] = other
            continue
        for name, value in vars(own).items():
            rest = getattr(other, name)
            if isinstance(value, dict):
                setattr(own, name, {k: torch.cat([t, rest[k]]) if _is_batched(t) else t for k, t in value.items()})
            elif _is_batched(value):
                setattr(own, name, torch.cat([value, rest]))
