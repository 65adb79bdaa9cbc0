"""The rows of a viewing's controls: what each control writes in a cell, or why it cannot be there.

A control that cannot be run has no row; nothing is put in its place. Reasons that are known before anything is read (`known_reason`)
keep it out of a sweep's plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.controls.other_model import OtherModel
from patchscopes.controls.random_blocks import RandomBlocks
from patchscopes.controls.texts import at_positions
from patchscopes.controls.vectors import CONTEXT, covariance_like, random_like, seed_of, with_norms_of, zero_like
from patchscopes.core.errors import VectorError
from patchscopes.maps import map_between
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens, as_tokens
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.source import Place

if TYPE_CHECKING:
    from patchscopes.scopes.controlled import Controls

Control = str | OtherModel | RandomBlocks
Written = tuple[str, Tokens | None, Tensor | None]  # key of the run, another prompt, the state that is written
OF_OTHERS = ("other", "mean", "random_covariance")  # controls made of other sources' states

ALONE = "no other source has a finite state here"
BARE = "a vector without a prompt has no text"
NO_ROOM = "words cannot stand in the placeholder's place: none stands there, they are none, or the prompt gets too long"
NO_DIRECTION = "a zero vector has no direction to be written in proportion"
NOT_FINITE = "it is not finite (NaN or infinity)"


def name_of(control: Control) -> str:
    """What the table calls it."""
    return control if isinstance(control, str) else control.name


def in_context(model: Model, place: Place) -> Place | str:
    """The words that are read at a place, from the beginning of the first, without what stood before them, behind `CONTEXT`; or why
    there are none. Their tokens stay the same, as do those that a tokenizer puts in front. A word begins behind white space."""
    tokens = place.tokens
    if tokens is None:
        return BARE
    first, last = place.positions[0], place.positions[-1]
    if any(tokens.special[p] for p in place.positions):
        return "a token that the tokenizer added stands in no context"
    if any(image.first <= p <= image.last for image in tokens.images for p in place.positions):
        return "an image stands in no context of words"
    while first > 0 and not tokens.special[first - 1] and not _begins_word(tokens, first):
        first -= 1
    lead = 0
    while lead < first and tokens.special[lead]:
        lead += 1
    words = model.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    ids = (*tokens.ids[:lead], *words, *tokens.ids[first : last + 1])
    if model.context is not None and len(ids) > model.context:
        return f"behind another text it has {len(ids)} tokens, and the model reads at most {model.context}"
    return replace(place, tokens=as_tokens(ids), position=len(ids) - 1)


def _begins_word(tokens: Tokens, k: int) -> bool:
    start, stop = tokens.offsets[k]
    if tokens.offsets[k - 1] == (start, stop):  # a further piece of a character
        return False
    return start == 0 or tokens.text[start].isspace() or tokens.text[start - 1].isspace()


def known_reason(world: Controls, control: Control, cell: Cell) -> str | None:
    """Why a control can never be run for a cell, if that is known before anything is read."""
    viewing, place = world.viewing, world.viewing.places[cell.place]
    if isinstance(control, OtherModel):
        found = world.elsewhere[control.name][cell.place]
        return found if isinstance(found, str) else None
    if isinstance(control, RandomBlocks):
        return None
    if control in ("text", "text_at_position"):
        return (NO_ROOM if place.tokens is not None else BARE) if _words(world, control, cell) is None else None
    if control == "context":
        found = world.contexts[cell.place]
        return found if isinstance(found, str) else None
    if control == "zero" and viewing.scope.write.endswith("matched"):
        return NO_DIRECTION
    if control in OF_OTHERS and not world.others(cell.place):
        return ALONE
    return None


def rows_of(world: Controls, cell: Cell, own: Tensor) -> Iterator[tuple[str, Written | str]]:
    """(control, its run or why there is none) of every control that was asked for, in order. own: what the cell itself writes."""
    here = _Here(world, cell, own)
    for control in world.asked:
        found = known_reason(world, control, cell)
        yield name_of(control), _written(here, control) if found is None else found


@dataclass(frozen=True, eq=False)
class _Here:
    """A cell, and what several of its controls need. A key says all that a run hangs on: runs of equal key are one, and draw from the
    same seed."""

    world: Controls
    cell: Cell
    own: Tensor

    def drawn(self, what: str) -> str:
        """The key of a draw or a choice, which hangs on what the cell reads alone."""
        return f"{self.world.seed} {what} {self.world.viewing.read_identity(self.cell)}"

    @cached_property
    def at(self) -> str:
        """Where a state is written, and through which map."""
        viewing, cell = self.world.viewing, self.cell
        span = viewing.places[cell.place].span
        at = f"{cell.source_layer} {viewing.target_of(cell).digest} {cell.target_layer} {viewing.map_digest(cell)} {cell.draw}"
        return at + (f" span {span}" if span > 1 else "")

    @cached_property
    def state(self) -> Float[Tensor, "layer span *stream d_model"]:
        """h, before f."""
        found = self.world.viewing.state(self.world.viewing.sight, self.cell.place, self.cell)
        assert found is not None, "what is not finite is not written"
        return found

    @cached_property
    def others(self) -> list[tuple[tuple[str, int], Tensor]]:
        """Other sources, with what the cell would read of them."""
        some = ((which, self.world.state(which, self.cell, second=False)) for which in self.world.others(self.cell.place))
        return [(which, state) for which, state in some if state is not None]

    def mapped(self, key: str, state: Tensor, *, normed: bool = False) -> Written | str:
        """f of a state that stands in for h; or why it cannot be written. normed: with the norms of the reading's."""
        viewing = self.world.viewing
        try:
            made = viewing.mapped(self.cell, state)
        except VectorError as error:
            return str(error)
        if normed:
            made = with_norms_of(made, self.own)
        if not bool(torch.isfinite(made).all()):
            return NOT_FINITE
        if viewing.scope.write.endswith("matched") and not bool(made.any(dim=-1).all()):
            return NO_DIRECTION
        return key, None, made


def _written(here: _Here, control: Control) -> Written | str:
    if isinstance(control, OtherModel):
        return _other_model(here, control)
    if isinstance(control, RandomBlocks):
        return f"{control.name} {control.seed} {here.world.viewing.identity(here.cell)}", None, here.own
    return _NAMED[control](here)


def _nothing(here: _Here) -> Written:
    return f"nothing {here.world.viewing.target_of(here.cell).digest} {here.cell.draw}", None, None


def _zero(here: _Here) -> Written:
    return f"zero {here.at}", None, zero_like(here.own)


def _map_of_zero(here: _Here) -> Written | str:
    return here.mapped(f"map_of_zero {here.at}", zero_like(here.state))


def _mean(here: _Here) -> Written | str:
    if not here.others:
        return ALONE
    mean = torch.stack([state for _, state in here.others]).mean(0)
    return f"mean {here.world.company(here.cell.place)} {here.at}", None, here.world.viewing.mapped(here.cell, mean)


def _random(here: _Here) -> Written:
    key = f"random {here.world.viewing.identity(here.cell)}"
    return key, None, random_like(here.own[None], here.drawn("random"))[0]


def _random_covariance(here: _Here) -> Written | str:
    world, cell = here.world, here.cell
    more = [world.state(which, cell, second=False) for which in world.rest_of_pool(cell.place)]
    sample = [*(state for _, state in here.others), *(state for state in more if state is not None)]
    if len(sample) < 2:
        return ALONE
    layers = torch.stack(sample, 1)  # [layer, source, span, *stream, d_model]
    key = here.drawn("random_covariance")
    drawn = [covariance_like(h, some, f"{key} {k}") for k, (h, some) in enumerate(zip(here.state, layers, strict=True))]
    about = f"random_covariance {world.company(cell.place)} {world.viewing.identity(cell)}"
    return here.mapped(about, torch.stack(drawn), normed=True)


def _other(here: _Here) -> Written | str:
    if not here.others:
        return ALONE
    world = here.world
    (kind, k), state = here.others[seed_of(here.drawn("other")) % len(here.others)]
    chosen = (world.pool if kind == "pool" else world.viewing.places)[k].digest
    return f"other {chosen} {here.at}", None, world.viewing.mapped(here.cell, state)


def _context(here: _Here) -> Written | str:
    place = here.world.contexts[here.cell.place]
    assert isinstance(place, Place) and here.world.context is not None
    state = here.world.viewing.state(here.world.context, here.cell.place, here.cell)
    return NOT_FINITE if state is None else here.mapped(f"context {place.digest} {here.at}", state)


def _text(here: _Here) -> Written:
    return _unpatched(here, "text")


def _text_at_position(here: _Here) -> Written:
    return _unpatched(here, "text_at_position")


def _unpatched(here: _Here, control: str) -> Written:
    words = _words(here.world, control, here.cell)
    assert words is not None
    return f"text {words.ids} {here.cell.draw}", words, None


def _other_model(here: _Here, control: OtherModel) -> Written | str:
    world, viewing, cell = here.world, here.world.viewing, here.cell
    sight = world.other_sights[control.name]
    layers = viewing.layers_read(cell)
    if not sight.layers or max(layers) > sight.layers[-1]:
        return f"{control.model.name} has no layer {max(layers)}"
    state = sight.sound(cell.place, layers, viewing.places[cell.place].span)
    if state is None:
        return NOT_FINITE
    if control.map is not None:
        state = torch.stack([map_between(control.map, k, k)(one) for k, one in zip(layers, state, strict=True)])
    place = viewing.places[cell.place].digest
    return here.mapped(f"{control.name} {place} {here.at}", state.to(here.own.device))


def _words(world: Controls, control: str, cell: Cell) -> Tokens | None:
    """The target prompt with the source's text, or with that of the tokens read alone, in the placeholder's place."""
    if control == "text":
        return world.filled(cell)
    place = world.viewing.places[cell.place]
    alone = at_positions(place.tokens, place.positions) if place.tokens is not None else ""
    return world.filled(cell, alone)


_NAMED: Mapping[str, Callable[[_Here], Written | str]] = {
    "nothing": _nothing,
    "zero": _zero,
    "map_of_zero": _map_of_zero,
    "mean": _mean,
    "random": _random,
    "random_covariance": _random_covariance,
    "other": _other,
    "context": _context,
    "text": _text,
    "text_at_position": _text_at_position,
}
