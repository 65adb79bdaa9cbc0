"""Train a tuned lens: for every layer ℓ < L minimise, over all tokens,

    KL(p_L ‖ lens_ℓ) = Σᵥ p_L(v) (log p_L(v) − log lens_ℓ(v))        nats; p_L: what the model says in the end, held fixed

Belrose et al. 2023, section 3, and their code: SGD with Nesterov momentum 0.9 at a rate of 1 · (1 − 0.9), or Adam (amsgrad) at 0.001;
weight decay 0.001; a rate that falls linearly to 0; gradients clipped to norm 1; 250 steps. They take 2¹⁸ tokens a step; here 2¹⁴,
because there are small models and small texts, too (`tokens_per_step`).

The windows of a step hang on (seed, step) alone, so a run that was stopped and resumed equals one that was not, to the last bit on a CPU. A
checkpoint is one safetensors file: tensors, and as JSON the step and the recipe. No pickle.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from patchscopes.core.errors import InputError, RefusedError
from patchscopes.core.files import make_folder, write_json, write_whole
from patchscopes.engine.gradients import unembedded
from patchscopes.lenses.report import LensReport, measure
from patchscopes.lenses.tuned_lens import TunedLens, load_tuned_lens
from patchscopes.lenses.windows import Window, batches, digest_of, require_one_stream, rows_at_once, see, windows
from patchscopes.maps.states import split
from patchscopes.model.model import Model

LENS, CHECKPOINT, TOLD = "tuned_lens.safetensors", "checkpoint.safetensors", "training.json"


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


@dataclass(frozen=True)
class TrainingProgress:
    """After a step: mean KL over the layers (bits a token), tokens a second, seconds left."""

    step: int
    steps: int
    kl: float
    tokens_per_second: float
    eta: float


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
        _claim(folder, about)
        if (folder / LENS).exists():
            return load_tuned_lens(folder / LENS)
    state = _State.fresh(model, recipe)
    if folder is not None and (folder / CHECKPOINT).exists():
        state.restore(folder / CHECKPOINT)
    _descend(model, some, recipe, state, folder, checkpoint_seconds, progress)
    report = measure(model, state.lens().map, fresh)
    provenance = {
        "method": "tuned lens",
        "model": model.provenance(),
        **about,
        "tokens": {"windows": len(some), "held_out": report.n, "seen": state.seen},
        "report": _told(report),
    }
    lens = state.lens(provenance)
    if folder is not None:
        lens.save(folder / LENS)
        write_json(folder / TOLD, {**about, "report": provenance["report"]})
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return lens


def refit_floor(model: Model, lens: TunedLens, texts: Sequence[str], steps: int = 50, seed: int = 0) -> LensReport:
    """The report of a lens on texts, with what a lens refitted to these very texts (Adam, from this one on) reaches there as its floor."""
    lens.require(model)
    some = windows(model, texts)
    recipe = Recipe(steps=steps, tokens_per_step=sum(map(len, some)), optimizer="adam", weight_decay=0.0, seed=seed)
    state = _State.fresh(model, recipe)
    state.start_from(lens)
    _descend(model, some, recipe, state, None, math.inf, lambda progress: None)
    return measure(model, lens.map, some).with_floor(measure(model, state.lens().map, some))


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
class _State:
    """Parameters and optimizer after `step` steps; `whole` is False while an update is being made."""

    weight: list[torch.nn.Parameter]
    bias: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seen: int = 0
    whole: bool = True

    @classmethod
    def fresh(cls, model: Model, recipe: Recipe) -> _State:
        n, d, device = model.n_layers, model.d_model, model.device
        weight = [torch.nn.Parameter(torch.zeros(d, d, device=device)) for _ in range(n)]
        bias = [torch.nn.Parameter(torch.zeros(d, device=device)) for _ in range(n)]
        beta, decay = recipe.momentum, recipe.weight_decay
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":  # PyTorch's momentum multiplies the rate by 1 / (1 − β); this undoes it
            rate = recipe.rate * (1 - beta)
            optimizer = torch.optim.SGD([*weight, *bias], lr=rate, momentum=beta, nesterov=beta > 0, weight_decay=decay)
        else:
            optimizer = torch.optim.Adam(
                [*weight, *bias], lr=1e-3 * recipe.rate, betas=(beta, 0.999), weight_decay=decay, amsgrad=True
            )
        return cls(weight, bias, optimizer)

    def start_from(self, lens: TunedLens) -> None:
        with torch.no_grad():
            for layer in range(len(self.weight)):
                self.weight[layer].copy_(lens.weight[layer])
                self.bias[layer].copy_(lens.bias[layer])

    def lens(self, provenance: dict[str, Any] | None = None) -> TunedLens:
        weight, bias = (torch.stack([p.detach().cpu().clone() for p in some]) for some in (self.weight, self.bias))
        return TunedLens(weight, bias, provenance or {})

    def keep(self, path: Path) -> None:
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate([*self.weight, *self.bias])}
        for i, held in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in held.items() if torch.is_tensor(value)}
        whole = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
        write_whole(path, save(whole, {"training": json.dumps({"step": self.step, "seen": self.seen})}))

    def restore(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            at = json.loads(file.metadata()["training"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
        held: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for i, parameter in enumerate([*self.weight, *self.bias]):
                parameter.copy_(tensors[f"parameter.{i}"])
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                held.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": held})
        self.step, self.seen = at["step"], at["seen"]


def _descend(
    model: Model,
    some: Sequence[Window],
    recipe: Recipe,
    state: _State,
    folder: Path | None,
    checkpoint_seconds: float,
    progress: Callable[[TrainingProgress], None],
) -> None:
    rates = [group["lr"] for group in _State.fresh(model, recipe).optimizer.param_groups]
    started = saved = time.monotonic()
    first = state.step
    try:
        while state.step < recipe.steps:
            for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (recipe.steps - state.step) / recipe.steps
            chosen = windows_of_step(some, recipe, state.step)
            kl = _gradients(model, chosen, state)
            torch.nn.utils.clip_grad_norm_([*state.weight, *state.bias], recipe.clip)
            state.whole = False
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.seen += sum(map(len, chosen))
            state.whole = True
            now = time.monotonic()
            if folder is not None and now - saved >= checkpoint_seconds and state.step < recipe.steps:
                state.keep(folder / CHECKPOINT)
                saved = now
            spent = (now - started) / (state.step - first)
            progress(
                TrainingProgress(
                    state.step, recipe.steps, kl / math.log(2), sum(map(len, chosen)) / spent, spent * (recipe.steps - state.step)
                )
            )
    except BaseException:  # Ctrl-C among them: what was done stays
        if folder is not None and state.whole and state.step > first:
            state.keep(folder / CHECKPOINT)
        raise


def _gradients(model: Model, chosen: Sequence[Window], state: _State) -> float:
    """Gradients of the mean KL of each layer, left in the parameters; the mean over the layers, in nats. A layer and some rows at a time,
    so that the logits of one layer are all that is held."""
    total, n = 0.0, sum(map(len, chosen))
    for batch in batches(chosen):
        seen = see(model, batch, range(model.n_layers))
        for layer, (weight, bias) in enumerate(zip(state.weight, state.bias, strict=True)):
            for rows in rows_at_once(model, len(seen.log_p)):
                h, log_p = seen.h[layer][rows].float(), seen.log_p[rows]
                with torch.enable_grad():
                    log_q = unembedded(model.engine, (h + h @ weight.T + bias).to(model.dtype)).float().log_softmax(-1)
                    gap = log_p - log_q
                    loss = (log_p.exp() * gap.masked_fill(log_p == -torch.inf, 0)).sum() / n
                loss.backward()
                total += float(loss.detach())
    return total / model.n_layers


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Write into `folder` what is trained there. RefusedError if it was something else."""
    file = folder / TOLD
    if file.exists():
        found = json.loads(file.read_text())
        differs = {key: (found.get(key), value) for key, value in about.items() if found.get(key) != value}
        if differs:
            raise RefusedError(
                f"{folder} belongs to another lens: (found, asked for) differ in {differs}. Give another folder, or delete this one"
            )
        return
    write_json(file, about)


def _told(report: LensReport) -> dict[str, Any]:
    return {"model_ce": report.model_ce, "n": report.n, "layers": [asdict(one) for one in report.layers]}
