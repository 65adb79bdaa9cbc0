"""patchscopes: turn hidden states of language models into words, and see whether the words can be believed.

    import patchscopes as ps

    model = ps.load("atlas")
    source = ps.Source(model, "Yesterday we talked about France", position="France", layer="all")
    print(ps.scopes.extract("The capital of {x} is")(source))

Names are imported when first used, so that `import patchscopes` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchscopes import controls, lenses, maps, measures, runs, scopes
    from patchscopes.core import coordinates, edits
    from patchscopes.core.edits import Edit
    from patchscopes.core.errors import PatchscopesError
    from patchscopes.experiment import Experiment
    from patchscopes.model import Model, Tokens, load
    from patchscopes.runs import open_run, resume, sweep
    from patchscopes.scopes import Patchscope, Readings, Source

_HOMES = {
    "Edit": "patchscopes.core.edits",
    "Experiment": "patchscopes.experiment",
    "PatchscopesError": "patchscopes.core.errors",
    "Model": "patchscopes.model",
    "Tokens": "patchscopes.model",
    "load": "patchscopes.model",
    "open_run": "patchscopes.runs",
    "resume": "patchscopes.runs",
    "sweep": "patchscopes.runs",
    "Patchscope": "patchscopes.scopes",
    "Readings": "patchscopes.scopes",
    "Source": "patchscopes.scopes",
}
_FAMILIES = {
    "controls": "patchscopes.controls",
    "coordinates": "patchscopes.core.coordinates",
    "edits": "patchscopes.core.edits",
    "lenses": "patchscopes.lenses",
    "maps": "patchscopes.maps",
    "measures": "patchscopes.measures",
    "runs": "patchscopes.runs",
    "scopes": "patchscopes.scopes",
}

__all__ = [
    "Edit",
    "Experiment",
    "Model",
    "Patchscope",
    "PatchscopesError",
    "Readings",
    "Source",
    "Tokens",
    "controls",
    "coordinates",
    "edits",
    "lenses",
    "load",
    "maps",
    "measures",
    "open_run",
    "resume",
    "runs",
    "scopes",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _FAMILIES:
        return importlib.import_module(_FAMILIES[name])
    raise AttributeError(f"module 'patchscopes' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
