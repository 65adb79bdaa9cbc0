"""Bits about the answer: what a state tells a verbalizer of an answer that is known, beyond what the text had told it.

For an item with the answer a (a stop behind it, so that "Pern" is not "Pernambuco"), its state h at layer ℓ and a scope that puts h into
T at layer ℓ* of M2:

    bits over k = log2 p_M2(a | T, h) − log2 p_M2(a | k)

    nothing    T with its placeholder alone
    others     the mean of p over the states of other items of the relation, of other entities and with other answers
    named      T with the subject's name in the placeholder's place: what M2 itself holds true of that name
    source     T with the source's words up to the position there

The first two are a pointwise V-information (Xu et al. 2020, "A Theory of Usable Information under Computational Constraints"), the last
two a conditional one (Hewitt et al. 2021, "Conditional probing"): above 0, the state told M2 what that text had not. Unlike the evidence
of a reading, which is about the text that the scope said, this needs the truth. Bits are unbounded below: a state that makes M2 sure of
something else costs many.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from patchscopes.core.names import SLOT
from patchscopes.evaluate.data import Item

if TYPE_CHECKING:
    from patchscopes.model import Model
    from patchscopes.scopes import Patchscope

Progress = Callable[[int, int, str], None]
OTHERS = 4  # of other items, whose states stand in for an item's own


@dataclass(frozen=True, eq=False)
class AnswerBits:
    """log2 p of every item's answer. own, others: [item, layer]; nothing, named, source: [item]. NaN where there is no such run."""

    items: tuple[Item, ...]
    layers: tuple[int, ...]
    own: np.ndarray
    others: np.ndarray
    nothing: np.ndarray
    named: np.ndarray
    source: np.ndarray

    def over(self, control: str) -> np.ndarray:
        """[item, layer]: bits over "nothing", "others", "named" or "source"."""
        found = getattr(self, control)
        return self.own - (found if found.ndim == 2 else found[:, None])


def answer_bits(
    model: Model,
    verbalizer: Model,
    items: Sequence[Item],
    layers: Sequence[int],
    target_layer: int,
    *,
    stop: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = lambda done, of, what: None,
) -> AnswerBits:
    """The bits of the module's docstring. layers: ℓ of `model`; target_layer: ℓ* of `verbalizer`."""
    from patchscopes.scopes import extract

    ending = stop[0] if stop else ""
    shape = (len(items), len(layers))
    own, others = np.full(shape, np.nan), np.full(shape, np.nan)
    flat = {name: np.full(len(items), np.nan) for name in ("nothing", "named", "source")}
    targets: dict[tuple[str, str], list[int]] = {}
    for k, item in enumerate(items):
        targets.setdefault((item.relation, item.target), []).append(k)
    for done, ((_, target), mine) in enumerate(targets.items()):
        progress(done, len(targets), "bits about the answer")
        some = [items[k] for k in mine]
        scope = replace(extract(target, layer=target_layer, stop=stop), model=verbalizer)
        behind = [f" {item.answers[0]}{ending}" for item in some]
        for name, found in _plain(model, verbalizer, scope, some, behind).items():
            flat[name][mine] = found
        for column, layer in enumerate(layers):
            own[mine, column], others[mine, column] = _patched(model, scope, some, behind, layer, seed)
    progress(len(targets), len(targets), "bits about the answer")
    return AnswerBits(tuple(items), tuple(layers), own, others, **flat)


def strangers_of(items: Sequence[Item], n: int, seed: int) -> list[list[int]]:
    """For every item up to n others with another answer and of another entity, drawn by the seed and the item's own words."""
    found = []
    for item in items:
        able = [j for j, other in enumerate(items) if other.cluster != item.cluster and other.answers[0] != item.answers[0]]
        found.append(random.Random(f"{seed} {item.subject} {item.target}").sample(able, min(n, len(able))))
    return found


def _plain(
    model: Model, verbalizer: Model, scope: Patchscope, some: Sequence[Item], behind: Sequence[str]
) -> dict[str, np.ndarray]:
    """log2 p of the answers where nothing is patched, by what stands in the placeholder's place."""
    from patchscopes.controls.texts import question_alone, source_text
    from patchscopes.scopes.written import log_p, plainly

    prompts = {name: [] for name in ("nothing", "named", "source")}
    for item in some:
        tokens = model.tokens(item.prompt)
        words = source_text(tokens, tokens.position(item.at))
        prompts["nothing"].append(question_alone(item.target))
        prompts["named"].append(item.target.replace(SLOT, item.subject))
        prompts["source"].append(item.target.replace(SLOT, words))
    found = {}
    for name, texts in prompts.items():
        found[name] = np.full(len(some), np.nan)
        fits = [k for k, text in enumerate(texts) if _fits(verbalizer, text + behind[k])]
        found[name][fits] = bits(log_p([plainly(verbalizer, texts[k]) for k in fits], [behind[k] for k in fits], scope))
    return found


def _fits(model: Model, text: str) -> bool:
    """Whether the model reads so long a text."""
    return model.context is None or len(model.tokenizer(text)["input_ids"]) <= model.context


def _patched(
    model: Model, scope: Patchscope, some: Sequence[Item], behind: Sequence[str], layer: int, seed: int
) -> tuple[list[float], list[float]]:
    """log2 p of the answers under their own states, and of the mean of p under those of strangers."""
    from patchscopes.scopes import Source
    from patchscopes.scopes.source import look
    from patchscopes.scopes.written import log_p, one_each

    sources = [Source(model, item.prompt, position=item.at, layer=layer) for item in some]
    read = look(model, [source.places()[0] for source in sources], [layer], "resid").vectors
    sound = [k for k in range(len(some)) if bool(read[k, layer].isfinite().all())]
    if not sound:
        return [math.nan] * len(some), [math.nan] * len(some)
    each = one_each(scope, [sources[k] for k in sound])
    place = {k: number for number, k in enumerate(sound)}
    strangers = strangers_of(some, OTHERS, seed)
    whose = [(k, j) for k in sound for j in (k, *strangers[k]) if j in place]
    runs = [each.scope(place[k], each.states[place[j]]) for k, j in whose]
    found = bits(log_p(runs, [behind[k] for k, _ in whose], scope))
    own, others = [math.nan] * len(some), [[] for _ in some]
    for (k, j), one in zip(whose, found, strict=True):
        if k == j:
            own[k] = one
        else:
            others[k].append(one)
    return own, [float(np.logaddexp2.reduce(row)) - math.log2(len(row)) if row else math.nan for row in others]


def bits(nats: Sequence[float]) -> list[float]:
    """log p in nats as log2 p."""
    return [one / math.log(2) for one in nats]
