"""Cells: one reading each. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchscopes.maps import Map


@dataclass(frozen=True)
class Cell:
    """Place number `place` at `source_layer`, looked at through target prompt number `target` at `target_layer` by map number `map`."""

    place: int
    source_layer: int
    target: int
    target_layer: int
    map: int
    draw: int


def product(n_places: int, pairs: Sequence[tuple[int, int]], n_targets: int, maps: Sequence[Map], draws: int) -> list[Cell]:
    """Every combination."""
    return [
        Cell(place, source_layer, target, target_layer, f, draw)
        for place in range(n_places)
        for source_layer, target_layer in pairs
        for target in range(n_targets)
        for f in range(len(maps))
        for draw in range(draws)
    ]
