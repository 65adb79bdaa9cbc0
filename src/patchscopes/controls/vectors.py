"""Vectors that stand in for a reading's own, and the prompts that lend them when a call has too few sources."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

N_OTHERS = 24  # other sources a reading is compared with: the smallest p-value is 1/25
N_RANDOM = 8
SECOND_LOOK = "Here is some text.\n"  # the neutral prefix behind which every source is read again

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


def random_like(vectors: Float[Tensor, "*row d_model"], key: str) -> Float[Tensor, "*row d_model"]:
    """Isotropic random vectors with the norms of `vectors`. Equal keys give equal vectors, on any device and in any batch."""
    generator = torch.Generator().manual_seed(seed_of(key))
    noise = torch.randn(vectors.shape, generator=generator, dtype=torch.float64).to(vectors)
    return noise * (vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def seed_of(key: str) -> int:
    """A seed that depends on the text of `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
