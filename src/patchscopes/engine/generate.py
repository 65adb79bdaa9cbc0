"""Generate under a patch: walk once through the prompt, then decode all rows together from the spliced cache.

Greedy, or sampled at a temperature with a seed a row (so that a row's text does not depend on the batch it ran in). Rows that have
finished leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.engine.engine import Engine
from patchscopes.engine.patch import Route, Row, Stem


@dataclass(frozen=True)
class Decoding:
    """How to go on from the patched prompt.

    max_new_tokens  at most this many tokens
    end             token ids that end a row; they are not part of its text
    stop            called with a row's tokens so far: how many of them to keep if the row is to stop there, else None
    temperature     0: greedy
    """

    max_new_tokens: int = 1
    end: frozenset[int] = frozenset()
    stop: Callable[[list[int]], int | None] | None = None
    temperature: float = 0.0


@dataclass(frozen=True, eq=False)
class Generated:
    """One row: the tokens that it said, the logits [vocab] of the first, and the norm ratio of what was written."""

    tokens: list[int]
    logits: Tensor
    norm_ratio: float


@torch.no_grad()
def generate(
    engine: Engine, target: Int[Tensor, "1 pos"], rows: Sequence[Row], decoding: Decoding, *, route: Route = "stairs", seeds: Sequence[int]
) -> list[Generated]:
    """Continue `target` in every row. `seeds`: one a row, used if the temperature is not 0."""
    last = target.shape[1] - 1
    caching = decoding.max_new_tokens > 1 and route != "hooks"
    stem = Stem(engine, target, rows, route=route, caching=caching)
    walked = stem.walk(rows, [last], caching=caching)
    first, ratios = walked.logits[:, 0], walked.norm_ratio.tolist()
    samplers = [torch.Generator().manual_seed(seed) for seed in seeds] if decoding.temperature else []
    said: list[list[int]] = [[] for _ in rows]
    alive, logits, cache = list(range(len(rows))), first, walked.cache
    for step in range(decoding.max_new_tokens):
        chosen = _choose(logits, [samplers[r] for r in alive] if samplers else [], decoding.temperature)
        going = []
        for k, token in enumerate(chosen.tolist()):
            if token in decoding.end:
                continue
            text = said[alive[k]]
            text.append(token)
            cut = decoding.stop(text) if decoding.stop else None
            if cut is not None:
                del text[cut:]
                continue
            going.append(k)
        if not going or step + 1 == decoding.max_new_tokens:
            break
        if len(going) < len(alive):
            alive = [alive[k] for k in going]
            chosen = chosen[going]
            if cache is not None:
                cache.reorder_cache(torch.tensor(going, device=chosen.device))
        if cache is not None:
            logits = engine.forward(chosen[:, None], offset=last + 1 + step, cache=cache, keep=[0])[:, 0]
        else:
            logits = torch.stack([_rerun(engine, target, rows[r], said[r]) for r in alive])
    return [Generated(said[r], first[r], ratios[r]) for r in range(len(rows))]


def _rerun(engine: Engine, target: Int[Tensor, "1 pos"], row: Row, said: list[int]) -> Float[Tensor, " vocab"]:
    """Route "hooks": the whole text again, patched at the same absolute position."""
    text = torch.cat([target, torch.tensor([said], device=target.device)], 1)
    return Stem(engine, text, [row], route="hooks").walk([row], [text.shape[1] - 1]).logits[0, 0]


def _choose(logits: Float[Tensor, "row vocab"], samplers: list[torch.Generator], temperature: float) -> Int[Tensor, " row"]:
    """Greedy, or by the Gumbel trick: argmax of logits / temperature − log(−log u)."""
    if not samplers:
        return logits.argmax(-1)
    u = torch.stack([torch.rand(logits.shape[-1], generator=sampler) for sampler in samplers]).clamp(1e-10, 1 - 1e-7)
    return (logits.float() / temperature - (-u.log()).log().to(logits.device)).argmax(-1)
