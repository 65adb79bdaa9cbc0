"""Patched runs that compute only what the patch changes.

Rows share one target prompt T up to the first patched position. Each row has a layer ℓ*, a position i* and a vector.

    prefix   T before the first i*: one pass, one row, a cache
    base     the rest of T, unpatched: h[ℓ] of its positions for every ℓ, and the keys and values of all blocks
    walk     one pass up the blocks: a row joins at its ℓ* with base's h[ℓ*], in which its vector is written; blocks below the
             lowest ℓ* are bypassed; a block sees as many rows as have joined
    splice   keys and values of the blocks below a row's ℓ* are base's; now every row owns all blocks, and can go on

An edit is made once, in the prompt pass; later tokens see it through the cache, which equals patching the same absolute position
again at every step. Routes: "stairs" as above; "whole" without a prefix, for models that cannot continue a prompt exactly;
"hooks", the full pass for every row, for models that can do neither (and the oracle of the tests).

For teacher-forced scoring the rows may continue T by different texts: `targets` then has one row a text, padded on the right,
where causal models do not look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.core.edits import Write, written
from patchscopes.core.sites import Site
from patchscopes.engine.caches import fork, splice
from patchscopes.engine.engine import Engine, Reading, SharedKV
from patchscopes.engine.hooks import Handle, hooked

Route = Literal["stairs", "whole", "hooks"]
ROUTES: tuple[Route, ...] = ("stairs", "whole", "hooks")


@dataclass(frozen=True, eq=False)
class Row:
    """One patched run: `value` [d_model] is written at `site` and `position` of target number `target`.

    value None: nothing is written, and `position` is the first whose logits are wanted.
    """

    site: Site
    position: int
    value: Tensor | None
    write: Write = "replace"
    target: int = 0


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


class Stem:
    """What all rows of one target prompt share: the prefix and the unpatched base run. Serves any number of walks."""

    def __init__(
        self,
        engine: Engine,
        targets: Int[Tensor, "target pos"],
        rows: Sequence[Row],
        *,
        route: Route = "stairs",
        caching: bool = True,
    ):
        self.engine, self.targets, self.route = engine, targets, route
        self.start = min(row.position for row in rows)
        if len(targets) > 1:  # texts differ from somewhere on; the prefix must not reach that far
            self.start = min(self.start, _common_prefix(targets))
        self.start = engine.start(targets, self.start) if route == "stairs" else 0
        self.prefix = engine.new_cache() if self.start or caching else None
        self.base_cache: Any = None
        self.base: Reading | None = None
        self.layers = sorted({self.join(row) for row in rows})

    @torch.no_grad()
    def prepare(self) -> None:
        """Run the prefix and the base, once. Of the base's logits nothing is wanted, so only one position is unembedded."""
        engine = self.engine
        if self.route == "hooks" or self.base is not None:
            return
        if self.start:
            engine.forward(self.targets[:1, : self.start], cache=self.prefix, keep=[self.start - 1])
        if self.prefix is not None:
            everyone = torch.zeros(len(self.targets), dtype=torch.long, device=self.targets.device)
            self.base_cache = fork(self.prefix, [everyone] * engine.n_layers)
        suffix = self.targets[:, self.start :]
        self.base = engine.read(suffix, self.layers, offset=self.start, cache=self.base_cache, keep=[suffix.shape[1] - 1])

    def join(self, row: Row) -> int:
        """The layer at which a row leaves the base run."""
        return row.site.index if row.value is not None else self.engine.n_layers

    @torch.no_grad()
    def walk(self, rows: Sequence[Row], keep: Sequence[int], *, caching: bool = False) -> Walked:
        """Run `rows` from their ℓ* on. `keep`: positions of the targets whose logits are wanted."""
        if self.route == "hooks":
            return self._walk_by_hooks(rows, keep)
        self.prepare()
        engine, base, start = self.engine, self.base, self.start
        assert base is not None
        order = sorted(range(len(rows)), key=lambda r: self.join(rows[r]))  # the first to join come first
        some = [rows[r] for r in order]
        device = self.targets.device
        target_of = torch.tensor([row.target for row in some], device=device)
        joins = [self.join(row) for row in some]
        n, first = len(some), joins[0]
        present = [sum(join <= layer for join in joins) for layer in range(engine.n_layers + 1)]
        ratios = torch.ones(n, device=device)

        cache = None
        if self.prefix is not None:
            alone = torch.zeros(n, dtype=torch.long, device=device)
            cache = fork(self.prefix, [alone[: max(k, 1)] for k in present[:-1]])

        def enter(layer: int) -> Handle:
            old = 0 if layer == first else present[layer - 1]
            newcomers = slice(old, present[layer])

            def change(x: Tensor) -> Tensor:
                fresh = base.h[layer]
                fresh = fresh.index_select(-3, target_of[newcomers].to(fresh.device))
                x = torch.cat([x.narrow(-3, 0, old).to(fresh.device), fresh], -3)
                self._write(x, some, newcomers, "resid", ratios)
                return x

            return engine.at_layer(layer, change)

        def share(layer: int) -> Handle:
            old = 0 if layer == first else present[layer - 1]

            return engine.joining(layer, old, _rows_of_shared(base.shared[layer], target_of[old : present[layer]]))

        def inside(site: Site) -> Handle:
            def change(x: Tensor) -> Tensor:
                x = x.clone()
                self._write(x, some, slice(0, n), site.name, ratios, block=site.index)
                return x

            return engine.at_site(site, change)

        arrivals = sorted(set(joins))
        hooks = [engine.narrowing(b, present[b]) for b in range(first, engine.n_layers)]
        hooks += [enter(layer) for layer in arrivals]
        hooks += [share(layer) for layer in arrivals if layer < engine.n_layers and base.shared.get(layer)]
        hooks += [
            inside(site) for site in sorted({row.site for row in some if row.value is not None and row.site.name != "resid"})
        ]
        shared = _rows_of_shared(base.shared.get(first, {}), target_of[: present[first]])
        ids = self.targets[target_of, start:]
        with engine.bypassing(first, shared), hooked(hooks):
            logits = engine.forward(ids, offset=start, cache=cache, keep=[k - start for k in keep])
        if caching and cache is not None:
            splice(cache, self.base_cache, present[:-1], target_of)
        back = torch.tensor(order, device=device).argsort()
        if caching and cache is not None:
            cache.reorder_cache(back)
        return Walked(logits[back.to(logits.device)], ratios[back], cache if caching else None)

    def _write(self, x: Tensor, rows: list[Row], which: slice, name: str, ratios: Tensor, block: int | None = None) -> None:
        """Write the vectors of rows `which` with a site called `name` (in `block`) into x, a tensor of ours."""
        mine = [
            r
            for r in range(*which.indices(len(rows)))
            if rows[r].value is not None and rows[r].site.name == name and (block is None or rows[r].site.index == block)
        ]
        for write in {rows[r].write for r in mine}:
            some = [r for r in mine if rows[r].write == write]
            index = torch.tensor(some, device=x.device)
            place = torch.tensor([rows[r].position - self.start for r in some], device=x.device)
            old = x[..., index, place, :]
            new = written(torch.stack([rows[r].value for r in some], -2).to(x), old, write)  # type: ignore[arg-type]
            x[..., index, place, :] = new
            ratio = new.float().norm(dim=-1) / old.float().norm(dim=-1)
            ratios[index.to(ratios.device)] = ratio.reshape(-1, len(some)).mean(0).to(ratios)  # the mean over streams, mostly one

    @torch.no_grad()
    def _walk_by_hooks(self, rows: Sequence[Row], keep: Sequence[int]) -> Walked:
        """Every row through every block of the whole prompt, one hook a site."""
        engine, rows = self.engine, list(rows)
        ratios = torch.ones(len(rows), device=self.targets.device)

        def at(site: Site) -> Handle:
            mine = [row if row.site == site else Row(row.site, row.position, None) for row in rows]

            def change(x: Tensor) -> Tensor:
                x = x.clone()
                self._write(x, mine, slice(0, len(rows)), site.name, ratios)
                return x

            return engine.at_site(site, change)

        ids = self.targets[[row.target for row in rows]]
        with hooked(at(site) for site in sorted({row.site for row in rows if row.value is not None})):
            logits = engine.forward(ids, keep=keep)
        return Walked(logits, ratios, None)


def _rows_of_shared(shared: SharedKV, index: Tensor) -> SharedKV:
    return {name: tuple(t.index_select(0, index.to(t.device)) for t in pair) for name, pair in shared.items()}


def _common_prefix(targets: Int[Tensor, "target pos"]) -> int:
    same = (targets == targets[:1]).all(0).long()
    return max(0, min(int(same.cumprod(0).sum()), targets.shape[1] - 1))


def next_logits(engine: Engine, target: Int[Tensor, "1 pos"], rows: Sequence[Row], route: Route) -> Float[Tensor, "row vocab"]:
    """Logits after the last token of `target`, for every row."""
    last = target.shape[1] - 1
    return Stem(engine, target, rows, route=route, caching=False).walk(rows, [last]).logits[:, 0]
