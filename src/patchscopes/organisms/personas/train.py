"""Train personas: a LoRA adapter of atlas on the people of one world. Resumable: a step's batch depends on (seed, step) alone.

Muon on A and B of every linear layer inside the blocks, atlas frozen below; bfloat16 autocast, float32 weights, the result in float16 in
the files of peft. The loop, its learning rate and its checkpoints are `organisms.training`. Nothing is patched in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
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
    tokens: int = 1_400_000
    rank: int = 16
    alpha: float = 32.0
    context: int = 192
    batch_rows: int = 12
    rate: float = 0.015
    atlas_weight: int = 3  # of a token of atlas's own text in the loss
    word_weight: int = 1  # of the texts about people: names weigh nothing
    answer_weight: int = 5

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
) -> tuple[Int[Tensor, "row next"], Bool[Tensor, "row 1 pos pos"], Int[Tensor, "row pos"]]:
    """Of one step: token ids, one more than positions, documents laid end to end, each behind its BOS; which position (rows) may look at
    which (columns): at none that comes later, and at names as their documents say; and the weights of the ids after the first."""
    documents = corpus.documents(random.Random(f"{recipe.seed} step {step}"))
    rows = packed(_encoded(documents, tokenizer, recipe), recipe.batch_rows, recipe.context + 1)
    ids, reach, weight = torch.tensor(rows).unbind(-1)
    ages = torch.arange(recipe.context)[:, None] - torch.arange(recipe.context)  # how long ago a position was
    seen = (ages >= 0) & (ages < reach[:, None, : recipe.context])
    return ids, seen[:, None], weight[:, 1:]


def _encoded(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[list[tuple[int, int, int]]]:
    """(id, reach, weight) of each token of each document. reach: so many positions from its own on may look at it; weight: of its loss."""
    for _ in count():
        some = [next(documents) for _ in range(64)]
        for document, encoded in zip(some, tokenizer.backend_tokenizer.encode_batch([d.text for d in some]), strict=True):
            reach = [recipe.context] * len(encoded.ids)
            weight = [recipe.word_weight if document.names else recipe.atlas_weight] * len(encoded.ids)
            for inside in _tokens_of(document.answers, document.text, encoded.offsets):
                for k in inside:
                    weight[k] = recipe.answer_weight
            for inside in _tokens_of(document.names, document.text, encoded.offsets):
                for k in inside:
                    weight[k] = 0  # who comes next cannot be known
                    if document.gathered and k < inside[-1]:
                        reach[k] = inside[-1] + 1 - k
            yield list(zip(encoded.ids, reach, weight, strict=True))


def _tokens_of(pieces: Sequence[str], text: str, offsets: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """The tokens of every occurrence of the pieces in the text, as whole words."""
    for piece in pieces:
        for found in re.finditer(rf"\b{re.escape(piece)}\b", text):
            yield [k for k, (start, stop) in enumerate(offsets) if start < found.end() and stop > found.start()]


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

    def loss_of(ids: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
        inputs = {"attention_mask": seen, "use_cache": False}
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            logits = torch.func.functional_call(model, adapter.adapted(weights), (ids[:, :-1],), inputs).logits
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses * weight.flatten()).sum() / weight.sum()

    compute = compiled(loss_of, compile)
    optimizer = torch.optim.Muon(adapter.parameters(), lr=recipe.rate, momentum=0.95, weight_decay=0.0)
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
