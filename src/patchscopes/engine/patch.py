"""Patched runs that compute only what the patch changes.

Rows continue target prompts T. Each row has a layer ℓ*, a position i* and a vector.

    prefix   all T before the first i*: one pass, a row for each different beginning, a cache
    base     the rest of every T, unpatched: h[ℓ] of its positions for every ℓ, and the keys and values of all blocks
    walk     one pass up the blocks: a row joins at its ℓ* with its base's h[ℓ*], in which its vector is written; blocks below the
             lowest ℓ* are bypassed; a block sees as many rows as have joined
    splice   keys and values of the blocks below a row's ℓ* are its base's; now every row owns all blocks, and can go on

An edit is made once, in the prompt pass; later tokens see it through the cache, which equals patching the same absolute position
again at every step. Routes: "stairs" as above; "whole" without a prefix, for models that cannot continue a prompt exactly;
"hooks", the full pass for every row, for models that can do neither (and the oracle of the tests).

Targets of different lengths are padded on the left to one width; what a row calls position i is column pad + i. For teacher-forced
scoring rows continue a prompt by different texts: targets are then padded on the right, where causal models do not look.

Where the model can, rows share the prefix (`shared_prefix`) and attend through `attend`. Each then makes scores [head, query, key] of
its own, which a fused kernel would not: rows share where the prefix is at least as long as the rest, and copies would be large. (GPT-2
small, CPU, 48 rows: a walk takes 1.01 of the time with copies where the prefix is the shorter part, 0.97 to 0.91 where it is the longer.)
A GPU takes its time for the number of kernels, not for the copies of few rows (see `COPIES`).
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from patchscopes.core.edits import Write, written
from patchscopes.core.sites import Site
from patchscopes.engine.attention import switched
from patchscopes.engine.caches import fork, of_blocks, splice
from patchscopes.engine.edits import Frame
from patchscopes.engine.engine import Engine, Reading, SharedKV
from patchscopes.engine.hooks import Change, Handle, hooked, on_output
from patchscopes.engine.places import at_sites
from patchscopes.engine.rows import Row
from patchscopes.engine.shared_prefix import Seats, prefix_of, with_prefix
from patchscopes.engine.watch import Watch

Route = Literal["stairs", "whole", "hooks"]
ROUTES: tuple[Route, ...] = ("stairs", "whole", "hooks")
# Rows times positions of a prefix below which copies are cheaper on a GPU, in float32. (GPT-2 small on an H200, ms a step with copies and
# shared: 144 rows behind 22 tokens 5.7 and 8.6, behind 100 tokens 5.7 and 10.2, behind 400 8.5 and 9.2; 400 rows behind 22 7.1 and 9.0;
# 1000 behind 22 12.9 and 11.8. In bfloat16 copies took 24 to 54 ms, shared 9 to 12.)
COPIES = 2**14


@dataclass(frozen=True)
class Walked:
    """What a pass leaves behind.

    logits      [row, kept, vocab]
    norm_ratio  [row], ‖what stands at the site afterwards‖ / ‖what stood there‖; 1 where nothing was written
    cache       of all rows, to go on with; None if it was not asked for
    """

    logits: Tensor
    norm_ratio: Tensor
    cache: Any


@dataclass(frozen=True, eq=False)
class _Written:
    """What some rows write at one site: their numbers, the columns, and the vectors [..., row, d_model]."""

    write: Write
    rows: Tensor
    places: Tensor
    values: Tensor


@dataclass(eq=False)
class Base:
    """What unpatched targets leave: caches of the prefix and of all of them, and h of the rest. Never written to again."""

    prefix: Any
    cache: Any
    reading: Reading


class Stem:
    """What rows share: the prefix and the unpatched base run of their targets. Serves any number of walks.

    mask     [target, pos], True at real tokens; None: all are. Padding is on the left
    shared   rows share the prefix, and their caches can only be used inside `attending`; None: where the model can and it pays
    caching  the walks leave caches to go on with, of at most `room` tokens behind the targets
    """

    def __init__(
        self,
        engine: Engine,
        targets: Int[Tensor, "target pos"],
        rows: Sequence[Row],
        *,
        route: Route = "stairs",
        caching: bool = True,
        mask: Bool[Tensor, "target pos"] | None = None,
        shared: bool | None = False,
        room: int = 0,
    ):
        self.engine, self.targets, self.route, self.mask, self.room = engine, targets, route, mask, room
        if any(row.site.name in ("attn_in", "mlp_in") for row in rows):
            _ = engine.parts  # found now: inside `attending` the model would be compared with itself
        self.pads = [0] * len(targets) if mask is None else (~mask).sum(1).tolist()
        width = targets.shape[1]
        self.start = 0
        if route == "stairs":
            self.start = engine.start(targets, min(row.first + self.pads[row.target] for row in rows))
        self.shared = self.start > 0 and (shared if shared is not None else self._sharing_pays(len(rows)))
        beginnings = [tuple(ids) for ids in targets[:, : self.start].tolist()] if len(targets) > 1 else [()]
        if mask is not None:
            beginnings = list(zip(beginnings, (min(pad, self.start) for pad in self.pads), strict=True))
        numbers = {beginning: k for k, beginning in enumerate(dict.fromkeys(beginnings))}
        self.prompt_of = [numbers[beginning] for beginning in beginnings]  # of each target
        self.caching = caching
        self.cached = route != "hooks" and bool(self.start or caching)
        self.layers = (
            list(range(engine.n_layers + 1)) if engine.store is not None else sorted({row.join(engine.n_layers) for row in rows})
        )
        self.suffix = width - self.start
        self.base: Base | None = None

    def _sharing_pays(self, rows: int) -> bool:
        cheap = self.engine.fuses and rows * self.start < COPIES
        return self.engine.packing.shared_prefix and 2 * self.start >= self.targets.shape[1] and not cheap

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Inside, the model attends as the rows of this stem need it."""
        with switched(self.engine.model) if self.shared else nullcontext():
            yield

    @torch.no_grad()
    def prepare(self) -> Base:
        """Run the prefix and the base, once. Of their logits nothing is wanted, so nothing is unembedded."""
        if self.base is not None:
            return self.base
        key, store = (self.targets, self.mask, self.start, self.shared, self.cached), self.engine.store
        self.base = base = self._run_base() if store is None else store.get(key, self._run_base)
        return base

    def _run_base(self) -> Base:
        engine, start = self.engine, self.start
        prefix = engine.new_cache() if self.cached else None
        device = self.targets.device
        alone = len(self.targets) == 1 and self.mask is None and engine.given is None
        if start and alone and engine.one_base_pass is not False:
            base = self._run_base_at_once()
            engine.one_base_pass = base is not None
            if base is not None:
                return base
        if start:  # through the model's own attention: a long prefix would make large scores
            first = [self.prompt_of.index(k) for k in range(max(self.prompt_of) + 1)]
            mask, positions = self._real(first, 0, start)
            engine.forward(self.targets[first, :start], cache=prefix, keep=[], mask=mask, positions=positions)
        cache = None
        everyone = list(range(len(self.targets)))
        if prefix is not None:
            seats = Seats(self.prompt_of, max(self.prompt_of) + 1, device)
            cache = fork(prefix, [seats] * engine.n_layers, shared=self.shared, rows=0, room=self.suffix)
        mask, positions = self._real(everyone, start, self.targets.shape[1])
        with self.attending():
            reading = engine.read(
                self.targets[:, start:],
                self.layers,
                offset=start,
                cache=cache,
                keep=[],
                mask=mask,
                positions=positions,
            )
        return Base(prefix, cache, reading)

    def _run_base_at_once(self) -> Base | None:
        """Prefix and base in one pass, which reads the weights once. Only where a prefix's cache is the first columns of the whole's:
        None where a layer keeps anything but all keys and values, or hands them to later blocks."""
        engine, start = self.engine, self.start
        whole = engine.new_cache()
        if whole is None:
            return None
        reading = engine.read(self.targets, self.layers, cache=whole, keep=[])
        if any(type(layer) is not DynamicLayer for layer in whole.layers) or any(reading.shared.values()):
            return None
        prefix = engine.new_cache()
        prefix.layers = [copy.copy(layer) for layer in whole.layers]
        for layer in prefix.layers:
            layer.keys, layer.values = layer.keys[:, :, :start], layer.values[:, :, :start]
        seats = Seats([0], 1, self.targets.device)
        cache = fork(prefix, [seats] * engine.n_layers, shared=self.shared, rows=0, room=self.suffix)
        for own, layer in zip(cache.layers, whole.layers, strict=True):
            own.update(layer.keys[:, :, start:], layer.values[:, :, start:])
        return Base(prefix, cache, replace(reading, h={layer: h[..., start:, :] for layer, h in reading.h.items()}))

    def _real(self, targets: Sequence[int], start: int, stop: int) -> tuple[Tensor | None, Tensor | None]:
        """Attention mask up to column `stop` and positions of columns [start, stop) for rows of these targets; None without padding."""
        if self.mask is None:
            return None, None
        mask = self.mask[list(targets), :stop].long()
        return mask, (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]

    def walk(self, rows: Sequence[Row], keep: Sequence[int], *, caching: bool = False) -> Walked:
        """Run `rows` from their ℓ* on. `keep`: columns of the targets whose logits are wanted.

        Under autograd gradients flow to the vectors written, and the caches that it leaves are not to be used.
        """
        if self.route == "hooks":
            return self._walk_by_hooks(rows, keep)
        with self.attending():
            return self._walk_stairs(rows, keep, caching=caching)

    def _walk_stairs(self, rows: Sequence[Row], keep: Sequence[int], *, caching: bool) -> Walked:
        base = self.prepare()
        engine, reading, start = self.engine, base.reading, self.start
        order = sorted(range(len(rows)), key=lambda r: rows[r].join(engine.n_layers))  # the first to join come first
        some = [rows[r] for r in order]
        device = self.targets.device
        targets = [row.target for row in some]
        target_of = torch.tensor(targets, device=device)
        joins = [row.join(engine.n_layers) for row in some]
        n, first = len(some), joins[0]
        present = [bisect_right(joins, layer) for layer in range(engine.n_layers + 1)]
        ratios, writes = torch.ones(n, device=device), self._writes(some)
        embedded = any(edit.site.name == "embed" for row in some for edit in row.more)

        seated: dict[int, Seats] = {}
        cache, seats = None, Seats([self.prompt_of[t] for t in targets], max(self.prompt_of) + 1, device)
        if base.prefix is not None:
            seated = {k: seats if k == n else seats.take(range(max(k, 1))) for k in set(present)}
            each = [seated[k] for k in present[:-1]]
            cache = fork(base.prefix, each, shared=self.shared, rows=n if caching else 0, room=self.suffix + self.room)

        def enter(layer: int) -> Handle:
            old = 0 if layer == first else present[layer - 1]
            newcomers = slice(old, present[layer])

            def change(x: Tensor) -> Tensor:
                if layer == 0 and embedded:  # which the base is not
                    x = x.narrow(-3, 0, present[0]).clone()
                elif layer in arrivals:
                    fresh = reading.h[layer]
                    fresh = fresh.index_select(-3, target_of[newcomers].to(fresh.device))
                    x = torch.cat([x.narrow(-3, 0, old).to(fresh.device), fresh], -3)
                else:  # rows that joined below, at another edit of theirs
                    x = x.clone()
                _write(x, writes.get(Site("resid", layer), ()), ratios)
                return x

            return engine.at_layer(layer, change)

        def share(layer: int) -> Handle:
            old = 0 if layer == first else present[layer - 1]

            fresh = _rows_of_shared(reading.shared[layer], target_of[old : present[layer]])

            def before(name: str, both: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                own = prefix_of(reading.shared[layer][name][0], seated.get(present[layer]))
                return (with_prefix(both[0], own), *both[1:])

            return engine.joining(layer, old, fresh, before)

        def inside(site: Site) -> Change:
            def change(x: Tensor) -> Tensor:
                x = x.clone()
                _write(x, writes[site], ratios)
                return x

            return change

        def forget(cache: Any, block: int) -> Handle:
            """A readout goes on from no cache: only one block's keys and values of rows live at a time."""

            def drop(_x: Tensor) -> None:
                for k, owner in enumerate(of_blocks(list(range(engine.n_layers)), len(cache.layers))):
                    if owner == block:
                        cache.layers[k] = base.prefix.layers[k]

            return on_output(engine.blocks[block], drop)

        arrivals = sorted(set(joins))
        written_at = {site.index for site in writes if site.name == "resid"}
        hooks = [engine.narrowing(b, present[b]) for b in range(first, engine.n_layers)]
        hooks += [enter(layer) for layer in sorted({*arrivals, *written_at})]
        hooks += [share(layer) for layer in arrivals if layer < engine.n_layers and reading.shared.get(layer)]
        inner = sorted(site for site in writes if site.name != "resid")
        hooks += at_sites(engine, {site: inside(site) for site in inner})
        hooks += self._more(some)
        if cache is not None and not caching:
            hooks += [forget(cache, block) for block in range(first, engine.n_layers)]
        shared = _rows_of_shared(reading.shared.get(first, {}), target_of)
        mask, positions = self._real(targets, start, self.targets.shape[1])
        with engine.bypassing(first, shared), hooked(hooks):
            logits = engine.forward(
                self.targets[target_of, start:],
                offset=start,
                cache=cache,
                keep=[k - start for k in keep],
                mask=mask,
                positions=positions,
            )
        if caching and cache is not None:
            splice(cache, base.cache, present[:-1], seats, targets)
        if order != list(range(n)):
            back = torch.tensor(order, device=device).argsort()
            logits, ratios = logits[back.to(logits.device)], ratios[back]
            if caching and cache is not None:
                cache.reorder_cache(back)
        return Walked(logits, ratios, cache if caching else None)

    def _writes(self, rows: Sequence[Row]) -> dict[Site, list[_Written]]:
        """What `rows` write at each site, ready on the device: a hook that had to bring it there would wait for the device each time."""
        groups: dict[tuple[Site, Write], list[int]] = {}
        for r, row in enumerate(rows):
            if row.value is not None:
                groups.setdefault((row.site, row.write), []).append(r)
        order = [r for some in groups.values() for r in some]
        places = [rows[r].position + self.pads[rows[r].target] - self.start for r in order]
        both = torch.tensor([order, places], dtype=torch.long, device=self.targets.device)
        found: dict[Site, list[_Written]] = {}
        at = both.split([len(some) for some in groups.values()], 1)
        for ((site, write), some), index in zip(groups.items(), at, strict=True):
            values = torch.stack([value for r in some if (value := rows[r].value) is not None], -2)
            found.setdefault(site, []).append(_Written(write, index[0], index[1], values))
        return found

    def _more(self, rows: Sequence[Row]) -> list[Handle]:
        """Hooks of the rows' further edits."""
        placed = [replace(edit, prompt=r) for r, row in enumerate(rows) for edit in row.more]
        if not placed:
            return []
        width, pads = self.targets.shape[1], [self.pads[row.target] for row in rows]
        frame = Frame(range(len(rows)), [self.start - pad for pad in pads], width - self.start, [width - pad for pad in pads])
        return Watch(self.engine, (), placed, frame, graph=False).hooks()

    def _walk_by_hooks(self, rows: Sequence[Row], keep: Sequence[int]) -> Walked:
        """Every row through every block of the whole prompt, one hook a site."""
        engine, rows = self.engine, list(rows)
        ratios, writes = torch.ones(len(rows), device=self.targets.device), self._writes(rows)

        def at(site: Site) -> Change:
            def change(x: Tensor) -> Tensor:
                x = x.clone()
                _write(x, writes[site], ratios)
                return x

            return change

        ids = self.targets[[row.target for row in rows]]
        with hooked([*at_sites(engine, {site: at(site) for site in sorted(writes)}), *self._more(rows)]):
            logits = engine.forward(ids, keep=keep)
        return Walked(logits, ratios, None)


def _write(x: Tensor, writes: Sequence[_Written], ratios: Tensor) -> None:
    """Write into x, a tensor of ours, and note the norm ratios."""
    for one in writes:
        rows, places = one.rows.to(x.device), one.places.to(x.device)
        old = x[..., rows, places, :]
        new = written(one.values.to(x), old, one.write)
        x[..., rows, places, :] = new
        ratio = new.float().norm(dim=-1) / old.float().norm(dim=-1)
        ratios[one.rows] = ratio.detach().reshape(-1, len(one.rows)).mean(0).to(ratios)  # the mean over streams, mostly one


def _rows_of_shared(shared: SharedKV, index: Tensor) -> SharedKV:
    return {name: tuple(t.index_select(0, index.to(t.device)) for t in pair) for name, pair in shared.items()}


@torch.no_grad()
def next_logits(engine: Engine, target: Int[Tensor, "1 pos"], rows: Sequence[Row], route: Route) -> Float[Tensor, "row vocab"]:
    """Logits after the last token of `target`, for every row."""
    last = target.shape[1] - 1
    return Stem(engine, target, rows, route=route, caching=False, shared=None).walk(rows, [last]).logits[:, 0]
