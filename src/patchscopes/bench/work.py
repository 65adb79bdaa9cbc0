"""What is to be computed: a grid of patched cells on one target prompt.

A cell writes one vector at layer ℓ* and position i* of the target T, and reads the next token, or generates m tokens. A grid is
every source vector × every target layer. Each repetition has a target and vectors of its own, the same for all contestants: what
one of them remembers of earlier targets gives it no advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

Stop = Callable[[list[int]], int | None]  # a row's tokens so far -> how many to keep if it is to stop there


@dataclass(frozen=True, eq=False)
class Work:
    """One grid.

    target    [1, pos], the ids of T
    position  i*
    layers    ℓ* of every row
    vectors   what each row writes
    tokens    m, the tokens to say; 1: only the next token is read
    end       token ids that end a row; empty: none does
    stop      ends a row by its text; None: nothing does
    """

    target: Int[Tensor, "1 pos"]
    position: int
    layers: tuple[int, ...]
    vectors: Float[Tensor, "row d_model"]
    tokens: int
    end: frozenset[int] = frozenset()
    stop: Stop | None = None

    @property
    def length(self) -> int:
        """T, in tokens."""
        return self.target.shape[1]

    def part(self, rows: Sequence[int]) -> Work:
        """The same with some of the rows."""
        return replace(self, layers=tuple(self.layers[r] for r in rows), vectors=self.vectors[list(rows)])

    def cut(self, said: Sequence[int]) -> list[int]:
        """A row's tokens up to where it stops; at most m. Text after a stop never counts."""
        kept: list[int] = []
        for token in list(said)[: self.tokens]:
            if token in self.end:
                break
            kept.append(token)
            if self.stop is not None and (n := self.stop(kept)) is not None:
                return kept[:n]
        return kept


@dataclass(frozen=True, eq=False)
class Answer:
    """What a contestant says: next-token logits and tokens of `rows` (indices into the work's)."""

    rows: list[int]
    logits: Float[Tensor, "row vocab"]
    tokens: list[list[int]]


def grid(
    n_layers: int,
    d_model: int,
    vocab: int,
    *,
    vectors: int,
    prefix: int,
    suffix: int,
    tokens: int,
    seed: int,
    device: torch.device,
    like: torch.dtype = torch.float32,
) -> Work:
    """`vectors` random source vectors × layers 0 … L−1, on a random target of `prefix` tokens before i* and `suffix` from it on."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, vocab, (1, prefix + suffix), generator=generator)
    values = torch.randn(vectors, d_model, generator=generator)
    layers = tuple(layer for layer in range(n_layers) for _ in range(vectors))
    return Work(target.to(device), prefix, layers, values.repeat(n_layers, 1).to(device, like), tokens)


def stop_at(decode: Callable[[Sequence[int]], str], texts: Sequence[str]) -> Stop:
    """Stop a row where one of `texts` begins in what it said."""

    def stop(said: list[int]) -> int | None:
        text = decode(said)
        places = [text.index(s) for s in texts if s in text]
        if not places:
            return None
        return next((n for n in range(len(said)) if len(decode(said[: n + 1])) > min(places)), len(said))

    return stop
