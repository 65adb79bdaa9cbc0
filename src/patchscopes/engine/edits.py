"""Apply edits to a value that passes by: which rows and columns of it they mean, and what stands there afterwards.

A pass runs columns of tokens; an edit speaks of positions of a prompt. The `Frame` of a pass says which position each row's first
column holds: so the same edit is right in a padded batch, in a pass that starts behind a prefix, and at a decoding step.

Keys and values that a cache gives back are those of earlier passes, unedited. An edit at `k` or `v` is therefore made again in every
later pass, at the same absolute positions: the same as if the text were run anew each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.coordinates import Coordinates
from patchscopes.core.edits import Steps, Write, written
from patchscopes.core.errors import InputError, VectorError
from patchscopes.core.sites import EDGES, Site

if TYPE_CHECKING:
    from patchscopes.engine.engine import Engine

OF_KEYS = ("k", "v")  # sites whose columns are keys, not queries


@dataclass(frozen=True, eq=False)
class Placed:
    """An edit whose prompt and positions (from 0, real tokens) are known. positions, keys None: all of them."""

    site: Site
    prompt: int
    positions: tuple[int, ...] | None
    value: Tensor | None
    write: Write
    amount: float = 1.0
    keys: tuple[int, ...] | None = None
    steps: Steps = "prompt"
    coordinates: Coordinates | None = None
    features: tuple[int, ...] | None = None

    @property
    def rule(self) -> tuple:
        """Edits of equal rules can be made together."""
        some = self.coordinates is not None or self.features is not None
        width = self.value.shape[-1:] if some and self.value is not None else None
        return (self.write, id(self.coordinates), self.features, self.site.head, width)


@dataclass(frozen=True)
class Frame:
    """Where a pass stands.

    prompts  which prompt each row runs
    first    the position that each row's first column holds; negative where it is padding
    columns  how many there are
    lengths  tokens of each prompt (by its number): what comes after them was generated
    """

    prompts: Sequence[int]
    first: Sequence[int]
    columns: int
    lengths: Sequence[int]

    def places(self, edit: Placed, row: int, columns: int, keys: bool = False) -> list[tuple[int, int]]:
        """(column, which of the edit's positions) that `edit` means in `row`, of a value with `columns` columns."""
        first = self.first[row] + self.columns - columns  # keys reach further back than queries, and end where they end
        wanted = edit.keys if keys else edit.positions
        length = self.lengths[self.prompts[row]]
        reach = range(max(first, 0), first + columns)
        if keys:
            return [(p - first, i) for i, p in enumerate(wanted if wanted is not None else reach) if p in reach]
        if isinstance(edit.steps, tuple):
            return [(length + t - first, 0) for t in edit.steps if length + t in reach]
        inside = wanted if wanted is not None else range(length)
        found = [(p - first, i) for i, p in enumerate(inside) if p in reach]
        if edit.steps == "always":
            found += [(p - first, 0) for p in reach if p >= length]
        return found


def edited(x: Tensor, edits: Sequence[Placed], frame: Frame) -> Tensor | None:
    """x with the edits made, which are all at its site; None if none of them is in this pass. x itself stays as it is.

    x: [..., batch, pos, width], [batch, pos, head, width] at sites with heads, [batch, head, query, key] at edges.
    """
    if edits[0].site.name in EDGES:
        return _edited_edges(x, edits, frame)
    row_axis = -2 - edits[0].site.features
    columns = x.shape[row_axis + 1]
    rows = {prompt: row for row, prompt in enumerate(frame.prompts)}
    found = [(edit, row, frame.places(edit, row, columns)) for edit in edits if (row := rows.get(edit.prompt)) is not None]
    found = [(edit, row, places) for edit, row, places in found if places]
    if not found:
        return None
    x = x.clone().movedim((row_axis, row_axis + 1), (0, 1))  # [batch, pos, ...]
    for group in _groups(found):
        edit = group[0][0]
        index = torch.tensor([row for _, row, places in group for _ in places], device=x.device)
        cols = torch.tensor([c for _, _, places in group for c, _ in places], device=x.device)
        old = x[index, cols]
        old = old if edit.site.head is None else old[..., edit.site.head, :]
        value = (
            None
            if edit.value is None
            else torch.cat(
                [
                    _values(e, [i for _, i in places], old, frame.lengths[frame.prompts[row]]).to(x.device)
                    for e, row, places in group
                ]
            )
        )
        amounts = [e.amount for e, _, places in group for _ in places]
        amount: float | Tensor = amounts[0]
        if len(set(amounts)) > 1:
            amount = torch.tensor(amounts, device=x.device, dtype=x.dtype).reshape(-1, *[1] * (old.ndim - 1))
        new = written(value, old, edit.write, amount, edit.coordinates, edit.features)
        if edit.site.head is None:
            x[index, cols] = new
        else:
            x[index, cols, edit.site.head] = new
    return x.movedim((0, 1), (row_axis, row_axis + 1))


def _groups(found: list[tuple[Placed, int, list]]) -> list[list[tuple[Placed, int, list]]]:
    """Edits of one rule that can be made at once: all, unless two of them are at one place, where one follows the other."""
    places = [(row, column) for _, row, columns in found for column, _ in columns]
    if len(set(places)) < len(places):
        return [[one] for one in found]
    groups: dict[tuple, list] = {}
    for one in found:
        groups.setdefault(one[0].rule, []).append(one)
    return list(groups.values())


def _values(edit: Placed, which: list[int], old: Tensor, length: int) -> Tensor:
    """The edit's value for each of its places, [place, ...] as wide as what stands there. length: of the prompt."""
    assert edit.value is not None
    value, inner = edit.value, edit.site.features - (edit.site.head is not None)
    streams = tuple(old.shape[1 : old.ndim - inner])  # some models have them in front of the batch; here they follow the place
    for_all = value.ndim <= inner or (bool(streams) and value.shape[:-inner] == streams)
    if for_all:
        value = value[None]
    else:  # one for each position
        one_each = len(value) == (length if edit.positions is None else len(edit.positions))
        if len(value) > 1 and (edit.steps != "prompt" or not one_each):
            raise VectorError(
                f"the edit at {edit.site} has {len(value)} values for {len(edit.positions or ()) or 'all'} positions; "
                "expected one for each, or one for all"
            )
        value = value[torch.tensor(which if len(value) > 1 else [0], device=value.device)]
        if streams and value.ndim == inner + 1:
            value = value[:, None]
    some = edit.coordinates is not None or edit.features is not None
    width = value.shape[-1] if some and value.ndim > 1 else old.shape[-1]
    while value.ndim < old.ndim:
        value = value[:, None]
    return value.expand(len(which), *old.shape[1:-1], width)


def _edited_edges(x: Float[Tensor, "batch head query key"], edits: Sequence[Placed], frame: Frame) -> Tensor | None:
    new: Tensor | None = None
    rows = {prompt: row for row, prompt in enumerate(frame.prompts)}
    for edit in edits:
        if (row := rows.get(edit.prompt)) is not None:
            queries = frame.places(edit, row, x.shape[-2])
            keys = frame.places(edit, row, x.shape[-1], keys=True)
            if not queries or not keys:
                continue
            new = x.clone() if new is None else new
            heads = (
                torch.arange(x.shape[1], device=x.device)
                if edit.site.head is None
                else torch.tensor([edit.site.head], device=x.device)
            )
            q = torch.tensor([c for c, _ in queries], device=x.device)
            k = torch.tensor([c for c, _ in keys], device=x.device)
            where = (row, heads[:, None, None], q[:, None], k)
            if edit.write == "knock_out":
                new[where] = -torch.inf if edit.site.name == "scores" else 0.0
                if edit.site.name == "scores":
                    _refuse_blind(new[row][heads][:, q], edit)
                continue
            old, value = new[where], None
            if edit.value is not None:
                value = edit.value.to(x)  # [(head,) query, key] of the positions named
                if value.ndim >= 2 and value.shape[-2] > 1:
                    value = _along(value, -2, [i for _, i in queries], edit)
                if value.ndim >= 1 and value.shape[-1] > 1:
                    value = _along(value, -1, [i for _, i in keys], edit)
            new[where] = written(value, old, edit.write, edit.amount, edit.coordinates, edit.features)
    return new


def _along(value: Tensor, axis: int, which: list[int], edit: Placed) -> Tensor:
    if max(which) >= value.shape[axis] or (axis == -2 and edit.steps != "prompt"):
        raise VectorError(
            f"the edit at {edit.site} has a value of shape {tuple(value.shape)}, which says nothing of tokens generated later; "
            "expected one value for all of them"
        )
    return value.index_select(axis, torch.tensor(which, device=value.device))


def _refuse_blind(scores: Tensor, edit: Placed) -> None:
    lowest = torch.finfo(scores.dtype).min
    if not bool((scores > lowest).any(-1).all()):
        raise InputError(
            f"the edit at {edit.site} leaves a query without any key to attend to, and the softmax without an answer; "
            "keep the query itself or the first token"
        )


def refuse_contradictions(edits: Sequence[Placed]) -> None:
    """InputError if an edit would replace what another one has written at the same place."""
    earlier: dict[tuple[Site, int], list[Placed]] = {}
    for edit in edits:
        others = earlier.setdefault((edit.site.whole, edit.prompt), [])
        if edit.write == "replace" and edit.coordinates is None and edit.features is None:
            clash = next((other for other in others if _overlap(edit, other)), None)
            if clash is not None:
                where = "all positions" if edit.positions is None else f"position {', '.join(map(str, edit.positions))}"
                raise InputError(
                    f"two edits contradict one another: at {edit.site}, {where} of prompt {edit.prompt}, '{clash.write}' is followed "
                    "by 'replace', which leaves nothing of it. Drop one of the two, or let the other come second"
                )
        others.append(edit)


def _overlap(one: Placed, other: Placed) -> bool:
    def common(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
        return a is None or b is None or not set(a).isdisjoint(b)

    heads = one.site.head is None or other.site.head is None or one.site.head == other.site.head
    if isinstance(one.steps, tuple) and isinstance(other.steps, tuple):
        return heads and common(one.steps, other.steps)
    if isinstance(one.steps, tuple) or isinstance(other.steps, tuple):
        return heads and "always" in (one.steps, other.steps)
    return heads and common(one.positions, other.positions) and common(one.keys, other.keys)


def lengthened(edit: Placed, prompt: int, said: int) -> Placed | None:
    """An edit of a prompt as one of the prompt and of what was said after it; None if it means none of these tokens."""
    if isinstance(edit.steps, tuple):
        places = tuple(prompt + t for t in edit.steps if t < said)
        return replace(edit, positions=places, steps="prompt") if places else None
    positions = edit.positions if edit.positions is not None else tuple(range(prompt))
    if edit.steps == "always":
        positions += tuple(range(prompt, prompt + said))
    return replace(edit, positions=positions, steps="prompt")


def beyond_windows(engine: Engine, edits: Iterable[Placed]) -> bool:
    """Whether attention is given to keys that a cache may have dropped: those behind a sliding window are there only in a full pass."""
    given = any(
        e.site.name in EDGES and e.write in ("replace", "add", "add_matched", "replace_matched", "interpolate") for e in edits
    )
    return given and any(getattr(layer, "is_sliding", False) for layer in getattr(engine.new_cache(), "layers", ()))
