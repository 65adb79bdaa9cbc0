"""What the privileged-information test says, in plain words, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from patchscopes.evaluate.frame import Bars, Line, Lines, Result, Table
from patchscopes.evaluate.pairs import Pair
from patchscopes.evaluate.statistics import Estimate

if TYPE_CHECKING:
    from patchscopes.evaluate.best_of import BestOf
    from patchscopes.evaluate.faithfulness import Faithfulness
    from patchscopes.evaluate.privileged_scores import Layer, PairScores

SAID = {
    "more than the text": "tell more than the text",
    "of its source": "tell of their source, and no more than the text",
    "nothing": "tell nothing that the placeholder or another entity's state would not",
    "not compared": "could not be compared with other entities",
}
ONE = {
    "more than the text": "tells more than the text",
    "of its source": "tells of its source, and no more than the text",
    "nothing": "tells nothing that the placeholder or another entity's state would not",
    "not compared": "could not be compared with other entities",
}


def result(title: str, paper: str, pairs: Sequence[PairScores], measured: Faithfulness | None, **more: Any) -> Result:
    """The page's content. pairs: with adjusted p-values; measured: faithfulness, if it was."""
    claims = [claim for pair in pairs for claim in _claims(pair)]
    claims += measured.claims if measured is not None else ()
    tables = (_overview(pairs), *(_layers_table(pair) for pair in pairs), *(_bits_table(pair) for pair in pairs))
    tables += (_controls_table(pairs), _scoring_table(pairs), *(measured.tables if measured is not None else ()))
    figures = (_attribution_bars(pairs), *(_lines(pair) for pair in pairs), *(_bits_lines(pair) for pair in pairs))
    return Result(
        "privileged",
        title,
        paper,
        tuple(claims),
        _headline(pairs),
        {
            "pairs": {name_of(pair): _scores(pair) for pair in pairs},
            **({"faithfulness": measured.scores} if measured is not None else {}),
        },
        tables=tables,
        figures=(*figures, *(measured.figures if measured is not None else ())),
        **more,
    )


def name_of(pair: PairScores) -> str:
    """ "M1 read, M2 speaks", or the one model."""
    return f"{pair.read} of itself" if pair.read == pair.speaks else Pair(pair.read, pair.speaks).name


def best(pair: PairScores) -> Layer:
    """The lowest layer at which most facts are said; for tables, which call it so: it was chosen on what it is scored on."""
    return max(pair.layers, key=lambda one: (one.over_text.first.value, -one.layer))


# --------------------------------------------------------------------------------------------------------------------------- claims


def _claims(pair: PairScores) -> list[str]:
    """A verdict for each run of layers of which the same may be said, then whose facts were told."""
    parts = []
    for told, some in groupby(pair.layers, key=lambda one: one.told):
        layers = list(some)
        name = f"layer {layers[0].layer}" if len(layers) == 1 else f"layers {layers[0].layer}–{layers[-1].layer}"
        strongest = max(layers, key=lambda one: _bits_of(one)[1].value)
        over, bits = _bits_of(strongest)
        at = "" if len(layers) == 1 else f" at layer {strongest.layer}"
        verb = (ONE if len(layers) == 1 else SAID)[told]
        parts.append(f"{name} {verb} ({bits_text(bits)} over {over}{at})")
    found = [f"{name_of(pair)}: {'; '.join(parts)}."]
    top = best(pair)
    if pair.conflicts:
        found.append(
            f"{name_of(pair)}: where the two disagree ({pair.conflicts:,} items), the readings of layer {top.layer} give the fact of the "
            f"model that is read in {top.target}, and what the speaker itself believes in {top.prior} (false attribution)."
        )
    if top.probe is not None and pair.read != pair.speaks:
        control = "" if top.probe_control is None else f", {top.probe_control.value:.1%} on its control task"
        found.append(
            f"{name_of(pair)}: a linear probe of the same states says the fact in {top.probe}{control}; the speaker in "
            f"{top.over_text.first}."
        )
    return found


def _bits_of(one: Layer) -> tuple[str, Estimate]:
    """What a verdict hangs on: bits over the text; where it is not even of its source, the fewer of those over placeholder and others."""
    if one.told in ("more than the text", "of its source"):
        return "the text", one.bits["named"]
    if one.told == "not compared":
        return "the placeholder", one.bits["nothing"]
    return min(("the placeholder", one.bits["nothing"]), ("other entities", one.bits["others"]), key=lambda pair: pair[1].value)


def bits_text(one: Estimate) -> str:
    """ "+3.1 bits, 95 % interval 1.9 to 4.4"."""
    if math.isnan(one.value):
        return "unknown"
    between = "interval unknown" if math.isnan(one.low) else f"95 % interval {one.low:+.1f} to {one.high:+.1f}"
    return f"{one.value:+.1f} bits, {between}"


def _headline(pairs: Sequence[PairScores]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        top = best(pair)
        name = name_of(pair)
        found[f"{name}, layer {top.layer}"] = top.over_text.first
        found[f"  {name}: asked in words"] = pair.named
        if top.inverted is not None:
            found[f"  {name}: inversion, then asked"] = top.inverted
        if pair.best is not None:
            found[f"  {name}: another entity's state, any layer"] = pair.best.any_of_null
        if pair.conflicts:
            found[f"  {name}: false attribution"] = top.prior
    return found


# --------------------------------------------------------------------------------------------------------------------------- tables


def _best_of(found: BestOf | None) -> tuple[Estimate | None, ...]:
    """Per layer, any layer, the same of another entity, a layer chosen on other entities; nothing where no entity could stand in."""
    return (None,) * 4 if found is None else (found.per_draw, found.any_of, found.any_of_null, found.held_out)


def _overview(pairs: Sequence[PairScores]) -> Table:
    columns = (
        "pair", "items", "entities", "in conflict", "answer in prompt", "best layer", "verbalizer", "per layer", "any layer",
        "any layer, other entity", "held-out layer", "asked in words", "inversion", "constant answer", "probe", "probe's control task",
        "false attribution", "rightly attributed",
    )  # fmt: skip
    rows = []
    for pair in pairs:
        top = best(pair)
        rows.append(
            (
                name_of(pair), pair.items, pair.entities, pair.conflicts, pair.leaked, top.layer, top.over_text.first, *_best_of(pair.best),
                pair.named, top.inverted, pair.majority, top.probe,
                top.probe_control, top.prior if pair.conflicts else None, pair.attributed if pair.conflicts else None,
            )
        )  # fmt: skip
    caption = (
        "Who says M1's facts. Verbalizer: at the layer that says most, which is flattered; held out: at a layer chosen on other entities. "
        "Any layer, other entity: the null of as many looks. Rightly attributed: readings in conflict that bits_over_text gives to the "
        "right model"
    )
    return Table("overview", caption, columns, tuple(rows), columns[6:])


def _layers_table(pair: PairScores) -> Table:
    columns = (
        "layer", "says the fact", "less asked in words", "McNemar p", "p over entities", "least difference to be seen", "dealt out anew",
        "permutation p", "inversion", "name reconstructed", "probe", "above", "explained", "verdict",
    )  # fmt: skip
    rows = tuple(
        (
            one.layer, one.over_text.first, one.over_text.difference, _p(one.over_text.p_exact), _p(one.over_text.p_clustered),
            one.detectable, one.permuted.deranged, _p(one.permuted.p), one.inverted, one.name_found, one.probe, one.above,
            one.evidence["explained"], one.told,
        )
        for one in pair.layers
    )  # fmt: skip
    caption = (
        f"{name_of(pair)}, by source layer. Least difference: of hits to the text, found with power 0.8 at p ≤ 0.05, uncorrected; "
        "dealt out anew: readings against answers of other items; above: share of readings with that verdict, which needs no truth; "
        "verdict: from the bits about the answer, Holm over all pairs and layers"
    )
    shares = tuple(name for name in columns[1:-1] if name not in ("McNemar p", "p over entities", "permutation p"))
    return Table(f"layers-{slug(pair)}", caption, columns, rows, shares)


def _bits_table(pair: PairScores) -> Table:
    names = {"nothing": "placeholder", "others": "other entities", "named": "asked in words", "source": "the sentence"}
    rows = []
    for one in pair.layers:
        row: list[Any] = [one.layer]
        for key in names:
            row.append(bits_text(one.bits[key]))
            row.append(_p(one.adjusted.get(key, math.nan)) if key != "source" else _p(one.p[key]))
        rows.append(tuple(row))
    columns = ["layer"]
    for key, name in names.items():
        columns += [f"over {name}", f"p, Holm ({name})" if key != "source" else f"p ({name})"]
    caption = f"{name_of(pair)}: bits by which the fact's own words are likelier with the state in place"
    return Table(f"bits-{slug(pair)}", caption, tuple(columns), tuple(rows))


def _controls_table(pairs: Sequence[PairScores]) -> Table:
    kinds = list(dict.fromkeys(kind for pair in pairs for kind in best(pair).controls))
    rows = tuple((name_of(pair), best(pair).layer, *(best(pair).controls.get(kind) for kind in kinds)) for pair in pairs)
    caption = "What the same scope says with a control in the state's place: share that names the item's fact, at the layer that says most"
    return Table("controls", caption, ("pair", "layer", *kinds), rows, tuple(kinds))


def _scoring_table(pairs: Sequence[PairScores]) -> Table:
    columns = (
        "pair", "layer", "names the fact", "names another answer", "both", "names none", "precision", "commonest text", "its share",
        "as the placeholder", "shared with another entity", "refuses",
    )  # fmt: skip
    rows = []
    for pair in pairs:
        for one in pair.layers:
            s, g = one.stated, one.generic
            rows.append(
                (
                    name_of(pair), one.layer, s.correct, s.hallucinated, s.both, s.vague, s.precision, g.most_common, g.most_common_share,
                    g.as_control, g.shared, g.refusal,
                )
            )  # fmt: skip
    caption = "Specific and wrong, or vague: what readings name among all answers, and how many would have been said of anything"
    return Table("statements", caption, columns, tuple(rows), tuple(c for c in columns[2:] if c != "commonest text"))


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# -------------------------------------------------------------------------------------------------------------------------- figures


def _lines(pair: PairScores) -> Lines:
    x = tuple(float(one.layer) for one in pair.layers)

    def line(name: str, some: Sequence[Estimate | None], *, dashed: bool = False) -> list[Line]:
        there = [one for one in some if one is not None]
        if len(there) < len(some):
            return []
        y, low, high = (tuple(getattr(one, key) for one in there) for key in ("value", "low", "high"))
        return [Line(name, x, y, low, high, dashed)]

    flat = lambda value: (value,) * len(x)
    lines = line("out of the state", [one.over_text.first for one in pair.layers])
    lines += line("linear probe", [one.probe for one in pair.layers])
    lines += line("inversion, then asked", [one.inverted for one in pair.layers], dashed=True)
    lines.append(Line("asked in words", x, flat(pair.named.value), dashed=True))
    lines.append(Line("constant answer", x, flat(pair.majority.value), dashed=True))
    lines += line("another entity's state", [one.controls.get("other") for one in pair.layers], dashed=True)
    title = f"{name_of(pair)}: the fact is said, by source layer (95 % intervals over entities)"
    return Lines(f"said-{slug(pair)}", title, "source layer ℓ", "share", tuple(lines), (0, 1.03))


def _bits_lines(pair: PairScores) -> Lines:
    x = tuple(float(one.layer) for one in pair.layers)
    names = {"nothing": "over the placeholder", "others": "over other entities", "named": "over asking in words"}
    lines = []
    for key, name in names.items():
        some = [one.bits[key] for one in pair.layers]
        y, low, high = (tuple(getattr(one, part) for one in some) for part in ("value", "low", "high"))
        lines.append(Line(name, x, y, low, high, dashed=key != "named"))
    lines.append(Line("nothing told", x, (0.0,) * len(x), dashed=True))
    return Lines(
        f"bits-{slug(pair)}", f"{name_of(pair)}: bits about the fact, by source layer", "source layer ℓ", "bits", tuple(lines)
    )


def _attribution_bars(pairs: Sequence[PairScores]) -> Bars:
    tops = [best(pair) for pair in pairs]
    series = (
        ("out of the state", tuple(top.over_text.first for top in tops)),
        ("asked in words", tuple(pair.named for pair in pairs)),
        ("linear probe", tuple(top.probe for top in tops)),
        ("speaker's own belief", tuple(top.prior if pair.conflicts else None for top, pair in zip(tops, pairs, strict=True))),
    )
    title = "Whose facts are said, at the layer that says most (95 % intervals over entities)"
    return Bars("whose", title, "share", tuple(name_of(pair) for pair in pairs), series)


def slug(pair: PairScores) -> str:
    """For names of files."""
    return "-".join("".join(c if c.isalnum() else "-" for c in name) for name in dict.fromkeys((pair.read, pair.speaks)))


def _scores(pair: PairScores) -> dict[str, Any]:
    return {
        "items": pair.items,
        "entities": pair.entities,
        "conflicts": pair.conflicts,
        "leaked": pair.leaked,
        "named": pair.named,
        "majority": pair.majority,
        **dict(zip(("per_draw", "any_layer", "any_layer_other_entity", "held_out_layer"), _best_of(pair.best), strict=True)),
        "any_layer_p": None if pair.best is None else pair.best.p,
        "attributed": pair.attributed,
        "layers": {
            str(one.layer): {
                "said": one.over_text.first,
                "over_text": one.over_text.difference,
                "p_exact": one.over_text.p_exact,
                "p_clustered": one.over_text.p_clustered,
                "bits": one.bits,
                "p": one.p,
                "p_adjusted": one.adjusted,
                "told": one.told,
                "controls": one.controls,
                "permutation_p": one.permuted.p,
                "target": one.target,
                "prior": one.prior,
                "above": one.above,
                "evidence": one.evidence,
                "detectable": one.detectable,
                "inverted": one.inverted,
                "name_found": one.name_found,
                "probe": one.probe,
                "probe_control": one.probe_control,
                "hallucinated": one.stated.hallucinated,
            }
            for one in pair.layers
        },
    }
