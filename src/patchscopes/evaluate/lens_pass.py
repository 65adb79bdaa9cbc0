"""Lens pass@k: does a lens name, at some layer, what a model has in mind between a prompt and its answer?

An item is a prompt with intermediates: concepts that stand neither in the prompt nor (need they) in the answer, such as the bridge of a
question of two hops. At one position each layer ℓ below the last goes through a lens, which ranks all tokens:

    pass@k = mean over items of the share of the item's intermediates with   min over ℓ of rank_ℓ(intermediate) ≤ k

(the lens evaluations of anthropics/jacobian-lens). The position is the token before `target`; without a target the last line end (rhymes),
or else the last token. The spaces behind a prompt are taken off, since their own token would be read.

The best of so many layers is reached by chance, too. Beside it stand, in as many looks: another item's intermediates held against the same
readings, item by item; and one layer that was chosen on one half of the items and is scored on the other. Items with the same
intermediates hang together. An intermediate counts as said by its token, with or without a space in front; those of several tokens and
those that the prompt says itself are left out and counted. Means over files weigh files alike.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.core.errors import InputError, NotAvailableError, PromptError
from patchscopes.evaluate import hops, next_token, scoring, statistics
from patchscopes.evaluate.frame import Asked, Line, Lines, Result, Table, caveats_of, ours, recorded, settings_of
from patchscopes.evaluate.lens_items import LensItem, lens_items
from patchscopes.evaluate.statistics import Estimate
from patchscopes.experiment.spec import Experiment

if TYPE_CHECKING:
    from patchscopes.model.tokens import Tokens
    from patchscopes.runs import Run

TITLE = "Lens pass@k"
PAPER = "anthropics/jacobian-lens, the lens evaluations"
N, QUICK = 200, 24
LENS, JACOBIAN = next_token.LENS, "Jacobian lens"


@dataclass(frozen=True)
class Settings:
    """Every choice.

    ks         pass@k for each of these
    layers     that are looked at; the last is what the model says
    scopes     of those of next-token
    lens       a tuned lens, as in next-token
    jacobian   a file of a Jacobian lens of the model; none: without it
    """

    ks: tuple[int, ...] = (1, 10)
    layers: str = "0:-1"
    scopes: tuple[str, ...] = ours((LENS,))
    lens: str | None = ours(None)
    jacobian: str | None = ours(None)


@dataclass(frozen=True)
class Looked:
    """An item as it is read: at position `at` of `text`. words: its intermediates; ids: of each, the tokens that say it."""

    group: str
    name: str
    text: str
    at: int
    words: tuple[str, ...]
    ids: tuple[frozenset[int], ...]


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run."""
    return [_experiment(asked, settings, _items(asked)[0])]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    items, notes = _items(asked)
    run = recorded(asked, _experiment(asked, settings, items))
    own, deviations = settings_of(settings, asked)
    if asked.data is None:
        deviations = (
            *deviations,
            "The items are questions of two hops that atlas did not train on (--data FILE for published ones).",
        )
    if settings.jacobian is None:
        deviations = (*deviations, "There is no Jacobian lens among the lenses (--set jacobian=FILE).")
    found = scores(run, items, settings.ks, seed=asked.seed)
    return _result(found, items, settings, own, deviations, (*notes, *caveats_of([run])), run)


# ---------------------------------------------------------------------------------------------------------------------------- items


def _items(asked: Asked) -> tuple[list[Looked], list[str]]:
    """Items that can be scored, of each file some, drawn by the seed; notes on what was left out."""
    notes: list[str] = []
    given = _planted() if asked.data is None else _of_files(asked.data, notes)
    tokens = next_token.tokenizer_of(asked)
    why: Counter[str] = Counter()
    found = []
    for group in dict.fromkeys(group for group, _ in given):
        own = [item for name, item in given if name == group]
        random.Random(f"{asked.seed} lens-pass {group}").shuffle(own)
        kept = [looked for item in own if (looked := read(tokens, group, item, why)) is not None]
        found += kept[: asked.items(N, QUICK)]
    notes += [f"{n:,} {what}." for what, n in why.items()]
    if not found:
        raise InputError(
            f"none of {len(given):,} items can be scored ({' '.join(notes) or 'there is none'}); expected prompts with intermediates "
            "that are one token of the model"
        )
    return found, notes


def _planted() -> list[tuple[str, LensItem]]:
    some = [one for one in hops.questions_of(None).items if not one.gives_away]
    return [("two hops of atlas", LensItem(one.phrase, one.text, one.e2[:1], one.e3[0])) for one in some]


def _of_files(path: Path, notes: list[str]) -> list[tuple[str, LensItem]]:
    if not path.exists():
        raise NotAvailableError(f"there is no file or folder {str(path)!r}; expected lens items (.json)")
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found = []
    for file in files:
        items, corrupt = lens_items(file)
        notes += [f"{corrupt:,} of {len(items) + corrupt:,} items of {file.name} were left out: they are corrupt."] * bool(
            corrupt
        )
        found += [(file.stem, item) for item in items]
    return found


def read(tokens: Any, group: str, item: LensItem, why: Counter[str]) -> Looked | None:
    """Where an item is read and what is looked for there, by the tokens of a model; None, and counted in `why`, where that cannot be."""
    text = item.prompt.rstrip(" ")
    try:
        seen: Tokens = tokens(text)
    except PromptError:
        why["items were left out: the model does not read their prompt"] += 1
        return None
    line_end = text.rfind("\n") if item.target is None else -1
    at = next((k for k, (_, stop) in enumerate(seen.offsets) if stop > line_end), -1) if line_end >= 0 else len(seen) - 1
    words: dict[str, frozenset[int]] = {}
    for word in dict.fromkeys(item.intermediates):
        if not scoring.echo_free([word], item.prompt):
            why["intermediates were left out: their prompt says them"] += 1
        elif ids := _ids(tokens, word):
            words[word] = ids
        else:
            why["intermediates were left out: they are several tokens of the model"] += 1
    if not words:
        why["items were left out: no intermediate remains"] += 1
        return None
    return Looked(group, item.name, text, at, tuple(words), tuple(words.values()))


def _ids(tokens: Any, word: str) -> frozenset[int]:
    """The tokens that are this word, with or without a space in front."""
    found = set()
    for text in (word.strip(), f" {word.strip()}"):
        seen: Tokens = tokens(text)
        own = [one for one, added in zip(seen.ids, seen.special, strict=True) if not added]
        if len(own) == 1:
            found.add(own[0])
    return frozenset(found)


def _experiment(asked: Asked, settings: Settings, items: Sequence[Looked]) -> Experiment:
    """Every item at its position, every layer through every lens; the likeliest tokens are kept."""
    if not settings.ks or min(settings.ks) < 1:
        raise InputError(f"ks is {settings.ks}; expected numbers of 1 or more")
    if unknown := [name for name in settings.scopes if name not in next_token.SCOPES]:
        raise InputError(f"unknown scope {unknown[0]!r}; expected some of {', '.join(next_token.SCOPES)}")
    parts: list[Any] = [{"name": name, "scope": [{"name": name, **next_token.SCOPES[name]}]} for name in settings.scopes]
    parts += next_token.tuned_lens_parts(asked, settings.lens)
    if settings.jacobian is not None:
        path = Path(settings.jacobian)
        if not path.is_file():
            raise NotAvailableError(f"there is no file {settings.jacobian!r}; expected a Jacobian lens")
        lens = {"name": JACOBIAN, "preset": "logit-lens", "map": [{"jacobian_lens": str(path.resolve())}]}
        parts.append({"name": JACOBIAN, "scope": [lens]})
    prompts = [{"text": one.text, "at": one.at, "labels": {"item": str(k)}} for k, one in enumerate(items)]
    return Experiment.model_validate(
        {
            "name": "lens-pass",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "prompts": prompts,
            "controls": False,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
            "outputs": {"top_k": max(settings.ks)},
            "parts": [{**part, "layers": settings.layers} for part in parts],
        }
    )


# --------------------------------------------------------------------------------------------------------------------------- scores


def said(top: Mapping[int, Sequence[int]], ids: Sequence[frozenset[int]], layers: Sequence[int], k: int) -> np.ndarray:
    """[intermediate, layer]: whether one of its tokens is among the k likeliest of the layer. What failed is a miss."""
    return np.array([[bool(own & set(top.get(layer, ())[:k])) for layer in layers] for own in ids], bool)


def scores(run: Run, items: Sequence[Looked], ks: Sequence[int], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """scope → its layers, and for each k pass@k, the same for another item's intermediates in as many looks, their difference, by
    how much it is above the logit lens, each layer by itself, and the layer that was chosen on one half, scored on the other."""
    tops: dict[str, dict[int, dict[int, list[int]]]] = {}
    rows = run.table(control="none", status="ok").select("scope", "item", "source_layer", "top_ids")
    for scope, item, layer, ids in rows.iter_rows():
        tops.setdefault(scope, {}).setdefault(int(item), {})[layer] = list(ids)
    groups, words = [one.group for one in items], [tuple(sorted(one.words)) for one in items]
    partner = statistics.strangers(groups, words, words, seed)
    found: dict[str, dict[str, Any]] = {}
    passed: dict[tuple[str, int], np.ndarray] = {}
    for scope, top in sorted(tops.items(), key=lambda one: one[0] != LENS):  # the others stand beside it
        layers = sorted({layer for by_layer in top.values() for layer in by_layer})
        found[scope] = {"layers": layers}
        for k in ks:
            by_word = [said(top.get(i, {}), one.ids, layers, k) for i, one in enumerate(items)]
            own = passed[scope, k] = np.array([one.any(axis=1).mean() for one in by_word])
            alone = np.array([one.mean(axis=0) for one in by_word])
            null = np.array([_other(top.get(i, {}), one, partner[i], items, layers, k) for i, one in enumerate(items)])
            there = np.flatnonzero(~np.isnan(null))

            def mean(values: np.ndarray, some: Sequence[int] | np.ndarray) -> Estimate:
                return statistics.mean_of_rates(values[some], [groups[i] for i in some], [words[i] for i in some], seed=seed)

            def apart(first: np.ndarray, second: np.ndarray, some: Sequence[int] | np.ndarray) -> Estimate:
                own_words, own_groups = [words[i] for i in some], [groups[i] for i in some]
                return statistics.difference(first[some], second[some], own_words, own_groups, seed=seed)

            every = np.arange(len(items))
            one: dict[str, Any] = {
                "any_layer": mean(own, every),
                "another_items": mean(null, there),
                "over_another_items": apart(own, null, there),
                "by_layer": {layer: mean(alone[:, c], every) for c, layer in enumerate(layers)},
            }
            if (half := statistics.held_out(alone, words, groups, seed=seed)) is not None:
                one |= {"layer": layers[half.cell], "held_out_layer": mean(alone[:, half.cell], half.scores)}
            if scope != LENS and (LENS, k) in passed:
                one["over_logit_lens"] = apart(own, passed[LENS, k], every)
            found[scope][f"pass@{k}"] = one
    return found


def _other(
    top: Mapping[int, Sequence[int]], own: Looked, other: int | None, items: Sequence[Looked], layers: Sequence[int], k: int
) -> float:
    """The share of another item's intermediates, less those that are the item's own, that the item's readings say; NaN if none remains."""
    mine = frozenset().union(*own.ids)
    ids = [] if other is None else [one for one in items[other].ids if not one & mine]
    return float(said(top, ids, layers, k).any(axis=1).mean()) if ids else float("nan")


def _result(
    found: Mapping[str, Mapping[str, Any]],
    items: Sequence[Looked],
    settings: Settings,
    own: Mapping[str, Any],
    deviations: Sequence[str],
    caveats: Sequence[str],
    run: Run,
) -> Result:
    claims, headline, rows, lines = [], {}, [], []
    for k in settings.ks:
        for scope, by_k in found.items():
            one = by_k[f"pass@{k}"]
            claims.append(
                f"pass@{k}, {scope}: {one['any_layer']} of the intermediates are said at some one of {len(by_k['layers'])} layers; of "
                f"another item's, in as many looks, {one['another_items']} (difference {one['over_another_items']})."
            )
            if "held_out_layer" in one:
                claims[-1] += f" At layer {one['layer']}, chosen on other items, {one['held_out_layer']} are."
            if "over_logit_lens" in one:
                claims[-1] += f" Above the logit lens: {one['over_logit_lens']}."
            headline |= {f"pass@{k}, {scope}": one["any_layer"], f"  another item's, {scope}, {k}": one["another_items"]}
            rows += [(scope, k, layer, value) for layer, value in one["by_layer"].items()]
            some = list(one["by_layer"].values())
            y, low, high = (tuple(getattr(value, name) for value in some) for name in ("value", "low", "high"))
            lines.append(Line(f"{scope}, k = {k}", tuple(map(float, by_k["layers"])), y, low, high))
    table = Table("by-layer", "pass@k of each layer by itself", ("scope", "k", "ℓ", "pass@k"), tuple(rows), ("pass@k",))
    figure = Lines(
        "by-layer", "pass@k of each layer by itself, 95 % intervals over items", "layer ℓ", "pass@k", tuple(lines), (0, 1.03)
    )
    scored = {"items": len(items), "intermediates": sum(len(one.words) for one in items), "scopes": found}
    return Result(
        "lens-pass",
        TITLE,
        PAPER,
        tuple(claims),
        headline,
        scored,
        (table,),
        (figure,),
        own,
        tuple(deviations),
        tuple(caveats),
        (run,),
    )
