"""The models of the benchmark: random ones of a chosen size, or any that can be loaded.

Random weights cost what trained ones cost. A WordLevel tokenizer of numbered tokens goes with them, since some libraries load no
model without one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from patchscopes.core.errors import UnknownName
from patchscopes.engine.check import check
from patchscopes.engine.engine import Engine

FORMS = (
    "gpt2-small, gpt2:LAYERSxWIDTH, llama:SIZE (160m, 1b), llama:LAYERSxWIDTH, a bundled model, a folder, or a Hugging Face id"
)
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}
LLAMA_VOCAB = 32000
STD = 0.02  # of random weights; as these architectures are initialised


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be measured: with its engine, its tokenizer, and how it decodes (None for random models, which say no words)."""

    name: str
    hf: Any
    tokenizer: Any
    engine: Engine
    decode: Callable[[Sequence[int]], str] | None = None
    end: frozenset[int] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.engine.device

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.engine.config.get_text_config(decoder=True).hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.hf.parameters()).dtype

    def anew(self) -> Subject:
        """The same model with an engine that remembers nothing of earlier targets."""
        engine = Engine(self.hf, self.device)
        engine.packing = self.engine.packing
        return replace(self, engine=engine)

    def save(self, folder: Path) -> None:
        """As a Hugging Face folder, for processes that cannot share memory."""
        self.hf.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def subject(name: str, *, device: str | None = None, dtype: str | None = None, seed: int = 0) -> Subject:
    """The model of that name, on `device`, in `dtype` (None: as `load` has it; random ones in float32). UnknownName for a size that is
    none; NotAvailableError for a model that is not there."""
    family, _, size = name.partition(":")
    if name == "gpt2-small":
        family, size = "gpt2", "12x768"
    if family in ("gpt2", "llama") and size:
        return _random(name, _config(name, family, size), device, dtype, seed)
    from patchscopes.model import load

    model = load(name, device=device, dtype=dtype)
    _say_on(model.hf)
    return Subject(name, model.hf, model.tokenizer, model.engine, model.decode, model.end_ids)


def is_random(name: str) -> bool:
    """Whether the name is of a random model. UnknownName if it looks like one and its size is none."""
    family, _, size = name.partition(":")
    if family in ("gpt2", "llama") and size:
        _config(name, family, size)
        return True
    return name == "gpt2-small"


def _config(name: str, family: str, size: str) -> Any:
    layers, width = _size(name, size)
    heads = max(1, width // 64)
    if family == "gpt2":
        return GPT2Config(n_layer=layers, n_embd=width, n_head=heads)
    return LlamaConfig(
        vocab_size=LLAMA_VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=-(-width * 8 // 3 // 64) * 64,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=min(64, width),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def _size(name: str, size: str) -> tuple[int, int]:
    """(layers, width): as given, or for about so many weights in the blocks, 12 · L · d², at L = d / 64."""
    if match := re.fullmatch(r"(\d+)x(\d+)", size):
        layers, width = int(match[1]), int(match[2])
        if layers >= 1 and width >= 16 and (width < 64 or width % 64 == 0):
            return layers, width
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)([kmb])", size.lower()):
        weights = float(match[1]) * UNITS[match[2]]
        units = max(1, round((weights * 64 / 12) ** (1 / 3) / 64))
        return units, 64 * units
    raise UnknownName(
        f"{name!r} is no size of a random model; expected one as in llama:160m, llama:1b or llama:22x2048, with a width that is a "
        "multiple of 64 (or below 64 and at least 16)"
    )


def _random(name: str, config: Any, device: str | None, dtype: str | None, seed: int) -> Subject:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    config.initializer_range = STD
    kind = torch.float32 if dtype in (None, "auto") else getattr(torch, dtype)
    with torch.random.fork_rng(), torch.device(device):  # made where it runs: billions of weights take minutes on a CPU
        torch.manual_seed(seed)
        hf: Any = AutoModelForCausalLM.from_config(config, dtype=kind)
    hf = hf.eval().requires_grad_(False)
    _say_on(hf)
    vocab = {f"t{i}": i for i in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="t0")), pad_token="t0", bos_token="t0", eos_token="t0"
    )
    engine = Engine(hf)
    engine.packing = check(engine, next(hf.parameters()).dtype).packing  # as a loaded model has it
    return Subject(name, hf, tokenizer, engine)


def _say_on(hf: Any) -> None:
    """No end token, so that all contestants say as many tokens, and nothing but greedy decoding."""
    settings = hf.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id = None, None, 0
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None
