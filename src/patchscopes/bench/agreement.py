"""Whether contestants say the same.

    next-token logits    max |a − b| / max |b| over a row's vocabulary ≤ tolerance
    tokens               equal; where they part, the two tokens' logits of a full pass may be a tie within the same tolerance

A tie is told with its gap. What follows a tie is another text, and is not compared. A contestant that disagrees gets no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from patchscopes.bench.work import Answer, Work

Ask = Callable[[Work, int, list[int]], Tensor]  # (work, row, tokens said) -> logits [vocab] of a full patched pass


@dataclass(frozen=True)
class Agreement:
    """ok, the largest difference of logits relative to the largest logit, rows compared, ties, and what disagrees."""

    ok: bool
    error: float
    rows: int
    ties: tuple[str, ...] = ()
    reason: str = ""


def compare(answer: Answer, reference: Answer, work: Work, ask: Ask, tolerance: float) -> Agreement:
    """One answer against another, on the rows that both have."""
    mine, theirs = ({row: k for k, row in enumerate(a.rows)} for a in (answer, reference))
    common = [row for row in theirs if row in mine]
    a = answer.logits[[mine[r] for r in common]].float().cpu()
    b = reference.logits[[theirs[r] for r in common]].float().cpu()
    error = float(((a - b).abs().amax(-1) / b.abs().amax(-1)).max()) if common else 0.0
    ties: list[str] = []
    reason = "" if error <= tolerance else f"logits differ by {error:.1e} of the largest; at most {tolerance:.0e} was expected"
    for row in common:
        said, other = answer.tokens[mine[row]], reference.tokens[theirs[row]]
        place = _parting(said, other)
        if place is None or reason:
            continue
        if place >= min(len(said), len(other)):
            reason = f"row {row} ends after {len(said)} tokens; the reference after {len(other)}"
            continue
        logits = ask(work, row, other[:place]).float()
        gap = float((logits[said[place]] - logits[other[place]]).abs() / logits.abs().max())
        if gap <= tolerance:
            ties.append(f"row {row}, token {place}: {said[place]} and {other[place]} are {gap:.1e} of the largest logit apart")
        else:
            apart = f"{gap:.1e} of the largest logit apart"
            reason = f"row {row} says {said[place]} as its token {place}; the reference says {other[place]}, {apart}"
    return Agreement(not reason, error, len(common), tuple(ties), reason)


def _parting(said: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two texts part; None if they are equal."""
    if list(said) == list(other):
        return None
    return next((k for k, (x, y) in enumerate(zip(said, other, strict=False)) if x != y), min(len(said), len(other)))


def worst(found: Sequence[Agreement]) -> Agreement:
    """Several repetitions' agreements as one."""
    reason = next((one.reason for one in found if one.reason), "")
    ties = tuple(tie for one in found for tie in one.ties)
    return Agreement(not reason, max(one.error for one in found), sum(one.rows for one in found), ties, reason)
