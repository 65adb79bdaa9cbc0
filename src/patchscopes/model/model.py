"""A loaded model: what users hold in their hands. Tokens, runs, unembedding, abilities, provenance."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.edits import WRITES, Edit
from patchscopes.core.errors import InputError, PositionError, PromptError, VectorError, nearest
from patchscopes.core.sites import resolve_sites
from patchscopes.engine.check import Capabilities
from patchscopes.engine.engine import Engine
from patchscopes.engine.run import Placed, Run, run
from patchscopes.model.checked import checked
from patchscopes.model.tokens import Tokens, show_ids, tokenize

Prompt = str | Tokens
PACKAGES = ("patchscopes", "torch", "transformers", "tokenizers", "safetensors")
HASHED_WHOLE = 2**30  # bytes; of a model with more only samples are hashed


class Model:
    """A Hugging Face decoder with its tokenizer, engine and measured abilities. Use `patchscopes.load`."""

    def __init__(self, hf: torch.nn.Module, tokenizer: Any, *, name: str, revision: str | None = None):
        self.hf, self.tokenizer = hf, tokenizer
        self.name, self.revision = name, revision
        self.engine = Engine(hf)
        self.capabilities: Capabilities = checked(self.engine, self.dtype)
        self.engine.packing = self.capabilities.packing

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.hf.parameters())
        size = f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"
        return (
            f"Model({self.name!r}: {type(self.hf).__name__}, {self.n_layers} layers, d_model {self.d_model}, vocab {self.vocab}, "
            f"{size} parameters, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def n_layers(self) -> int:
        """L: the residual stream has layers 0 (embeddings) to L."""
        return self.engine.n_layers

    @cached_property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.engine.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocab(self) -> int:
        """Number of logits."""
        return self.engine.vocab

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return self.engine.device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Number format of the weights that compute (the first floating one)."""
        return next((p.dtype for p in self.hf.parameters() if p.is_floating_point()), torch.float32)

    @property
    def context(self) -> int | None:
        """The longest prompt, in tokens; None if the config names no limit."""
        return self.engine.context

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        configured = getattr(getattr(self.hf, "generation_config", None), "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured, self.tokenizer.eos_token_id]
        return frozenset(i for i in ids if i is not None)

    # -------------------------------------------------------------------------------------------------------- tokens

    def tokens(self, text: Prompt, *, chat: bool = False) -> Tokens:
        """Ids, strings, character offsets and `find` of a prompt. `chat`: as a user's turn in the model's chat template.

        PromptError if the prompt is empty or longer than the model's context.
        """
        tokens = text if isinstance(text, Tokens) else tokenize(self.tokenizer, text, chat=chat)
        if tokens.ids and max(tokens.ids) >= self.vocab:
            raise PromptError(
                f"the tokenizer gives ids up to {max(tokens.ids)}, but {self.name} has {self.vocab} tokens; load the model's own tokenizer"
            )
        if self.context is not None and len(tokens) > self.context:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but {self.name} reads at most {self.context}; give a shorter one"
            )
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def show(self, token_id: int) -> str:
        """How to show one token."""
        return show_ids(self.tokenizer, [token_id])[0]

    # ---------------------------------------------------------------------------------------------------------- runs

    def run(self, prompts: Prompt | Sequence[Prompt], *, read: Sequence[str] = (), edits: Sequence[Edit] = ()) -> Run:
        """One pass over one or several prompts: `run["resid.2"]` [batch, pos, d_model], `run.logits` [batch, pos, vocab].

        read   sites, "resid.*" for all layers
        edits  written where they say; later layers and positions see them
        """
        batch = [self.tokens(p) for p in ([prompts] if isinstance(prompts, (str, Tokens)) else prompts)]
        if not batch:
            raise PromptError("no prompt was given; expected at least one")
        sites = [site for text in ([read] if isinstance(read, str) else read) for site in resolve_sites(text, self.n_layers)]
        placed = [
            Placed(site, p, batch[p].position(edit.position), self._edit_value(edit), edit.write)
            for edit in edits
            for site in resolve_sites(edit.site, self.n_layers)
            for p in self._prompts_of(edit, batch)
        ]
        exact = self.capabilities.ok("left_padding")
        return run(self.engine, [t.tensor for t in batch], sites, placed, padding_exact=exact)

    def unembed(self, h: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Logits of any residuals, through the model's own final norm, head, scale and soft-cap, exactly once."""
        self.capabilities.require("unembed", "decoding a residual")
        if h.shape[-1] != self.d_model:
            raise VectorError(f"the residuals are {h.shape[-1]} wide; {self.name} is {self.d_model} wide")
        streams = self.engine.streams
        if h.shape[: len(streams)] != streams:
            raise VectorError(f"the residuals have the shape {tuple(h.shape)}; on {self.name} they begin with {streams} streams")
        rest = h.shape[len(streams) : -1]
        if h.numel() == 0:
            return h.new_zeros(*rest, self.vocab)
        flat = h.reshape(*streams, -1, self.d_model).to(self.device, self.dtype)
        rows = max(1, 2**26 // self.vocab)
        return torch.cat([self.engine.unembed(chunk) for chunk in flat.split(rows, -2)]).reshape(*rest, -1)

    def vector(self, value: Tensor) -> Tensor:
        """A vector to be written into this model, checked: width and finiteness. VectorError otherwise."""
        if value.shape[-1] != self.d_model:
            raise VectorError(
                f"the vector is {value.shape[-1]} wide, but {self.name} is {self.d_model} wide. Give a map between the two widths (map=…), "
                "or a vector of this model."
            )
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise VectorError(
                f"the vector has {bad} of {value.numel()} entries that are not finite (NaN or infinity); expected numbers"
            )
        return value

    def _edit_value(self, edit: Edit) -> Tensor:
        value = self.vector(edit.value)
        if value.shape[:-1] not in ((), self.engine.streams):
            raise VectorError(
                f"the edit at {edit.site} has a value of shape {tuple(value.shape)}; expected one vector, ({self.d_model},)"
            )
        return value

    def _prompts_of(self, edit: Edit, batch: Sequence[Tokens]) -> Sequence[int]:
        if edit.write not in WRITES:
            raise InputError(f"unknown write {edit.write!r}. {nearest(str(edit.write), WRITES)}")
        if edit.prompt is None:
            return range(len(batch))
        if not -len(batch) <= edit.prompt < len(batch):
            raise PositionError(f"the edit names prompt {edit.prompt}, but there are {len(batch)} (counted from 0)")
        return [edit.prompt % len(batch)]

    # ---------------------------------------------------------------------------------------------------- provenance

    @cached_property
    def weight_hash(self) -> str:
        """A hash of all weights: "sha256:…"; of models above a gigabyte, or partly on disk, of a sample: "sampled-sha256:…"."""
        state = self.hf.state_dict()
        whole = sum(t.numel() * t.element_size() for t in state.values()) <= HASHED_WHOLE
        digest, seen_all = hashlib.sha256(), True
        for name in sorted(state):
            t = state[name].detach()
            if t.is_meta:  # offloaded to disk
                seen_all = False
                continue
            flat = t.reshape(-1)
            part = flat if whole or flat.numel() < 2048 else torch.cat([flat[:1024], flat[-1024:]])
            digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return ("sha256:" if whole and seen_all else "sampled-sha256:") + digest.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What a result depends on: model, weights, number format, device, attention implementation, versions."""
        return {
            "model": self.name,
            "revision": self.revision,
            "weight_hash": self.weight_hash,
            "architecture": type(self.hf).__name__,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "attention": getattr(self.engine.config, "_attn_implementation", None),
            "route": self.capabilities.route,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
        }
