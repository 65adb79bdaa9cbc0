"""What rows of one batch can share on this model: the runs that `check` compares with rows run alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.core.sites import Site
from patchscopes.engine.decode import Batch
from patchscopes.engine.engine import Engine
from patchscopes.engine.patch import Route, Stem
from patchscopes.engine.rows import Row

CUT = 3  # tokens that the shorter of two prompts lacks in front


def sharing_prefix(
    engine: Engine, ids: Int[Tensor, "1 pos"], rows: Sequence[Row], said: Int[Tensor, "row step"]
) -> Float[Tensor, "row stepp1 vocab"]:
    """Logits after the prompt and after each of the tokens said, the prompt's keys and values held once."""
    return _fed(Stem(engine, ids, rows, shared=True, room=said.shape[1]), rows, said)


def ragged(
    engine: Engine, ids: Int[Tensor, "1 pos"], rows: Sequence[Row], said: Int[Tensor, "row step"], *, shared: bool
) -> Float[Tensor, "rows2 stepp1 vocab"]:
    """The same for rows of the prompt and of a shorter one in one batch; of the shorter one last."""
    return _ragged(engine, ids, rows, said, shared=shared)


def ragged_early(
    engine: Engine, ids: Int[Tensor, "1 pos"], rows: Sequence[Row], said: Int[Tensor, "row step"]
) -> Float[Tensor, "rows2 stepp1 vocab"]:
    """The same beside a row that is changed so early that some of the padding comes behind the prefix: recurrent models may see it."""
    early = Row(Site("resid", 0), 1, None)
    return _ragged(engine, ids, [*rows, early], torch.cat([said, said[:1]]), shared=False, drop=1)


def _ragged(
    engine: Engine, ids: Tensor, rows: Sequence[Row], said: Tensor, *, shared: bool, drop: int = 0
) -> Float[Tensor, "rows2 stepp1 vocab"]:
    both = torch.cat([ids, ids])
    mask = torch.ones_like(both, dtype=torch.bool)
    mask[1, :CUT] = False
    moved = _moved(rows[: len(rows) - drop])
    some = [*rows, *(replace(row, target=1) for row in moved)]
    stem = Stem(engine, both, some, mask=mask, shared=shared, room=said.shape[1])
    out = _fed(stem, some, torch.cat([said, said[: len(moved)]]))
    return torch.cat([out[: len(moved)], out[len(rows) :]])


def shorter(
    engine: Engine, ids: Int[Tensor, "1 pos"], rows: Sequence[Row], said: Int[Tensor, "row step"]
) -> Float[Tensor, "row stepp1 vocab"]:
    """What `ragged` must give for the shorter prompt: its rows in a batch of their own."""
    some = _moved(rows)
    return _fed(Stem(engine, ids[:, CUT:], some, room=said.shape[1]), some, said)


def entering(
    engine: Engine, ids: Int[Tensor, "1 pos"], rows: Sequence[Row], said: Int[Tensor, "row step"], *, route: Route, shared: bool
) -> Float[Tensor, "row stepp1 vocab"]:
    """The same, half of the rows entering when the others have been fed all tokens but one, and going on without them."""
    stem = Stem(engine, ids, rows, route=route, shared=shared, room=said.shape[1])
    half, steps, last = len(rows) // 2, said.shape[1], ids.shape[1] - 1
    early, late = list(range(half)), list(range(half, len(rows)))
    logits: dict[int, list[Tensor]] = {r: [] for r in range(len(rows))}

    def note(who: Sequence[int], values: Tensor) -> None:
        for r, value in zip(who, values, strict=True):
            logits[r].append(value)

    def begin(who: Sequence[int]) -> None:
        walked = stem.walk([rows[r] for r in who], [last], caching=True)
        batch.enter([0] * len(who), walked.cache)
        note(who, walked.logits[:, 0])

    with stem.attending():
        batch = Batch(stem)
        begin(early)
        for t in range(steps - 1):
            note(early, batch.forward(said[early, t]))
        begin(late)
        note([*early, *late], batch.forward(torch.cat([said[early, -1], said[late, 0]])))
        batch.keep([half + k for k in range(len(late))])
        for t in range(1, steps):
            note(late, batch.forward(said[late, t]))
    return torch.stack([torch.stack(logits[r]) for r in range(len(rows))])


def _moved(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, position=row.position - CUT) for row in rows]


def _fed(stem: Stem, rows: Sequence[Row], said: Tensor) -> Tensor:
    with stem.attending():
        batch, walked = Batch(stem), stem.walk(rows, [stem.targets.shape[1] - 1], caching=True)
        batch.enter([row.target for row in rows], walked.cache)
        return torch.stack([walked.logits[:, 0], *(batch.forward(tokens) for tokens in said.T)], 1)
