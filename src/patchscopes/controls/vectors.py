"""Vectors that stand in for a reading's own, and the prompts that lend them when a call has too few sources.

    zero        0
    mean        μ = mean of a sample
    random      ‖h‖ u, u uniform on the sphere: what any direction of this length brings forth
    covariance  ‖h‖ z / ‖z‖, z ~ N(μ, (1 − α) S + α m I): what any direction brings forth that lies as states do

S is the covariance of a sample of states (of n rows, divided by n) and m = tr S / d_model. A sample has mostly fewer rows than a state has
entries, so that S says nothing of most directions; α, the share of the identity, is the one with the least expected error in the
Frobenius norm (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices"). Whatever is drawn hangs
on a key, on the CPU, in float64: equal keys give equal vectors on any device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError

N_OTHERS = 24  # other sources a reading is compared with: the smallest p-value is 1/25
N_RANDOM = 8
# the neutral prefixes behind which every source is read again; the first is also that of the other sources
SECOND_LOOKS = ("Here is some text.\n", "Listen. ", "Some facts. Here is what we know. ")
CONTEXT = "One of the words was:"  # what the words that are read stand behind, without their own context

POOL_NAME = "patchscopes-pool-1"
# Short neutral prompts on many subjects; each is read at its last token.
POOL = (
    "Yesterday the teacher spoke of Portugal",
    "There was a picture of a violin",
    "We talked about Isaac Newton",
    "A story about copper",
    "My sister wrote a song about Chicago",
    "They painted the Eiffel Tower",
    "He asked me twice about Toyota",
    "In the garden we saw a rabbit",
    "Nobody in the room had heard of curling",
    "She could not stop thinking about Brazil",
    "Please tell me more about the trumpet",
    "The old man told us about Cleopatra",
    "I found a small note about oxygen",
    "The children drew Barcelona",
    "Last year we climbed Mount Fuji",
    "Her uncle works for Siemens",
    "On the hill stood a camel",
    "Every Sunday they play volleyball",
    "The letter came from Kenya",
    "On the table lay a flute",
    "The lecture was about Charles Darwin",
    "The box was full of silver",
    "The train stops in Osaka",
    "Behind the trees one sees the Taj Mahal",
    "His first job was at Philips",
    "Near the river lives an otter",
    "The club is known for its fencing",
    "The ship sailed to Norway",
    "In the corner stood a harp",
    "The museum shows Frida Kahlo",
    "The cup was made of tin",
    "Our cousins moved to Lyon",
)


def zero_like(vectors: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """Zeros."""
    return torch.zeros_like(vectors)


def mean_of(sample: Float[Tensor, "*row d_model"]) -> Float[Tensor, " d_model"]:
    """The mean over all rows, taken in float64. VectorError if there are none."""
    rows = _rows(sample, 1)
    return rows.mean(0).to(sample)


def random_like(vectors: Float[Tensor, "*row d_model"], key: str) -> Float[Tensor, "*row d_model"]:
    """Isotropic random vectors with the norms of `vectors`. Equal keys give equal vectors, on any device and in any batch."""
    noise = _noise(tuple(vectors.shape), key).to(vectors)
    return with_norms_of(noise, vectors)


def covariance_like(
    vectors: Float[Tensor, "*row d_model"], sample: Float[Tensor, "*n d_model"], key: str
) -> Float[Tensor, "*row d_model"]:
    """Gaussian vectors with the mean and the covariance of the rows of `sample`, brought to the norms of `vectors`."""
    return with_norms_of(gaussian_of(sample, tuple(vectors.shape[:-1]), key).to(vectors), vectors)


def gaussian_of(sample: Float[Tensor, "*n d_model"], shape: Sequence[int], key: str) -> Float[Tensor, "*row d_model"]:
    """[*shape, d_model] of N(μ, (1 − α) S + α m I), float64, on the CPU. VectorError for fewer than two rows.

    No matrix of d_model² is made: with X the centred rows, ε and η of N(0, I), Xᵀ ε / √n has the covariance S."""
    rows = _rows(sample, 2)
    mean = rows.mean(0)
    centred, alpha = rows - mean, shrinkage(sample)
    n, width = centred.shape
    noise = _noise((*shape, n + width), key)
    spread = centred.square().sum() / n / width
    return mean + (1 - alpha) ** 0.5 * (noise[..., :n] @ centred) / n**0.5 + (alpha * spread) ** 0.5 * noise[..., n:]


def shrinkage(sample: Float[Tensor, "*n d_model"]) -> float:
    """α = min(1, b² / d²), d² = ‖S − m I‖², b² = Σ_k ‖x_k x_kᵀ − S‖² / n²; x_k the centred rows. 1 if all rows are equal."""
    rows = _rows(sample, 2)
    centred = rows - rows.mean(0)
    n, width = centred.shape
    gram = centred @ centred.T  # its entries say all that the norms need
    of_s = float(gram.square().sum()) / n**2  # ‖S‖²
    apart = of_s - (float(gram.trace()) / n) ** 2 / width  # ‖S − m I‖²
    if apart <= 0:
        return 1.0
    error = (float(gram.diagonal().square().sum()) - n * of_s) / n**2
    return min(1.0, max(0.0, error) / apart)


def with_norms_of(vectors: Float[Tensor, "*row d_model"], like: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """The directions of `vectors` with the norms of `like`. A zero vector has no direction and becomes NaN."""
    return vectors * (like.norm(dim=-1, keepdim=True) / vectors.norm(dim=-1, keepdim=True))


def seed_of(key: str) -> int:
    """A seed that depends on the text of `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])


def _noise(shape: tuple[int, ...], key: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(key))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rows(sample: Tensor, least: int) -> Tensor:
    """[row, d_model] in float64 on the CPU; VectorError if there are fewer than `least`."""
    rows = sample.detach().reshape(-1, sample.shape[-1]).double().cpu()
    if len(rows) < least:
        raise VectorError(f"a sample of {len(rows)} vectors was given; expected at least {least}")
    return rows
