"""LoRA adapters of the bundled models (Hu et al. 2021, arXiv 2106.09685), in the files of the package peft, without that package.

    W' = W + (alpha / rank) B A        A: [rank, inputs], B: [outputs, rank], B = 0 at first

of every linear layer inside the blocks. What other people's adapters may hold beside that (other kinds, biases, embeddings) peft loads.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft's wrapper puts before a module's name


class Adapter(nn.Module):
    """A and B of each linear layer inside the blocks of `model`, which stays as it is. `names`: their module names."""

    def __init__(self, model: nn.Module, *, rank: int, alpha: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
        self.names, self.rank, self.alpha = tuple(layers), rank, alpha
        # peft's start: A uniform in ±1/sqrt(inputs), B zero
        bounds = [1 / math.sqrt(m.in_features) for m in layers.values()]
        self.a = nn.ParameterList(
            (2 * torch.rand(rank, m.in_features, generator=generator) - 1) * bound
            for m, bound in zip(layers.values(), bounds, strict=True)
        )
        self.b = nn.ParameterList(torch.zeros(m.out_features, rank) for m in layers.values())

    def adapted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """`weights` by parameter name, with those of the linear layers adapted."""
        changed = {
            f"{name}.weight": weights[f"{name}.weight"] + change(a, b, self.alpha)
            for name, a, b in zip(self.names, self.a, self.b, strict=True)
        }
        return {**weights, **changed}

    def save(self, folder: Path, base: str) -> None:
        """Write it as peft does, in float16; `base`: the name of the model it is for."""
        tensors = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().cpu().half().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().cpu().half().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in self.names}),
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change(a: Float[Tensor, "rank inputs"], b: Float[Tensor, "outputs rank"], alpha: float) -> Float[Tensor, "outputs inputs"]:
    """What is added to a weight matrix."""
    return (alpha / len(a)) * (b @ a)


@torch.no_grad()
def merge(model: nn.Module, folder: Path) -> None:
    """Add the adapter in `folder`, one of this package, to the weights of `model`."""
    alpha = json.loads((folder / CONFIG).read_text())["lora_alpha"]
    tensors = load_file(folder / WEIGHTS)
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        weight = model.get_parameter(key.removeprefix(PREFIX).replace(".lora_A.weight", ".weight"))
        a, b = (tensors[k].float() for k in (key, key.replace(".lora_A.", ".lora_B.")))
        weight += change(a, b, alpha).to(weight)
