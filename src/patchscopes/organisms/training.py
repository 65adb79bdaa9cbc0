"""What training the bundled models shares: one loop that can be stopped and goes on, and rows of documents laid end to end.

A checkpoint is a folder with `weights.safetensors`, `optimizers.pt` (tensors only) and `progress.json`, written aside and then
renamed. A step's batch must depend on its number alone; then a run that was stopped ends as one that was not.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from patchscopes.core.errors import RefusedError

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """After a step: mean loss (nats a token) since the last report, tokens seen a second, seconds left."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    eta: float


def packed(documents: Iterable[Sequence[T]], rows: int, length: int) -> list[list[T]]:
    """The tokens of documents laid end to end, each row starting with a document; what does not fit into a row is cut off."""
    found: list[list[T]] = []
    row: list[T] = []
    for document in documents:
        row += document
        if len(row) >= length:
            found.append(row[:length])
            row = []
            if len(found) == rows:
                break
    return found


def compiled(loss_of: Callable[..., Tensor], compile: bool | None) -> Callable[..., Tensor]:
    """`loss_of` through torch.compile, about twice as fast on a CPU; None: where there is the C++ compiler that this needs."""
    if compile is None:
        compile = shutil.which("g++") is not None or shutil.which("clang++") is not None
    return torch.compile(loss_of) if compile else loss_of


def descend(
    out: Path,
    model: nn.Module,
    optimizers: Sequence[tuple[torch.optim.Optimizer, float]],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    step_tokens: int,
    checkpoint_seconds: float,
    report_seconds: float,
    report: Callable[[Progress], None],
) -> None:
    """Train the parameters of `model` from the last checkpoint in `out`, or from the start, to the end. loss_of(step): the loss of its
    batch; optimizers: each with its learning rate, which rises over 2 % of the steps and falls linearly to 0."""
    first = _restore(out / "checkpoint", model, [optimizer for optimizer, _ in optimizers])
    warmup = max(1, steps // 50)
    reported = saved = time.monotonic()
    seen, losses = 0, []
    for step in range(first, steps):
        share = min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        seen += step_tokens
        now = time.monotonic()
        if now - saved >= checkpoint_seconds and step + 1 < steps:
            _save(out / "checkpoint", step + 1, model, [optimizer for optimizer, _ in optimizers])
            saved = now
        if now - reported >= report_seconds or step + 1 == steps:
            speed = seen / (now - reported)
            left = (steps - step - 1) * step_tokens / speed
            report(Progress(step + 1, steps, float(torch.stack(losses).mean()), speed, left))
            reported, seen, losses = now, 0, []


def claim(out: Path, recipe: dict[str, Any], result: str) -> bool:
    """Write the recipe into the folder `out`; whether its result is there. RefusedError if the folder belongs to another recipe."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "recipe.json"
    if file.exists() and (found := json.loads(file.read_text())) != recipe:
        differs = {key: (found.get(key), value) for key, value in recipe.items() if found.get(key) != value}
        raise RefusedError(
            f"{out} belongs to another recipe: (found, asked for) differ in {differs}. Give another folder, or delete this one."
        )
    file.write_text(json.dumps(recipe, indent=1) + "\n")
    return (out / result).exists()


def finish(out: Path) -> None:
    """Delete the checkpoint of a run that is done."""
    shutil.rmtree(out / "checkpoint", ignore_errors=True)


def _save(folder: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_model(model, str(aside / "weights.safetensors"))
    torch.save([optimizer.state_dict() for optimizer in optimizers], aside / "optimizers.pt")
    (aside / "progress.json").write_text(json.dumps({"step": step}))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _restore(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """The step to continue with: 0 without a checkpoint."""
    if not folder.exists():
        return 0
    progress = json.loads((folder / "progress.json").read_text())
    load_model(model, str(folder / "weights.safetensors"))
    for optimizer, state in zip(optimizers, torch.load(folder / "optimizers.pt", weights_only=True), strict=True):
        optimizer.load_state_dict(state)
    return progress["step"]
