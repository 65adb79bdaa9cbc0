"""What the study of evidence says, in plain words, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from patchscopes.controls.evidence import SIGNIFICANT
from patchscopes.controls.vectors import N_OTHERS
from patchscopes.evaluate.evidence_scores import (
    EXPLAINED,
    RIVALS,
    SCORES,
    Attributed,
    Classified,
    Confidence,
    Null,
    Raw,
    Weighed,
    attributed,
    by_layer,
    by_pair,
    classified,
    confidences,
    null,
    of_kind,
    of_looks,
    of_number,
)
from patchscopes.evaluate.evidence_tables import DRAWN, Bench, figures, tables
from patchscopes.evaluate.evidence_weighing import CONTROLS, OWN, STRANGER, Pretended
from patchscopes.evaluate.frame import Result
from patchscopes.evaluate.statistics import Estimate

NUMBERS = (2, 4, 8, 16, 24, 48)  # of others


def result(
    title: str,
    paper: str,
    readings: Sequence[Weighed],
    pretended: Sequence[Pretended],
    raw: Raw | None,
    bench: str,
    seed: int,
    **more: Any,
) -> Result:
    """The page's content. readings: with every score; bench: what the pair is called whose null and estimator were examined."""
    groups = by_pair(readings)
    found = {name: classified(some, seed=seed) for name, some in groups.items()}
    whole = next(iter(groups))
    layers = by_layer(readings, DRAWN, seed=seed)
    given = confidences(readings, seed=seed)
    whose = {name: one for name, some in groups.items() if (one := attributed(some, seed=seed)) is not None}
    nulls = _nulls(pretended, seed)
    measured = Bench(bench)
    if raw is not None:
        measured = Bench(bench, of_looks(raw), of_number(raw, NUMBERS, seed=seed), of_kind(raw, seed=seed))
    claims = [_classifier_claim(found[whole], whole), *_confidence_claims(given), *_false_claims(found, whole)]
    claims += [*_null_claims(nulls, bench), *_attribution_claims(whose, whole), *_estimator_claims(measured)]
    return Result(
        "evidence",
        title,
        paper,
        tuple(claims),
        _headline(found, given, whose, nulls, whole),
        {
            "classifier": {name: vars(one) for name, one in found.items()},
            "by_layer": layers,
            "confidences": {one.name: _plain(one) for one in given},
            "attribution": {name: vars(one) for name, one in whose.items()},
            "null": {one.kind: {**vars(one), "uniform": vars(one.uniform)} for one in nulls},
            "estimator": {"looks": measured.looks, "others": measured.numbers, "kinds": measured.kinds},
            "readings": len(readings),
        },
        tables(readings, found, given, whose, nulls, measured),
        figures(readings, found, layers, given, whose, nulls, measured),
        **more,
    )


def _nulls(pretended: Sequence[Pretended], seed: int) -> list[Null]:
    found = []
    for kind in (OWN, *CONTROLS.values(), STRANGER):
        some = [one for one in pretended if one.kind == kind]
        if some:
            p, above = [one.p for one in some], [one.above for one in some]
            found.append(null(kind, p, above, N_OTHERS, [one.entity for one in some], seed=seed))
    return found


def _plain(one: Confidence) -> dict[str, Any]:
    """Without the curve, of which there is a figure."""
    figures = {name: value for name, value in vars(one.figures).items() if name != "selective"}
    return {
        **figures,
        "brier": vars(one.figures.brier),
        "area": one.figures.selective.area,
        "bins": [vars(each) for each in one.bins],
    }


def _headline(
    found: dict[str, Classified], given: Sequence[Confidence], whose: dict[str, Attributed], nulls: Sequence[Null], whole: str
) -> dict[str, Any]:
    lines: dict[str, Any] = {f"AUROC, {name}": found[whole].auroc[name] for name in SCORES}
    lines |= {f"AUROC of {EXPLAINED} above {name}": value for name, value in found[whole].over.items()}
    lines["called above the controls, though false"] = found[whole].above_if_false
    lines |= {f"ECE, {one.name}": round(one.figures.ece, 3) for one in given[:1]}
    lines |= {f'called "above", texts of {one.kind}': one.above for one in nulls}
    if whose:
        lines["attributed to the right model"] = next(iter(whose.values())).right
    return lines


# --------------------------------------------------------------------------------------------------------------------------- claims


def number(one: Estimate, digits: int = 3) -> str:
    """Value and interval as plain numbers."""
    if math.isnan(one.value):
        return "unknown"
    between = "interval unknown" if math.isnan(one.low) else f"{one.low:.{digits}f} to {one.high:.{digits}f}"
    return f"{one.value:.{digits}f} ({between})"


def _classifier_claim(one: Classified, whole: str) -> str:
    if math.isnan(one.auroc[EXPLAINED].value):
        which = "true" if one.true.value == 1 else "false"
        return f"All {one.n:,} readings are {which}, so that nothing can be told of how a score sorts true from false."
    best = (
        f"The share of its surprise that evidence explains tells true from false readings: AUROC {number(one.auroc[EXPLAINED])}"
    )
    rest = ", ".join(f"{name} {number(one.auroc[name])}" for name in (*RIVALS, "bits over others"))
    apart = "; ".join(f"{_more(value)} {name} by {number(value)}" for name, value in one.over.items())
    return f"{best} ({whole}, {one.n:,} readings, {one.true} true); {rest}. Of {EXPLAINED} against its rivals: {apart}."


def _more(value: Estimate) -> str:
    if value.low > 0:
        return "above"
    return "below" if value.high < 0 else "no telling from"


def _confidence_claims(given: Sequence[Confidence]) -> list[str]:
    if not given:
        return []
    parts = [
        f"{one.name}: ECE {one.figures.ece:.3f} (floor {one.figures.ece_floor:.3f}), Brier {one.figures.brier.score:.3f}"
        for one in given
    ]
    return [f"As confidences, fitted on the other half of the entities: {'; '.join(parts)}."]


def _false_claims(found: dict[str, Classified], whole: str) -> list[str]:
    one = found[whole]
    text = (
        f"Of false readings {one.above_if_false} are called above their controls all the same: they tell of their source, "
        "consistently, and are wrong."
    )
    others = [f"{name} {each.above_if_false}" for name, each in found.items() if name != whole and each.above_if_false.n]
    return [text + (f" By pair: {'; '.join(others)}." if others else "")] if one.above_if_false.n else []


def _null_claims(nulls: Sequence[Null], bench: str) -> list[str]:
    if not nulls:
        return []
    parts = [f"{one.kind}: {one.above}, p ≤ {SIGNIFICANT:g} in {one.uniform.share}" for one in nulls if one.kind != OWN]
    own = [f" Real readings: {one.above}." for one in nulls if one.kind == OWN]
    return [
        f"Texts that other vectors brought forth, weighed as if they were the item's ({bench}), called above: {'; '.join(parts)}."
        + "".join(own)
    ]


def _attribution_claims(whose: dict[str, Attributed], whole: str) -> list[str]:
    parts = [
        f"{name}: {one.of_target} of readings in conflict give the fact of the model that was read, {one.of_speaker} the speaker's own "
        f"belief; the sign of bits over text gives {one.right} of these to the right model"
        for name, one in whose.items()
        if name != whole or len(whose) == 1
    ]
    return [f"{part}." for part in parts]


def _estimator_claims(bench: Bench) -> list[str]:
    looks, numbers, kinds, found = bench.looks, bench.numbers, bench.kinds, list[str]()
    if looks:
        some = "; ".join(f"{one['looks']}: AUROC {number(one['auroc_explained'])}" for one in looks)
        found.append(f"Looks ({EXPLAINED}): {some}. The bits of one text differ by {looks[0]['spread']:.2f} between looks.")
    if len(numbers) > 1:
        few, many = numbers[0], numbers[-1]
        found.append(
            f"Others: true readings have {few['leave_one_out_if_true']:.2f} bits over {few['n']} others and "
            f"{many['leave_one_out_if_true']:.2f} over {many['n']}, without a ceiling; with the item's own look among them (InfoNCE) "
            f"{few['infonce_if_true']:.2f} and {many['infonce_if_true']:.2f}, never above {few['bound']:.2f} and {many['bound']:.2f}. "
            f"Drawn anew, others move the bits by {few['spread']:.2f} and {many['spread']:.2f}."
        )
    if kinds:
        parts = "; ".join(
            f"{one['others']}: {one['bits']:.2f} bits, AUROC {number(one['auroc_explained'])}, a stranger's text has p ≤ {SIGNIFICANT:g} "
            f"in {one['false_alarms']}"
            for one in kinds
        )
        found.append(f"Over {kinds[0]['n']} others {parts}.")
    return found
