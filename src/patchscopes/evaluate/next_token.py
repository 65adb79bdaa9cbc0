"""Next-token prediction: what does a layer already know of what the model will say next?

For a text and one of its positions, each layer ℓ is looked at through scopes that say one token; it is held against the token that the
model itself says there (Ghandeharioun et al. 2024, 4.1 and appendix B):

    precision@1   whether the scope's token is the model's likeliest, 1[argmax p̃ = argmax p_L]
    surprisal     −log2 p_L[argmax p̃]: the model's own distribution at the scope's token, bits

The model's likeliest token is the logit lens at layer L: no other pass is needed. Scopes: token identity (few-shot), the bare "?" (of
which a bare "x" is a copy where the tokenizer puts nothing in front), the logit lens, a tuned lens where there is one; and whatever is
given as further parts. Each is held against the logit lens at the same texts, layer by layer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.core.errors import InputError, NotAvailableError, PromptError
from patchscopes.evaluate import planted, statistics
from patchscopes.evaluate.frame import Asked, Line, Lines, Result, Table, caveats_of, ours, paper, recorded, settings_of
from patchscopes.evaluate.statistics import Estimate
from patchscopes.experiment.lens_folder import is_lens
from patchscopes.experiment.spec import Experiment
from patchscopes.organisms import bundled_lenses

if TYPE_CHECKING:
    from patchscopes.runs import Run

TITLE = "Next-token prediction"
PAPER = "Ghandeharioun et al. 2024, Patchscopes, section 4.1, figure 2"
TEXTS, QUICK = 200, 24
SCOPES: dict[str, Any] = {
    "logit lens": {"preset": "logit-lens"},
    "token identity": {"preset": "identity"},
    "bare ?": {"preset": "identity-bare"},
    "bare x": {"prompt": "{x}", "layer": "same", "tokens": 1},
}
LENS, TUNED = "logit lens", "tuned lens"
Part = Mapping[str, Any]  # of an experiment; its scopes are scored beside the others


@dataclass(frozen=True)
class Settings:
    """Every choice.

    scopes     of `SCOPES`; the paper has no bare prompt
    lens       a tuned lens: a file or folder that training left, a folder in the public format, the name of a bundled model; none: that of
               the model, where it is bundled
    longest    texts of so many words or more are left out, and
    characters texts of so many characters or more
    """

    scopes: tuple[str, ...] = paper(("logit lens", "token identity", "bare ?"), ("logit lens", "token identity"))
    lens: str | None = ours(None)
    longest: int = 250
    characters: int = 2000


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run."""
    return [_experiment(asked, settings, _prompts(asked, settings)[0], ())]


def evaluate(asked: Asked, settings: Settings | None = None, more: Sequence[Part] = ()) -> Result:
    """The figures of the module's docstring. more: parts with further scopes, scored by the names of these."""
    settings = settings or Settings()
    prompts, notes = _prompts(asked, settings)
    run = recorded(asked, _experiment(asked, settings, prompts, more))
    own, deviations = settings_of(settings, asked)
    if asked.data is None:
        deviations = (*deviations, "The texts are of the kind that atlas was trained on, not of the Pile (--data texts.txt).")
    return _result(run, own, deviations, (*notes, *caveats_of([run])), asked.seed)


def tuned_lens_parts(asked: Asked, lens: str | None) -> list[Part]:
    """The tuned lens as a part: h at layer ℓ < L goes through the layer's map into the last layer. NotAvailableError if there is none at
    the path."""
    there = bundled_lenses()
    path = there.get(str(asked.spec.name)) if lens is None else there.get(lens, Path(lens))
    if path is None:
        return []
    if not (path.is_file() or (path.is_dir() and is_lens(path))):
        raise NotAvailableError(
            f"no tuned lens in {str(path)!r}: expected a file, or a folder with tuned_lens.safetensors or with config.json and params.pt"
        )
    scope = {"name": TUNED, "preset": "logit-lens", "map": [{"tuned_lens": str(path.resolve())}]}
    return [{"name": TUNED, "layers": "0:-1", "scope": [scope]}]


# ----------------------------------------------------------------------------------------------------------------------- experiment


def _prompts(asked: Asked, settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """Texts with one position each, drawn by the seed; and notes on what was left out."""
    n = asked.items(TEXTS, QUICK)
    notes: list[str] = []
    found = texts(asked.data, notes) if asked.data is not None else planted.texts(2 * n, asked.seed)
    kept = [text for text in dict.fromkeys(found) if 0 < len(text.split()) < settings.longest and len(text) < settings.characters]
    if len(kept) < len(found) and asked.data is not None:
        notes.append(f"{len(found) - len(kept):,} of {len(found):,} texts were left out: empty, there twice, or too long.")
    rng = random.Random(f"{asked.seed} next-token")
    rng.shuffle(kept)
    tokens = tokenizer_of(asked)
    prompts: list[dict[str, Any]] = []
    unread: list[str] = []
    for text in kept:
        if len(prompts) == n:
            break
        try:
            prompts.append({"text": text, "at": rng.randrange(max(1, len(tokens(text))))})
        except PromptError as e:  # more tokens than the model reads: the next text takes its place
            unread.append(str(e))
    notes += left_out(unread, len(unread) + len(prompts))
    if not prompts:
        told = f" ({' '.join(notes)})" if notes else ""
        raise InputError(
            f"there is no text to read{told}; expected one a line, of fewer than {settings.longest} words and {settings.characters} "
            "characters, and of no more tokens than the model reads"
        )
    return prompts, notes


def left_out(unread: Sequence[str], of: int) -> list[str]:
    """A note on texts that the model does not read, by the errors that it gave."""
    return [f"{len(unread):,} of {of:,} texts that were drawn were left out: {unread[0]}"] if unread else []


def texts(path: Path, notes: list[str]) -> list[str]:
    """Texts of a file: lines of a .txt, `text` or `prompt` of a .jsonl, the prompts of jacobian-lens items (.json). What has none is
    counted in `notes`."""
    if not path.is_file():
        raise NotAvailableError(f"there is no file {str(path)!r}; expected texts, one a line, .jsonl, or lens items (.json)")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise InputError(f"{str(path)!r} is not UTF-8 text: byte {e.start} cannot be read") from None
    if path.suffix == ".json":
        from patchscopes.evaluate.lens_items import lens_items

        items, corrupt = lens_items(path)
        notes += [f"{corrupt:,} of {len(items) + corrupt:,} lens items of {path.name} were left out: they are corrupt."] * bool(
            corrupt
        )
        return [item.prompt for item in items]
    if path.suffix == ".jsonl":
        rows = [_row(line, f"{str(path)!r} line {k}") for k, line in enumerate(lines, 1) if line.strip()]
        some = [text for row in rows if isinstance(text := row.get("text", row.get("prompt")), str)]
        none = len(rows) - len(some)
        notes += [f"{none:,} of {len(rows):,} rows of {path.name} were left out: they have no text."] * bool(none)
        return some
    return [line.strip() for line in lines if line.strip()]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{where} is not valid JSON: {e.msg}") from None
    if not isinstance(row, dict):
        raise InputError(f'{where} holds a {type(row).__name__}; expected an object such as {{"text": …}}')
    return row


def tokenizer_of(asked: Asked) -> Any:
    """Counts tokens as the model does; no weights are loaded."""
    if asked.models is not None:
        return next(iter(asked.models.values())).tokens
    from patchscopes.runs.conditions import outline_spec

    return outline_spec(asked.spec, "cpu").tokens


def _experiment(asked: Asked, settings: Settings, prompts: list[dict[str, Any]], more: Sequence[Part]) -> Experiment:
    if unknown := [name for name in settings.scopes if name not in SCOPES]:
        raise InputError(f"unknown scope {unknown[0]!r}; expected some of {', '.join(SCOPES)}")
    parts: list[Part] = [{"name": name, "scope": [{"name": name, **SCOPES[name]}]} for name in settings.scopes if name != LENS]
    # what the model itself says is the lens at the last layer: it comes first, since what is asked for twice is made once
    layers = "all" if LENS in settings.scopes else -1
    parts.insert(0, {"name": LENS, "layers": layers, "scope": [{"name": LENS, **SCOPES[LENS]}]})
    parts += [*tuned_lens_parts(asked, settings.lens), *more]
    return Experiment.model_validate(
        {
            "name": "next-token",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "prompts": prompts,
            "layers": "all",
            "controls": False,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
            "parts": parts,
        }
    )


# --------------------------------------------------------------------------------------------------------------------------- scores


def scores(run: Run, *, seed: int = 0) -> tuple[dict[str, dict[int, dict[str, Estimate]]], dict[str, Any]]:
    """scope → layer → precision@1, the same against another text's token, by how much it is above the logit lens' on the same texts,
    surprisal; and what the model itself says: how many different tokens, and the share of the commonest."""
    rows = run.table(control="none", status="ok").select("scope", "prompt", "source_layer", "next_token_id", "surprisal")
    top = int(rows["source_layer"].max() or 0)  # type: ignore[arg-type]
    truth = {p: token for scope, p, layer, token, _ in rows.iter_rows() if scope == LENS and layer == top}
    prompts = sorted(truth)
    other = statistics.strangers([0] * len(prompts), [truth[p] for p in prompts], prompts, seed)
    stranger = {p: truth[prompts[k]] for p, k in zip(prompts, other, strict=True) if k is not None}
    cells: dict[str, dict[int, list[tuple[int, int, float]]]] = {}
    for scope, p, layer, token, surprisal in rows.iter_rows():
        if p in truth:
            cells.setdefault(scope, {}).setdefault(layer, []).append((p, token, surprisal))
    lens = {layer: {p: float(token == truth[p]) for p, token, _ in some} for layer, some in cells.get(LENS, {}).items()}
    found = {
        scope: {layer: _figures_of(some, truth, stranger, lens.get(layer, {}), seed) for layer, some in sorted(by_layer.items())}
        for scope, by_layer in cells.items()
    }
    values = list(truth.values())
    commonest = max(values.count(token) for token in set(values)) / len(values) if values else float("nan")
    return found, {"texts": len(values), "different_tokens": len(set(values)), "commonest_token": commonest}


def _figures_of(
    some: Sequence[tuple[int, int, float]],
    truth: Mapping[int, int],
    stranger: Mapping[int, int],
    lens: Mapping[int, float],
    seed: int,
) -> dict[str, Estimate]:
    paired = [(p, float(token == truth[p])) for p, token, _ in some if p in lens]
    shuffled = [(p, float(token == stranger[p])) for p, token, _ in some if p in stranger]
    finite = [(p, bits) for p, _, bits in some if bits is not None and np.isfinite(bits)]
    return {
        "precision_at_1": statistics.rate([float(token == truth[p]) for p, token, _ in some], [p for p, *_ in some], seed=seed),
        "another_texts_token": statistics.rate([hit for _, hit in shuffled], [p for p, _ in shuffled], seed=seed),
        "above_logit_lens": statistics.difference(
            [hit for _, hit in paired], [lens[p] for p, _ in paired], [p for p, _ in paired], seed=seed
        ),
        "surprisal_bits": statistics.rate([bits for _, bits in finite], [p for p, _ in finite], seed=seed),
    }


def _result(run: Run, settings: dict[str, Any], deviations: Sequence[str], caveats: Sequence[str], seed: int) -> Result:
    found, said = scores(run, seed=seed)
    top = max(layer for by_layer in found.values() for layer in by_layer)
    below = {scope: {layer: one for layer, one in by_layer.items() if layer < top} for scope, by_layer in found.items()}
    middle = top // 2
    ranked = sorted((scope for scope in below if middle in below[scope]), key=lambda s: -below[s][middle]["precision_at_1"].value)
    claims = [
        f"In the middle of the model (layer {middle} of {top}), {scope} says the model's next token for "
        f"{below[scope][middle]['precision_at_1']} of {said['texts']:,} texts."
        for scope in ranked
    ]
    claims.append(
        f"The commonest next token would be right for {said['commonest_token']:.1%}; layer {top} through the logit lens is the model "
        "itself, and proves nothing."
    )
    claims += [_against_lens(scope, by_layer) for scope, by_layer in below.items() if scope != LENS]
    rows = tuple(
        (scope, layer, one["precision_at_1"], one["another_texts_token"], one["above_logit_lens"], one["surprisal_bits"])
        for scope, by_layer in found.items()
        for layer, one in by_layer.items()
    )
    table = Table(
        "by-layer",
        "Precision@1, the same held against another text's token, how far it is above the logit lens' on the same texts, and surprisal in "
        "bits, by scope and source layer",
        ("scope", "ℓ", "precision@1", "another text's token", "above the logit lens", "surprisal (bits)"),
        rows,
        ("precision@1", "another text's token", "above the logit lens"),
    )
    scored = {scope: {str(layer): one for layer, one in by_layer.items()} for scope, by_layer in found.items()}
    headline = {f"{scope}, layer {middle} of {top}": below[scope][middle]["precision_at_1"] for scope in ranked}
    headline |= {"commonest token": said["commonest_token"]}
    figures = (
        _lines(
            "precision",
            "Precision@1 by source layer, 95 % intervals over texts",
            "precision@1",
            found,
            "precision_at_1",
            (0, 1.03),
        ),
        _lines(
            "surprisal",
            "Surprisal of the said token by source layer, 95 % intervals over texts",
            "bits",
            found,
            "surprisal_bits",
            None,
        ),
    )
    return Result(
        "next-token",
        TITLE,
        PAPER,
        tuple(claims),
        headline,
        {"scopes": scored, **said},
        (table,),
        figures,
        settings,
        tuple(deviations),
        tuple(caveats),
        (run,),
    )


def _against_lens(scope: str, by_layer: Mapping[int, Mapping[str, Estimate]]) -> str:
    more = {layer: one["above_logit_lens"] for layer, one in by_layer.items() if one["above_logit_lens"].n}
    if not more:
        return f"{scope} was not held against the logit lens."
    worse = [str(layer) for layer, one in more.items() if one.value < 0]
    surely = sum(one.low > 0 for one in more.values())
    where = f"less precise at layer {', '.join(worse)}" if worse else "nowhere less precise"
    return (
        f"Beside the logit lens, on the same texts and below the last layer, {scope} is {where}; at {surely} of {len(more)} layers it is "
        "more precise by more than the interval of the difference."
    )


def _lines(name: str, title: str, label: str, found: Any, key: str, y_range: tuple[float, float] | None) -> Lines:
    lines = [
        Line(
            scope,
            tuple(map(float, by_layer)),
            tuple(one[key].value for one in by_layer.values()),
            tuple(one[key].low for one in by_layer.values()),
            tuple(one[key].high for one in by_layer.values()),
        )
        for scope, by_layer in found.items()
    ]
    return Lines(name, title, "source layer ℓ", label, tuple(lines), y_range)
