"""What a sweep will take, before it runs: cells, passes, FLOP, memory, disk, time.

FLOP are counted (see `cost`), an upper bound where texts may stop early. Time comes from a probe: of each look a few readings are made
twice, and the second time is scaled by what all of them cost. Without a probe (a model that is not here) it comes from a card's
datasheet,

    time = Σ over passes of max(FLOP / (e · peak FLOP/s), bytes of weights / (e · bandwidth)),   e between 0.2 and 0.6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.engine.generate import ROWS as AT_A_TIME
from patchscopes.engine.shape import Shape, measure
from patchscopes.experiment.looks import looks
from patchscopes.experiment.resolve import resolved
from patchscopes.experiment.spec import Experiment
from patchscopes.model.model import Model
from patchscopes.model.outline import Outline
from patchscopes.runs.conditions import conditions, files_of, keys, load_spec, outline_spec
from patchscopes.runs.cost import N_SCORED, Costs
from patchscopes.runs.plan import Seen, plan, see
from patchscopes.runs.work import Task, Worker

PROBED = 48  # readings of a look
ROW_BYTES = 90  # of a row on disk, where none was seen
EFFICIENCY = (0.2, 0.4, 0.6)  # of a card's peak: at least, usual, at most
# name: (dense 16-bit FLOP/s, bytes/s of its memory, bytes of its memory), from the vendors' datasheets
CARDS = {
    "a100": (312e12, 2.039e12, 80e9),
    "h100": (989e12, 3.35e12, 80e9),
    "h200": (989e12, 4.8e12, 141e9),
    "l40s": (362e12, 0.864e12, 48e9),
    "rtx4090": (165e12, 1.008e12, 24e9),
}


@dataclass(frozen=True)
class Estimate:
    """cells: rows of the final table, of them `readings` and their controls. seconds: (at least, expected, at most), None if unknown."""

    readings: int
    cells: int
    per_reading: str
    shards: int
    passes: int
    flops: float
    weight_bytes: int
    row_bytes: float
    rows_at_a_time: int
    disk_bytes: int
    seconds: tuple[float, float, float] | None
    basis: str
    workers: int
    cards_for_weights: int | None
    caveats: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return asdict(self)

    def lines(self, amount: Callable[[float], str], duration: Callable[[float], str]) -> list[tuple[str, str]]:
        """Name and value, for people."""
        peak = self.weight_bytes + self.rows_at_a_time * self.row_bytes
        time_ = "unknown: probe, or give --hardware"
        if self.seconds is not None:
            low, usual, high = self.seconds
            by = f" by {self.workers} workers" if self.workers > 1 else ""
            time_ = f"{duration(usual)} ({duration(low)} to {duration(high)}){by}; {self.basis}"
        found = [
            ("cells", f"{self.cells:,} = {self.readings:,} readings {self.per_reading}"),
            ("shards", f"{self.shards:,}"),
            ("passes", f"{self.passes:,} at most, of up to {self.rows_at_a_time:,} rows"),
            ("FLOP", f"{self.flops:.3g} at most"),
            ("memory", f"{amount(peak)}: weights {amount(self.weight_bytes)}, {amount(self.row_bytes)} a row"),
            ("disk", amount(self.disk_bytes)),
            ("time", time_),
        ]
        if self.cards_for_weights is not None and self.cards_for_weights > 1:
            found.append(("cards", f"{self.cards_for_weights} for one copy of the weights (device_map = 'auto')"))
        return found + [("note", caveat) for caveat in self.caveats]


def estimate(
    experiment: Experiment, *, probe: bool = True, hardware: str | None = None, workers: int = 1, device: str | None = None
) -> Estimate:
    """See the module. probe: load the models and time some cells; else config and tokenizer are enough, and `hardware` (a card of
    `CARDS`) gives the time. UnknownName for another card; errors as for `sweep`."""
    if hardware is not None and hardware.lower() not in CARDS:
        raise UnknownName(f"unknown hardware {hardware!r}. {nearest(hardware.lower(), CARDS)}")
    if probe and hardware is not None:
        raise InputError("a probe measures this machine; expected --no-probe with --hardware")
    asked = resolved(experiment)
    specs = {spec.key: spec for spec in asked.models()}
    kind = "cuda" if hardware else device or "cpu"
    models = {key: load_spec(spec, device) if probe else outline_spec(spec, kind) for key, spec in specs.items()}
    found = conditions(models, {key: files_of(spec) for key, spec in specs.items()}, kind)
    looked, caveats = looks(asked, models)
    seen = see(looked, keys(found))
    costs = costs_of(seen)
    table, more = plan(seen, costs, shard=asked.shard, device=kind)
    readings = int((table["control"] == "none").sum())
    size = AT_A_TIME.get(kind, AT_A_TIME["cuda"])
    passes = sum(_passes(one, n, shards, size) for one, (n, shards) in zip(seen, _readings(table, len(seen)), strict=True))
    flops = float(table["cost"].sum()) + sum(cost.sources() for cost in costs)
    weights = sum(p.numel() * p.element_size() for model in models.values() for p in model.hf.parameters())
    shards = int(table["shard"].max() or 0) + 1  # type: ignore[arg-type]
    busy = min(workers, shards)
    timed = _probe(seen, asked, found, table) if probe else None
    seconds, basis, a_row = None, "", float(ROW_BYTES)
    if timed is not None:
        seconds, a_row = _scaled(*timed, workers=busy)
        basis = f"from a probe of {sum(n for _, _, n in timed[0].values()):,} readings"
    elif hardware is not None:
        seconds = _of_card(hardware.lower(), flops, passes, weights, busy)
        basis = f"from the datasheet of {hardware}, at 20 to 60 % of its peak"
    card = CARDS[hardware.lower()] if hardware else None
    return Estimate(
        readings,
        len(table),
        _how_many(seen),
        shards,
        passes,
        flops,
        weights,
        max(_row_bytes(one, cost.target) for one, cost in zip(seen, costs, strict=True)),
        min(size, int(table.group_by("shard").len()["len"].max() or 1)),  # type: ignore[arg-type]
        round(a_row * len(table) + 16 * len(table)),
        seconds,
        basis,
        busy,
        math.ceil(weights * 1.1 / card[2]) if card else None,
        (*caveats, *more),
    )


def costs_of(seen: Sequence[Seen]) -> list[Costs]:
    """What the cells of each look cost."""
    shapes: dict[int, Shape] = {}

    def shape(model: Model) -> Shape:
        if id(model) not in shapes:
            shapes[id(model)] = model.shape if isinstance(model, Outline) else measure(model.engine)
        return shapes[id(model)]

    return [Costs(one.viewing, shape(one.viewing.origin), shape(one.viewing.target_model)) for one in seen]


def _readings(table: pl.DataFrame, n_looks: int) -> list[tuple[int, int]]:
    """Readings and shards of every look."""
    some = table.filter(pl.col("control") == "none").group_by("look").agg(pl.len(), pl.col("shard").n_unique())
    found = {look: (n, shards) for look, n, shards in some.iter_rows()}
    return [found.get(k, (0, 0)) for k in range(n_looks)]


def _passes(one: Seen, readings: int, shards: int, size: int) -> int:
    """At most. In every shard: source prompts, then for each batch of rows the prompt and every further token; with controls a second
    look at the sources, and the texts under other vectors and behind the words."""
    if not shards:
        return 0
    viewing = one.viewing
    each = math.ceil(readings / shards)
    kinds = len(viewing.kinds(viewing.cells[0]))
    passes = 1 + math.ceil(each * kinds / size) * viewing.scope.max_new_tokens
    if viewing.controls is not None and viewing.evidence:
        scored = N_SCORED + len(viewing.controls.others(0))
        passes += 1 + math.ceil(each * scored / size) + math.ceil(each / size)
    return shards * passes


def _row_bytes(one: Seen, shape: Shape) -> float:
    """Memory of a row: its keys and values, a block's activations, its logits about three times over."""
    viewing = one.viewing
    target = max(viewing.targets, key=lambda t: len(t.tokens))
    suffix = len(target.tokens) - target.position + viewing.scope.max_new_tokens
    kept = sum(block.kv_heads * (block.d_qk + block.d_v) for block in shape.blocks) * shape.element * suffix
    wide = max(block.weights for block in shape.blocks) / max(
        viewing.target_model.d_model, 1
    )  # numbers of a position inside a block
    return kept + (len(target.tokens) - target.position) * wide * shape.element + 12.0 * viewing.target_model.vocab


def _how_many(seen: Sequence[Seen]) -> str:
    one = seen[0]
    kinds = one.viewing.kinds(one.viewing.cells[0])
    return f"x (1 + {len(kinds) - 1} controls)" if len(kinds) > 1 else "without controls"


def _probe(
    seen: Sequence[Seen], experiment: Experiment, found: Any, table: Any
) -> tuple[dict[int, tuple[float, float, int]], dict[int, float], float]:
    """Of each look: (seconds, their spread as a share, readings); FLOP of a reading in all; bytes of a row."""
    worker = Worker(seen, experiment.outputs, found)
    shard = int(table.filter(table["control"] == "none").group_by("shard").len()["len"].max() or 1)
    times: dict[int, tuple[float, float, int]] = {}
    n_rows = n_bytes = 0
    for look, one in enumerate(seen):
        n = min(PROBED, shard, len(one.viewing.cells))
        step = max(1, len(one.viewing.cells) // n)
        mine = list(range(0, len(one.viewing.cells), step))[:n]
        worker.do(Task(0, look, tuple(mine[: max(1, n // 4)])))  # the first time warms up
        halves = [mine[::2], mine[1::2] or mine]
        seconds = []
        for half in halves:
            started = time.monotonic()
            done = worker.do(Task(0, look, tuple(half)))
            seconds.append((time.monotonic() - started) / len(half))
            n_rows, n_bytes = n_rows + len(done.ids), n_bytes + len(done.rows)
        mean = sum(seconds) / len(seconds)
        times[look] = (mean, abs(seconds[0] - seconds[1]) / (2 * mean), n)
    totals = {look: float(n) for look, (n, _) in enumerate(_readings(table, len(seen)))}
    return times, totals, n_bytes / max(n_rows, 1)


def _scaled(
    times: dict[int, tuple[float, float, int]], totals: dict[int, float], row_bytes: float, *, workers: int
) -> tuple[tuple[float, float, float], float]:
    """Small groups run less well than shards: the probe errs on the long side, by up to a third where a shard is much larger."""
    usual = sum(mean * totals[look] for look, (mean, _, _) in times.items()) / workers
    spread = max(0.15, max(s for _, s, _ in times.values()))
    return (usual * (1 - spread) * 0.67, usual, usual * (1 + spread)), row_bytes


def _of_card(name: str, flops: float, passes: int, weights: int, workers: int) -> tuple[float, float, float]:
    peak, bandwidth, _ = CARDS[name]
    low, usual, high = (
        passes * max(flops / passes / (e * peak), weights / (e * bandwidth)) / workers for e in sorted(EFFICIENCY, reverse=True)
    )
    return low, usual, high
