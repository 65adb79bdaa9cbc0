"""Rows that are decoded together, a token a row a step. Rows leave, and others enter.

Rows of one `Stem` own the columns behind its prefix: the rest of their target, then what they said. They are aligned on the right.
A row that came later has said less: the columns in front of it are a gap that a mask hides, and positions are given explicitly.

    mask, and keys where rows hold copies     [gap][prefix][own]      a row's columns stay together: windows and distances are right
    keys behind a shared prefix               [prefix][gap][own]      attention puts the mask in this order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.engine.caches import enter_rows, keep_rows
from patchscopes.engine.edits import Frame, Placed
from patchscopes.engine.hooks import Handle, hooked
from patchscopes.engine.patch import Stem
from patchscopes.engine.shared_prefix import Seats
from patchscopes.engine.watch import Watch


class Batch:
    """Caches, positions and masks of rows that continue the targets of `stem`, at most by `room` tokens (as the stem knows)."""

    def __init__(self, stem: Stem):
        self.stem = stem
        self.targets: list[int] = []  # of each row
        self.age: list[int] = []  # tokens that each row was fed
        self.later: list[Sequence[Placed]] = []  # edits of each row that are made at its steps
        self.cache: Any = None
        self._mask: Tensor | None = None
        self._positions = torch.zeros(0, 1, dtype=torch.long, device=stem.targets.device)

    def __len__(self) -> int:
        return len(self.targets)

    def enter(self, targets: Sequence[int], cache: Any, later: Sequence[Sequence[Placed]] = ()) -> None:
        """Rows that a walk has left with this cache come after those that are here. `later`: edits that are made at their steps."""
        self.targets += targets
        self.later += later or [()] * len(targets)
        self.age += [0] * len(targets)
        if self.cache is None:
            self.cache = cache
        else:
            enter_rows(self.cache, cache, self._seats())
        self._arrange()

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay. Columns that none of them uses go with the others."""
        before = max(self.age)
        self.targets, self.age = [self.targets[r] for r in rows], [self.age[r] for r in rows]
        self.later = [self.later[r] for r in rows]
        index = torch.tensor(rows, device=self.stem.targets.device)
        keep_rows(self.cache, index, self._seats(), before - max(self.age))
        self._arrange()

    @torch.no_grad()
    def forward(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Feed every row a token: the logits after it."""
        columns = self.stem.targets.shape[1] + max(self.age) + 1
        mask = None if self._mask is None else self._mask[:, :columns]
        with hooked(self._edits()):
            logits = self.stem.engine.forward(
                tokens[:, None], offset=columns - 1, cache=self.cache, mask=mask, positions=self._positions
            )
        self._positions = self._positions + 1
        self.age = [age + 1 for age in self.age]
        return logits[:, 0]

    def _edits(self) -> list[Handle]:
        placed = [replace(edit, prompt=r) for r, some in enumerate(self.later) for edit in some]
        if not placed:
            return []
        width = self.stem.targets.shape[1]
        lengths = [width - self.stem.pads[t] for t in self.targets]
        now = [length + age for length, age in zip(lengths, self.age, strict=True)]
        return Watch(self.stem.engine, (), placed, Frame(range(len(self)), now, 1, lengths)).hooks()

    def _seats(self) -> Seats:
        prompt_of = self.stem.prompt_of
        gaps = [max(self.age) - age for age in self.age]
        return Seats([prompt_of[t] for t in self.targets], max(prompt_of) + 1, self.stem.targets.device, gaps)

    def _arrange(self) -> None:
        """Positions, and the mask over all columns that may come, if there is anything to hide."""
        stem, device = self.stem, self.stem.targets.device
        width = stem.targets.shape[1]
        lengths = [width - stem.pads[t] + age for t, age in zip(self.targets, self.age, strict=True)]
        self._positions = torch.tensor(lengths, device=device)[:, None]
        gaps = [max(self.age) - age for age in self.age]
        self._mask = None
        if any(gaps) or stem.mask is not None:
            real = torch.ones_like(stem.targets) if stem.mask is None else stem.mask.long()
            real = real[torch.tensor(self.targets, device=device)]
            zero, one = real.new_zeros(len(self), 1), real.new_ones(len(self), 1)
            known = torch.cat([zero, real, one], 1)  # nothing before the target, all that was said after it
            column = torch.arange(width + max(self.age) + stem.room + 1, device=device)
            self._mask = known.gather(1, (column - torch.tensor(gaps, device=device)[:, None]).clamp(-1, width) + 1)
