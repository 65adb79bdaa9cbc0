"""The figures of cross-model patching: pure functions of the tables of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.evaluate import scoring, statistics, tries
from patchscopes.evaluate.cross_model_maps import MAPPED, MAPS, SHUFFLED, UNMAPPED, Pair
from patchscopes.evaluate.data import Item
from patchscopes.evaluate.frame import Bars, Figure, Heat, Line, Lines, Result, Table
from patchscopes.evaluate.statistics import Estimate

if TYPE_CHECKING:
    import polars as pl

    from patchscopes.runs import Run

SOURCE, TARGET = "the source itself", "the target itself"  # parts of a run: what the models say without a patch
KINDS = {
    "none": "own vector",
    "other": "another entity's vector",
    "random": "random vector",
    "mean": "mean of others",
    "nothing": "nothing",
}


@dataclass(frozen=True)
class Said:
    """Next tokens. hits and bits: by (scope, map), [text, pair], NaN in bits where there is no surprisal; ceiling: [text], whether M*
    reading the text itself says what M says; commonest: share of the commonest token of M."""

    pairs: tuple[tuple[int, int], ...]
    hits: dict[tuple[str, str], np.ndarray]
    bits: dict[tuple[str, str], np.ndarray]
    ceiling: np.ndarray
    commonest: float


def next_token_scores(run: Run, *, one_vocabulary: bool, seed: int = 0) -> Said:
    """Of a run of `_next_tokens`. Tokens are compared by id, or, where the models' tokens differ, as texts without outer spaces."""
    rows = run.table(control="none", status="ok")
    truth, target = (_by_prompt(rows, name, one_vocabulary) for name in (SOURCE, TARGET))
    texts = sorted(truth)
    found: dict[tuple[str, str], dict[tuple[int, int, int], tuple[Any, float]]] = {}
    columns = ("part", "scope", "prompt", "source_layer", "target_layer", "next_token_id", "text", "surprisal")
    for part, scope, prompt, layer, other, token, text, bits in rows.select(columns).iter_rows():
        if part not in (SOURCE, TARGET):
            own = found.setdefault((scope, part.removeprefix(f"{scope}, ")), {})
            own[prompt, layer, other] = (_token(token, text, one_vocabulary), np.nan if bits is None else bits)
    pairs = tuple(sorted({(a, b) for cells in found.values() for _, a, b in cells}))
    missing = (None, np.nan)
    hits = {
        key: np.array([[_same(cells.get((t, *p), missing)[0], truth[t]) for p in pairs] for t in texts], bool)
        for key, cells in found.items()
    }
    bits = {key: np.array([[cells.get((t, *p), missing)[1] for p in pairs] for t in texts]) for key, cells in found.items()}
    said = [truth[t] for t in texts]
    return Said(
        pairs,
        hits,
        bits,
        np.array([_same(target.get(t), truth[t]) for t in texts], bool),
        max(said.count(one) for one in set(said)) / len(said),
    )


def _by_prompt(rows: pl.DataFrame, part: str, one_vocabulary: bool) -> dict[int, Any]:
    some = rows.filter(rows["part"] == part).select("prompt", "next_token_id", "text")
    return {prompt: _token(token, text, one_vocabulary) for prompt, token, text in some.iter_rows()}


def _token(token: int, text: str, one_vocabulary: bool) -> Any:
    """What is compared: the id, or the text; None for a piece of a character, which is no text."""
    return token if one_vocabulary else None if "\ufffd" in text else text.strip()


def _same(said: Any, truth: Any) -> bool:
    return said is not None and said != "" and said == truth


def attribute_hits(run: Run, items: Sequence[Item]) -> dict[str, tries.Hits]:
    """By map: which items came out at which pair, for the own vector and, with the fitted map, for every control; as whole words. What
    failed is a miss."""
    found: dict[str, dict[str, dict[tuple, str]]] = {}
    columns = ("part", "scope", "prompt_text", "at", "control", "source_layer", "target_layer", "text")
    for part, target, prompt, at, kind, layer, other, text in run.table(status="ok").select(columns).iter_rows():
        name = part.rpartition(", ")[2]
        found.setdefault(name, {}).setdefault(kind, {})[target, prompt, at, layer, other] = text
    hits: dict[str, tries.Hits] = {}
    for name, kinds in found.items():
        pairs = tuple(sorted({(key[3], key[4]) for key in kinds["none"]}))
        values = {
            kind: np.array([[scoring.names(said.get((*i.key, *pair), ""), i.answers) for pair in pairs] for i in items], bool)
            for kind, said in kinds.items()
            if kind in KINDS
        }
        hits[name] = tries.Hits(pairs, values)
    return hits


def _figures_of_tokens(said: Said, seed: int) -> dict[str, Any]:
    """By scope and map: a pair chosen on half of the texts and scored on the other, precision and surprisal there; all pairs' mean."""
    texts = list(range(len(said.ceiling)))
    found: dict[str, Any] = {}
    for (scope, name), hits in said.hits.items():
        own: dict[str, Any] = {"per_pair": statistics.rate(statistics.per_draw(hits), texts, seed=seed)}
        chosen = statistics.held_out(hits, texts, seed=seed)
        if chosen is not None:
            rows = chosen.scores.tolist()
            bits = said.bits[scope, name][rows, chosen.cell]
            there = [k for k, b in zip(rows, bits, strict=True) if np.isfinite(b)]
            own |= {
                "pair": said.pairs[chosen.cell],
                "held_out": statistics.rate(hits[rows, chosen.cell].astype(float), rows, seed=seed),
                "held_out_surprisal_bits": statistics.rate(bits[np.isfinite(bits)], there, seed=seed),
            }
            mapped = statistics.held_out(said.hits[scope, MAPPED], texts, seed=seed)
            if name != MAPPED and mapped is not None:
                a, b = said.hits[scope, MAPPED][rows, mapped.cell], hits[rows, chosen.cell]
                own["p"] = statistics.mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
        found.setdefault(scope, {})[name] = own
    for own in found.values():  # both floors of a scope were tested
        tested = [name for name in own if "p" in own[name]]
        for name, p in zip(tested, statistics.holm([own[name]["p"] for name in tested]), strict=True):
            own[name]["p"] = p
    return found


# ---------------------------------------------------------------------------------------------------------------------------- result


def result(
    title: str,
    paper: str,
    pair: Pair,
    said: Said,
    hits: dict[str, tries.Hits],
    items: Sequence[Item],
    reports: Sequence[dict[str, Any]],
    seed: int,
    **more: Any,
) -> Result:
    """As the frame has it."""
    texts = list(range(len(said.ceiling)))
    tokens = _figures_of_tokens(said, seed)
    ceiling = statistics.rate(said.ceiling.astype(float), texts, seed=seed)
    clusters = [item.cluster for item in items]
    attributes = {name: tries.figures(one, np.ones(len(one.pairs), bool), clusters, seed, KINDS) for name, one in hits.items()}
    n = len(hits[MAPPED].pairs)
    headline: dict[str, Any] = {}
    for scope, own in tokens.items():
        headline |= {f"next token, {scope}, {name}, held-out pair": own[name].get("held_out") for name in own}
    headline["next token: the models agree"] = ceiling
    headline["next token: the commonest"] = said.commonest
    for kind, what in KINDS.items():
        headline[f"attributes, {what}, held-out pair"] = attributes[MAPPED].get(f"held_out {kind}")
        headline[f"attributes, {what}, any of {n}"] = attributes[MAPPED].get(f"any_of_N {kind}")
    for name in (SHUFFLED, UNMAPPED):
        headline[f"attributes, {name}, held-out pair"] = attributes[name].get("held_out none")
        headline[f"attributes, {name}, any of {n}"] = attributes[name]["any_of_N none"]
    headline = {name: value for name, value in headline.items() if value is not None}
    scores = {
        "next_token": {
            "scopes": tokens,
            "models_agree": ceiling,
            "commonest": said.commonest,
            "texts": len(texts),
            "one_vocabulary": pair.one_vocabulary,
        },
        "attributes": {"maps": attributes, "items": len(items), "entities": len(set(clusters)), "pairs": n},
        "maps": {"reports": list(reports), "source_width": pair.source.d_model, "target_width": pair.target.d_model},
    }
    tables = (_fit_table(reports), _token_table(said, seed), _attribute_table(attributes))
    return Result(
        "cross-model",
        title,
        paper,
        _claims(pair, tokens, ceiling, attributes, n),
        headline,
        scores,
        tuple(table for table in tables if table.rows),
        _figures(pair, said, hits, attributes, tokens),
        **more,
    )


def _claims(pair: Pair, tokens: dict[str, Any], ceiling: Estimate, attributes: dict[str, Any], n: int) -> tuple[str, ...]:
    """Whichever way they point."""
    source, target = pair.source.name, pair.target.name
    found = []
    for scope, own in tokens.items():
        if "held_out" not in own[MAPPED]:
            continue
        layer, other = own[MAPPED]["pair"]
        text = (
            f"{scope[:1].upper()}{scope[1:]}: through the map from layer {layer} of {source} to layer {other} of {target}, chosen on "
            f"other texts, {target} says {source}'s next token for {own[MAPPED]['held_out']}"
        )
        for name in (SHUFFLED, UNMAPPED):
            text += f"; {name}, at the pair that is best for that, for {own[name]['held_out']} (p = {own[name]['p']:.2g})"
        found.append(f"{text}. The models themselves agree for {ceiling}.")
    own = attributes[MAPPED]
    if "held_out none" in own:
        layer, other = own["pair"]
        found.append(
            f"Attributes: through the map from layer {layer} to layer {other}, chosen on other entities, {target} says what both know of "
            f"an entity that {source} has read for {own['held_out none']} of the facts; for another entity's vector that fact in "
            f"{own['held_out other']}, for a random one in {own['held_out random']}, with nothing patched in {own['held_out nothing']}; "
            f"shuffled in {attributes[SHUFFLED]['held_out none']}, unmapped in {attributes[UNMAPPED]['held_out none']}."
        )
    found.append(
        f"Some one of {n} pairs says the fact in {own['any_of_N none']}; but as many looks at another entity's vector say it in "
        f"{own['any_of_N other']} (McNemar p = {own['p']:.2g}), at a random one in {own['any_of_N random']}, unmapped in "
        f"{attributes[UNMAPPED]['any_of_N none']}."
    )
    return tuple(found)


def _fit_table(reports: Sequence[dict[str, Any]]) -> Table:
    columns = {
        "source_layer": "ℓ",
        "target_layer": "ℓ*",
        "error": "error",
        "floor": "refit floor",
        "mean": "of the mean",
        "identity": "of the identity",
        "cosine": "cosine",
        "ridge": "ridge",
        "n_fitted": "tokens fitted",
        "n": "tokens held out",
    }
    return Table(
        "maps",
        "The maps on texts that they have not seen: error as a share of the targets' variance, beside the least that any affine map could "
        "have on these very texts (the refit floor)",
        tuple(columns.values()),
        tuple(tuple(one.get(key) for key in columns) for one in reports),
    )


def _token_table(said: Said, seed: int) -> Table:
    texts = list(range(len(said.ceiling)))
    rows = []
    for (scope, name), hits in said.hits.items():
        for k, (layer, other) in enumerate(said.pairs):
            bits = said.bits[scope, name][:, k]
            there = [t for t in texts if np.isfinite(bits[t])]
            own = statistics.rate(hits[:, k].astype(float), texts, seed=seed)
            rows.append((scope, name, layer, other, own, statistics.rate(bits[there], there, seed=seed)))
    return Table(
        "next-token",
        "Every pair: precision@1, whether M* says the next token of M, and M's surprisal at what M* says, in bits",
        ("scope", "map", "ℓ", "ℓ*", "precision@1", "surprisal (bits)"),
        tuple(rows),
        ("precision@1",),
    )


def _attribute_table(attributes: dict[str, Any]) -> Table:
    rows = [
        (name, what, *(tries.share(own.get(f"{figure} {kind}")) for figure in ("per_try", "any_of_N", "held_out")))
        for name, own in attributes.items()
        for kind, what in KINDS.items()
        if f"per_try {kind}" in own
    ]
    return Table(
        "attributes",
        "Facts that both models know, said by M* for a vector of M: at a pair, at some one of N, at one pair chosen on other entities",
        ("map", "what is written", "a pair", "any of N", "held-out pair"),
        tuple(rows),
        ("a pair", "any of N", "held-out pair"),
    )


def _figures(
    pair: Pair, said: Said, hits: dict[str, tries.Hits], attributes: dict[str, Any], tokens: dict[str, Any]
) -> tuple[Figure, ...]:
    found: list[Figure] = []
    for scope, own in tokens.items():
        slug = scope.replace(" ", "-")
        title = f"{scope}: precision@1 by pair of layers; framed: the pair chosen on one half of the texts"
        found.append(_heat(slug, title, "precision@1", said.pairs, said.hits[scope, MAPPED], own[MAPPED].get("pair")))
        found.append(_lines(pair, said, scope, slug))
    title = "Attributes: share of facts said, by pair of layers; framed: the pair chosen on one half of the entities"
    mapped = hits[MAPPED]
    found.append(_heat("attributes", title, "share", mapped.pairs, mapped.hits["none"], attributes[MAPPED].get("pair")))
    series = [(what, attributes[MAPPED], kind) for kind, what in KINDS.items()]
    series += [(f"{name} map" if name == SHUFFLED else name, attributes[name], "none") for name in (SHUFFLED, UNMAPPED)]
    n = len(mapped.pairs)
    bars = [(what, tuple(own.get(f"{figure} {kind}") for figure in ("held_out", "any_of_N"))) for what, own, kind in series]
    title = "Attributes, beside all controls, 95 % intervals over entities"
    found.append(Bars("controls", title, "share of facts said", ("held-out pair", f"any of {n} pairs"), tuple(bars)))
    return tuple(found)


def _heat(
    name: str, title: str, label: str, pairs: Sequence[tuple[int, int]], hits: np.ndarray, chosen: tuple[int, int] | None
) -> Heat:
    layers, others = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    rates = dict(zip(pairs, hits.mean(axis=0), strict=True))
    return Heat(
        f"pairs-{name}",
        title,
        "source layer ℓ",
        "target layer ℓ*",
        tuple(map(str, layers)),
        tuple(map(str, others)),
        tuple(tuple(float(rates.get((a, b), np.nan)) for b in others) for a in layers),
        label,
        None if chosen is None else (layers.index(chosen[0]), others.index(chosen[1])),
    )


def _lines(pair: Pair, said: Said, scope: str, slug: str) -> Lines:
    """For each ℓ the ℓ* of the grid at about the same share of the depth."""
    texts = list(range(len(said.ceiling)))
    depth = pair.target.n_layers / pair.source.n_layers
    diagonal = [(a, min(pair.target_layers, key=lambda b: (abs(b - a * depth), b))) for a in pair.layers]
    x = tuple(float(a) for a, _ in diagonal)
    lines = []
    for name in MAPS:
        columns = [said.pairs.index(one) for one in diagonal]
        some = [statistics.rate(said.hits[scope, name][:, k].astype(float), texts) for k in columns]
        y, low, high = (tuple(getattr(one, key) for one in some) for key in ("value", "low", "high"))
        lines.append(Line(name, x, y, low, high, name != MAPPED))
    top = float(said.ceiling.mean())
    lines.append(Line("the models agree", (x[0], x[-1]), (top, top), dashed=True))
    title = f"{scope}: precision@1 at ℓ* of about the same depth, 95 % intervals over texts"
    return Lines(f"depth-{slug}", title, "source layer ℓ", "precision@1", tuple(lines), (0, 1.03))
