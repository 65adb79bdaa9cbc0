"""Rows: patched runs that continue target prompts. Plain data, and what a plan needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchscopes.core.edits import Write
from patchscopes.core.sites import WHOLE, Site
from patchscopes.engine.edits import OF_KEYS, Placed
from patchscopes.engine.packing import Wish


@dataclass(frozen=True, eq=False)
class Row:
    """One patched run: `value` [d_model] is written at `site` and `position` of target number `target`.

    value None: nothing is written, and `position` is the first whose logits are wanted.
    more: further edits of the same run, at any sites, positions and steps (their `prompt` does not count).
    """

    site: Site
    position: int
    value: Tensor | None
    write: Write = "replace"
    target: int = 0
    more: tuple[Placed, ...] = ()

    def join(self, n_layers: int) -> int:
        """The layer at which it leaves the unpatched run."""
        own = n_layers if self.value is None else self.site.index
        return min([own, *(_layer(edit.site, n_layers) for edit in self.more)])

    @property
    def first(self) -> int:
        """The first position of its target that it changes (or whose logits are wanted)."""
        return min([self.position, *(_first(edit) for edit in self.more if not isinstance(edit.steps, tuple))])

    @property
    def later(self) -> tuple[Placed, ...]:
        """The edits that are made after the prompt too: those of later tokens, and of keys and values, which a cache holds unedited."""
        return tuple(edit for edit in self.more if edit.steps != "prompt" or edit.site.name in OF_KEYS)


def _layer(site: Site, n_layers: int) -> int:
    return site.index if site.name not in WHOLE else 0 if site.name == "embed" else n_layers


def _first(edit: Placed) -> int:
    return 0 if edit.positions is None else min(edit.positions)


def same_rows(rows: Sequence[Row]) -> list[tuple]:
    """A key for every row: rows of equal keys make the same of one target. Vectors are compared bit by bit."""
    by_shape: dict[tuple, list[int]] = {}
    for r, row in enumerate(rows):
        if row.value is not None:
            by_shape.setdefault((tuple(row.value.shape), row.value.dtype, row.value.device), []).append(r)
    keys: list[tuple] = [("nothing", *map(id, row.more)) for row in rows]
    for some in by_shape.values():
        values = torch.stack([value.detach() for r in some if (value := rows[r].value) is not None]).flatten(1).contiguous()
        raw = values.cpu().view(torch.uint8).numpy()  # one copy for all, where a GPU holds them
        for r, value in zip(some, raw, strict=True):
            row = rows[r]
            keys[r] = (row.site, row.position, row.write, str(values.dtype), value.tobytes(), *map(id, row.more))
    return keys


def wish_of(ids: tuple[int, ...], row: Row, n_layers: int) -> Wish:
    """What `packing` needs to know of a row that continues `ids`."""
    return Wish(ids, len(ids) - row.first, 1 - row.join(n_layers) / n_layers)
