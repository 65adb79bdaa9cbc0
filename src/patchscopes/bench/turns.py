"""All contestants take turns on the same work.

Warm-up: every variant of everyone once, on work that is not measured; the fastest is kept. Then repetitions: in each one every
contestant runs the same new work, the order rotating. A ratio is the median over repetitions of contestant / ours within one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchscopes.bench.agreement import Agreement, compare, worst
from patchscopes.bench.contestants import Contestant, answer_of
from patchscopes.bench.models import Subject
from patchscopes.bench.peer import PeerError
from patchscopes.bench.work import Answer, Work
from patchscopes.engine.tolerance import tolerance

REFERENCES = ("one_at_a_time", "hooks", "prefix_cache")  # the obvious computations, the most obvious first

Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass
class Score:
    """What was found of one contestant.

    seconds    one a repetition        variant     the fastest way of writing it, and the seconds of all in the warm-up
    flops      of one repetition       failure     why it is not in the table
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    variant: str = ""
    warm_up: dict[str, float] = field(default_factory=dict)
    flops: int | None = None
    agreement: Agreement | None = None
    sampled: bool = False
    comparable: bool = True
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds, over the repetitions."""
        return statistics.median(self.seconds)


def take_turns(
    contestants: Sequence[Contestant],
    subject: Subject,
    works: Sequence[Work],
    *,
    count: bool,
    progress: Progress = lambda done, of, what: None,
    what: str = "measuring",
) -> dict[str, Score]:
    """The scores. works[0] is the warm-up, the others a repetition each."""
    scores = {c.name: Score(c.name, sampled=c.sampled, comparable=c.comparable) for c in contestants}
    total, done = len(works) * len(contestants), 0
    running = list(contestants)
    for c in contestants:
        progress(done, total, what)
        try:
            _warm_up(c, works[0], scores[c.name], count=count)
        except PeerError as e:
            scores[c.name].failure = str(e)
            running.remove(c)
        done += 1
    agreements: dict[str, list[Agreement]] = {}
    for n, work in enumerate(works[1:]):
        answers: dict[str, Answer] = {}
        order = running[n % len(running) :] + running[: n % len(running)] if running else []
        for c in order:
            progress(done, total, what)
            try:
                answers[c.name], seconds = c.run(work, scores[c.name].variant)
                scores[c.name].seconds.append(seconds)
            except PeerError as e:
                scores[c.name].failure = str(e)
                running.remove(c)
            done += 1
        for name, answer in answers.items():
            if scores[name].comparable:
                agreements.setdefault(name, []).append(_agreement(name, answer, answers, scores, subject, work))
    for name, found in agreements.items():
        scores[name].agreement = worst(found)
    progress(total, total, what)
    return scores


def ratios(score: Score, ours: Score) -> list[float]:
    """Contestant / ours in each repetition; empty if either failed or disagrees: then there is nothing to compare."""
    if any(s.failure or (s.agreement is not None and not s.agreement.ok) for s in (score, ours)):
        return []
    return [a / b for a, b in zip(score.seconds, ours.seconds, strict=True)]


def _warm_up(c: Contestant, work: Work, score: Score, *, count: bool) -> None:
    """The fastest variant; each one's first run, which may compile or fill caches, does not count. Of several the better of two
    runs counts, so that a busy moment does not choose."""
    failed = []
    variants = c.variants(work.tokens)
    for variant in variants:
        few = work.part(range(min(2, len(work.layers))))
        try:
            c.run(few, variant)
            score.warm_up[variant] = min(c.run(work, variant)[1] for _ in range(min(2, len(variants))))
        except PeerError as e:  # one way of several may not work on a model
            failed.append(f"{variant}: {e}")
    if not score.warm_up:
        raise PeerError("; ".join(failed))
    score.variant = min(score.warm_up, key=score.warm_up.__getitem__)
    if count:
        score.flops = c.flops(work, score.variant)


def _agreement(
    name: str, answer: Answer, answers: dict[str, Answer], scores: dict[str, Score], subject: Subject, work: Work
) -> Agreement:
    """With the most obvious computation that ran; of sampled cells, with each of the obvious ones."""
    allowed = tolerance(subject.dtype, subject.device)
    references = [r for r in REFERENCES if r in answers and r != name]
    if not references:
        return Agreement(True, 0.0, 0, (), "")
    some = [r for r in references if scores[r].sampled]
    rest = [r for r in references if not scores[r].sampled][:1]
    return worst([compare(answer, answers[r], work, _full_pass(subject), allowed) for r in some + rest])


def _full_pass(subject: Subject) -> Callable[[Work, int, list[int]], Tensor]:
    """Logits of a row's text so far, by one full pass with a hook."""

    def ask(work: Work, row: int, said: list[int]) -> Tensor:
        text = torch.cat([work.target, torch.tensor([said], dtype=torch.long, device=work.target.device)], 1)
        one = Work(text, work.position, work.layers[row : row + 1], work.vectors[row : row + 1], 1)
        return answer_of(subject.engine, one, "hooks").logits[0].cpu()

    return ask
