"""What a whole run says, layer by layer: how many readings are above their controls, and whether chance alone would give as many.

A reading whose text tells nothing of its source is `above` with probability 0.05 at most (see docs/evidence.md). The readings of one
prompt hang together, so a prompt counts once, with the share of its readings that are above: if s is the sum of these shares over n
prompts, chance is P(X ≥ ⌊s⌋) of X ~ Binomial(n, 0.05), which is the worst that any dependence within prompts can do. A layer may be
interpreted if that, times the number of layers that were looked at in the run (Bonferroni), is at most 0.05.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from patchscopes.controls.evidence import SIGNIFICANT

if TYPE_CHECKING:
    from patchscopes.runs.folder import Run

LOOK = ("part", "model", "scope")
PLACE = ("prompt", "position", "source_layer", "target", "target_layer", "map", "draw")  # what tells the readings of a view apart


def planned_rows(run: Run, *, controls: bool = False) -> pl.DataFrame:
    """Every planned reading (or every planned control), with what became of it: `status` is "waiting" where nothing is finished yet.
    `look` is the number of its view, a part, model and scope."""
    from patchscopes.runs.schema import RESULTS

    kind = pl.col("control") != "none" if controls else pl.col("control") == "none"
    found = run.scan().filter(kind).select("cell", *RESULTS).collect()
    looks = pl.DataFrame([{name: look[name] for name in LOOK} for look in run.record["looks"]]).with_row_index("look")
    plan = run.plan.filter(kind).select("cell", *LOOK, *PLACE, "token", "control")
    rows = plan.join(looks, on=LOOK, how="left", maintain_order="left").join(found, on="cell", how="left", maintain_order="left")
    return rows.drop("cell").with_columns(pl.col("status").fill_null("waiting")).sort("look", *PLACE, maintain_order=True)


def by_layer(readings: pl.DataFrame) -> pl.DataFrame:
    """A row for every part, model, scope and source layer of `planned_rows(run)`.

    readings, ok, failed, skipped, waiting    how many are planned, and what became of them
    above, same, not_run   of those that are ok, by their verdict
    prompts, share         prompts with a verdict, and the mean over them of the share of their readings that are above
    chance                 how likely at least as many are where no text tells of its source; null without verdicts
    interpret              "yes"; "no"; "too few prompts", if even with all of them above chance could not be excluded; "not run", if
                           there are readings without verdicts only; "no readings"
    """
    judged = (pl.col("status") == "ok") & pl.col("verdict").is_in(["above", "same"])
    above = judged & (pl.col("verdict") == "above")
    keys = ["look", *LOOK, "source_layer"]
    counts = readings.group_by(keys).agg(
        pl.len().alias("readings"),
        *((pl.col("status") == status).sum().alias(status) for status in ("ok", "failed", "skipped", "waiting")),
        above.sum().alias("above"),
        (judged & ~above).sum().alias("same"),
        ((pl.col("status") == "ok") & ~judged).sum().alias("not_run"),
    )
    a_prompt = readings.filter(judged).group_by([*keys, "prompt"]).agg((pl.col("verdict") == "above").mean().alias("share"))
    shares = a_prompt.group_by(keys).agg(
        pl.len().alias("prompts"), pl.col("share").mean(), pl.col("share").sum().alias("sum").round(9).floor()
    )
    table = counts.join(shares, on=keys, how="left").with_columns(pl.col("prompts").fill_null(0)).sort(keys)
    tests = max(table.filter(pl.col("prompts") > 0).height, 1)
    chance = [
        binomial_tail(int(row["sum"]), row["prompts"], SIGNIFICANT) if row["prompts"] else None
        for row in table.iter_rows(named=True)
    ]
    words = [_word(p, n, tests) if ok else "no readings" for p, n, ok in zip(chance, table["prompts"], table["ok"], strict=True)]
    return table.drop("sum", "look").with_columns(
        pl.Series("chance", chance, pl.Float64), pl.Series("interpret", words, pl.String)
    )


def _word(chance: float | None, prompts: int, tests: int) -> str:
    if chance is None:
        return "not run"
    if chance * tests <= SIGNIFICANT:
        return "yes"
    return "too few prompts" if SIGNIFICANT**prompts * tests > SIGNIFICANT else "no"


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X ≥ k) of X ~ Binomial(n, p)."""
    if k <= 0:
        return 1.0
    total = 0.0
    for i in range(k, n + 1):
        choose = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        term = math.exp(choose + i * math.log(p) + (n - i) * math.log1p(-p))
        total += term
        if i > n * p and term < 1e-12 * total:
            break
    return min(total, 1.0)


@dataclass(frozen=True, eq=False)
class InShort:
    """What a view (a part, model and scope) comes to. judged: readings with a verdict, of which `above` are above; layers: by what is to
    be made of them, "yes" being those that may be interpreted; table: the rows of `by_layer`."""

    name: str
    judged: int
    above: int
    layers: dict[str, list[int]]
    table: pl.DataFrame


def in_short(layers: pl.DataFrame) -> list[InShort]:
    """The views of `by_layer(…)`, each named by what tells it from the others."""
    found = []
    for look, own in layers.group_by(LOOK, maintain_order=True):
        kept = [str(value) for name, value in zip(LOOK, look, strict=True) if layers[name].n_unique() > 1]
        above, same = (sum(own[name].to_list()) for name in ("above", "same"))
        grouped = own.group_by("interpret", maintain_order=True).agg("source_layer")
        found.append(InShort(" · ".join(kept) or str(look[-1]), above + same, above, dict(grouped.iter_rows()), own))
    return found


def spans(layers: list[int]) -> str:
    """[0, 1, 2, 5] as "0–2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
