"""Tables and figures of the study of evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchscopes.controls.evidence import SIGNIFICANT
from patchscopes.evaluate.evidence_scores import (
    AGREEMENT,
    EXPLAINED,
    LOG_P,
    RIVALS,
    SCORES,
    Attributed,
    Classified,
    Confidence,
    Null,
    Weighed,
    falsehoods,
)
from patchscopes.evaluate.frame import Bars, Figure, Line, Lines, Table
from patchscopes.evaluate.ranking import selective
from patchscopes.evaluate.statistics import Estimate

POINTS = 60  # of a curve
COVERAGES = (0.25, 0.5, 0.75)
DRAWN = (EXPLAINED, "bits over others", LOG_P, AGREEMENT)  # in figures


@dataclass(frozen=True)
class Bench:
    """The estimator, as of one pair (name): see `of_looks`, `of_number` and `of_kind`."""

    name: str
    looks: Sequence[dict[str, Any]] = ()
    numbers: Sequence[dict[str, Any]] = ()
    kinds: Sequence[dict[str, Any]] = ()


def tables(
    readings: Sequence[Weighed],
    found: Mapping[str, Classified],
    given: Sequence[Confidence],
    whose: Mapping[str, Attributed],
    nulls: Sequence[Null],
    bench: Bench,
) -> tuple[Table, ...]:
    """All that have rows."""
    some = [_auroc_table(found), _difference_table(found), _false_table(readings), _above_table(found)]
    some += [_confidence_table(given), _coverage_table(readings), _attribution_table(whose), _null_table(nulls, bench)]
    some += [_looks_table(bench), _number_table(bench), _kind_table(bench)]
    return tuple(table for table in some if table.rows)


def _auroc_table(found: Mapping[str, Classified]) -> Table:
    rows = [
        (name, one.n, one.true, score, value.value, value.low, value.high)
        for name, one in found.items()
        for score, value in one.auroc.items()
    ]
    columns = ("pair", "readings", "true", "score", "AUROC", "from", "to")
    return Table("auroc", "True against false readings by each score, of the same readings", columns, tuple(rows), ("true",))


def _difference_table(found: Mapping[str, Classified]) -> Table:
    rows = [(name, rival, value.value, value.low, value.high) for name, one in found.items() for rival, value in one.over.items()]
    caption = f"AUROC of {EXPLAINED} less that of its rivals"
    return Table("auroc-differences", caption, ("pair", "rival", "difference", "from", "to"), tuple(rows))


def _false_table(readings: Sequence[Weighed]) -> Table:
    rows = [
        (
            one.pair,
            one.relation,
            one.entity,
            one.layer,
            one.text.strip(),
            one.answers[0],
            one.scores[EXPLAINED],
            one.scores["bits over others"],
            one.scores[AGREEMENT],
            {"agree": "", "verbalizer": "the speaker's own belief"}.get(one.whose, one.whose),
        )
        for one in falsehoods(readings)
    ]
    columns = ("pair", "relation", "entity", "ℓ", "said", "true", EXPLAINED, "bits over others", "agreement", "whose")
    caption = "Where it fails: false readings of which the most is explained"
    return Table("false", caption, columns, tuple(rows), (EXPLAINED, "agreement"))


def _above_table(found: Mapping[str, Classified]) -> Table:
    rows = [(name, one.n, one.true, one.above, one.above_if_false) for name, one in found.items()]
    columns = ("pair", "readings", "true", "above", "above, of the false")
    return Table("above", 'The verdict "above", and how much of what is false has it', columns, tuple(rows), columns[2:])


def _confidence_table(given: Sequence[Confidence]) -> Table:
    rows = [
        (
            one.name,
            one.figures.ece,
            one.figures.ece_floor,
            one.figures.brier.score,
            one.figures.nll,
            one.figures.gap,
            one.figures.auroc.value,
            one.figures.selective.area,
        )
        for one in given
    ]
    columns = ("confidence", "ECE", "ECE floor", "Brier", "NLL (nats)", "mean less accuracy", "AUROC", "area of risk")
    caption = "Confidences, each fitted on one half of the entities and scored on the other. ECE floor: that of exact confidences"
    return Table("confidences", caption, columns, tuple(rows), ("mean less accuracy",))


def _coverage_table(readings: Sequence[Weighed]) -> Table:
    y = [float(one.true) for one in readings]
    rows = []
    for name in SCORES:
        curve = selective([one.scores[name] for one in readings], y)
        rows.append((name, *(curve.accuracy_at(share) for share in COVERAGES), 1 - curve.at_chance, curve.area))
    columns = ("score", *(f"true, of {share:.0%}" for share in COVERAGES), "of all", "area of risk")
    return Table(
        "selective", "Answering only where the score is high: the share that is true", columns, tuple(rows), columns[1:-1]
    )


def _attribution_table(whose: Mapping[str, Attributed]) -> Table:
    rows = [
        (name, one.in_conflict, one.of_target, one.of_speaker, one.right, one.right_if_target, one.right_if_speaker)
        for name, one in whose.items()
    ]
    columns = (
        "pair",
        "in conflict",
        "give M1's fact",
        "give M2's own",
        "attributed rightly",
        "  of M1's",
        "  of M2's own",
    )
    caption = "Readings of items on which M1 (read) and M2 (speaks) disagree, attributed by the sign of bits over text"
    return Table("attribution", caption, columns, tuple(rows), columns[2:])


def _null_table(nulls: Sequence[Null], bench: Bench) -> Table:
    rows = [
        (
            one.kind,
            one.above.n,
            one.above,
            one.uniform.share,
            one.uniform.expected,
            one.uniform.ks,
            one.uniform.ks_p,
            one.uniform.chi2_p,
        )
        for one in nulls
    ]
    columns = (
        "text of",
        "texts",
        '"above"',
        f"p ≤ {SIGNIFICANT:g}",
        "expected",
        "Kolmogorov's D",
        "p of D",
        "p of χ²",
    )
    caption = (
        f"Texts of stand-ins weighed under an item's own second looks ({bench.name}): p must be uniform, but for its own state"
    )
    return Table("null", caption, columns, tuple(rows), ('"above"', f"p ≤ {SIGNIFICANT:g}", "expected"))


def _looks_table(bench: Bench) -> Table:
    rows = [
        (
            one["looks"],
            one["bits"],
            one["bits_if_true"],
            one["spread"],
            one["auroc_bits"].value,
            one["auroc_explained"].value,
            one["auroc_explained"].low,
            one["auroc_explained"].high,
        )
        for one in bench.looks
    ]
    columns = (
        "second looks",
        "bits",
        "bits if true",
        "sd",
        "AUROC of bits",
        f"AUROC of {EXPLAINED}",
        "from",
        "to",
    )
    return Table("looks", f"Choice and number of second looks ({bench.name})", columns, tuple(rows))


def _number_table(bench: Bench) -> Table:
    rows = [
        (
            one["n"],
            one["leave_one_out"],
            one["leave_one_out_if_true"],
            one["spread"],
            one["infonce"],
            one["infonce_if_true"],
            one["infonce_spread"],
            one["bound"],
            one["auroc"],
            one["auroc_spread"],
        )
        for one in bench.numbers
    ]
    columns = ("others n", "bits", "if true", "sd", "InfoNCE", "if true", "sd", "log2 (n + 1)", f"AUROC of {EXPLAINED}", "sd")
    caption = f"Bits by the number of others, drawn anew from all there are; sd over draws ({bench.name})"
    return Table("others", caption, columns, tuple(rows))


def _kind_table(bench: Bench) -> Table:
    rows = [
        (
            one["others"],
            one["n"],
            one["bits"],
            one["bits_if_true"],
            one["auroc_bits"].value,
            one["auroc_explained"].value,
            one["false_alarms"],
        )
        for one in bench.kinds
    ]
    columns = ("others", "n", "bits", "bits if true", "AUROC of bits", f"AUROC of {EXPLAINED}", "p ≤ 0.05 for a stranger's text")
    return Table(
        "kinds",
        f"Others of the reading's relation beside the neutral pool ({bench.name})",
        columns,
        tuple(rows),
        columns[-1:],
    )


# -------------------------------------------------------------------------------------------------------------------------- figures


def figures(
    readings: Sequence[Weighed],
    found: Mapping[str, Classified],
    layers: Mapping[str, Mapping[int, Estimate]],
    given: Sequence[Confidence],
    whose: Mapping[str, Attributed],
    nulls: Sequence[Null],
    bench: Bench,
) -> tuple[Figure, ...]:
    """All for which there are numbers."""
    drawn: list[Figure] = []
    series = tuple((name, tuple(_shown(one.auroc[name]) for one in found.values())) for name in DRAWN)
    if any(one is not None for _, some in series for one in some):
        title = "True against false readings, 95 % intervals over entities; ½ is chance"
        drawn.append(Bars("auroc", title, "AUROC", tuple(found), series))
        drawn.append(_by_layer(layers))
    drawn.append(_risk(readings))
    if given:
        drawn.append(_reliability(given))
    if bench.numbers:
        drawn.append(_bits_of_others(bench.numbers))
    if nulls:
        bars = (('called "above"', tuple(one.above for one in nulls)), ("p ≤ 0.05", tuple(one.uniform.share for one in nulls)))
        title = "Texts of stand-ins weighed as readings: 0.05 at most is right, but for its own state"
        drawn.append(Bars("null", title, "share", tuple(one.kind for one in nulls), bars))
    if whose:
        bars = (
            ("give M1's fact", tuple(one.of_target for one in whose.values())),
            ("give M2's own belief", tuple(one.of_speaker for one in whose.values())),
            ("of these, attributed rightly", tuple(_shown(one.right) for one in whose.values())),
        )
        title = "Where M1 and M2 disagree: whose answer is said, and to whom the sign of bits over text gives it"
        drawn.append(Bars("attribution", title, "share of readings", tuple(whose), bars))
    return tuple(drawn)


def _shown(one: Estimate) -> Estimate | None:
    return None if math.isnan(one.value) else one


def _by_layer(layers: Mapping[str, Mapping[int, Estimate]]) -> Lines:
    lines = []
    for name, some in layers.items():
        known = {layer: one for layer, one in some.items() if not math.isnan(one.low)}
        if known:
            y, low, high = (tuple(getattr(one, key) for one in known.values()) for key in ("value", "low", "high"))
            lines.append(Line(name, tuple(map(float, known)), y, low, high, name in RIVALS))
    return Lines("auroc-by-layer", "AUROC by source layer", "source layer ℓ", "AUROC", tuple(lines), (0, 1.03))


def _risk(readings: Sequence[Weighed]) -> Lines:
    y = [float(one.true) for one in readings]
    lines, wrong = [], 1 - float(np.mean(y))
    for name in DRAWN:
        curve = selective([one.scores[name] for one in readings], y)
        some = np.unique(np.linspace(0, len(y) - 1, min(POINTS, len(y))).round().astype(int))
        x, risk = (tuple(float(values[k]) for k in some) for values in (curve.coverage, curve.risk))
        lines.append(Line(name, x, risk, dashed=name in RIVALS))
    lines.append(Line("in any order", (0.0, 1.0), (wrong, wrong), dashed=True))
    title = "Answering only the readings with the highest scores: the share of false ones among them"
    return Lines("risk-coverage", title, "share of readings answered", "share that is false", tuple(lines), (0, 1.03))


def _reliability(given: Sequence[Confidence]) -> Lines:
    lines = [
        Line(one.name, tuple(b.confidence for b in one.bins), tuple(b.rate for b in one.bins), dashed=AGREEMENT[:9] in one.name)
        for one in given
    ]
    lines.append(Line("exact", (0.0, 1.0), (0.0, 1.0), dashed=True))
    title = "Reliability: the share that is true in each tenth of the readings, by its mean confidence"
    return Lines("reliability", title, "confidence", "share that is true", tuple(lines), (0, 1.03))


def _bits_of_others(numbers: Sequence[dict[str, Any]]) -> Lines:
    x = tuple(float(one["n"]) for one in numbers)
    lines = []
    for name, key, spread in (
        ("bits (leave one out)", "leave_one_out_if_true", "spread"),
        ("InfoNCE (own look among the others)", "infonce_if_true", "infonce_spread"),
    ):
        y = tuple(one[key] for one in numbers)
        low, high = (tuple(v + sign * one[spread] for v, one in zip(y, numbers, strict=True)) for sign in (-1, 1))
        lines.append(Line(name, x, y, low, high))
    lines.append(Line("log2 (n + 1)", x, tuple(one["bound"] for one in numbers), dashed=True))
    title = "Bits of true readings by the number of others; band: standard deviation over others drawn anew"
    return Lines("others", title, "others n", "bits", tuple(lines))
