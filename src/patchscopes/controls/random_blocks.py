"""A model whose blocks know nothing: embeddings, final norm and head are kept, everything between is drawn anew as the architecture
initialises it. What a scope still says on it comes from its prompt and from the unembedding.

The transformers model is copied whole, so it needs its memory twice. The one that was given stays bit-identical.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from patchscopes.controls.vectors import seed_of
from patchscopes.core.errors import RefusedError
from patchscopes.engine.refuse import refuse_quantised
from patchscopes.model.model import Model


@dataclass(frozen=True)
class RandomBlocks:
    """A control of a scope: the reading's own state, written into the target model with its blocks re-initialised."""

    seed: int = 0
    name: str = "random_blocks"


def random_blocks(model: Model, seed: int = 0) -> Model:
    """A copy of `model` with re-initialised blocks: the same for equal seeds, on any device. RefusedError where weights are quantised or
    not all here, or where the architecture does not say how a weight of its blocks is initialised."""
    refuse_quantised(model.hf)
    if any(p.is_meta for p in model.hf.parameters()):
        raise RefusedError("weights of this model are offloaded to disk, so its blocks cannot be drawn anew; load it whole")
    hf: Any = copy.deepcopy(model.hf)
    path, n = model.engine.anatomy.blocks_path, model.n_layers
    untouched = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for b, block in enumerate(list(hf.get_submodule(path))[:n]):
            torch.manual_seed(seed_of(f"{seed} random blocks {b}"))
            before = {name: p.detach().clone() for name, p in block.named_parameters()}
            for module in block.modules():
                own = [p for p in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
                device = own[0].device if own else torch.device("cpu")
                module._apply(lambda t: t.cpu(), recurse=False)  # drawn on the CPU, where all machines draw the same
                module.__dict__.pop("_is_hf_initialized", None)
                hf._init_weights(module)
                module._apply(lambda t, device=device: t.to(device), recurse=False)
            untouched += [
                f"{path}.{b}.{name}"
                for name, p in block.named_parameters()
                if p.ndim >= 2 and p.is_floating_point() and torch.equal(p, before[name])
            ]
    if untouched:
        raise RefusedError(
            f"{type(hf).__name__} does not say how {len(untouched)} weights of its blocks are initialised ({untouched[0]}, …), so they "
            "would stay as they were trained"
        )
    hf.eval().requires_grad_(False)
    return Model(hf, model.tokenizer, name=f"{model.name}, random blocks {seed}")
