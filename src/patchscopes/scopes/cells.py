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


def product(targets: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], maps: Sequence[Map], draws: int) -> list[Cell]:
    """Every combination. targets: of each place the numbers of its target prompts."""
    return [
        Cell(place, source_layer, target, target_layer, f, draw)
        for place, own in enumerate(targets)
        for source_layer, target_layer in pairs
        for target in own
        for f in range(len(maps))
        for draw in range(draws)
    ]
