"""Generate under patches: few passes for many rows, results handed over as rows finish.

    equal rows   the same target, edit and vector, greedy: run once
    packs        rows whose targets run together (see `packing`); each pack shares prefix and base (see `patch.Stem`)
    batches      as many rows as fit into memory (see `memory`), those first that join at the same layers
    decoding     all rows of a batch together; those that have finished leave, and waiting ones enter (see `decode`)

Nothing of a run stays on the model between two results: closing the iterator cancels, and what was handed over is not lost.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from patchscopes.core.errors import ResourceError
from patchscopes.engine.caches import FEW, row_bytes
from patchscopes.engine.costs import activation_bytes, pass_cost
from patchscopes.engine.decode import Batch
from patchscopes.engine.edits import beyond_windows, lengthened
from patchscopes.engine.engine import Engine
from patchscopes.engine.memory import Room, Tell, free_bytes, is_out_of_memory
from patchscopes.engine.packing import Pack, pack
from patchscopes.engine.patch import Route, Stem, Walked
from patchscopes.engine.rows import Row, same_rows, wish_of
from patchscopes.engine.speech import Decoding, Speech

# At a time at most: more make no pass cheaper. (GPT-2 small on an H200, 16,384 rows of 10 tokens: 2.5 s by 1024, 2.2 s by 4096, 4.4 s by
# 16,384 in float32; 2.1, 2.0 and 3.4 s in bfloat16.)
ROWS = {"cpu": 1024, "cuda": 4096}

_log = logging.getLogger(__name__)

__all__ = ["Decoding", "Generated", "Request", "generate", "stream"]


@dataclass(frozen=True, eq=False)
class Generated:
    """One row: the tokens that it said, the logits [vocab] of the first, and the norm ratio of what was written."""

    tokens: list[int]
    logits: Tensor
    norm_ratio: float


@dataclass(frozen=True, eq=False)
class Request:
    """Go on from the ids `target` under the edit of `row` (whose `target` does not count). `seed` matters above temperature 0.

    without: the run that guidance leads away from; None: the same, so that there is none
    """

    target: tuple[int, ...]
    row: Row
    seed: int = 0
    without: Row | None = None

    @property
    def companion(self) -> Row:
        """The row that runs beside it under guidance."""
        return self.row if self.without is None else self.without


def generate(
    engine: Engine,
    target: Int[Tensor, "1 pos"],
    rows: Sequence[Row],
    decoding: Decoding,
    *,
    route: Route = "stairs",
    seeds: Sequence[int] = (),
    done: Callable[[int], None] = lambda rows: None,
    at_most: int | None = None,
) -> list[Generated]:
    """Continue `target` in every row. `seeds`: one a row, needed if the temperature is not 0. `done` hears how many rows have finished."""
    ids = tuple(target[0].tolist())
    requests = [Request(ids, row, seeds[r] if decoding.temperature else 0) for r, row in enumerate(rows)]
    found: dict[int, Generated] = {}
    for r, one in stream(engine, requests, decoding, route=route, at_most=at_most):
        found[r] = one
        done(1)
    return [found[r] for r in range(len(rows))]


def stream(
    engine: Engine,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    route: Route = "stairs",
    at_most: int | None = None,
    tell: Tell = _log.warning,
) -> Iterator[tuple[int, Generated]]:
    """(number of the request, its result), as rows finish. `at_most`: rows at a time; `tell` hears when memory ran out.

    ResourceError if a single row does not fit.
    """
    if beyond_windows(engine, (edit for request in requests for edit in (*request.row.more, *request.companion.more))):
        route = "hooks"
    alike = _alike(requests, sampled=decoding.temperature > 0, guided=decoding.guidance != 0)
    firsts = list(alike)
    packs = pack(
        [wish_of(requests[k].target, requests[k].row, engine.n_layers) for k in firsts],
        ragged=engine.packing.ragged and route == "stairs",
        steps=decoding.max_new_tokens,
        slack=pass_cost(engine) * decoding.max_new_tokens,
        d_model=engine.d_model,
        **({"most_tokens": 0} if engine.given is not None else {}),  # images belong to one prompt
    )
    at_most = at_most or ROWS.get(engine.device.type, ROWS["cuda"])
    todo = deque(packs)
    while todo:
        one, work = todo.popleft(), None
        try:
            work = _Work(engine, one, [requests[k] for k in firsts], decoding, route, at_most, tell)
        except (RuntimeError, MemoryError) as error:
            todo.extendleft(reversed(_halved(engine, one, requests, firsts, error, tell)))
        if work is None:
            continue
        run = work.spoken() if decoding.max_new_tokens > 1 and route != "hooks" else work.read()
        for k, found in run:
            for same in alike[firsts[k]]:
                yield same, found


def _halved(
    engine: Engine, one: Pack, requests: Sequence[Request], firsts: Sequence[int], error: BaseException, tell: Tell
) -> list[Pack]:
    """Two packs of half of the targets each, where the unpatched runs of all were too much. ResourceError if it was one target."""
    if not is_out_of_memory(error):
        raise error
    n, free = len(one.targets), free_bytes(engine.device) / 2**20
    if n == 1:
        raise ResourceError(
            f"out of memory on {engine.device} in the unpatched run of a target prompt of {len(one.targets[0])} tokens; {free:.0f} MiB "
            "are free. Give a shorter prompt, free memory, or load the model in a smaller number format or on another device"
        ) from error
    tell(f"out of memory on {engine.device} with {n} target prompts at a time ({free:.0f} MiB free): going on with {n // 2}")
    halves = [one.targets[: n // 2], one.targets[n // 2 :]]
    return [Pack(half, [w for w in one.wishes if requests[firsts[w]].target in half]) for half in halves]


def _alike(requests: Sequence[Request], *, sampled: bool, guided: bool) -> dict[int, list[int]]:
    """Requests that give the same, by the first of them. Sampled ones differ by their seeds."""
    keys = same_rows([request.row for request in requests])
    if guided:
        keys = list(zip(keys, same_rows([request.companion for request in requests]), strict=True))
    groups: dict[tuple, list[int]] = {}
    for k, request in enumerate(requests):
        groups.setdefault((request.target, keys[k], request.seed if sampled else 0), []).append(k)
    return {some[0]: some for some in groups.values()}


class _Work:
    """One pack: its stem, and the rows that wait."""

    def __init__(
        self, engine: Engine, one: Pack, requests: Sequence[Request], decoding: Decoding, route: Route, at_most: int, tell: Tell
    ):
        self.engine, self.decoding, self.route, self.requests = engine, decoding, route, requests
        numbers = {ids: t for t, ids in enumerate(one.targets)}
        target_of = {k: numbers[requests[k].target] for k in one.wishes}
        self.rows = {k: replace(requests[k].row, target=target_of[k]) for k in one.wishes}
        self.companions: dict[int, Row] = {}
        if decoding.guidance:
            self.companions = {k: replace(requests[k].companion, target=target_of[k]) for k in one.wishes}
        width = max(map(len, one.targets))
        targets = torch.zeros(len(one.targets), width, dtype=torch.long)
        mask = torch.zeros(targets.shape, dtype=torch.bool)
        for t, ids in enumerate(one.targets):
            targets[t, width - len(ids) :] = torch.tensor(ids)
            mask[t, width - len(ids) :] = True
        self.last = width - 1
        self.stem = Stem(
            engine,
            targets.to(engine.device),
            [*self.rows.values(), *self.companions.values()],
            route=route,
            caching=decoding.max_new_tokens > 1,
            mask=None if bool(mask.all()) else mask.to(engine.device),
            shared=None,
            room=decoding.max_new_tokens - 1,
        )
        # a gap moves the columns of keys, of which later edits speak
        self.gaps = engine.packing.gaps and not any(row.later for row in (*self.rows.values(), *self.companions.values()))
        # rows that skip as many blocks run together
        self.waiting = deque(sorted(self.rows, key=lambda k: self.rows[k].join(engine.n_layers)))
        if route != "hooks":
            self.stem.prepare()
        self.room = Room(engine.device, self._estimate(), at_most=at_most, tell=tell)

    def _estimate(self) -> float:
        """Bytes of one row: what it owns of keys and values, the activations of a block, and the logits about three times over."""
        stem = self.stem
        later = 0.0 if stem.base is None else row_bytes(stem.base.cache, stem.room + 1, whole=stem.caching)
        one = later + activation_bytes(self.engine, stem.suffix, self.last + 1) + 3.0 * 4 * self.engine.vocab
        return one * (2 if self.companions else 1)

    def _later(self) -> float:
        """Bytes that a row takes after it has begun: by which its buffers grow, and a step's logits beside the first, which are kept."""
        if self.stem.base is None:
            return 0.0
        whole, begun = (row_bytes(self.stem.base.cache, n, whole=True) for n in (self.stem.room, min(self.stem.room, FEW)))
        return (whole - begun + 4.0 * self.engine.vocab) * (2 if self.companions else 1)

    def _take(self, n: int) -> list[int]:
        return [self.waiting.popleft() for _ in range(min(n, len(self.waiting)))]

    def _beside(self, some: list[int]) -> list[Row]:
        """The rows of some requests, each with its companion behind it if it has one."""
        if not self.companions:
            return [self.rows[k] for k in some]
        return [row for k in some for row in (self.rows[k], self.companions[k])]

    @torch.no_grad()
    def _walk(self, some: list[int], *, caching: bool) -> Walked:
        """Of the rows; the cache is that of their companions too."""
        walked = self.stem.walk(self._beside(some), [self.last], caching=caching)
        ratios = walked.norm_ratio[0::2] if self.companions else walked.norm_ratio
        return replace(walked, logits=self.decoding.guided(walked.logits), norm_ratio=ratios)

    def read(self) -> Iterator[tuple[int, Generated]]:
        """The next token of every row (and, by full passes for every token, those after it: route "hooks")."""
        while self.waiting:
            some = self._take(self.room.rows())
            walked = None
            try:
                with self.room.running(len(some), more=bool(self.waiting)):
                    walked = self._walk(some, caching=False)
            except (RuntimeError, MemoryError) as error:
                self._give_back(some, error)
            if walked is None:
                continue
            speech = Speech(replace(self.decoding, max_new_tokens=1), walked.logits.device)
            speech.enter(some, [self.requests[k].seed for k in some], walked.logits[:, 0])
            if self.decoding.max_new_tokens > 1:
                yield from self._rerun(some, walked)
                continue
            speech.look()
            texts, _ = speech.leave()
            for k, ratio, logits in zip(some, walked.norm_ratio.tolist(), walked.logits[:, 0], strict=True):
                yield k, Generated(texts[k], logits, ratio)

    def _rerun(self, some: list[int], walked: Walked) -> Iterator[tuple[int, Generated]]:
        """The whole text again for every token, patched at the same absolute position."""
        for r, k in enumerate(some):
            speech, logits = Speech(self.decoding, walked.logits.device), walked.logits[r]
            speech.enter([k], [self.requests[k].seed], logits)
            said = list(self.requests[k].target)
            while not speech.look():
                said += speech.last().tolist()
                n, rows = len(self.requests[k].target), list[Row]()
                for own in self._beside([k]):
                    more = tuple(one for edit in own.more if (one := lengthened(edit, n, len(said) - n)) is not None)
                    rows.append(replace(own, target=0, more=more))
                ids = torch.tensor([said], device=self.engine.device)
                with torch.no_grad():
                    both = Stem(self.engine, ids, rows, route="hooks").walk(rows, [len(said) - 1]).logits[:, 0]
                    speech.hear(self.decoding.guided(both))
            yield k, Generated(speech.leave()[0][k], logits[0], float(walked.norm_ratio[r]))

    def spoken(self) -> Iterator[tuple[int, Generated]]:
        """All tokens of every row."""
        batch, speech, begun = self._empty()
        while self.waiting or len(speech):
            newcomers: list[int] = []
            texts: dict[int, list[int]] = {}
            try:
                with self.stem.attending():
                    places = self._places(len(speech))
                    if places:
                        newcomers = self._take(places)
                        with self.room.running(len(newcomers), more=bool(self.waiting), later=self._later()):
                            self._begin(newcomers, batch, speech, begun)
                        newcomers = []
                    texts = self._go_on(batch, speech)
            except (RuntimeError, MemoryError) as error:
                unfinished = [*speech.who, *newcomers]
                batch, speech, begun = self._empty()
                self._give_back(list(dict.fromkeys(unfinished)), error)
            for k, text in texts.items():
                yield k, Generated(text, *begun.pop(k))

    def _empty(self) -> tuple[Batch, Speech, dict[int, tuple[Tensor, float]]]:
        return Batch(self.stem), Speech(self.decoding, self.engine.device), {}

    def _places(self, present: int) -> int:
        """How many rows may begin now. Into a batch that is under way only where the model allows it, and some at a time."""
        if not self.waiting or (present and not self.gaps):
            return 0
        most = self.room.rows(present)
        places = most - present
        return places if places >= min(len(self.waiting), max(1, most // 4)) else 0

    def _begin(self, some: list[int], batch: Batch, speech: Speech, begun: dict[int, tuple[Tensor, float]]) -> None:
        walked = self._walk(some, caching=True)
        rows = self._beside(some)
        batch.enter([row.target for row in rows], walked.cache, [row.later for row in rows])
        speech.enter(some, [self.requests[k].seed for k in some], walked.logits[:, 0])
        begun.update(zip(some, zip(walked.logits[:, 0], walked.norm_ratio.tolist(), strict=True), strict=True))

    def _go_on(self, batch: Batch, speech: Speech) -> dict[int, list[int]]:
        """Step by step until rows leave: their texts."""
        while True:
            if speech.look(waiting=bool(self.waiting) and self.gaps):
                texts, stay = speech.leave()
                if stay:
                    batch.keep([2 * r + k for r in stay for k in (0, 1)] if self.companions else stay)
                else:
                    batch.__init__(self.stem)
                return texts
            last = speech.last()
            both = batch.forward(last.repeat_interleave(2) if self.companions else last)
            speech.hear(self.decoding.guided(both))

    def _give_back(self, some: list[int], error: BaseException) -> None:
        """Rows that did not fit wait again. Any other error is raised."""
        if not is_out_of_memory(error):
            raise error
        self.waiting.extendleft(reversed(some))
        self.room.failed(len(some), error.with_traceback(None))
