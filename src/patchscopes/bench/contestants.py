"""The ways to a grid that run in this process.

    ours           this engine
    one_at_a_time  the published way: one pass a cell with a hook, all positions unembedded; one `generate` a cell for more tokens
    hooks          batched full passes with hooks, only the last position unembedded; one batched `generate` for more tokens
    prefix_cache   batched hooks on a prefix cache made by hand: what a careful user may write
    generate       `generate` of as many rows without any patch: what generation itself costs; its answer is another one

A contestant offers variants of writing the same; the fastest in the warm-up is measured. The published code also runs the source
prompt again for every cell. Here all contestants get the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from patchscopes.bench.measure import counted_flops, timed
from patchscopes.bench.models import Subject
from patchscopes.bench.work import Answer, Work
from patchscopes.core.sites import Site
from patchscopes.engine.engine import Engine
from patchscopes.engine.generate import Decoding, generate
from patchscopes.engine.hooks import hooked, on_input
from patchscopes.engine.patch import Route, next_logits
from patchscopes.engine.rows import Row

Variant = Callable[[Subject, Work], Answer]


class Contestant(Protocol):
    """One way to a grid.

    variants    names of its ways of writing it, given how many tokens are to be said
    run         does the work in one of them: the answer and the seconds it took
    flops       counted on the same work; None where they cannot be
    comparable  whether its answer should equal the others'
    sampled     whether it runs some cells only, its time being scaled
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def comparable(self) -> bool: ...  # noqa: D102

    @property
    def sampled(self) -> bool: ...  # noqa: D102

    def variants(self, tokens: int) -> list[str]: ...  # noqa: D102

    def run(self, work: Work, variant: str) -> tuple[Answer, float]: ...  # noqa: D102

    def flops(self, work: Work, variant: str) -> int | None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Local:
    """A contestant in this process. `alone`: it runs this many cells, evenly spread, and its time and FLOPs are scaled."""

    name: str
    subject: Subject
    ways: Mapping[str, Variant]
    comparable: bool = True
    alone: int | None = None

    @property
    def sampled(self) -> bool:
        """Whether it runs some cells only."""
        return self.alone is not None

    def variants(self, tokens: int) -> list[str]:
        """All of them, for any number of tokens."""
        return list(self.ways)

    def run(self, work: Work, variant: str) -> tuple[Answer, float]:
        """The answer, and seconds for the whole grid."""
        rows = self._rows(work)
        answer, seconds = timed(lambda: self._say(self.subject, work, rows, variant), self.subject.device)
        return answer, seconds * len(work.layers) / len(rows)

    def flops(self, work: Work, variant: str) -> int | None:
        """FLOPs of the whole grid, as a first call on its target."""
        rows = self._rows(work)[:1] if self.sampled else self._rows(work)  # cells alone cost the same
        fresh = self.subject.anew()
        _, flops = counted_flops(lambda: self._say(fresh, work, rows, variant), fresh.hf)
        return flops * len(work.layers) // len(rows)

    def close(self) -> None:
        """Nothing to give back."""

    def _rows(self, work: Work) -> list[int]:
        n = len(work.layers)
        if self.alone is None or self.alone >= n:
            return list(range(n))
        return [i * n // self.alone for i in range(self.alone)]

    def _say(self, subject: Subject, work: Work, rows: list[int], variant: str) -> Answer:
        with torch.no_grad():
            answer = self.ways[variant](subject, work.part(rows) if len(rows) < len(work.layers) else work)
        return Answer(rows, answer.logits, answer.tokens)


def local(name: str, subject: Subject, *, alone: int | None) -> Local:
    """The contestant of that name in this process."""
    ways: dict[str, dict[str, Variant]] = {
        "ours": {"": ours},
        "one_at_a_time": {"": one_at_a_time},
        "hooks": {"all rows in one batch": hooks_in_one_batch, "a batch a layer": hooks_by_layer},
        "prefix_cache": {"": prefix_cache},
        "generate": {"": plain_generate},
    }
    return Local(name, subject, ways[name], name != "generate", alone if name == "one_at_a_time" else None)


LOCAL = ("ours", "one_at_a_time", "hooks", "prefix_cache", "generate")


# ------------------------------------------------------------------------------------------------------------------- ours


def ours(subject: Subject, work: Work) -> Answer:
    """This engine's public functions, called as a Patchscope calls them."""
    return answer_of(subject.engine, work)


def answer_of(engine: Engine, work: Work, route: Route = "stairs") -> Answer:
    """The one place where the benchmark calls the engine."""
    rows = [Row(Site("resid", layer), work.position, v) for layer, v in zip(work.layers, work.vectors, strict=True)]
    everyone = list(range(len(rows)))
    if work.tokens == 1:
        logits = next_logits(engine, work.target, rows, route)
        return Answer(everyone, logits, logits.argmax(-1, keepdim=True).tolist())
    said = generate(engine, work.target, rows, Decoding(work.tokens, work.end, work.stop), route=route)
    return Answer(everyone, torch.stack([one.logits for one in said]), [one.tokens for one in said])


# ------------------------------------------------------------------------------------------------------------------ hooks


def hooks_in_one_batch(subject: Subject, work: Work) -> Answer:
    """Every row through every block, all rows together; a hook a layer writes its rows."""
    return _hooked(subject, work, logits_to_keep=1)


def hooks_by_layer(subject: Subject, work: Work) -> Answer:
    """The same, one batch for each target layer."""
    parts = []
    for layer in sorted(set(work.layers)):
        rows = [r for r, other in enumerate(work.layers) if other == layer]
        part = _hooked(subject, work.part(rows), logits_to_keep=1)
        parts.append(Answer(rows, part.logits, part.tokens))
    return _together(parts)


def one_at_a_time(subject: Subject, work: Work) -> Answer:
    """One pass or one `generate` a cell; a pass unembeds all positions, as the published code has it."""
    parts = []
    for row in range(len(work.layers)):
        part = _hooked(subject, work.part([row]), logits_to_keep=0)
        parts.append(Answer([row], part.logits, part.tokens))
    return _together(parts)


def _hooked(subject: Subject, work: Work, *, logits_to_keep: int) -> Answer:
    ids = work.target.expand(len(work.layers), -1)
    everyone = list(range(len(work.layers)))
    with hooked(_writing(subject.engine.blocks, work)):
        if work.tokens == 1:
            keep = {"logits_to_keep": logits_to_keep} if subject.engine.anatomy.takes_keep else {}
            logits = subject.hf(ids, use_cache=False, **keep).logits[:, -1]
            return Answer(everyone, logits, logits.argmax(-1, keepdim=True).tolist())
        logits, said = _generated(subject, work, ids)
    return Answer(everyone, logits, said)


def _writing(blocks: list[nn.Module], work: Work, start: int = 0) -> list[Any]:
    """A hook for each target layer that writes its rows' vectors at i*, in the prompt pass only. `start`: tokens in the cache."""

    def at(layer: int) -> Any:
        rows = torch.tensor([r for r, other in enumerate(work.layers) if other == layer], device=work.vectors.device)

        def change(x: Tensor) -> Tensor | None:
            if x.shape[-2] != work.length - start or done:
                return None
            x = x.clone()
            x[..., rows, work.position - start, :] = work.vectors[rows].to(x)
            if layer == last:
                done.append(layer)
            return x

        return on_input(blocks[layer], change)

    done: list[int] = []  # a one-token prompt pass looks like a step of decoding: only the first pass is patched
    last = max(work.layers)
    return [at(layer) for layer in sorted(set(work.layers))]


class _Stops(StoppingCriteria):
    """Ends a row of `generate` where the work ends it."""

    def __init__(self, work: Work):
        self.work, self.over = work, [False] * len(work.layers)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.work.stop is not None:
            for row, said in enumerate(input_ids[:, self.work.length :].tolist()):
                self.over[row] = self.over[row] or self.work.stop(said) is not None
        return torch.tensor(self.over, device=input_ids.device)


def _generated(subject: Subject, work: Work, ids: Tensor) -> tuple[Tensor, list[list[int]]]:
    out = subject.hf.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=work.tokens,
        do_sample=False,
        eos_token_id=sorted(work.end) or None,
        return_dict_in_generate=True,
        output_logits=True,
        stopping_criteria=StoppingCriteriaList([_Stops(work)]) if work.stop else None,
    )
    return out.logits[0], [work.cut(row) for row in out.sequences[:, work.length :].tolist()]


def _together(parts: list[Answer]) -> Answer:
    rows = [row for part in parts for row in part.rows]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    logits, tokens = torch.cat([part.logits for part in parts]), [said for part in parts for said in part.tokens]
    return Answer([rows[k] for k in order], logits[order], [tokens[k] for k in order])


# ------------------------------------------------------------------------------------------------------------ by hand, and price


def prefix_cache(subject: Subject, work: Work) -> Answer:
    """The tokens before i* once, their cache widened to all rows; every row from there through every block."""
    n, hf, start = len(work.layers), subject.hf, work.position
    cache = DynamicCache(config=hf.config)
    hf(work.target[:, :start], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(n)
    with hooked(_writing(subject.engine.blocks, work, start)):
        logits = hf(work.target[:, start:].expand(n, -1), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    said, token = [], logits.argmax(-1, keepdim=True)
    for step in range(work.tokens):
        said.append(token)
        if step + 1 < work.tokens:
            token = hf(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    return Answer(list(range(n)), logits, [work.cut(row) for row in torch.cat(said, 1).tolist()])


def plain_generate(subject: Subject, work: Work) -> Answer:
    """As many rows, no patch. The tokens are the target's own continuation."""
    ids = work.target.expand(len(work.layers), -1)
    logits, said = _generated(subject, work, ids)
    return Answer(list(range(len(ids))), logits, said)
