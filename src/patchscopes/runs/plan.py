"""The plan of a run: a table before it is work. A row a cell, a cell a row of the final table; cells that run together form a shard.

A cell's id is a hash of its content: files and number format of its models, token ids, positions, layers, map, decoding, seed, draw,
the other sources that it is compared with, and its kind. Not of it: devices, versions, batches. The same cell has the same id in any run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from patchscopes.runs.cost import Costs
from patchscopes.runs.schema import PLAN
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.viewing import Viewing

if TYPE_CHECKING:
    from patchscopes.experiment.looks import Look

ROWS = (256, 2048)  # of a shard, unless its work takes too long
SHARDS = 16  # wanted at least, so that workers can share and a stop loses little
SECONDS = 10.0  # that a shard should take, at
NOMINAL = {"cpu": 5e10, "other": 3e14}  # FLOP a second


@dataclass(frozen=True, eq=False)
class Seen:
    """A look with its viewing, and the keys of its models M and M* (see `conditions`)."""

    look: Look
    viewing: Viewing
    keys: tuple[str, str]

    @property
    def heading(self) -> dict[str, str]:
        """What tells the rows of this look apart."""
        return {"part": self.look.part, "model": self.look.model, "scope": self.look.scope_name}

    def coordinates(self, cell: Cell) -> dict[str, Any]:
        """Where a cell stands in the run: the first columns of its table. Prompts are numbered as in the experiment."""
        where = self.viewing.coordinates(cell)
        return {**self.heading, **where, "prompt": self.look.numbers[where["prompt"]]}

    def cell_id(self, cell: Cell, kind: str) -> str:
        """16 hexadecimal digits."""
        viewing = self.viewing
        company = viewing.controls.company(cell.place) if viewing.controls else ""
        content = f"{self.keys} {viewing.content} {viewing.identity(cell)} {company} {kind}"
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def see(looks: Sequence[Look], keys: Mapping[str, str]) -> list[Seen]:
    """The looks as viewings. keys: of every model, by what the experiment calls it."""
    return [
        Seen(look, Viewing(look.scope, look.sources, look.controls, look.evidence), (keys[look.model], keys[look.target_model]))
        for look in looks
    ]


def plan(
    seen: Sequence[Seen], costs: Sequence[Costs], *, shard: int | None = None, device: str = "cpu"
) -> tuple[pl.DataFrame, list[str]]:
    """The plan (columns `PLAN`), and what a reader must know of it. shard: readings in each; None: as many as run well together."""
    total = sum(len(one.viewing.cells) * len(one.viewing.kinds(one.viewing.cells[0])) for one in seen)
    speed = NOMINAL.get(device.partition(":")[0], NOMINAL["other"])
    columns: dict[str, list[Any]] = {name: [] for name in PLAN}
    ids: set[str] = set()
    twice = number = 0
    for look, (one, cost) in enumerate(zip(seen, costs, strict=True)):
        cells = one.viewing.cells
        kinds = one.viewing.kinds(cells[0])
        own = sum(cost.of(cells[len(cells) // 2], kind) for kind in kinds)
        size = shard or readings_a_shard(total, len(kinds), own / speed)
        filled = 0
        for index, cell in enumerate(cells):
            rows = [(kind, one.cell_id(cell, kind)) for kind in one.viewing.kinds(cell)]
            if rows[0][1] in ids:
                twice += 1
                continue
            ids.add(rows[0][1])
            if filled == size:
                number, filled = number + 1, 0
            filled += 1
            where = {**one.coordinates(cell), "shard": number, "look": look, "index": index}
            for kind, id_ in rows:
                where.update(cell=id_, control=kind, cost=cost.of(cell, kind))
                for name, column in columns.items():
                    column.append(where[name])
        number += bool(filled)
    caveats = [f"{twice:,} readings were asked for more than once; each is made once"] if twice else []
    return pl.DataFrame(columns, schema=PLAN), caveats


def readings_a_shard(total: int, kinds: int, seconds: float) -> int:
    """How many readings run together, of `total` rows, with `kinds` rows and about `seconds` each."""
    least, most = ROWS
    rows = min(max(total // SHARDS, least), most)
    return max(1, min(rows // kinds, int(SECONDS / max(seconds, 1e-9))))
