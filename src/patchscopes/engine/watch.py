"""What one pass, or a series of passes over the same prompts, is to read and to write, as hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from patchscopes.core.coordinates import Coordinates
from patchscopes.core.errors import SiteError
from patchscopes.core.sites import EDGES, Site
from patchscopes.engine.edits import OF_KEYS, Frame, Placed, edited, refuse_contradictions
from patchscopes.engine.engine import Engine
from patchscopes.engine.hooks import Change, Handle
from patchscopes.engine.places import Current, at_sites


class Watch:
    """Collects the values of `reads` (whole sites, all their heads) while it makes `edits`.

    frame        where the pass stands; whoever runs several passes sets it before each
    coordinates  systems that hang on sites: their features are read along, and edits at the site may be in them
    graph        keep what autograd needs: values read are part of the graph, and what follows hangs on them
    values       site -> value, edits made;  features  site -> encode(value)
    """

    def __init__(
        self,
        engine: Engine,
        reads: Sequence[Site],
        edits: Sequence[Placed],
        frame: Frame,
        *,
        coordinates: Mapping[Site, Coordinates] | None = None,
        graph: bool = False,
    ):
        refuse_contradictions(edits)
        self.engine, self.frame, self.graph = engine, frame, graph
        self.coordinates = dict(coordinates or {})
        self.reads = dict.fromkeys(site.whole for site in reads)  # in the order asked for
        self.edits: dict[Site, list[Placed]] = {}
        for edit in edits:
            self.edits.setdefault(edit.site.whole, []).append(edit)
        self.values: dict[Site, Tensor] = {}
        self.features: dict[Site, Tensor] = {}
        self.current = Current()
        self._versions: dict[Site, int] = {}
        self._copied: set[Site] = set()

    def hooks(self) -> list[Handle]:
        """The hooks, not yet on. SiteError for a site that the model has not."""
        sites = sorted({*self.reads, *self.edits, *self.coordinates})
        return at_sites(self.engine, {site: self._change(site) for site in sites if site.name != "state"}, self.current)

    def again(self) -> bool:
        """Whether the model wrote into a value that was handed out (parallel Falcon, Llama-4): then run once more, with copies."""
        moved = {site for site, value in self.values.items() if site in self._versions and value._version != self._versions[site]}
        self._copied |= moved
        return bool(moved)

    def _change(self, site: Site) -> Change:
        edits, system = self.edits.get(site, []), self.coordinates.get(site)

        def change(x: Tensor) -> Tensor | None:
            if site.name in (*OF_KEYS, *EDGES):
                self._refuse_other_keys(site, x.shape[-1 if site.name in EDGES else -3])
            new = edited(x, edits, self.frame) if edits else None
            value = x if new is None else new
            if self.graph:
                return self._kept(site, value, system)
            if site in self.reads:
                self.values[site] = value.clone() if site in self._copied else value
                self._versions[site] = self.values[site]._version
            if system is not None:
                self.features[site] = system.encode(value)
            return new

        return change

    def _refuse_other_keys(self, site: Site, keys: int) -> None:
        """Keys that stand for no token, or for several (DeepSeek-V4), have no positions."""
        frame = self.frame
        tokens = max(frame.lengths) + frame.first[0] + frame.columns - frame.lengths[frame.prompts[0]]
        if keys > tokens:
            raise SiteError(
                f"site {site} is not on this model in this prompt: it has {keys} keys for {tokens} tokens, not one for each"
            )

    def _kept(self, site: Site, value: Tensor, system: Coordinates | None) -> Tensor:
        """The value as a node of the graph on which all that follows hangs. A copy goes on: some models write into what they get."""
        if system is not None:
            # x + (x̂(f) − x̂(f) without gradient): x itself, but what flows back reaches the features, once
            f = system.encode(value).detach().requires_grad_()
            said = system.decode(f)
            value = value + (said - said.detach())
            self.features.setdefault(site, f)
        if site in self.reads:
            # a node of its own: x itself may go elsewhere too (parallel MLPs read what the attention reads; a norm's scale is taken off)
            value = value.clone() if value.requires_grad else value.detach().requires_grad_()
            self.values.setdefault(site, value)  # the first: checkpointing runs it again
        return value.clone()


def stacked(values: Sequence[Tensor], site: Site) -> Tensor:
    """Values of one site from passes over one token each, as of one pass over all."""
    return torch.cat(list(values), -1 - site.features)
