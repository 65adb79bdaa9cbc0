"""The evidence of readings, examined: does it tell true readings from false, is it calibrated, and what is it as an estimator?

Items whose facts are known are read in M1 and said by M2. A reading is true if it names the fact that M1 holds. On the same readings stand
side by side

    the evidence    bits over others, random vectors, nothing, the text; the share of the surprise explained; the p-value
    its rivals      log p of the text as it was generated; agreement of draws at temperature 1 (the share that says what the greedy
                    reading says), a confidence that needs no evidence

by AUROC and as calibrated confidences, for each pair of models; in some of them M2 believes otherwise than M1, or knows nothing of it.
Then, of the first pair: texts that stand-ins brought forth, weighed as if they were readings (the null), and the bits themselves by the
number of looks, their prefixes, the number and the kind of the other sources (the estimator). See `evidence_scores`.

Related: InfoNCE (van den Oord et al. 2018), leave-one-out bounds (Poole et al. 2019); semantic agreement of samples as a confidence
(Kuhn et al. 2023); risk–coverage (El-Yaniv and Wiener 2010).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchscopes.core.errors import InputError
from patchscopes.evaluate import attribute, extraction, planted, privileged
from patchscopes.evaluate.data import Item, Items, sampled
from patchscopes.evaluate.evidence_scores import AGREEMENT, EVIDENCE, LOG_P, Weighed, complete
from patchscopes.evaluate.frame import Asked, Result, caveats_of, ours, recorded, settings_of
from patchscopes.evaluate.pairs import Pair, asked_of, belief_of, layers_of, loaded, pairs_of
from patchscopes.evaluate.scoring import names
from patchscopes.experiment.spec import Experiment

if TYPE_CHECKING:
    from patchscopes.evaluate.evidence_scores import Raw
    from patchscopes.evaluate.evidence_weighing import Key, Pretended, Scoped
    from patchscopes.model import Model
    from patchscopes.runs import Run

TITLE = "Is evidence calibrated, and does it tell true readings from false?"
PAPER = "van den Oord et al. 2018 (InfoNCE); Poole et al. 2019; El-Yaniv and Wiener 2010; Guo et al. 2017"
EACH, QUICK_EACH = 12, 6  # people of each pair
OF_EACH = 3  # of atlas, which has many relations, a third as many items of each
QUICK_EVERY = 4  # relation of atlas
MOST = 4  # source layers, if none are named
RELATIONS, OTHERS, WEIGHED = 4, 49, 8  # of the bench: relations, prompts of each, and those of them that are weighed
QUICK_RELATIONS, QUICK_OTHERS, QUICK_WEIGHED = 2, 30, 3


@dataclass(frozen=True)
class Settings:
    """Every choice.

    pairs         "M1>M2", M1 is read and M2 speaks; none: on the organisms those of `pairs.PAIRS`, with data the model and itself
    layers        source layers; none: the first, the last and at most two between
    target_layer  ℓ*
    tokens        said by each reading
    draws         of which the agreement is taken, at temperature 1
    tasks         relations; none: all that the data has
    bench         whether the null and the estimator are examined, of the first pair
    """

    pairs: tuple[str, ...] | None = ours(None)
    layers: str | None = ours(None)
    target_layer: int = ours(1)
    tokens: int = ours(12)
    draws: int = ours(8)
    tasks: tuple[str, ...] | None = ours(None)
    bench: bool = ours(True)


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be recorded; what is weighed beside it is not among it."""
    _checked(settings)
    found: list[Experiment] = []
    for pair in pairs_of(asked, settings.pairs):
        items = _items(asked, settings, pair, [])
        found += [_readings(asked, settings, pair, items), _drawn(asked, settings, pair, items)]
        found += [_asking(asked, settings, pair, items)] if pair.read != pair.speaks else []
    return found


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    from patchscopes.evaluate.evidence_page import result
    from patchscopes.evaluate.evidence_weighing import joined

    settings = settings or Settings()
    _checked(settings)
    notes: list[str] = []
    runs: list[Run] = []
    models: dict[str, Model] = {}
    readings: list[Weighed] = []
    pairs = pairs_of(asked, settings.pairs)
    for pair in pairs:
        readings += _weighed(asked, settings, pair, models, runs, notes)
    kept = complete(readings)
    if not kept:
        raise InputError(f"none of {len(readings):,} readings has evidence; see `patchscopes show {runs[0].name}`")
    if len(kept) < len(readings):
        notes.append(f"{len(readings) - len(kept):,} of {len(readings):,} readings lack some score and are left out of all.")
    pretended: list[Pretended] = []
    raw: Raw | None = None
    if settings.bench:
        pretended, some = _bench(asked, settings, pairs[0], models)
        raw = joined(some)
    own, deviations = settings_of(settings, asked)
    return result(
        TITLE,
        PAPER,
        kept,
        pretended,
        raw,
        pairs[0].name,
        asked.seed,
        settings=own,
        deviations=deviations,
        caveats=(*dict.fromkeys(notes), *caveats_of(runs)),
        runs=tuple({run.id: run for run in runs}.values()),
    )


def _checked(settings: Settings) -> None:
    for name, least in (("tokens", 1), ("draws", 2), ("target_layer", 0)):
        if (value := getattr(settings, name)) < least:
            raise InputError(f"{name} is {value}; expected {least} or more")


# ------------------------------------------------------------------------------------------------------------------ what is recorded


def _privileged(settings: Settings) -> privileged.Settings:
    """Pairs and items are those of that experiment."""
    return privileged.Settings(pairs=settings.pairs, tasks=settings.tasks, known="all")


def _attribute(settings: Settings) -> attribute.Settings:
    return attribute.Settings(tokens=settings.tokens, known="all", at_least=1, tasks=settings.tasks, probe=0)


def _items(asked: Asked, settings: Settings, pair: Pair, notes: list[str]) -> Items:
    """Of people each with all facts; of atlas some facts of every relation."""
    n = asked.items(EACH, QUICK_EACH)
    if asked.data is None and settings.tasks is None and not pair.read.startswith("personas-"):
        pool = planted.items()
        wanted = pool.relations[:: QUICK_EVERY if asked.quick else 1]
        some = [item for item in pool.items if item.relation in wanted]
        return Items(pool.name, tuple(sampled(some, max(2, n // OF_EACH), asked.seed)), pool.stop)
    return privileged.items_for(replace(asked, n=n), _privileged(settings), pair, notes)


def _experiment(asked: Asked, settings: Settings, pair: Pair, items: Items, name: str, **more: Any) -> Experiment:
    speaks = asked_of(asked, pair.speaks).spec.model_dump(exclude_defaults=True)
    parts = attribute.parts_of(items, {"layer": settings.target_layer, "model": speaks})
    layers = layers_of(asked, pair.read, settings.layers, MOST)
    return attribute.experiment(asked_of(asked, pair.read), _attribute(settings), items, name, parts, layers=layers, **more)


def _readings(asked: Asked, settings: Settings, pair: Pair, items: Items) -> Experiment:
    """With their evidence, which is the same whatever control rows there are: the cheapest is asked for."""
    return _experiment(asked, settings, pair, items, "evidence", controls=["nothing"])


def _drawn(asked: Asked, settings: Settings, pair: Pair, items: Items) -> Experiment:
    """The same, sampled."""
    more = {"controls": False, "temperature": 1.0, "draws": settings.draws}
    return _experiment(asked, settings, pair, items, "evidence-draws", **more)


def _asking(asked: Asked, settings: Settings, pair: Pair, items: Items) -> Experiment:
    """What M2 answers in words."""
    return attribute.asking(asked_of(asked, pair.speaks), _attribute(settings), items)


def _weighed(
    asked: Asked, settings: Settings, pair: Pair, models: dict[str, Model], runs: list[Run], notes: list[str]
) -> list[Weighed]:
    """The readings of a pair, with all scores."""
    items = _items(asked, settings, pair, notes)
    run = recorded(asked, _readings(asked, settings, pair, items))
    drawn = recorded(asked, _drawn(asked, settings, pair, items))
    runs += [run, drawn]
    priors: Mapping[str, str] = {}
    if pair.read != pair.speaks:
        runs.append(recorded(asked, _asking(asked, settings, pair, items)))
        priors = extraction.answers(runs[-1], attribute.by_target(items))
    answers: dict[str, list[str]] = {}
    for item in items.items:
        answers.setdefault(item.relation, []).extend(item.answers)
    columns = ("text", "verdict", *(column for column, _ in EVIDENCE.values()))
    table = run.table(control="none", status="ok").select("part", "prompt_text", "at", "source_layer", *columns)
    read = {row[:4]: dict(zip(columns, row[4:], strict=True)) for row in table.iter_rows()}
    draws: dict[tuple[str, str, str, int], list[str]] = {}
    for *key, text in drawn.table(status="ok").select("part", "prompt_text", "at", "source_layer", "text").iter_rows():
        draws.setdefault((key[0], key[1], key[2], key[3]), []).append(text)
    by = _scoped(asked, settings, pair, models, items.stop)
    found = []
    for part, _, some in attribute.by_target(items):
        from patchscopes.evaluate.evidence_weighing import log_p_of

        log_p = log_p_of(by, some)
        for item in some:
            prior = belief_of(priors.get(extraction.question(item), ""), items.stop, answers[item.relation]) if priors else None
            for layer in by.layers:
                row = read.get((part, item.prompt, item.at, layer))
                if row is not None:
                    texts = draws.get((part, item.prompt, item.at, layer), [])
                    found.append(_reading(pair.name, item, layer, row, texts, log_p, prior))
    return found


def _reading(
    pair: str,
    item: Item,
    layer: int,
    row: Mapping[str, Any],
    draws: Sequence[str],
    log_p: Mapping[Key, tuple[str, float]],
    prior: str | None,
) -> Weighed:
    from patchscopes.evaluate.agreement import same_text

    text = row["text"]
    scores = {name: sign * _number(row[column]) for name, (column, sign) in EVIDENCE.items()}
    scores[AGREEMENT] = sum(same_text(one, text) for one in draws) / len(draws) if draws else math.nan
    # a run on another machine may have said something else where two tokens were all but equally likely
    said, total = log_p.get((item.prompt, item.at, layer), ("", math.nan))
    scores[LOG_P] = total if said == text else math.nan
    true = names(text, item.answers)
    above = row["verdict"] == "above"
    return Weighed(pair, item.relation, item.cluster, layer, text, item.answers, prior, true, above, scores)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# ------------------------------------------------------------------------------------------------------------- what is weighed here


def _model(asked: Asked, name: str, models: dict[str, Model]) -> Model:
    """Each loaded once."""
    if name not in models:
        models[name] = loaded(asked, name)
    return models[name]


def _scoped(asked: Asked, settings: Settings, pair: Pair, models: dict[str, Model], stop: Sequence[str]) -> Scoped:
    from patchscopes.evaluate.evidence_weighing import Scoped

    read, speaks = (_model(asked, name, models) for name in (pair.read, pair.speaks))
    layers = tuple(layers_of(asked, pair.read, settings.layers, MOST))
    return Scoped(read, speaks, layers, settings.target_layer, settings.tokens, tuple(stop))


def _bench(asked: Asked, settings: Settings, pair: Pair, models: dict[str, Model]) -> tuple[list[Pretended], list[Raw]]:
    """Of some relations, each with as many prompts as it takes to have others to spare."""
    from patchscopes.evaluate.evidence_weighing import bench

    relations, others, weighed = (QUICK_RELATIONS, QUICK_OTHERS, QUICK_WEIGHED) if asked.quick else (RELATIONS, OTHERS, WEIGHED)
    items = privileged.items_for(replace(asked, n=others), _privileged(settings), pair, [])
    by = _scoped(asked, settings, pair, models, items.stop)
    pretended: list[Pretended] = []
    found: list[Raw] = []
    groups = [some for *_, some in attribute.by_target(items)]
    for some in groups[:: max(1, len(groups) // relations)][:relations]:
        one, raw = bench(by, some, weighed, seed=asked.seed)
        pretended += one
        found += [raw] if raw is not None else []
    return pretended, found
