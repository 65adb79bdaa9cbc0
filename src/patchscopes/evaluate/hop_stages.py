"""Hopping too late: at which layers a question of two hops is worked out, stage by stage (Biran et al. 2024, sections 4 and 5).

    first hop     lowest layer ℓ of the end of the first hop's phrase (t1) whose description names e2, under any target layer
    propagation   mean of: lowest block around which hiding t1 from the last token changes the answer; lowest block whose attention
                  output at the last token decodes to e2; lowest layer of the last token whose description names e2
    second hop    lowest layer of the last token whose description names e3
    extraction    lowest block whose MLP output at the last token decodes to the token that is said next

Descriptions come from the entity-description prompt of the paper over all (ℓ, ℓ*); outputs are decoded by the logit lens; attention is
knocked out in windows of 2k + 1 blocks. Blocks b are reported as layers b + 1. The lowest of many layers is reached by chance, too:
beside each stage of descriptions stands how often as many tries with another question's state (of those read; the same second relation,
another bridge and answer) name the same entity.

Otherwise than published: a name counts anywhere in a description (test="paper": by the published patterns); greedy, not three samples
(draws=3, temperature=…); hidden from the last token in the prompt only (published for "last"); an output decodes to a name if the token
begins it, two letters at least.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchscopes.core.errors import InputError, PositionError, PromptError
from patchscopes.core.names import SLOT
from patchscopes.evaluate import scoring, statistics, tries
from patchscopes.evaluate.frame import Asked, Line, Lines, Result, Table, caveats_of, ours, paper, recorded, settings_of
from patchscopes.evaluate.hops import (
    Question,
    asking,
    at_least,
    classify,
    ending_in_slot,
    filtered,
    funnel,
    lacking,
    questions_of,
    right,
    said,
    some_of,
    strangers,
)
from patchscopes.experiment.spec import Experiment

if TYPE_CHECKING:
    import polars as pl

    from patchscopes.model import Model

TITLE = "Stages of two hops"
PAPER = "Biran et al. 2024, Hopping Too Late, sections 4 and 5"
N, QUICK_N, MOST, QUICK_MOST = 800, 240, 16, 6
DESCRIBE = (
    "Syria: Syria is a country in the Middle East, Leonardo DiCaprio: Leonardo DiCaprio is an American actor, "
    "Samsung: Samsung is a South Korean multinational corporation, {x}"
)
STAGES = ("first_hop", "propagation", "second_hop", "extraction")

EVERYWHERE = "Attention to t1 is hidden in the prompt only; an output decodes to a name if its token begins the name."


@dataclass(frozen=True)
class Settings:
    """Every choice, as in the paper but for test and draws.

    tokens      said at most
    window      k: blocks on either side of a knockout's centre
    describe    the entity-description prompt
    test        how a description names an entity: "named", as whole words anywhere; "paper", by the published patterns
    draws       descriptions of each state; a name in one of them counts
    temperature 0: greedy, one draw
    most        failed questions, and as many answered ones, at most
    """

    tokens: int = 10
    window: int = 3
    describe: str = DESCRIBE
    test: Literal["named", "paper"] = paper("named", "paper")
    draws: int = paper(1, 3)
    temperature: float = ours(0.0)
    most: int | None = ours(None)

    def __post_init__(self) -> None:
        some_of("test", (self.test,), ("named", "paper"))
        at_least("tokens", self.tokens, 1)
        at_least("window", self.window, 0)
        at_least("draws", self.draws, 1)
        at_least("temperature", self.temperature, 0)
        at_least("most", self.most, 1)
        if self.draws > 1 and self.temperature == 0:
            raise InputError(f"{self.draws} draws at temperature 0 would all be the same; expected a temperature above 0, too")
        if SLOT not in self.describe:
            raise InputError(f"the setting describe is {self.describe!r}; expected {SLOT} where the state goes")


@dataclass(frozen=True)
class Found:
    """Of one question: layers of each stage, None where it is not seen; `null`: layers at which another question's states named its e2 and
    e3, in as many tries, None if there is no such question; `broken`: centres around which hiding t1 changed the answer."""

    layers: Mapping[str, float | None]
    named: Mapping[str, tuple[int, ...]]
    null: Mapping[str, tuple[int, ...]] | None
    broken: tuple[int, ...]


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run."""
    questions, _, stop = _questions(asked)
    some = questions[: 2 * _most(asked, settings)]
    return [_asking(asked, settings, questions, stop), _staging(asked, settings, some, stop)]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    questions, notes, stop = _questions(asked)
    first = recorded(asked, _asking(asked, settings, questions, stop))
    outcomes = filtered(questions, said(first), "paper")
    studied = [one for one in outcomes if one.studied]
    groups = {
        "answered": [one.question for one in studied if one.passed["composition"]][: _most(asked, settings)],
        "failed": [one.question for one in studied if not one.passed["composition"]][: _most(asked, settings)],
    }
    everyone = [question for some in groups.values() for question in some]
    if not everyone:
        raise InputError(f"none of {len(questions):,} questions has two known hops and no shortcut; give more questions (--n)")
    second = recorded(asked, _staging(asked, settings, everyone, stop))
    table = second.table(status="ok")
    read = tries.read(table, [[(place, one.text) for place in ("bridge", "last")] for one in everyone])
    other = dict(zip(everyone, strangers(everyone, asked.seed, read), strict=True))
    found = {name: [stages(table, one, settings.test, other[one]) for one in some] for name, some in groups.items()}
    if note := lacking(sum(one is None for one in other.values()), len(everyone)):
        notes.append(note)
    hidden = set(table.filter(table["part"].str.starts_with("knock-out"))["prompt_text"])
    if unhidden := sum(one.text not in hidden for one in everyone):
        notes.append(
            f"of {unhidden:,} of {len(everyone):,} questions t1 could not be hidden: it is not a token before the last one"
        )
    own, deviations = settings_of(settings, asked)
    return result(
        groups,
        found,
        funnel(outcomes),
        asked.seed,
        settings=own,
        deviations=(*deviations, EVERYWHERE),
        caveats=(*notes, *caveats_of([first, second])),
        runs=(first, second),
    )


def _most(asked: Asked, settings: Settings) -> int:
    return settings.most or (QUICK_MOST if asked.quick else MOST if asked.data is None else 10**9)


def _questions(asked: Asked) -> tuple[list[Question], list[str], tuple[str, ...]]:
    """A sample, drawn by the seed, of questions whose phrase stands right before the last token."""
    data = ending_in_slot(questions_of(asked.data))
    items = list(data.items)
    random.Random(asked.seed).shuffle(items)
    return items[: asked.items(N, QUICK_N)], list(data.notes), data.stop


def _asking(asked: Asked, settings: Settings, questions: Sequence[Question], stop: Sequence[str]) -> Experiment:
    texts = [text for one in questions for text in one.prompts.values()]
    return asking(asked, "two-hop-asked", texts, tokens=settings.tokens, stop=stop)


def _staging(asked: Asked, settings: Settings, questions: Sequence[Question], stop: Sequence[str]) -> Experiment:
    """One experiment: descriptions of both places, knockouts, and both sublayers through the logit lens."""
    texts = {one.text: one for one in questions}
    last = [{"text": text, "at": -1} for text in texts]
    bridge = [{"text": text, "at": one.phrase} for text, one in texts.items()]
    described = {
        "layers": "1:",
        "scope": [{"name": "describe", "prompt": settings.describe, "layer": "1:", "tokens": settings.tokens}],
        "stop": ["\n"],
        "draws": settings.draws,
        "temperature": settings.temperature,
    }
    lens = {"prompts": last, "layers": "all", "scope": ["logit-lens"]}
    model = _model(asked)
    return Experiment.model_validate(
        {
            "name": "hop-stages",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "controls": False,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
            "parts": [
                {"name": "bridge", "prompts": bridge, **described},
                {"name": "last", "prompts": last, **described},
                *(
                    {
                        "name": f"knock-out {-back}",
                        "prompts": [{"text": text, "at": -1} for text in some],
                        "layers": [0],
                        "scope": knock_outs(model.n_layers, settings.window, settings.tokens, asked.runs / "edits", back),
                        "stop": list(stop),
                    }
                    for back, some in from_the_end(model, list(texts.values())).items()
                ),
                {"name": "attn_out", "site": "attn_out", **lens},
                {"name": "mlp_out", "site": "mlp_out", **lens},
            ],
        }
    )


def _model(asked: Asked) -> Model:
    """With its tokens and its number of blocks; weights are not needed."""
    if asked.models:
        return next(iter(asked.models.values()))
    from patchscopes.runs.conditions import outline_spec

    return outline_spec(asked.spec, "cpu")


def from_the_end(model: Model, questions: Sequence[Question]) -> dict[int, list[str]]:
    """The questions' texts by how many tokens from the end t1 stands, the last one counted: 2 where " is" is one token. Those that cannot
    be read, of which the run tells, and those whose t1 is part of the last token, which is not hidden from itself, are not there."""
    found: dict[int, list[str]] = {}
    for one in questions:
        try:
            tokens = model.tokens(one.text)
            back = len(tokens) - tokens.position(one.phrase)
        except (PromptError, PositionError):
            continue
        if back > 1:
            found.setdefault(back, []).append(one.text)
    return found


def windows(blocks: int, k: int) -> list[tuple[int, int]]:
    """For each centre c the blocks [first, last] of its window, clipped at the ends."""
    return [(max(0, c - k), min(blocks - 1, c + k)) for c in range(blocks)]


def knock_outs(blocks: int, k: int, tokens: int, folder: Path, back: int = 2) -> list[dict[str, Any]]:
    """Scopes of T = S that hide the token `back` from the end (2: the one before the last) from the last one, in a window around each
    block, and one that hides nothing ("-1"). The state at layer 0 is written onto itself, which no knockout touches. Edits are saved in
    `folder`."""
    from patchscopes.core.edits import knock_out, save_edits
    from patchscopes.core.files import make_folder

    make_folder(folder)
    scopes: list[dict[str, Any]] = [{"name": "-1", "preset": "back-patch", "layer": 0, "tokens": tokens}]
    for c, (first, last) in enumerate(windows(blocks, k)):
        path = folder / f"knock-out-{back}-{first}-{last}.safetensors"
        save_edits(str(path), knock_out(f"{first}:{last + 1}", -1, -back))
        scopes.append({"name": str(c), "preset": "back-patch", "layer": 0, "tokens": tokens, "edits": str(path)})
    return scopes


# ---------------------------------------------------------------------------------------------------------------------------- scoring


def stages(table: pl.DataFrame, question: Question, test: str, other: Question | None = None) -> Found:
    """The stages of one question, of the run's table. other: the question whose states are held against this one's entities."""
    rows = table.filter(table["prompt_text"] == question.text)
    named = {
        f"{which} at {place}": _described(rows, place, which, question, test)
        for place, which in (("bridge", "e2"), ("last", "e2"), ("last", "e3"))
    }
    null = None
    if other is not None:
        theirs = table.filter(table["prompt_text"] == other.text)
        null = {
            f"{which} at {place}": _described(theirs, place, which, question, test)
            for place, which in (("bridge", "e2"), ("last", "e2"), ("last", "e3"))
        }
    answers = {
        int(c): (text, token)
        for c, text, token in rows.filter(rows["part"].str.starts_with("knock-out"))
        .select("scope", "text", "next_token_id")
        .iter_rows()
    }
    plain, token = answers.get(-1, ("", -1))
    broken = tuple(
        sorted(
            c
            for c, (text, _) in answers.items()
            if c >= 0 and text != plain and not (right(text, question.e3) and right(plain, question.e3))
        )
    )
    attention = _of(rows, "attn_out").select("source_layer", "next_token").iter_rows()
    mlp = _of(rows, "mlp_out").select("source_layer", "next_token_id").iter_rows()
    reached = [
        _lowest([c + 1 for c in broken]),
        _lowest([b + 1 for b, text in attention if begins(text, question.e2)]),
        _lowest(named["e2 at last"]),
    ]
    there = [layer for layer in reached if layer is not None]
    layers = {
        "first_hop": _lowest(named["e2 at bridge"]),
        "propagation": sum(there) / len(there) if there else None,
        "second_hop": _lowest(named["e3 at last"]),
        "extraction": _lowest([b + 1 for b, own in mlp if own == token]),
    }
    return Found(layers, named, null, broken)


def begins(token: str, names: Sequence[str]) -> bool:
    """Whether a token of two letters or more begins one of the names."""
    text = token.strip().lower()
    return len(text) >= 2 and any(name.lower().startswith(text) for name in names)


def _of(rows: pl.DataFrame, part: str) -> pl.DataFrame:
    return rows.filter(rows["part"] == part)


def _described(rows: pl.DataFrame, place: str, which: str, question: Question, test: str) -> tuple[int, ...]:
    """Source layers at which some target layer's description names the entity."""
    names = question.e2 if which == "e2" else question.e3
    some = _of(rows, place).select("source_layer", "text")
    hit = (lambda text: classify(text, question) == which) if test == "paper" else (lambda text: scoring.names(text, names))
    return tuple(sorted({layer for layer, text in some.iter_rows() if hit(text)}))


def _lowest(layers: Sequence[int]) -> float | None:
    return float(min(layers)) if layers else None


def summary(found: Sequence[Found], questions: Sequence[Question], seed: int = 0) -> dict[str, Any]:
    """Of some questions: each stage's mean layer where it was seen, the share in which it was, and the share under another's states."""
    clusters = [one.e2[0] for one in questions]
    scores: dict[str, Any] = {"questions": len(found)}
    for stage in STAGES:
        seen = [
            (one.layers[stage], cluster) for one, cluster in zip(found, clusters, strict=True) if one.layers[stage] is not None
        ]
        scores[f"{stage} seen"] = statistics.rate([float(one.layers[stage] is not None) for one in found], clusters, seed=seed)
        if seen:
            scores[f"{stage} layer"] = sum(layer for layer, _ in seen if layer is not None) / len(seen)
    for stage, key in (("first_hop", "e2 at bridge"), ("second_hop", "e3 at last")):
        scores[f"{stage} seen, another question's state"] = statistics.rate(
            [float(bool(one.null[key])) for one in found if one.null is not None],
            [cluster for one, cluster in zip(found, clusters, strict=True) if one.null is not None],
            seed=seed,
        )
    return scores


def result(
    groups: Mapping[str, Sequence[Question]],
    found: Mapping[str, Sequence[Found]],
    counts: Sequence[tuple[str, int]],
    seed: int,
    **more: Any,
) -> Result:
    """As the frame has it."""
    scores = {name: summary(some, groups[name], seed) for name, some in found.items() if some}
    claims, headline, rows = [], {}, []
    for name, own in scores.items():
        layers = {stage: own.get(f"{stage} layer") for stage in STAGES}
        told = ", ".join(f"{stage.replace('_', ' ')} {'nowhere' if x is None else f'{x:.1f}'}" for stage, x in layers.items())
        claims.append(f"{name}: mean lowest layer of {told}.")
        other = own["first_hop seen, another question's state"]
        told = f"{name}: the bridge is named at t1 at some layer in {own['first_hop seen']}"
        claims.append(f"{told}, under another's state in {other}." if other.n else f"{told}.")
        for stage in STAGES:
            headline[f"{name}: {stage.replace('_', ' ')} seen"] = own[f"{stage} seen"]
            null = own.get(f"{stage} seen, another question's state")
            rows.append(
                (
                    name,
                    stage.replace("_", " "),
                    layers[stage],
                    own[f"{stage} seen"].value,
                    null.value if null is not None and null.n else None,
                )
            )
    return Result(
        "hop-stages",
        TITLE,
        PAPER,
        tuple(claims),
        headline,
        {"groups": scores, "funnel": dict(counts)},
        (
            Table("Questions", "How many are left after each filter", ("filter", "questions"), tuple(counts)),
            Table(
                "Stages",
                "Mean lowest layer of each stage where it is seen, and how often it is",
                ("questions", "stage", "layer", "seen", "another's state"),
                tuple(rows),
                ("seen", "another's state"),
            ),
        ),
        tuple(_curve(name, found[name]) for name in scores),
        **more,
    )


def _curve(name: str, found: Sequence[Found]) -> Lines:
    own, null = [one.named for one in found], [one.null for one in found if one.null is not None]
    layers = sorted({layer for one in (*own, *null) for some in one.values() for layer in some} | {1})
    x = tuple(map(float, layers))

    def share(some: Sequence[Mapping[str, tuple[int, ...]]], key: str) -> tuple[float, ...]:
        return tuple(sum(layer in one[key] for one in some) / len(some) for layer in layers)

    lines = [Line(key, x, share(own, key)) for key in ("e2 at bridge", "e2 at last", "e3 at last")]
    if null:
        lines += [Line(f"{key}, another's state", x, share(null, key), dashed=True) for key in ("e2 at bridge", "e3 at last")]
    return Lines(f"stages-{name}", f"{name}: entities named, by source layer", "source layer ℓ", "share", tuple(lines), (0, 1.03))
