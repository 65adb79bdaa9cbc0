"""Nearest neighbour: which token a state stands for, read off without training by what each token's own state looks like.

    token(h, ℓ) = argmax_c  cos(f_ℓ(h) − m_ℓ, f_k(s_k(c)) − m_k),      m_ℓ = mean_c f_ℓ(s_ℓ(c))

s_ℓ(c) is the mean state of the token c at layer ℓ behind a few neutral texts. A state is compared with those of its own layer, k = ℓ
("states"), or with the embeddings, k = 0 ("embeddings": the embedding space of Dar et al. 2023). f is a lens, a map into layer L, or the
identity. The means are taken off because states of a layer have a large part in common, which makes all cosines alike. Input inversion as
in Li et al. 2025 (arXiv 2509.13316), without a decoder to train.

At layer 0 a state is its token's embedding, so that the token is found exactly, unless two tokens have one embedding; in models that add
learned positions to it the texts must have the length that the state's position asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, LayerError
from patchscopes.core.layers import Layers, resolve_layers
from patchscopes.lenses.windows import require_one_stream
from patchscopes.maps import Identity, Map, map_between
from patchscopes.model.model import Model
from patchscopes.model.tokens import as_tokens

CONTEXTS = ("We talked about", "Here is some text.")
TOKENS_AT_ONCE, SCORES_AT_ONCE = 2048, 2**24  # of one pass; cosines held at a time
SAMPLE = 512  # candidates whose states give m where the layer's states are not wanted themselves


@dataclass(frozen=True)
class Nearest:
    """For each state the nearest token: its id, how it is shown, the cosine, and by how much that is above the second nearest."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    similarity: tuple[float, ...]
    margin: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """What stands for each candidate. vectors[ℓ]: centred, of length 1, in the order of `ids`; mean[ℓ]: m; lens: f; strings: how tokens
    are shown."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    vectors: Mapping[int, Float[Tensor, "candidate d_model"]]
    mean: Mapping[int, Float[Tensor, " d_model"]]
    lens: Map
    n_layers: int
    name: str

    def nearest(self, h: Float[Tensor, "row d_model"], layer: int) -> Nearest:
        """Of states at a layer. LayerError if it is none of those that were asked for; of equals the first candidate."""
        if layer not in self.vectors:
            raise LayerError(f"there are no token vectors for layer {layer}; there are for {', '.join(map(str, self.vectors))}")
        vectors = self.vectors[layer]
        query = _directions(_image(self.lens, h.float().to(vectors.device), layer, self.n_layers), self.mean[layer])
        best: list[int] = []
        similarity: list[float] = []
        margin: list[float] = []
        for rows in query.split(max(1, SCORES_AT_ONCE // len(vectors))):
            cosine = rows @ vectors.T
            first = cosine.argmax(-1, keepdim=True)
            top = cosine.gather(1, first)
            second = cosine.scatter(1, first, -torch.inf).amax(-1, keepdim=True)
            best += first[:, 0].tolist()
            similarity += top[:, 0].tolist()
            margin += (top - second)[:, 0].tolist()
        return Nearest(tuple(self.ids[k] for k in best), tuple(self.strings[k] for k in best), tuple(similarity), tuple(margin))


def token_vectors(
    model: Model,
    layers: Layers = "all",
    of: Literal["states", "embeddings"] = "states",
    *,
    lens: Map = Identity(),
    contexts: Sequence[str] = CONTEXTS,
    ids: Sequence[int] | None = None,
) -> TokenVectors:
    """The vectors that states at `layers` are compared with.

    contexts  texts behind which each token is read
    ids       the candidates; None: every token that the tokenizer has, but special ones

    One pass over each text with each candidate behind it.
    """
    require_one_stream(model)
    wanted = resolve_layers(layers, model.n_layers)
    special = set(model.tokenizer.all_special_ids)
    there = min(len(model.tokenizer), model.vocab)
    some = [i for i in range(there) if i not in special] if ids is None else list(dict.fromkeys(ids))
    if len(some) < 2 or not contexts:
        raise InputError(f"{len(some)} candidate tokens and {len(contexts)} contexts were given; expected two and one at least")
    before = [model.tokens(text).ids for text in contexts]
    if of == "states":
        images = {k: _image(lens, h, k, model.n_layers) for k, h in _mean_states(model, before, some, wanted).items()}
        mean = {layer: image.mean(0) for layer, image in images.items()}
        vectors = {layer: _directions(image, mean[layer]) for layer, image in images.items()}
    else:
        image = _image(lens, _mean_states(model, before, some, [0])[0], 0, model.n_layers)
        drawn = some[:: max(1, len(some) // SAMPLE)]
        mean = {k: _image(lens, h, k, model.n_layers).mean(0) for k, h in _mean_states(model, before, drawn, wanted).items()}
        mean |= {0: image.mean(0)} if 0 in wanted else {}
        vectors = dict.fromkeys(wanted, _directions(image, image.mean(0)))
    name = of if isinstance(lens, Identity) else f"{of} in {lens.name}"
    strings = tuple(model.show(i) for i in some)
    return TokenVectors(tuple(some), strings, vectors, mean, lens, model.n_layers, name)


def _image(lens: Map, h: Tensor, layer: int, last: int) -> Tensor:
    return map_between(lens, layer, last)(h)


def _directions(h: Float[Tensor, "row d_model"], mean: Float[Tensor, " d_model"]) -> Float[Tensor, "row d_model"]:
    return torch.nn.functional.normalize(h - mean, dim=-1)


@torch.no_grad()
def _mean_states(
    model: Model, contexts: Sequence[tuple[int, ...]], ids: Sequence[int], layers: Sequence[int]
) -> dict[int, Tensor]:
    """[candidate, d_model] of each layer, the mean over contexts."""
    total = {layer: torch.zeros(len(ids), model.d_model) for layer in layers}
    for context in contexts:
        step = max(1, TOKENS_AT_ONCE // (len(context) + 1))  # logits of all of them are held
        for start in range(0, len(ids), step):
            batch = [as_tokens((*context, i)) for i in ids[start : start + step]]
            run = model.run(batch, read=[f"resid.{layer}" for layer in layers])
            for layer in layers:
                total[layer][start : start + len(batch)] += run[f"resid.{layer}"][:, -1].float().cpu() / len(contexts)
    return total
