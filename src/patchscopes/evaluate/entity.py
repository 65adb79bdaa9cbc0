"""Entity description: does what a scope says of an entity state a true fact about it?

Each entity's state at its last token is looked at through the few-shot description scope, layer by layer, ℓ* = ℓ (Ghandeharioun et al.
2024, 4.3 and appendix D). A description is true if it names the object of a fact about the entity, as whole words, other than those that
the entity's own name already says. The paper compares with Wikipedia's descriptions by RougeL; that stands beside, against the nearest of
the phrases that may describe the entity.

With `spread="below"` nothing of the placeholder is left in the layers below ℓ* (placeholder contamination, D.3); the same without it is
run, too, and compared entity by entity.

One layer is chosen on one half of the entities and scored on the other, with its controls: a random vector, another entity's vector,
nothing; and any of all layers beside the same for the facts of another entity of its kind.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import planted, scoring, statistics
from patchscopes.evaluate.frame import Asked, Bars, Line, Lines, Result, Table, caveats_of, paper, recorded, settings_of
from patchscopes.evaluate.placeholder import spread_table
from patchscopes.evaluate.planted import Entity
from patchscopes.evaluate.statistics import Estimate
from patchscopes.experiment.spec import Experiment

if TYPE_CHECKING:
    from patchscopes.runs import Run

TITLE = "Entity description"
PAPER = "Ghandeharioun et al. 2024, Patchscopes, section 4.3, figure 3"
EACH, QUICK, OF_POPQA = 20, 4, 200
Read = Literal["mention", "name"]
CONTROLS = {
    "nothing": "nothing patched in",
    "random": "random vector",
    "other": "another entity's vector",
    "text": "the text itself",
}


@dataclass(frozen=True)
class Settings:
    """Every choice.

    source    what is read: the name alone, as in the paper, or a sentence that mentions the entity and says nothing of it
    tokens    said at most
    layers    ℓ, with ℓ* = ℓ; the paper's are the first ten
    stop      what ends a description; the paper has nothing, so that descriptions of further entities follow, which would count here
    spread    "below": written at every layer up to ℓ*, and compared with "here", ℓ* alone
    """

    source: Literal["mention", "name"] = paper("mention", "name")
    tokens: int = 50
    layers: str = paper("1:-1", "1:11")
    stop: tuple[str, ...] = paper((",", "\n"), ())
    spread: Literal["here", "below"] = "here"


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run; the controls at some layer for half of the entities."""
    entities, _ = drawn(asked)
    half = [e for e in entities if not statistics.in_first_half(e.name, asked.seed)]
    plain = [_experiment(asked, replace(settings, spread="here"), entities)] if settings.spread != "here" else []
    return [_experiment(asked, settings, entities), *plain, _experiment(asked, settings, half, 1)]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    entities, notes = drawn(asked)
    run = recorded(asked, _experiment(asked, settings, entities))
    said = _texts(run)
    kept = [e for e in entities if e.key in said]
    layers = sorted({layer for by_layer in said.values() for layer in by_layer})
    texts, hits = _scored(said, kept, layers)
    chosen = _held_out(hits, kept, asked.seed)
    runs, plain = [run], None
    if settings.spread != "here":
        runs.append(recorded(asked, _experiment(asked, replace(settings, spread="here"), entities)))
        plain = _scored(_texts(runs[-1]), kept, layers)[1]
    control = recorded(asked, _experiment(asked, settings, [kept[k] for k in chosen.scores], layers[chosen.cell]))
    runs.append(control)
    found = Described(tuple(kept), tuple(layers), texts, hits, chosen, control, asked.seed, plain)
    own, deviations = settings_of(settings, asked)
    deviations = (
        *deviations,
        "A description counts if it states a fact; the paper holds it against Wikipedia's description by RougeL.",
    )
    if asked.data is None:
        deviations = (*deviations, "The entities are those that atlas knows, not those of PopQA (--data popqa.tsv).")
    return _result(found, own, deviations, (*notes, *caveats_of(runs)), runs)


# ------------------------------------------------------------------------------------------------------------------------- entities


def drawn(asked: Asked, *, each: int = EACH, quick: int = QUICK, words: int = 1) -> tuple[list[Entity], list[str]]:
    """What is described, some of each kind, drawn by the seed, with names of at least so many words; notes on what was left out."""
    notes: list[str] = []
    found = list(planted.entities()) if asked.data is None else of_popqa(asked.data, notes)
    found = list({entity.key: entity for entity in found}.values())  # a key stands for one
    able = [e for e in found if scoring.echo_free(e.facts, e.name)]
    if len(able) < len(found):
        notes.append(
            f"{len(found) - len(able):,} of {len(found):,} entities were left out: they have no fact that their name does not say."
        )
    if words > 1:
        able = [e for e in able if len(e.name.split()) >= words]
        notes.append(f"Only names of {words} words and more are read: {len(able):,} of {len(found):,} entities.")
    n = asked.n if asked.n is not None else quick if asked.quick else each if asked.data is None else OF_POPQA
    kept = []
    for kind in dict.fromkeys(e.kind for e in able):
        own = [e for e in able if e.kind == kind]
        kept += own if len(own) <= n else random.Random(f"{asked.seed} {kind}").sample(own, n)
    return kept, notes


def of_popqa(path: Path, notes: list[str]) -> list[Entity]:
    """The most and the least popular entities of PopQA, as the paper takes them; facts are the accepted answers of their questions."""
    from patchscopes.evaluate import popqa

    if not path.is_file() or not popqa.is_one(path):
        raise InputError(f"{str(path)!r} is no PopQA file; expected .tsv or .csv with the columns {', '.join(popqa.COLUMNS)}")
    rows, corrupt = popqa.rows(path)
    notes += [f"{corrupt:,} corrupt rows of PopQA were left out."] * bool(corrupt)
    facts: dict[tuple[str, str], list[str]] = {}  # by name and title: several people are called John Smith
    popularity: dict[tuple[str, str], int] = {}
    for row in rows:
        one = row.subject, row.title
        facts.setdefault(one, []).extend(row.answers)
        popularity[one] = max(row.popularity, popularity.get(one, 0))
    ranked = sorted(facts, key=lambda one: popularity[one])
    size = min(OF_POPQA, len(ranked) // 2)
    halves = {"rare": ranked[:size], "popular": ranked[len(ranked) - size :]}
    return [
        Entity(kind, name, tuple(dict.fromkeys(facts[name, title])), (), title)
        for kind, some in halves.items()
        for name, title in some
    ]


def prompts_of(entities: Sequence[Entity], source: Read) -> list[dict[str, Any]]:
    """Where each entity is read, labelled with it."""
    found = []
    for entity in entities:
        text, at = planted.mention(entity.name) if source == "mention" else (entity.name, -1)
        found.append({"text": text, "at": at, "labels": {"entity": entity.key, "kind": entity.kind}})
    return found


def _experiment(asked: Asked, settings: Settings, entities: Sequence[Entity], layer: int | None = None) -> Experiment:
    """All layers without controls; or one with."""
    scope = {"name": "describe", "preset": "describe", "tokens": settings.tokens, "stop": list(settings.stop)}
    if settings.spread != "here":
        scope["spread"] = settings.spread
    return Experiment.model_validate(
        {
            "name": "entity" if layer is None else "entity-controls",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "prompts": prompts_of(entities, settings.source),
            "layers": settings.layers if layer is None else [layer],
            "scope": [scope],
            "controls": layer is not None,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
        }
    )


# --------------------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Described:
    """texts[entity][layer], hits[entity, layer]; plain: the same with nothing written below ℓ*, where that was asked."""

    entities: tuple[Entity, ...]
    layers: tuple[int, ...]
    texts: list[list[str]]
    hits: np.ndarray
    chosen: statistics.HeldOut
    control: Run
    seed: int
    plain: np.ndarray | None = None


def _texts(run: Run) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    rows = run.table(control="none").select("entity", "source_layer", "text")
    for name, layer, text in rows.iter_rows():
        found.setdefault(name, {})[layer] = text or ""
    return found


def _scored(
    said: dict[str, dict[int, str]], entities: Sequence[Entity], layers: Sequence[int]
) -> tuple[list[list[str]], np.ndarray]:
    """texts[entity][layer]; hits[entity, layer]. What failed is a miss."""
    texts = [[said.get(e.key, {}).get(layer, "") for layer in layers] for e in entities]
    return texts, np.array([[true(text, e) for text in row] for row, e in zip(texts, entities, strict=True)], bool)


def _held_out(hits: np.ndarray, entities: Sequence[Entity], seed: int) -> statistics.HeldOut:
    chosen = statistics.held_out(hits, [e.name for e in entities], [e.kind for e in entities], seed=seed)
    if chosen is None:
        raise InputError(f"{len(entities)} entities cannot be split into two halves; give more (--n)")
    return chosen


def true(text: str, entity: Entity) -> bool:
    """Whether a text names, as whole words, the object of a fact about the entity that its name does not say."""
    return scoring.names(text, scoring.echo_free(entity.facts, entity.name))


def _rouge(text: str, entity: Entity) -> float:
    return max((scoring.rouge_l(text, phrase) for phrase in entity.descriptions), default=float("nan"))


def _figures(found: Described) -> dict[str, Estimate]:
    entities, hits, chosen, seed = found.entities, found.hits, found.chosen, found.seed
    names, kinds = [e.name for e in entities], [e.kind for e in entities]
    away = [int(k) for k in chosen.scores]

    def rate(values: Any, rows: Sequence[int]) -> Estimate:
        return statistics.rate([float(v) for v in values], [names[k] for k in rows], seed=seed)

    partner = statistics.strangers(kinds, names, names, seed)
    pairs = [(k, j) for k, j in enumerate(partner) if j is not None]
    crossed = np.array([[true(text, entities[k]) for text in found.texts[j]] for k, j in pairs], bool)
    apart = statistics.strangers([0] * len(names), kinds, names, seed)
    scored = {k for k in away}
    figures = {
        "held_out_layer": rate(hits[away, chosen.cell], away),
        "another_entitys_description": rate(
            [true(found.texts[j][chosen.cell], entities[k]) for k, j in enumerate(apart) if j is not None and k in scored],
            [k for k, j in enumerate(apart) if j is not None and k in scored],
        ),
        "another_of_its_kind": rate(
            [row[chosen.cell] for (k, _), row in zip(pairs, crossed, strict=True) if k in scored],
            [k for k, _ in pairs if k in scored],
        ),
        "per_draw": rate(statistics.per_draw(hits).tolist(), range(len(names))),
        "any_of_all": rate(statistics.any_of(hits).tolist(), range(len(names))),
        "any_of_all_another_of_its_kind": rate(statistics.any_of(crossed).tolist(), [k for k, _ in pairs]),
    }
    by_key = {e.key: e for e in entities}
    said = found.control.table(status="ok").select("entity", "control", "text", "verdict")
    for kind in CONTROLS:
        rows = [(name, text) for name, control, text, _ in said.iter_rows() if control == kind]
        figures[kind] = statistics.rate(
            [float(true(text, by_key[key])) for key, text in rows], [by_key[key].name for key, _ in rows], seed=seed
        )
    verdicts = [
        (by_key[name].name, float(verdict == "above")) for name, control, _, verdict in said.iter_rows() if control == "none"
    ]
    figures["above_controls"] = statistics.rate([v for _, v in verdicts], [n for n, _ in verdicts], seed=seed)
    if (plain := found.plain) is not None:
        alone = plain[away, _held_out(plain, entities, seed).cell]
        figures["spread_here"] = rate(alone, away)
        figures["over_spread_here"] = statistics.difference(hits[away, chosen.cell], alone, [names[k] for k in away], seed=seed)
        figures["per_draw_spread_here"] = rate(statistics.per_draw(plain), range(len(names)))
        figures["per_draw_over_spread_here"] = statistics.difference(
            statistics.per_draw(hits), statistics.per_draw(plain), names, seed=seed
        )
    if any(e.descriptions for e in entities):
        figures["rouge_l"] = rate([_rouge(found.texts[k][chosen.cell], entities[k]) for k in away], away)
    return figures


def _result(found: Described, settings: dict[str, Any], deviations: Any, caveats: Any, runs: Any) -> Result:
    figures, layer = _figures(found), found.layers[found.chosen.cell]
    claims = (
        f"At layer {layer}, chosen on other entities, {figures['held_out_layer']} of the descriptions state a true fact about the entity.",
        f"The same holds for {figures['random']} where a random vector is patched in, {figures['other']} for another entity's vector, "
        f"{figures['nothing']} for nothing.",
        f"Held against the facts of another entity of its kind, {figures['another_of_its_kind']} would count as true: what a description "
        "says of the kind alone.",
        f"Some one of {len(found.layers)} layers states a true fact for {figures['any_of_all']}; for another entity of its kind some one "
        f"does for {figures['any_of_all_another_of_its_kind']}.",
    )
    if "over_spread_here" in figures:
        claims = (
            *claims,
            f"Written at every layer up to ℓ*, {figures['held_out_layer']} are true; written at ℓ* alone, at a layer of its own, "
            f"{figures['spread_here']}; the difference, entity by entity, is {figures['over_spread_here']}. Over all layers alike it is "
            f"{figures['per_draw_over_spread_here']}: {figures['per_draw']} against {figures['per_draw_spread_here']}.",
        )
    headline = {
        "true at the held-out layer": figures["held_out_layer"],
        **{f"  {label}": figures[kind] for kind, label in CONTROLS.items()},
        "  another entity's facts": figures["another_entitys_description"],
        "  facts of another of its kind": figures["another_of_its_kind"],
        "per draw": figures["per_draw"],
        f"any of {len(found.layers)} layers": figures["any_of_all"],
        f"any of {len(found.layers)}, another of its kind": figures["any_of_all_another_of_its_kind"],
    }
    if "over_spread_here" in figures:
        headline |= {
            "written at ℓ* alone": figures["spread_here"],
            "  difference": figures["over_spread_here"],
            "  difference per draw": figures["per_draw_over_spread_here"],
        }
    headline |= {"RougeL at the held-out layer": f"{figures['rouge_l'].value:.3f}"} if "rouge_l" in figures else {}
    kinds = list(dict.fromkeys(e.kind for e in found.entities))
    by_kind = {kind: _of_kind(found, kind) for kind in kinds}
    examples = tuple(
        (e.kind, e.name, found.texts[k][found.chosen.cell], "yes" if found.hits[k, found.chosen.cell] else "no")
        for k, e in enumerate(found.entities)
        if k in set(map(int, found.chosen.scores))
    )
    counts = Counter(e.kind for e in found.entities)
    kind_rows = tuple((kind, counts[kind], one) for kind, one in by_kind.items())
    what = f"What layer {layer} says of entities that did not choose it"
    tables = (
        Table("by-kind", f"By kind of entity, layer {layer}", ("kind", "entities", "true"), kind_rows, ("true",)),
        Table("descriptions", what, ("kind", "entity", "says", "true"), examples),
    )
    if (plain := found.plain) is not None:
        names = [e.name for e in found.entities]
        tables = (*tables, spread_table(found.layers, found.hits, plain, names, seed=found.seed))
    bars = Bars(
        "by-kind", f"True descriptions by kind, layer {layer}", "share", tuple(kinds), (("true", tuple(by_kind.values())),)
    )
    return Result(
        "entity",
        TITLE,
        PAPER,
        claims,
        headline,
        {**figures, "layer": layer, "layers": list(found.layers), "by_kind": by_kind},
        tables,
        (_curve(found), bars),
        settings,
        tuple(deviations),
        tuple(caveats),
        tuple(runs),
    )


def _of_kind(found: Described, kind: str) -> Estimate:
    rows = [int(k) for k in found.chosen.scores if found.entities[int(k)].kind == kind]
    return statistics.rate(
        [float(found.hits[k, found.chosen.cell]) for k in rows], [found.entities[k].name for k in rows], seed=found.seed
    )


def _curve(found: Described) -> Lines:
    names = [e.name for e in found.entities]
    lines = [_line("states a true fact", found, [statistics.rate(found.hits[:, k], names) for k in range(len(found.layers))])]
    if any(e.descriptions for e in found.entities):
        rouge = [[_rouge(text, e) for text in row] for row, e in zip(found.texts, found.entities, strict=True)]
        lines.append(_line("RougeL", found, [statistics.rate(np.array(rouge)[:, k], names) for k in range(len(found.layers))]))
    return Lines(
        "by-layer",
        "Descriptions by layer, 95 % intervals over entities",
        "layer ℓ = ℓ*",
        "share, RougeL",
        tuple(lines),
        (0, 1.03),
    )


def _line(name: str, found: Described, some: Sequence[Estimate]) -> Line:
    y, low, high = (tuple(getattr(one, key) for one in some) for key in ("value", "low", "high"))
    return Line(name, tuple(map(float, found.layers)), y, low, high)
