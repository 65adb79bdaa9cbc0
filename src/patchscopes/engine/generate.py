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
from patchscopes.engine.patch import Route, Row, Stem, Walked


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
    engine: Engine,
    target: Int[Tensor, "1 pos"],
    rows: Sequence[Row],
    decoding: Decoding,
    *,
    route: Route = "stairs",
    seeds: Sequence[int] = (),
    done: Callable[[int], None] = lambda rows: None,
) -> list[Generated]:
    """Continue `target` in every row. `seeds`: one a row, needed if the temperature is not 0. `done` hears how many rows have finished."""
    if not rows:
        return []
    last = target.shape[1] - 1
    caching = decoding.max_new_tokens > 1 and route != "hooks"
    stem = Stem(engine, target, rows, route=route, caching=caching)
    order = sorted(range(len(rows)), key=lambda r: stem.join(rows[r]))  # rows that skip as many blocks run together
    size = rows_at_once(engine, last + decoding.max_new_tokens)
    found: dict[int, Generated] = {}
    for chunk in (order[i : i + size] for i in range(0, len(order), size)):
        walked = stem.walk([rows[r] for r in chunk], [last], caching=caching)
        samplers = [torch.Generator().manual_seed(seeds[r]) for r in chunk] if decoding.temperature else []
        said = _decode(engine, target, [rows[r] for r in chunk], walked, decoding, samplers)
        for k, r in enumerate(chunk):
            found[r] = Generated(said[k], walked.logits[k, 0], float(walked.norm_ratio[k]))
        done(len(chunk))
    return [found[r] for r in range(len(rows))]


def rows_at_once(engine: Engine, length: int) -> int:
    """Rows of `length` tokens whose keys, values and logits fit into an eighth of the free memory; at most 1024."""
    number = next(engine.model.parameters()).element_size()
    d_model = engine.config.get_text_config(decoder=True).hidden_size
    row = 3 * engine.n_layers * 2 * d_model * length * number + 3 * 4 * engine.vocab
    free = torch.cuda.mem_get_info(engine.device)[0] if engine.device.type == "cuda" else 8 * 2**30
    return max(1, min(1024, free // 8 // row))


def _decode(
    engine: Engine, target: Tensor, rows: Sequence[Row], walked: Walked, decoding: Decoding, samplers: list[torch.Generator]
) -> list[list[int]]:
    last = target.shape[1] - 1
    said: list[list[int]] = [[] for _ in rows]
    alive, logits, cache = list(range(len(rows))), walked.logits[:, 0], walked.cache
    for step in range(decoding.max_new_tokens):
        chosen = choose(logits, [samplers[r] for r in alive] if samplers else [], decoding.temperature)
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
    return said


def _rerun(engine: Engine, target: Int[Tensor, "1 pos"], row: Row, said: list[int]) -> Float[Tensor, " vocab"]:
    """Route "hooks": the whole text again, patched at the same absolute position."""
    text = torch.cat([target, torch.tensor([said], device=target.device)], 1)
    return Stem(engine, text, [row], route="hooks").walk([row], [text.shape[1] - 1]).logits[0, 0]


def choose(logits: Float[Tensor, "row vocab"], samplers: list[torch.Generator], temperature: float) -> Int[Tensor, " row"]:
    """Greedy, or by the Gumbel trick: argmax of logits / temperature − log(−log u)."""
    if not samplers:
        return logits.argmax(-1)
    u = torch.stack([torch.rand(logits.shape[-1], generator=sampler) for sampler in samplers]).clamp(1e-10, 1 - 1e-7)
    return (logits.float() / temperature - (-u.log()).log().to(logits.device)).argmax(-1)
