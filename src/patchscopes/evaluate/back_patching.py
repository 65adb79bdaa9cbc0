"""Back-patching: does a failed question of two hops come out right if a late state is written back at an earlier layer?

For a question that the model fails though it knows both facts and has no shortcut: the state at layer ℓ of the end of the first hop's
phrase ("bridge"), or of the last token, replaces that at layer ℓ* of the same place, for all 1 ≤ ℓ* < ℓ ≤ L; the question is corrected
if some pair says the answer (Biran et al. 2024, section 6).

That is the best of N = L(L−1)/2 tries. The paper compares it with nothing; here the same N tries are made with random vectors of
the same norm, with the state of another question that fails, of the same second relation but with another bridge and answer, at the
same place and layers, with the mean of other prompts, and forward (ℓ < ℓ*). Beside it stand the rate of one try, and one pair (ℓ, ℓ*)
chosen on half of the bridge entities and scored on the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate import statistics, tries
from patchscopes.evaluate.frame import Asked, Bars, Result, Table, caveats_of, ours, recorded, settings_of
from patchscopes.evaluate.hops import Question, asking, at_least, filtered, funnel, questions_of, said, some_of, strangers
from patchscopes.evaluate.tries import KINDS, Hits, hits_of
from patchscopes.experiment.spec import Experiment

TITLE = "Back-patching"
PAPER = "Biran et al. 2024, Hopping Too Late, section 6"
N, QUICK_N, MOST, QUICK_MOST = 1200, 240, 64, 12
PLACES = ("bridge", "last")


@dataclass(frozen=True)
class Settings:
    """Every choice, as in the paper.

    tokens      said at most
    positions   where it is read and written: "bridge", the last token of the first hop's phrase; "last", the prompt's last token
    test        "paper": an answer anywhere in the text; "words": as whole words
    most        failed questions that are patched, at most
    """

    tokens: int = 10
    positions: tuple[str, ...] = PLACES
    test: Literal["paper", "words"] = "paper"
    most: int | None = ours(None)

    def __post_init__(self) -> None:
        some_of("positions", self.positions, PLACES)
        some_of("test", (self.test,), ("paper", "words"))
        at_least("tokens", self.tokens, 1)
        at_least("most", self.most, 1)


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run: the questions in all forms, and as many failed ones as there may be."""
    questions, _, stop = _questions(asked)
    some = questions[: _most(asked, settings)]
    found = [_asking(asked, settings, questions, stop), _patching(asked, settings, some, stop)]
    others = strangers(some, asked.seed)
    return [*found, _others(asked, settings, some, others, stop)] if any(others) else found


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    questions, notes, stop = _questions(asked)
    first = recorded(asked, _asking(asked, settings, questions, stop))
    outcomes = filtered(questions, said(first), settings.test)
    failed = [one.question for one in outcomes if one.studied and not one.passed["composition"]]
    if not failed:
        raise InputError(
            f"the model fails at none of {len(questions):,} questions whose hops it knows without a shortcut; give more questions (--n)"
        )
    chosen = failed[: _most(asked, settings)]
    second = recorded(asked, _patching(asked, settings, chosen, stop))
    table = second.table(status="ok")
    found = {where: hits_of(table, chosen, where, settings.test) for where in settings.positions}
    strict = {where: hits_of(table, chosen, where, "words") for where in settings.positions}
    runs = [first, second]
    read = tries.read(table, [[(where, one.text) for where in settings.positions] for one in chosen])
    others = strangers(chosen, asked.seed, read)
    if any(others):
        runs.append(recorded(asked, _others(asked, settings, chosen, others, stop)))
        table = runs[-1].table(status="ok")
        for where in settings.positions:
            tried = [None if other is None else (f"{where} {k}", other.text) for k, other in enumerate(others)]
            found[where] = tries.beside(found[where], table, tried, chosen, settings.test)
            strict[where] = tries.beside(strict[where], table, tried, chosen, "words")
    own, deviations = settings_of(settings, asked)
    return result(
        chosen,
        found,
        strict,
        funnel(outcomes),
        asked.seed,
        settings=own,
        deviations=deviations,
        caveats=(*notes, *tries.alone(found), *caveats_of(runs)),
        runs=tuple(runs),
    )


def _most(asked: Asked, settings: Settings) -> int:
    return settings.most or (QUICK_MOST if asked.quick else MOST if asked.data is None else 10**9)


def _questions(asked: Asked) -> tuple[list[Question], list[str], tuple[str, ...]]:
    """A sample, drawn by the seed; notes; what ends an answer."""
    import random

    data = questions_of(asked.data)
    items = list(data.items)
    random.Random(asked.seed).shuffle(items)
    return items[: asked.items(N, QUICK_N)], list(data.notes), data.stop


def _asking(asked: Asked, settings: Settings, questions: Sequence[Question], stop: Sequence[str]) -> Experiment:
    texts = [text for one in questions for text in one.prompts.values()]
    return asking(asked, "two-hop-asked", texts, tokens=settings.tokens, stop=stop)


def _at(where: str, question: Question) -> str | int:
    return question.phrase if where == "bridge" else -1


def _patching(asked: Asked, settings: Settings, questions: Sequence[Question], stop: Sequence[str]) -> Experiment:
    texts = {one.text: one for one in questions}
    return Experiment.model_validate(
        {
            "name": "back-patching",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "layers": "1:",
            "scope": {"preset": "back-patch", "layer": "1:", "tokens": settings.tokens},
            "stop": list(stop),
            "evidence": False,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
            "parts": [
                {"name": where, "prompts": [{"text": text, "at": _at(where, one)} for text, one in texts.items()]}
                for where in settings.positions
            ],
        }
    )


def _others(
    asked: Asked, settings: Settings, questions: Sequence[Question], others: Sequence[Question | None], stop: Sequence[str]
) -> Experiment:
    """Of every question a part "<place> <k>": the stranger's state, written into this question at the same place, by the same pairs."""
    return Experiment.model_validate(
        {
            "name": "back-patching-others",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "layers": "1:",
            "stop": list(stop),
            "controls": False,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
            "parts": [
                {
                    "name": f"{where} {k}",
                    "prompts": [{"text": other.text, "at": _at(where, other)}],
                    "scope": {"prompt": one.text, "at": _at(where, one), "layer": "1:", "tokens": settings.tokens},
                }
                for where in settings.positions
                for k, (one, other) in enumerate(zip(questions, others, strict=True))
                if other is not None
            ],
        }
    )


# ---------------------------------------------------------------------------------------------------------------------------- scoring


def figures(found: Hits, clusters: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Those of `tries.figures` among the pairs ℓ > ℓ*; beside them as many forward."""
    layers = np.array(found.pairs).reshape(-1, 2)
    back, ahead = layers[:, 0] > layers[:, 1], layers[:, 0] < layers[:, 1]
    forward = found.hits["none"][:, ahead]
    return {
        **tries.figures(found, back, clusters, seed),
        "any_of_N forward": statistics.rate(statistics.any_of(forward).astype(float), clusters, seed=seed),
        "per_try forward": statistics.rate(statistics.per_draw(forward), clusters, seed=seed),
    }


def claim(where: str, scores: dict[str, Any]) -> str:
    """What may be said, whichever way it points."""
    own, other = scores["any_of_N none"], scores.get("any_of_N other")
    place = "at the end of the first hop's phrase" if where == "bridge" else "at the last token"
    told = f"Back-patching {place}: some one of {scores['n_tries']} pairs corrects {own} of the failed questions"
    if other is None:
        return f"{told}; no other question's state was there to compare with."
    told += f"; as many tries with another question's state correct {other}, with random vectors {scores['any_of_N random']}, "
    told += f"forward patches {scores['any_of_N forward']}. One try corrects {scores['per_try none']}, another's state "
    told += f"{scores['per_try other']}. "
    p = scores["p"]
    if p >= 0.05:
        told += f"The question's own state does no better than another's (McNemar p = {p:.2g}): "
        return told + "that its first hop came too late is not shown."
    if scores["over_other"].value > 0:
        return told + f"The question's own state does better than another's (McNemar p = {p:.2g})."
    return told + f"Another question's state does better than the question's own (McNemar p = {p:.2g})."


def result(
    questions: Sequence[Question],
    found: dict[str, Hits],
    strict: dict[str, Hits],
    counts: Sequence[tuple[str, int]],
    seed: int,
    **more: Any,
) -> Result:
    """As the frame has it. The p-values of several places are adjusted together (Holm)."""
    clusters = [one.e2[0] for one in questions]
    scores = {where: figures(hits, clusters, seed) for where, hits in found.items()}
    words = {where: figures(hits, clusters, seed) for where, hits in strict.items()}
    tested = [where for where in scores if "p" in scores[where]]
    for where, p in zip(tested, statistics.holm([scores[where]["p"] for where in tested]), strict=True):
        scores[where]["p"] = p
    headline: dict[str, Any] = {}
    for where, own in scores.items():
        n = own["n_tries"]
        headline |= {
            f"{where}: {name}, any of {n}": own[f"any_of_N {kind}"] for kind, name in KINDS.items() if f"any_of_N {kind}" in own
        }
        headline[f"{where}: forward, any of {n}"] = own["any_of_N forward"]
        headline |= {
            f"{where}: {name}, held-out pair": own[f"held_out {kind}"]
            for kind, name in KINDS.items()
            if f"held_out {kind}" in own
        }
        headline[f"{where}: back-patched, any of {n}, whole words"] = words[where]["any_of_N none"]
    rows = [
        (where, name, *(tries.share(own.get(f"{figure} {kind}")) for figure in ("per_try", "any_of_N", "held_out")))
        for where, own in scores.items()
        for kind, name in {**KINDS, "forward": "forward, ℓ < ℓ*"}.items()
    ]
    return Result(
        "back-patching",
        TITLE,
        PAPER,
        tuple(claim(where, own) for where, own in scores.items()),
        headline,
        {"places": scores, "whole_words": words, "funnel": dict(counts), "questions": len(questions)},
        (
            Table("Questions", "How many are left after each filter", ("filter", "questions"), tuple(counts)),
            Table(
                "Corrected",
                "Share of failed questions that came out right: a try, the best of N tries, one pair chosen on other bridge entities",
                ("place", "what is written", "a try", "any of N", "held-out pair"),
                tuple(rows),
                ("a try", "any of N", "held-out pair"),
            ),
        ),
        (_bars(scores), *(tries.heat(where, hits, scores[where].get("pair")) for where, hits in found.items())),
        **more,
    )


def _bars(scores: dict[str, dict[str, Any]]) -> Bars:
    kinds = {**KINDS, "forward": "forward"}
    series = [(name, tuple(own.get(f"any_of_N {kind}") for own in scores.values())) for kind, name in kinds.items()]
    return Bars(
        "corrected", "Failed questions corrected by some one of N tries, 95 % intervals", "share", tuple(scores), tuple(series)
    )
