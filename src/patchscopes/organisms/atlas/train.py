"""Train atlas: tokenizer, then a small Llama on the corpus. Resumable: a step's batch depends on (seed, step) alone.

Muon for the matrices of the blocks, AdamW for embeddings and norms; the learning rate rises over 2 % of the steps and falls
linearly to 0. bfloat16 autocast, float32 weights. A checkpoint is a folder with `weights.safetensors`, `optimizers.pt`
(tensors only) and `progress.json`, written aside and then renamed.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchscopes.core.errors import RefusedError
from patchscopes.organisms.atlas.corpus import Corpus
from patchscopes.organisms.atlas.facts import world

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


@dataclass(frozen=True)
class Progress:
    """After a step: mean loss (nats a token) since the last report, tokens seen a second, seconds left."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    eta: float


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
    length = recipe.context + 1
    rows, row = [], []
    while len(rows) < recipe.batch_rows:
        for encoded in tokenizer.backend_tokenizer.encode_batch([next(documents) for _ in range(64)]):
            row += encoded.ids
            if len(row) >= length:
                rows.append(row[:length])
                row = []
    return torch.tensor(rows[: recipe.batch_rows])


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
    out.mkdir(parents=True, exist_ok=True)
    if _claim(out, recipe):
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
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    first = _restore(out / "checkpoint", model, optimizers)

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    if compile is None:
        compile = shutil.which("g++") is not None or shutil.which("clang++") is not None
    compute = torch.compile(loss_of) if compile else loss_of
    warmup = max(1, recipe.steps // 50)
    reported = saved = time.monotonic()
    seen, losses = 0, []
    for step in range(first, recipe.steps):
        share = min((step + 1) / warmup, (recipe.steps - step) / (recipe.steps - warmup + 1))
        for optimizer, rate in zip(optimizers, (recipe.matrix_rate, recipe.rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        loss = compute(batch(recipe, corpus, tokenizer, step).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        seen += recipe.batch_rows * recipe.context
        now = time.monotonic()
        if now - saved >= checkpoint_seconds and step + 1 < recipe.steps:
            _save(out / "checkpoint", step + 1, model, optimizers)
            saved = now
        if now - reported >= report_seconds or step + 1 == recipe.steps:
            speed = seen / (now - reported)
            left = (recipe.steps - step - 1) * recipe.batch_rows * recipe.context / speed
            report(Progress(step + 1, recipe.steps, float(torch.stack(losses).mean()), speed, left))
            reported, seen, losses = now, 0, []
    model.to(getattr(torch, recipe.stored))  # sets config.dtype, too
    model.eval().save_pretrained(out)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    return out


def _claim(out: Path, recipe: Recipe) -> bool:
    """Write the recipe into `out`; whether a model of it is finished there. RefusedError if the folder belongs to another recipe."""
    file = out / "recipe.json"
    if file.exists() and (found := json.loads(file.read_text())) != asdict(recipe):
        differs = {key: (found.get(key), value) for key, value in asdict(recipe).items() if found.get(key) != value}
        raise RefusedError(
            f"{out} belongs to another recipe: (found, asked for) differ in {differs}. Give another folder, or delete this one."
        )
    file.write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    return (out / "model.safetensors").exists()


def _save(folder: Path, step: int, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> None:
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


def _restore(folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """The step to continue with: 0 without a checkpoint."""
    if not folder.exists():
        return 0
    progress = json.loads((folder / "progress.json").read_text())
    load_model(model, str(folder / "weights.safetensors"))
    for optimizer, state in zip(optimizers, torch.load(folder / "optimizers.pt", weights_only=True), strict=True):
        optimizer.load_state_dict(state)
    return progress["step"]
