"""What the rows of a batch have said, which of them are done, and with which text.

Tokens stay on the device. Where nothing but end tokens can stop a row, one looks at them every few steps only (each look waits for a
GPU), and what a row said beyond its end is cut off when it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.engine.sampling import choose

# Steps, on a device that one has to wait for. (GPT-2 small on an H200, 144 rows of 40 tokens: 360 ms at 1, 335 at 4, 333 at 16.)
LOOK_EVERY = 4
IDLE = (
    16  # steps of done rows that are borne: one for every so many rows of the batch. Leaving copies the others' keys and values
)


@dataclass(frozen=True)
class Decoding:
    """How to go on from the patched prompt.

    max_new_tokens  at most this many tokens
    end             token ids that end a row; they are not part of its text
    stop            called with a row's tokens so far: how many of them to keep if the row is to stop there, else None
    temperature     0: greedy
    guidance        w: with p the logits of a row and u those of its companion without the patch, which says the same tokens in step with
                    it, tokens are chosen by p + w (p − u) (classifier-free guidance); 0: by p alone
    """

    max_new_tokens: int = 1
    end: frozenset[int] = frozenset()
    stop: Callable[[list[int]], int | None] | None = None
    temperature: float = 0.0
    guidance: float = 0.0

    def guided(self, logits: Float[Tensor, "row_and_companion *kept vocab"]) -> Float[Tensor, "row *kept vocab"]:
        """Of rows that each have a companion behind them: p + w (p − u). Without guidance there are no companions."""
        if not self.guidance:
            return logits
        patched, plain = logits[0::2].float(), logits[1::2].float()
        return patched + self.guidance * (patched - plain)


class Speech:
    """The texts of a batch's rows, in its order. Every row has said one token more than it was fed."""

    def __init__(self, decoding: Decoding, device: torch.device):
        self.decoding = decoding
        self.who: list[int] = []
        self.done: dict[int, int] = {}  # row -> tokens of it that count
        self.idle = 0
        self._count = torch.zeros(0, dtype=torch.long)  # tokens that each row has said, on the host
        self._texts: list[list[int]] = []  # kept on the host for a stop callback, which looks at every token
        self._unseen = 0
        self._tokens = torch.zeros(0, decoding.max_new_tokens, dtype=torch.long, device=device)
        self._seeds, self._steps = (torch.zeros(0, dtype=torch.long, device=device) for _ in range(2))
        self._ends = torch.tensor(sorted(decoding.end), dtype=torch.long, device=device)
        self._ended = torch.zeros(0, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self.who)

    def enter(self, who: Sequence[int], seeds: Sequence[int], logits: Float[Tensor, "row vocab"]) -> None:
        """Newcomers, and the logits of their first tokens."""
        device, old = self._tokens.device, len(self)
        self.who += who
        self._count = torch.cat([self._count, torch.zeros(len(who), dtype=torch.long)])
        self._texts += [[] for _ in who]
        seeds_ = torch.tensor([_wrapped(seed) for seed in seeds] or [0] * len(who), device=device)
        self._seeds = torch.cat([self._seeds, seeds_])
        self._steps = torch.cat([self._steps, torch.zeros_like(seeds_)])
        self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(len(who), self._tokens.shape[1])])
        self._ended = torch.cat([self._ended, torch.zeros_like(seeds_, dtype=torch.bool)])
        self._say(slice(old, len(self)), logits)
        self._unseen = LOOK_EVERY  # rows that end at once are not fed

    def last(self) -> Int[Tensor, " row"]:
        """The token that each row said last."""
        return self._tokens.gather(1, self._steps[:, None] - 1)[:, 0]

    def hear(self, logits: Float[Tensor, "row vocab"]) -> None:
        """The next token of every row."""
        self.idle += len(self.done)
        self._say(slice(0, len(self)), logits)

    def _say(self, rows: slice, logits: Tensor) -> None:
        steps = self._steps[rows]
        chosen = choose(logits.to(steps.device), self._seeds[rows], steps, self.decoding.temperature)
        place = steps[:, None].clamp(max=self._tokens.shape[1] - 1)  # done rows may be fed on for a while
        self._tokens[rows].scatter_(1, place, chosen[:, None])
        self._steps[rows] += 1
        if len(self._ends):
            self._ended[rows] |= torch.isin(chosen, self._ends)
        self._count[rows] += 1
        if self.decoding.stop is not None:
            self._ask_stop(range(*rows.indices(len(self))), chosen.tolist())
        self._unseen += 1

    def _ask_stop(self, rows: Sequence[int], chosen: Sequence[int]) -> None:
        assert self.decoding.stop is not None
        for r, token in zip(rows, chosen, strict=True):
            if r in self.done:
                continue
            if token in self.decoding.end:
                self.done[r] = len(self._texts[r])
                continue
            self._texts[r].append(token)
            cut = self.decoding.stop(list(self._texts[r]))
            if cut is not None:
                self.done[r] = cut

    def look(self, *, waiting: bool = False) -> bool:
        """Whether rows should leave now: all are done, or the done ones have cost enough, or others are `waiting` for their places."""
        for r in (self._count >= self.decoding.max_new_tokens).nonzero()[:, 0].tolist():
            self.done.setdefault(r, self.decoding.max_new_tokens)
        every = LOOK_EVERY if self._ended.device.type != "cpu" else 1
        if len(self._ends) and self.decoding.stop is None and (self._unseen >= every or self.done):
            self._unseen = 0
            for r in self._ended.nonzero()[:, 0].tolist():
                self.done.setdefault(r, self.decoding.max_new_tokens)
        done = len(self.done)
        return bool(done) and (waiting or done == len(self) or (self.idle + done) * IDLE >= len(self))

    def leave(self) -> tuple[dict[int, list[int]], list[int]]:
        """The texts of the rows that are done, by who said them; and the rows that stay."""
        left = sorted(self.done)
        texts = {}
        for r, tokens in zip(left, self._tokens[left].tolist(), strict=True):
            text = tokens[: min(self.done[r], int(self._count[r]))]
            end = next((k for k, token in enumerate(text) if token in self.decoding.end), len(text))
            texts[self.who[r]] = text[:end]
        stay = [r for r in range(len(self)) if r not in self.done]
        self.done, self.idle = {}, 0
        self.who, self._texts = [self.who[r] for r in stay], [self._texts[r] for r in stay]
        self._count = self._count[stay]
        index = torch.tensor(stay, dtype=torch.long, device=self._tokens.device)
        self._tokens, self._seeds, self._steps, self._ended = (
            t[index] for t in (self._tokens, self._seeds, self._steps, self._ended)
        )
        return texts, stay


def _wrapped(seed: int) -> int:
    """Any integer as a signed one of 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
