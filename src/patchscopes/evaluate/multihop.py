"""Multi-hop self-correction: does a question of two hops come out right if the second hop goes on from the state that ends the first?

For questions whose hops the model both knows: the state at layer ℓ of the end of the first hop's phrase π1 is patched at layer ℓ* into
the second hop's, for all ℓ and ℓ*; a question is corrected if some pair says the answer (Ghandeharioun et al. 2024, section 5, appendix F).

    phrases   S = π1, T = π2 ("The capital of"), i* its last token: two prompts, as in the published code
    slot      S = π1, T = π2 as a sentence with x in the first hop's place ("The capital of x is"), i* = x
    query     T = S = [π2][π1], i its last token, i* the token before π1: the paper's other form

The paper's 50 % is the share of all questions with known hops, answered ones among them, for which some one of 1,600 pairs says the
answer; beside it stands one try of the question. That figure is given here, too, over a sample of such questions and this model's
pairs. In the others the failed and the answered questions are kept apart, and beside the best of N stand as many tries with the state
of another question of the sample (of the same second relation, with another bridge and answer) and with random vectors, and one pair
that was chosen on half of the bridge entities: how many failed questions it corrects, and how many answered ones it keeps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import statistics, tries
from patchscopes.evaluate.frame import Asked, Bars, Result, Table, caveats_of, ours, paper, recorded, settings_of
from patchscopes.evaluate.hops import (
    Outcome,
    Question,
    asking,
    at_least,
    ending_in_slot,
    filtered,
    funnel,
    questions_of,
    right,
    said,
    some_of,
    strangers,
)
from patchscopes.evaluate.tries import KINDS, Hits
from patchscopes.experiment.spec import Experiment

if TYPE_CHECKING:
    import polars as pl

    from patchscopes.runs import Run

TITLE = "Multi-hop self-correction"
PAPER = "Ghandeharioun et al. 2024, Patchscopes, section 5 and appendix F"
N, QUICK_N, MOST, QUICK_MOST = 800, 240, 48, 8
STEP_BY_STEP = "Let's think step by step. "
FORMS = ("phrases", "slot", "query")
DIFFERENT = (
    "The questions are not those of the paper, whose file is not published.",
    "The paper's figure is taken over a sample (`most`) of the questions whose hops are known, and with this model's pairs, not 1,600.",
)


@dataclass(frozen=True)
class Settings:
    """Every choice, as in the paper.

    tokens      said at most
    forms       of those in the module's docstring
    layers      source layers, and target layers
    test        "paper": an answer anywhere in the text; "words": as whole words
    most        failed questions that are patched, and as many answered ones, at most
    shortcuts   whether questions with a shortcut are kept, as in the paper
    """

    tokens: int = 20
    forms: tuple[str, ...] = paper(FORMS, ("phrases", "query"))
    layers: str = "1:"
    target_layers: str = "1:"
    test: Literal["paper", "words"] = "paper"
    most: int | None = ours(None)
    shortcuts: bool = True

    def __post_init__(self) -> None:
        some_of("forms", self.forms, FORMS)
        some_of("test", (self.test,), ("paper", "words"))
        at_least("tokens", self.tokens, 1)
        at_least("most", self.most, 1)


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run: the questions in all forms, and as many as may be patched."""
    questions, _, stop = _questions(asked)
    some = questions[: _most(asked, settings)]
    one = dict.fromkeys(settings.forms, (1, 1))
    found = [_asking(asked, settings, questions, stop)]
    for pairs in (None, one):
        found.append(_patching(asked, settings, some, stop, pairs))
        others = strangers(some, asked.seed)
        found += [_others(asked, settings, some, others, stop, pairs)] if any(others) else []
    return [*found, _patching(asked, settings, some, stop, controls=False)]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    questions, notes, stop = _questions(asked)
    first = recorded(asked, _asking(asked, settings, questions, stop))
    texts = said(first)
    outcomes = filtered(questions, texts, settings.test)
    known = [one for one in outcomes if one.knows and (settings.shortcuts or one.studied) and one.question.second is not None]
    failed = [one.question for one in known if not one.passed["composition"]][: _most(asked, settings)]
    answered = [one.question for one in known if one.passed["composition"]][: _most(asked, settings)]
    if not failed:
        raise InputError(
            f"the model fails at none of {len(known):,} questions of two hops that it knows; give more questions (--n)"
        )
    runs = [first]
    found = _tried(asked, settings, failed, stop, runs)
    scores = {form: figures(hits, failed, asked.seed) for form, hits in found.items()}
    pairs = {form: own["pair"] for form, own in scores.items() if "pair" in own}
    if pairs and answered:
        for form, hits in _tried(asked, settings, answered, stop, runs, pairs).items():
            scores[form] |= kept(hits, answered, asked.seed)
    sample = known[: _most(asked, settings)]
    for form, hits in _papers(asked, settings, sample, failed, found, stop, runs).items():
        scores[form] |= papers(hits, sample, asked.seed)
    own, deviations = settings_of(settings, asked)
    return result(
        failed,
        answered,
        found,
        scores,
        asked_scores(known, texts, settings.test, asked.seed),
        funnel(outcomes),
        asked.seed,
        settings=own,
        deviations=(*deviations, *DIFFERENT),
        caveats=(*notes, *tries.alone(found), *caveats_of(runs)),
        runs=tuple(runs),
    )


def _most(asked: Asked, settings: Settings) -> int:
    return settings.most or (QUICK_MOST if asked.quick else MOST if asked.data is None else 10**9)


def _questions(asked: Asked) -> tuple[list[Question], list[str], tuple[str, ...]]:
    """A sample, drawn by the seed, of those that can be taken apart; notes; what ends an answer."""
    data = ending_in_slot(questions_of(asked.data))
    items = list(data.items)
    random.Random(asked.seed).shuffle(items)
    return items[: asked.items(N, QUICK_N)], list(data.notes), data.stop


def _asking(asked: Asked, settings: Settings, questions: Sequence[Question], stop: Sequence[str]) -> Experiment:
    texts = [text for one in questions for text in (*one.prompts.values(), STEP_BY_STEP + one.text)]
    return asking(asked, "two-hop-asked", texts, tokens=settings.tokens, stop=stop)


def _source(form: str, question: Question) -> tuple[str, dict[str, Any]]:
    """The source prompt of a question, and the scope of all that share its second relation."""
    second = question.second or ""
    if form == "query":
        return question.text.removesuffix(" is"), {"preset": "back-patch", "at": f"{second}#1"}
    sentence = f"{question.r2.replace('{}', '{x}')} is"
    return question.phrase, {"prompt": sentence} if form == "slot" else {"prompt": second, "at": -1}


def _tried(
    asked: Asked,
    settings: Settings,
    questions: Sequence[Question],
    stop: Sequence[str],
    runs: list[Run],
    pairs: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Hits]:
    """Of each form the tries of these questions with their own and with other states; the runs are added to `runs`."""
    runs.append(recorded(asked, _patching(asked, settings, questions, stop, pairs)))
    table = runs[-1].table(status="ok")
    forms = settings.forms if pairs is None else tuple(pairs)
    found = _hits(table, forms, questions, settings.test)
    read = tries.read(table, [[(_part(form, one), _source(form, one)[0]) for form in found] for one in questions])
    others = strangers(questions, asked.seed, read)
    if any(others):
        runs.append(recorded(asked, _others(asked, settings, questions, others, stop, pairs)))
        table = runs[-1].table(status="ok")
        for form in found:
            tried = [
                None if other is None else (_others_part(form, one, k), _source(form, other)[0])
                for k, (one, other) in enumerate(zip(questions, others, strict=True))
            ]
            found[form] = tries.beside(found[form], table, tried, questions, settings.test)
    return found


def _papers(
    asked: Asked,
    settings: Settings,
    sample: Sequence[Outcome],
    failed: Sequence[Question],
    found: Mapping[str, Hits],
    stop: Sequence[str],
    runs: list[Run],
) -> dict[str, np.ndarray]:
    """[question] of each form: whether some pair says the answer, of a sample of all questions whose hops are known. The failed ones among
    them have been tried."""
    answered = [one.question for one in sample if one.passed["composition"]]
    some: dict[str, Hits] = {}
    if answered:
        runs.append(recorded(asked, _patching(asked, settings, answered, stop, controls=False)))
        some = _hits(runs[-1].table(status="ok"), tuple(found), answered, settings.test)
    hit: dict[str, np.ndarray] = {}
    for form, hits in found.items():
        said = dict(zip(failed, statistics.any_of(hits.hits["none"]), strict=True))
        if form in some:
            said |= dict(zip(answered, statistics.any_of(some[form].hits["none"]), strict=True))
        hit[form] = np.array([said.get(one.question, False) for one in sample], bool)
    return hit


def _part(form: str, question: Question) -> str:
    return f"{form}: {question.second}"


def _others_part(form: str, question: Question, k: int) -> str:
    """What shares a target prompt is one part; in the form "query" each question is a target of its own."""
    return f"query {k}" if form == "query" else _part(form, question)


def _hits(table: pl.DataFrame, forms: Sequence[str], questions: Sequence[Question], test: str) -> dict[str, Hits]:
    """Of each form that has readings at all; a question that has none is a miss."""
    wanted = {form: [(_part(form, one), _source(form, one)[0], one) for one in questions] for form in forms}
    found = {form: tries.hits_at(table, some, test) for form, some in wanted.items()}
    return {form: hits for form, hits in found.items() if hits.pairs}


def _patching(
    asked: Asked,
    settings: Settings,
    questions: Sequence[Question],
    stop: Sequence[str],
    pairs: Mapping[str, tuple[int, int]] | None = None,
    *,
    controls: bool = True,
) -> Experiment:
    """Every pair of layers; or of each form only the one in `pairs`."""
    parts: dict[str, dict[str, Any]] = {}
    for form in settings.forms if pairs is None else pairs:
        layer, other = (settings.layers, settings.target_layers) if pairs is None else pairs[form]
        for one in questions:
            text, scope = _source(form, one)
            scope |= {"name": form, "layer": other, "tokens": settings.tokens}
            part = parts.setdefault(_part(form, one), {"prompts": {}, "scope": scope, "layers": layer})
            part["prompts"][text] = {"text": text, "at": -1}
    name = "multihop-kept" if pairs is not None else "multihop" if controls else "multihop-answered"
    return _experiment(asked, name, parts, stop, controls=controls)


def _others(
    asked: Asked,
    settings: Settings,
    questions: Sequence[Question],
    others: Sequence[Question | None],
    stop: Sequence[str],
    pairs: Mapping[str, tuple[int, int]] | None = None,
) -> Experiment:
    """The same pairs with the strangers' states in the questions' targets."""
    parts: dict[str, dict[str, Any]] = {}
    for form in settings.forms if pairs is None else pairs:
        layer, other_layer = (settings.layers, settings.target_layers) if pairs is None else pairs[form]
        for k, (one, other) in enumerate(zip(questions, others, strict=True)):
            if other is None:
                continue
            text, scope = _source(form, one)
            if form == "query":  # whose target is the question itself
                scope = {"prompt": text, "at": scope["at"]}
            scope |= {"name": form, "layer": other_layer, "tokens": settings.tokens}
            part = parts.setdefault(_others_part(form, one, k), {"prompts": {}, "scope": scope, "layers": layer})
            source = _source(form, other)[0]
            part["prompts"][source] = {"text": source, "at": -1}
    return _experiment(asked, f"multihop-{'' if pairs is None else 'kept-'}others", parts, stop, controls=False)


def _experiment(
    asked: Asked, name: str, parts: Mapping[str, dict[str, Any]], stop: Sequence[str], *, controls: bool
) -> Experiment:
    return Experiment.model_validate(
        {
            "name": name,
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "stop": list(stop),
            "controls": controls,
            "evidence": False,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
            "parts": [{"name": name, **part, "prompts": list(part["prompts"].values())} for name, part in parts.items()],
        }
    )


# ---------------------------------------------------------------------------------------------------------------------------- scoring


def asked_scores(known: Sequence[Outcome], texts: dict[str, str], test: str, seed: int) -> dict[str, Any]:
    """How many questions whose hops are known are answered as they are, and behind "Let's think step by step." """
    clusters = [one.question.e2[0] for one in known]
    plain = [float(bool(one.passed["composition"])) for one in known]
    stepwise = [float(right(texts.get(STEP_BY_STEP + one.question.text), one.question.e3, test)) for one in known]
    return {
        "vanilla": statistics.rate(plain, clusters, seed=seed),
        "step_by_step": statistics.rate(stepwise, clusters, seed=seed),
    }


def figures(found: Hits, failed: Sequence[Question], seed: int = 0) -> dict[str, Any]:
    """Those of `tries.figures` among the failed questions and all pairs."""
    return tries.figures(found, np.ones(len(found.pairs), bool), [one.e2[0] for one in failed], seed)


def kept(found: Hits, answered: Sequence[Question], seed: int = 0) -> dict[str, Any]:
    """How many answered questions are right under the one pair."""
    scores = {}
    for kind in (kind for kind in KINDS if kind in found.hits):
        rows = found.rows(kind)
        clusters = [one.e2[0] for one in compress(answered, rows)]
        scores[f"kept {kind}"] = statistics.rate(found.hits[kind][rows, 0].astype(float), clusters, seed=seed)
    return scores


def papers(hit: np.ndarray, sample: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
    """The paper's figure: of all questions whose hops are known, those that it answers anyway among them, for how many some pair says the
    answer; and how many of the same ones it answers as they are asked. hit: [question]."""
    clusters = [one.question.e2[0] for one in sample]
    plain = np.array([bool(one.passed["composition"]) for one in sample])
    return {
        "paper": statistics.rate(hit.astype(float), clusters, seed=seed),
        "paper vanilla": statistics.rate(plain.astype(float), clusters, seed=seed),
    }


def claim(form: str, scores: dict[str, Any]) -> str:
    """What may be said, whichever way it points."""
    told = f"{form}: some one of {scores['n_tries']} pairs corrects {scores['any_of_N none']} of the failed questions"
    if "any_of_N other" in scores:
        p = scores["p"]
        told += f", as many tries with another question's state {scores['any_of_N other']} (McNemar p = {p:.2g}: "
        told += (
            "no difference shown)"
            if p >= 0.05
            else f"the {'own state' if scores['over_other'].value > 0 else 'other'} is better)"
        )
    if "any_of_N random" in scores:
        told += f", with random vectors {scores['any_of_N random']}"
    told += f". One try corrects {scores['per_try none']}"
    told += f", another's state {scores['per_try other']}" if "per_try other" in scores else ""
    if "held_out none" in scores:
        layer, other = scores["pair"]
        told += f". One pair, {layer} into {other}, chosen on other bridge entities, corrects {scores['held_out none']}"
        told += f", with another question's state {scores['held_out other']}" if "held_out other" in scores else ""
        told += f"; of answered questions it keeps {scores['kept none']}" if "kept none" in scores else ""
    if "paper" in scores:
        told += f". The paper's figure, some pair over all questions whose hops are known: {scores['paper']}, asked as they are "
        told += f"{scores['paper vanilla']}"
    return told + "."


def result(
    failed: Sequence[Question],
    answered: Sequence[Question],
    found: dict[str, Hits],
    scores: dict[str, dict[str, Any]],
    plain: dict[str, Any],
    counts: Sequence[tuple[str, int]],
    seed: int,
    **more: Any,
) -> Result:
    """As the frame has it. The p-values of several forms are adjusted together (Holm)."""
    tested = [form for form in scores if "p" in scores[form]]
    for form, p in zip(tested, statistics.holm([scores[form]["p"] for form in tested]), strict=True):
        scores[form]["p"] = p
    headline: dict[str, Any] = {"asked as it is": plain["vanilla"], "asked step by step": plain["step_by_step"]}
    rows = []
    for form, own in scores.items():
        n = own["n_tries"]
        headline |= {f"{form}: the paper's, any of {n}, answered ones too": own["paper"]} if "paper" in own else {}
        for kind, name in KINDS.items():
            if f"any_of_N {kind}" in own:
                headline[f"{form}: {name}, any of {n}"] = own[f"any_of_N {kind}"]
                headline |= {f"{form}: {name}, held-out pair": own[f"held_out {kind}"]} if "pair" in own else {}
            values = (tries.share(own.get(f"{figure} {kind}")) for figure in ("per_try", "any_of_N", "held_out", "kept"))
            rows.append((form, name, *values))
    columns = ("a try", "any of N", "held-out pair", "answered, kept")
    bars = [(name, tuple(own.get(f"any_of_N {kind}") for own in scores.values())) for kind, name in KINDS.items()]
    return Result(
        "multihop",
        TITLE,
        PAPER,
        (
            f"Of the questions both of whose hops it knows the model answers {plain['vanilla']}; "
            f"told to think step by step {plain['step_by_step']}.",
            *(claim(form, own) for form, own in scores.items()),
        ),
        headline,
        {"asked": plain, "forms": scores, "funnel": dict(counts), "failed": len(failed), "answered": len(answered)},
        (
            Table("Questions", "How many are left after each filter", ("filter", "questions"), tuple(counts)),
            Table(
                "Corrected",
                "Share of failed questions that came out right; and of answered ones that the held-out pair keeps right",
                ("form", "what is written", *columns),
                tuple(rows),
                columns,
            ),
            Table(
                "The paper's figure",
                "Share of all questions whose hops are known, a sample of them, that come out right: asked as they are, or by some pair",
                ("form", "asked as they are", "any of N"),
                tuple(
                    (form, tries.share(own["paper vanilla"]), tries.share(own["paper"]))
                    for form, own in scores.items()
                    if "paper" in own
                ),
                ("asked as they are", "any of N"),
            ),
        ),
        (
            Bars(
                "corrected",
                "Failed questions corrected by some one of N pairs, 95 % intervals",
                "share",
                tuple(scores),
                tuple(bars),
            ),
            *(tries.heat(form, hits, scores[form].get("pair")) for form, hits in found.items()),
        ),
        **more,
    )
