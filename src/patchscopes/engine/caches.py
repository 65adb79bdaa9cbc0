"""Key-value caches of some rows made from caches of others. (transformers 5.23)

Full-attention layers become `OwnLayer`s: the prompt's keys and values once, or copied into every row, and the rows' own in a buffer
that is written in place. Every other kind of layer (sliding, convolution, recurrent, indexed) is copied as it is: keys and values
may be views, since `update` of a dynamic cache concatenates and never writes; states live in dicts and are updated in place, their
flags too, so those are cloned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from patchscopes.engine.shared_prefix import Prefix, Seats, with_prefix

FEW = 64  # own tokens for which buffers are made at once, if so many may come


class OwnLayer(DynamicLayer):
    """Keys and values of rows that continue prompts, for full attention.

    prefix   of the prompts; None if rows begin with nothing
    shared   the prefix is kept once and travels with the keys (see `shared_prefix`); else each row holds a copy, in its buffer
    present  rows that run through the block, the first of all rows
    rows     all rows: the buffer has room for those that `splice` will add
    room     own tokens of a row at most, if that is known
    """

    def __init__(self, prefix: Prefix | None, *, shared: bool, seats: Seats, rows: int, room: int):
        super().__init__()
        self.prefix = None if prefix is None else prefix.of(seats)
        self.shared, self.seats, self.rows, self.room = shared and prefix is not None, seats, rows, room
        self.head = 0 if prefix is None or self.shared else len(prefix)  # columns of the buffer that hold the prefix
        self.own = 0  # columns behind the prefix
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all that the rows own: with the prefix in front, or saying that it stands there."""
        rows = key_states.shape[0]
        if (
            key_states.requires_grad
        ):  # nothing goes on from a pass under autograd: no buffer, into which no gradient could be written
            return self._unkept(key_states, value_states)
        self.reserve(key_states, value_states)
        assert self.buffers is not None
        start, stop = self.head + self.own, self.head + self.own + key_states.shape[-2]
        keys, values = self.buffers
        keys[:rows, :, start:stop] = key_states
        values[:rows, :, start:stop] = value_states
        self.own += stop - start
        keys, values = keys[:rows, :, :stop], values[:rows, :, :stop]
        return with_prefix(keys, self.prefix if self.shared else None), values

    def _unkept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What `update` returns, as a graph."""
        if self.prefix is not None and self.head:
            index = torch.tensor(self.seats.of, device=keys.device)
            keys = torch.cat([self.prefix.keys.index_select(0, index), keys], -2)
            values = torch.cat([self.prefix.values.index_select(0, index), values], -2)
        return with_prefix(keys, self.prefix if self.shared else None), values

    def reserve(self, keys: Tensor, values: Tensor) -> None:
        """Buffers with room for more columns of this shape: for all at once if they are few, else twice as many as before."""
        need = self.own + keys.shape[-2]
        have = 0 if self.buffers is None else self.buffers[0].shape[2] - self.head
        if self.buffers is not None and need <= have:
            return
        width = self.head + max(need, min(self.room, max(2 * have, need + FEW)))
        new = tuple(t.new_empty(self.rows, t.shape[1], width, t.shape[3]) for t in (keys, values))
        for k, buffer in enumerate(new):
            if self.buffers is not None:
                buffer[:, :, : self.head + self.own] = self.buffers[k][:, :, : self.head + self.own]
            elif self.head:
                assert self.prefix is not None
                self._copy_prefix(buffer, self.prefix.keys if k == 0 else self.prefix.values, range(len(self.seats.of)))
        self.buffers = (new[0], new[1])

    def _copy_prefix(self, buffer: Tensor, prefix: Tensor, rows: Sequence[int]) -> None:
        if len(prefix) > 1:
            prefix = prefix.index_select(0, torch.tensor([self.seats.of[r] for r in rows], device=prefix.device))
        buffer[rows[0] : rows[-1] + 1, :, : self.head] = prefix

    def complete(self, base: OwnLayer, seats: Seats, base_row: Sequence[int]) -> None:
        """All rows: those that have not run through the block own what rows base_row of `base` own."""
        present = len(self.seats.of) if self.buffers is not None else 0
        self.seats = seats
        self.prefix = None if self.prefix is None else self.prefix.of(seats)
        if present == self.rows:
            return
        assert base.buffers is not None
        sources = tuple(t[:, :, base.head : base.head + base.own] for t in base.buffers)
        if self.buffers is None:
            self.reserve(*sources)
            self.own = base.own
        assert self.buffers is not None
        missing = range(present, self.rows)
        for k, (buffer, source) in enumerate(zip(self.buffers, sources, strict=True)):
            if len(source) > 1:
                source = source.index_select(0, torch.tensor([base_row[r] for r in missing], device=source.device))
            buffer[present:, :, self.head : self.head + self.own] = source
            if self.head and present:
                assert self.prefix is not None
                self._copy_prefix(buffer, self.prefix.keys if k == 0 else self.prefix.values, missing)

    def keep(self, index: Tensor, cut: int, seats: Seats) -> None:
        """Only rows `index`, who sit so, without the first `cut` columns of the buffer, which none of them uses."""
        assert self.buffers is not None
        index = index.to(self.buffers[0].device)
        self._set_seats(seats)
        stop = self.head + self.own
        new = []
        for t in self.buffers:
            buffer = t.new_empty(len(index), t.shape[1], t.shape[2] - cut, t.shape[3])
            buffer[:, :, : stop - cut] = t[:, :, cut:stop].index_select(0, index)
            new.append(buffer)
        self.own -= cut
        self.buffers = (new[0], new[1])

    def enter(self, other: OwnLayer, seats: Seats) -> None:
        """The rows of `other` come after these, their columns at the right; what is missing before them is zero, and to be masked."""
        assert self.buffers is not None and other.buffers is not None and other.own <= self.own
        gap, stop, before = self.own - other.own, self.head + self.own, self.rows
        self.rows = before + other.rows
        self._set_seats(seats)
        new = []
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            buffer = mine.new_empty(self.rows, *mine.shape[1:])
            buffer[:before, :, :stop] = mine[:, :, :stop]
            buffer[before:, :, :gap] = 0
            buffer[before:, :, gap:stop] = theirs[:, :, : stop - gap]
            new.append(buffer)
        self.buffers = (new[0], new[1])

    def _set_seats(self, seats: Seats) -> None:
        self.seats, self.rows = seats, len(seats.of)
        self.prefix = None if self.prefix is None else self.prefix.of(seats)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As the library's caches do."""
        self.keep(beam_idx, 0, self.seats.take(beam_idx.tolist()))

    def get_seq_length(self) -> int:
        """Tokens of a row, prefix and own."""
        return self.own + (0 if self.prefix is None else len(self.prefix))


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


def fork(cache: Any, seats: Sequence[Seats], *, shared: bool, rows: int, room: int) -> Any:
    """A cache whose block b holds rows that continue the prompts of `cache` as seats[b] says.

    shared, rows, room: see `OwnLayer`.
    """
    new = copy.copy(cache)
    new.layers = []
    for layer, seated in zip(cache.layers, of_blocks(list(seats), len(cache.layers)), strict=True):
        if type(layer) is DynamicLayer:
            prefix = Prefix(layer.keys, layer.values, seated) if layer.get_seq_length() else None  # type: ignore[arg-type]
            new.layers.append(OwnLayer(prefix, shared=shared, seats=seated, rows=max(rows, len(seated.of)), room=room))
        else:
            new.layers.append(rows_of(layer, torch.tensor(seated.of, device=seated.device)))
    return new


def splice(cache: Any, base: Any, present: list[int], seats: Seats, base_row: Sequence[int]) -> None:
    """Complete `cache` to len(base_row) rows: block b keeps its own first present[b] and takes the others' from `base`.

    base_row[r]: the row of `base` that row r continues; seats: which prompts.
    """
    present = of_blocks(present, len(cache.layers))
    for b, own in enumerate(cache.layers):
        if isinstance(own, OwnLayer):
            own.complete(base.layers[b], seats, base_row)
            continue
        if present[b] == len(base_row):
            continue
        other = rows_of(base.layers[b], torch.tensor(base_row[present[b] :], device=seats.device))
        if present[b] == 0:
            cache.layers[b] = other
            continue
        for name, value in vars(own).items():
            rest = getattr(other, name)
            if isinstance(value, dict):
                setattr(own, name, {k: torch.cat([t, rest[k]]) if _is_batched(t) else t for k, t in value.items()})
            elif _is_batched(value):
                setattr(own, name, torch.cat([value, rest]))


def keep_rows(cache: Any, index: Tensor, seats: Seats, cut: int = 0) -> None:
    """Only rows `index` stay, who sit so, without the first `cut` columns behind the prefix (before it, where rows hold copies)."""
    for layer in cache.layers:
        if isinstance(layer, OwnLayer):
            layer.keep(index, cut, seats)
        else:
            layer.reorder_cache(index)
            if cut and getattr(layer, "is_sliding", False):
                layer.cumulative_length -= cut
                seen = min(layer.cumulative_length, layer.sliding_window - 1)
                layer.keys, layer.values = (t[:, :, t.shape[2] - seen :] for t in (layer.keys, layer.values))


def enter_rows(cache: Any, other: Any, seats: Seats) -> None:
    """The rows of `other`, which have fewer columns, come after those of `cache`; the missing columns are to be masked."""
    for b, layer in enumerate(cache.layers):
        if isinstance(layer, OwnLayer):
            layer.enter(other.layers[b], seats)
            continue
        for name, value in vars(layer).items():
            rest = getattr(other.layers[b], name)
            if isinstance(value, dict):
                setattr(layer, name, {k: torch.cat([t, rest[k]]) if _is_batched(t) else t for k, t in value.items()})
            elif _is_batched(value):
                missing = list(rest.shape)
                missing[-2] = value.shape[-2] - rest.shape[-2]
                setattr(layer, name, torch.cat([value, torch.cat([rest.new_zeros(missing), rest], -2)]))


def row_bytes(cache: Any, more: int, *, whole: bool) -> float:
    """Bytes that a row takes in a cache like this, with `more` columns for what it owns; of all blocks, or (not `whole`) of the largest."""
    if cache is None:
        return 0.0
    sizes = []
    for layer in cache.layers:
        if isinstance(layer, OwnLayer):
            each = sum(t.shape[1] * t.shape[3] * t.element_size() for t in layer.buffers or ())
            sizes.append(each * (layer.head + layer.own + more))
        else:
            batched = [t for value in vars(layer).values() for t in (value.values() if isinstance(value, dict) else (value,))]
            sizes.append(sum(t[0].numel() * t.element_size() for t in batched if _is_batched(t)))
    return float(sum(sizes) if whole else max(sizes, default=0))
