"""Input inversion: what can be read off the states about the text that they were made of, and how far that alone answers.

A description may do no more than say the input again. So the input is reconstructed from the very states, by one of three inverters, and a
question is answered from the reconstruction, with nothing patched (Li et al. 2025, arXiv 2509.13316: inversion, then zero-shot):

    TokenVectors    nearest neighbour of each state                     nothing trained
    Inverter        linear heads for the tokens up to a state's own     trained on texts
    Patchscope      `scopes.repeat`: the model says the words again     nothing trained

from all states of the text (inversion A) and from the one that is read (inversion B). What a reading tells beyond the answers from A is not
in the text that its source saw; beyond those from B, not in the words that one vector gives back.

How many tokens the name has is told to the inverters: a favour, so that the control is rather too strong than too weak. One vector gives
a nearest neighbour its own token alone, K tokens to linear heads, and to the repeat scope whatever it says.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from patchscopes.core.errors import InputError, PositionError, PromptError
from patchscopes.core.layers import resolve_layers
from patchscopes.core.names import SLOT
from patchscopes.evaluate import scoring, statistics
from patchscopes.evaluate.statistics import Estimate
from patchscopes.lenses import Inverter, TokenVectors
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position, Tokens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Place, Source, look

By = Inverter | TokenVectors | Patchscope
AT_ONCE = 128  # prompts that are gone on with together


@dataclass(frozen=True)
class Reconstruction:
    """What came back of one source.

    text    all that its text has up to the read position, from all states
    piece   the words at the position (the name), from all their states
    one     the same from the read state alone
    ids     of `text`, token by token; own: those that stood there
    """

    layer: int
    text: str
    piece: str
    one: str
    ids: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def token_accuracy(self) -> float:
        """The share of tokens that came back at their own place."""
        same = sum(a == b for a, b in zip(self.ids, self.own, strict=False))
        return same / len(self.own) if self.own else math.nan  # nothing but special tokens stands there


def invert(
    model: Model, prompts: Sequence[Prompt], at: Sequence[Position] | Position, layer: int, by: By
) -> list[Reconstruction]:
    """Each prompt, read at its position (or all at one), reconstructed from states at `layer`. `by`: an inverter of this model; a scope
    writes at one layer."""
    positions = [at] * len(prompts) if isinstance(at, (int, str)) or not isinstance(at, Sequence) else list(at)
    if len(positions) != len(prompts):
        raise InputError(
            f"{len(prompts)} prompts were given with {len(positions)} positions; expected one for each, or one for all"
        )
    (resolved,) = resolve_layers(layer, model.n_layers)
    places = [Source(model, p, one, resolved, span="piece").places()[0] for p, one in zip(prompts, positions, strict=True)]
    return _said_again(model, places, resolved, by) if isinstance(by, Patchscope) else _read_off(model, places, resolved, by)


def _read_off(model: Model, places: Sequence[Place], layer: int, by: Inverter | TokenVectors) -> list[Reconstruction]:
    """By the token of each state."""
    seen = look(model, places, [layer], "resid", reach=max(place.position for place in places) + 1)
    found = []
    for k, place in enumerate(places):
        tokens = _tokens(place)
        states = seen.vectors[k, layer]
        own = [p for p in range(place.position + 1) if not tokens.special[p]]
        told = _own_tokens(by, states, layer)
        back = _from_one(by, states[-1:], layer)[: place.span]
        found.append(
            Reconstruction(
                layer,
                model.decode([told[p] for p in own]).strip(),
                model.decode(told[-place.span :]).strip(),
                model.decode(back[::-1]).strip(),
                tuple(told[p] for p in own),
                tuple(tokens.ids[p] for p in own),
            )
        )
    return found


def _own_tokens(by: Inverter | TokenVectors, states: Tensor, layer: int) -> list[int]:
    return by.ids(states, layer)[:, 0].tolist() if isinstance(by, Inverter) else list(by.nearest(states, layer).ids)


def _from_one(by: Inverter | TokenVectors, state: Tensor, layer: int) -> list[int]:
    """The token at t, t − 1, … of one state at t."""
    return by.ids(state, layer)[0].tolist() if isinstance(by, Inverter) else list(by.nearest(state, layer).ids)


def _said_again(model: Model, places: Sequence[Place], layer: int, by: Patchscope) -> list[Reconstruction]:
    """By the model itself."""
    ways: list[list[Source]] = [[], [], []]
    for place in places:
        tokens = _tokens(place)
        lead = next((p for p, added in enumerate(tokens.special) if not added), 0)
        for way, span in zip(ways, (place.position + 1 - lead, place.span, 1), strict=True):
            way.append(Source(model, tokens, place.position, layer, span=span))
    text, piece, one = ([words.strip() for words in _words(by, way, len(places))] for way in ways)
    found = []
    for k, place in enumerate(places):
        tokens = _tokens(place)
        own = [p for p in range(place.position + 1) if not tokens.special[p]]
        ids = _ids(model, text[k], tokens.upto(place.position))
        found.append(Reconstruction(layer, text[k], piece[k], one[k], ids, tuple(tokens.ids[p] for p in own)))
    return found


def _words(by: Patchscope, sources: Sequence[Source], n: int) -> list[str]:
    table = by(sources, controls=False).table
    if table.height != n:
        raise InputError(
            f"the scope {by.name!r} gave {table.height} texts for {n} states; expected one prompt, layer, map and draw"
        )
    return table.sort("prompt")["text"].to_list()


def _ids(model: Model, said: str, like: str) -> tuple[int, ...]:
    """Token ids of what was said, as they would stand where the text stood."""
    if not said:
        return ()
    tokens = model.tokens(" " + said if like[:1].isspace() else said)
    return tuple(i for i, added in zip(tokens.ids, tokens.special, strict=True) if not added)


def _tokens(place: Place) -> Tokens:
    if place.tokens is None:
        raise InputError(f"{place.text!r} is a vector without a prompt; what is reconstructed has to have been a text")
    return place.tokens


def answers(
    model: Model, targets: Sequence[str], words: Sequence[str], max_new_tokens: int = 10, stop: Sequence[str] = ()
) -> list[str]:
    """What the model says behind each target prompt with the words in place of {x}, greedily and with nothing patched; "" where there are
    no words, or the prompt is none. Equal prompts are run once."""
    if len(targets) != len(words):
        raise InputError(f"{len(targets)} target prompts were given with {len(words)} words; expected one for each")
    asked: list[str | None] = []
    for target, one in zip(targets, words, strict=True):
        if SLOT not in target:
            raise PositionError(f"the target prompt {target!r} has no {SLOT}, where the words are to stand")
        asked.append(target.replace(SLOT, one.strip()) if one.strip() else None)
    room = None if model.context is None else model.context - max_new_tokens
    fits: dict[str, Tokens] = {}
    for prompt in dict.fromkeys(one for one in asked if one is not None):
        try:
            tokens = model.tokens(prompt)
        except PromptError:  # what came back is no text that this model reads
            continue
        if room is None or len(tokens) <= room:
            fits[prompt] = tokens
    order = sorted(fits, key=lambda prompt: len(fits[prompt]))
    said: dict[str, str] = {}
    for k in range(0, len(order), AT_ONCE):
        batch = order[k : k + AT_ONCE]
        texts = model.generate([fits[prompt] for prompt in batch], max_new_tokens=max_new_tokens, stop=stop)
        said |= {prompt: one.text for prompt, one in zip(batch, texts, strict=True)}
    return [said.get(prompt, "") if prompt is not None else "" for prompt in asked]


@dataclass(frozen=True)
class InversionScores:
    """Rates over sources with intervals over entities. tokens: of the text that came back at their place; name and name_one: the name came
    back, as whole words, from all its states and from the read one; answer and answer_one: the answers from these name the object."""

    tokens: Estimate
    name: Estimate
    name_one: Estimate
    answer: Estimate
    answer_one: Estimate


def scores(
    found: Sequence[Reconstruction],
    names: Sequence[str],
    objects: Sequence[Sequence[str]],
    said: Sequence[str],
    said_one: Sequence[str],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> InversionScores:
    """names: what stood at each place; objects: the right answers, any of them; said and said_one: `answers` from `piece` and `one`."""
    rows = {
        "tokens": [one.token_accuracy for one in found],
        "name": [float(scoring.names(one.piece, name)) for one, name in zip(found, names, strict=True)],
        "name_one": [float(scoring.names(one.one, name)) for one, name in zip(found, names, strict=True)],
        "answer": [float(scoring.names(text, right)) for text, right in zip(said, objects, strict=True)],
        "answer_one": [float(scoring.names(text, right)) for text, right in zip(said_one, objects, strict=True)],
    }
    return InversionScores(**{name: statistics.rate(values, clusters, seed=seed) for name, values in rows.items()})
