"""Train a tuned lens: for every layer ℓ < L minimise, over all tokens,

    KL(p_L ‖ lens_ℓ) = Σᵥ p_L(v) (log p_L(v) − log lens_ℓ(v))        nats; p_L: what the model says in the end, held fixed

Belrose et al. 2023, section 3, and their code: SGD with Nesterov momentum 0.9 at a rate of 1 · (1 − 0.9), or Adam (amsgrad) at 0.001;
weight decay 0.001; a rate that falls linearly to 0; gradients clipped to norm 1; 250 steps. They take 2¹⁸ tokens a step; here 2¹⁴,
because there are small models and small texts, too (`tokens_per_step`).

The windows of a step hang on (seed, step) alone; checkpoints and resuming are those of `descent`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from patchscopes.core.errors import InputError
from patchscopes.core.files import make_folder
from patchscopes.engine.gradients import unembedded
from patchscopes.lenses.descent import State, TrainingProgress, claim, descend, finish
from patchscopes.lenses.report import LensReport, measure
from patchscopes.lenses.tuned_lens import TunedLens, load_tuned_lens
from patchscopes.lenses.windows import Window, batches, digest_of, require_one_stream, rows_at_once, see, windows
from patchscopes.maps.states import split
from patchscopes.model.model import Model

LENS = "tuned_lens.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, beside the model and the texts. rate: times the optimizer's own (see above)."""

    steps: int = 250
    tokens_per_step: int = 2**14
    optimizer: str = "sgd"  # or "adam"
    rate: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-3
    clip: float = 1.0
    length: int | None = None  # tokens of a window; None: the model's context, 2048 at most
    held_out: float = 0.1  # share of the texts
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens_per_step < 2 or self.optimizer not in ("sgd", "adam"):
            raise InputError(
                f"steps={self.steps}, tokens_per_step={self.tokens_per_step}, optimizer={self.optimizer!r}; expected at least 1, "
                "at least 2, 'sgd' or 'adam'"
            )


def train_tuned_lens(
    model: Model,
    texts: Sequence[str],
    out: str | Path | None = None,
    recipe: Recipe = Recipe(),
    *,
    checkpoint_seconds: float = 120.0,
    progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> TunedLens:
    """Train on texts, of which a share is held out for the report in `lens.provenance["report"]`.

    out   folder for the lens and its checkpoints; training that was stopped there goes on, a finished lens is returned. RefusedError if
          the folder belongs to another recipe, model or other texts. None: nothing is written

    Whatever ends it early (Ctrl-C, an error in `progress`) leaves a checkpoint of the last finished step.
    """
    require_one_stream(model)
    fitted, away = split(texts, recipe.held_out, recipe.seed)
    some, fresh = windows(model, fitted, recipe.length), windows(model, away, recipe.length)
    about = {"recipe": asdict(recipe), "weight_hash": model.weight_hash, "texts": digest_of(some), "held_out": digest_of(fresh)}
    folder = None if out is None else make_folder(Path(out))
    if folder is not None:
        claim(folder, about, "lens")
        if (folder / LENS).exists():
            return load_tuned_lens(folder / LENS)
    weights = _Weights.untrained(model)
    state = weights.state(recipe)
    descend(state, recipe.steps, recipe.clip, _step(model, some, recipe, weights), folder, checkpoint_seconds, progress)
    report = measure(model, weights.lens().map, fresh)
    provenance = {
        "method": "tuned lens",
        "model": model.provenance(),
        **about,
        "tokens": {"windows": len(some), "held_out": report.n, "seen": state.seen},
        "report": _told(report),
    }
    lens = weights.lens(provenance)
    if folder is not None:
        lens.save(folder / LENS)
        finish(folder, {**about, "report": provenance["report"]})
    return lens


def refit_floor(model: Model, lens: TunedLens, texts: Sequence[str], steps: int = 50, seed: int = 0) -> LensReport:
    """The report of a lens on texts, with what a lens refitted to these very texts (Adam, from this one on) reaches there as its floor."""
    lens.require(model)
    some = windows(model, texts)
    recipe = Recipe(steps=steps, tokens_per_step=sum(map(len, some)), optimizer="adam", weight_decay=0.0, seed=seed)
    weights = _Weights.untrained(model)
    weights.start_from(lens)
    descend(weights.state(recipe), recipe.steps, recipe.clip, _step(model, some, recipe, weights))
    return measure(model, lens.map, some).with_floor(measure(model, weights.lens().map, some))


def windows_of_step(some: Sequence[Window], recipe: Recipe, step: int) -> list[Window]:
    """What is seen at a step: the windows, shuffled anew in every epoch, one after the other."""
    per_step = max(1, round(recipe.tokens_per_step / (sum(map(len, some)) / len(some))))
    found: list[Window] = []
    at = step * per_step
    while len(found) < per_step:
        epoch, start = divmod(at, len(some))
        order = list(range(len(some)))
        random.Random(f"{recipe.seed} epoch {epoch}").shuffle(order)
        taken = order[start : start + per_step - len(found)]
        found += [some[k] for k in taken]
        at += len(taken)
    return found


@dataclass(eq=False)
class _Weights:
    """W_ℓ and b_ℓ as they are trained."""

    weight: list[torch.nn.Parameter]
    bias: list[torch.nn.Parameter]

    @classmethod
    def untrained(cls, model: Model) -> _Weights:
        n, d, device = model.n_layers, model.d_model, model.device
        weight = [torch.nn.Parameter(torch.zeros(d, d, device=device)) for _ in range(n)]
        return cls(weight, [torch.nn.Parameter(torch.zeros(d, device=device)) for _ in range(n)])

    def state(self, recipe: Recipe) -> State:
        some, beta, decay = [*self.weight, *self.bias], recipe.momentum, recipe.weight_decay
        if recipe.optimizer == "sgd":  # PyTorch's momentum multiplies the rate by 1 / (1 − β); this undoes it
            rate = recipe.rate * (1 - beta)
            return State(some, torch.optim.SGD(some, lr=rate, momentum=beta, nesterov=beta > 0, weight_decay=decay))
        rate, betas = 1e-3 * recipe.rate, (beta, 0.999)
        return State(some, torch.optim.Adam(some, lr=rate, betas=betas, weight_decay=decay, amsgrad=True))

    def start_from(self, lens: TunedLens) -> None:
        with torch.no_grad():
            for layer in range(len(self.weight)):
                self.weight[layer].copy_(lens.weight[layer])
                self.bias[layer].copy_(lens.bias[layer])

    def lens(self, provenance: dict[str, Any] | None = None) -> TunedLens:
        weight, bias = (torch.stack([p.detach().cpu().clone() for p in some]) for some in (self.weight, self.bias))
        return TunedLens(weight, bias, provenance or {})


def _step(model: Model, some: Sequence[Window], recipe: Recipe, weights: _Weights) -> Callable[[int], tuple[float, int]]:
    def gradients(step: int) -> tuple[float, int]:
        chosen = windows_of_step(some, recipe, step)
        return _gradients(model, chosen, weights), sum(map(len, chosen))

    return gradients


def _gradients(model: Model, chosen: Sequence[Window], weights: _Weights) -> float:
    """Gradients of the mean KL of each layer, left in the parameters; the mean over the layers, in nats. A layer and some rows at a time,
    so that the logits of one layer are all that is held."""
    total, n = 0.0, sum(map(len, chosen))
    for batch in batches(chosen):
        seen = see(model, batch, range(model.n_layers))
        for layer, (weight, bias) in enumerate(zip(weights.weight, weights.bias, strict=True)):
            for rows in rows_at_once(model, len(seen.log_p)):
                h, log_p = seen.h[layer][rows].float(), seen.log_p[rows]
                with torch.enable_grad():
                    log_q = unembedded(model.engine, (h + h @ weight.T + bias).to(model.dtype)).float().log_softmax(-1)
                    gap = log_p - log_q
                    loss = (log_p.exp() * gap.masked_fill(log_p == -torch.inf, 0)).sum() / n
                loss.backward()
                total += float(loss.detach())
    return total / model.n_layers


def _told(report: LensReport) -> dict[str, Any]:
    return {"model_ce": report.model_ce, "n": report.n, "layers": [asdict(one) for one in report.layers]}
