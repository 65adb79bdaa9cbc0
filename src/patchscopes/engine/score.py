"""Log-probabilities of given texts under a patch, teacher-forced: all tokens of all texts in parallel, on the shared prefix."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.engine.costs import activation_bytes, pass_cost
from patchscopes.engine.edits import beyond_windows, lengthened
from patchscopes.engine.engine import Engine
from patchscopes.engine.memory import Room, Tell, is_out_of_memory
from patchscopes.engine.packing import Wish, pack
from patchscopes.engine.patch import Route, Stem
from patchscopes.engine.rows import Row, wish_of
from patchscopes.engine.speech import Decoding

LOGITS_AT_ONCE = 2**26  # numbers, 256 MiB in float32: rows · tokens · vocabulary of one pass
ROWS = 4096  # at a time at most

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Case:
    """`text` after the ids `target`, under the edit of `row` (whose `target` does not count). without: as in `generate.Request`."""

    target: tuple[int, ...]
    row: Row
    text: Sequence[int]
    without: Row | None = None

    def rows(self, guidance: float) -> tuple[Row, ...]:
        """The row, and its companion under guidance."""
        return (self.row, self.row if self.without is None else self.without) if guidance else (self.row,)


def score(
    engine: Engine, target: Int[Tensor, "1 pos"], rows: Sequence[Row], texts: Sequence[Sequence[int]], *, route: Route = "stairs"
) -> list[Float[Tensor, " step"]]:
    """For every row, log p (nats) of each token of texts[row.target] after `target`, with the row's patch in place.

    Equal to the log-probabilities that `generate` saw while it said the text. An empty text gives an empty tensor.
    """
    ids = tuple(target[0].tolist())
    found = dict(scores(engine, [Case(ids, row, texts[row.target]) for row in rows], route=route))
    return [found[r] for r in range(len(rows))]


def scores(
    engine: Engine, cases: Sequence[Case], *, route: Route = "stairs", guidance: float = 0.0, tell: Tell = _log.warning
) -> Iterator[tuple[int, Float[Tensor, " step"]]]:
    """(number of the case, log p of each token of its text), as batches are done. ResourceError if a single case does not fit.

    guidance: of the decoding that said the text (see `Decoding`)
    """
    yield from ((k, torch.zeros(0)) for k, case in enumerate(cases) if not len(case.text))
    if beyond_windows(engine, (edit for case in cases for row in case.rows(guidance) for edit in row.more)):
        route = "hooks"
    todo = [k for k, case in enumerate(cases) if len(case.text)]
    wishes: list[Wish] = [wish_of(cases[k].target, cases[k].row, engine.n_layers) for k in todo]
    ragged = engine.packing.ragged and route == "stairs"
    for one in pack(wishes, ragged=ragged, steps=1, slack=pass_cost(engine), d_model=engine.d_model):
        waiting = sorted((todo[w] for w in one.wishes), key=lambda k: len(cases[k].text))  # the longest run first
        twice = 2 if guidance else 1
        room = Room(engine.device, twice * _bytes(engine, cases[waiting[-1]]), at_most=ROWS, tell=tell)
        while waiting:
            longest = len(cases[waiting[-1]].text)
            some = waiting[-max(1, min(room.rows(), LOGITS_AT_ONCE // (twice * longest * engine.vocab))) :]
            del waiting[-len(some) :]
            found: list[Tensor] | None = None
            try:
                with room.running(len(some), more=bool(waiting)):
                    found = _scored(engine, [cases[k] for k in some], route, guidance)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                waiting += some
                room.failed(len(some), error.with_traceback(None))
            if found is not None:
                yield from zip(some, found, strict=True)


@torch.no_grad()
def _scored(engine: Engine, cases: Sequence[Case], route: Route, guidance: float) -> list[Tensor]:
    """One pass: a target is a prompt, padded on the left, with a text behind it, of which the last token is predicted and never read."""
    width, longest = max(len(case.target) for case in cases), max(len(case.text) for case in cases)
    number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for case in cases:
        number.setdefault((case.target, tuple(case.text)), len(number))
    ids = torch.zeros(len(number), width + longest - 1, dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for t, (prompt, text) in enumerate(number):
        mask[t, : width - len(prompt)] = False
        said = torch.tensor([*prompt, *text[:-1]])
        ids[t, width - len(prompt) : width - len(prompt) + len(said)] = said
    rows = []
    for case in cases:
        n, said = len(case.target), len(case.text) - 1
        for row in case.rows(guidance):
            more = tuple(one for edit in row.more if (one := lengthened(edit, n, said)) is not None)
            rows.append(replace(row, target=number[case.target, tuple(case.text)], more=more))
    padded = None if bool(mask.all()) else mask.to(engine.device)
    stem = Stem(engine, ids.to(engine.device), rows, route=route, caching=False, mask=padded, shared=None)
    logits = Decoding(guidance=guidance).guided(stem.walk(rows, range(width - 1, width - 1 + longest)).logits)
    found = []
    for k, case in enumerate(cases):
        text = torch.tensor(case.text, device=logits.device)
        log_p = logits[k, : len(text)].float().log_softmax(-1)
        found.append(log_p.gather(-1, text[:, None])[:, 0].cpu())
    return found


def _bytes(engine: Engine, case: Case) -> float:
    suffix = len(case.target) - case.row.first + len(case.text)
    return activation_bytes(engine, suffix, len(case.target) + len(case.text)) + 3.0 * 4 * engine.vocab * len(case.text)
