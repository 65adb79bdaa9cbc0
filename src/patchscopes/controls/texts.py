"""Controls that look at no state: what the text, the question or the answers' frequencies alone would have told.

Whoever answers from these answers without the state; what it gets right by them, a description of the state need not have told.
Li et al. 2025, "Do Natural Language Descriptions of Model Activations Convey Privileged Information?".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, TypeVar

from patchscopes.core.errors import InputError
from patchscopes.core.names import PLACEHOLDER, SLOT
from patchscopes.core.words import names
from patchscopes.model.tokens import Tokens

Answer = TypeVar("Answer", bound=Hashable)
Attribution = Literal["target", "verbalizer", "both", "neither", "agree"]


def majority(answers: Sequence[Answer], groups: Sequence[Hashable], clusters: Sequence[Hashable]) -> list[Answer | None]:
    """For every row the most frequent answer of its group among rows of other clusters (entities), so that no row votes on itself; among
    equals the one that came first. None where the group has no other cluster."""
    if not len(answers) == len(groups) == len(clusters):
        raise InputError(
            f"{len(answers)} answers, {len(groups)} groups and {len(clusters)} clusters were given; expected one each"
        )
    whole: dict[Hashable, Counter[Answer]] = {}
    parts: dict[tuple[Hashable, Hashable], Counter[Answer]] = {}
    for answer, group, cluster in zip(answers, groups, clusters, strict=True):
        whole.setdefault(group, Counter())[answer] += 1
        parts.setdefault((group, cluster), Counter())[answer] += 1
    found: dict[tuple[Hashable, Hashable], Answer | None] = {}
    for (group, cluster), own in parts.items():
        left = {answer: n - own[answer] for answer, n in whole[group].items() if n > own[answer]}
        found[group, cluster] = max(left, key=left.__getitem__) if left else None
    return [found[group, cluster] for group, cluster in zip(groups, clusters, strict=True)]


def question_alone(prompt: str) -> str:
    """What the control `nothing` reads: the target prompt with the placeholder itself where the state would go."""
    return prompt.replace(SLOT, PLACEHOLDER)


def source_text(tokens: Tokens, position: int) -> str:
    """What the model had read when the state was taken: the prompt up to and with the token at `position`."""
    return tokens.upto(position)


def at_positions(tokens: Tokens, positions: Sequence[int]) -> str:
    """The text of the tokens at these positions, and no other; "" for those that a tokenizer added."""
    places = (tokens.position(one) for one in positions)
    text, end = "", 0
    for start, stop in sorted(tokens.offsets[k] for k in places if not tokens.special[k]):
        if stop > end:  # pieces of one character cover it together
            text += (" " if text and start > end else "") + tokens.text[max(start, end) : stop]
            end = stop
    return text


def answer_in_source(answers: str | Iterable[str], prompt: str) -> bool:
    """Whether the prompt already says an answer, as whole words in any case: then repeating it is no reading."""
    return names(prompt, answers)


def conflict(text: str, of_target: str | Iterable[str], of_verbalizer: str | Iterable[str]) -> Attribution:
    """Whose answer a description gives, where the model that was read and the one that speaks believe different things: "target" (the
    model that was read), "verbalizer" (its own prior: a false attribution), "both", "neither"; "agree" where an answer of one names one of
    the other ("Paris", "Paris, in France"), so that nothing can be told. Answers are names or lists of them."""
    one, other = ([answer] if isinstance(answer, str) else list(answer) for answer in (of_target, of_verbalizer))
    if any(names(answer, other) for answer in one) or any(names(answer, one) for answer in other):
        return "agree"
    target, verbalizer = names(text, one), names(text, other)
    if target and verbalizer:
        return "both"
    return "target" if target else "verbalizer" if verbalizer else "neither"
