"""Future lens with a learned soft prompt: from one state, what the model says over the next N tokens.

    T = k learned embeddings P, i* = the last of them, ℓ* = ℓ, f = identity; greedy, N tokens

    minimise over P    E Σₙ KL(pₙ ‖ qₙ) / N      nats

for a text S read up to a position, h its state there at layer ℓ: c₁ … c_N is the model's own greedy continuation of S, pₙ what it says of
token n behind S and c₁ … cₙ₋₁, and qₙ what it says behind T with h in its last place and the same c₁ … cₙ₋₁. The model is frozen.

Pal et al. 2023, "Future Lens: Anticipating Subsequent Tokens from a Single Hidden State": k = 10, AdamW at 0.0005 with a weight decay
of 1e-5, batches of 8. They take the text's own tokens for c, and count what is said behind these; here c is the model's, and when P is
scored nothing but the state is given. Here the rate falls linearly to 0.

Beside it stand the paper's other ways, fitted to the same states: its first fixed prompt; an affine map for each n from h to the last
layer's state where the model says cₙ; a bigram table, cₙ₊₁ given cₙ, which knows the token at the position and nothing of the state.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from patchscopes.controls.vectors import random_like
from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError, LayerError, RefusedError, VectorError
from patchscopes.core.files import make_folder, write_whole
from patchscopes.core.finite import require_finite
from patchscopes.core.layers import resolve_layers
from patchscopes.engine.run import Run
from patchscopes.lenses.descent import State, TrainingProgress, claim, descend, finish
from patchscopes.lenses.report import made_from
from patchscopes.lenses.windows import Window, digest_of, own_windows, require_one_stream, windows
from patchscopes.maps import Affine, Moments
from patchscopes.maps.states import split
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens, as_tokens, show_ids
from patchscopes.scopes.future_lens import future_lens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source

PROMPT, FORMAT = "soft_prompt.safetensors", 1
RIDGE = 1e-3  # of the linear baseline
AT_ONCE, DRAWS = 64, 8  # texts of a pass; random prompts of a check


@dataclass(frozen=True)
class PromptRecipe:
    """Everything that the result depends on, beside the model, the layer and the texts. slots: k; ahead: N; per_text: positions drawn of
    each text; rate: AdamW's."""

    slots: int = 10
    ahead: int = 3
    per_text: int = 4
    steps: int = 500
    batch: int = 8
    rate: float = 5e-4
    weight_decay: float = 1e-5
    clip: float = 1.0
    held_out: float = 0.1  # share of the texts
    seed: int = 0

    def __post_init__(self) -> None:
        low = {name: value for name, value in asdict(self).items() if name in _WHOLE and value < 1}
        if low or not self.rate > 0:
            found = ", ".join(f"{name}={value}" for name, value in (low or {"rate": self.rate}).items())
            raise InputError(f"{found}; expected slots, ahead, per_text, steps and batch of at least 1, and a rate above 0")


_WHOLE = ("slots", "ahead", "per_text", "steps", "batch")


@dataclass(frozen=True, eq=False)
class Futures:
    """States and what the model says behind them. ids: the texts up to the position; h: [row, d_model]; said: [row, ahead], the greedy
    continuation; last: [row, ahead, d_model], the last layer's state where each of it is said; log_p: [row, ahead, vocab], nats."""

    ids: tuple[Window, ...]
    h: Float[Tensor, "row d_model"]
    said: tuple[tuple[int, ...], ...]
    last: Float[Tensor, "row ahead d_model"]
    log_p: Float[Tensor, "row ahead vocab"]


@dataclass(frozen=True)
class FutureReport:
    """precision[way][n − 1]: share of `n` states from which the n-th token ahead is the model's own; ways: "soft prompt", "fixed prompt",
    "linear", "bigram". kl: bits a token of the soft prompt, the model's own tokens before given."""

    precision: Mapping[str, tuple[float, ...]]
    kl: float
    n: int

    @property
    def table(self) -> pl.DataFrame:
        """A row for each way and n."""
        return pl.DataFrame(
            [
                {"way": way, "ahead": k, "precision": value}
                for way, values in self.precision.items()
                for k, value in enumerate(values, 1)
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"precision": {way: list(values) for way, values in self.precision.items()}, "kl": self.kl, "n": self.n}


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """P, as the model's first block receives embeddings (site `embed`), behind what the tokenizer puts in front. layer: ℓ = ℓ*. ids: tokens
    that keep the places. provenance: model, texts, training."""

    slots: Float[Tensor, "slot d_model"]
    layer: int
    ids: tuple[int, ...]
    ahead: int = 3
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require_finite(self.slots, "the soft prompt")
        if len(self.slots) > len(self.ids):
            raise InputError(f"{len(self.slots)} embeddings were given for {len(self.ids)} tokens; expected no more than tokens")

    @property
    def places(self) -> list[int]:
        """Positions of the embeddings in T; the last is i*."""
        return list(range(len(self.ids) - len(self.slots), len(self.ids)))

    def scope(self, model: Model, *, max_new_tokens: int | None = None) -> Patchscope:
        """The soft prompt as a Patchscope of `model`: read at any layer, written at the one that it was trained for."""
        self.require(model)
        edit = Edit("embed", self.places, self.slots.to(model.device, model.dtype))
        tokens = self.ahead if max_new_tokens is None else max_new_tokens
        # no text: nothing can be said in the placeholder's place, so there is no control with the source's own words
        prompt, i_star = replace(as_tokens(self.ids), strings=tuple(show_ids(model.tokenizer, self.ids))), self.places[-1]
        return Patchscope(prompt, i_star, self.layer, model=model, max_new_tokens=tokens, edits=[edit], name="future-lens-soft")

    def require(self, model: Model) -> None:
        """VectorError or LayerError if the model is of another width, or has no such layer; InputError if it has no such tokens."""
        if self.slots.shape[-1] != model.d_model:
            raise VectorError(f"the soft prompt is {self.slots.shape[-1]} wide; {model.name} is {model.d_model} wide")
        if self.layer > model.n_layers:
            raise LayerError(f"the soft prompt is for layer {self.layer}; {model.name} has {model.n_layers}")
        if max(self.ids) >= model.vocab:
            raise InputError(f"the soft prompt has token ids up to {max(self.ids)}; {model.name} has {model.vocab} tokens")

    def check(self, model: Model, texts: Sequence[str] | None = None) -> tuple[float, float]:
        """(bits a token of the soft prompt, the least of prompts that were not learned) on texts or (None) on what the model says itself.
        Not learned are a bare "x" and random vectors of the same norms, drawn eight times. RefusedError if one of them is as close to the
        model; VectorError, LayerError or InputError if the soft prompt cannot be used at all."""
        self.require(model)
        some = windows(model, texts) if texts is not None else own_windows(model)
        seen = futures(model, some, self.layer, PromptRecipe(ahead=self.ahead, per_text=2))
        random_ones = [replace(self, slots=random_like(self.slots, f"soft prompt {k}")) for k in range(DRAWS)]
        others = [one.divergence(model, seen) for one in random_ones]
        mine, least = self.divergence(model, seen), min(_divergence(model, model.tokens("x").ids, self.layer, seen), *others)
        if not mine < least:
            raise RefusedError(
                f"this soft prompt does not fit {model.name}: what the model says behind it is {mine:.2f} bits a token (KL) from its own "
                f"text, behind prompts that were not learned {least:.2f}. It was most likely trained for another model. Pass check=False "
                "to use it all the same"
            )
        return mine, least

    def divergence(self, model: Model, some: Futures) -> float:
        """E Σₙ KL(pₙ ‖ qₙ) / N, bits."""
        edit = Edit("embed", self.places, self.slots.to(model.device, model.dtype))
        return _divergence(model, self.ids, self.layer, some, [edit])

    def save(self, path: str | Path) -> None:
        """As safetensors with provenance."""
        about = {"format": FORMAT, "layer": self.layer, "ids": self.ids, "ahead": self.ahead, "provenance": dict(self.provenance)}
        write_whole(
            Path(path), save({"slots": self.slots.detach().float().cpu().contiguous()}, {"soft_prompt": json.dumps(about)})
        )


def load_soft_prompt(path: str | Path, model: Model | None = None, *, check: bool = True) -> SoftPrompt:
    """A soft prompt from a file that `save` wrote, or a folder that training left.

    model  the model that it is for: width, layer and what both say are compared, and it is refused if they do not fit. check=False compares
           width and layer alone
    """
    path = Path(path)
    file = path / PROMPT if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"there is no soft prompt {str(file)!r}; expected a file that SoftPrompt.save wrote, or a training folder"
        )
    try:
        with safe_open(file, "pt") as held:
            about = json.loads((held.metadata() or {})["soft_prompt"])
            slots = held.get_tensor("slots").clone()
        if about["format"] != FORMAT:
            raise InputError(f"{str(file)!r} is a soft prompt of format {about['format']!r}; this version reads format {FORMAT}")
        found = SoftPrompt(slots, int(about["layer"]), tuple(about["ids"]), int(about["ahead"]), about["provenance"])
    except (SafetensorError, KeyError, TypeError, ValueError) as e:  # ValueError: no JSON, too
        raise InputError(f"{str(file)!r} could not be read as a soft prompt: {e!r}") from None
    if model is not None:
        found.require(model)
        if check and not made_from(model, found.provenance):
            found.check(model)
    return found


def train_soft_prompt(
    model: Model,
    texts: Sequence[str],
    layer: int,
    out: str | Path | None = None,
    recipe: PromptRecipe = PromptRecipe(),
    *,
    checkpoint_seconds: float = 120.0,
    progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> SoftPrompt:
    """Train for states at `layer`, on texts, of which a share is held out for the report in `provenance["report"]`.

    out   folder for the soft prompt and its checkpoints; training that was stopped there goes on, a finished one is returned. RefusedError
          if the folder belongs to another recipe, layer, model or other texts. None: nothing is written
    """
    require_one_stream(model)
    (ell,) = resolve_layers(layer, model.n_layers)
    fitted, away = split(texts, recipe.held_out, recipe.seed)
    some, fresh = windows(model, fitted), windows(model, away)
    about = {
        "method": "future lens, soft prompt",
        "layer": ell,
        "recipe": asdict(recipe),
        "weight_hash": model.weight_hash,
        "texts": digest_of(some),
        "held_out": digest_of(fresh),
    }
    folder = None if out is None else make_folder(Path(out))
    if folder is not None:
        claim(folder, about, "soft prompt")
        if (folder / PROMPT).exists():
            return load_soft_prompt(folder / PROMPT)
    seen, unseen = futures(model, some, ell, recipe), futures(model, fresh, ell, recipe)
    start = untrained(model, ell, recipe)
    slots = torch.nn.Parameter(start.slots.float().clone().to(model.device))
    state = State([slots], torch.optim.AdamW([slots], lr=recipe.rate, weight_decay=recipe.weight_decay))

    def gradients(step: int) -> tuple[float, int]:
        rows = rows_of_step(len(seen.ids), recipe, step)
        edit = Edit("embed", start.places, slots.detach().to(model.dtype))
        kl, slots.grad = _gradient(model, start.ids, ell, seen, rows, edit)
        return kl, len(rows) * recipe.ahead

    descend(state, recipe.steps, recipe.clip, gradients, folder, checkpoint_seconds, progress)
    made = SoftPrompt(slots.detach().cpu().clone(), ell, start.ids, recipe.ahead)
    report = evaluate(made, model, unseen, seen)
    tokens = {"states": len(seen.ids), "held_out": report.n, "seen": state.seen}
    provenance = {"model": model.provenance(), **about, "tokens": tokens, "report": report.to_json()}
    made = SoftPrompt(made.slots, ell, made.ids, made.ahead, provenance)
    if folder is not None:
        made.save(folder / PROMPT)
        finish(folder, {**about, "report": report.to_json()})
    return made


def untrained(model: Model, layer: int, recipe: PromptRecipe) -> SoftPrompt:
    """What training starts from: embeddings of tokens that are drawn by the seed."""
    special = set(model.tokenizer.all_special_ids)
    plain = [i for i in range(min(model.vocab, len(model.tokenizer))) if i not in special]
    drawn = random.Random(f"{recipe.seed} soft prompt").choices(plain, k=recipe.slots)
    x = model.tokens("x")
    lead = [i for i, added in zip(x.ids, x.special, strict=True) if added]
    ids = (*lead[:1], *drawn)  # BOS, where the tokenizer has it
    there = model.run(as_tokens(ids), read="embed")["embed"][0, len(ids) - recipe.slots :]
    return SoftPrompt(there.detach().float().cpu().clone(), layer, ids, recipe.ahead)


def futures(model: Model, some: Sequence[Window], layer: int, recipe: PromptRecipe) -> Futures:
    """States at `layer` at `per_text` positions of each window, drawn by its content and the seed, and the model's own greedy
    continuation. Positions behind which the model ends the text within N tokens are left out. InputError if none is left."""
    room = None if model.context is None else model.context - recipe.ahead
    cut: list[Window] = []
    for ids in some:
        places = range(1, len(ids) if room is None else min(len(ids), room))
        rng = random.Random(f"{recipe.seed} {ids}")
        cut += [ids[: p + 1] for p in sorted(rng.sample(places, min(recipe.per_text, len(places))))]
    cut = sorted(dict.fromkeys(cut), key=len)
    kept: list[Window] = []
    said: list[tuple[int, ...]] = []
    h, last, log_p = [], [], []
    for k in range(0, len(cut), AT_ONCE):
        batch = cut[k : k + AT_ONCE]
        texts = model.generate([as_tokens(ids) for ids in batch], max_new_tokens=recipe.ahead)
        pairs = [(ids, one.ids) for ids, one in zip(batch, texts, strict=True) if len(one.ids) == recipe.ahead]
        if not pairs:
            continue
        run = model.run(
            [as_tokens((*ids, *more[:-1])) for ids, more in pairs], read=[f"resid.{layer}", f"resid.{model.n_layers}"]
        )
        for row, (ids, more) in enumerate(pairs):
            columns = run.mask[row].nonzero()[-recipe.ahead :, 0].tolist()
            kept.append(ids)
            said.append(more)
            h.append(run[f"resid.{layer}"][row, columns[0]])
            last.append(run[f"resid.{model.n_layers}"][row, columns])
            log_p.append(run.logits[row, columns].float().log_softmax(-1))
    if not kept:
        raise InputError(
            f"behind none of {len(cut)} positions of {len(some)} texts does the model say {recipe.ahead} tokens; give longer texts, or a "
            "smaller ahead"
        )
    return Futures(tuple(kept), torch.stack(h), tuple(said), torch.stack(last), torch.stack(log_p))


def rows_of_step(n: int, recipe: PromptRecipe, step: int) -> list[int]:
    """Which of n states a step sees: all of them, shuffled anew in every epoch, one after the other."""
    found: list[int] = []
    at = step * recipe.batch
    while len(found) < recipe.batch:
        epoch, start = divmod(at, n)
        order = list(range(n))
        random.Random(f"{recipe.seed} epoch {epoch}").shuffle(order)
        taken = order[start : start + recipe.batch - len(found)]
        found += taken
        at += len(taken)
    return found


@torch.no_grad()
def evaluate(prompt: SoftPrompt, model: Model, some: Futures, fitted: Futures) -> FutureReport:
    """Precision@1 for each token ahead on `some`, of the soft prompt and of the baselines, these fitted to `fitted`."""
    source = Source.of_vectors(model, some.h, layer=prompt.layer)
    n = prompt.ahead
    fixed = future_lens(layer=prompt.layer, max_new_tokens=n)
    ways = {"soft prompt": _said(prompt.scope(model), source, model, n), "fixed prompt": _said(fixed, source, model, n)}
    linear = [_linear(fitted.h, fitted.last[:, k]) for k in range(n)]
    guessed = [model.unembed(f(some.h)).argmax(-1).tolist() for f in linear]
    ways["linear"] = list(zip(*guessed, strict=True))
    ways["bigram"] = bigrams([(*ids[-1:], *more) for ids, more in zip(fitted.ids, fitted.said, strict=True)], some.ids, n)
    precision = {
        way: tuple(sum(a[k : k + 1] == b[k : k + 1] for a, b in zip(told, some.said, strict=True)) / len(told) for k in range(n))
        for way, told in ways.items()
    }
    return FutureReport(precision, prompt.divergence(model, some), len(some.ids))


def bigrams(chains: Sequence[Sequence[int]], behind: Sequence[Window], n: int) -> list[tuple[int, ...]]:
    """n tokens behind each window by the likeliest successor in `chains`; after a token that never stood there, the likeliest token."""
    after: dict[int, Counter[int]] = {}
    for chain in chains:
        for a, b in itertools.pairwise(chain):
            after.setdefault(a, Counter())[b] += 1
    commonest = Counter(b for chain in chains for b in chain[1:]).most_common(1)[0][0]
    found = []
    for ids in behind:
        told, at = [], ids[-1]
        for _ in range(n):
            at = after[at].most_common(1)[0][0] if at in after else commonest
            told.append(at)
        found.append(tuple(told))
    return found


def _linear(x: Float[Tensor, "row d_model"], y: Float[Tensor, "row d_model"]) -> Affine:
    moments = Moments()
    moments.add(x, y)
    return moments.affine(RIDGE)


def _said(scope: Patchscope, source: Source, model: Model, n: int) -> list[tuple[int, ...]]:
    """Token ids that a scope says of each vector. Texts could not be told apart from other tokens with the same text."""
    from patchscopes.scopes.viewing import Viewing

    return [one.said[:n] for one in Viewing(scope, source, controls=False, evidence=False).read(strict=True)]


def _patched(ids: Sequence[int], layer: int, some: Futures, rows: Sequence[int]) -> tuple[list[Tokens], list[Edit]]:
    """T with each state in its last place, and the model's own tokens behind it, all but the last."""
    prompts = [as_tokens((*ids, *some.said[row][:-1])) for row in rows]
    return prompts, [Edit(f"resid.{layer}", len(ids) - 1, some.h[row], prompt=k) for k, row in enumerate(rows)]


def _kl(logits: Float[Tensor, "row pos vocab"], some: Futures, rows: Sequence[int]) -> Float[Tensor, " row"]:
    """Mean over the tokens ahead of KL(p ‖ q), nats."""
    log_q, log_p = logits[:, -some.log_p.shape[1] :].float().log_softmax(-1), some.log_p[list(rows)]
    gap = (log_p - log_q).masked_fill(log_p == -torch.inf, 0)
    return (log_p.exp() * gap).sum(-1).mean(-1)


def _gradient(
    model: Model, ids: Sequence[int], layer: int, some: Futures, rows: Sequence[int], edit: Edit
) -> tuple[float, Tensor]:
    """(mean KL over the rows, its gradient with respect to the edit's value). A gradient, even of zeros, is left for every step."""
    prompts, edits = _patched(ids, layer, some, rows)

    def metric(run: Run) -> Tensor:
        return _kl(run.logits, some, rows) / len(rows)

    found = model.gradients(prompts, metric, edits=[edit, *edits])
    assert found.edits[0] is not None
    return float(found.metric.sum()), found.edits[0].float()


@torch.no_grad()
def _divergence(model: Model, ids: Sequence[int], layer: int, some: Futures, edits: Sequence[Edit] = ()) -> float:
    total = 0.0
    for k in range(0, len(some.ids), AT_ONCE):
        rows = range(k, min(k + AT_ONCE, len(some.ids)))
        prompts, states = _patched(ids, layer, some, rows)
        total += float(_kl(model.run(prompts, edits=[*edits, *states]).logits, some, rows).sum())
    return total / len(some.ids) / math.log(2)
