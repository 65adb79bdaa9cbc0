"""The figures of the experiment `superscopes`: tries by site, block and way. Pure functions of the tables of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from patchscopes.core.errors import InputError
from patchscopes.evaluate import scoring, statistics
from patchscopes.evaluate.entity import true
from patchscopes.evaluate.frame import Bars, Line, Lines, Result, Table
from patchscopes.evaluate.planted import Entity
from patchscopes.evaluate.statistics import Estimate
from patchscopes.maps import Scale
from patchscopes.scopes.superscopes import BITS

if TYPE_CHECKING:
    from patchscopes.runs import Run

SITES = ("mlp_out", "mlp_in", "resid")
WAYS = {"plain": "α = 1", "amplified": "amplified", "matched": "norm matched", "guided": "guided"}
NULLS = {"kin": "another of its kind", "other": "another entity", "random": "random vector", "mean": "mean of others"}
Key = tuple[str, str]  # site, way


@dataclass(frozen=True)
class Part:
    """A part of the runs: one way of writing what is read at a site of a block. number: of the only try that it holds, if it holds one."""

    site: str
    block: int
    way: str
    number: int | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.site}.{self.block} {self.way}" + ("" if self.number is None else f" {self.number}")


@dataclass(frozen=True)
class Said:
    """texts and ratios of every site and way: [entity, block, try]; ratio: norm of what is written over that of what it replaces."""

    entities: tuple[Entity, ...]
    texts: dict[Key, np.ndarray]
    ratios: dict[Key, np.ndarray]

    def hits(self, key: Key) -> np.ndarray:
        """[entity, block, try]: whether the text is true of its entity."""
        return _true(self.texts[key], self.entities)


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a site and way on one half of the entities: the block and its column, and of its tries (α, w) the best one,
    None where tries are draws. scores: the rows of the other half."""

    block: int
    column: int
    best: int | None
    scores: tuple[int, ...]


@dataclass(frozen=True)
class Tried:
    """The tries of one site and way at its block. texts: of "none" (its own) and each control [entity, try]; bits: evidence, the least
    of the three kinds, −∞ where there is none; above: whether the verdict is "above"; criterion: of each α, if it was asked for."""

    texts: dict[str, np.ndarray]
    bits: np.ndarray
    above: np.ndarray
    ratios: np.ndarray
    criterion: np.ndarray | None


def said_by(
    table: pl.DataFrame, parts: Sequence[Part], entities: Sequence[Entity], alphas: Sequence[float], blocks: Sequence[int]
) -> Said:
    """Texts from the table of a run without controls. Entities that were skipped are left out; what failed said nothing."""
    there = set(table["entity"])
    kept = tuple(e for e in entities if e.key in there)
    row, column = {e.key: k for k, e in enumerate(kept)}, {block: k for k, block in enumerate(blocks)}
    shape = (len(kept), len(blocks), len(alphas))
    keys = list(dict.fromkeys((part.site, part.way) for part in parts))
    texts = {key: np.full(shape, "", object) for key in keys}
    ratios = {key: np.full(shape, np.nan) for key in keys}
    for part, k, name, text, ratio, *_ in _rows(table, parts, alphas):
        at = (row[name], column[part.block], k)
        texts[part.site, part.way][at] = text or ""
        ratios[part.site, part.way][at] = np.nan if ratio is None else ratio
    return Said(kept, texts, ratios)


def tried_by(
    table: pl.DataFrame,
    parts: Sequence[Part],
    entities: Sequence[Entity],
    alphas: Sequence[float],
    criteria: Mapping[str, np.ndarray],
) -> dict[Key, Tried]:
    """The same from a run with controls, of one block for each site and way."""
    row, shape = {e.key: k for k, e in enumerate(entities)}, (len(entities), len(alphas))
    found = {
        key: Tried(
            {kind: np.full(shape, "", object) for kind in ("none", "other", "random", "mean")},
            np.full(shape, -np.inf),
            np.zeros(shape, bool),
            np.full(shape, np.nan),
            criteria.get(key[0]) if key[1] == "amplified" else None,
        )
        for site in dict.fromkeys(part.site for part in parts)
        for key in [(site, way) for way in WAYS]
    }
    for part, k, name, text, ratio, kind, bits, verdict in _rows(table, parts, alphas):
        one, at = found[part.site, part.way], (row[name], k)
        if kind in one.texts:
            one.texts[kind][at] = text or ""
        if kind == "none":
            one.bits[at] = -np.inf if bits is None else bits
            one.above[at] = verdict == "above"
            one.ratios[at] = np.nan if ratio is None else ratio
    return found


def _rows(table: pl.DataFrame, parts: Sequence[Part], alphas: Sequence[float]) -> list[tuple[Any, ...]]:
    """(part, number of the try, entity, text, norm ratio, control, bits, verdict) of every row."""
    of, gains = {part.name: part for part in parts}, {Scale(float(alpha)).name: k for k, alpha in enumerate(alphas)}
    bits = pl.min_horizontal(*(pl.col(name).cast(pl.Float64).fill_nan(None) for name in BITS))
    columns = table.select("part", "map", "draw", "entity", "text", "norm_ratio", "control", bits.alias("bits"), "verdict")
    found = []
    for name, gain, draw, *rest in columns.iter_rows():
        part = of[name]
        number = gains[gain] if part.way == "amplified" else draw if part.number is None else part.number
        found.append((part, number, *rest))
    return found


def _true(texts: np.ndarray, entities: Sequence[Entity]) -> np.ndarray:
    """[entity, …] of texts → whether each is true of the entity of its row."""
    found = [[true(text, e) for text in row.flat] for row, e in zip(texts, entities, strict=True)]
    return np.array(found, bool).reshape(texts.shape)


def _near(texts: np.ndarray, entities: Sequence[Entity]) -> np.ndarray:
    """The same for what the paper's test lets pass: a true fact, or an echo of the name."""
    echo = [[scoring.names(text, e.name) for text in row.flat] for row, e in zip(texts, entities, strict=True)]
    return _true(texts, entities) | np.array(echo, bool).reshape(texts.shape)


Crossed = tuple[np.ndarray, list[int]]


def _crossed(texts: np.ndarray, entities: Sequence[Entity], seed: int) -> Crossed:
    """(what was said of another entity of its kind, held against the facts of the entity of its row; the rows that have such another)."""
    kinds, names = [e.kind for e in entities], [e.name for e in entities]
    partner = statistics.strangers(kinds, names, names, seed)
    rows = [k for k, j in enumerate(partner) if j is not None]
    others = texts[[j for j in partner if j is not None]]
    return _true(others, [entities[k] for k in rows]), rows


def choose(said: Said, blocks: Sequence[int], *, seed: int = 0) -> dict[Key, Chosen]:
    """For every site and way the block at which a try is most often true, and there the best α or w, on one half of the entities.
    InputError if there are too few to split."""
    names, kinds = [e.name for e in said.entities], [e.kind for e in said.entities]
    found = {}
    for key in said.texts:
        hits = said.hits(key)
        held = statistics.held_out(hits.mean(axis=2), names, kinds, seed=seed)
        if held is None:
            raise InputError(f"{len(names)} entities cannot be split into two halves; give more (--n)")
        tries = hits[held.chose, held.cell]
        best = statistics.chosen_cell(tries, [kinds[k] for k in held.chose]) if key[1] in ("amplified", "guided") else None
        found[key] = Chosen(blocks[held.cell], held.cell, best, tuple(map(int, held.scores)))
    return found


# -------------------------------------------------------------------------------------------------------------------------- figures


def kin_of(said: Said, key: Key, chosen: Chosen, seed: int = 0) -> Crossed:
    """Of the rows that score: what was said at their block of another entity of their kind, of either half; [row, try], and their numbers
    among those that score."""
    hits, rows = _crossed(said.texts[key][:, chosen.column], said.entities, seed)
    order = {row: k for k, row in enumerate(chosen.scores)}
    some = [k for k, row in enumerate(rows) if row in order]
    return hits[some], [order[rows[k]] for k in some]


def figures(
    tried: Tried, plain: Tried, kin: Crossed, best: int | None, entities: Sequence[Entity], seed: int = 0
) -> dict[str, Any]:
    """Of one site and way, on the half that did not choose its block; beside the plain way of the same site at the block of its own, and
    `kin_of`."""
    names, hits = [e.name for e in entities], _true(tried.texts["none"], entities)
    base = _true(plain.texts["none"], entities)
    pick, base_pick = tried.bits.argmax(axis=1), plain.bits.argmax(axis=1)
    every = np.arange(len(entities))

    def rate(values: np.ndarray, rows: Sequence[int] | np.ndarray = every) -> Estimate:
        return statistics.rate(np.asarray(values, float), [names[k] for k in rows], seed=seed)

    def apart(first: np.ndarray, second: np.ndarray) -> Estimate:
        return statistics.difference(np.asarray(first, float), np.asarray(second, float), names, seed=seed)

    found: dict[str, Any] = {
        "per_try none": rate(statistics.per_draw(hits)),
        "any_of_N none": rate(statistics.any_of(hits)),
        "first_try": rate(hits[:, 0]),
        "by_evidence": rate(hits[every, pick]),
        "above_controls": rate(tried.above.mean(axis=1)),
        "norm_ratio": _mean(tried.ratios),
    }
    crossed, rows = kin
    found["per_try kin"], found["any_of_N kin"] = (rate(f(crossed), rows) for f in (statistics.per_draw, statistics.any_of))
    found["p_kin"] = _p(statistics.any_of(hits)[rows], statistics.any_of(crossed))
    for kind in ("other", "random", "mean"):
        null = _true(tried.texts[kind], entities)
        found[f"per_try {kind}"], found[f"any_of_N {kind}"] = rate(statistics.per_draw(null)), rate(statistics.any_of(null))
    if best is not None:
        found["held_out"] = rate(hits[:, best])
        found["evidence_over_any"] = apart(hits[every, pick], statistics.per_draw(hits))
        found["evidence_over_held_out"] = apart(hits[every, pick], hits[:, best])
        if tried.criterion is not None:
            by_criterion = hits[every, tried.criterion.argmax(axis=1)]
            found["by_criterion"] = rate(by_criterion)
            found["criterion_over_any"] = apart(by_criterion, statistics.per_draw(hits))
            found["criterion_over_held_out"] = apart(by_criterion, hits[:, best])
    if tried is not plain:
        found["per_try over plain"] = apart(statistics.per_draw(hits), statistics.per_draw(base))
        found["any_of_N over plain"] = apart(statistics.any_of(hits), statistics.any_of(base))
        found["by_evidence over plain"] = apart(hits[every, pick], base[every, base_pick])
        found["p"] = _p(statistics.any_of(hits), statistics.any_of(base))
    return found


def _any(hits: np.ndarray) -> np.ndarray:
    """[entity, block, try] → [entity, block]."""
    return np.asarray(hits.any(axis=2))


def _p(first: np.ndarray, second: np.ndarray) -> float:
    return statistics.mcnemar(int((first & ~second).sum()), int((second & ~first).sum()))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def papers(said: Said, site: str, seed: int = 0) -> dict[str, Estimate]:
    """The published comparison and a fair one, means over blocks: the best of N amplified, of one plain draw, of N plain draws, if an echo
    of the name counts."""
    names = [e.name for e in said.entities]
    near = {way: _near(said.texts[site, way], said.entities) for way in ("amplified", "plain")}
    values = {
        "best of N amplified": _any(near["amplified"]),
        "one plain draw": near["plain"][:, :, 0],
        "best of N plain": _any(near["plain"]),
    }
    return {name: statistics.rate(value.mean(axis=1), names, seed=seed) for name, value in values.items()}


# --------------------------------------------------------------------------------------------------------------------------- result


def result(
    title: str,
    paper: str,
    said: Said,
    chosen: Mapping[Key, Chosen],
    tried: Mapping[Key, Tried],
    *,
    alphas: Sequence[float],
    weights: Sequence[float],
    blocks: Sequence[int],
    seed: int,
    runs: tuple[Run, ...],
    **more: Any,
) -> Result:
    """As the frame has it. p-values of one question are adjusted for all sites and ways (Holm)."""
    sites = list(dict.fromkeys(site for site, _ in chosen))
    entities = [said.entities[k] for k in next(iter(chosen.values())).scores]
    scores = {
        key: figures(one, tried[key[0], "plain"], kin_of(said, key, chosen[key], seed), chosen[key].best, entities, seed)
        for key, one in tried.items()
    }
    for name in ("p", "p_kin"):
        asked = [key for key in scores if name in scores[key]]
        for key, p in zip(asked, statistics.holm([scores[key][name] for key in asked]), strict=True):
            scores[key][name] = p
    tuned = {"amplified": ("α", alphas), "guided": ("w", weights)}
    for key, own in scores.items():
        own["block"] = chosen[key].block
        if (best := chosen[key].best) is not None:
            symbol, values = tuned[key[1]]
            own["setting"] = f"{symbol} = {values[best]:g}"
    published = {site: papers(said, site, seed) for site in sites}
    n = len(alphas)
    claims = tuple(
        claim
        for site in sites
        for claim in (*_claims(site, {way: scores[site, way] for way in WAYS}, n), _published(site, published[site], n))
    )
    headline: dict[str, Any] = {}
    for (site, way), own in scores.items():
        headline[f"{site}, {WAYS[way]}, block {own['block']}: one try"] = own["per_try none"]
        headline[f"{site}, {WAYS[way]}: any of {n}"] = own["any_of_N none"]
        headline[f"{site}, {WAYS[way]}: any of {n}, another of its kind"] = own["any_of_N kin"]
    return Result(
        "superscopes",
        title,
        paper,
        claims,
        headline,
        {
            "sites": {site: {way: scores[site, way] for way in WAYS} for site in sites},
            "published": published,
            "tries": n,
            "entities": len(said.entities),
            "scored_on": len(entities),
        },
        (
            _ways_table(scores, n),
            _nulls_table(scores, n),
            _choice_table(scores),
            _published_table(published, n),
            _texts_table(tried, entities),
        ),
        (
            *(_by_block(site, said, blocks, n, seed) for site in sites),
            _by_alpha(tried, entities, alphas, seed),
            _bars(scores, sites, n),
        ),
        runs=runs,
        **more,
    )


def _claims(site: str, own: Mapping[str, Mapping[str, Any]], n: int) -> tuple[str, ...]:
    """What may be said of a site, whichever way it points."""
    plain, gain = own["plain"], own["amplified"]
    told = [
        f"{site}: one try states a true fact of the entity in {plain['per_try none']} at α = 1 (what is written has "
        f"{plain['norm_ratio']:.2f} times the length of what it replaces), in {gain['per_try none']} amplified ({gain['norm_ratio']:.2f} "
        f"times), in {own['matched']['per_try none']} norm matched, in {own['guided']['per_try none']} guided; each at its own block. "
        + " ".join(_over(WAYS[way], own[way]) for way in ("amplified", "matched", "guided"))
    ]
    told.append(
        f"{site}: some one of {n} α does so for {gain['any_of_N none']}, some one of {n} draws at α = 1 for {plain['any_of_N none']} "
        f"(McNemar p = {gain['p']:.2g}, Holm), some one of the same {n} α of another entity of its kind for {gain['any_of_N kin']} "
        f"(p = {gain['p_kin']:.2g}), of random vectors for {gain['any_of_N random']}."
    )
    chosen = f"{site}: without labels, the α with the most evidence states a true fact in {gain['by_evidence']}"
    if "by_criterion" in gain:
        chosen += f", that of self-similarity and entropy in {gain['by_criterion']}"
    chosen += (
        f"; the α that was best for other entities ({gain['setting']}) in {gain['held_out']}, any α in {gain['per_try none']}. "
    )
    chosen += f"Evidence less any: {gain['evidence_over_any']}; less that best one: {gain['evidence_over_held_out']}. "
    told.append(
        f"{chosen}As many draws at α = 1, chosen by evidence, reach {plain['by_evidence']}, norm matched {own['matched']['by_evidence']}."
    )
    return tuple(told)


def _over(name: str, own: Mapping[str, Any]) -> str:
    one: Estimate = own["per_try over plain"]
    verdict = "better than" if one.low > 0 else "worse than" if one.high < 0 else "not told apart from"
    return f"{name[0].upper()}{name[1:]} is {verdict} α = 1 (difference {one})."


def _published(site: str, own: Mapping[str, Estimate], n: int) -> str:
    return (
        f"{site}: the published comparison, in which an echo of the name counts, gives {own['best of N amplified']} for the best of {n} α "
        f"against {own['one plain draw']} for one draw at α = 1, means over blocks. The two are not comparable: the best of {n} draws at "
        f"α = 1 has {own['best of N plain']}."
    )


def _ways_table(scores: Mapping[Key, Mapping[str, Any]], n: int) -> Table:
    columns = (
        "site",
        "way",
        "block",
        "length ratio",
        "one try",
        f"any of {n}",
        "held-out setting",
        "by evidence",
        "over α = 1",
        "p",
    )
    rows = tuple(
        (
            site,
            WAYS[way],
            str(own["block"]),
            f"{own['norm_ratio']:.2f}",
            own["per_try none"],
            own["any_of_N none"],
            own.get("held_out"),
            own["by_evidence"],
            own.get("per_try over plain"),
            f"{own['p']:.2g}" if "p" in own else "",
        )
        for (site, way), own in scores.items()
    )
    caption = (
        f"True statements on the half of the entities that chose no block, each way with {n} tries. Over α = 1: the difference of one try, "
        f"entity by entity; p: McNemar's of any of {n} against any of {n} at α = 1, Holm over all rows"
    )
    return Table("ways", caption, columns, rows, columns[4:9])


def _nulls_table(scores: Mapping[Key, Mapping[str, Any]], n: int) -> Table:
    heads = [f"{what}, {name}" for what in ("one try", f"any of {n}") for name in ("own state", *NULLS.values())]
    rows = tuple(
        (
            site,
            WAYS[way],
            *(own[f"{what} {kind}"] for what in ("per_try", "any_of_N") for kind in ("none", *NULLS)),
            f"{own['p_kin']:.2g}",
        )
        for (site, way), own in scores.items()
    )
    caption = (
        f"The same {n} tries with other vectors, held against the entity's facts. p: own state or another of its kind, any of {n}"
    )
    return Table("nulls", caption, ("site", "way", *heads, "p"), rows, tuple(heads))


def _choice_table(scores: Mapping[Key, Mapping[str, Any]]) -> Table:
    names = {
        "per_try none": "any α",
        "held_out": "held-out α",
        "by_evidence": "by evidence",
        "evidence_over_any": "evidence over any",
        "evidence_over_held_out": "evidence over held-out",
        "by_criterion": "by similarity and entropy",
        "criterion_over_any": "criterion over any",
        "criterion_over_held_out": "criterion over held-out",
        "any_of_N none": "some α",
    }
    rows = tuple(
        (
            site,
            own["setting"],
            scores[site, "plain"]["per_try none"],
            scores[site, "plain"]["by_evidence"],
            *(own.get(name) for name in names),
        )
        for (site, way), own in scores.items()
        if way == "amplified"
    )
    columns = ("site", "best for others", "α = 1", "α = 1, by evidence", *names.values())
    return Table("choice", "Which α: chosen without labels, on other entities, or at random", columns, rows, columns[2:])


def _published_table(published: Mapping[str, Mapping[str, Estimate]], n: int) -> Table:
    rows = tuple((site, *own.values()) for site, own in published.items())
    columns = (f"best of {n} α", "one draw at α = 1", f"best of {n} draws at α = 1")
    caption = "The published comparison (first with second: not comparable) and a fair one; an echo of the name counts; means over blocks"
    return Table("published", caption, ("site", *columns), rows, columns)


def _texts_table(tried: Mapping[Key, Tried], entities: Sequence[Entity]) -> Table:
    rows = tuple(
        (site, WAYS[way], e.name, text, "yes" if true(text, e) else "no")
        for (site, way), one in tried.items()
        for e, text in zip(entities, one.texts["none"][np.arange(len(entities)), one.bits.argmax(axis=1)], strict=True)
    )
    return Table("texts", "What the try with the most evidence says", ("site", "way", "entity", "says", "true"), rows)


def _by_block(site: str, said: Said, blocks: Sequence[int], n: int, seed: int) -> Lines:
    names = [e.name for e in said.entities]
    lines = [_line("one draw at α = 1", blocks, said.hits((site, "plain"))[:, :, 0], names, seed)]
    lines += [_line(f"{name}, any of {n}", blocks, _any(said.hits((site, way))), names, seed) for way, name in WAYS.items()]
    crossed, rows = _crossed(said.texts[site, "amplified"], said.entities, seed)
    null = _any(crossed)
    lines.append(_line(f"amplified, any of {n}, another of its kind", blocks, null, [names[k] for k in rows], seed, dashed=True))
    title = f"{site}: true statements by block, all entities, 95 % intervals"
    return Lines(f"blocks-{site}", title, "block b", "share", tuple(lines), (0, 1.03))


def _by_alpha(tried: Mapping[Key, Tried], entities: Sequence[Entity], alphas: Sequence[float], seed: int) -> Lines:
    names, order = [e.name for e in entities], np.argsort(alphas)
    lines = [
        _line(site, [alphas[k] for k in order], _true(one.texts["none"], entities)[:, order], names, seed)
        for (site, way), one in tried.items()
        if way == "amplified"
    ]
    title = "True statements by α at the block chosen for it, entities that chose nothing, 95 % intervals"
    return Lines("alphas", title, "α", "share", tuple(lines), (0, 1.03))


def _bars(scores: Mapping[Key, Mapping[str, Any]], sites: Sequence[str], n: int) -> Bars:
    series = [(name, tuple(scores[site, way]["any_of_N none"] for site in sites)) for way, name in WAYS.items()]
    series += [
        (f"{name}, another of its kind", tuple(scores[site, way]["any_of_N kin"] for site in sites)) for way, name in WAYS.items()
    ]
    return Bars("ways", f"A true statement in some one of {n} tries, 95 % intervals", "share", tuple(sites), tuple(series))


def _line(name: str, x: Sequence[float], hits: np.ndarray, clusters: Sequence[str], seed: int, *, dashed: bool = False) -> Line:
    some = [statistics.rate(hits[:, k].astype(float), clusters, seed=seed) for k in range(hits.shape[1])]
    y, low, high = (tuple(getattr(one, key) for one in some) for key in ("value", "low", "high"))
    return Line(name, tuple(map(float, x)), y, low, high, dashed)
