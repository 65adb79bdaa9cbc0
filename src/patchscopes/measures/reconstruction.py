"""Reconstruction: does the reading bring the state back?

What a scope said of a source is put into neutral sentences, "A story about {what it said}", and the same model reads them, at their ends
and at the same layer. With h the source's state and r the mean of those, both less the mean over all sources,

    similarity[k, j] = cos(h_k − h̄, r_j − r̄)

A reading that tells its own state from others' is nearer to it than other readings are: `rank` (1 is nearest, ties in between), `p_value`
(the chance of as near a mean if readings were dealt out anew), and

    bits = log2 n + mean log2 softmax_j(similarity[k, j] / T)[k]        InfoNCE, at most log2 n, T = 0.1

Criterion F3 of faithful verbalizers: the cosine with the mean activation of texts that contain the description, a round trip like that of
natural-language autoencoders (Fraser-Taliente et al. 2026), without training. Beside it the same for the source's own words in the same
sentences. A reading that does not come up to them brings back less than the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, log2, nan

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Place, Source, look
from patchscopes.scopes.written import OneEach, one_each, texts

SENTENCES = ("We talked about {x}", "A story about {x}", "There was a picture of {x}", "Yesterday the teacher spoke of {x}")
TEMPERATURE = 0.1
SHUFFLES = 999
ROUNDING = 1e-9  # of cosines in float64


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """similarity[place, text]: NaN for texts without words; bits: InfoNCE; rank: mean, 1 … n; first: share with rank 1; p_value: see above.
    n: places whose text has words."""

    similarity: Float[Tensor, "place text"]
    bits: float
    rank: float
    first: float
    p_value: float
    n: int

    @property
    def own(self) -> list[float]:
        """Each state's similarity with its own text."""
        return self.similarity.diagonal().tolist()


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Of the readings and of the sources' own words. table: a row a place: `place`, `text`, `similarity`, `words`, `words_similarity`."""

    reading: Rebuilt
    words: Rebuilt
    table: pl.DataFrame


def reconstruction(
    source: Source | Sequence[Source],
    scope: Patchscope,
    *,
    words: Sequence[str] | None = None,
    sentences: Sequence[str] = SENTENCES,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> Reconstruction:
    """Both for every place. words: what the sources' own text says of each (the name in it, say); None: the text up to the place.
    sentences: they end in {x}. InputError for fewer than three places."""
    one = one_each(scope, source)
    n = len(one.places)
    if n < 3:
        raise InputError(f"{n} places were given; expected three or more, since states are compared less their mean")
    if wrong := [sentence for sentence in sentences if not sentence.endswith("{x}") or sentence.count("{x}") > 1]:
        raise InputError(f"the sentence {wrong[0]!r} does not end in its only {{x}}; texts are read at their ends")
    if not sentences:
        raise InputError("sentences is empty; expected one or more that end in {x}")
    if words is not None and len(words) != n:
        raise InputError(f"{len(words)} words were given for {n} places; expected one each")
    own = list(words) if words is not None else [p.text if p.tokens is None else p.tokens.upto(p.position) for p in one.places]
    said = texts([one.scope(k, state) for k, state in enumerate(one.states)], scope)
    reading, floor = (_rebuilt(one, some, sentences, shuffles, seed) for some in (said, own))
    columns = {"text": said, "similarity": reading.own, "words": own, "words_similarity": floor.own}
    return Reconstruction(reading, floor, pl.DataFrame({"place": range(n), **columns}))


def _rebuilt(one: OneEach, said: Sequence[str], sentences: Sequence[str], shuffles: int, seed: int) -> Rebuilt:
    held = [k for k, text in enumerate(said) if text.strip()]
    similarity = torch.full((len(said), len(said)), nan, dtype=torch.float64)
    if len(held) < 3:
        return Rebuilt(similarity, nan, nan, nan, nan, len(held))
    h = one.states.double().cpu().flatten(1)
    r = _read(one, [said[k].strip() for k in held], sentences)
    similarity[:, held] = _about_mean(h) @ _about_mean(r).T
    some = similarity[held][:, held]
    n, own = len(held), some.diagonal()
    ahead = some - own[:, None]
    rank = (ahead > ROUNDING).sum(1) + (1 + (ahead.abs() <= ROUNDING).sum(1)) / 2  # itself among those as near
    bits = log2(n) + float((some / TEMPERATURE).log_softmax(1).diagonal().mean()) / log(2)
    generator = torch.Generator().manual_seed(seed)
    dealt = (
        torch.stack([torch.randperm(n, generator=generator) for _ in range(shuffles)]) if shuffles else torch.zeros(0, n).long()
    )
    null = some[torch.arange(n), dealt].mean(1)
    p = (1 + int((null >= own.mean() - ROUNDING).sum())) / (shuffles + 1)
    return Rebuilt(similarity, bits, float(rank.mean()), float((rank == 1).double().mean()), p, n)


def _read(one: OneEach, said: Sequence[str], sentences: Sequence[str]) -> Float[Tensor, "text d"]:
    """The mean over sentences of the state at the end of each with each text in it; equal texts are read once."""
    model, different = one.viewing.origin, list(dict.fromkeys(said))
    places = []
    for text in different:
        for sentence in sentences:
            whole = sentence.replace("{x}", text)
            tokens = model.tokens(whole)
            last = max(k for k in range(len(tokens)) if not tokens.special[k])
            places.append(Place(len(places), whole, tokens, last))
    looked = look(model, places, [one.layer], one.viewing.site)
    states = torch.stack([looked.vectors[k, one.layer][-1].double().cpu().flatten() for k in range(len(places))])
    means = states.reshape(len(different), len(sentences), -1).mean(1)
    return means[[different.index(text) for text in said]]


def _about_mean(x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Each row less their mean, with length 1; 0 where nothing but rounding is left."""
    apart = x - x.mean(0)
    length = apart.norm(dim=-1, keepdim=True)
    return torch.where(length > ROUNDING * x.norm(dim=-1, keepdim=True), apart / length, 0.0)
