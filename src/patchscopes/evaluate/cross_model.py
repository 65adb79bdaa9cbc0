"""Cross-model patching: can one model say what another one's states hold, once an affine map carries them over?

A state h of M at layer ℓ and position i goes through f(h) = W h + b into layer ℓ* of M*, which speaks (Ghandeharioun et al. 2024, 4.4 and
appendix E). f is fitted by least squares to states of both models at the same characters of other texts (`maps.fit`), for every pair
(ℓ, ℓ*) of a grid. Two questions:

    next token   does M* say the token that M itself says next?  precision@1 = 1[argmax p̃ = argmax p_M], and the surprisal
                 −log2 p_M[argmax p̃] in bits, of M's own distribution. Scopes: token identity (as the paper's text has it), and T = S (as
                 its published code has it), where the rest of the text helps M*
    attributes   with M's last token of an entity, does M* say the entity's attribute, which both models know?

The floors that the map must beat, for each pair: **shuffled**, an affine map fitted to pairs that do not belong together; **unmapped**, h
itself, cut or filled up with zeros where widths differ, at the length that states have at ℓ* (h as it is where they do not). For next
tokens the ceiling is M* reading the text itself. For attributes the best of N pairs stands beside the best of as many for another
entity's vector, a random one, the mean, and nothing. One pair chosen on one half of the texts, or entities, is scored on the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import attribute, extraction, next_token, planted
from patchscopes.evaluate.cross_model_maps import MAPPED, Pair, maps_of, stand_ins
from patchscopes.evaluate.cross_model_scores import SOURCE, TARGET, attribute_hits, next_token_scores, result
from patchscopes.evaluate.data import Items
from patchscopes.evaluate.frame import Asked, Result, caveats_of, ours, recorded, settings_of
from patchscopes.experiment.spec import Experiment

TITLE = "Cross-model patching"
PAPER = "Ghandeharioun et al. 2024, Patchscopes, section 4.4 and appendix E"
TEXTS, QUICK_TEXTS, EACH, QUICK_EACH, FIT, QUICK_FIT = 80, 24, 3, 2, 1500, 400
MOST = 9  # layers of a model in the grid, if none are named; the paper takes every fifth block of 32 and 40
SCOPES: dict[str, dict[str, Any]] = {"token identity": {"preset": "identity"}, "same text": {"preset": "back-patch", "tokens": 1}}


@dataclass(frozen=True)
class Settings:
    """Every choice.

    source          M, the model that is read; the experiment's `model` is M*, which speaks
    layers          of M, and
    target_layers   of M*: those of the grid; none: the first, the last and at most seven between. Attributes leave out 0 and L
    scopes          of `SCOPES`
    texts           a file of texts, as for next-token; none: of the kind that the bundled models were trained on
    read            texts of which next tokens are read; none: 80
    fit             texts that maps are fitted to, at most; none: 1500. Those that are read are not among them
    unseen          whether those that mention an entity that is asked about are not, either
    map             a file of maps that `maps.fit(…).save` wrote, instead of fitting; none: fitted
    tokens, known, at_least, tasks     of attributes, as in that experiment; known=model asks both models
    """

    source: str = ours("atlas-small")
    layers: str | None = ours(None)
    target_layers: str | None = ours(None)
    scopes: tuple[str, ...] = ("token identity", "same text")
    texts: str | None = ours(None)
    read: int | None = ours(None)
    fit: int | None = ours(None)
    unseen: bool = ours(False)
    map: str | None = ours(None)
    tokens: int = 20
    known: Literal["model", "labels", "all"] = "model"
    at_least: int = ours(2)
    tasks: tuple[str, ...] | None = ours(None)


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run: every item, as if both models knew all. Fitting, which comes first, is not among it."""
    pair = _models(asked, settings)
    items = _items(asked, settings, [])
    maps = {name: {"file": str(path)} for name, path in stand_ins(pair).items()}
    prompts = _prompts(asked, settings, pair, _texts(asked, settings, []))
    found = [_next_tokens(asked, settings, pair, prompts, maps)]
    if settings.known == "model":
        found += [attribute.asking(one, _attribute(settings), items) for one in _both(asked, pair)]
    return [*found, _attributes(asked, settings, pair, items, maps)]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    pair = _models(asked, settings)
    notes: list[str] = []
    items = _items(asked, settings, notes)
    texts = _texts(asked, settings, notes)
    prompts = _prompts(asked, settings, pair, texts)
    given = None if settings.map is None else Path(settings.map)
    files, reports = maps_of(asked, pair, _to_fit(asked, settings, texts, prompts, items), given)
    maps = {name: {"file": str(path)} for name, path in files.items()}
    tokens = recorded(asked, _next_tokens(asked, settings, pair, prompts, maps))
    runs = [tokens]
    if settings.known == "model":
        said = [recorded(one, attribute.asking(one, _attribute(settings), items)) for one in _both(asked, pair)]
        knows = [extraction.knows(run, attribute.by_target(items)) for run in said]
        kept = tuple(item for item in items.items if all(item in known for known in knows))
        notes.append(
            f"Of {len(items.items):,} items {pair.source.name} knows {len(knows[0]):,}, {pair.target.name} {len(knows[1]):,}, both "
            f"{len(kept):,}; the others are left out."
        )
        items = attribute.enough(Items(items.name, kept, items.stop), _attribute(settings), notes, "that both models know")
        runs += said
    runs.append(recorded(asked, _attributes(asked, settings, pair, items, maps)))
    if not pair.one_vocabulary:
        notes.append(
            f"{pair.source.name} and {pair.target.name} have different tokens: next tokens are compared as texts, so that a token that the "
            "other model has not counts as a miss; there is no surprisal, and no scope with T = S."
        )
    own, deviations = settings_of(settings, asked)
    more = {
        "settings": own,
        "deviations": (*deviations, *_deviations(asked, settings)),
        "caveats": (*notes, *caveats_of([tokens, runs[-1]])),
        "runs": tuple(runs),
    }
    return result(
        TITLE,
        PAPER,
        pair,
        next_token_scores(tokens, one_vocabulary=pair.one_vocabulary, seed=asked.seed),
        attribute_hits(runs[-1], items.items),
        items.items,
        reports,
        asked.seed,
        **more,
    )


def _deviations(asked: Asked, settings: Settings) -> tuple[str, ...]:
    found = ["The paper evaluates every fifth block, and reports no floor, no held-out error and no intervals."]
    if settings.texts is None:
        found.append("The texts are of the kind that the bundled models were trained on, not of the Pile (--set texts=FILE).")
    if settings.map is None:
        found.append(f"The paper fits to 100,000 texts, one position of each; here all positions of {_fit(asked, settings):,}.")
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------- models and texts


def _models(asked: Asked, settings: Settings) -> Pair:
    """Both models, without weights unless they were given, and the grid. LayerError if they have no such layers."""
    from patchscopes.core.layers import resolve_layers
    from patchscopes.runs.conditions import outline_spec

    target = asked.spec
    named = {
        **target.model_dump(exclude_defaults=True, exclude={"name", "revision", "trust_remote_code"}),
        "name": settings.source,
    }
    source = Experiment.model_validate({"model": named, "prompts": "x"}).model[0]
    if source.key == target.key:
        raise InputError(f"the source is {source.key!r}, and so is the model that speaks; give another one: --set source=NAME")
    given = asked.models
    if given is not None and (absent := [spec.key for spec in (source, target) if spec.key not in given]):
        raise InputError(f"models were given, but not {', '.join(absent)}; found {', '.join(given)}")
    both = [given[spec.key] if given is not None else outline_spec(spec, "cpu") for spec in (source, target)]
    layers = [
        tuple(sorted(set(_spaced(model.n_layers) if text is None else resolve_layers(text, model.n_layers))))
        for model, text in zip(both, (settings.layers, settings.target_layers), strict=True)
    ]
    return Pair(source, target, both[0], both[1], layers[0], layers[1])


def _spaced(top: int) -> list[int]:
    """The first and the last layer, and some between at even distances."""
    return np.unique(np.linspace(0, top, min(MOST, top + 1)).round().astype(int)).tolist()


def _both(asked: Asked, pair: Pair) -> list[Asked]:
    """The same asked of M, then of M*."""
    return [replace(asked, model=spec.model_dump(exclude_defaults=True)) for spec in (pair.source_spec, pair.target_spec)]


def _fit(asked: Asked, settings: Settings) -> int:
    return settings.fit if settings.fit is not None else QUICK_FIT if asked.quick else FIT


def _texts(asked: Asked, settings: Settings, notes: list[str]) -> list[str]:
    """All there are, each once, in an order drawn by the seed: the first are read, others fitted to. Of planted ones there are
    more than are wanted, since some come twice, and most mention some entity that is asked about."""
    if settings.texts is not None:
        found = next_token.texts(Path(settings.texts), notes)
    else:
        more = 10 if settings.unseen else 2
        found = planted.texts(more * (_fit(asked, settings) + _read(asked, settings)), asked.seed)
    found = list(dict.fromkeys(text for text in found if text.strip()))
    random.Random(f"{asked.seed} cross-model").shuffle(found)
    return found


def _read(asked: Asked, settings: Settings) -> int:
    return settings.read if settings.read is not None else QUICK_TEXTS if asked.quick else TEXTS


def _prompts(asked: Asked, settings: Settings, pair: Pair, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The texts that are read, each up to a position drawn among those at which tokens of both models end, as ids of M and of M*: with
    T = S the next token is that behind the position."""
    from patchscopes.maps.align import aligned

    rng = random.Random(f"{asked.seed} position")
    found: list[dict[str, Any]] = []
    for text in texts:
        if len(found) == _read(asked, settings):
            break
        own, other = (model.tokens(text) for model in (pair.source, pair.target))
        fits = all(m.context is None or len(t) <= m.context for m, t in ((pair.source, own), (pair.target, other)))
        if fits and (both := aligned(own, other)):
            here, there = rng.choice(both)
            found.append({"text": text, "ids": (own.ids[: here + 1], other.ids[: there + 1])})
    if not found:
        raise InputError(
            f"none of the {len(texts):,} texts has tokens of {pair.source.name} and {pair.target.name} that end at one character, beside "
            "its first; give longer texts, one a line"
        )
    return found


def _to_fit(asked: Asked, settings: Settings, texts: Sequence[str], prompts: Sequence[dict[str, Any]], items: Items) -> list[str]:
    """Texts that are not read, and, if so asked, mention nothing that is asked about, as whole words."""
    names = "|".join(re.escape(name) for name in sorted({item.subject for item in items.items}))
    away, read = re.compile(rf"(?<!\w)(?:{names})(?!\w)"), {prompt["text"] for prompt in prompts}
    found = [text for text in texts if text not in read and not (settings.unseen and away.search(text))]
    return found[: _fit(asked, settings)]


def _items(asked: Asked, settings: Settings, notes: list[str]) -> Items:
    """Questions about attributes."""
    pool = attribute.askable(asked, _attribute(settings), notes)
    return attribute.sample(replace(asked, n=asked.items(EACH, QUICK_EACH)), _attribute(settings), pool, notes)


def _attribute(settings: Settings) -> attribute.Settings:
    return attribute.Settings(
        tokens=settings.tokens, known=settings.known, at_least=settings.at_least, tasks=settings.tasks, probe=0
    )


# ----------------------------------------------------------------------------------------------------------------------- experiments


def _next_tokens(
    asked: Asked, settings: Settings, pair: Pair, prompts: Sequence[dict[str, Any]], maps: Mapping[str, Any]
) -> Experiment:
    """What both models say themselves (the logit lens at layer L), and every scope × map over the grid."""
    if unknown := [name for name in settings.scopes if name not in SCOPES]:
        raise InputError(f"unknown scope {unknown[0]!r}; expected some of {', '.join(SCOPES)}")
    source, target = (spec.model_dump(exclude_defaults=True) for spec in (pair.source_spec, pair.target_spec))
    mine, others = ([{"ids": list(one["ids"][k])} for one in prompts] for k in (0, 1))
    lens = {"layers": -1, "scope": ["logit-lens"]}
    parts: list[dict[str, Any]] = [
        {"name": SOURCE, "model": source, "prompts": mine, **lens},
        {"name": TARGET, "model": target, "prompts": others, **lens},
    ]
    for name in settings.scopes:
        if name == "same text" and not pair.one_vocabulary:
            continue  # told as a caveat
        for map_name, f in maps.items():
            scope = {"name": name, **SCOPES[name], "model": target, "map": [f], "layer": list(pair.target_layers)}
            part = {"name": f"{name}, {map_name}", "prompts": mine, "layers": list(pair.layers), "scope": [scope]}
            parts.append({**part, "model": source})
    return Experiment.model_validate(
        {
            "name": "cross-model-tokens",
            "model": source,
            "prompts": mine,
            "controls": False,
            "seed": asked.seed,
            "parts": parts,
        }
    )


def _attributes(asked: Asked, settings: Settings, pair: Pair, items: Items, maps: Mapping[str, Any]) -> Experiment:
    """Every relation through the maps, at the inner layers of the grid; the fitted map with all controls at every pair."""
    layers, others = pair.inner
    if not layers or not others:
        raise InputError(
            f"the grid has the layers {', '.join(map(str, pair.layers))} and {', '.join(map(str, pair.target_layers))}; attributes are "
            "looked for between 1 and L − 1 of each. Name such layers"
        )
    target = pair.target_spec.model_dump(exclude_defaults=True)
    parts = [
        {**part, "name": f"{part['name']}, {name}", "controls": name == MAPPED}
        for name, f in maps.items()
        for part in attribute.parts_of(items, {"layer": others, "model": target, "map": [f]})
    ]
    (mine, _) = _both(asked, pair)
    return attribute.experiment(mine, _attribute(settings), items, "cross-model-attributes", parts, layers=layers, evidence=False)
