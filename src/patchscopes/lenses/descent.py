"""Gradient descent that survives: what trained lenses and soft prompts share.

The rate falls linearly to 0, gradients are clipped. A checkpoint is one safetensors file: tensors, and as JSON the step. No pickle.
What a step sees must hang on (seed, step) alone; then a run that was stopped and resumed equals one that was not, to the last bit on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from patchscopes.core.errors import RefusedError
from patchscopes.core.files import write_json, write_whole

CHECKPOINT, TOLD = "checkpoint.safetensors", "training.json"


@dataclass(frozen=True)
class TrainingProgress:
    """After a step: mean KL (bits a token), tokens a second, seconds left."""

    step: int
    steps: int
    kl: float
    tokens_per_second: float
    eta: float


@dataclass(eq=False)
class State:
    """Parameters and optimizer after `step` steps, `seen` tokens; `whole` is False while an update is being made."""

    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seen: int = 0
    whole: bool = True

    def keep(self, path: Path) -> None:
        """Write a checkpoint."""
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        for i, held in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in held.items() if torch.is_tensor(value)}
        whole = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
        write_whole(path, save(whole, {"training": json.dumps({"step": self.step, "seen": self.seen})}))

    def restore(self, path: Path) -> None:
        """Take over a checkpoint."""
        with safe_open(path, "pt") as file:
            at = json.loads(file.metadata()["training"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
        held: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{i}"])
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                held.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": held})
        self.step, self.seen = at["step"], at["seen"]


def descend(
    state: State,
    steps: int,
    clip: float,
    gradients: Callable[[int], tuple[float, int]],
    folder: Path | None = None,
    checkpoint_seconds: float = math.inf,
    progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> None:
    """Go on to `steps` steps, from the checkpoint in `folder` if there is one. gradients(step) leaves them in the parameters and gives the
    mean KL, nats, and how many tokens it saw. Whatever ends it early (Ctrl-C, an error in `progress`) leaves a checkpoint of the last
    finished step in `folder`."""
    if folder is not None and (folder / CHECKPOINT).exists():
        state.restore(folder / CHECKPOINT)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    started = saved = time.monotonic()
    first = state.step
    try:
        while state.step < steps:
            for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (steps - state.step) / steps
            kl, tokens = gradients(state.step)
            torch.nn.utils.clip_grad_norm_(state.parameters, clip)
            state.whole = False
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.seen += tokens
            state.whole = True
            now = time.monotonic()
            if folder is not None and now - saved >= checkpoint_seconds and state.step < steps:
                state.keep(folder / CHECKPOINT)
                saved = now
            spent = (now - started) / (state.step - first)
            progress(TrainingProgress(state.step, steps, kl / math.log(2), tokens / spent, spent * (steps - state.step)))
    except BaseException:  # Ctrl-C among them: what was done stays
        if folder is not None and state.whole and state.step > first:
            state.keep(folder / CHECKPOINT)
        raise


def claim(folder: Path, about: dict[str, Any], what: str) -> None:
    """Write into `folder` what is trained there. RefusedError if it was something else."""
    file = folder / TOLD
    if file.exists():
        found = json.loads(file.read_text())
        differs = {key: (found.get(key), value) for key, value in about.items() if found.get(key) != value}
        if differs:
            raise RefusedError(
                f"{folder} belongs to another {what}: (found, asked for) differ in {differs}. Give another folder, or delete this one"
            )
        return
    write_json(file, about)


def finish(folder: Path, told: dict[str, Any]) -> None:
    """What was trained is in `folder`: tell how it went, and drop the checkpoint."""
    write_json(folder / TOLD, told)
    (folder / CHECKPOINT).unlink(missing_ok=True)
