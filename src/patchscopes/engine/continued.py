"""Go on from prompts while edits are in place: at the prompt, at given steps, or at every token.

A pass over the prompts fills the cache, with the edits made in it; each token after that is a pass of one column, in which the edits
that mean it are made at its position. The same as running the whole text anew for every token with the edits at the same absolute
positions, which is what models do here whose cached steps differ from their full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from patchscopes.engine.edits import Frame, Placed
from patchscopes.engine.engine import Engine
from patchscopes.engine.generate import Decoding, choose
from patchscopes.engine.hooks import hooked
from patchscopes.engine.run import Batch, batched, own, run
from patchscopes.engine.watch import Watch


def stopping(decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> Callable[[list[int]], int | None] | None:
    """How many of some tokens to keep if one of the strings `stop` has come up in their text, else None. None for no strings."""

    def cut(tokens: list[int]) -> int | None:
        text = decode(tokens)
        if not any(s in text for s in stop):
            return None
        end = min(text.index(s) for s in stop if s in text)
        return next((n for n in range(len(tokens)) if len(decode(tokens[: n + 1])) > end), len(tokens))

    return cut if stop else None


@torch.no_grad()
def continued(
    engine: Engine,
    prompts: Sequence[Int[Tensor, "1 _"]],
    edits: Sequence[Placed],
    decoding: Decoding,
    *,
    seeds: Sequence[int],
    cached: bool,
    padding_exact: bool,
) -> list[tuple[list[int], Tensor]]:
    """For each prompt the tokens that follow and the logits [vocab] of the first of them.

    cached: whether the model's cached steps equal its full pass (the ability `decoding`).
    """
    if len({p.shape[1] for p in prompts}) > 1 and not padding_exact:
        return [
            continued(engine, [p], own(edits, i), decoding, seeds=[seeds[i]], cached=cached, padding_exact=True)[0]
            for i, p in enumerate(prompts)
        ]
    rows = [_Row(i, p[0].tolist(), torch.Generator().manual_seed(seed)) for i, (p, seed) in enumerate(zip(prompts, seeds, strict=True))]
    step = _cached(engine, batched(prompts, engine.device), edits) if cached else _anew(engine, prompts, edits)
    alive = rows
    for _ in range(decoding.max_new_tokens):
        logits = step(alive)
        tokens = choose(logits, [row.sampler for row in alive] if decoding.temperature else [], decoding.temperature)
        for k, row in enumerate(alive):
            row.take(int(tokens[k]), logits[k], decoding)
        alive = [row for row in alive if not row.finished]
        if not alive:
            break
    return [(row.said, row.first) for row in rows]


class _Row:
    """A prompt that goes on."""

    def __init__(self, number: int, prompt: list[int], sampler: torch.Generator):
        self.number, self.prompt, self.sampler = number, prompt, sampler
        self.said: list[int] = []
        self.first = torch.zeros(0)
        self.finished = False

    def take(self, token: int, logits: Tensor, decoding: Decoding) -> None:
        """The next token, chosen from `logits`."""
        if not self.said and not self.first.numel():
            self.first = logits
        if token in decoding.end:
            self.finished = True
            return
        self.said.append(token)
        cut = decoding.stop(self.said) if decoding.stop else None
        if cut is not None:
            del self.said[cut:]
            self.finished = True


def _cached(engine: Engine, batch: Batch, edits: Sequence[Placed]) -> Callable[[list[_Row]], Tensor]:
    """Logits [row, vocab] after the last token of the rows that are left, one pass a token."""
    cache, frame = engine.new_cache(), batch.frame
    watch = Watch(engine, (), edits, frame)
    mask = batch.mask.long()
    there = list(range(len(batch.ids)))  # whose rows the cache holds

    def step(alive: list[_Row]) -> Tensor:
        nonlocal mask, there
        if not alive[0].said:
            with hooked(watch.hooks()):
                last = [batch.ids.shape[1] - 1]
                return engine.forward(batch.ids, cache=cache, mask=batch.padded, positions=batch.positions, keep=last)[:, 0]
        numbers = [row.number for row in alive]
        if numbers != there:
            kept = torch.tensor([there.index(n) for n in numbers], device=mask.device)
            cache.reorder_cache(kept)
            mask, there = mask[kept], numbers
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        now = [len(row.prompt) + len(row.said) - 1 for row in alive]
        watch.frame = Frame(numbers, now, 1, batch.lengths)
        ids = torch.tensor([[row.said[-1]] for row in alive], device=mask.device)
        positions = torch.tensor(now, device=mask.device)[:, None]
        with hooked(watch.hooks()):
            return engine.forward(
                ids, cache=cache, offset=mask.shape[1] - 1, mask=None if batch.padded is None else mask, positions=positions, keep=[0]
            )[:, 0]

    return step


def _anew(engine: Engine, prompts: Sequence[Tensor], edits: Sequence[Placed]) -> Callable[[list[_Row]], Tensor]:
    """The same by a full pass over each text, for every token."""

    def step(alive: list[_Row]) -> Tensor:
        found = []
        for row in alive:
            ids = torch.tensor([row.prompt + row.said])
            mine = [_lengthened(e, len(row.prompt), len(row.said)) for e in own(edits, row.number)]
            found.append(run(engine, [ids], (), [e for e in mine if e is not None], padding_exact=True).logits[0, -1])
        return torch.stack(found)

    return step


def _lengthened(edit: Placed, prompt: int, said: int) -> Placed | None:
    """An edit of a prompt as an edit of the prompt and what was said after it."""
    if isinstance(edit.steps, tuple):
        places = tuple(prompt + t for t in edit.steps if t < said)
        return replace(edit, positions=places, steps="prompt") if places else None
    positions = edit.positions if edit.positions is not None else tuple(range(prompt))
    if edit.steps == "always":
        positions += tuple(range(prompt, prompt + said))
    return replace(edit, positions=positions, steps="prompt")
