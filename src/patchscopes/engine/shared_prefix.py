"""Keys and values of a prompt, held once for all rows that continue it.

    scores = q kᵀ       q of the rows of one prompt become one matrix:  [prompt, kv_head, slot · head · query, d] × [.., d, P]
    mixed  = pattern v  the same way back

Nothing of the size rows × P × d_head is made. Heads that share keys (GQA) are folded in with the rows. Where several prompts have
rows, every prompt has as many slots as the one with the most rows, and each row sits in one of its prompt's.

A cache layer returns a row's own keys; the prefix that stands before them travels with the tensor (`PREFIX`), which reaches the
attention function in every family that hands the cache's answer on as it is. Where it gets lost the self-check finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

PREFIX = "_patchscopes_prefix"  # the attribute of a key tensor where its `Prefix` stands


class Seats:
    """Row r continues prompt of[r] and has the seat index[r] = prompt · slots + slot; index None: seats are taken in order.

    gaps  columns that row r lacks between its prompt and its own tokens, since it entered late; None: no row lacks any
    """

    def __init__(self, of: Sequence[int], prompts: int, device: torch.device, gaps: Sequence[int] = ()):
        self.of, self.prompts, self.device = list(of), prompts, device
        self.gaps = torch.tensor(gaps, device=device)[:, None] if any(gaps) else None
        self._order = torch.zeros(0, 0)
        if prompts == 1:
            self.slots, self.index = len(self.of), None
            return
        taken = [0] * prompts
        seats: list[tuple[int, int]] = []
        for prompt in self.of:
            seats.append((prompt, taken[prompt]))
            taken[prompt] += 1
        self.slots = max(taken)
        places = [prompt * self.slots + slot for prompt, slot in seats]
        in_order = places == list(range(prompts * self.slots))
        self.index: Tensor | None = None if in_order else torch.tensor(places, device=device)

    def take(self, rows: Sequence[int]) -> Seats:
        """The seats of some rows, in this order."""
        return Seats([self.of[r] for r in rows], self.prompts, self.device)

    def order(self, keys: int, prefix: int) -> Tensor | None:
        """Where in a mask over [gap, prefix, own] the columns of [prefix, gap, own] stand: [row, key]."""
        if self.gaps is None:
            return None
        if self._order.shape[1] != keys:  # once a step, for all blocks
            column = torch.arange(keys, device=self.gaps.device)
            behind = torch.where(column < prefix + self.gaps, column - prefix, column)
            self._order = torch.where(column < prefix, column + self.gaps, behind)
        return self._order

    def seated(self, x: Float[Tensor, "row kv_head each d"]) -> Float[Tensor, "prompt kv_head slot_each d"]:
        """Rows in their seats; empty seats hold zeros."""
        if self.index is not None:
            x = x.new_zeros(self.prompts * self.slots, *x.shape[1:]).index_copy_(0, self.index.to(x.device), x)
        _, kv_heads, each, width = x.shape
        x = x.reshape(self.prompts, self.slots, kv_heads, each, width).transpose(1, 2)
        return x.reshape(self.prompts, kv_heads, self.slots * each, width)

    def risen(self, x: Float[Tensor, "prompt kv_head slot_each d"]) -> Float[Tensor, "row kv_head each d"]:
        """Rows from their seats."""
        _, kv_heads, all_, width = x.shape
        x = x.reshape(self.prompts, kv_heads, self.slots, all_ // self.slots, width).transpose(1, 2).flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index.to(x.device))


@dataclass(frozen=True, eq=False)
class Prefix:
    """keys [prompt, kv_head, P, d], values [prompt, kv_head, P, d_v], and where the rows sit that continue them."""

    keys: Tensor
    values: Tensor
    seats: Seats

    def __len__(self) -> int:
        return self.keys.shape[-2]

    def of(self, seats: Seats) -> Prefix:
        """The same for other rows."""
        return replace(self, seats=seats)

    def masked(self, mask: Float[Tensor, "row #head q key"]) -> Float[Tensor, "row #head q key"]:
        """A mask in the order of the keys: other layers have a late row's gap in front of everything, where its window is whole."""
        order = self.seats.order(mask.shape[-1], len(self))
        return mask if order is None else mask.gather(-1, order.to(mask.device)[:, None, None].expand_as(mask))

    def match(self, query: Float[Tensor, "row head q d"]) -> Float[Tensor, "row head q pos"]:
        """q kᵀ over the prefix."""
        return self._folded(query, self.keys.transpose(-1, -2))

    def mix(self, pattern: Float[Tensor, "row head q pos"]) -> Float[Tensor, "row head q d"]:
        """pattern · v over the prefix."""
        return self._folded(pattern, self.values)

    def _folded(self, x: Tensor, other: Tensor) -> Tensor:
        rows, heads, queries, width = x.shape
        kv_heads = other.shape[1]
        folded = self.seats.seated(x.reshape(rows, kv_heads, heads // kv_heads * queries, width))
        return self.seats.risen(torch.matmul(folded, other)).reshape(rows, heads, queries, -1)


def with_prefix(keys: Tensor, prefix: Prefix | None) -> Tensor:
    """`keys`, which now say that `prefix` stands before them."""
    if prefix is not None:
        setattr(keys, PREFIX, prefix)
    return keys


def prefix_of(keys: Tensor, seats: Seats | None = None) -> Prefix | None:
    """What stands before `keys`, for rows that sit so."""
    prefix: Prefix | None = getattr(keys, PREFIX, None)
    return prefix if prefix is None or seats is None else prefix.of(seats)
