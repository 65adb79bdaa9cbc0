"""Attribute extraction: can what a model knows of an entity be read out of the entity's hidden state alone?

For a fact (subject, relation, object) that the model knows: S mentions the subject, i is the subject's last token; T is the relation in
words with x in the subject's place; every source layer ℓ goes into every target layer ℓ*, 1 … L − 1 each. The object is read out if it
stands in what T goes on with (Ghandeharioun et al. 2024, 4.2 and appendix C).

Beside the paper's figure (for each ℓ the share of items at which some ℓ* hits, its mean over ℓ): the rate of a draw, any of all N cells
and the same for the vectors of other entities, and one cell for all relations, chosen on one half of the entities and scored on the
other, with its controls: nothing, a random vector, another entity's vector, the text itself. And a linear probe whose folds hold subjects
together. With `spread="below"` nothing of the placeholder is left in the layers below ℓ* (placeholder contamination, D.3); the same
without it is run, too, and compared item by item.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from patchscopes.core.errors import InputError
from patchscopes.evaluate import attribute_tsv, extraction, probing
from patchscopes.evaluate.data import Item, Items, items_of, sampled
from patchscopes.evaluate.frame import Asked, Result, caveats_of, paper, recorded, settings_of
from patchscopes.experiment.spec import Experiment

TITLE = "Attribute extraction"
PAPER = "Ghandeharioun et al. 2024, Patchscopes, section 4.2, tables 1 and 5"
EACH, QUICK_EACH, QUICK_RELATIONS, QUICK_PROBE = 12, 4, 8, 12


@dataclass(frozen=True)
class Settings:
    """Every choice.

    tokens       said by each reading, and by the model that is asked whether it knows a fact
    layers       source layers, and target layers
    known        whose word counts on what the model knows: its own ("model"), the labels of the data ("labels"), or all items ("all")
    at_least     relations with fewer items are left out, with a note; the paper's have 15
    tasks        relations; none: of the attribute TSVs the paper's twelve, else all
    leaks        whether prompts in which the object stands are kept
    spread       "below": written at every layer up to ℓ*, and compared with "here", ℓ* alone
    probe        items of a relation that a probe sees at most, those above among them, whether or not the model knows them; 0: no probe.
                 The paper's sees all
    """

    tokens: int = 20
    layers: str = "1:-1"
    target_layers: str = "1:-1"
    known: Literal["model", "labels", "all"] = "model"
    at_least: int = paper(4, 15)
    tasks: tuple[str, ...] | None = None
    leaks: bool = True
    probe: int = paper(48, "all")
    spread: Literal["here", "below"] = "here"


def _checked(settings: Settings) -> None:
    for name, least in (("tokens", 1), ("at_least", 1), ("probe", 0)):
        if (value := getattr(settings, name)) < least:
            raise InputError(f"{name} is {value}; expected {least} or more")


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run: every item, as if the model knew all; the controls at some cell. InputError for settings that make no sense."""
    _checked(settings)
    pool = askable(asked, settings, [])
    items = sample(asked, settings, pool, [])
    rest = [_grid(asked, settings, items)]
    rest += [_grid(asked, replace(settings, spread="here"), items)] if settings.spread != "here" else []
    rest += [_controls(asked, settings, items, (1, 1))]
    rest += [vectors(asked, settings, _probed(asked, settings, items, pool))] if settings.probe else []
    return [*([asking(asked, settings, items)] if settings.known == "model" else []), *rest]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    _checked(settings)
    notes: list[str] = []
    pool = askable(asked, settings, notes)
    items = sample(asked, settings, pool, notes)
    runs = []
    if settings.known == "model":
        runs.append(recorded(asked, asking(asked, settings, items)))
        known = extraction.knows(runs[0], by_target(items))
        kept = tuple(item for item in items.items if item in known)
        notes.append(f"The model knows {len(kept):,} of {len(items.items):,} items; the others are left out.")
        items = enough(Items(items.name, kept, items.stop), settings, notes, "that the model knows")
    grid = recorded(asked, _grid(asked, settings, items))
    hits = extraction.grid_hits(grid, items.items, seed=asked.seed)
    shared = extraction.shared_cell(hits, seed=asked.seed)
    control = recorded(asked, _controls(asked, settings, _subset(items, shared.scores), shared.cell))
    read, plain = [grid, control], None
    if settings.spread != "here":
        read.append(recorded(asked, _grid(asked, replace(settings, spread="here"), items)))
        plain = extraction.grid_hits(read[-1], hits.items, seed=asked.seed)
    runs += read
    probes = None
    if settings.probe:
        probed = _probed(asked, settings, items, pool)
        runs.append(recorded(asked, vectors(asked, settings, probed)))
        probes = probing.probe(runs[-1], probed.items, seed=asked.seed)
    own, deviations = settings_of(settings, asked)
    return extraction.result(
        TITLE,
        PAPER,
        extraction.scored(hits, shared, control, probes, plain, seed=asked.seed),
        settings=own,
        deviations=(*deviations, *_deviations(items, settings)),
        caveats=(*notes, *caveats_of(read)),
        runs=tuple(runs),
    )


def _deviations(items: Items, settings: Settings) -> tuple[str, ...]:
    found = []
    if items.name != "attribute TSVs":
        found.append(f"The questions are {items.name}, not those of the paper (--data patchscopes_tsv).")
    elif settings.tokens == 20:
        found.append("The published code says 10 tokens under a patch; the paper, and this, 20 (--set tokens=10).")
    if settings.probe:
        found.append("The probe's folds split subjects; the paper's split rows, so that its probe has seen the subject.")
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------------- items


def askable(asked: Asked, settings: Settings, notes: list[str]) -> Items:
    """All that can be asked about."""
    data = items_of(asked.data)
    tasks = settings.tasks
    if tasks is None and data.name == "attribute TSVs" and len(data.relations) > len(attribute_tsv.TASKS):
        tasks = attribute_tsv.TASKS
    if tasks is not None and (unknown := sorted(set(tasks) - set(data.relations))):
        raise InputError(f"{data.name} have no relation {', '.join(unknown)}; they have {', '.join(data.relations)}")
    found = [item for item in data.items if tasks is None or item.relation in tasks]
    notes += data.notes
    if settings.known == "labels":
        if any(item.known is None for item in found):
            raise InputError(f"{data.name} do not say what a model knows; expected known=model or known=all")
        found = [item for item in found if item.known]
    if not settings.leaks:
        clean = [item for item in found if item.answers[0].lower() not in item.prompt.lower()]
        notes += [f"{len(found) - len(clean):,} items were left out, since their prompt holds the answer."] * (clean != found)
        found = clean
    if asked.quick and asked.n is None:
        some = _spread(found)
        found = [item for item in found if item.relation in some]
    return Items(data.name, tuple(found), data.stop)


def sample(asked: Asked, settings: Settings, pool: Items, notes: list[str]) -> Items:
    """What is asked about."""
    n = asked.n if asked.n is not None else QUICK_EACH if asked.quick else EACH if asked.data is None else None
    return enough(Items(pool.name, tuple(sampled(pool.items, n, asked.seed)), pool.stop), settings, notes)


def _probed(asked: Asked, settings: Settings, items: Items, pool: Items) -> Items:
    """What the probe learns from and is tested on."""
    n = QUICK_PROBE if asked.quick else settings.probe
    more = [item for item in sampled(pool.items, n, asked.seed) if item.relation in items.relations]
    return Items(items.name, tuple(dict.fromkeys([*items.items, *more])), items.stop)


def _spread(items: Sequence[Item]) -> list[str]:
    """Some relations of all kinds."""
    names = list(dict.fromkeys(item.relation for item in items))
    return names[:: max(1, len(names) // QUICK_RELATIONS)][:QUICK_RELATIONS]


def enough(items: Items, settings: Settings, notes: list[str], kept_by: str = "") -> Items:
    """Without relations that have too few items to split. kept_by: what these items have passed, for people."""
    counts = Counter(item.relation for item in items.items)
    few = {name for name, n in counts.items() if n < settings.at_least}
    if few:
        notes.append(f"Left out, with fewer than {settings.at_least} items: {', '.join(sorted(few))}.")
    kept = tuple(item for item in items.items if item.relation not in few)
    if not kept:
        raise InputError(
            f"no relation has {settings.at_least} items or more of {items.name}{f' {kept_by}' if kept_by else ''}; found "
            f"{', '.join(f'{name} ({n})' for name, n in counts.items()) or 'none'}. Give more items (--n), or a lower at_least"
        )
    return Items(items.name, kept, items.stop)


def _subset(items: Items, rows: Sequence[int]) -> Items:
    return Items(items.name, tuple(items.items[k] for k in rows), items.stop)


# ---------------------------------------------------------------------------------------------------------------------- experiments


def experiment(asked: Asked, settings: Settings, items: Items, name: str, parts: list[dict[str, Any]], **more: Any) -> Experiment:
    """What the experiments here share."""
    return Experiment.model_validate(
        {
            "name": name,
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "tokens": settings.tokens,
            "stop": list(items.stop),
            "seed": asked.seed,
            "on_bad_prompt": "skip",
            "parts": parts,
            **more,
        }
    )


def asking(asked: Asked, settings: Settings, items: Items) -> Experiment:
    """Does the model say the object when asked in words? The question with the subject in it, to which nothing is added (0 · h): plain
    greedy decoding, as a run."""
    parts = [
        {
            "name": name,
            "prompts": "x",
            "layers": [0],
            "scope": [{"name": target, "prompt": extraction.questions(some), "at": -1, "layer": 0, "write": "add"}],
        }
        for name, target, some in by_target(items)
    ]
    return experiment(asked, settings, items, "attribute-known", parts, map=[{"scale": 0.0}], controls=False)


def _grid(asked: Asked, settings: Settings, items: Items) -> Experiment:
    """Every source layer into every target layer."""
    parts = parts_of(items, {"layer": settings.target_layers, **_spread_of(settings)})
    return experiment(asked, settings, items, "attribute", parts, layers=settings.layers, controls=False)


def _controls(asked: Asked, settings: Settings, items: Items, cell: tuple[int, int]) -> Experiment:
    """One cell, with its controls."""
    parts = parts_of(items, {"layer": cell[1], **_spread_of(settings)})
    return experiment(asked, settings, items, "attribute-controls", parts, layers=[cell[0]], controls=True)


def vectors(asked: Asked, settings: Settings, items: Items) -> Experiment:
    """The source vectors, for the probe: the logit lens is the cheapest scope."""
    keys = list(dict.fromkeys((item.prompt, item.at) for item in items.items))
    prompts = [{"text": text, "at": at, "labels": {"at": at}} for text, at in keys]
    parts = [{"name": "vectors", "prompts": prompts, "scope": ["logit-lens"]}]
    outputs = {"vectors": True}
    return experiment(
        asked, settings, items, "attribute-probe", parts, layers=settings.layers, controls=False, tokens=None, outputs=outputs
    )


def _spread_of(settings: Settings) -> dict[str, Any]:
    """Of a scope; nothing where it is the usual one, so that such runs are those of before."""
    return {} if settings.spread == "here" else {"spread": settings.spread}


def parts_of(items: Items, scope: dict[str, Any]) -> list[dict[str, Any]]:
    """A part for each relation: its entities, each where it is mentioned, through the relation in words."""
    parts = []
    for relation, target, some in by_target(items):
        keys = list(dict.fromkeys((item.prompt, item.at) for item in some))
        prompts = [{"text": text, "at": at, "labels": {"at": at}} for text, at in keys]
        parts.append({"name": relation, "prompts": prompts, "scope": [{"name": target, "prompt": target, **scope}]})
    return parts


def by_target(items: Items) -> list[tuple[str, str, list[Item]]]:
    """(name of the part, target prompt, items); a relation with several target prompts has a part for each."""
    found: dict[tuple[str, str], list[Item]] = {}
    for item in items.items:
        found.setdefault((item.relation, item.target), []).append(item)
    several = {relation for relation, n in Counter(relation for relation, _ in found).items() if n > 1}
    return [(f"{r}: {target}" if r in several else r, target, some) for (r, target), some in found.items()]
