"""The floor: the FLOPs and bytes that a grid of patched runs cannot do without.

    P_b       matmul weights of block b that are active for a token; of experts the share k/E
    c_b       2 · P_b                                         FLOP a token
    a_b(n)    2 · H · (d_qk + d_v) · min(n, window_b)         FLOP of a query over n keys
    u         2 · d_model · vocab                             FLOP an unembedded row
    C_b(q0, q1) = Σ_{q0 ≤ q < q1} [c_b + a_b(q + 1)]          positions q0 … q1−1 of one sequence, earlier keys and values given

    F_base    Σ_b C_b(0, T) + u                               the unpatched run: prefix, lower layers, baseline
    F_rows    Σ_r [Σ_{b ≥ ℓ*_r} C_b(i*_r, T) + u]             over distinct rows
    F_decode  Σ_r Σ_{t=1}^{m_r − 1} [Σ_b (c_b + a_b(T + t)) + u]     m_r: tokens up to and with the stop
    F* = F_base + F_rows + F_decode

A pass over any number of rows reads each running block's weights once. W_b: bytes of block b, KV_b: bytes of a token's keys and
values in it. With all rows in one chunk

    B* = Σ_b W_b + W_head [base] + Σ_{b ≥ min ℓ*} W_b + W_head [rows] + (max m − 1) · (Σ_b W_b + W_head) [decode]
         + Σ_r Σ_b KV_b · (T − i*_r + Σ_t min(T + t, window_b))                          [keys and values written and read]

with the head once in each phase, since each unembeds.
All sizes are measured on the model: weights by their shapes, H_kv, d_qk and d_v in a cache that it filled. Two small savings are
left out: in the last block only keys and values are needed before the last position, and in the first edited block unedited
positions need no projections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from patchscopes.bench.work import Work
from patchscopes.engine.shape import Shape


@dataclass(frozen=True)
class Flops:
    """FLOP of a phase: matmuls with weights in the blocks, attention, unembedding."""

    weights: float = 0
    attention: float = 0
    head: float = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.weights + other.weights, self.attention + other.attention, self.head + other.head)

    def __rmul__(self, n: int) -> Flops:
        return Flops(n * self.weights, n * self.attention, n * self.head)

    @property
    def matmul(self) -> float:
        """Without attention: what counters see where attention runs in a fused kernel."""
        return self.weights + self.head

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.attention + self.head


@dataclass(frozen=True)
class Floor:
    """F* by phase, and B* in bytes: weights, and keys and values."""

    base: Flops
    rows: Flops
    decode: Flops
    weight_bytes: int
    kv_bytes: int

    @property
    def flops(self) -> Flops:
        """F*."""
        return self.base + self.rows + self.decode

    @property
    def n_bytes(self) -> int:
        """B*."""
        return self.weight_bytes + self.kv_bytes


def floor(shape: Shape, work: Work, said: Sequence[int] | None = None) -> Floor:
    """F* and B* of a grid. `said`: m_r, the tokens that each row needs up to and with its stop; default: all."""
    length, said = work.length, list(said) if said is not None else [work.tokens] * len(work.layers)
    blocks = shape.blocks
    unembed = Flops(head=2 * shape.head)

    def run(b: int, start: int, end: int) -> Flops:
        return Flops(
            2 * blocks[b].weights * (end - start),
            sum(blocks[b].attention(q + 1) for q in range(start, end)) if end > start else 0,
        )

    base = sum((run(b, 0, length) for b in range(len(blocks))), unembed)
    above = [Flops()]  # of the blocks from layer ℓ* up, from the top down
    for b in reversed(range(len(blocks))):
        above.insert(0, above[0] + run(b, work.position, length))
    distinct = Counter(work.layers)  # rows of one layer cost the same
    rows = sum((n * (above[layer] + unembed) for layer, n in distinct.items()), Flops())
    steps = [Flops()]  # up to the t-th later token
    for t in range(1, max(said)):
        steps.append(steps[-1] + sum((run(b, length + t - 1, length + t) for b in range(len(blocks))), unembed))
    decode = sum((n * steps[max(m - 1, 0)] for m, n in Counter(said).items()), Flops())

    all_blocks = sum(b.n_bytes for b in blocks)
    weight_bytes = all_blocks + sum(b.n_bytes for b in blocks[min(work.layers) :]) + 2 * shape.head_bytes
    weight_bytes += (max(said) - 1) * (all_blocks + shape.head_bytes)
    kv = [b.kv_heads * (b.d_qk + b.d_v) * shape.element for b in blocks]
    kv_bytes = sum(
        n * size * (length - work.position + sum(block.seen(length + t) for t in range(1, m)))
        for m, n in Counter(said).items()
        for size, block in zip(kv, blocks, strict=True)
    )
    return Floor(base, rows, decode, weight_bytes, kv_bytes)


def own_kv_bytes(shape: Shape, work: Work, said: Sequence[int] | None = None) -> int:
    """Bytes of the keys and values that belong to the rows alone: from i* on in the blocks from ℓ* up, and of all tokens said but
    the last, in every block."""
    said = list(said) if said is not None else [work.tokens] * len(work.layers)
    kv = [b.kv_heads * (b.d_qk + b.d_v) * shape.element for b in shape.blocks]
    prompt = work.length - work.position
    return sum(prompt * sum(kv[layer:]) + max(m - 1, 0) * sum(kv) for layer, m in zip(work.layers, said, strict=True))
