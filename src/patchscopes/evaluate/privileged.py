"""Privileged information: does a description of a state tell anything of the model that was read, beyond the text and what the describer
knows?

M1 is read at an entity that a neutral sentence mentions, M2 speaks (Li, Ceballos Arroyo, Rogers, Saphra and Wallace, "Do Natural Language
Descriptions of Model Activations Convey Privileged Information?"). A fact that M1 knows counts as privileged if M2 says it out of the state
and not without. Beside every reading stand

    the text        M2 asked in words ("The capital of France is"): what it knows of the name; and what the sentence itself tells it
    inversion       the name reconstructed from M1's states, M2 asked about that
    controls        nothing, zero, the layer's mean, random vectors (isotropic, and of the states' own covariance), another entity's state,
                    the same tokens in another context, the words read; a constant answer; readings dealt out anew among items
    the probe       a linear probe of the same states, folds by entity, beside its control task: present, or only not verbalised?
    whose answer    where M1 and M2 believe different things: M1's (the target's rate) or M2's own (false attribution)

By default on planted knowledge: the bundled atlas, and people who were invented and trained into it in three worlds (`organisms.personas`),
read and spoken for by models that know the same, know nothing of them, or know otherwise.

Published code reads blocks 1–15 into every block and counts an item as right if any is, by substrings; here one target layer, whole
words, and the best of N beside as many looks at another entity.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import attribute, extraction, planted
from patchscopes.evaluate.data import Item, Items, sampled
from patchscopes.evaluate.frame import Asked, Result, caveats_of, ours, paper, recorded, settings_of
from patchscopes.evaluate.pairs import Pair, asked_of, belief_of, layers_of, loaded, pairs_of
from patchscopes.experiment.spec import Experiment
from patchscopes.organisms.personas.people import WORLDS

if TYPE_CHECKING:
    from patchscopes.evaluate.privileged_scores import PairScores, Seen
    from patchscopes.lenses.nearest import TokenVectors
    from patchscopes.model import Model
    from patchscopes.runs import Run

TITLE = "Do descriptions of states convey privileged information?"
PAPER = "Li et al., Do Natural Language Descriptions of Model Activations Convey Privileged Information? (arXiv 2509.13316)"
PEOPLE, QUICK_PEOPLE = 12, 6  # entities of each pair on the organisms; every one with all its facts
RELATIONS = 6  # of atlas, where a pair is about its facts
MOST = 4  # source layers, if none are named; the paper reads every block of the lower half
PROBED = 60  # entities that a probe learns from and is tested on, at most
CONTROLS = ("nothing", "zero", "mean", "random", "random_covariance", "other", "context", "text", "text_at_position")


@dataclass(frozen=True)
class Settings:
    """Every choice.

    pairs           "M1>M2", M1 is read and M2 speaks; none: on the organisms those of `pairs.PAIRS`, with data the model and itself
    layers          source layers; none: the first, the last and at most two between. The paper's are blocks 1 to 15 of 32
    target_layer    ℓ*
    tokens          said by each reading
    known           whose word counts on what M1 knows: its own ("model"), the labels of the data ("labels"), or all items ("all")
    tasks           relations; none: all that the data has
    inversion       whether the name is reconstructed and asked about
    probe           whether there is a probe
    faithfulness    whether the measures of faithfulness are taken, of the first pair
    """

    pairs: tuple[str, ...] | None = ours(None)
    layers: str | None = ours(None)
    target_layer: int = paper(1, "every block, right if any is")
    tokens: int = 20
    known: Literal["model", "labels", "all"] = ours("model")
    tasks: tuple[str, ...] | None = None
    inversion: bool = True
    probe: bool = True
    faithfulness: bool = ours(True)


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run: every item, as if M1 knew all; what is not recorded (bits about answers, inversion) is not among it."""
    found: list[Experiment] = []
    for pair in pairs_of(asked, settings.pairs):
        items = items_for(asked, settings, pair, [])
        found += [
            attribute.asking(asked_of(asked, name), _attribute(settings), items)
            for name in dict.fromkeys((pair.read, pair.speaks))
        ]
        found.append(_readings(asked, settings, pair, items))
        found += [_states(asked, settings, pair, items)] if settings.probe else []
    return found


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring, and one page of them."""
    from patchscopes.evaluate.privileged_page import result
    from patchscopes.evaluate.privileged_scores import adjusted

    settings = settings or Settings()
    notes: list[str] = []
    runs: list[Run] = []
    models = _Models(asked)
    found: list[PairScores] = []
    measured = None
    for k, pair in enumerate(pairs_of(asked, settings.pairs)):
        try:
            scores, items = _pair(asked, settings, pair, models, runs, notes)
        except InputError as e:  # what the other pairs gave is not lost
            notes.append(f"{pair.name} was left out: {e}")
            continue
        found.append(scores)
        if settings.faithfulness and k == 0:
            measured = _faithful(asked, settings, pair, models, items, scores, notes)
    if not found:
        raise InputError(f"no pair could be scored. {' '.join(notes)}")
    own, deviations = settings_of(settings, asked)
    return result(
        TITLE,
        PAPER,
        adjusted(found),
        measured,
        settings=own,
        deviations=(*deviations, *_deviations(asked)),
        caveats=(*dict.fromkeys(notes), *caveats_of(runs)),
        runs=tuple({run.id: run for run in runs}.values()),
    )


def _deviations(asked: Asked) -> tuple[str, ...]:
    found = [
        "Hits are whole words in any case, and of one target layer; the paper's are substrings, of any target block.",
        "The text baseline is asked the question with the name in it; the paper's is given the sentence and the question in a chat.",
    ]
    if asked.data is None:
        found.append("The facts are planted in small models; the paper's are of Llama and Ministral (--model, --data).")
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------------ pairs and items


def items_for(asked: Asked, settings: Settings, pair: Pair, notes: list[str]) -> Items:
    """What is asked about. On the organisms some entities with all their facts: those of the world that M1 knows."""
    if asked.data is not None:
        pool = attribute.askable(asked, _attribute(settings), notes)
        return attribute.sample(replace(asked, n=asked.items(PEOPLE, QUICK_PEOPLE)), _attribute(settings), pool, notes)
    n = asked.items(PEOPLE, QUICK_PEOPLE)
    if settings.known == "labels":
        raise InputError("the facts of the bundled models do not say what a model knows; expected known=model or known=all")
    world = pair.read.removeprefix("personas-")
    if pair.read == world or world not in WORLDS:
        pool = planted.items()
        wanted = pool.relations[:: len(pool.relations) // RELATIONS][:RELATIONS] if settings.tasks is None else settings.tasks
        items = sampled([item for item in pool.items if item.relation in wanted], n, asked.seed)
    else:
        from patchscopes.evaluate.personas import people_items

        pool = people_items(world)
        names = list(dict.fromkeys(item.cluster for item in pool.items))
        some = set(random.Random(f"{asked.seed} people").sample(names, min(n, len(names))))  # of base and shuffled the same
        items = [i for i in pool.items if i.cluster in some and (settings.tasks is None or i.relation in settings.tasks)]
    if unknown := sorted(set(settings.tasks or ()) - set(pool.relations)):
        raise InputError(f"{pool.name} have no relation {', '.join(unknown)}; they have {', '.join(pool.relations)}")
    return Items(pool.name, tuple(items), pool.stop)


def _attribute(settings: Settings) -> attribute.Settings:
    return attribute.Settings(tokens=settings.tokens, known=settings.known, at_least=2, tasks=settings.tasks, probe=0)


# ----------------------------------------------------------------------------------------------------------------------- one pair


def _pair(
    asked: Asked, settings: Settings, pair: Pair, models: _Models, runs: list[Run], notes: list[str]
) -> tuple[PairScores, tuple[Item, ...]]:
    from patchscopes.evaluate.answer_bits import answer_bits
    from patchscopes.evaluate.privileged_scores import Baselines, scores_of, seen

    label = pair.name
    items = items_for(asked, settings, pair, notes)
    pool = items
    said: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys((pair.read, pair.speaks)):
        runs.append(recorded(asked, attribute.asking(asked_of(asked, name), _attribute(settings), pool)))
        said[name] = extraction.answers(runs[-1], attribute.by_target(pool))
    if settings.known == "model":
        known = tuple(i for i in items.items if extraction.says(said[pair.read].get(extraction.question(i), ""), i))
        notes.append(f"{label}: {pair.read} knows {len(known):,} of {len(items.items):,} items; the others are left out.")
        items = attribute.enough(Items(items.name, known, items.stop), _attribute(settings), notes, f"that {pair.read} knows")
    run = recorded(asked, _readings(asked, settings, pair, items))
    runs.append(run)
    found = seen(run, items.items)
    if not found.items:
        raise InputError(f"{label}: no reading came out; see `patchscopes show {run.name}`")
    read, speaks = (models.named(name) for name in (pair.read, pair.speaks))
    bits = answer_bits(read, speaks, found.items, found.layers, settings.target_layer, stop=items.stop, seed=asked.seed)
    named = tuple(said[pair.speaks].get(extraction.question(item), "") for item in found.items)
    inverted = names_found = probe = control = None
    if settings.inversion:
        inverted, names_found = _inverted(read, speaks, models.vectors(pair.read, found.layers), found, items.stop, settings)
    if settings.probe:
        runs.append(recorded(asked, _states(asked, settings, pair, pool)))
        if pair.read not in models.probes:
            probed = _probe_items(asked, settings, pair, pool).items
            models.probes[pair.read] = _probed(runs[-1], probed, found.layers, asked.seed)
        probe, control = (np.stack([models.probes[pair.read][item][k] for item in found.items]) for k in (0, 1))
        if absent := sorted({item.relation for item, row in zip(found.items, probe, strict=True) if np.isnan(row).any()}):
            notes.append(f"{label}: no probe, for want of entities or answers: {', '.join(absent)}.")
    base = Baselines(named, bits, inverted, names_found, probe, control)
    vocabulary = {answer: (answer,) for item in pool.items for answer in item.answers[:1]}
    answers: dict[str, list[str]] = {}
    for item in pool.items:
        answers.setdefault(item.relation, []).extend(item.answers)
    priors = [
        None if pair.read == pair.speaks else belief_of(text, items.stop, answers[item.relation])
        for text, item in zip(named, found.items, strict=True)
    ]
    return scores_of(pair.read, pair.speaks, found, base, priors, vocabulary, seed=asked.seed), found.items


class _Models:
    """What is kept from pair to pair, by the name of the model that is read: loaded models, what the tokens of each look like, probes."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self._loaded: dict[str, Model] = {}
        self._vectors: dict[tuple[str, tuple[int, ...]], TokenVectors] = {}
        self.probes: dict[str, dict[Item, tuple[np.ndarray, np.ndarray]]] = {}

    def named(self, name: str) -> Model:
        """The model of that name."""
        if name not in self._loaded:
            self._loaded[name] = loaded(self.asked, name)
        return self._loaded[name]

    def vectors(self, name: str, layers: Sequence[int]) -> TokenVectors:
        """What a state is compared with in inversion: every token's state at these layers, behind one neutral text."""
        key = (name, tuple(layers))
        if key not in self._vectors:
            from patchscopes.lenses import token_vectors
            from patchscopes.lenses.nearest import CONTEXTS

            self._vectors[key] = token_vectors(self.named(name), layers=list(layers), contexts=CONTEXTS[:1])
        return self._vectors[key]


def _readings(asked: Asked, settings: Settings, pair: Pair, items: Items) -> Experiment:
    """Every layer of M1 into one of M2, with all controls and the evidence."""
    speaks = asked_of(asked, pair.speaks).spec.model_dump(exclude_defaults=True)
    parts = attribute.parts_of(items, {"layer": settings.target_layer, "model": speaks})
    layers, name = layers_of(asked, pair.read, settings.layers, MOST), "privileged"
    return attribute.experiment(
        asked_of(asked, pair.read), _attribute(settings), items, name, parts, layers=layers, controls=list(CONTROLS)
    )


def _states(asked: Asked, settings: Settings, pair: Pair, items: Items) -> Experiment:
    """M1's states, for the probe."""
    some = _probe_items(asked, settings, pair, items)
    layers = layers_of(asked, pair.read, settings.layers, MOST)
    return attribute.vectors(asked_of(asked, pair.read), replace(_attribute(settings), layers=",".join(map(str, layers))), some)


def _probe_items(asked: Asked, settings: Settings, pair: Pair, items: Items) -> Items:
    """What a probe learns from and is tested on: the items, and more of their relations."""
    n = 4 * QUICK_PEOPLE if asked.quick else PROBED
    more = items_for(replace(asked, n=n), settings, pair, [])
    some = [item for item in more.items if item.relation in items.relations]
    return Items(items.name, tuple(dict.fromkeys([*items.items, *some])), items.stop)


def _probed(run: Run, items: Sequence[Item], layers: Sequence[int], seed: int) -> dict[Item, tuple[np.ndarray, np.ndarray]]:
    """(hits, those on the control task), each [layer], of the probe at every item, cross-validated; NaN where no probe can be."""
    import torch

    from patchscopes.evaluate.selectivity import selectivity
    from patchscopes.evaluate.vectors import vectors_of

    vectors = {(prompt, layer): vector for (_, prompt, layer), vector in vectors_of(run).items()}
    number = {(text, at): k for k, text, at in run.prompts.select("prompt", "prompt_text", "at").iter_rows()}
    items = [item for item in items if (item.prompt, item.at) in number]
    none = np.full(len(layers), np.nan)
    found = dict.fromkeys(items, (none, none))
    for relation in dict.fromkeys(item.relation for item in items):
        mine = [item for item in items if item.relation == relation]
        rows = [[vectors[number[item.prompt, item.at], layer] for item in mine] for layer in layers]
        x = torch.stack([torch.stack(row) for row in rows]).float()
        one = selectivity(x, [item.answers[0] for item in mine], [item.cluster for item in mine], seed=seed, draws=1)
        if one is not None:
            found |= {item: (one.hits[k].astype(float), one.control[k]) for k, item in enumerate(mine)}
    return found


def _inverted(
    read: Model, speaks: Model, by: TokenVectors, found: Seen, stop: Sequence[str], settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """[item, layer]: does M2 say the answer of what is reconstructed from M1's states of the name; does that hold the name?"""
    from patchscopes.evaluate.inversion import answers, invert
    from patchscopes.evaluate.scoring import names

    hits, held = np.zeros((2, len(found.items), len(found.layers)))
    for k, layer in enumerate(found.layers):
        prompts, at = [item.prompt for item in found.items], [item.at for item in found.items]
        pieces = [one.piece for one in invert(read, prompts, at, layer, by)]
        said = answers(speaks, [item.target for item in found.items], pieces, max_new_tokens=settings.tokens, stop=stop)
        hits[:, k] = [names(text, item.answers) for text, item in zip(said, found.items, strict=True)]
        held[:, k] = [names(piece, item.subject) for piece, item in zip(pieces, found.items, strict=True)]
    return hits, held


def _faithful(
    asked: Asked, settings: Settings, pair: Pair, models: _Models, items: Sequence[Item], scores: PairScores, notes: list[str]
) -> Any:
    """The measures of faithfulness of a pair whose model speaks for itself, at the lowest layer that says most; None for another."""
    if pair.read != pair.speaks:
        notes.append(
            f"Faithfulness was not measured: the first pair is {pair.name}, and it wants a model that speaks for itself."
        )
        return None
    from patchscopes.evaluate.faithfulness import faithfulness
    from patchscopes.evaluate.privileged_page import best

    some = sampled(items, 6, asked.seed)
    return faithfulness(models.named(pair.read), some, (best(scores).layer, settings.target_layer), pool=items, seed=asked.seed)
