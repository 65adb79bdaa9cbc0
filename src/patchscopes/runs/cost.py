"""What cells cost, in FLOP, before anything runs.

With C_b(q0, q1) the FLOP of block b over the positions q0 … q1−1 and u those of an unembedding (see `engine.shape`), a patched run of
m tokens behind a prompt of n tokens, patched at position i* of layer ℓ*, takes at most

    run     Σ_{b ≥ ℓ*} C_b(i*, n) + u + Σ_{t=1}^{m−1} [Σ_b C_b(n+t−1, n+t) + u]

and its text under one other vector, all tokens at once,

    score   Σ_{b ≥ ℓ*} C_b(i*, n+m) + m·u

of which the evidence of a reading needs 2 + N_RANDOM + (others). A source costs a pass of its prompt, twice with controls. Texts that
stop early take less, so these are upper bounds; for the order of cells and their relative weight that is enough.
"""

from __future__ import annotations

from functools import cache

from patchscopes.controls.vectors import N_RANDOM
from patchscopes.engine.shape import Shape
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.viewing import Viewing

N_SCORED = 2 + N_RANDOM  # runs of a text under vectors, beside those of the other sources


class Costs:
    """Of the cells of one viewing. `target`: the shape of M*; `source`: that of M."""

    def __init__(self, viewing: Viewing, source: Shape, target: Shape):
        self.viewing, self.source, self.target = viewing, source, target
        self.run = cache(self._run)
        self.score = cache(self._score)

    def of(self, cell: Cell, kind: str) -> float:
        """FLOP of a row of the plan. What rows share (the unpatched run, a prompt's own words) counts for none of them."""
        if kind in ("nothing", "text"):
            return 0.0
        run = self.run(cell.target, cell.target_layer)
        if kind != "none" or self.viewing.controls is None or not self.viewing.evidence:
            return run
        n_scored = N_SCORED + len(self.viewing.controls.others(cell.place))
        return run + n_scored * self.score(cell.target, cell.target_layer)

    def sources(self) -> float:
        """FLOP of reading all source prompts."""
        lengths = {place.tokens.ids: len(place.tokens) for place in self.viewing.places if place.tokens is not None}
        looks = 2 if self.viewing.controls is not None and self.viewing.evidence else 1
        return looks * sum(_blocks(self.source, 0, 0, n) + 2.0 * self.source.head for n in lengths.values())

    def _run(self, target: int, layer: int) -> float:
        where, m = self.viewing.targets[target], self.viewing.scope.max_new_tokens
        n, u = len(where.tokens), 2.0 * self.target.head
        return _blocks(self.target, layer, where.position, n) + m * u + _blocks(self.target, 0, n, n + m - 1)

    def _score(self, target: int, layer: int) -> float:
        where, m = self.viewing.targets[target], self.viewing.scope.max_new_tokens
        n = len(where.tokens)
        return _blocks(self.target, layer, where.position, n + m) + m * 2.0 * self.target.head


def _blocks(shape: Shape, first: int, start: int, stop: int) -> float:
    """Σ_{b ≥ first} C_b(start, stop)."""
    return sum(
        2.0 * block.weights * (stop - start) + sum(block.attention(q + 1) for q in range(start, stop))
        for block in shape.blocks[first:]
    )
