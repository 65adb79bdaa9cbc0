"""Detokenisation: at which layer does the state of a word's last token stand for the whole word?

A word is given in several tokens (`split_words`: cut apart, with a typo, or as the tokenizer has it), its last token is read at every
layer, ℓ* = ℓ, and what the scope says is the word or is not, letter by letter:

    hit = 1[text, spaces around it taken off, = word]

Kaplan et al. 2025, "From Tokens to Words: On the Inner Lexicon of LLMs", section 4. Scopes: token identity, a prompt that repeats what is
patched in at four places, and the logit lens, which can say words of one token only.

A last token often gives its word away ("istotle"), and a model may complete it without having read the rest. So each word is read a second
time with its last token alone, behind the same text: what is said there too is no detokenisation. Beside it stand the word as its one
token (what the scope can say at all), another word's vector, a random one, and nothing. Scope and layer are chosen together on one half of
the words and scored on the other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.controls.vectors import seed_of
from patchscopes.core.errors import InputError, NotAvailableError
from patchscopes.evaluate import planted, statistics
from patchscopes.evaluate.frame import Asked, Bars, Line, Lines, Result, Table, caveats_of, ours, paper, recorded, settings_of
from patchscopes.evaluate.split_words import KINDS, Form, Kind, form_of
from patchscopes.evaluate.statistics import Estimate
from patchscopes.experiment.spec import Experiment
from patchscopes.scopes.identity import EXAMPLES

if TYPE_CHECKING:
    from patchscopes.runs import Run

TITLE = "Detokenisation"
PAPER = "Kaplan et al. 2025, From Tokens to Words, section 4"
WORDS, QUICK = 60, 12
LENS = "logit lens"
SCOPES: dict[str, Any] = {
    "identity": {"prompt": "".join(f"{one} -> {one}\n" for one in EXAMPLES) + "{x} ->", "layer": "same", "stop": ["\n"]},
    "repeat": {"prompt": "{x}, {x}, {x}, {x},", "layer": "same", "stop": [","]},
    LENS: {"preset": "logit-lens"},
}
OWN, ALONE, WHOLE = "in its tokens", "last token alone", "one token"  # how a word is written
CONTROLS = {"other": "another word's vector", "random": "a random vector", "nothing": "nothing patched in"}
MENTIONS = ("Last night we watched a film about", "The letter that I got was about", "After dinner somebody spoke about")
Cell = tuple[str, int]  # scope, layer


@dataclass(frozen=True)
class Settings:
    """Every choice.

    kinds    of `split_words`: split, typo, natural
    scopes   of `SCOPES`; the paper has the logit lens for words of one token, the repeating prompt for others
    pieces   a split word has 2 to so many
    tokens   said at most
    """

    kinds: tuple[Kind, ...] = KINDS
    scopes: tuple[str, ...] = paper(tuple(SCOPES), ("repeat", LENS))
    pieces: int = 5
    tokens: int = ours(8)
    layers: str = "all"


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run; the controls at some cell for half of the words."""
    forms, _ = _forms(asked, settings)
    half = [one for one in forms if not statistics.in_first_half(one.word, asked.seed)]
    cells: dict[str, Cell] = {kind: (settings.scopes[0], 1) for kind in settings.kinds}
    return [_experiment(asked, settings, forms), _controls(asked, settings, half, cells)]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    forms, notes = _forms(asked, settings)
    run = recorded(asked, _experiment(asked, settings, forms))
    found = [hits_of(run, [one for one in forms if one.kind == kind]) for kind in settings.kinds]
    chosen = {}
    for kind, hits in zip(settings.kinds, found, strict=True):
        half = statistics.held_out(hits.own, hits.words, seed=asked.seed) if hits.words else None
        if half is None:
            raise InputError(
                f"{len(hits.words)} words of the kind {kind!r} cannot be split into two halves; give more words (--n, --data), or "
                "leave the kind out (--set kinds=…)"
            )
        chosen[kind] = half
    cells = {kind: hits.cells[chosen[kind].cell] for kind, hits in zip(settings.kinds, found, strict=True)}
    away = {(kind, hits.words[k]) for kind, hits in zip(settings.kinds, found, strict=True) for k in chosen[kind].scores}
    control = recorded(asked, _controls(asked, settings, [one for one in forms if (one.kind, one.word) in away], cells))
    own, deviations = settings_of(settings, asked)
    if asked.data is None:
        deviations = (*deviations, "The words are names that the bundled model knows, not words of a corpus (--data words.txt).")
    scores = {
        kind: figures(hits, chosen[kind], _said(control, kind), asked.seed)
        for kind, hits in zip(settings.kinds, found, strict=True)
    }
    for kind, p in zip(scores, statistics.holm([one["p"] for one in scores.values()]), strict=True):
        scores[kind]["p"] = p
    by_kind: dict[str, Hits] = dict(zip(settings.kinds, found, strict=True))
    return _result(by_kind, scores, own, deviations, (*notes, *caveats_of([run, control])), (run, control), asked.seed)


# ---------------------------------------------------------------------------------------------------------------------------- words


def words_of(path: Path | None) -> list[str]:
    """A word a line; None: the names that the bundled model knows. NotAvailableError, InputError."""
    if path is None:
        return list(dict.fromkeys(entity.name for entity in planted.entities()))
    if not path.is_file():
        raise NotAvailableError(f"there is no file {str(path)!r}; expected words, one a line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise InputError(f"{str(path)!r} is not UTF-8 text: byte {e.start} cannot be read") from None
    return list(dict.fromkeys(word for line in lines if (word := line.strip())))


def _forms(asked: Asked, settings: Settings) -> tuple[list[Form], list[str]]:
    """Words of each kind, drawn by the seed, each behind a sentence that depends on the word alone; and how many there were."""
    if unknown := [kind for kind in settings.kinds if kind not in KINDS]:
        raise InputError(f"unknown kind {unknown[0]!r}; expected some of {', '.join(KINDS)}")
    if not settings.kinds or not settings.scopes or settings.pieces < 2:
        raise InputError(
            f"kinds={settings.kinds}, scopes={settings.scopes}, pieces={settings.pieces}; expected at least one kind, one scope, 2 pieces"
        )
    words, tokenizer, n = words_of(asked.data), _tokenizer(asked), asked.items(WORDS, QUICK)
    found: list[Form] = []
    notes = []
    for kind in settings.kinds:
        order = list(words)
        random.Random(f"{asked.seed} {kind}").shuffle(order)
        some: list[Form] = []
        tried = 0
        for word in order:
            if len(some) == n:
                break
            tried += 1
            behind = MENTIONS[seed_of(word) % len(MENTIONS)]
            form = form_of(tokenizer, behind, word, kind, random.Random(f"{asked.seed} {word}"), settings.pieces)
            some += [] if form is None else [form]
        if asked.data is not None and len(some) < tried:
            notes.append(f"{tried - len(some):,} of {tried:,} words have no form of the kind {kind!r} and were left out.")
        found += some
    return found, notes


def _tokenizer(asked: Asked) -> Any:
    """The model's; no weights are loaded."""
    if asked.models is not None:
        return next(iter(asked.models.values())).tokenizer
    from patchscopes.runs.conditions import outline_spec

    return outline_spec(asked.spec, "cpu").tokenizer


# ----------------------------------------------------------------------------------------------------------------------- experiment


def _experiment(asked: Asked, settings: Settings, forms: Sequence[Form]) -> Experiment:
    """Every form of every word at all layers, without controls."""
    parts = []
    for kind in settings.kinds:
        some = [one for one in forms if one.kind == kind]
        written = {OWN: [one.prompt for one in some], ALONE: [one.alone for one in some]}
        if kind != "natural":
            written[WHOLE] = [(*one.before, one.whole) for one in some if one.whole is not None]
        for how, ids in written.items() if some else ():
            labels = [{"word": one.word, "kind": kind, "written": how} for one in some]
            parts.append(_part(f"{kind}, {how}", ids, labels, _scopes(settings, kind), settings.layers))
    return _made(asked, "detokenisation", parts, controls=False)


def _controls(asked: Asked, settings: Settings, forms: Sequence[Form], cells: Mapping[str, Cell]) -> Experiment:
    """The chosen scope and layer of each kind, with its controls."""
    parts = []
    for kind, (scope, layer) in cells.items():
        some = [one for one in forms if one.kind == kind]
        labels = [{"word": one.word, "kind": kind, "written": OWN} for one in some]
        parts += [_part(kind, [one.prompt for one in some], labels, _scopes(settings, kind, scope), layer)] if some else []
    return _made(asked, "detokenisation-controls", parts, controls=True, evidence=False)


def _scopes(settings: Settings, kind: str, only: str | None = None) -> list[dict[str, Any]]:
    if unknown := [name for name in settings.scopes if name not in SCOPES]:
        raise InputError(f"unknown scope {unknown[0]!r}; expected some of {', '.join(SCOPES)}")
    names = [name for name in settings.scopes if (name != LENS or kind != "natural") and only in (None, name)]
    if not names:
        raise InputError(
            f"words of the kind {kind!r} are of several tokens, and the {LENS} says one; expected another scope, too"
        )
    return [{"name": name, **SCOPES[name], **({} if name == LENS else {"tokens": settings.tokens})} for name in names]


def _part(name: str, ids: Sequence[Sequence[int]], labels: Sequence[dict[str, str]], scopes: Any, layers: Any) -> dict[str, Any]:
    prompts = [{"ids": list(one), "labels": label} for one, label in zip(ids, labels, strict=True)]
    return {"name": name, "prompts": prompts, "layers": layers, "scope": scopes}


def _made(asked: Asked, name: str, parts: list[dict[str, Any]], **more: Any) -> Experiment:
    if not parts:
        raise InputError("there is no word to read: none has a form of the kinds that were asked for; give other words (--data)")
    model = dict(asked.model) if not isinstance(asked.model, str) else asked.model
    document = {"name": name, "model": model, "at": -1, "seed": asked.seed, "on_bad_prompt": "skip", "parts": parts, **more}
    return Experiment.model_validate(document)


# --------------------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Hits:
    """own, alone, whole: [word, cell]; whole is empty where words are not of one token. cells: (scope, layer)."""

    words: tuple[str, ...]
    cells: tuple[Cell, ...]
    own: np.ndarray
    alone: np.ndarray
    whole: np.ndarray | None

    def of(self, scope: str) -> tuple[list[int], list[int]]:
        """(layers, columns) of a scope."""
        some = [(layer, k) for k, (name, layer) in enumerate(self.cells) if name == scope]
        return [layer for layer, _ in some], [k for _, k in some]


def said_whole(text: str | None, word: str) -> bool:
    """Whether a text is the word, letter by letter; spaces around it do not count."""
    return (text or "").strip() == word


def hits_of(run: Run, forms: Sequence[Form]) -> Hits:
    """Of the forms of one kind. What failed is a miss."""
    kind = forms[0].kind if forms else None
    rows = run.table(control="none").select("kind", "written", "word", "scope", "source_layer", "text")
    said: dict[str, dict[str, dict[Cell, bool]]] = {}
    for k, written, word, scope, layer, text in rows.iter_rows():
        if k == kind:
            said.setdefault(written, {}).setdefault(word, {})[scope, layer] = said_whole(text, word)
    own = said.get(OWN, {})
    words = tuple(one.word for one in forms if one.word in own)
    cells = tuple(dict.fromkeys(cell for by_cell in own.values() for cell in by_cell))

    def table(written: str) -> np.ndarray:
        by_word = said.get(written, {})
        return np.array([[by_word.get(w, {}).get(cell, False) for cell in cells] for w in words], bool).reshape(
            len(words), len(cells)
        )

    return Hits(words, cells, table(OWN), table(ALONE), table(WHOLE) if WHOLE in said else None)


def _said(control: Run, kind: str) -> dict[str, dict[str, bool]]:
    """control → word → whether it was said in the chosen cell."""
    found: dict[str, dict[str, bool]] = {}
    rows = control.table(status="ok").select("kind", "control", "word", "text")
    for k, name, word, text in rows.iter_rows():
        if k == kind:
            found.setdefault(name, {})[word] = said_whole(text, word)
    return found


def figures(hits: Hits, chosen: statistics.HeldOut, controls: Mapping[str, Mapping[str, bool]], seed: int = 0) -> dict[str, Any]:
    """Rates over words: in the chosen cell on words that did not choose it, and by the best of all layers of its scope. p: McNemar, the
    word in its tokens against its last token alone."""
    scope, layer = hits.cells[chosen.cell]
    away = [int(k) for k in chosen.scores]
    words = [hits.words[k] for k in away]
    own, alone = hits.own[away, chosen.cell], hits.alone[away, chosen.cell]
    layers, columns = hits.of(scope)

    def rate(values: Any, of: Sequence[str]) -> Estimate:
        return statistics.rate(np.asarray(values, float), of, seed=seed)

    found: dict[str, Any] = {
        "scope": scope,
        "layer": layer,
        "layers": layers,
        "held_out": rate(own, words),
        "last_token_alone": rate(alone, words),
        "own_less_alone": rate(own.astype(float) - alone, words),
        "any_layer": rate(statistics.any_of(hits.own[:, columns]), hits.words),
        "any_layer_last_token_alone": rate(statistics.any_of(hits.alone[:, columns]), hits.words),
        "per_layer": rate(statistics.per_draw(hits.own[:, columns]), hits.words),
        "p": statistics.mcnemar(int((own & ~alone).sum()), int((alone & ~own).sum())),
        "first_layer": first_layers(hits.own[:, columns] & ~hits.alone[:, columns], layers),
    }
    if hits.whole is not None:
        found["one_token"] = rate(hits.whole[away, chosen.cell], words)
    for name in CONTROLS:
        if some := controls.get(name):
            found[name] = rate(list(some.values()), list(some))
    return found


def first_layers(hits: np.ndarray, layers: Sequence[int]) -> dict[str, int]:
    """layer → how many words are hit there and at no lower one; [word, layer], layers in rising order."""
    first = [layers[int(row.argmax())] for row in hits if row.any()]
    return {str(layer): first.count(layer) for layer in layers}


# --------------------------------------------------------------------------------------------------------------------------- result

LABELS = {
    "held_out": "the word, held-out layer",
    "last_token_alone": "  last token alone",
    "one_token": "  the word as one token",
    "other": "  another word's vector",
    "random": "  a random vector",
    "nothing": "  nothing patched in",
}


def claim(kind: str, scores: Mapping[str, Any]) -> str:
    """What may be said, whichever way it points."""
    what = {"split": "Words cut into pieces", "typo": "Words with a typo", "natural": "Names of several tokens"}[kind]
    told = f"{what}: through {scores['scope']} at layer {scores['layer']}, chosen on other words, {scores['held_out']} are said whole; "
    told += f"from the last token alone {scores['last_token_alone']} are. "
    if scores["p"] >= 0.05:
        return told + f"That the other tokens matter is not shown (McNemar p = {scores['p']:.2g})."
    more = "more" if scores["own_less_alone"].value > 0 else "fewer"
    return told + f"With the other tokens {more} are said (McNemar p = {scores['p']:.2g})."


def _result(
    found: Mapping[str, Hits],
    scores: Mapping[str, dict[str, Any]],
    settings: dict[str, Any],
    deviations: Sequence[str],
    caveats: Sequence[str],
    runs: tuple[Run, ...],
    seed: int,
) -> Result:
    headline: dict[str, Any] = {}
    for kind, own in scores.items():
        headline |= {f"{kind}: {label.strip()}": own[key] for key, label in LABELS.items() if key in own}
        n = len(own["layers"])
        headline[f"{kind}: any of {n} layers"] = own["any_layer"]
        headline[f"{kind}: any of {n} layers, last token alone"] = own["any_layer_last_token_alone"]
    rows = tuple(
        (
            kind,
            own["scope"],
            own["layer"],
            *(own.get(key, "") for key in LABELS),
            own["any_layer"],
            own["any_layer_last_token_alone"],
        )
        for kind, own in scores.items()
    )
    shares = (*(label.strip() for label in LABELS.values()), "any layer", "any layer, last token alone")
    first = tuple((kind, int(layer), n) for kind, own in scores.items() for layer, n in own["first_layer"].items())
    tables = (
        Table(
            "held-out",
            "Words said whole by the scope and layer that were chosen on other words, beside controls; and by some one of its layers",
            ("kind", "scope", "ℓ", *shares),
            rows,
            shares,
        ),
        Table(
            "first-layer",
            "The lowest layer at which a word is said in its tokens and not from its last token alone",
            ("kind", "ℓ", "words"),
            first,
        ),
    )
    bars = Bars(
        "held-out",
        "Words said whole at the held-out layer, 95 % intervals over words",
        "share",
        tuple(scores),
        tuple((label.strip(), tuple(own.get(key) for own in scores.values())) for key, label in LABELS.items()),
    )
    return Result(
        "detokenisation",
        TITLE,
        PAPER,
        tuple(claim(kind, own) for kind, own in scores.items()),
        headline,
        {"kinds": dict(scores), "words": {kind: len(hits.words) for kind, hits in found.items()}},
        tables,
        (*(_curves(kind, hits, seed) for kind, hits in found.items()), bars),
        settings,
        tuple(deviations),
        tuple(caveats),
        runs,
    )


def _curves(kind: str, hits: Hits, seed: int) -> Lines:
    lines = []
    for scope in dict.fromkeys(name for name, _ in hits.cells):
        layers, columns = hits.of(scope)
        lines.append(_line(f"{scope}, {OWN}", layers, hits.own[:, columns], hits.words, seed, dashed=False))
        lines.append(_line(f"{scope}, {ALONE}", layers, hits.alone[:, columns], hits.words, seed, dashed=True))
        if hits.whole is not None:
            lines.append(_line(f"{scope}, {WHOLE}", layers, hits.whole[:, columns], hits.words, seed, dashed=True))
    title = f"Words said whole by layer ({kind}), 95 % intervals over words"
    return Lines(f"by-layer-{kind}", title, "layer ℓ = ℓ*", "share", tuple(lines), (0, 1.03))


def _line(name: str, layers: Sequence[int], hits: np.ndarray, words: Sequence[str], seed: int, *, dashed: bool) -> Line:
    some = [statistics.rate(hits[:, k].astype(float), words, seed=seed) for k in range(len(layers))]
    y, low, high = (tuple(getattr(one, key) for one in some) for key in ("value", "low", "high"))
    return Line(name, tuple(map(float, layers)), y, low, high, dashed)
