"""Next-token prediction: what does a layer already know of what the model will say next?

For a text and one of its positions, each layer ℓ is looked at through scopes that say one token; it is held against the token that the
model itself says there (Ghandeharioun et al. 2024, 4.1 and appendix B):

    precision@1   whether the scope's token is the model's likeliest, 1[argmax p̃ = argmax p_L]
    surprisal     −log2 p_L[argmax p̃]: the model's own distribution at the scope's token, bits

The model's likeliest token is the logit lens at layer L: no other pass is needed. Scopes: token identity (few-shot), the bare "?" (of
which a bare "x" is a copy where the tokenizer puts nothing in front), the logit lens; and whatever is given as further parts, such as a
tuned lens (`lens_parts`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.core.errors import InputError, NotAvailableError
from patchscopes.evaluate import planted, statistics
from patchscopes.evaluate.frame import Asked, Line, Lines, Result, Table, caveats_of, recorded, settings_of
from patchscopes.evaluate.statistics import Estimate
from patchscopes.organisms import bundled_lenses
from patchscopes.runs.lens_folder import is_lens
from patchscopes.runs.spec import Experiment

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
LENS = "logit lens"
Part = Mapping[str, Any]  # of an experiment; its scopes are scored beside the others


@dataclass(frozen=True)
class Settings:
    """Every choice, as in the paper.

    scopes     of `SCOPES`
    lens       a tuned lens: a file or folder that training left, a folder in the public format, the name of a bundled model; or a folder of
               affine maps, layer-3.safetensors for layer 3, as maps.save_map writes them
    longest    texts with more words are left out
    """

    scopes: tuple[str, ...] = ("logit lens", "token identity", "bare ?")
    lens: str | None = None
    longest: int = 250


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


def lens_parts(lens: str | Path, name: str = "tuned lens") -> list[dict[str, Any]]:
    """A lens as parts: h at layer ℓ goes through the layer's map into the last layer. lens: see `Settings`. NotAvailableError if there is
    none."""
    path = Path(lens)
    path = path if path.exists() else bundled_lenses().get(str(lens), path)
    scope = {"name": name, "preset": "logit-lens"}
    if path.is_file() or (path.is_dir() and is_lens(path)):
        return [{"name": name, "layers": "0:-1", "scope": [{**scope, "map": [{"tuned_lens": str(path.resolve())}]}]}]
    found = {int(m[1]): file for file in path.glob("*.safetensors") if (m := re.search(r"(\d+)$", file.stem))}
    if not found:
        raise NotAvailableError(
            f"no maps in {str(path)!r}: expected a tuned lens (tuned_lens.safetensors, or config.json and params.pt), or "
            "layer-0.safetensors and so on, as maps.save_map writes them"
        )
    return [
        {"name": f"{name} {layer}", "layers": [layer], "scope": [{**scope, "map": [{"affine": str(file.resolve())}]}]}
        for layer, file in sorted(found.items())
    ]


# ----------------------------------------------------------------------------------------------------------------------- experiment


def _prompts(asked: Asked, settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """Texts with one position each, drawn by the seed; and notes on what was left out."""
    n = asked.items(TEXTS, QUICK)
    found = texts(asked.data) if asked.data is not None else planted.texts(2 * n, asked.seed)
    kept = [text for text in dict.fromkeys(found) if 0 < len(text.split()) <= settings.longest]
    notes = [f"{len(found) - len(kept):,} of {len(found):,} texts were left out: empty, there twice, or too long."]
    rng = random.Random(f"{asked.seed} next-token")
    rng.shuffle(kept)
    tokens = _tokenizer(asked)
    prompts = []
    for text in kept[:n]:
        prompts.append({"text": text, "at": rng.randrange(max(1, len(tokens(text))))})
    if not prompts:
        raise InputError(f"there is no text to read; expected one a line, of at most {settings.longest} words")
    return prompts, notes if len(kept) < len(found) and asked.data is not None else []


def texts(path: Path) -> list[str]:
    """Texts of a file: lines of a .txt, `text` or `prompt` of a .jsonl, the prompts of jacobian-lens items (.json)."""
    if not path.is_file():
        raise NotAvailableError(f"there is no file {str(path)!r}; expected texts, one a line, .jsonl, or lens items (.json)")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise InputError(f"{str(path)!r} is not UTF-8 text: byte {e.start} cannot be read") from None
    if path.suffix == ".json":
        from patchscopes.evaluate.lens_items import lens_items

        return [item.prompt for item in lens_items(path)[0]]
    if path.suffix == ".jsonl":
        rows = [_row(line, f"{str(path)!r} line {k}") for k, line in enumerate(lines, 1) if line.strip()]
        return [text for row in rows if isinstance(text := row.get("text", row.get("prompt")), str)]
    return [line.strip() for line in lines if line.strip()]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{where} is not valid JSON: {e.msg}") from None
    if not isinstance(row, dict):
        raise InputError(f'{where} holds a {type(row).__name__}; expected an object such as {{"text": …}}')
    return row


def _tokenizer(asked: Asked) -> Any:
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
    parts += [*(lens_parts(settings.lens) if settings.lens else []), *more]
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
    """scope → layer → precision@1, the same against another text's token, surprisal; and what the model itself says: how many different
    tokens, and the share of the commonest."""
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
    found = {
        scope: {layer: _figures_of(some, truth, stranger, seed) for layer, some in sorted(by_layer.items())}
        for scope, by_layer in cells.items()
    }
    values = list(truth.values())
    commonest = max(values.count(token) for token in set(values)) / len(values) if values else float("nan")
    return found, {"texts": len(values), "different_tokens": len(set(values)), "commonest_token": commonest}


def _figures_of(
    some: Sequence[tuple[int, int, float]], truth: Mapping[int, int], stranger: Mapping[int, int], seed: int
) -> dict[str, Estimate]:
    shuffled = [(p, float(token == stranger[p])) for p, token, _ in some if p in stranger]
    finite = [(p, bits) for p, _, bits in some if bits is not None and np.isfinite(bits)]
    return {
        "precision_at_1": statistics.rate([float(token == truth[p]) for p, token, _ in some], [p for p, *_ in some], seed=seed),
        "another_texts_token": statistics.rate([hit for _, hit in shuffled], [p for p, _ in shuffled], seed=seed),
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
    rows = tuple(
        (scope, layer, one["precision_at_1"], one["another_texts_token"], one["surprisal_bits"])
        for scope, by_layer in found.items()
        for layer, one in by_layer.items()
    )
    table = Table(
        "by-layer",
        "Precision@1, the same held against another text's token, and surprisal in bits, by scope and source layer",
        ("scope", "ℓ", "precision@1", "another text's token", "surprisal (bits)"),
        rows,
        ("precision@1", "another text's token"),
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
