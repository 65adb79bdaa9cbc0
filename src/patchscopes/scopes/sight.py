"""The states of places, read when they are needed and kept while there is room: groups of cells share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import VectorError
from patchscopes.model.model import Model
from patchscopes.scopes.source import Place, look

KEPT = 2**28  # bytes of states and distributions that are kept, beside those in use


class Sight:
    """States of `places` at `layers`, each of up to `reach` tokens, behind the text `behind` if there is one (the second look)."""

    def __init__(
        self,
        model: Model,
        places: Sequence[Place],
        layers: Sequence[int],
        site: str,
        behind: str | None = None,
        reach: int = 1,
    ):
        self.model, self.places, self.layers, self.site, self.behind, self.reach = model, places, layers, site, behind, reach
        self._kept: dict[int, tuple[dict[int, Tensor], Tensor | None]] = {}

    def need(self, wanted: Iterable[int]) -> None:
        """Read what is missing of the places numbered `wanted`, each prompt once; they stay until others are needed."""
        wanted = set(wanted)
        missing = sorted(wanted - self._kept.keys())
        if not missing:
            return
        self._make_room(wanted)
        looked = look(self.model, [self.places[k] for k in missing], self.layers, self.site, behind=self.behind, reach=self.reach)
        for i, k in enumerate(missing):
            states = {layer: looked.vectors[i, layer] for layer in self.layers if (i, layer) in looked.vectors}
            self._kept[k] = (states, looked.next_log_p[i])

    def _make_room(self, wanted: set[int]) -> None:
        size = sum(_bytes(one) for one in self._kept.values())
        for k in list(self._kept):  # the oldest first
            if size <= KEPT:
                break
            if k not in wanted:
                size -= _bytes(self._kept.pop(k))

    def vector(self, k: int, layer: int) -> Float[Tensor, " d_model"]:
        """The state at the position of place k. VectorError where it has none: a bare vector cannot be read behind a text."""
        if (found := self.found(k, [layer])) is None:
            raise VectorError(f"{self.places[k].text!r} has no state at layer {layer}: a vector has no prompt to read again")
        return found[0, -1]

    def found(self, k: int, layers: Sequence[int], span: int = 1) -> Float[Tensor, "layer span *stream d_model"] | None:
        """The states of the `span` tokens that end at place k, or None where there are fewer."""
        some = [self._kept[k][0].get(layer) for layer in layers]
        whole = [states[-span:] for states in some if states is not None and len(states) >= span]
        return torch.stack(whole) if len(whole) == len(layers) else None

    def sound(self, k: int, layers: Sequence[int], span: int = 1) -> Float[Tensor, "layer span *stream d_model"] | None:
        """The same, if they are finite."""
        found = self.found(k, layers, span)
        return found if found is not None and bool(torch.isfinite(found).all()) else None

    def next_log_p(self, k: int) -> Float[Tensor, " vocab"] | None:
        """What the source model would say after place k, nats; None for a bare vector."""
        return self._kept[k][1]


def _bytes(one: tuple[dict[int, Tensor], Tensor | None]) -> int:
    states, log_p = one
    return sum(t.nbytes for t in states.values()) + (0 if log_p is None else log_p.nbytes)
