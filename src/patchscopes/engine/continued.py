"""Go on from prompts while edits are in place: at the prompt, at given steps, or at every token.

A pass over the prompts fills the cache, with the edits made in it; each token after that is a pass of one column, in which the edits
that mean it are made at its position. The same as running the whole text anew for every token with the edits at the same absolute
positions, which is what models do here whose cached steps differ from their full pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from patchscopes.engine.edits import Frame, Placed, beyond_windows, lengthened
from patchscopes.engine.engine import Engine
from patchscopes.engine.hooks import hooked
from patchscopes.engine.run import Batch, batched, own, run
from patchscopes.engine.speech import Decoding, Speech
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
    cached = cached and not any(e.site.name == "state" for e in edits)  # states are written between tokens: see `run`
    cached = cached and not beyond_windows(engine, edits)
    step = _cached(engine, batched(prompts, engine.device), edits) if cached else _anew(engine, prompts, edits)
    who = list(range(len(prompts)))
    first = step(who, None)
    speech = Speech(decoding, engine.device)
    speech.enter(who, seeds, first)
    texts: dict[int, list[int]] = {}
    while len(speech):
        if speech.look():
            texts |= speech.leave()[0]
        else:
            speech.hear(step(speech.who, speech.last()))
    return [(texts[i], first[i]) for i in who]


Step = Callable[[list[int], Tensor | None], Tensor]  # (prompts that go on, the token that each said last): logits after it


def _cached(engine: Engine, batch: Batch, edits: Sequence[Placed]) -> Step:
    """One pass a token, on the model's cache."""
    cache = engine.new_cache()
    watch = Watch(engine, (), edits, batch.frame)
    mask = batch.mask.long()
    there = list(range(len(batch.ids)))  # whose rows the cache holds
    said = 0  # tokens fed after the prompt

    def step(who: list[int], last: Tensor | None) -> Tensor:
        nonlocal mask, there, said
        if last is None:
            with hooked(watch.hooks()):
                end = [batch.ids.shape[1] - 1]
                return engine.forward(batch.ids, cache=cache, mask=batch.padded, positions=batch.positions, keep=end)[:, 0]
        if who != there:
            kept = torch.tensor([there.index(n) for n in who], device=mask.device)
            cache.reorder_cache(kept)
            mask, there = mask[kept], list(who)
        mask = torch.cat([mask, mask.new_ones(len(who), 1)], 1)
        now = [batch.lengths[n] + said for n in who]
        said += 1
        watch.frame = Frame(who, now, 1, batch.lengths)
        positions = torch.tensor(now, device=mask.device)[:, None]
        padded = None if batch.padded is None else mask
        with hooked(watch.hooks()):
            logits = engine.forward(
                last[:, None], cache=cache, offset=mask.shape[1] - 1, mask=padded, positions=positions, keep=[0]
            )
        return logits[:, 0]

    return step


def _anew(engine: Engine, prompts: Sequence[Tensor], edits: Sequence[Placed]) -> Step:
    """The same by a full pass over each text, for every token."""
    texts = [p[0].tolist() for p in prompts]

    def step(who: list[int], last: Tensor | None) -> Tensor:
        found = []
        for k, i in enumerate(who):
            if last is not None:
                texts[i].append(int(last[k]))
            said = len(texts[i]) - prompts[i].shape[1]
            mine = [lengthened(e, prompts[i].shape[1], said) for e in own(edits, i)]
            ids = torch.tensor([texts[i]])
            found.append(run(engine, [ids], (), [e for e in mine if e is not None], padding_exact=True).logits[0, -1])
        return torch.stack(found)

    return step
