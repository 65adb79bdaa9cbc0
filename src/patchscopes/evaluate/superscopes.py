"""Superscopes: do more true statements come out of an entity's state when it is amplified, and can α be chosen without labels?

Entities whose names have several words are read at their last token and described by the few-shot scope, written α times as large
(Jacobi and Niv 2025, arXiv 2503.02078). v is the output or the input of the MLP of block b, or the state behind the block; it is written
at layer b + 1, as in the paper's evaluation, or at layer 1, as in its application. Four ways, each with the same N = len(alphas) tries:

    plain       α = 1, N draws
    amplified   every α of `alphas` once
    matched     v at the length of what it replaces, N draws
    guided      α = 1, every w of `weights` once: tokens by p + w (p − u), the form that the paper motivates

A text is true if it names the object of a fact about the entity that its name does not already say. Every way has a block of its own,
chosen on one half of the entities, and is scored on the other half: one try, any of N, and the try that is chosen without labels, by
the most evidence in bits or (for α) by self-similarity and entropy; beside N tries with another entity of its kind, another entity, a
random vector and the mean. The paper's figure, the best of N amplified against one plain draw with an echo of the name as success, is
shown as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.evaluate import amplified
from patchscopes.evaluate.amplified import SITES, WAYS, Chosen, Part
from patchscopes.evaluate.entity import drawn, prompts_of
from patchscopes.evaluate.frame import Asked, Result, caveats_of, paper, recorded, settings_of
from patchscopes.evaluate.planted import Entity
from patchscopes.experiment.spec import Experiment

if TYPE_CHECKING:
    from patchscopes.model import Model

TITLE = "Superscopes"
PAPER = "Jacobi and Niv 2025, Superscopes (arXiv 2503.02078)"
EACH, QUICK, WORDS = 3, 2, 2
DEVIATIONS = (
    "A text counts if it states a true fact that the name does not say; the paper's if a sentence encoder finds it near the source "
    "prompt, so that an echo of the prompt counts.",
    "All ways have as many tries; the paper's plain Patchscope has one, its Superscope five.",
    "The draws have a seed; the paper's have none.",
)


@dataclass(frozen=True)
class Settings:
    """Every choice.

    alphas       of the paper's evaluation; its baseline is α = 1. Their number N is that of the tries of every way
    weights      w of guidance, N of them; γ = w + 1 of Sanchez et al. 2023, who find most near γ = 1.5
    sites        what is amplified; the paper's evaluation has mlp_out alone, its application all three
    blocks       b, those of the paper
    written      "block": at layer b + 1; "first": at layer 1
    source       what is read: a sentence that mentions the entity and says nothing of it, or the name alone, as in the paper
    tokens       said at most
    temperature  of the draws; the paper's is that of its checkpoint, without a seed
    stop         what ends a description; the paper has nothing
    read         the layer whose state the criterion of self-similarity compares; none: without it. It needs the model on this machine,
                 since runs do not record such states
    """

    alphas: tuple[float, ...] = (3.0, 6.0, 9.0, 12.0, 15.0)
    weights: tuple[float, ...] = paper((0.5, 1.0, 1.5, 2.0, 3.0), ())
    sites: tuple[str, ...] = paper(SITES, ("mlp_out",))
    blocks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    written: Literal["block", "first"] = "block"
    source: Literal["mention", "name"] = paper("mention", "name")
    tokens: int = 10
    temperature: float = paper(1.0, "that of its checkpoint")
    stop: tuple[str, ...] = paper((",", "\n"), ())
    read: int | None = paper(-1, None)


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run; the controls for half of the entities, at some block."""
    from patchscopes.evaluate.statistics import in_first_half

    _checked(settings)
    entities, _ = _entities(asked)
    half = [e for e in entities if not in_first_half(e.name, asked.seed)]
    some = [part for part in _parts(settings) if part.block == settings.blocks[0]]
    return [_experiment(asked, settings, entities, _parts(settings)), _experiment(asked, settings, half, some, controls=True)]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    _checked(settings)
    entities, notes = _entities(asked)
    parts = _parts(settings)
    grid = recorded(asked, _experiment(asked, settings, entities, parts))
    found = amplified.said_by(grid.table(control="none"), parts, entities, settings.alphas, settings.blocks)
    chosen = amplified.choose(found, settings.blocks, seed=asked.seed)
    half = [found.entities[k] for k in next(iter(chosen.values())).scores]
    some = [part for part in parts if chosen[part.site, part.way].block == part.block]
    control = recorded(asked, _experiment(asked, settings, half, some, controls=True))
    criteria = {} if settings.read is None else _criteria(asked, settings, half, chosen)
    tried = amplified.tried_by(control.table(), some, half, settings.alphas, criteria)
    own, deviations = settings_of(settings, asked)
    return amplified.result(
        TITLE,
        PAPER,
        found,
        chosen,
        tried,
        alphas=settings.alphas,
        weights=settings.weights,
        blocks=settings.blocks,
        seed=asked.seed,
        settings=own,
        deviations=(*deviations, *DEVIATIONS),
        caveats=(
            *notes,
            f"Intervals are of one figure each, not adjusted for {len(settings.sites)} sites and {len(WAYS) - 1} ways; p-values are.",
            *caveats_of([grid, control]),
        ),
        runs=(grid, control),
    )


def _checked(settings: Settings) -> None:
    """InputError or UnknownName for settings that would compare what cannot be compared."""
    if not settings.alphas or not settings.blocks or not settings.sites:
        raise InputError("alphas, blocks and sites are needed, and one of them is empty; expected at least one of each")
    if len(settings.weights) != len(settings.alphas):
        raise InputError(
            f"{len(settings.alphas)} alphas and {len(settings.weights)} weights of guidance were given; expected as many of each, since "
            "the best of several is compared with the best of as many"
        )
    if settings.temperature <= 0:
        raise InputError(
            f"temperature is {settings.temperature:g}, at which {len(settings.alphas)} draws are one and the same; expected more than 0"
        )
    for name, values in (("alphas", settings.alphas), ("weights", settings.weights), ("blocks", settings.blocks)):
        if len(set(values)) < len(values):
            raise InputError(f"{name} are {', '.join(f'{x:g}' for x in values)}; expected each of them once")
    if 1.0 in settings.alphas:
        raise InputError("alphas hold 1, which is the plain Patchscope that they are compared with; expected others alone")
    if not all(map(math.isfinite, (*settings.alphas, *settings.weights))):
        raise InputError("alphas or weights are not all finite; expected numbers")
    if unknown := [site for site in settings.sites if site not in SITES]:
        raise UnknownName(f"unknown site {unknown[0]!r}. {nearest(unknown[0], SITES)}")
    if min(settings.blocks) < 0:
        raise InputError(f"blocks are {', '.join(map(str, settings.blocks))}; expected 0 or more, the first block being 0")


def _entities(asked: Asked) -> tuple[list[Entity], list[str]]:
    return drawn(asked, each=EACH, quick=QUICK, words=WORDS)


# ---------------------------------------------------------------------------------------------------------------------- experiments


def _parts(settings: Settings) -> list[Part]:
    """Every site, block and way; of guidance one for every weight, so that its draws do not share their random numbers."""
    numbers = {way: range(len(settings.weights)) if way == "guided" else [None] for way in WAYS}
    return [
        Part(site, block, way, number)
        for site in settings.sites
        for block in settings.blocks
        for way in WAYS
        for number in numbers[way]
    ]


def _places(settings: Settings, part: Part) -> tuple[int, int]:
    """(what is read: a block, or of the stream the layer behind it; the layer where it is written)."""
    return part.block + (part.site == "resid"), part.block + 1 if settings.written == "block" else 1


def _experiment(
    asked: Asked, settings: Settings, entities: Sequence[Entity], parts: Sequence[Part], *, controls: bool = False
) -> Experiment:
    tables = []
    for part in parts:
        read, written = _places(settings, part)
        scope: dict[str, Any] = {"name": "describe", "preset": "describe", "layer": written, **_way(settings, part)}
        seed = asked.seed + (part.number or 0)
        tables.append({"name": part.name, "site": part.site, "layers": [read], "scope": [scope], "seed": seed})
    return Experiment.model_validate(
        {
            "name": "superscopes-controls" if controls else "superscopes",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "prompts": prompts_of(entities, settings.source),
            "tokens": settings.tokens,
            "stop": list(settings.stop),
            "temperature": settings.temperature,
            "controls": controls,
            "on_bad_prompt": "skip",
            "parts": tables,
        }
    )


def _way(settings: Settings, part: Part) -> dict[str, Any]:
    """What the scope of a way has of its own."""
    n = len(settings.alphas)
    if part.number is not None:
        return {"guidance": settings.weights[part.number]}
    return {
        "plain": {"draws": n},
        "amplified": {"map": [{"scale": alpha} for alpha in settings.alphas]},
        "matched": {"write": "replace_matched", "draws": n},
    }[part.way]


# ------------------------------------------------------------------------------------------------------------------------ criterion


def _criteria(
    asked: Asked, settings: Settings, entities: Sequence[Entity], chosen: dict[tuple[str, str], Chosen]
) -> dict[str, np.ndarray]:
    """Of every site [entity, α]: the criterion of self-similarity and entropy at the block that was chosen for amplification."""
    from patchscopes.scopes import Source, describe
    from patchscopes.scopes.superscopes import criterion, superscope

    model, found = _model(asked), {}
    prompts = prompts_of(entities, settings.source)
    for site in settings.sites:
        read, written = _places(settings, Part(site, chosen[site, "amplified"].block, "amplified"))
        scope = superscope(settings.alphas, scope=describe(layer=written, max_new_tokens=settings.tokens, stop=settings.stop))
        sources = [Source(model, one["text"], position=one["at"], layer=read, site=site) for one in prompts]
        table = criterion(scope, sources, read=settings.read if settings.read is not None else -1)
        by_prompt = table.sort("prompt", maintain_order=True)["criterion"].to_numpy()
        found[site] = by_prompt.reshape(len(entities), len(settings.alphas))
    return found


def _model(asked: Asked) -> Model:
    from patchscopes.runs.conditions import load_spec

    return (asked.models or {}).get(asked.spec.key) or load_spec(asked.spec)
