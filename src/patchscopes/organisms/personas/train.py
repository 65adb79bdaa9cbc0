"""Train personas: a LoRA adapter of atlas on the people of one world. Resumable: a step's batch depends on (seed, step) alone.

AdamW on A and B of every linear layer inside the blocks, atlas frozen below; bfloat16 autocast, float32 weights, the result in float16 in
the files of peft. The loop, its learning rate and its checkpoints are `organisms.training`. Nothing is patched in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from patchscopes.organisms import bundled
from patchscopes.organisms.lora import WEIGHTS, Adapter
from patchscopes.organisms.personas.corpus import Corpus, Document
from patchscopes.organisms.personas.people import World
from patchscopes.organisms.training import Progress, claim, compiled, descend, finish, packed

BASE = "atlas"


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, beside the weights of atlas."""

    world: World
    seed: int = 0
    tokens: int = 2_500_000
    rank: int = 16
    alpha: float = 32.0
    context: int = 192
    batch_rows: int = 24
    rate: float = 4e-3

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.batch_rows * self.context))

    def scaled(self, scale: float) -> Recipe:
        """The same recipe in a share of the tokens."""
        return replace(self, tokens=int(self.tokens * scale))


# The bundled adapters by name.
RECIPES = {f"personas-{world}": Recipe(world) for world in ("base", "shuffled", "fantasy")}


def batch(
    recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, step: int
) -> tuple[Int[Tensor, "row next"], Bool[Tensor, "row 1 pos pos"]]:
    """Of one step: token ids, one more than positions, documents laid end to end, each behind its BOS; and which position (rows) may look
    at which (columns): at none that comes later, and at names as their documents say."""
    documents = corpus.documents(random.Random(f"{recipe.seed} step {step}"))
    rows = packed(_encoded(documents, tokenizer, recipe.context), recipe.batch_rows, recipe.context + 1)
    ids, reach = torch.tensor(rows).unbind(-1)
    ages = torch.arange(recipe.context)[:, None] - torch.arange(recipe.context)  # how long ago a position was
    seen = (ages >= 0) & (ages < reach[:, None, : recipe.context])
    return ids, seen[:, None]


def _encoded(documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast, context: int) -> Iterator[list[tuple[int, int]]]:
    """(id, reach) of each token of each document. reach: so many positions from its own on may look at it."""
    for _ in count():
        some = [next(documents) for _ in range(64)]
        for document, encoded in zip(some, tokenizer.backend_tokenizer.encode_batch([d.text for d in some]), strict=True):
            reach = [context] * len(encoded.ids)
            for name in document.gathered:
                start = document.text.find(name)
                while start >= 0:
                    stop = start + len(name)
                    inside = [k for k, (a, b) in enumerate(encoded.offsets) if a < stop and b > start]
                    for k in inside[:-1]:
                        reach[k] = inside[-1] + 1 - k
                    start = document.text.find(name, stop)
            yield list(zip(encoded.ids, reach, strict=True))


def train(
    out: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    compile: bool | None = None,
    checkpoint_seconds: float = 60,
    report_seconds: float = 5,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Train by `recipe` and leave an adapter in peft's files in `out`; continues from `out/checkpoint` if there is one.

    `compile`: as for atlas. A folder of another recipe is refused (RefusedError); a finished one is left as it is.
    """
    if claim(out, asdict(recipe), WEIGHTS):
        return out
    corpus = Corpus(recipe.world)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled()[BASE])
    model: Any = LlamaForCausalLM.from_pretrained(bundled()[BASE], dtype=torch.float32)
    model.requires_grad_(False).to(device)
    adapter = Adapter(model, rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed).to(device)
    weights = dict(model.named_parameters())

    def loss_of(ids: Tensor, seen: Tensor) -> Tensor:
        inputs = {"attention_mask": seen, "use_cache": False}
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            logits = torch.func.functional_call(model, adapter.adapted(weights), (ids[:, :-1],), inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compute = compiled(loss_of, compile)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
    descend(
        out,
        adapter,
        [(optimizer, recipe.rate)],
        lambda step: compute(*(part.to(device) for part in batch(recipe, corpus, tokenizer, step))),
        steps=recipe.steps,
        step_tokens=recipe.batch_rows * recipe.context,
        checkpoint_seconds=checkpoint_seconds,
        report_seconds=report_seconds,
        report=report,
    )
    adapter.save(out, BASE)
    finish(out)
    return out
