"""Which rows run together: planned before anything runs. Plain data, pure functions.

A pack is one `Stem`: its targets are padded to one width, and its rows run from the earliest patched position of any. Costs are
counted in tokens that run through all blocks:

    base    targets · width
    rows    Σ share · reach           reach: from the pack's first patched position to the end; share: of the blocks, (L − ℓ*) / L
    seats   steps · seats · P / (6 · d_model)       attention over a shared prefix of P, a seat for every slot of every target

(a token costs 24 · d_model² FLOP in a block and 4 · d_model for every key that it sees). A target joins a pack if that costs at most
`slack` tokens more than a pack of its own: what a pass costs beside its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Packing:
    """What the rows of one batch may share on a model (measured by `check`).

    shared_prefix  the keys and values of their target prompts, held once
    ragged         the batch, when their target prompts differ in length
    gaps           the batch, when they have said different numbers of tokens: rows may enter while others are being decoded
    """

    shared_prefix: bool = False
    ragged: bool = False
    gaps: bool = False


@dataclass(frozen=True)
class Wish:
    """One row: the ids that it continues, tokens from its patched position to their end, and the share of blocks that it runs."""

    ids: tuple[int, ...]
    reach: int
    share: float


@dataclass
class Pack:
    """Targets, and wishes by their number. A wish's target is `targets.index(wish.ids)`."""

    targets: list[tuple[int, ...]] = field(default_factory=list)
    wishes: list[int] = field(default_factory=list)


@dataclass
class _Open:
    """A pack while it is filled."""

    pack: Pack
    rows: Counter[tuple[int, ...]]  # of each target
    reach: int
    shares: float

    def cost(self, steps: int, d_model: int) -> float:
        width = max(map(len, self.rows))
        seats = len(self.rows) * max(self.rows.values())
        return len(self.rows) * width + self.shares * self.reach + steps * seats * (width - self.reach) / (6 * d_model)


def pack(wishes: Sequence[Wish], *, ragged: bool, steps: int, slack: float, d_model: int, most_tokens: int = 2**15) -> list[Pack]:
    """Packs of all wishes. Without `ragged` a pack's targets are of one length; its targets have at most `most_tokens` tokens together."""
    units: dict[tuple[tuple[int, ...], int], list[int]] = {}  # rows of one target that are patched at one position
    for k, wish in enumerate(wishes):
        units.setdefault((wish.ids, wish.reach), []).append(k)
    order = sorted(units, key=lambda unit: (unit[1], len(unit[0])) if ragged else (len(unit[0]), unit[1]))
    packs: list[_Open] = []
    for ids, reach in order:
        rows = units[ids, reach]
        alone = _Open(Pack([ids], rows), Counter({ids: len(rows)}), reach, sum(wishes[k].share for k in rows))
        last = packs[-1] if packs else None
        if last is None or not (ragged or len(last.pack.targets[0]) == len(ids)):
            packs.append(alone)
            continue
        both = _Open(last.pack, last.rows + alone.rows, max(last.reach, reach), last.shares + alone.shares)
        separate = last.cost(steps, d_model) + alone.cost(steps, d_model) + slack
        fits = len(both.rows) * max(map(len, both.rows)) <= most_tokens or len(both.rows) == len(last.rows)
        if fits and both.cost(steps, d_model) <= separate:
            packs[-1] = both
            last.pack.wishes += rows
            if ids not in last.rows:
                last.pack.targets.append(ids)
        else:
            packs.append(alone)
    return [some.pack for some in packs]
