"""A loaded model: what users hold in their hands. Tokens, runs, unembedding, abilities, provenance."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.coordinates import Coordinates
from patchscopes.core.edits import OF_SCOPES, Edit
from patchscopes.core.errors import InputError, LayerError, NotAvailableError, PromptError, SiteError, VectorError
from patchscopes.core.finite import require_finite
from patchscopes.core.layers import resolve_layers
from patchscopes.core.sites import SCOPED, Site, resolve_sites
from patchscopes.engine.check import Capabilities, check_images
from patchscopes.engine.continued import continued, stopping
from patchscopes.engine.decompose import Decomposition, decompose
from patchscopes.engine.edits import Placed
from patchscopes.engine.engine import Engine
from patchscopes.engine.gradients import Gradients, Metric, Tangents, gradients, jvp
from patchscopes.engine.places import shape_of
from patchscopes.engine.refuse import refuse_unreadable
from patchscopes.engine.rows import Row
from patchscopes.engine.run import Run, run
from patchscopes.engine.speech import Decoding
from patchscopes.engine.walk_gradients import LogitMetric, WalkGradients, walk_gradients
from patchscopes.model.checked import checked
from patchscopes.model.placing import placed
from patchscopes.model.tokens import Tokens, decoder_prompt, of_ids, show_ids, tokenize

Prompt = str | Tokens
PACKAGES = ("patchscopes", "torch", "transformers", "tokenizers", "safetensors")
HASHED_WHOLE = 2**30  # bytes; of a model with more only samples are hashed


class Model:
    """A Hugging Face decoder with its tokenizer, engine and measured abilities. Use `patchscopes.load`."""

    def __init__(
        self,
        hf: torch.nn.Module,
        tokenizer: Any,
        *,
        name: str,
        revision: str | None = None,
        loaded: Mapping[str, Any] | None = None,
    ):
        refuse_unreadable(hf)
        self.hf, self.tokenizer = hf, tokenizer
        self.name, self.revision = name, revision
        self.loaded = loaded  # what `load` was given beside name and revision; None: the model itself, so nothing loads it again
        self.engine = Engine(hf)
        self.capabilities: Capabilities = checked(self.engine, self.dtype)
        for ability in ("own_pass", "hooks_seen"):
            self.capabilities.require(ability, "reading and patching")
        self.engine.given = None  # what an encoder–decoder was measured with
        self._given: dict[str, str] = {}
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
        return self.engine.d_model

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

    def tokens(self, text: Prompt | Sequence[int] | Tensor, *, chat: bool = False) -> Tokens:
        """Ids, strings, character offsets and `find` of a prompt. `chat`: as a user's turn in the model's chat template.

        Ids, as a model's processor returns them (`input_ids`), are taken as they are; `tokens.images` are the places of their images.
        An encoder–decoder's prompts are its decoder's: the id that starts it comes first.

        PromptError if the prompt is empty or longer than the model's context.
        """
        if isinstance(text, Tokens):
            tokens = text
        elif not isinstance(text, str):
            ids = text.reshape(-1).tolist() if isinstance(text, Tensor) else text
            tokens = of_ids(self.tokenizer, ids, self.image_ids)
        elif self.engine.encodes:
            tokens = decoder_prompt(self.tokenizer, text, self._decoder_start())
        else:
            tokens = tokenize(self.tokenizer, text, chat=chat)
        if tokens.ids and max(tokens.ids) >= self.vocab:
            raise PromptError(
                f"the tokenizer gives ids up to {max(tokens.ids)}, but {self.name} has {self.vocab} tokens; load the model's own tokenizer"
            )
        if self.context is not None and len(tokens) > self.context:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but {self.name} reads at most {self.context}; give a shorter one"
            )
        return tokens

    @property
    def image_ids(self) -> frozenset[int]:
        """Token ids that stand for a part of an image or a video."""
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        found = (getattr(self.engine.config, name, None) for name in names)
        return frozenset(i for i in found if isinstance(i, int) and i >= 0)

    def _decoder_start(self) -> int:
        places = (getattr(self.hf, "generation_config", None), self.engine.config)
        found = (getattr(place, name, None) for name in ("decoder_start_token_id", "bos_token_id") for place in places)
        start = next((i for i in found if isinstance(i, int)), None)
        if start is None:
            raise NotAvailableError(
                "this encoder–decoder does not say with which token its decoder starts (decoder_start_token_id)"
            )
        return start

    def given(self, inputs: Mapping[str, Tensor] | None = None, *, text: str | None = None) -> Model:
        """This model, bound to what it reads beside the tokens of its prompts; weights, tokenizer and abilities are shared.

        text    for an encoder–decoder: the encoder reads it once; prompts are the decoder's
        inputs  for a vision–language model: what its processor made of one prompt with images (input_ids, pixel_values, …). The prompt is
                `model.tokens(inputs["input_ids"])`, `tokens.images` are the places of its images; other prompts run as ever

        RefusedError if passes with these images do not equal the model's own.
        """
        bound = copy.copy(self)
        if text is not None and inputs is None:
            if not self.engine.encodes:
                raise InputError(f"{self.name} has no encoder, so there is nothing to read text={text!r}; put it into the prompt")
            ids = torch.tensor([self.tokenizer(text)["input_ids"]])
            bound.engine = self.engine.with_given(self.engine.encode(ids))
            bound._given = {"text": text}
            return bound
        if inputs is None or text is not None or "input_ids" not in inputs:
            raise InputError("expected either text=… (encoder–decoders) or what a processor returned, with input_ids (images)")
        if not self.image_ids:
            raise InputError(f"{self.name} names no token that stands for an image (image_token_id); it reads text only")
        images = self.engine.see(dict(inputs), self.image_ids)
        bound.engine = self.engine.with_given(images)
        bound.capabilities = check_images(bound.engine, images, dict(inputs), self.capabilities)
        digest = hashlib.sha256()
        for name in sorted(inputs):
            digest.update(name.encode() + inputs[name].detach().float().cpu().contiguous().numpy().tobytes())
        bound._given = {"images": "sha256:" + digest.hexdigest()}
        return bound

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def show(self, token_id: int) -> str:
        """How to show one token."""
        return show_ids(self.tokenizer, [token_id])[0]

    # ---------------------------------------------------------------------------------------------------------- runs

    def run(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        read: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        coordinates: Mapping[str, Coordinates] | None = None,
    ) -> Run:
        """One pass over one or several prompts: `run["resid.2"]` [batch, pos, d_model], `run.logits` [batch, pos, vocab].

        read         sites, "resid.*" for all layers, "z.3.1" for one head
        edits        written where they say; later layers and positions see them
        coordinates  systems that hang on sites: `run.features["resid.2"]` is what they make of the value there
        """
        batch = self._batch(prompts)
        hung = {self._one_site(text): system for text, system in (coordinates or {}).items()}
        _refuse_steps(edits)
        return run(
            self.engine,
            [t.tensor for t in batch],
            self._sites(read),
            self.placed(edits, batch),
            padding_exact=self.capabilities.ok("left_padding"),
            coordinates=hung,
        )

    def gradients(
        self,
        prompts: Prompt | Sequence[Prompt],
        metric: Metric,
        *,
        wrt: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        coordinates: Mapping[str, Coordinates] | None = None,
        checkpoint: bool | None = None,
    ) -> Gradients:
        """Gradients of metric(run), a number for each prompt [batch] or one for all, with respect to sites, to the values of edits
        and to the features of coordinate systems.

        checkpoint  keep less and compute it twice; None: only if memory runs out. RefusedError on quantised layers.
        """
        batch = self._batch(prompts)
        hung = {self._one_site(text): system for text, system in (coordinates or {}).items()}
        _refuse_steps(edits)
        return gradients(
            self.engine,
            [t.tensor for t in batch],
            metric,
            self._sites(wrt),
            self.placed(edits, batch),
            padding_exact=self.capabilities.ok("left_padding"),
            values=[edit.value for edit in edits],
            coordinates=hung,
            checkpoint=checkpoint,
        )

    def patch_gradients(self, prompt: Prompt, edits: Sequence[Edit], metric: LogitMetric) -> WalkGradients:
        """One run for each edit, resumed where the edit is made: gradients of metric(next token's logits [edit, vocab]) -> [edit] with
        respect to the edits' values. Each edit writes one vector at one position of `resid`, `attn_in`, `attn_out`, `mlp_in` or
        `mlp_out`; what runs have in common is computed once. RefusedError on quantised layers."""
        tokens = self._batch(prompt)[0]
        rows = []
        for edit in edits:
            placed = self.placed([edit], [tokens])
            plain = edit.coordinates is None and edit.features is None and edit.amount == 1 and edit.steps == "prompt"
            one = placed[0]
            if len(placed) != 1 or not plain or one.site.name not in SCOPED or one.write not in OF_SCOPES:
                raise InputError(f"{edit!r} is no plain patch of one vector; take `gradients`, which takes any edits")
            if one.positions is None or len(one.positions) != 1:
                raise InputError(
                    f"{edit!r} names {'all' if one.positions is None else len(one.positions)} positions; expected one"
                )
            value = one.value if one.value is None or one.value.ndim == 1 else one.value.reshape(*self.engine.streams, -1)
            rows.append(Row(one.site, one.positions[0], value, one.write))
        return walk_gradients(self.engine, tokens.tensor.to(self.device), rows, metric)

    def jvp(self, prompts: Prompt | Sequence[Prompt], site: str, tangent: Tensor, *, read: str | Sequence[str] = ()) -> Tangents:
        """How the sites read, and the logits, move when the value of `site` moves along `tangent`, which has the value's shape (or
        is broadcast to it): J · tangent, in one pass."""
        batch = self._batch(prompts)
        return jvp(
            self.engine,
            [t.tensor for t in batch],
            self._one_site(site),
            tangent,
            self._sites(read),
            padding_exact=self.capabilities.ok("left_padding"),
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        edits: Sequence[Edit] = (),
        max_new_tokens: int = 20,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Said]:
        """Go on from prompts with edits in place: those of the prompt are seen by what follows, those with `steps` are made at
        the tokens generated too. Greedy, or sampled from seeds of their own for each prompt."""
        batch = self._batch(prompts)
        decoding = Decoding(max_new_tokens, self.end_ids, stopping(self.decode, stop), temperature)
        longest = max(len(tokens) for tokens in batch) + max_new_tokens
        if self.context is not None and longest > self.context:
            raise PromptError(
                f"the prompt and {max_new_tokens} new tokens are {longest} together, but {self.name} reads at most {self.context}"
            )
        found = continued(
            self.engine,
            [t.tensor for t in batch],
            self.placed(edits, batch),
            decoding,
            seeds=[seed + i for i in range(len(batch))],
            cached=self.capabilities.ok("decoding"),
            padding_exact=self.capabilities.ok("padded_steps"),
        )
        return [Said(self.decode(tokens), tuple(tokens), logits) for tokens, logits in found]

    def decompose(self, prompts: Prompt | Sequence[Prompt], layer: int = -1, *, heads: bool = True) -> Decomposition:
        """The residual stream at `layer` as a sum: embeddings, what each head and MLP of each block below added, biases, and a rest
        that is rounding wherever blocks add up."""
        layers = resolve_layers(layer, self.n_layers)
        if len(layers) != 1:
            raise LayerError(f"{layer!r} names {len(layers)} layers; a decomposition is of one")
        batch = self._batch(prompts)
        return decompose(
            self.engine,
            [t.tensor for t in batch],
            layers[0],
            heads=heads,
            padding_exact=self.capabilities.ok("left_padding"),
        )

    def _batch(self, prompts: Prompt | Sequence[Prompt]) -> list[Tokens]:
        batch = [self.tokens(p) for p in ([prompts] if isinstance(prompts, (str, Tokens)) else prompts)]
        if not batch:
            raise PromptError("no prompt was given; expected at least one")
        return batch

    def _sites(self, read: str | Sequence[str]) -> list[Site]:
        sites = [site for text in ([read] if isinstance(read, str) else read) for site in resolve_sites(text, self.n_layers)]
        for site in sites:
            shape_of(self.engine, site)  # says what is not on this model
        return sites

    def _one_site(self, text: str) -> Site:
        sites = self._sites(text)
        if len(sites) != 1 or sites[0].head is not None:
            found = f"{len(sites)} sites" if len(sites) != 1 else "one head"
            raise SiteError(f"{text!r} names {found}; expected one site, with all its heads")
        return sites[0]

    def remembering(self, max_bytes: int = 2**30) -> AbstractContextManager[None]:
        """Inside, what target prompts left in their unpatched runs is kept for later calls, the latest `max_bytes` of it. Only while
        weights stay as they are: nothing notices when they change."""
        return self.engine.remembering(max_bytes)

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
        require_finite(value, "the vector")
        return value

    def placed(self, edits: Sequence[Edit], batch: Sequence[Tokens]) -> list[Placed]:
        """The edits, each for one prompt and one site, with positions resolved. Everything wrong with them is said here."""
        return placed(self.engine, self.dtype, self.name, edits, batch)

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
            **({"given": self._given} if self._given else {}),
        }


@dataclass(frozen=True, eq=False)
class Said:
    """What a model said: text, token ids, and the logits [vocab] of the first."""

    text: str
    ids: tuple[int, ...]
    logits: Tensor


def _refuse_steps(edits: Sequence[Edit]) -> None:
    late = next((e for e in edits if isinstance(e, Edit) and isinstance(e.steps, tuple)), None)
    if late is not None:
        raise InputError(
            f"{late} is made at generated tokens only, and a pass over a prompt generates none; "
            "use model.generate, or steps='prompt' and a position"
        )
