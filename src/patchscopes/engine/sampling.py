"""The next token of every row: greedy, or sampled from a seed of its own.

    argmax_v  logits_v / temperature − log(−log u_v),   u_v uniform in (0, 1)                       (the Gumbel trick)

u_v is a hash of the row's seed, the step and v alone (the finaliser of SplitMix64, Steele et al. 2014), so a row says the same in any
company, on any device, and nothing is carried along.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS_AT_ONCE = 2**24  # numbers: rows · vocabulary that are hashed together (128 MiB of integers)


def choose(
    logits: Float[Tensor, "row vocab"], seeds: Int[Tensor, " row"], steps: Int[Tensor, " row"], temperature: float
) -> Int[Tensor, " row"]:
    """One token a row. `steps`: how many tokens the row has said before. Temperature 0 is greedy, and seeds do not matter."""
    if temperature == 0:
        return logits.argmax(-1)
    size = max(1, ROWS_AT_ONCE // logits.shape[-1])
    chosen = []
    for some, seed, step in zip(logits.split(size), seeds.split(size), steps.split(size), strict=True):
        u = uniform(seed, step, some.shape[-1])
        chosen.append((some.float() / temperature - (-u.log()).log()).argmax(-1))
    return torch.cat(chosen)


def uniform(seeds: Int[Tensor, " row"], steps: Int[Tensor, " row"], n: int) -> Float[Tensor, "row n"]:
    """n numbers in (0, 1) for every row, from its seed and step."""
    stream = _mixed(_mixed(seeds) + steps)
    bits = _mixed(stream[:, None] + torch.arange(n, device=seeds.device) * _signed(0x9E3779B97F4A7C15))
    # 23 bits and half a step more are what float32 holds exactly: never 0 and never 1
    return (_shifted(bits, 41).float() + 0.5) * 2**-23


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64; 64-bit integers wrap around."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros coming in: torch has signed integers only."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
