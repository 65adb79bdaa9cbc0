"""Superscopes: amplify what is patched, and choose the amplification without labels.

    v′ = α v        α swept over `ALPHAS`, v an MLP output, an MLP input or a state of the stream (Jacobi and Niv 2025, arXiv 2503.02078)

The paper speaks of classifier-free guidance; its code has no unconditional branch and no subtraction, and the whole method is this gain.
The form that the paper motivates is beside it: `Patchscope(guidance=w)` chooses tokens by p + w (p − u), p with the patch and u without.
The third is the principled form of the first: `write="replace_matched"`, v at the length of what it replaces. `norm_ratio` in every table
says which of them was needed.

Published success is best of five α against best of one. Here draws are counted (`best_of`): what stands in for a state gets as many.
An α is chosen for each state by a criterion that needs no labels:

    "evidence"    the most bits of evidence, the least of those over nothing, random vectors and other sources; p is multiplied by the
                  number of α among which was chosen (Bonferroni)
    "criterion"   self-similarity and entropy (Kharlapenko et al. 2024): with r the state that the patched run has at its last token
                  in layer `read`, s = cos(v, r), and H the entropy of the next token in bits,
                  (s − min s) / (max s − min s) − (H − min H) / (max H − min H), over the α of a state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import polars as pl
import torch
from torch import Tensor

from patchscopes.core.errors import InputError
from patchscopes.core.layers import Layers
from patchscopes.core.sites import Site
from patchscopes.engine.edits import Placed
from patchscopes.engine.rows import Row
from patchscopes.engine.run import run
from patchscopes.maps import Scale
from patchscopes.scopes.describe import describe
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.readings import Readings
from patchscopes.scopes.source import Source
from patchscopes.scopes.viewing import Viewing

ALPHAS = (1.0, 3.0, 6.0, 9.0, 12.0, 15.0)  # of the published application; its evaluation compares 3 to 15 with 1
CELL = ("prompt", "position", "source_layer", "target", "target_layer")  # what α and draws are searched for
BITS = ("bits_over_nothing", "bits_over_random", "bits_over_others")
AT_ONCE = 64  # runs of one pass


def superscope(
    alphas: Sequence[int | float] = ALPHAS, *, scope: Patchscope | None = None, layer: Layers | None = None
) -> Patchscope:
    """Every state at every α, through `scope` (absent: entity description, written at `layer`, 1 by default, 10 tokens, as in the
    application). InputError without α, or for a layer beside a scope, which has its own."""
    if not alphas:
        raise InputError("alphas is empty; expected at least one")
    if scope is not None and layer is not None:
        raise InputError(f"layer is {layer}, but the scope has its own, {scope.layer}; set it there, or leave the scope out")
    through = (
        replace(describe(max_new_tokens=10), layer=1 if layer is None else layer, name="superscope") if scope is None else scope
    )
    return replace(through, map=[Scale(float(alpha)) for alpha in alphas])


def chosen(readings: Readings) -> pl.DataFrame:
    """Of every state the reading with the most evidence among its maps and draws: the table's columns, with `tried` (how many there
    were), `bits` (the least of the three kinds), and `p_chosen` = min(1, tried · p_value)."""
    table = readings.readings
    if not set(BITS) <= set(table.columns) or table["bits_over_nothing"].null_count() == len(table):
        raise InputError("these readings have no evidence; call the scope with controls=True, on prompts and not on bare vectors")
    scored = table.with_columns(
        bits=pl.min_horizontal(*(pl.col(name).fill_nan(None) for name in BITS)), tried=pl.len().over(CELL)
    )
    best = scored.sort("bits", descending=True, nulls_last=True, maintain_order=True).unique(
        CELL, keep="first", maintain_order=True
    )
    return best.with_columns(p_chosen=(pl.col("p_value") * pl.col("tried")).clip(upper_bound=1.0)).sort(CELL)


def criterion(scope: Patchscope, source: Source | Sequence[Source], *, read: int = -1) -> pl.DataFrame:
    """Self-similarity and entropy of every cell, and what they say together: a row a cell with `map`, `self_similarity`, `entropy`
    (bits), `norm_ratio`, `criterion`. The α to take for a state is that of the largest. read: a layer of the target model."""
    viewing = Viewing(scope, source, controls=False)
    model, cells = viewing.target_model, viewing.cells
    layer = read if read >= 0 else model.n_layers + 1 + read
    if not 0 <= layer <= model.n_layers:
        raise InputError(f"read is {read}; expected a layer, 0 to {model.n_layers} (-1 is the last)")
    viewing.sight.need({cell.place for cell in cells})
    rows = []
    for start in range(0, len(cells), AT_ONCE):
        some = cells[start : start + AT_ONCE]
        states = [viewing.written(cell) for cell in some]
        placed = [edit for k, cell in enumerate(some) for edit in _placed(viewing.row(cell, states[k]), k)]
        prompts = [viewing.target_of(cell).tokens.tensor for cell in some]
        found = run(model.engine, prompts, [Site("resid", layer)], placed, padding_exact=model.capabilities.ok("left_padding"))
        for k, cell in enumerate(some):
            last = int(found.mask[k].nonzero()[-1, 0])
            there = found[f"resid.{layer}"][..., k, last, :].float().flatten()
            own = states[k][0, -1].float().flatten()
            log_p = found.logits[k, last].float().log_softmax(-1)
            entropy = -float((log_p.exp() * log_p).nan_to_num(0.0).sum()) / float(torch.log(torch.tensor(2.0)))
            similar = float(torch.nn.functional.cosine_similarity(own, there.to(own), dim=0))
            rows.append({**viewing.coordinates(cell), "self_similarity": similar, "entropy": entropy})
    table = pl.DataFrame(rows)
    return table.with_columns(criterion=(_spanned("self_similarity") - _spanned("entropy")))


def best_of(readings: Readings, score: Callable[[str], float]) -> pl.DataFrame:
    """The best score of a text among all maps and draws of a state, beside the best of each kind of control **over as many**.

    One row a state: `draws`, `mean` (of one draw, the per-draw rate if scores are 0 and 1), `best`, and `best_nothing`, `best_random`,
    `best_other`, `best_mean`, `best_text`. Where a control says the same in every draw its best is of one: that is all there is of it.
    """
    table = readings.table.with_columns(score=pl.col("text").map_elements(score, return_dtype=pl.Float64))
    own = table.filter(pl.col("control") == "none").group_by(CELL, maintain_order=True)
    found = own.agg(draws=pl.len(), mean=pl.col("score").mean(), best=pl.col("score").max())
    for kind in table["control"].unique(maintain_order=True):
        if kind != "none":
            null = table.filter(pl.col("control") == kind).group_by(CELL).agg(pl.col("score").max().alias(f"best_{kind}"))
            found = found.join(null, on=CELL, how="left")
    return found


def _spanned(name: str) -> pl.Expr:
    """0 to 1 over the maps of a state; 0 where all are the same."""
    low, high = pl.col(name).min().over(CELL), pl.col(name).max().over(CELL)
    return pl.when(high > low).then((pl.col(name) - low) / (high - low)).otherwise(0.0)


def _placed(row: Row, prompt: int) -> list[Placed]:
    """What a row writes, as edits of one prompt of a batch."""
    value: Tensor | None = row.value
    own = [] if value is None else [Placed(row.site, prompt, (row.position,), value, row.write)]
    return [*own, *(replace(edit, prompt=prompt) for edit in row.more)]
