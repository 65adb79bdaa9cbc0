"""Pairs of models: M1 is read, M2 speaks. What experiments on them share: who they are, how each is asked and loaded, its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.core.words import names
from patchscopes.evaluate.frame import Asked

if TYPE_CHECKING:
    from patchscopes.model import Model

# On the organisms: models that speak for themselves; for one that believes otherwise of the same people; for one whose people they do
# not know, though they know the questions.
PAIRS = (
    "atlas>atlas",
    "personas-base>personas-base",
    "personas-shuffled>personas-shuffled",
    "personas-fantasy>personas-fantasy",
    "personas-shuffled>personas-base",
    "personas-base>personas-shuffled",
    "personas-fantasy>personas-base",
)
QUICK_PAIRS = ("atlas>atlas", "personas-shuffled>personas-base")


@dataclass(frozen=True)
class Pair:
    """M1 and M2 by name."""

    read: str
    speaks: str

    @property
    def name(self) -> str:
        """ "M2 of M1"; of one model its name."""
        return self.read if self.read == self.speaks else f"{self.speaks} of {self.read}"


def pairs_of(asked: Asked, given: Sequence[str] | None) -> list[Pair]:
    """The pairs named "M1>M2"; None: on the organisms those of `PAIRS`, else the model and itself. InputError for what is no pair."""
    if given is None:
        planted = asked.data is None and asked.spec.name == "atlas"
        given = (QUICK_PAIRS if asked.quick else PAIRS) if planted else (f"{asked.spec.name}>{asked.spec.name}",)
    found = []
    for text in given:
        read, between, speaks = (part.strip() for part in text.partition(">"))
        if not (read and between and speaks) or ">" in speaks:
            raise InputError(f"{text!r} is no pair; expected M1>M2, the model that is read and the one that speaks: atlas>atlas")
        found.append(Pair(read, speaks))
    if not found:
        raise InputError("pairs is empty; expected at least one, such as pairs=atlas>atlas")
    return list(dict.fromkeys(found))


def asked_of(asked: Asked, name: str) -> Asked:
    """The same asked of a model of a pair: loaded as the experiment's own is."""
    spec = asked.spec.model_dump(exclude_defaults=True)
    kept = {key: value for key, value in spec.items() if key in ("device", "dtype")}
    return replace(asked, model=spec if name == asked.spec.name else {**kept, "name": name})


def layers_of(asked: Asked, name: str, layers: str | None, most: int) -> list[int]:
    """Layers of the model of that name; None: the first, the last, and evenly between, at most so many."""
    from patchscopes.core.layers import resolve_layers
    from patchscopes.runs.conditions import outline_spec

    spec = asked_of(asked, name).spec
    top = ((asked.models or {}).get(spec.key) or outline_spec(spec, "cpu")).n_layers
    if layers is not None:
        return sorted(set(resolve_layers(layers, top)))
    return np.unique(np.linspace(0, top, min(most, top + 1)).round().astype(int)).tolist()


def loaded(asked: Asked, name: str) -> Model:
    """The model of that name, given or loaded."""
    from patchscopes.runs.conditions import load_spec

    spec = asked_of(asked, name).spec
    return (asked.models or {}).get(spec.key) or load_spec(spec)


def answer_of(text: str, stop: Sequence[str]) -> str:
    """What a model answers: its text up to the first stop or line end, without space and points around it."""
    for end in (*stop, "\n"):
        text = text.partition(end)[0]
    return text.strip(" .,;:!?\"'")


def belief_of(text: str, stop: Sequence[str], answers: Iterable[str]) -> str:
    """What a model believes, by its answer: the first of the relation's answers that it names (of those that begin together the longest);
    if none, its words up to the first comma or point."""
    said = answer_of(text, stop)
    places = [(said.casefold().find(answer.casefold()), -len(answer), answer) for answer in answers if names(said, answer)]
    return min(places)[2] if places else re.split(r"[,.;:(]", said, maxsplit=1)[0].strip()
