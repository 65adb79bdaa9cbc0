"""Log-probabilities of given texts under a patch, teacher-forced: all tokens of all texts in parallel, on the shared prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.engine.engine import Engine
from patchscopes.engine.patch import Route, Row, Stem

LOGITS_AT_ONCE = 2**26  # numbers, 256 MiB in float32: rows · tokens · vocabulary of one pass


@torch.no_grad()
def score(
    engine: Engine, target: Int[Tensor, "1 pos"], rows: Sequence[Row], texts: Sequence[Sequence[int]], *, route: Route = "stairs"
) -> list[Float[Tensor, " step"]]:
    """For every row, log p (nats) of each token of texts[row.target] after `target`, with the row's patch in place.

    Equal to the log-probabilities that `generate` saw while it said the text. An empty text gives an empty tensor.
    """
    last = target.shape[1] - 1
    found: list[Tensor] = [torch.zeros(0)] * len(rows)
    todo = sorted((r for r in range(len(rows)) if len(texts[rows[r].target])), key=lambda r: len(texts[rows[r].target]))
    while todo:
        longest = len(texts[rows[todo[-1]].target])
        chunk = todo[-max(1, LOGITS_AT_ONCE // (longest * engine.vocab)) :]
        del todo[-len(chunk) :]
        used = sorted({rows[r].target for r in chunk})
        # the last token of a text is predicted, never read
        ids = torch.zeros(len(used), last + longest, dtype=target.dtype, device=target.device)
        ids[:, : last + 1] = target
        for k, t in enumerate(used):
            ids[k, last + 1 : last + len(texts[t])] = torch.tensor(texts[t][:-1], device=target.device)
        mine = [Row(rows[r].site, rows[r].position, rows[r].value, rows[r].write, used.index(rows[r].target)) for r in chunk]
        keep = range(last, last + longest)
        logits = Stem(engine, ids, mine, route=route, caching=False).walk(mine, keep).logits
        for k, r in enumerate(chunk):
            text = torch.tensor(texts[rows[r].target], device=logits.device)
            log_p = logits[k, : len(text)].float().log_softmax(-1)
            found[r] = log_p.gather(-1, text[:, None])[:, 0].cpu()
    return found
