"""Texts that would have been said of anything: the same one over and over, the control's own, refusals.

A verbalizer that says one sentence of every state can match many labels. Such shares stand beside every rate of hits.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from patchscopes.core.errors import InputError
from patchscopes.evaluate.statistics import Estimate, rate

# How a refusal begins, or a phrase that stands in nothing else.
REFUSALS = (
    r"^(?:i am|i['’]m) (?:sorry|afraid|unable|not able|not sure)\b",
    r"^sorry\b",
    r"^(?:unfortunately|apologies|my apologies)\b",
    r"\bi (?:cannot|can['’]t|can not|could not|couldn['’]t|do not|don['’]t|won['’]t) "
    r"(?:provide|answer|help|assist|know|determine|tell|identify|say)\b",
    r"\bas an? (?:ai|language model|artificial intelligence)\b",
    r"\bthere is (?:no|not enough|insufficient) (?:information|context)\b",
    r"\bit is (?:not possible|impossible|unclear)\b",
    r"^(?:unknown|none|n/a|not (?:specified|available|provided|known|given)|no answer|no information)\W*$",
)


@dataclass(frozen=True)
class Generic:
    """most_common: the text of most rows, and its share. as_control: rows that say what their control says; None without controls.
    shared: rows whose text some row of another cluster has too. All shares have intervals over clusters; texts are compared without
    case and spaces."""

    most_common: str
    most_common_share: Estimate
    as_control: Estimate | None
    shared: Estimate
    refusal: Estimate
    empty: Estimate


def plain(text: str) -> str:
    """For comparison: one case, single spaces, no punctuation or quotes at the ends."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"^[^\w]+|[^\w]+$", "", text)


def refuses(text: str) -> bool:
    """Whether a text declines to answer, by English phrases."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return any(re.search(phrase, text, re.IGNORECASE) for phrase in REFUSALS)


def generic(
    texts: Sequence[str], clusters: Sequence[Hashable], controls: Sequence[str] | None = None, *, seed: int = 0
) -> Generic:
    """controls: for every row the text of its control state."""
    if controls is not None and len(controls) != len(texts):
        raise InputError(f"{len(controls)} controls for {len(texts)} texts; give one a row")
    said = [plain(text) for text in texts]
    count = Counter(said)
    most = count.most_common(1)[0][0] if count else ""
    owners: dict[str, set[Hashable]] = {}
    for text, cluster in zip(said, clusters, strict=True):
        owners.setdefault(text, set()).add(cluster)

    def share(some: Sequence[bool]) -> Estimate:
        return rate([float(one) for one in some], clusters, seed=seed)

    return Generic(
        next((text for text, one in zip(texts, said, strict=True) if one == most), ""),
        share([one == most for one in said]),
        None if controls is None else share([one == plain(other) for one, other in zip(said, controls, strict=True)]),
        share([len(owners[one]) > 1 for one in said]),
        share([refuses(text) for text in texts]),
        share([not one for one in said]),
    )
