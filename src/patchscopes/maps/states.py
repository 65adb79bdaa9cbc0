"""States of one text in two models (or in one), at many layers, in chunks of aligned positions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchscopes.core.errors import InputError, LayerError, RefusedError
from patchscopes.core.layers import resolve_layers
from patchscopes.core.sites import SCOPED
from patchscopes.engine.run import Run
from patchscopes.maps.align import aligned
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens

TOKENS_AT_ONCE = 8192  # of one pass, padding included

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Text:
    """A text as both models see it, and the positions that are compared: those that match, or some of them."""

    source: Tokens
    target: Tokens
    positions: tuple[tuple[int, int], ...]
    matched: int


@dataclass(frozen=True, eq=False)
class States:
    """Where maps go: pairs of layers (ℓ, ℓ*) of a source and a target model, at one site. dealt: the seed by which the target's states of
    a chunk are dealt out anew, so that they belong to other positions; None: they are not. ahead: how many of the target's tokens later its
    states are read than the source's."""

    source: Model
    target: Model
    pairs: tuple[tuple[int, int], ...]
    site: str
    dealt: int | None = None
    ahead: int = 0

    @property
    def source_layers(self) -> list[int]:
        """Layers read of the source."""
        return sorted({source for source, _ in self.pairs})

    @property
    def target_layers(self) -> list[int]:
        """Layers read of the target."""
        return sorted({target for _, target in self.pairs})

    def texts(self, texts: Sequence[str], positions: int | None, seed: int) -> list[Text]:
        """The texts with their positions; `positions`: at most so many of each, drawn. InputError if nothing matches anywhere."""
        found = []
        for text in texts:
            own = self.source.tokens(text)
            other = own if self.target is self.source else self.target.tokens(text)
            both = [(i, j + self.ahead) for i, j in aligned(own, other) if _within(other, j + self.ahead)]
            some = both
            if positions is not None and len(both) > positions:
                some = sorted(random.Random(f"{seed} {digest_of_texts([text])}").sample(both, positions))
            found.append(Text(own, other, tuple(some), len(both)))
        if not any(text.positions for text in found):
            raise InputError(
                f"none of the {len(texts)} texts has a position to compare (tokens of both models that end at one character, the first of "
                f"a text left out{f', with {self.ahead} more behind them' if self.ahead else ''}); give longer texts"
            )
        return found

    def chunks(self, texts: Sequence[Text]) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor], list[Text]]]:
        """(x[ℓ] [row, d_source], y[ℓ*] [row, d_target], the texts they are of): each text run once in each model, all layers read."""
        queue = sorted((text for text in texts if text.positions), key=lambda text: len(text.source))
        generator = None if self.dealt is None else torch.Generator().manual_seed(self.dealt)
        while queue:
            size = max(1, TOKENS_AT_ONCE // max(len(queue[-1].source), len(queue[-1].target)))
            batch, queue = queue[-size:], queue[:-size]
            own, other = [text.source for text in batch], [text.target for text in batch]
            here = [[i for i, _ in text.positions] for text in batch]
            there = [[j for _, j in text.positions] for text in batch]
            if self.target is self.source:
                run = _run(self.source, own, {*self.source_layers, *self.target_layers}, self.site)
                x = _taken(run, here, self.source_layers, self.site)
                y = _taken(run, there, self.target_layers, self.site)
            else:
                x = _taken(_run(self.source, own, self.source_layers, self.site), here, self.source_layers, self.site)
                y = _taken(_run(self.target, other, self.target_layers, self.site), there, self.target_layers, self.site)
            x, y = ({layer: one.to(self.source.device) for layer, one in each.items()} for each in (x, y))
            if generator is not None:
                order = torch.randperm(len(next(iter(y.values()))), generator=generator)
                y = {layer: one[order.to(one.device)] for layer, one in y.items()}
            yield x, y, batch


def _within(tokens: Tokens, position: int) -> bool:
    """Whether a token of the text stands there, and none that a tokenizer added."""
    return position < len(tokens) and not tokens.special[position]


def states(source: Model, target: Model | None, layers: str | Pairs, site: str, ahead: int = 0) -> States:
    """Layers resolved and everything checked.

    layers: pairs (ℓ, ℓ*), negative from the end; or "same" (ℓ* = ℓ), "last" (every ℓ < L into L), "all" (every pair).
    """
    target = target or source
    for model in (source, target):
        if model.engine.streams:
            raise RefusedError(
                f"{model.name} carries {model.engine.streams} residual streams; maps are fitted between single ones"
            )
    if site not in SCOPED:
        raise InputError(f"maps are fitted at {', '.join(SCOPED)}, not at {site!r}")
    if ahead < 0:
        raise InputError(f"ahead is {ahead}; expected a number of tokens, at least 0")
    top, other = (model.n_layers - (site != "resid") for model in (source, target))
    if layers == "same":
        if top != other:
            raise LayerError(f"layers='same', but {source.name} has {top} and {target.name} {other}; name pairs of layers")
        pairs = [(layer, layer) for layer in range(top + 1)]
    elif layers == "last":
        pairs = [(layer, other) for layer in range(top + (target is not source))]
    elif layers == "all":
        pairs = [(layer, to) for layer in range(top + 1) for to in range(other + 1)]
    elif isinstance(layers, str):
        raise LayerError(f"layers is {layers!r}; expected 'same', 'last', 'all' or pairs such as [(2, 6), (3, -1)]")
    else:
        pairs = [(resolve_layers(s, top)[0], resolve_layers(t, other)[0]) for s, t in layers]
    if not pairs:
        raise LayerError("no layers were named; expected at least one pair")
    return States(source, target, tuple(dict.fromkeys(pairs)), site, ahead=ahead)


def split(texts: Sequence[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """(for fitting, held out): by the texts' content, so that equal texts never stand on both sides."""
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out:g}; expected a share between 0 and 1")
    unique = sorted(dict.fromkeys(texts), key=lambda text: hashlib.blake2b(f"{seed} {text}".encode()).digest())
    n = max(1, round(len(unique) * held_out))
    if len(unique) - n < 1:
        raise InputError(f"{len(unique)} different texts were given; expected at least two, one of them to be held out")
    away = set(unique[:n])
    return [text for text in texts if text not in away], [text for text in texts if text in away]


def digest_of_texts(texts: Sequence[str]) -> str:
    """A hash of some texts in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f"{len(text)} {text}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def counts(texts: Sequence[Text]) -> dict[str, int]:
    """Tokens of both models, how many of them end together, and how many were used."""
    return {
        "source": sum(len(text.source) for text in texts),
        "target": sum(len(text.target) for text in texts),
        "matched": sum(text.matched for text in texts),
        "used": sum(len(text.positions) for text in texts),
    }


def _run(model: Model, prompts: Sequence[Tokens], layers: Iterable[int], site: str) -> Run:
    return model.run(prompts, read=[f"{site}.{layer}" for layer in sorted(layers)])


def _taken(run: Run, positions: Sequence[Sequence[int]], layers: Iterable[int], site: str) -> dict[int, Tensor]:
    """What stands at the positions of each prompt, [row, d_model] of each layer."""
    rows, columns = [], []
    for row, some in enumerate(positions):
        real = run.mask[row].nonzero()[:, 0].tolist()
        rows += [row] * len(some)
        columns += [real[p] for p in some]
    return {layer: run[f"{site}.{layer}"][rows, columns] for layer in layers}
