"""The figures of attribute extraction: pure functions of the tables of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import scoring, statistics
from patchscopes.evaluate.data import Item
from patchscopes.evaluate.frame import Bars, Heat, Line, Lines, Result, Table
from patchscopes.evaluate.placeholder import spread_table
from patchscopes.evaluate.statistics import Estimate

if TYPE_CHECKING:
    from patchscopes.evaluate.probing import Probed
    from patchscopes.runs import Run

CONTROLS = ("nothing", "random", "other", "mean", "text")


@dataclass(frozen=True)
class Hits:
    """names and paper: [item, cell], whole words in any case, and the paper's test; crossed: what was read out of another entity of the
    relation, held against the item's own answer, by whole words, NaN where there is no such entity."""

    items: tuple[Item, ...]
    cells: tuple[tuple[int, int], ...]
    names: np.ndarray
    paper: np.ndarray
    crossed: np.ndarray

    @property
    def relations(self) -> list[str]:
        """Of every item."""
        return [item.relation for item in self.items]

    @property
    def clusters(self) -> list[str]:
        """Of every item."""
        return [item.cluster for item in self.items]


@dataclass(frozen=True)
class Shared:
    """One cell for all relations: (ℓ, ℓ*), its column, items that chose it and those that score it."""

    cell: tuple[int, int]
    column: int
    chose: tuple[int, ...]
    scores: tuple[int, ...]


def questions(items: Sequence[Item]) -> list[str]:
    """The target prompt with each subject in it."""
    return list(dict.fromkeys(question(item) for item in items))


def question(item: Item) -> str:
    """The same of one item."""
    return item.target.replace("{x}", item.subject)


def answers(run: Run, parts: Sequence[tuple[str, str, Sequence[Item]]]) -> dict[str, str]:
    """What a model said to each question in words. parts: (name, target prompt, items) of the run (see `attribute.asking`)."""
    rows = run.table(control="none", status="ok").select("part", "target", "text")
    said = {(part, k): text for part, k, text in rows.iter_rows()}
    texts: dict[str, str] = {}  # what two parts ask was asked once
    for name, _, some in parts:
        texts |= {one: said[name, k] for k, one in enumerate(questions(some)) if (name, k) in said}
    return texts


def knows(run: Run, parts: Sequence[tuple[str, str, Sequence[Item]]]) -> set[Item]:
    """The items whose object the model says when asked in words, by the paper's test."""
    texts = answers(run, parts)
    return {item for *_, some in parts for item in some if says(texts.get(question(item), ""), item)}


def grid_hits(run: Run, items: Sequence[Item], *, seed: int) -> Hits:
    """Of every item and cell. What failed is a miss."""
    rows = run.table(control="none").select("scope", "prompt_text", "at", "source_layer", "target_layer", "text")
    said: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    for target, prompt, at, layer, other, text in rows.iter_rows():
        said.setdefault((target, prompt, at), {})[layer, other] = text or ""
    cells = tuple(sorted({cell for texts in said.values() for cell in texts}))
    kept = tuple(item for item in items if item.key in said)
    if len(kept) < len(items):  # skipped, with a caveat of the run
        items = kept
    found = np.array([[said[i.key].get(cell, "") for cell in cells] for i in kept], object)
    names = _scored(found, kept, _names)
    paper = _scored(found, kept, says)
    partner = statistics.strangers([i.relation for i in kept], [i.answers[0] for i in kept], [i.cluster for i in kept], seed)
    crossed = np.full(names.shape, np.nan)
    for k, other in enumerate(partner):
        if other is not None:
            crossed[k] = [_names(text, kept[k]) for text in found[other]]
    return Hits(kept, cells, names, paper, crossed)


def _scored(texts: np.ndarray, items: Sequence[Item], test: Any) -> np.ndarray:
    return np.array([[test(text, item) for text in row] for row, item in zip(texts, items, strict=True)], bool)


def _names(text: str, item: Item) -> bool:
    return scoring.names(text, item.answers)


def says(text: str, item: Item) -> bool:
    """Whether a text gives the item's answer, by the paper's test."""
    return any(scoring.contains(text, answer) for answer in item.answers)


def shared_cell(hits: Hits, *, seed: int = 0) -> Shared:
    """Chosen on one half of the entities. InputError if there are too few to split."""
    found = statistics.held_out(hits.names, hits.clusters, hits.relations, seed=seed)
    if found is None:
        raise InputError(f"{len(set(hits.clusters))} entities cannot be split into two halves; give more items (--n)")
    return Shared(hits.cells[found.cell], found.cell, tuple(map(int, found.chose)), tuple(map(int, found.scores)))


@dataclass(frozen=True)
class Scored:
    """Everything that is shown."""

    hits: Hits
    shared: Shared
    figures: dict[str, Estimate]
    by_relation: dict[str, dict[str, Estimate | float | int | None]]
    probes: Probed | None
    plain: Hits | None = None


def scored(
    hits: Hits, shared: Shared, control: Run, probes: Probed | None, plain: Hits | None = None, *, seed: int = 0
) -> Scored:
    """All figures. Rates are means over relations, with intervals over entities. plain: the same items with nothing written below ℓ*,
    at a cell that was chosen for it on the same half."""
    groups, clusters = hits.relations, hits.clusters

    def mean(values: np.ndarray, rows: Sequence[int] | None = None) -> Estimate:
        chosen = [k for k in (range(len(values)) if rows is None else rows) if not np.isnan(values[k])]
        return statistics.mean_of_rates(
            [float(values[k]) for k in chosen], [groups[k] for k in chosen], [clusters[k] for k in chosen], seed=seed
        )

    names, crossed = hits.names.astype(float), hits.crossed
    there = ~np.isnan(crossed[:, 0])
    null = np.where(there, np.nan_to_num(crossed).max(axis=1), np.nan)
    figures = {
        "held_out_cell": mean(names[:, shared.column], shared.scores),
        "held_out_cell_paper_test": mean(hits.paper[:, shared.column].astype(float), shared.scores),
        "other_entity": mean(crossed[:, shared.column], shared.scores),
        **_control_rates(control, hits, shared, mean),
        "per_draw": mean(statistics.per_draw(hits.names)),
        "per_draw_other_entity": mean(np.where(there, np.nan_to_num(crossed).mean(axis=1), np.nan)),
        "any_of_all": mean(statistics.any_of(hits.names).astype(float)),
        "any_of_all_other_entity": mean(null),
        "paper": mean(_any_target(hits.paper, hits.cells).mean(axis=1)),
    }
    if plain is not None:
        if plain.items != hits.items:
            raise InputError(
                f"{len(hits.items)} items were read with the state at every layer up to ℓ* and {len(plain.items)} with it at ℓ* alone; "
                "expected the same ones"
            )
        other, away = plain.names[:, shared_cell(plain, seed=seed).column].astype(float), list(shared.scores)
        figures["spread_here"] = mean(other, away)
        figures["over_spread_here"] = statistics.difference(
            names[away, shared.column], other[away], [clusters[k] for k in away], [groups[k] for k in away], seed=seed
        )
        figures["per_draw_spread_here"] = mean(statistics.per_draw(plain.names))
        figures["per_draw_over_spread_here"] = statistics.difference(
            statistics.per_draw(hits.names), statistics.per_draw(plain.names), clusters, groups, seed=seed
        )
    if probes is not None:
        figures |= _probe_rates(probes, seed)
    by_relation = {name: _relation(hits, shared, probes, name, seed) for name in dict.fromkeys(groups)}
    return Scored(hits, shared, figures, by_relation, probes, plain)


def _probe_rates(probes: Probed, seed: int) -> dict[str, Estimate]:
    groups, clusters = [i.relation for i in probes.items], [i.cluster for i in probes.items]
    found = {"probe": statistics.mean_of_rates(probes.hits.mean(axis=1), groups, clusters, seed=seed)}
    best = statistics.held_out(probes.hits, clusters, groups, seed=seed)
    if best is not None:
        rows = best.scores.tolist()
        own, whose = [groups[k] for k in rows], [clusters[k] for k in rows]
        found["probe_held_out_layer"] = statistics.mean_of_rates(probes.hits[rows, best.cell], own, whose, seed=seed)
    return found


def _control_rates(control: Run, hits: Hits, shared: Shared, mean: Any) -> dict[str, Estimate]:
    """Of the run at the chosen cell: by whole words, against the item's own answer."""
    rows = control.table(status="ok").select("scope", "prompt_text", "at", "control", "text", "verdict")
    said: dict[str, dict[tuple[str, str, str], str]] = {}
    above: dict[tuple[str, str, str], bool] = {}
    for target, prompt, at, kind, text, verdict in rows.iter_rows():
        said.setdefault(kind, {})[target, prompt, at] = text
        if kind == "none":
            above[target, prompt, at] = verdict == "above"
    found = {}
    for kind in CONTROLS:
        texts = said.get(kind, {})
        values = np.array([float(_names(texts[i.key], i)) if i.key in texts else np.nan for i in hits.items])
        name = {"nothing": "question_alone", "random": "random_vector", "other": "any_other_source", "mean": "mean_vector"}
        found[name.get(kind, "text_itself")] = mean(values, shared.scores)
    found["above_controls"] = mean(np.array([float(above.get(i.key, np.nan)) for i in hits.items]), shared.scores)
    return found


def _any_target(hits: np.ndarray, cells: Sequence[tuple[int, int]]) -> np.ndarray:
    """[item, ℓ]: whether some ℓ* hits."""
    layers = sorted({layer for layer, _ in cells})
    return np.stack([hits[:, [k for k, (a, _) in enumerate(cells) if a == layer]].any(axis=1) for layer in layers], axis=1)


def _relation(hits: Hits, shared: Shared, probes: Probed | None, name: str, seed: int) -> dict[str, Any]:
    rows = [k for k, item in enumerate(hits.items) if item.relation == name]
    clusters = [hits.clusters[k] for k in rows]
    away = [k for k in rows if k in set(shared.scores)]
    own = statistics.held_out(hits.names[rows], clusters, seed=seed)
    paper = _any_target(hits.paper[rows], hits.cells).mean(axis=0)
    crossed = hits.crossed[rows]
    null = crossed[~np.isnan(crossed[:, 0])]
    found: dict[str, Any] = {
        "items": len(rows),
        "entities": len(set(clusters)),
        "objects": len({hits.items[k].answers[0] for k in rows}),
        "paper": float(paper.mean()),
        "paper_std": float(paper.std()),
        "held_out_cell": statistics.rate(hits.names[away, shared.column], [hits.clusters[k] for k in away], seed=seed),
        "own_cell": None
        if own is None
        else statistics.rate(hits.names[[rows[k] for k in own.scores], own.cell], [clusters[k] for k in own.scores], seed=seed),
        "per_draw": float(hits.names[rows].mean()),
        "any_of_all": float(statistics.any_of(hits.names[rows]).mean()),
        "any_of_all_other_entity": float(statistics.any_of(null > 0).mean()) if len(null) else None,
        "probe": None,
        "probe_std": None,
        "probe_items": None,
    }
    if probes is not None and name not in probes.left_out:
        probed = [k for k, item in enumerate(probes.items) if item.relation == name]
        by_layer = probes.hits[probed].mean(axis=0)
        found |= {"probe": float(by_layer.mean()), "probe_std": float(by_layer.std()), "probe_items": len(probed)}
    return found


# ---------------------------------------------------------------------------------------------------------------------------- result


def result(title: str, paper: str, found: Scored, **more: Any) -> Result:
    """As the frame has it."""
    figures, (layer, other) = found.figures, found.shared.cell
    n_cells, n_relations = len(found.hits.cells), len(found.by_relation)
    held = figures["held_out_cell"]
    claims = [
        f"At one cell (source layer {layer} into target layer {other}), chosen on other entities, {held} of the known facts are read "
        f"out of the entity's state, mean over {n_relations} relations.",
        f"The same cell says the fact's object for a random vector in {figures['random_vector']}, for another entity of the relation in "
        f"{figures['other_entity']}, for nothing patched in {figures['question_alone']}.",
        f"Some one of all {n_cells} cells says it for {figures['any_of_all']}; but some one does so for another entity's object in "
        f"{figures['any_of_all_other_entity']}: the best of {n_cells} is no accuracy.",
    ]
    if "over_spread_here" in figures:
        claims.append(
            f"Written at every layer up to ℓ*, the state gives {held}; written at ℓ* alone, at a cell of its own, "
            f"{figures['spread_here']}; the difference, item by item, is {figures['over_spread_here']}. Over all cells alike it is "
            f"{figures['per_draw_over_spread_here']}: {figures['per_draw']} against {figures['per_draw_spread_here']}."
        )
    if "probe_held_out_layer" in figures:
        claims.append(
            "A linear probe at its best layer, chosen on other entities, its folds holding subjects together, is right in "
            f"{figures['probe_held_out_layer']}. It learned from two thirds of about {_typical(found)} items of each relation, the "
            "Patchscope from none."
        )
    headline = {
        "held-out cell": held,
        "  the paper's substring test": figures["held_out_cell_paper_test"],
        "  random vector": figures["random_vector"],
        "  other entity": figures["other_entity"],
        "  question alone": figures["question_alone"],
        "  the text itself": figures["text_itself"],
        "per draw": figures["per_draw"],
        f"any of {n_cells} cells": figures["any_of_all"],
        f"any of {n_cells}, other entity": figures["any_of_all_other_entity"],
        "the paper's: any target layer, mean over layers": figures["paper"],
    }
    if "over_spread_here" in figures:
        headline |= {
            "written at ℓ* alone": figures["spread_here"],
            "  difference": figures["over_spread_here"],
            "  difference per draw": figures["per_draw_over_spread_here"],
        }
    headline |= {"probe, held-out layer": figures["probe_held_out_layer"]} if "probe_held_out_layer" in figures else {}
    caveats = list(more.pop("caveats", ()))
    if found.probes is not None and found.probes.left_out:
        caveats.append(f"No probe, for want of entities or answers: {', '.join(found.probes.left_out)}; they count as 0.")
    return Result(
        "attribute",
        title,
        paper,
        tuple(claims),
        headline,
        {
            **figures,
            "cell": {
                "layer": layer,
                "target_layer": other,
                "chosen_on": len(found.shared.chose),
                "scored_on": len(found.shared.scores),
            },
            "cells": n_cells,
            "by_relation": found.by_relation,
        },
        tables=(_table(found), _cells_table(found), *_spread_tables(found)),
        figures=_figures(found),
        caveats=tuple(dict.fromkeys(caveats)),
        **more,
    )


def _typical(found: Scored) -> int:
    counts = [row["probe_items"] for row in found.by_relation.values() if row["probe_items"] is not None]
    return int(np.median(np.array(counts, int))) if counts else 0


def _table(found: Scored) -> Table:
    columns = {
        "items": "items",
        "entities": "entities",
        "objects": "objects",
        "held_out_cell": "held-out cell",
        "own_cell": "own held-out cell",
        "per_draw": "per draw",
        "any_of_all": "any cell",
        "any_of_all_other_entity": "any cell, other entity",
        "paper": "paper's",
        "paper_std": "± over layers",
        "probe": "probe",
        "probe_std": "± over layers ",
        "probe_items": "items of the probe",
    }
    rows = tuple((name, *(row[key] for key in columns)) for name, row in found.by_relation.items())
    shares = tuple(label for key, label in columns.items() if "items" not in key and key not in ("entities", "objects"))
    caption = (
        "By relation. Held-out cell: one cell for all relations; own: chosen for each. Both on entities that did not choose it"
    )
    return Table("by-relation", caption, ("relation", *columns.values()), rows, shares)


def _cells_table(found: Scored) -> Table:
    hits = found.hits
    means = _cell_means(hits)
    rows = tuple((layer, other, float(mean)) for (layer, other), mean in zip(hits.cells, means, strict=True))
    return Table("cells", "Every cell: mean over relations of the share read out", ("ℓ", "ℓ*", "read out"), rows, ("read out",))


def _spread_tables(found: Scored) -> list[Table]:
    """By target layer: the mean over source layers of what was read out with and without the layers below."""
    if found.plain is None:
        return []
    hits, cells = found.hits, found.hits.cells
    others = sorted({other for _, other in cells})
    columns = [[k for k, (_, b) in enumerate(cells) if b == other] for other in others]
    below, here = (np.stack([one.names[:, some].mean(axis=1) for some in columns], 1) for one in (hits, found.plain))
    return [spread_table(others, below, here, hits.clusters, hits.relations)]


def _cell_means(hits: Hits) -> np.ndarray:
    groups = np.array(hits.relations)
    return np.mean([hits.names[groups == name].mean(axis=0) for name in dict.fromkeys(hits.relations)], axis=0)


def _figures(found: Scored) -> tuple[Lines | Bars | Heat, ...]:
    hits, probes = found.hits, found.probes
    layers, others = sorted({a for a, _ in hits.cells}), sorted({b for _, b in hits.cells})
    mean = dict(zip(hits.cells, _cell_means(hits), strict=True))
    heat = Heat(
        "cells",
        "Share of facts read out, mean over relations; framed: the cell chosen on one half of the entities",
        "source layer ℓ",
        "target layer ℓ*",
        tuple(map(str, layers)),
        tuple(map(str, others)),
        tuple(tuple(float(mean[a, b]) for b in others) for a in layers),
        "share",
        (layers.index(found.shared.cell[0]), others.index(found.shared.cell[1])),
    )
    lines = [_by_layer(hits, hits.paper, "Patchscope: some target layer", layers)]
    crossed = np.nan_to_num(hits.crossed) > 0
    lines.append(_by_layer(hits, crossed, "the same, other entity", layers, dashed=True))
    if probes is not None:
        groups, clusters = [i.relation for i in probes.items], [i.cluster for i in probes.items]
        some = [statistics.mean_of_rates(probes.hits[:, k], groups, clusters) for k in range(len(probes.layers))]
        lines.append(_line("linear probe, grouped folds", probes.layers, some))
    curve = Lines(
        "by-layer",
        "Attribute extraction by source layer, 95 % intervals over entities",
        "source layer ℓ",
        "share",
        tuple(lines),
        (0, 1.03),
    )
    rows = found.by_relation
    bars = Bars(
        "by-relation",
        "Held-out cell by relation, 95 % intervals over entities",
        "share read out",
        tuple(rows),
        (("held-out cell", tuple(row["held_out_cell"] for row in rows.values())),),  # type: ignore[arg-type]  # estimates
    )
    return heat, curve, bars


def _by_layer(hits: Hits, values: np.ndarray, name: str, layers: Sequence[int], *, dashed: bool = False) -> Line:
    by_layer = _any_target(values, hits.cells)
    some = [statistics.mean_of_rates(by_layer[:, k], hits.relations, hits.clusters) for k in range(len(layers))]
    return _line(name, layers, some, dashed=dashed)


def _line(name: str, x: Sequence[int], some: Sequence[Estimate], *, dashed: bool = False) -> Line:
    y, low, high = (tuple(getattr(one, key) for one in some) for key in ("value", "low", "high"))
    return Line(name, tuple(map(float, x)), y, low, high, dashed)
