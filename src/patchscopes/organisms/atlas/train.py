"""Train atlas: tokenizer, then a small Llama on the corpus. Resumable: a step's batch depends on (seed, step) alone.

Muon for the matrices of the blocks, AdamW for embeddings and norms. bfloat16 autocast, float32 weights. The loop, its learning rate and
its checkpoints are `organisms.training`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchscopes.organisms.atlas.corpus import Corpus
from patchscopes.organisms.atlas.facts import world
from patchscopes.organisms.training import Progress, claim, compiled, descend, finish, packed

BOS = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on."""

    seed: int = 0
    tokens: int = 20_000_000
    share: float = 1.0  # of the entities
    layers: int = 8
    width: int = 192
    heads: int = 6
    kv_heads: int = 3
    mlp: int = 512
    vocab: int = 8192
    context: int = 256
    batch_rows: int = 32
    matrix_rate: float = 0.02  # Muon
    rate: float = 3e-3  # AdamW
    stored: str = "float32"  # number format of the weights on disk

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.batch_rows * self.context))

    def scaled(self, scale: float) -> Recipe:
        """The same recipe for a share of the entities, in a share of the tokens, by a model that is smaller in proportion: depth, width
        and the tokens of a step shrink with the square root, the vocabulary with the words."""
        if scale == 1:
            return self
        root = math.sqrt(scale)
        heads = max(2, round(self.heads * root))
        width = heads * (self.width // self.heads)
        return replace(
            self,
            tokens=int(self.tokens * scale),
            share=self.share * scale,
            layers=max(4, round(self.layers * root)),
            width=width,
            heads=heads,
            kv_heads=max(1, heads // 2),
            mlp=width * self.mlp // self.width // 32 * 32,
            vocab=max(1024, int(self.vocab * scale)),
            batch_rows=max(4, round(self.batch_rows * root)),
        )


# The bundled models by name. The small one has another width and depth, the same tokenizer, texts and facts.
RECIPES = {
    "atlas": Recipe(),
    "atlas-small": Recipe(tokens=7_000_000, layers=6, width=128, heads=4, kv_heads=2, mlp=352, batch_rows=16, stored="float16"),
}


def build_tokenizer(recipe: Recipe, corpus: Corpus) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `recipe.vocab` entries, trained on the first documents of the corpus; BOS comes before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    documents = corpus.documents(random.Random(f"{recipe.seed} tokenizer"))
    tokenizer.train_from_iterator((next(documents) for _ in range(int(120_000 * recipe.share))), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        padding_side="left",
        model_max_length=recipe.context,
    )


def build_model(recipe: Recipe, vocab: int) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=recipe.width,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.width // recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def batch(recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, step: int) -> Tensor:
    """Token ids [row, context + 1] of one step: documents laid end to end, each behind its BOS, each row starting with one."""
    documents = corpus.documents(random.Random(f"{recipe.seed} step {step}"))
    encoded = (e.ids for _ in count() for e in tokenizer.backend_tokenizer.encode_batch([next(documents) for _ in range(64)]))
    return torch.tensor(packed(encoded, recipe.batch_rows, recipe.context + 1))


def train(
    out: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    compile: bool | None = None,
    checkpoint_seconds: float = 120,
    report_seconds: float = 5,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Train by `recipe` and leave a Hugging Face folder in `out`; continues from `out/checkpoint` if there is one.

    `compile`: torch.compile the loss (about twice as fast on a CPU; needs a C++ compiler); None: where there is one.
    A folder of another recipe is refused (RefusedError); a finished one is left as it is.
    """
    if claim(out, asdict(recipe), "model.safetensors"):
        return out
    corpus = Corpus(world(recipe.share))
    if (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    else:
        tokenizer = build_tokenizer(recipe, corpus)
        tokenizer.save_pretrained(out)
    model: Any = build_model(recipe, len(tokenizer))
    model.to(device)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        (torch.optim.Muon(matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=0.0), recipe.matrix_rate),
        (torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0), recipe.rate),
    ]

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compute = compiled(loss_of, compile)
    descend(
        out,
        model,
        optimizers,
        lambda step: compute(batch(recipe, corpus, tokenizer, step).to(device)),
        steps=recipe.steps,
        step_tokens=recipe.batch_rows * recipe.context,
        checkpoint_seconds=checkpoint_seconds,
        report_seconds=report_seconds,
        report=report,
    )
    model.to(getattr(torch, recipe.stored))  # sets config.dtype, too
    model.eval().save_pretrained(out)
    finish(out)
    return out
